//! The rows: their names, their criteria, and their sides.

use anyhow::Result;

use crate::comparison::{Comparison, Outcome};
use crate::limit;
use crate::new_abilities;
use crate::ours_side::kinds::Tracked;
use crate::reference_side;
use crate::ring_windows;
use crate::shared_pages::SharedPages;
use crate::throughput::Shift;
use crate::values::{S16, S64};
use crate::workload_shapes::{Dirty, Mappings};

/// One operation.
pub struct Row {
    pub name: &'static str,
    pub comparison: fn(&SharedPages) -> Result<Comparison>,
}

/// The figures that a row must reach, in every build.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Criteria {
    /// The minimum ratio of the reference's time to ours.
    pub least_ratio: f64,
    /// The maximum time: this factor of the limit, plus 1 ns. Some rows have only the ratio.
    pub limit_factor: Option<f64>,
}

/// The criteria of a row that is not in [`EXCEPTIONS`]: not slower than the reference, and close to
/// the limit.
pub const USUAL: Criteria = of(0.97, Some(1.5));

const fn of(least_ratio: f64, limit_factor: Option<f64>) -> Criteria {
    Criteria {
        least_ratio,
        limit_factor,
    }
}

/// The criteria of other rows. A marking access has a locked instruction or a fence that the limit
/// lacks. An IOTLB guesses the place of a mapping and checks the guess, where the limit indexes an
/// array. A ratio above 1 keeps the gain of a design. The first name that [`matches`] counts.
#[rustfmt::skip]
const EXCEPTIONS: &[(&str, Criteria)] = &[
    ("write_obj.u64, n=1, AtomicBitmap", of(2.0, Some(3.0))),
    ("store.u64, n=1, AtomicBitmap", of(1.5, Some(3.0))),
    ("mark_dirty, 1B, already", of(0.85, Some(5.0))),
    ("mark_dirty, 64K, already", of(10.0, Some(2.2))),
    ("mark_dirty, 1M, already", of(120.0, Some(1.5))),
    ("mark_dirty, 1G, already", of(200.0, Some(1.3))),
    ("get_and_reset, *, clean", of(7.0, None)),
    ("get_and_reset, *, 0.01%", of(7.0, None)),
    ("get_and_reset, *", of(1.0, None)),
    ("harvest, *, clean", of(7.0, None)),
    ("harvest, *, 0.01%", of(7.0, None)),
    ("harvest, 1T, 0.001%", of(7.0, None)),
    ("harvest, *", of(1.0, None)),
    ("GuestMemoryAtomic: memory()", of(1.0, None)),
    ("GuestMemoryAtomic: memory().clone", of(0.97, None)),
    ("GuestMemoryAtomic: lock_replace(n=4)", of(0.95, None)),
    ("Iotlb::lookup of 8 B hit, n=1, fragmented", of(4.0, Some(2.5))),
    ("Iotlb::lookup of 8 B hit, n=100, fragmented", of(12.0, Some(2.5))),
    ("Iotlb::lookup of 8 B hit, n=10000, fragmented", of(18.0, Some(2.5))),
    ("Iotlb::lookup of 8 B hit, n=1000000, fragmented", of(20.0, Some(2.0))),
    // Adjacent mappings are merged, also in the reference.
    ("Iotlb::lookup of 8 B hit, n=10000, contiguous", of(0.97, Some(2.5))),
    ("Iotlb::lookup of 8 B hit, n=1000000, contiguous", of(0.97, Some(2.0))),
    ("Iotlb::lookup of 8 B miss, n=1, fragmented", of(2.0, None)),
    ("Iotlb::lookup of 8 B miss, n=10000, fragmented", of(4.0, None)),
    ("IommuMemory: read_obj.u64 behind an RwLock, n=1, fragmented", of(3.0, None)),
    ("IommuMemory: read_obj.u64 behind an RwLock, n=10000, fragmented", of(9.0, None)),
    ("IommuMemory: read_obj.u64 behind an RwLock, n=1000000, fragmented", of(10.0, None)),
    ("virtio-queue 0.18: add_used, n=1", of(1.5, Some(2.0))),
    ("virtio-queue 0.18: add_used, n=1, AtomicBitmap", of(2.0, Some(3.0))),
    // It marks twice, each time with a fence.
    ("Window: add_used, AtomicBitmap", of(2.0, Some(5.0))),
    ("virtio-queue 0.18: iter128x1(per chain), n=1", of(1.3, Some(6.0))),
    ("virtio-queue 0.18: iter128x1(per chain), n=1, AtomicBitmap", of(1.3, Some(6.0))),
];

