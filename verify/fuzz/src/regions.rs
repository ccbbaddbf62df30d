//! Maps of regions: construction, insertion, removal, and lookups.

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap,
};

const MOST_STEPS: usize = 48;
const MOST_REGIONS: usize = 24;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum At {
    /// Close together, so that regions are often adjacent.
    Low(u8),
    Top(u8),
    Anywhere(u64),
    /// At the start or directly after the end of an existing region.
    Of {
        region: u8,
        end: bool,
        by: i8,
    },
}

#[derive(Arbitrary, Debug)]
enum Step {
    Make(Vec<(At, u8)>),
    /// Ascending regions: the hole before each, and its length. Valid unless the address space
    /// ends.
    Row(At, Vec<(u8, u8)>),
    Insert(At, u8),
    Remove(At, u8),
    /// An existing region.
    RemoveOne(u8),
    Find(At),
    Check(At, u16),
}

/// Runs an input.
pub fn run(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(steps) = Vec::<Step>::arbitrary(&mut bytes) else {
        return;
    };
    let mut pair = Pair::default();
    for step in steps.iter().take(MOST_STEPS) {
        pair.step(step);
        pair.compare();
    }
}

/// The library, and a list of the expected regions: first address, length, and first byte.
#[derive(Default)]
struct Pair {
    memory: GuestMemoryMmap,
    model: Vec<(u64, u64, u8)>,
    made: u8,
}

/// The reason why a list of ranges is not a valid map.
#[derive(Debug, Eq, PartialEq)]
enum Wrong {
    Nothing,
    Unsorted,
    Overlap,
    /// A region cannot be mapped, or does not fit into the address space.
    Region,
}

fn wrong(error: GuestRegionCollectionError) -> Wrong {
    match error {
        GuestRegionCollectionError::NoMemoryRegion => Wrong::Nothing,
        GuestRegionCollectionError::MemoryRegionOverlap => Wrong::Overlap,
        GuestRegionCollectionError::UnsortedMemoryRegions => Wrong::Unsorted,
    }
}

/// Returns whether a region can be at this position: it is not empty, and ends below 2^64.
fn has_place(start: u64, len: u64) -> bool {
    len != 0 && start.checked_add(len).is_some()
}

fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.0 + other.1 && other.0 < one.0 + one.1
}

/// Returns the first reason, in the order of the ranges, why they are not a valid map.
fn layout(ranges: &[(u64, u64)]) -> Result<(), Wrong> {
    if ranges.iter().any(|(start, len)| !has_place(*start, *len)) {
        return Err(Wrong::Region);
    }
    if ranges.is_empty() {
        return Err(Wrong::Nothing);
    }
    for pair in ranges.windows(2) {
        if pair[0].0 > pair[1].0 {
            return Err(Wrong::Unsorted);
        }
        if overlap(pair[0], pair[1]) {
            return Err(Wrong::Overlap);
        }
    }
    Ok(())
}

