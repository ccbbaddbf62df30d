//! IOTLB messages, lookups, and accesses through the mappings, also at both ends of the address
//! space.
//!
//! Writes are marked by IOVA in one memory, and by both addresses in another. A second IOTLB has a
//! bound that changes.

use std::num::NonZeroUsize;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::iommu::{
    Invalidation, Iotlb, IotlbSnapshot, IovaRange, MarkedIommuMemory, SharedIotlb,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, IommuMemory, Permissions,
};

use crate::model::{joined, last_of, permissions, Mappings, Memory, PAGE};

const MOST_STEPS: usize = 64;

/// Guest physical memory: two adjacent regions, a hole, and a third region.
const REGIONS: [(u64, u64); 3] = [(0, 2 * PAGE), (2 * PAGE, PAGE), (5 * PAGE, PAGE + 0x80)];
/// The IOVAs that are marked when they are written.
const TRACKED: usize = 0x1_0000;

type Physical = GuestMemoryMmap<AtomicBitmap>;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum At {
    Low(u16),
    Top(u16),
    Page(u8),
    Anywhere(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Bytes(u16),
    Pages(u8),
    /// Up to 2^64, and this number of addresses past it.
    ToTheEnd(u8),
    Huge(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Update {
        iova: At,
        to: At,
        len: Len,
        perm: u8,
    },
    Invalidate {
        iova: At,
        len: Len,
    },
    InvalidateAll,
    Lookup {
        iova: At,
        len: Len,
        perm: u8,
    },
    Write {
        iova: At,
        len: u16,
    },
    Read {
        iova: At,
        len: u16,
    },
    Bound {
        most: u8,
    },
    Granted {
        iova: At,
        len: Len,
    },
}

/// Runs an input.
pub fn run(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(steps) = Vec::<Step>::arbitrary(&mut bytes) else {
        return;
    };
    let mut pair = Pair::new();
    for (number, step) in steps.into_iter().take(MOST_STEPS).enumerate() {
        let number = number as u8 + 1;
        pair.hold(number);
        pair.step(step, number);
    }
    pair.compare();
}

fn addr(at: At) -> u64 {
    match at {
        At::Low(at) => u64::from(at),
        At::Top(by) => u64::MAX - u64::from(by),
        At::Page(page) => u64::from(page % 16) * PAGE,
        At::Anywhere(at) => at,
    }
}

fn count(base: u64, len: Len) -> usize {
    match len {
        Len::Bytes(len) => usize::from(len),
        Len::Pages(pages) => usize::from(pages) * PAGE as usize,
        Len::ToTheEnd(more) => (u64::MAX - base).saturating_add(u64::from(more)) as usize,
        Len::Huge(less) => usize::MAX - usize::from(less),
    }
}

struct Pair {
    memory: IommuMemory<Physical, SharedIotlb>,
    /// A second memory behind the same IOTLB, with the same writes. It marks both addresses.
    marked: MarkedIommuMemory<Physical, SharedIotlb, AtomicBitmap>,
    /// An IOTLB with a bound that gets the same messages.
    bounded: Iotlb,
    /// Snapshots that devices hold, each with an invalidation that was made while it was held.
    held: Vec<(IotlbSnapshot, Invalidation)>,
    mappings: Mappings,
    physical: Memory,
    /// Marked pages by IOVA.
    dirty: std::collections::BTreeSet<u64>,
    /// Marked pages by guest physical address.
    dirty_physical: std::collections::BTreeSet<u64>,
}

impl Pair {
    fn new() -> Self {
        let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len as usize));
        let physical = || Physical::from_ranges(&ranges).unwrap();
        let bitmap = || AtomicBitmap::new(TRACKED, NonZeroUsize::new(PAGE as usize).unwrap());
        let iotlb = SharedIotlb::new();
        Pair {
            memory: IommuMemory::new(physical(), iotlb.clone(), true, bitmap()),
            marked: MarkedIommuMemory::by_both(physical(), iotlb, true, bitmap()),
            bounded: Iotlb::new(),
            held: Vec::new(),
            mappings: Mappings::default(),
            physical: Memory::new(REGIONS.to_vec()),
            dirty: Default::default(),
            dirty_physical: Default::default(),
        }
    }

    fn step(&mut self, step: Step, fill: u8) {
        match step {
            Step::Update {
                iova,
                to,
                len,
                perm,
            } => {
                let (iova, to) = (addr(iova), addr(to));
                let (length, perm) = (count(iova, len), permissions(perm));
                let outcome = self.memory.iommu().set_mapping(
                    GuestAddress(iova),
                    GuestAddress(to),
                    length,
                    perm,
                );
                let same =
                    self.bounded
                        .set_mapping(GuestAddress(iova), GuestAddress(to), length, perm);
                assert_eq!(outcome.is_ok(), same.is_ok());
                // A mapping whose target passes 2^64 is also refused.
                match last_of(iova, length).filter(|_| last_of(to, length).is_some()) {
                    Some(last) => {
                        // The last mapping is present, unless a range whose lookup failed takes
                        // all of the bound.
                        let bound = self.bounded.bound().map_or(usize::MAX, NonZeroUsize::get);
                        assert!(
                            self.bounded.entries() == bound
                                || Iotlb::lookup(&self.bounded, GuestAddress(iova), length, perm)
                                    .is_ok()
                        );
                        assert!(outcome.is_ok(), "{outcome:?}");
                        self.mappings.set(iova, last, Some((to, perm)));
                    }
                    None => assert_eq!(outcome.is_ok(), length == 0, "{outcome:?}"),
                }
                self.lookup(iova, length, perm);
            }
            Step::Invalidate { iova, len } => {
                let iova = addr(iova);
                let length = count(iova, len);
                let gone = self
                    .memory
                    .iommu()
                    .invalidate_mapping(GuestAddress(iova), length);
                assert_eq!(gone.readers(), self.held.len());
                self.bounded.invalidate_mapping(GuestAddress(iova), length);
                if length != 0 {
                    let last = last_of(iova, length).unwrap_or(u64::MAX);
                    self.mappings.set(iova, last, None);
                }
                self.lookup(iova, length, Permissions::No);
            }
            Step::InvalidateAll => {
                let gone = self.memory.iommu().invalidate_all();
                assert_eq!(gone.readers(), self.held.len());
                self.bounded.invalidate_all();
                self.mappings = Mappings::default();
            }
            Step::Lookup { iova, len, perm } => {
                let iova = addr(iova);
                self.lookup(iova, count(iova, len), permissions(perm));
            }
            Step::Write { iova, len } => self.write(addr(iova), usize::from(len & 0x1fff), fill),
            Step::Read { iova, len } => self.read(addr(iova), usize::from(len & 0x1fff)),
            Step::Bound { most } => self
                .bounded
                .set_bound(NonZeroUsize::new(usize::from(most % 8))),
            Step::Granted { iova, len } => {
                let iova = addr(iova);
                self.granted(iova, count(iova, len));
            }
        }
        let bound = self.bounded.bound().map_or(usize::MAX, NonZeroUsize::get);
        assert!(self.bounded.entries() <= bound);
    }

    /// Checks the permissions that the IOTLB and the whole path to memory grant.
    fn granted(&self, iova: u64, length: usize) {
        let at = GuestAddress(iova);
        let by_iotlb = self.memory.iommu().granted(at, length);
        let by_memory = self.memory.granted(at, length);
        assert_eq!(by_memory, self.marked.granted(at, length));
        if length == 0 {
            assert_eq!(by_iotlb, Some(Permissions::ReadWrite));
            return;
        }
        let parts = last_of(iova, length).map(|last| self.mappings.parts(iova, last));
        let common = parts.as_ref().and_then(|parts| {
            parts
                .iter()
                .try_fold(Permissions::ReadWrite, |common, part| {
                    let (_, granted) = part.2?;
                    Some(permissions(common as u8 & granted as u8))
                })
        });
        assert_eq!(by_iotlb, common);
        let is_there = parts.is_some_and(|parts| {
            parts.iter().all(|(first, last, mapped)| {
                let length = usize::try_from(u128::from(last - first) + 1).ok();
                let reached = mapped.zip(length).map(|((to, _), length)| {
                    let segments = self.physical.segments(to, length);
                    segments.iter().map(|(_, length)| length).sum::<usize>() == length
                });
                reached.unwrap_or(false)
            })
        });
        let tracked = iova
            .checked_add(length as u64)
            .is_some_and(|end| end <= TRACKED as u64);
        let expected = common.filter(|_| is_there).map(|common| {
            if tracked {
                common
            } else {
                permissions(common as u8 & Permissions::Read as u8)
            }
        });
        assert_eq!(by_memory, expected);
    }

    /// Checks the IOTLB with the bound: it finds only right mappings, may report misses for others,
    /// and refuses only ranges with too many mappings.
    fn lookup_bounded(&self, iova: u64, length: usize, access: Permissions) {
        let outcome = Iotlb::lookup(&self.bounded, GuestAddress(iova), length, access);
        let Some(last) = last_of(iova, length) else {
            return;
        };
        let parts = self.mappings.parts(iova, last);
        match outcome {
            Ok(segments) => {
                let found = segments.map(|segment| (segment.base.0, segment.length as u128));
                let expected = parts
                    .iter()
                    .map(|part| (part.2.unwrap().0, u128::from(part.1 - part.0) + 1));
                assert_eq!(rejoined(found), rejoined(expected));
            }
            Err(fails) if fails.is_refused_by_bound() => {
                assert!(fails.misses.is_empty());
                // The missing range between two mappings may join them.
                let known = parts.iter().filter_map(|(first, _, mapped)| {
                    let (to, granted) = (*mapped)?;
                    Some((to.wrapping_sub(*first), to < *first, granted))
                });
                let mut known: Vec<_> = known.collect();
                known.dedup();
                let segments = known.len();
                // Two empty parts at the end: the range has lost its mappings too often.
                let reasons = fails.access_fails.iter().rev();
                if reasons.take_while(|part| part.length == 0).count() > 1 {
                    return;
                }
                let bound = self.bounded.bound().map_or(usize::MAX, NonZeroUsize::get);
                assert!(
                    segments > bound,
                    "a lookup of {segments} mappings fails with a bound of {bound}"
                );
            }
            Err(fails) => {
                for refused in fails.access_fails {
                    let last = last_of(refused.base.0, refused.length).unwrap();
                    let parts = self.mappings.parts(refused.base.0, last);
                    assert!(parts.iter().all(|part| !part.2.unwrap().1.allow(access)));
                }
            }
        }
    }

    /// Takes a snapshot as a device does, or drops the oldest one. Changes proceed while snapshots
    /// are held, and are complete when these are dropped.
    fn hold(&mut self, number: u8) {
        let iotlb = self.memory.iommu();
        if number.is_multiple_of(5) {
            let snapshot = iotlb.snapshot();
            // An invalidation of an empty range changes nothing. The snapshot is older.
            let gone = iotlb.invalidate_mapping(GuestAddress(0), 0);
            self.held.push((snapshot, gone));
        }
        if number.is_multiple_of(17) {
            let (snapshot, gone) = self.held.remove(0);
            assert!(!gone.is_done());
            drop(snapshot);
            assert!(gone.is_done(), "it was the oldest");
        }
    }

    /// Compares a lookup with the model: the mappings, or the misses and the refusals.
    fn lookup(&self, iova: u64, length: usize, access: Permissions) {
        self.lookup_bounded(iova, length, access);
        let outcome = self
            .memory
            .iommu()
            .lookup(GuestAddress(iova), length, access);
        let Some(last) = last_of(iova, length) else {
            match outcome {
                Ok(mut segments) => assert!(length == 0 && segments.next().is_none()),
                Err(fails) => {
                    assert!(length != 0 && fails.misses.is_empty());
                    let base = GuestAddress(iova);
                    assert_eq!(fails.access_fails, [IovaRange { base, length }]);
                }
            }
            return;
        };
        let parts = self.mappings.parts(iova, last);
        let len = |(first, last): (u64, u64)| u128::from(last - first) + 1;
        let missing = parts.iter().filter(|part| part.2.is_none());
        let refused = parts
            .iter()
            .filter(|part| part.2.is_some_and(|(_, granted)| !granted.allow(access)));
        let missing = joined(missing.map(|part| (part.0, len((part.0, part.1)))));
        let refused = joined(refused.map(|part| (part.0, len((part.0, part.1)))));
        match outcome {
            Ok(segments) => {
                assert!(
                    missing.is_empty() && refused.is_empty(),
                    "missing {missing:x?}, refused {refused:x?}"
                );
                let found: Vec<(u64, u128)> = segments
                    .map(|segment| (segment.base.0, segment.length as u128))
                    .collect();
                assert!(found.iter().all(|(_, len)| *len != 0));
                // A segment must end where the target changes, and may end where permissions
                // change.
                let expected = parts
                    .iter()
                    .map(|part| (part.2.unwrap().0, len((part.0, part.1))));
                assert_eq!(rejoined(found), rejoined(expected));
            }
            Err(fails) => {
                let flat = |ranges: Vec<IovaRange>| {
                    joined(ranges.iter().map(|r| (r.base.0, r.length as u128)))
                };
                assert_eq!(flat(fails.misses), missing);
                assert_eq!(flat(fails.access_fails), refused);
                assert!(!missing.is_empty() || !refused.is_empty());
            }
        }
    }

    /// Returns the guest physical ranges of an access, or `None` if it is refused.
    fn translated(
        &self,
        iova: u64,
        length: usize,
        access: Permissions,
    ) -> Option<Vec<(u64, usize)>> {
        if length == 0 {
            return Some(Vec::new());
        }
        let parts = self.mappings.parts(iova, last_of(iova, length)?);
        let segment = |(first, last, mapped): &(u64, u64, crate::model::Mapped)| {
            let (target, granted) = (*mapped)?;
            granted
                .allow(access)
                .then_some((target, (last - first) as usize + 1))
        };
        parts.iter().map(segment).collect()
    }

    /// Returns the segments of memory that an access reaches before the first hole.
    fn reached(&self, translated: &[(u64, usize)]) -> Vec<(u64, usize)> {
        let mut reached = Vec::new();
        for (target, len) in translated {
            reached.extend(self.physical.segments(*target, *len));
            if self.physical.reachable(*target, *len) != *len {
                break;
            }
        }
        reached
    }

    fn write(&mut self, iova: u64, len: usize, fill: u8) {
        let data: Vec<u8> = (0..len)
            .map(|i| (i as u8).wrapping_mul(13) ^ fill)
            .collect();
        let outcome = self.memory.write(&data, GuestAddress(iova));
        let same = self.marked.write(&data, GuestAddress(iova));
        assert_eq!(outcome.as_ref().ok(), same.as_ref().ok());
        let allowed = self
            .memory
            .check_range(GuestAddress(iova), len, Permissions::Write);
        let tracked = iova
            .checked_add(len as u64)
            .is_some_and(|end| end <= TRACKED as u64);
        let Some(translated) = self
            .translated(iova, len, Permissions::Write)
            .filter(|_| tracked || len == 0)
        else {
            assert!(
                matches!(outcome, Err(GuestMemoryError::IommuError(_))),
                "{outcome:?}"
            );
            assert!(!allowed);
            return;
        };
        let reached = self.reached(&translated);
        let done: usize = reached.iter().map(|(_, len)| len).sum();
        match outcome {
            Ok(moved) => assert_eq!(moved, done),
            Err(error) => assert!(done == 0 && len != 0, "{error:?}"),
        }
        if len != 0 || tracked {
            assert_eq!(allowed, done == len);
        }
        let mut rest = &data[..done];
        for (target, len) in reached {
            let (part, others) = rest.split_at(len);
            self.physical.write_unmarked(target, part);
            if let Some(last) = last_of(target, len) {
                self.dirty_physical.extend(target / PAGE..=last / PAGE);
            }
            rest = others;
        }
        if let Some(last) = last_of(iova, done) {
            self.dirty.extend(iova / PAGE..=last / PAGE);
        }
    }

    fn read(&self, iova: u64, len: usize) {
        let mut buf = vec![0xee; len];
        let outcome = self.memory.read(&mut buf, GuestAddress(iova));
        let allowed = self
            .memory
            .check_range(GuestAddress(iova), len, Permissions::Read);
        let Some(translated) = self.translated(iova, len, Permissions::Read) else {
            assert!(
                matches!(outcome, Err(GuestMemoryError::IommuError(_))),
                "{outcome:?}"
            );
            assert!(!allowed);
            return;
        };
        let reached = self.reached(&translated);
        let expected: Vec<u8> = reached
            .iter()
            .flat_map(|(target, len)| self.physical.read(*target, *len))
            .collect();
        match outcome {
            Ok(moved) => assert_eq!(moved, expected.len()),
            Err(error) => assert!(expected.is_empty() && len != 0, "{error:?}"),
        }
        assert_eq!(allowed, expected.len() == len);
        assert_eq!(buf[..expected.len()], expected);
        assert!(buf[expected.len()..].iter().all(|byte| *byte == 0xee));
    }

    /// Checks all marks and all bytes of the memory.
    fn compare(&self) {
        for page in 0..TRACKED as u64 / PAGE {
            let marked = self.memory.bitmap().dirty_at((page * PAGE) as usize);
            assert_eq!(
                marked,
                self.dirty.contains(&page),
                "mark of I/O page {page}"
            );
            let by_both = self.marked.bitmap().dirty_at((page * PAGE) as usize);
            assert_eq!(by_both, marked, "mark of I/O page {page}, by both");
        }
        for region in self.marked.get_backend().iter() {
            let mut buf = vec![0; region.len() as usize];
            let start = region.start_addr();
            self.marked
                .get_backend()
                .read_slice(&mut buf, start)
                .unwrap();
            assert_eq!(buf, self.physical.read(start.0, buf.len()));
            for at in (0..region.len()).step_by(PAGE as usize) {
                let expected = self.dirty_physical.contains(&((start.0 + at) / PAGE));
                assert_eq!(
                    region.bitmap().dirty_at(at as usize),
                    expected,
                    "{at:#x} of {:#x}",
                    start.0
                );
            }
        }
        for region in self.memory.get_backend().iter() {
            let mut buf = vec![0; region.len() as usize];
            let start = region.start_addr();
            self.memory
                .get_backend()
                .read_slice(&mut buf, start)
                .unwrap();
            assert_eq!(
                buf,
                self.physical.read(start.0, buf.len()),
                "region at {:#x}",
                start.0
            );
            assert!((0..buf.len())
                .step_by(PAGE as usize)
                .all(|at| !region.bitmap().dirty_at(at)));
        }
    }
}

/// Joins ranges with adjacent targets. Past 2^64 the target wraps.
fn rejoined(ranges: impl IntoIterator<Item = (u64, u128)>) -> Vec<(u64, u128)> {
    let mut all: Vec<(u64, u128)> = Vec::new();
    for (first, len) in ranges {
        match all.last_mut() {
            Some((start, before)) if start.wrapping_add(*before as u64) == first => *before += len,
            _ => all.push((first, len)),
        }
    }
    all
}