/// The reasons of rows that miss a criterion. `cargo xtask bench` writes the reason of each row
/// that does, or "not explained". The first name that [`matches`] counts.
const REASONS: &[(&[&str], &str)] = &[
    (
        &["GuestMemoryAtomic: memory()"],
        "Both crates call the same function of `arc-swap`; the difference is noise",
    ),
    (
        &["SharedIotlb: remap a page, n=10000"],
        "A change is made in two tables, and published (decision 15). The other side changes one \
         table behind a lock without readers",
    ),
    (
        &["SharedIotlb: remap a page, n=10000, *"],
        "While a request holds a snapshot, a change clones the table and copies a leaf \
         (decision 15). In 0.18.0, requests exclude changes: the other side has no request",
    ),
    (
        &["Iotlb::lookup of 8 B miss, n=1, fragmented"],
        "A miss allocates its list of ranges, as the type of 0.18.0 demands; that is a third of \
         the instructions",
    ),
    (
        &["Iotlb::lookup of 8 B hit, *"],
        "The limit indexes an array; the IOTLB guesses a leaf and a place, and checks both \
         (decision 14)",
    ),
    (
        &["IommuMemory: read_obj.u64 behind an RwLock, *"],
        "The lock takes two atomic instructions, as in 0.18.0",
    ),
    (
        &["mark_dirty, 1B, already", "mark_dirty, 64K, already", "mark_dirty, 1M, already"],
        "One full fence takes most of the time (decision 17)",
    ),
    (
        &["mark_dirty, 1B, clean"],
        "A mark loads the word first, so that a dirty page is not written (decision 17). In this \
         row, the load waits for the locked instruction of the previous mark",
    ),
    (
        &["get_and_reset, *"],
        "The result is a new vector, as the signature of 0.18.0 demands. For 64 GiB, both crates \
         spend most of the time in 512 faults of its pages",
    ),
    (
        &["harvest, 1G, clean", "harvest, 1G, 0.01%"],
        "A bitmap of less than 8 GiB has no summary, so that marks are cheaper: a harvest loads \
         each word, in nine tenths of its instructions",
    ),
    (
        &["harvest, 1T, 0.01%"],
        "Each marked page is in another cache line of the bitmap. In the build `size`, clearing a \
         line takes 226 instructions, and 67 in the build `fat`",
    ),
    (
        &["dirty_at"],
        "Both crates load one word, in 27 and 28 instructions in the build `fat`; the difference \
         is noise",
    ),
    (
        &["remove_region, n=4", "remove_region, n=64"],
        "The new map also gets a table for lookups, and its regions are in chunks that maps share; \
         0.18.0 copies one vector",
    ),
    (
        &["get_slice64, n=1", "get_slices64.next, n=1"],
        "A lookup compares the address with the bounds of the map, and then the range with those \
         of the region; the limit compares the range with the length of one array",
    ),
    (
        &["harvest, *, 1%", "harvest, *, 10%", "harvest, *, half", "harvest, *, all"],
        "Each word that has marks takes a locked instruction, or two words take one",
    ),
    (
        &["virtio-queue 0.18: iter128x1*"],
        "The iterators of virtio-queue store fields of up to 8 bytes, and their caller copies 16 \
         bytes at once. Two such copies stall for a third of the time. In the build `release`, \
         those of 0.18.0 do not stall",
    ),
    (
        &["virtio-queue 0.18: *"],
        "virtio-queue makes several accesses by guest address, each with a lookup; the limit indexes \
         one array",
    ),
    (
        &["read_obj*", "write_obj*", "load*", "store*", "Window: read_obj*", "Window: write_obj*"],
        "An access checks its address, and tests a register for a fault (decision 3); the limit \
         only checks the address",
    ),
    (
        &["Window: add_used, AtomicBitmap"],
        "Each of the two accesses marks its page, with a full fence (decision 17); the limit \
         neither checks nor marks",
    ),
    (
        &["Window: add_used"],
        "Each of the two accesses checks its offset, and tests a register for a fault (decision \
         3); the limit writes through a raw pointer, without a check",
    ),
    (
        &["read_slice, 16, n=1"],
        "An access finds its region, checks the permission and the range, and chooses a routine by \
         the length, in 77 instructions with the copy; the limit compares once and calls `memcpy`",
    ),
    (
        &["read_slice_cross, 16, n=64"],
        "The access finds that the range passes the end of its region. It then visits the parts by \
         an iterator, in two thirds of its instructions; the limit knows where to split the range",
    ),
    (
        &["read_slice, 16M, n=1"],
        "The `memcpy` of 0.18.0 bypasses the caches for 16 MiB. This crate does from 24 MiB; \
         below, `rep movsb` takes about as long",
    ),
    (
        &["read_slice, 64*", "read_slice, 512*", "VolatileSlice::copy_*"],
        "A copy calls a routine by pointer, where the limit inlines `memcpy` or calls it directly \
         (decision 6)",
    ),
    (
        &["vectored: *"],
        "The other side is only the system call, with eight vectors at hand. This crate also finds \
         and checks eight segments, in 1000 instructions",
    ),
];

/// Returns whether `pattern` stands for `name`. A `*` in it stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        Some((start, end)) => name
            .strip_prefix(start)
            .is_some_and(|rest| rest.ends_with(end)),
        None => name == pattern,
    }
}

