//! The plan of a run: the driver's requests, and the pages that must be dirty after them.
//!
//! The plan exists before the run and does not depend on the device, so it is an independent
//! oracle. It divides each RAM region into quarters:
//!
//! ```text
//!       | 1st quarter        | 2nd        | 3rd                  | 4th                   |
//!  low  | rings, requests    | pattern    | read buffers, 1st ½  | write buffers, 1st ½  |
//!  high | used ring          | pattern    | read buffers, 2nd ½  | write buffers, 2nd ½  |
//! ```
//!
//! A request moves a chunk of 4 KiB, one half in each region. The halves in the high region
//! straddle a page boundary. Plugged memory ([`crate::plug`]) has a pattern word at the end of each
//! page, and chunks at the start of some.

use std::collections::BTreeSet;

use microvm::block::SECTOR;
use microvm::memory::{pages_of, GuestRam, HIGH_START, HOLE_START, PAGE};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::plug::Place;

/// The guest address of the descriptor table.
pub const DESCRIPTORS: u64 = 0x12_0000;
/// The guest address of the available ring.
pub const AVAILABLE_RING: u64 = 0x12_1000;
/// The guest address of the used ring.
pub const USED_RING: u64 = HIGH_START;
/// The guest address of the request headers and status bytes: 32 bytes for each slot.
pub const REQUESTS: u64 = 0x12_2000;
/// A guest address in the hole, which no request may access.
pub const HOLE: u64 = HOLE_START + 0x800_0000;

/// The number of descriptors in the queue.
pub const QUEUE_SIZE: u64 = 32;
/// The number of requests in flight, each with four descriptors.
pub const SLOTS: u64 = 8;
/// The number of sectors in a chunk.
pub const CHUNK_SECTORS: u64 = 8;
/// The bytes of half a chunk.
pub const HALF: u64 = CHUNK_SECTORS * SECTOR / 2;
const READ_CHUNKS: u64 = 256;
const WRITE_CHUNKS: u64 = 16;
const PATTERN_PAGES: u64 = 512;
/// The distance between two words of the pattern.
pub const PATTERN_STEP: u64 = 512;
/// The number of requests that the device must refuse: past the end, of an unknown type, with a
/// buffer in the hole.
const BAD_REQUESTS: u64 = 3;
/// The number of requests that the device must refuse with pluggable memory. They access a block
/// that is not plugged yet, an unplugged block, and the removed region.
const BAD_PLUG_REQUESTS: u64 = 3;
/// The offset of the pattern word in a page of plugged memory.
pub const PLUG_WORD: u64 = PAGE - 8;
/// The number of passes of a [`Storm`]: reads and writes in turn.
const STORM_PASSES: u64 = 4;

/// Returns the word that belongs at `place`: a guest address, or the number of a word on the disk.
pub fn mix(place: u64) -> u64 {
    (place ^ 0x6d69_6372_6f76_6d21).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The driver's treatment of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Leaves it alone.
    None,
    /// Fills it with words by their place on the disk.
    Fill,
    /// Fills it with zeroes, which no pattern contains.
    Wipe,
    /// Compares it with the words of `Fill`.
    Compare,
    /// Compares it with the disk as it was before the run, and stamps later chunks.
    CompareWithDisk,
}

/// Equally spaced buffers for the halves of consecutive chunks.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// The address of the first one.
    pub start: u64,
    /// The distance between two.
    pub stride: u64,
}

impl Buffers {
    /// Returns the address of the buffer for chunk `chunk`.
    pub fn of(&self, chunk: u64) -> u64 {
        self.start + chunk * self.stride
    }
}

/// A run of requests for consecutive chunks.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The request type.
    pub kind: u32,
    /// The first sector.
    pub sector: u64,
    /// The number of chunks.
    pub chunks: u64,
    /// The buffers of both halves.
    pub buffers: [Buffers; 2],
    /// The treatment of the buffers before the requests.
    pub before: Op,
    /// The treatment of the buffers after the requests.
    pub after: Op,
    /// Whether a request may fail with an I/O error.
    pub may_fail: bool,
}