impl Pair {
    fn addr(&self, at: At) -> u64 {
        match at {
            At::Low(at) => u64::from(at),
            At::Top(by) => u64::MAX - u64::from(by),
            At::Anywhere(at) => at,
            At::Of { region, end, by } => {
                let number = usize::from(region) % self.model.len().max(1);
                let (start, len, _) = self.model.get(number).copied().unwrap_or_default();
                let edge = if end { start + len } else { start };
                edge.wrapping_add_signed(i64::from(by))
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Make(ranges) => {
                let ranges: Vec<(u64, u64)> = ranges
                    .iter()
                    .take(MOST_REGIONS)
                    .map(|(at, len)| (self.addr(*at), u64::from(*len)))
                    .collect();
                self.make(&ranges);
            }
            Step::Row(at, row) => {
                let mut next = self.addr(*at);
                let mut ranges = Vec::new();
                for (hole, len) in row.iter().take(MOST_REGIONS) {
                    // Some holes are wide, so that the distances of regions vary.
                    let hole = match hole.checked_sub(0xf0) {
                        Some(power) => 1 << (4 * power.min(14)),
                        None => u64::from(*hole),
                    };
                    next = next.saturating_add(hole);
                    ranges.push((next, u64::from(*len) + 1));
                    next = next.saturating_add(u64::from(*len) + 1);
                }
                self.make(&ranges);
            }
            Step::Insert(at, len) => self.insert(self.addr(*at), u64::from(*len)),
            Step::Remove(at, len) => self.remove(self.addr(*at), u64::from(*len)),
            Step::RemoveOne(number) => {
                let number = usize::from(*number) % self.model.len().max(1);
                if let Some((start, len, _)) = self.model.get(number).copied() {
                    self.remove(start, len);
                }
            }
            Step::Find(at) => self.find(self.addr(*at)),
            Step::Check(at, len) => {
                let (addr, count) = (self.addr(*at), usize::from(*len));
                let addresses = (0..u64::from(*len)).map(|i| addr.checked_add(i));
                let expected = addresses
                    .into_iter()
                    .all(|at| at.is_some_and(|at| self.slow_find(at).is_some()));
                assert_eq!(self.memory.check_range(GuestAddress(addr), count), expected);
            }
        }
    }

    fn make(&mut self, ranges: &[(u64, u64)]) {
        let list: Vec<_> = ranges
            .iter()
            .map(|(at, len)| (GuestAddress(*at), *len as usize))
            .collect();
        let outcome = GuestMemoryMmap::<()>::from_ranges(&list);
        let outcome = outcome.map_err(|error| match error {
            FromRangesError::Collection(error) => wrong(error),
            _ => Wrong::Region,
        });
        match (outcome, layout(ranges)) {
            (Ok(memory), Ok(())) => {
                self.memory = memory;
                self.model.clear();
                for (start, len) in ranges {
                    self.made = self.made.wrapping_add(1);
                    self.memory
                        .write_obj(self.made, GuestAddress(*start))
                        .unwrap();
                    self.model.push((*start, *len, self.made));
                }
            }
            (Err(error), Err(expected)) => assert_eq!(error, expected, "{ranges:x?}"),
            (outcome, expected) => panic!("{ranges:x?}: {:?}, not {expected:?}", outcome.map(drop)),
        }
    }

    fn insert(&mut self, start: u64, len: u64) {
        if self.model.len() >= MOST_REGIONS {
            return;
        }
        let region = GuestRegionMmap::<()>::from_range(GuestAddress(start), len as usize, None);
        assert_eq!(
            region.is_ok(),
            has_place(start, len),
            "{len:#x} bytes at {start:#x}"
        );
        let Ok(region) = region else {
            return;
        };
        let outcome = self.memory.insert_region(Arc::new(region)).map_err(wrong);
        let before = self.model.clone();
        let free = before
            .iter()
            .all(|(at, size, _)| !overlap((*at, *size), (start, len)));
        match outcome {
            Ok(memory) => {
                assert!(
                    free,
                    "{len:#x} bytes at {start:#x} were put over {before:x?}"
                );
                self.memory = memory;
                self.made = self.made.wrapping_add(1);
                self.memory
                    .write_obj(self.made, GuestAddress(start))
                    .unwrap();
                self.model.push((start, len, self.made));
                self.model.sort_unstable();
            }
            Err(error) => {
                assert_eq!(error, Wrong::Overlap);
                assert!(
                    !free,
                    "{len:#x} bytes at {start:#x} have a place in {before:x?}"
                );
            }
        }
    }

    fn remove(&mut self, start: u64, len: u64) {
        let place = self
            .model
            .iter()
            .position(|(at, size, _)| (*at, *size) == (start, len));
        match (self.memory.remove_region(GuestAddress(start), len), place) {
            (Ok((memory, removed)), Some(place)) => {
                assert_eq!((removed.start_addr().0, removed.len()), (start, len));
                let byte: u8 = removed.read_obj(vm_memory::MemoryRegionAddress(0)).unwrap();
                assert_eq!(byte, self.model.remove(place).2);
                // The previous collection still contains it.
                assert!(self.memory.address_in_range(GuestAddress(start)));
                self.memory = memory;
            }
            (Err(error), None) => assert_eq!(wrong(error), Wrong::Nothing),
            (outcome, place) => panic!(
                "{len:#x} at {start:#x}: {:?}, not {place:?}",
                outcome.map(drop)
            ),
        }
    }

    fn slow_find(&self, addr: u64) -> Option<(u64, u64, u8)> {
        let has = |(start, len, _): &&(u64, u64, u8)| addr >= *start && addr - start < *len;
        self.model.iter().find(has).copied()
    }

    fn find(&self, addr: u64) {
        let at = GuestAddress(addr);
        let expected = self.slow_find(addr);
        let found = self
            .memory
            .find_region(at)
            .map(|region| (region.start_addr().0, region.len()));
        assert_eq!(
            found,
            expected.map(|(start, len, _)| (start, len)),
            "{addr:#x}"
        );
        let place = self.memory.to_region_addr(at).map(|(_, offset)| offset.0);
        assert_eq!(place, expected.map(|(start, ..)| addr - start));
        assert_eq!(self.memory.address_in_range(at), expected.is_some());
        assert_eq!(self.memory.check_address(at), expected.map(|_| at));
        assert_eq!(self.memory.get_host_address(at).is_ok(), expected.is_some());
    }

    /// Checks the order and the contents of the regions, and lookups at each of their edges.
    fn compare(&self) {
        let there: Vec<_> = self
            .memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        let expected: Vec<_> = self
            .model
            .iter()
            .map(|(start, len, _)| (*start, *len))
            .collect();
        assert_eq!(there, expected);
        assert_eq!(self.memory.num_regions(), expected.len());
        let last = expected
            .iter()
            .map(|(start, len)| start + (len - 1))
            .max()
            .unwrap_or(0);
        assert_eq!(self.memory.last_addr().0, last);
        for (start, len, byte) in &self.model {
            assert_eq!(
                self.memory.read_obj::<u8>(GuestAddress(*start)).unwrap(),
                *byte
            );
            for edge in [start.wrapping_sub(1), *start, start + len - 1, start + len] {
                self.find(edge);
            }
        }
        self.find(0);
        self.find(u64::MAX);
    }
}