/// The rows of `--quick`: operations of devices for each request, and of migration for each round.
/// Each represents similar rows, which usually get slower together with it.
const QUICK: [&str; 15] = [
    "read_obj.s16, n=1",
    "read_obj.u64, n=1024",
    "write_obj.u64, n=1, AtomicBitmap",
    "load.u16, n=1",
    "store.u64, n=1, AtomicBitmap",
    "read_slice, 64, n=1",
    "write_slice, 04K, n=1, AtomicBitmap",
    "mark_dirty, 1M, already",
    "harvest, 64G, 1%",
    "GuestMemoryAtomic: memory()",
    "Iotlb::lookup of 8 B hit, n=10000, fragmented",
    "virtio-queue 0.18: add_used, n=1, AtomicBitmap",
    "virtio-queue 0.18: iter128x1(per chain), n=1",
    "virtio-queue 0.18: blk4k(per req), n=1, AtomicBitmap",
    "Window: add_used",
];

/// Suffixes of the names of rows that call the same operation from code other than a plain loop.
const CONTEXTS: [&str; 2] = [", boxed closure", ", generic device"];

impl Row {
    /// Returns the name without the context of the calls.
    pub fn operation(&self) -> &'static str {
        CONTEXTS
            .iter()
            .find_map(|context| self.name.strip_suffix(context))
            .unwrap_or(self.name)
    }

    pub fn criteria(&self) -> Criteria {
        let exception = EXCEPTIONS
            .iter()
            .find(|(pattern, _)| matches(pattern, self.operation()));
        exception.map_or(USUAL, |(_, criteria)| *criteria)
    }

    /// Returns why the row misses a criterion, if it does.
    pub fn reason(&self) -> Option<&'static str> {
        let explains = |(patterns, _): &&(&[&str], _)| {
            patterns
                .iter()
                .any(|pattern| matches(pattern, self.operation()))
        };
        REASONS.iter().find(explains).map(|(_, reason)| *reason)
    }

    /// Returns whether `--quick` runs this row.
    pub fn is_quick(&self) -> bool {
        QUICK.contains(&self.operation())
    }
}

impl Criteria {
    /// Returns whether the row meets criterion 1.
    pub fn ratio_holds(&self, outcome: &Outcome) -> bool {
        outcome.ratio >= self.least_ratio
    }

    /// Returns whether the row meets criterion 2, or `None` if the row does not have it.
    pub fn limit_holds(&self, outcome: &Outcome) -> Option<bool> {
        let most = self.limit_factor? * outcome.limit? + 1.0;
        Some(outcome.ours <= most)
    }
}

/// A row with the same workload on both crates, and a limit where one is known.
macro_rules! row {
    ($name:literal, |$shared:pat_param| $side:expr $(, $limit:expr)?) => {
        Row {
            name: $name,
            comparison: |$shared: &SharedPages| {
                let reference = {
                    #[expect(unused_imports, reason = "a row uses one of them")]
                    use crate::reference_side::{access, bitmaps, contexts, copies, iommu, kinds::*, maps, queues};
                    $side?
                };
                let ours = {
                    #[expect(unused_imports, reason = "a row uses one of them")]
                    use crate::ours_side::{access, bitmaps, contexts, copies, iommu, kinds::*, maps, queues};
                    $side?
                };
                let limit = [$($limit?)?].into_iter().next();
                Ok(Comparison { reference, ours, limit })
            },
        }
    };
}

/// A row for an operation that 0.18.0 lacks: the code that replaces it there, then ours.
macro_rules! new_row {
    ($name:literal, |$shared:pat_param| $beside:expr, $ours:expr $(, $limit:expr)?) => {
        Row {
            name: $name,
            comparison: |$shared: &SharedPages| {
                Ok(Comparison {
                    reference: $beside?,
                    ours: $ours?,
                    limit: [$($limit?)?].into_iter().next(),
                })
            },
        }
    };
}

/// A row for a harvest: into a new vector in 0.18.0, and into a buffer that is reused.
macro_rules! harvest_row {
    ($name:literal, $dirty:expr) => {
        new_row!(
            $name,
            |_| reference_side::bitmaps::get_and_reset($dirty),
            new_abilities::harvest($dirty)
        )
    };
}

const GIB: usize = 1 << 30;