impl Pass {
    /// Returns the buffers of all chunks.
    fn ranges(self) -> impl Iterator<Item = (u64, u64)> {
        let halves = move |chunk| self.buffers.map(|half| (half.of(chunk), HALF));
        (0..self.chunks).flat_map(halves)
    }
}

/// Requests between sectors and guest memory whose files are being truncated ([`crate::storm`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storm {
    /// The first sector. The sectors of a storm are the last ones of the disk.
    pub sector: u64,
    /// The number of chunks in each pass.
    pub chunks: u64,
    /// The guest address of the buffers: one chunk each, adjacent.
    pub buffers: u64,
}

/// The pages that carry the pattern, and the distance between them.
#[derive(Clone, Copy, Debug)]
struct Area {
    start: u64,
    pages: u64,
    stride: u64,
}

/// The plan of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    areas: [Area; 2],
    read: [Buffers; 2],
    write: [Buffers; 2],
    /// The capacity of the disk in sectors.
    pub capacity: u64,
    /// The sectors that are not part of a storm.
    steady: u64,
    storm: Option<Storm>,
    /// The place of pluggable memory.
    pub plug: Option<Place>,
    /// The number of chunks that are read, starting at sector 0.
    pub read_chunks: u64,
    /// The number of chunks that are written, at the end of the disk.
    pub write_chunks: u64,
    /// The first chunk that the driver stamps after reading it.
    pub stamp_from: u64,
}

impl Plan {
    /// Plans a run in `ram` with a disk of `capacity` sectors, at least [`CHUNK_SECTORS`].
    ///
    /// # Panics
    ///
    /// Panics if `ram` has fewer than two regions.
    pub fn new(ram: &GuestRam, capacity: u64) -> Self {
        let chunks = capacity / CHUNK_SECTORS;
        let mut regions = ram
            .iter()
            .map(|r| (r.start_addr().0, (r.len() / 4) & !(PAGE - 1)));
        let mut next = || regions.next().expect("guest RAM has two regions");
        let (low, high) = (next(), next());
        let area = |(start, quarter): (u64, u64)| Area {
            start: start + quarter,
            pages: PATTERN_PAGES.min(quarter / PAGE),
            stride: stride(quarter, PATTERN_PAGES),
        };
        let buffers = |(start, quarter): (u64, u64), nth: u64, count: u64, offset: u64| Buffers {
            start: start + nth * quarter + offset,
            stride: stride(quarter, count),
        };
        let pair = |nth, count| {
            [
                buffers(low, nth, count, 0),
                buffers(high, nth, count, PAGE - HALF / 2),
            ]
        };
        Self {
            areas: [area(low), area(high)],
            read: pair(2, READ_CHUNKS),
            write: pair(3, WRITE_CHUNKS),
            capacity,
            steady: capacity,
            storm: None,
            plug: None,
            read_chunks: chunks.min(READ_CHUNKS),
            write_chunks: chunks.min(WRITE_CHUNKS),
            stamp_from: chunks.min(READ_CHUNKS) / 2,
        }
    }

    /// Adds a storm on sectors after those of the plan.
    pub fn with_storm(self, storm: Option<Storm>) -> Self {
        let more = storm.map_or(0, |storm| storm.chunks * CHUNK_SECTORS);
        let capacity = self.capacity + more;
        Self {
            capacity,
            storm,
            ..self
        }
    }

    /// Adds memory that is plugged while the driver runs.
    pub fn with_plug(self, plug: Option<Place>) -> Self {
        Self { plug, ..self }
    }

    /// Returns the passes before memory is plugged.
    pub fn passes(&self) -> Vec<Pass> {
        let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
        let pass = |kind, sector, chunks, buffers, before, after| {
            let may_fail = false;
            Pass {
                kind,
                sector,
                chunks,
                buffers,
                before,
                after,
                may_fail,
            }
        };
        let (first, chunks) = (self.write_sector(), self.write_chunks);
        let mut passes = vec![
            pass(
                read,
                0,
                self.read_chunks,
                self.read,
                Op::None,
                Op::CompareWithDisk,
            ),
            pass(write, first, chunks, self.write, Op::Fill, Op::None),
            pass(read, first, chunks, self.write, Op::Wipe, Op::Compare),
        ];
        if let Some(Storm {
            sector,
            chunks,
            buffers,
        }) = self.storm
        {
            let half = |start| Buffers {
                start,
                stride: 2 * HALF,
            };
            let halves = [half(buffers), half(buffers + HALF)];
            passes.extend((0..STORM_PASSES).map(|nth| Pass {
                may_fail: true,
                ..pass(
                    [read, write][nth as usize % 2],
                    sector,
                    chunks,
                    halves,
                    Op::None,
                    Op::None,
                )
            }));
        }
        passes
    }