/// All rows, grouped by area.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    row!("find_region, n=1", |shared| access::find_region(shared, 1), limit::find_region(shared, 1)),
    row!("find_region, n=4", |shared| access::find_region(shared, 4), limit::find_region(shared, 4)),
    row!("find_region, n=4, boxed closure", |shared| contexts::boxed::<contexts::FindRegion, Plain>(shared, 4), limit::boxed_find_region(shared, 4)),
    row!("find_region, n=4, generic device", |shared| contexts::in_device::<contexts::FindRegion, Plain>(shared, 4)),
    row!("find_region, n=64", |shared| access::find_region(shared, 64), limit::find_region(shared, 64)),
    row!("find_region, n=1024", |shared| access::find_region(shared, 1024), limit::find_region(shared, 1024)),
    row!("get_slice64, n=1", |shared| access::get_slice64(shared, 1), limit::get_slice64(shared, 1)),
    row!("get_slice64, n=1024", |shared| access::get_slice64(shared, 1024), limit::get_slice64(shared, 1024)),
    row!("check_range4k, n=1", |shared| access::check_range4k(shared, 1), limit::check_range4k(shared, 1)),
    row!("check_range4k, n=1024", |shared| access::check_range4k(shared, 1024), limit::check_range4k(shared, 1024)),
    row!("get_slices64.next, n=1", |shared| access::get_slices64_next(shared, 1), limit::get_slice64(shared, 1)),
    row!("read_obj.u8, n=1", |shared| access::read_obj::<u8, Plain>(shared, 1), limit::read_obj::<u8>(shared, 1)),
    row!("read_obj.u16, n=1", |shared| access::read_obj::<u16, Plain>(shared, 1), limit::read_obj::<u16>(shared, 1)),
    row!("read_obj.u32, n=1", |shared| access::read_obj::<u32, Plain>(shared, 1), limit::read_obj::<u32>(shared, 1)),
    row!("read_obj.u64, n=1", |shared| access::read_obj::<u64, Plain>(shared, 1), limit::read_obj::<u64>(shared, 1)),
    row!("read_obj.u64, n=1, boxed closure", |shared| contexts::boxed::<contexts::ReadObj<u64>, Plain>(shared, 1), limit::boxed_read::<u64>(shared)),
    row!("read_obj.u64, n=1, generic device", |shared| contexts::in_device::<contexts::ReadObj<u64>, Plain>(shared, 1)),
    row!("read_obj.u64, n=1, AtomicBitmap", |shared| access::read_obj::<u64, Tracked>(shared, 1), limit::read_obj::<u64>(shared, 1)),
    row!("read_obj.u64, n=4", |shared| access::read_obj::<u64, Plain>(shared, 4), limit::read_obj::<u64>(shared, 4)),
    row!("read_obj.u64, n=1024", |shared| access::read_obj::<u64, Plain>(shared, 1024), limit::read_obj::<u64>(shared, 1024)),
    row!("read_obj.s16, n=1", |shared| access::read_obj::<S16, Plain>(shared, 1), limit::read_obj::<S16>(shared, 1)),
    row!("read_obj.s64, n=1", |shared| access::read_obj::<S64, Plain>(shared, 1), limit::read_obj::<S64>(shared, 1)),
    row!("read_obj.s16, n=1, boxed closure", |shared| contexts::boxed::<contexts::ReadObj<S16>, Plain>(shared, 1), limit::boxed_read::<S16>(shared)),
    row!("read_obj.s64, n=1, boxed closure", |shared| contexts::boxed::<contexts::ReadObj<S64>, Plain>(shared, 1), limit::boxed_read::<S64>(shared)),
    row!("read_obj.s16, n=1, generic device", |shared| contexts::in_device::<contexts::ReadObj<S16>, Plain>(shared, 1)),
    row!("read_obj.s64, n=1, generic device", |shared| contexts::in_device::<contexts::ReadObj<S64>, Plain>(shared, 1)),
    row!("write_obj.s16, n=1", |shared| access::write_obj::<S16, Plain>(shared, 1), limit::write_obj::<S16>(shared)),
    row!("write_obj.s64, n=1", |shared| access::write_obj::<S64, Plain>(shared, 1), limit::write_obj::<S64>(shared)),
    row!("write_obj.s16, n=1, boxed closure", |shared| contexts::boxed::<contexts::WriteObj<S16>, Plain>(shared, 1), limit::boxed_write::<S16>(shared)),
    row!("write_obj.s64, n=1, boxed closure", |shared| contexts::boxed::<contexts::WriteObj<S64>, Plain>(shared, 1), limit::boxed_write::<S64>(shared)),
    row!("write_obj.s16, n=1, generic device", |shared| contexts::in_device::<contexts::WriteObj<S16>, Plain>(shared, 1)),
    row!("write_obj.s64, n=1, generic device", |shared| contexts::in_device::<contexts::WriteObj<S64>, Plain>(shared, 1)),
    row!("write_obj.u64, n=1", |shared| access::write_obj::<u64, Plain>(shared, 1), limit::write_obj::<u64>(shared)),
    row!("write_obj.u64, n=1, boxed closure", |shared| contexts::boxed::<contexts::WriteObj<u64>, Plain>(shared, 1), limit::boxed_write::<u64>(shared)),
    row!("write_obj.u64, n=1, generic device", |shared| contexts::in_device::<contexts::WriteObj<u64>, Plain>(shared, 1)),
    row!("write_obj.u64, n=1, AtomicBitmap", |shared| access::write_obj::<u64, Tracked>(shared, 1), limit::write_obj_tracked::<u64>(shared)),
    row!("write_obj.u64, n=1, AtomicBitmap, boxed closure", |shared| contexts::boxed::<contexts::WriteObj<u64>, Tracked>(shared, 1), limit::boxed_write_tracked(shared)),
    row!("write_obj.u64, n=1, AtomicBitmap, generic device", |shared| contexts::in_device::<contexts::WriteObj<u64>, Tracked>(shared, 1)),
    row!("load.u16, n=1", |shared| access::load::<u16, Plain>(shared, 1), limit::read_obj::<u16>(shared, 1)),
    row!("load.u16, n=1, boxed closure", |shared| contexts::boxed::<contexts::Load, Plain>(shared, 1), limit::boxed_read::<u16>(shared)),
    row!("load.u16, n=1, generic device", |shared| contexts::in_device::<contexts::Load, Plain>(shared, 1)),
    row!("load.u16, n=1, AtomicBitmap", |shared| access::load::<u16, Tracked>(shared, 1), limit::read_obj::<u16>(shared, 1)),
    row!("store.u64, n=1", |shared| access::store::<u64, Plain>(shared, 1), limit::write_obj::<u64>(shared)),
    row!("store.u64, n=1, boxed closure", |shared| contexts::boxed::<contexts::Store, Plain>(shared, 1), limit::boxed_write::<u64>(shared)),
    row!("store.u64, n=1, generic device", |shared| contexts::in_device::<contexts::Store, Plain>(shared, 1)),
    row!("store.u64, n=1, AtomicBitmap", |shared| access::store::<u64, Tracked>(shared, 1), limit::write_obj_tracked::<u64>(shared)),
    row!("store.u64, n=1, AtomicBitmap, boxed closure", |shared| contexts::boxed::<contexts::Store, Tracked>(shared, 1), limit::boxed_write_tracked(shared)),
    row!("store.u64, n=1, AtomicBitmap, generic device", |shared| contexts::in_device::<contexts::Store, Tracked>(shared, 1)),
    row!("read_slice, 16, n=1", |shared| access::read_slice::<Plain>(shared, 16), limit::read_slice(shared, 16)),
    row!("read_slice, 64, n=1", |shared| access::read_slice::<Plain>(shared, 64), limit::read_slice(shared, 64)),
    row!("read_slice, 64, n=1, boxed closure", |shared| contexts::boxed::<contexts::ReadSlice, Plain>(shared, 1), limit::boxed_read_slice(shared)),
    row!("read_slice, 64, n=1, generic device", |shared| contexts::in_device::<contexts::ReadSlice, Plain>(shared, 1)),
    row!("read_slice, 512, n=1", |shared| access::read_slice::<Plain>(shared, 512), limit::read_slice(shared, 512)),
    row!("write_slice, 04K, n=1", |shared| access::write_slice::<Plain>(shared, 4096), limit::write_slice(shared, 4096)),
    row!("write_slice, 04K, n=1, AtomicBitmap", |shared| access::write_slice::<Tracked>(shared, 4096), limit::write_slice(shared, 4096)),
    row!("read_slice, 64K, n=1", |shared| access::read_slice::<Plain>(shared, 64 << 10), limit::read_slice(shared, 64 << 10)),
    row!("write_slice, 64K, n=1", |shared| access::write_slice::<Plain>(shared, 64 << 10), limit::write_slice(shared, 64 << 10)),
    row!("read_slice, 1M, n=1", |shared| access::read_slice::<Plain>(shared, 1 << 20), limit::read_slice(shared, 1 << 20)),
    row!("read_slice, 16M, n=1", |shared| access::read_slice::<Plain>(shared, 16 << 20), limit::read_slice(shared, 16 << 20)),
    row!("read_slice_cross, 16, n=64", |shared| access::read_slice_cross(shared, 16, 64), limit::read_slice_cross(shared, 16, 64)),
    row!("read_slice_cross, 04K, n=64", |shared| access::read_slice_cross(shared, 4096, 64), limit::read_slice_cross(shared, 4096, 64)),
    row!("VolatileSlice::copy_to, u16, 4096B", |shared| copies::copy_to::<u16, 2048>(shared), limit::copy_to::<u16, 2048>(shared)),
    row!("VolatileSlice::copy_to, u32, 4096B", |shared| copies::copy_to::<u32, 1024>(shared), limit::copy_to::<u32, 1024>(shared)),
    row!("VolatileSlice::copy_to, u64, 4096B", |shared| copies::copy_to::<u64, 512>(shared), limit::copy_to::<u64, 512>(shared)),
    row!("VolatileSlice::copy_from, u16, 4096B", |shared| copies::copy_from::<u16, 2048>(shared), limit::copy_from::<u16, 2048>(shared)),
    row!("VolatileSlice::copy_from, u32, 4096B", |shared| copies::copy_from::<u32, 1024>(shared), limit::copy_from::<u32, 1024>(shared)),
    row!("VolatileSlice::copy_from, u64, 4096B", |shared| copies::copy_from::<u64, 512>(shared), limit::copy_from::<u64, 512>(shared)),
    row!("VolatileSlice::copy_to, u8, 64B", |shared| copies::copy_to::<u8, 64>(shared), limit::copy_to::<u8, 64>(shared)),
    row!("VolatileSlice::copy_to, u8, 64K, 12 B above the source modulo 4096", |shared| copies::copy_bytes(shared, 64 << 10, Shift::ABOVE_SOURCE), limit::copy_bytes(shared, 64 << 10, Shift::ABOVE_SOURCE)),
    row!("VolatileSlice::copy_to_vs, 4096B", |shared| copies::copy_to_volatile_slice(shared, 4096), limit::copy_to_volatile_slice(shared, 4096)),
    row!("mark_dirty, 1B, already", |_| bitmaps::mark_dirty(1), limit::mark_dirty(1)),
    row!("mark_dirty, 64K, already", |_| bitmaps::mark_dirty(64 << 10), limit::mark_dirty(64 << 10)),
    row!("mark_dirty, 1M, already", |_| bitmaps::mark_dirty(1 << 20), limit::mark_dirty(1 << 20)),
    row!("mark_dirty, 1G, already", |_| bitmaps::mark_dirty(1 << 30), limit::mark_dirty(1 << 30)),
    row!("get_and_reset, 1G, 0.01%", |_| bitmaps::get_and_reset(Dirty { len: GIB, one_in: 10_000 })),
    row!("get_and_reset, 64G, clean", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 0 })),
    row!("get_and_reset, 64G, 0.01%", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 10_000 })),
    row!("get_and_reset, 64G, 1%", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 100 })),
    row!("get_and_reset, 64G, 10%", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 10 })),
    row!("get_and_reset, 64G, half", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 2 })),
    row!("get_and_reset, 64G, all", |_| bitmaps::get_and_reset(Dirty { len: 64 * GIB, one_in: 1 })),
    row!("mark_dirty, 1B, clean", |_| bitmaps::mark_clean()),
    new_row!("mark_dirty, 1B, switched off", |_| reference_side::bitmaps::mark_dirty(1), new_abilities::mark_switched_off(false)),
    new_row!("mark_dirty, 1B, switched off while paused", |_| reference_side::bitmaps::mark_dirty(1), new_abilities::mark_switched_off(true)),
    new_row!("harvest, 1T, 0.001%", |_| new_abilities::harvest_large_reference(), new_abilities::harvest_large()),
    harvest_row!("harvest, 1G, clean", Dirty { len: GIB, one_in: 0 }),
    harvest_row!("harvest, 1G, 0.01%", Dirty { len: GIB, one_in: 10_000 }),
    harvest_row!("harvest, 1G, 1%", Dirty { len: GIB, one_in: 100 }),
    harvest_row!("harvest, 1G, 10%", Dirty { len: GIB, one_in: 10 }),
    harvest_row!("harvest, 1G, half", Dirty { len: GIB, one_in: 2 }),
    harvest_row!("harvest, 1G, all", Dirty { len: GIB, one_in: 1 }),
    harvest_row!("harvest, 64G, clean", Dirty { len: 64 * GIB, one_in: 0 }),
    harvest_row!("harvest, 64G, 0.01%", Dirty { len: 64 * GIB, one_in: 10_000 }),
    harvest_row!("harvest, 64G, 1%", Dirty { len: 64 * GIB, one_in: 100 }),
    harvest_row!("harvest, 64G, 10%", Dirty { len: 64 * GIB, one_in: 10 }),
    harvest_row!("harvest, 64G, half", Dirty { len: 64 * GIB, one_in: 2 }),
    harvest_row!("harvest, 64G, all", Dirty { len: 64 * GIB, one_in: 1 }),
    harvest_row!("harvest, 1T, clean", Dirty { len: 1024 * GIB, one_in: 0 }),
    harvest_row!("harvest, 1T, 0.01%", Dirty { len: 1024 * GIB, one_in: 10_000 }),
    harvest_row!("harvest, 1T, 1%", Dirty { len: 1024 * GIB, one_in: 100 }),
    harvest_row!("harvest, 1T, 10%", Dirty { len: 1024 * GIB, one_in: 10 }),
    harvest_row!("harvest, 1T, half", Dirty { len: 1024 * GIB, one_in: 2 }),
    harvest_row!("harvest, 1T, all", Dirty { len: 1024 * GIB, one_in: 1 }),
    row!("dirty_at", |_| bitmaps::dirty_at(), limit::dirty_at()),
    row!("GuestMemoryAtomic: memory()", |shared| maps::memory_guard(shared), limit::memory_guard()),
    row!("GuestMemoryAtomic: memory().clone", |shared| maps::memory_guard_clone(shared)),
    new_row!("GuestMemoryReader: memory()", |shared| reference_side::maps::memory_guard(shared), new_abilities::reader(shared)),
    row!("GuestMemoryAtomic: lock_replace(n=4)", |shared| maps::lock_replace(shared, 4)),
    row!("insert_region, n=1", |shared| maps::insert_region(shared, 1)),
    row!("insert_region, n=4", |shared| maps::insert_region(shared, 4)),
    row!("insert_region, n=64", |shared| maps::insert_region(shared, 64)),
    row!("insert_region, n=1024", |shared| maps::insert_region(shared, 1024)),
    row!("remove_region, n=1", |shared| maps::remove_region(shared, 1)),
    row!("remove_region, n=4", |shared| maps::remove_region(shared, 4)),
    row!("remove_region, n=64", |shared| maps::remove_region(shared, 64)),
    row!("remove_region, n=1024", |shared| maps::remove_region(shared, 1024)),
    row!("Iotlb::lookup of 8 B hit, n=1, fragmented", |_| iommu::hit(Mappings::fragmented(1)), limit::iotlb_hit(Mappings::fragmented(1))),
    row!("Iotlb::lookup of 8 B hit, n=100, fragmented", |_| iommu::hit(Mappings::fragmented(100)), limit::iotlb_hit(Mappings::fragmented(100))),
    row!("Iotlb::lookup of 8 B hit, n=10000, fragmented", |_| iommu::hit(Mappings::fragmented(10_000)), limit::iotlb_hit(Mappings::fragmented(10_000))),
    row!("Iotlb::lookup of 8 B hit, n=1000000, fragmented", |_| iommu::hit(Mappings::fragmented(1_000_000)), limit::iotlb_hit(Mappings::fragmented(1_000_000))),
    row!("Iotlb::lookup of 8 B hit, n=10000, contiguous", |_| iommu::hit(Mappings::contiguous(10_000)), limit::iotlb_hit(Mappings::contiguous(10_000))),
    row!("Iotlb::lookup of 8 B hit, n=1000000, contiguous", |_| iommu::hit(Mappings::contiguous(1_000_000)), limit::iotlb_hit(Mappings::contiguous(1_000_000))),
    row!("Iotlb::lookup of 64 KiB over 16 mappings, n=10000", |_| iommu::hit_64k(Mappings::fragmented(10_000))),
    row!("Iotlb::lookup of 8 B miss, n=1, fragmented", |_| iommu::miss(Mappings::with_holes(1)), limit::iotlb_miss(Mappings::with_holes(1))),
    row!("Iotlb::lookup of 8 B miss, n=10000, fragmented", |_| iommu::miss(Mappings::with_holes(10_000)), limit::iotlb_miss(Mappings::with_holes(10_000))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=1, fragmented", |shared| iommu::read_obj(shared, Mappings::fragmented(1)), limit::iommu_read_obj(shared, Mappings::fragmented(1))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=10000, fragmented", |shared| iommu::read_obj(shared, Mappings::fragmented(10_000)), limit::iommu_read_obj(shared, Mappings::fragmented(10_000))),
    row!("IommuMemory: read_obj.u64 behind an RwLock, n=1000000, fragmented", |shared| iommu::read_obj(shared, Mappings::fragmented(1_000_000)), limit::iommu_read_obj(shared, Mappings::fragmented(1_000_000))),
    row!("IommuMemory: read_obj.u64 switched off, n=1, fragmented", |shared| iommu::read_obj_switched_off(shared, Mappings::fragmented(1))),
    row!("Iotlb: remap a page behind an RwLock, n=10000", |_| iommu::remap(Mappings::fragmented(10_000))),
    new_row!("SharedIotlb: remap a page, n=10000", |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared(Mappings::fragmented(10_000))),
    new_row!("SharedIotlb: remap a page, n=10000, 4 snapshots held", |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared_held(Mappings::fragmented(10_000), 4)),
    new_row!("SharedIotlb: remap a page, n=10000, 32 snapshots held", |_| reference_side::iommu::remap(Mappings::fragmented(10_000)), new_abilities::remap_shared_held(Mappings::fragmented(10_000), 32)),
    new_row!("IommuMemory: read_obj.u64 behind a SharedIotlb, n=10000", |shared| reference_side::iommu::read_obj(shared, Mappings::fragmented(10_000)), new_abilities::read_obj_shared(shared, Mappings::fragmented(10_000))),
    row!("virtio-queue 0.18: add_used, n=1", |shared| queues::add_used::<Plain>(shared), limit::add_used(shared)),
    row!("virtio-queue 0.18: add_used, n=1, AtomicBitmap", |shared| queues::add_used::<Tracked>(shared), limit::add_used(shared)),
    new_row!("Window: add_used", |shared| reference_side::queues::add_used::<()>(shared), ring_windows::add_used::<()>(shared), ring_windows::add_used_raw()),
    new_row!("Window: add_used, AtomicBitmap", |shared| reference_side::queues::add_used::<reference_side::kinds::Tracked>(shared), ring_windows::add_used::<Tracked>(shared), ring_windows::add_used_raw()),
    new_row!("Window: add_used, boxed closure", |shared| reference_side::queues::add_used::<()>(shared), ring_windows::add_used_boxed::<()>(shared), ring_windows::add_used_raw_boxed()),
    new_row!("Window: add_used, generic device", |shared| reference_side::queues::add_used::<()>(shared), ring_windows::add_used_device::<()>(shared), ring_windows::add_used_raw_device()),
    new_row!("Window: read_obj.s16", |shared| reference_side::access::read_obj::<S16, ()>(shared, 1), ring_windows::read_obj::<S16>(shared), limit::read_obj::<S16>(shared, 1)),
    new_row!("Window: read_obj.s64", |shared| reference_side::access::read_obj::<S64, ()>(shared, 1), ring_windows::read_obj::<S64>(shared), limit::read_obj::<S64>(shared, 1)),
    new_row!("Window: write_obj.s16", |shared| reference_side::access::write_obj::<S16, ()>(shared, 1), ring_windows::write_obj::<S16>(shared), limit::write_obj::<S16>(shared)),
    new_row!("Window: write_obj.s64", |shared| reference_side::access::write_obj::<S64, ()>(shared, 1), ring_windows::write_obj::<S64>(shared), limit::write_obj::<S64>(shared)),
    new_row!("Window: is_current", |shared| reference_side::maps::memory_guard(shared), ring_windows::is_current(shared)),
    row!("virtio-queue 0.18: iter128x1(per chain), n=1", |shared| queues::iter128x1::<Plain>(shared), limit::iter128x1(shared)),
    row!("virtio-queue 0.18: iter128x1(per chain), n=1, AtomicBitmap", |shared| queues::iter128x1::<Tracked>(shared), limit::iter128x1(shared)),
    row!("virtio-queue 0.18: blk4k(per req), n=1", |shared| queues::blk4k::<Plain>(shared), limit::blk4k(shared)),
    row!("virtio-queue 0.18: blk4k(per req), n=1, AtomicBitmap", |shared| queues::blk4k::<Tracked>(shared), limit::blk4k(shared)),
    new_row!("vectored: 64 KiB over eight regions, against preadv(2)", |shared| new_abilities::read_by_hand(shared), new_abilities::read_over_regions(shared)),
];

#[cfg(test)]
mod tests {
    use super::{matches, of, CONTEXTS, EXCEPTIONS, QUICK, REASONS, ROWS, USUAL};
    use crate::comparison::{Effort, Outcome};
    use crate::shared_pages::SharedPages;
    use std::collections::HashSet;
    use std::time::Duration;

    #[test]
    fn row_names_are_unique() {
        let names: HashSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
    }

    #[test]
    fn criteria_of_exceptions_apply_to_rows() {
        for (name, criteria) in EXCEPTIONS {
            let named = ROWS.iter().filter(|row| matches(name, row.operation()));
            assert!(
                named.clone().any(|row| row.criteria() == *criteria),
                "{name}"
            );
            assert_ne!(*criteria, USUAL, "{name} is not an exception");
        }
    }

    #[test]
    fn matches_takes_one_star_for_any_characters() {
        assert!(matches("a, *, c", "a, b, c") && matches("a*", "a") && matches("a", "a"));
        assert!(!matches("a, *, c", "a, b, d") && !matches("ab*bc", "abc") && !matches("a", "ab"));
    }

    #[test]
    fn reasons_of_missed_rows_name_existing_rows() {
        for (patterns, reason) in REASONS {
            assert!(!reason.contains(['\t', '\n', '|']), "{reason}");
            for pattern in *patterns {
                let explained = |name| matches(pattern, name);
                assert!(
                    ROWS.iter()
                        .any(|row| explained(row.operation()) && row.reason() == Some(reason)),
                    "{pattern}"
                );
            }
        }
        assert!(ROWS.iter().any(|row| row.reason().is_none()));
    }