    /// Returns the pass that reads the written chunks into plugged memory.
    pub fn plug_pass(&self, place: Place) -> Pass {
        let buffers = |start| Buffers {
            start,
            stride: 2 * PAGE,
        };
        Pass {
            kind: VIRTIO_BLK_T_IN,
            sector: self.write_sector(),
            chunks: self.write_chunks,
            buffers: [buffers(place.start), buffers(place.start + PAGE)],
            before: Op::Wipe,
            after: Op::Compare,
            may_fail: false,
        }
    }

    /// Returns the number of requests that read, without those of the storm.
    pub fn reads(&self) -> u64 {
        self.read_chunks + self.write_chunks + self.plug.map_or(0, |_| self.write_chunks)
    }

    /// Returns the number of requests of the storm.
    pub fn storm_requests(&self) -> u64 {
        self.storm.map_or(0, |storm| STORM_PASSES * storm.chunks)
    }

    /// Returns the number of requests that the device must refuse.
    pub fn bad_requests(&self) -> u64 {
        BAD_REQUESTS + self.plug.map_or(0, |_| BAD_PLUG_REQUESTS)
    }

    /// Returns the number of all requests.
    pub fn requests(&self) -> u64 {
        self.reads() + self.write_chunks + self.storm_requests() + 1 + self.bad_requests()
    }

    /// Returns the number of notifications: one for each batch of requests.
    pub fn notifications(&self) -> u64 {
        let plug = self.plug.map(|place| self.plug_pass(place));
        let passes = self.passes().into_iter().chain(plug);
        let batches: u64 = passes.map(|pass| pass.chunks.div_ceil(SLOTS)).sum();
        batches + 1 + self.bad_requests()
    }

    /// Returns the first sector that is written.
    pub fn write_sector(&self) -> u64 {
        self.steady - self.write_chunks * CHUNK_SECTORS
    }

    /// Returns the pages of the pattern in both regions.
    pub fn pattern_pages(&self) -> impl Iterator<Item = u64> + '_ {
        let pages = |area: Area| (0..area.pages).map(move |n| area.start + n * area.stride);
        self.areas.into_iter().flat_map(pages)
    }

    /// Returns the addresses of the pattern words in `page`.
    pub fn words_of(page: u64) -> impl Iterator<Item = u64> {
        (page..page + PAGE).step_by(PATTERN_STEP as usize)
    }

    /// Returns the halves of every chunk that is read first: sector, guest address, and whether the
    /// driver stamps its first word.
    pub fn read_halves(&self) -> impl Iterator<Item = (u64, u64, bool)> + '_ {
        (0..self.read_chunks).flat_map(|chunk| {
            let sector = chunk * CHUNK_SECTORS;
            let [low, high] = self.read.map(|half| half.of(chunk));
            let stamped = chunk >= self.stamp_from;
            [
                (sector, low, stamped),
                (sector + CHUNK_SECTORS / 2, high, false),
            ]
        })
    }

    /// Returns the pages that the driver writes.
    pub fn driver_pages(&self) -> BTreeSet<u64> {
        let plugged = self.plug.map(|place| (place.start, place.first()));
        let stamps = (self.stamp_from..self.read_chunks).map(|chunk| (self.read[0].of(chunk), 8));
        let filled = self
            .passes()
            .into_iter()
            .filter(|pass| pass.before != Op::None);
        let rings = [
            (DESCRIPTORS, QUEUE_SIZE * 16),
            (AVAILABLE_RING, 4 + QUEUE_SIZE * 2),
            (REQUESTS, SLOTS * 32),
        ];
        let ranges = filled
            .flat_map(Pass::ranges)
            .chain(stamps)
            .chain(plugged)
            .chain(rings);
        let pages = ranges.flat_map(|(start, len)| pages_of(start, len));
        pages.chain(self.pattern_pages()).collect()
    }

    /// Returns the pages that the device must write, and those that it may also write: buffers of
    /// requests that may fail.
    pub fn device_pages(&self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let plug = self.plug.map(|place| self.plug_pass(place));
        let passes = self.passes().into_iter().chain(plug);
        let reads: Vec<_> = passes.filter(|pass| pass.kind == VIRTIO_BLK_T_IN).collect();
        let pages = |may_fail| -> BTreeSet<u64> {
            let passes = reads.iter().filter(move |pass| pass.may_fail == may_fail);
            passes
                .flat_map(|pass| pass.ranges())
                .flat_map(|(at, len)| pages_of(at, len))
                .collect()
        };
        let rings = [(USED_RING, 4 + QUEUE_SIZE * 8), (REQUESTS, SLOTS * 32)];
        let rings = rings
            .into_iter()
            .flat_map(|(start, len)| pages_of(start, len));
        (pages(false).into_iter().chain(rings).collect(), pages(true))
    }
}