    #[test]
    fn rows_of_other_contexts_have_a_plain_loop() {
        let plain = |operation| ROWS.iter().any(|row| row.name == operation);
        for row in ROWS {
            assert!(plain(row.operation()), "{}", row.name);
        }
        for name in QUICK {
            assert!(plain(name), "{name}");
        }
        for context in CONTEXTS {
            let boxed = ROWS.iter().find(|row| row.name.ends_with(context));
            let boxed = boxed.expect("a row of each context");
            assert_ne!(boxed.operation(), boxed.name);
        }
    }

    #[test]
    fn criteria_compare_with_reference_and_limit() {
        let outcome = |ours, limit| Outcome {
            reference: 97.0,
            ours,
            limit,
            ratio: 97.0 / ours,
            of_limit: None,
        };
        assert!(USUAL.ratio_holds(&outcome(100.0, None)));
        assert!(!USUAL.ratio_holds(&outcome(100.1, None)));
        assert_eq!(USUAL.limit_holds(&outcome(4.0, Some(2.0))), Some(true));
        assert_eq!(USUAL.limit_holds(&outcome(4.1, Some(2.0))), Some(false));
        assert_eq!(USUAL.limit_holds(&outcome(4.1, None)), None);
        assert_eq!(of(7.0, None).limit_holds(&outcome(4.1, Some(2.0))), None);
    }

    /// Rows with a million mappings, or with bitmaps of 1 TiB, are left out, because their set-up
    /// takes too long.
    #[test]
    fn rows_succeed_on_every_side() {
        let shared = SharedPages::new().expect("shared pages");
        let effort = Effort {
            rounds: 1,
            batch: Duration::from_nanos(1),
        };
        let mut ran = 0;
        let large = ["1000000", ", 1T, "];
        for row in ROWS
            .iter()
            .filter(|row| !large.iter().any(|large| row.name.contains(large)))
        {
            let outcome = (row.comparison)(&shared).and_then(|comparison| comparison.run(effort));
            assert!(
                outcome.is_ok_and(|outcome| outcome.ratio > 0.0),
                "{}",
                row.name
            );
            ran += 1;
        }
        assert!(ran > 60, "{ran} rows ran");
    }
}