/// Returns the page-aligned distance at which `count` buffers fill `len` bytes.
fn stride(len: u64, count: u64) -> u64 {
    ((len / count) & !(PAGE - 1)).max(PAGE)
}

#[cfg(test)]
mod tests {
    use microvm::memory::{build, Backing};
    use test_support::MIB;

    use super::*;

    #[test]
    fn plan_of_any_size_uses_disjoint_ranges_in_ram() {
        for size in [16 * MIB, 16 * MIB + PAGE, 100 * MIB, 256 * MIB, 64 << 30] {
            let ram = build(size, &Backing::Anonymous).unwrap();
            for capacity in [8, 9, 100, 2048, 1 << 40] {
                let plan = Plan::new(&ram, capacity);
                let span = |b: Buffers, count| (b.start & !(PAGE - 1), b.stride * count);
                let mut ranges = vec![
                    (DESCRIPTORS, PAGE),
                    (AVAILABLE_RING, PAGE),
                    (REQUESTS, PAGE),
                    (USED_RING, PAGE),
                ];
                ranges.extend(
                    plan.areas
                        .map(|area| (area.start, area.stride * area.pages)),
                );
                ranges.extend(plan.read.map(|half| span(half, READ_CHUNKS)));
                ranges.extend(plan.write.map(|half| span(half, WRITE_CHUNKS)));
                ranges.sort_unstable();
                for pair in ranges.windows(2) {
                    assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{size:#x}: {pair:x?}");
                }
                for (start, len) in ranges {
                    let start = vm_memory::GuestAddress(start);
                    let len = usize::try_from(len).unwrap();
                    assert!(GuestMemoryBackend::check_range(&ram, start, len));
                }
            }
        }
    }

    #[test]
    fn plan_counts_pages_and_requests_as_laid_out() {
        let ram = build(256 * MIB, &Backing::Anonymous).unwrap();
        let plan = Plan::new(&ram, 2048);
        // 2 x 512 pages of pattern, 128 stamps, 16 x (1 + 2) written pages, 3 of rings and
        // requests.
        assert_eq!(plan.driver_pages().len(), 1024 + 128 + 48 + 3);
        // 256 x (1 + 2) read pages, 16 x (1 + 2) read back, 2 of used ring and requests.
        assert_eq!(plan.device_pages().0.len(), 768 + 48 + 2);
        assert_eq!((plan.requests(), plan.notifications()), (292, 40));

        let storm = Storm {
            sector: 64,
            chunks: 3,
            buffers: 0x1234_0000,
        };
        let plan = Plan::new(&ram, 64).with_storm(Some(storm));
        assert_eq!(plan.capacity, 64 + 24);
        assert_eq!(
            (plan.requests(), plan.notifications()),
            (3 * 8 + 4 * 3 + 4, 3 + 4 + 4)
        );
        assert_eq!(plan.device_pages().1.len(), 3);

        // 8 more chunks are read, and 3 more requests refused.
        let plan = plan.with_plug(Some(Place::above(&ram)));
        assert_eq!(
            (plan.requests(), plan.notifications()),
            (40 + 8 + 3, 11 + 1 + 3)
        );
    }
}
