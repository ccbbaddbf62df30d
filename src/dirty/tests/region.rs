//! Tests of [`DirtyRegion`].

use super::*;
use crate::guest_memory::Result;
use crate::volatile_memory::VolatileSlice;

/// A change of a [`DirtyRegion`].
#[derive(Clone, Debug)]
enum Step {
    /// Adds the addresses from the first to the last.
    Add(u64, u64),
    /// Adds a log: its start, words and page size.
    AddLog(u64, Vec<u64>, usize),
    /// Records the region again, after this range of bytes became readable or unreadable.
    SetReadable(bool, u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let addr = 0u64..1200;
    let step = prop_oneof![
        (addr.clone(), addr.clone()).prop_map(|(first, last)| Step::Add(first, last)),
        (addr.clone(), words(), 1usize..30)
            .prop_map(|(start, words, size)| Step::AddLog(start, words, size)),
        (any::<bool>(), addr.clone(), addr)
            .prop_map(|(readable, from, to)| Step::SetReadable(readable, from, to)),
    ];
    prop::collection::vec(step, 1..8)
}

/// Returns whether each run ends where the next byte is not of its kind: none can be joined.
fn are_maximal(runs: &[(GuestAddress, usize)], bytes: &ByteSet) -> bool {
    let ends_at = |(start, len): &(GuestAddress, usize)| start.0 + *len as u64;
    runs.iter().all(|run| !bytes.contains(&ends_at(run)))
}

proptest! {
    #[test]
    fn dirty_region_equals_set_of_bytes(
        base in prop_oneof![Just(0), Just(1u64 << 40), Just(u64::MAX - 10_000)],
        start in 0u64..300,
        len in 0usize..700,
        page in 1usize..50,
        steps in steps(),
        (from, count) in (0u64..1200, 0usize..1200),
    ) {
        let mut device = Device {
            start: base + start,
            page_size: page_size(page),
            marks: None,
            readable: vec![true; len],
        };
        let mut dirty = device.dirty_region();
        let mut model = ByteSet::new();
        for step in steps {
            match step {
                Step::Add(first, last) => {
                    dirty.add(base + first, base + last);
                    model.extend(device.whole_pages(base + first..=base + last));
                }
                Step::AddLog(start, words, size) => {
                    let start = GuestAddress(base + start);
                    let log = LogWords::new(start, &words, page_size(size));
                    dirty.add_log(&log);
                    model.extend(device.whole_pages(bytes_of_log(&log)));
                }
                Step::SetReadable(readable, from, to) => {
                    let index = |addr: u64| (base + addr).saturating_sub(device.start) as usize;
                    let (from, to) = (index(from).min(len), index(to).min(len));
                    if from < to {
                        device.readable[from..to].fill(readable);
                    }
                    dirty.record_access(&device);
                }
            }
            prop_assert_eq!(bytes_of(dirty.runs()), model.clone());
            for kind in [true, false] {
                let runs: Vec<_> = dirty.runs_by_access(kind).collect();
                let mut expected = model.clone();
                expected.retain(|byte| device.readable[(byte - device.start) as usize] == kind);
                prop_assert!(are_maximal(&runs, &expected), "{:?}", runs);
                prop_assert_eq!(bytes_of(runs.into_iter()), expected);
            }
            let from = base + from;
            let ranges = dirty.ranges_in(GuestAddress(from), count);
            let ranges = ranges.map(|range| (GuestAddress(from + range.start as u64), range.len()));
            let mut expected = model.clone();
            expected.retain(|byte| (from..from + count as u64).contains(byte));
            prop_assert_eq!(bytes_of(ranges), expected);
        }
    }
}

#[test]
fn is_for_region_with_other_bounds_page_size_or_marks_is_false() {
    let device = |start, len, page, marks| Device {
        start,
        page_size: page_size(page),
        marks,
        readable: vec![true; len],
    };
    let known = device(0x1000, 8, 4, Some((1, 2)));
    let dirty = known.dirty_region();
    assert!(dirty.is_for(&known, &known));
    for other in [
        device(0x1001, 8, 4, Some((1, 2))),
        device(0x1000, 9, 4, Some((1, 2))),
        device(0x1000, 8, 5, Some((1, 2))),
        device(0x1000, 8, 4, Some((1, 3))),
        device(0x1000, 8, 4, None),
    ] {
        assert!(!dirty.is_for(&other, &other), "{:?}", other.marks);
    }
}

/// RAM that claims the `len` addresses at `start`.
struct Claim {
    start: u64,
    len: u64,
}

impl GuestMemoryRegionBytes for Claim {}

impl GuestMemoryRegion for Claim {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) {}

    fn get_slice(&self, _: MemoryRegionAddress, _: usize) -> Result<VolatileSlice<'_>> {
        Ok(VolatileSlice::from([].as_mut_slice()))
    }
}

#[test]
fn dirty_region_of_claim_past_end_of_address_space_ends_there() {
    let log = Device {
        start: 0,
        page_size: page_size(0x1000),
        marks: None,
        readable: vec![],
    };
    let start = u64::MAX - 0x1fff;
    let mut dirty = DirtyRegion::try_new(&Claim { start, len: 0x3000 }, &log).unwrap();
    dirty.pages.insert_range(0, 0x3000);
    let runs: Vec<_> = dirty.runs().collect();
    assert_eq!(runs, [(GuestAddress(start), 0x2000)]);

    // No mapping has that length: the region takes no bits.
    let claim = Claim {
        start: 0,
        len: u64::MAX,
    };
    let mut dirty = DirtyRegion::try_new(&claim, &()).unwrap();
    dirty.pages.insert_range(0, 0x3000);
    assert_eq!(dirty.runs().next(), None);
}

/// RAM whose first bytes are accessible. Each range that it returns starts at 0, also an empty one.
struct FirstBytes {
    accessible: usize,
    len: usize,
}

impl GuestMemoryRegionBytes for FirstBytes {}

impl GuestMemoryRegion for FirstBytes {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }

    fn bitmap(&self) {}

    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        count.min(self.accessible.saturating_sub(addr.0 as usize))
    }

    fn reachable_range(&self, addr: MemoryRegionAddress, count: usize) -> Range<usize> {
        0..self.reachable_bytes(addr, count)
    }
}

#[test]
fn record_access_with_empty_range_at_start_finds_no_readable_bytes() {
    for accessible in [0, 4, 8] {
        let region = FirstBytes { accessible, len: 8 };
        let log = Device {
            start: 0,
            page_size: page_size(1),
            marks: None,
            readable: vec![true; 8],
        };
        let mut dirty = DirtyRegion::try_new(&region, &log).unwrap();
        dirty.add(0, 7);
        dirty.record_access(&region);
        let readable = bytes_of(dirty.runs_by_access(true));
        assert_eq!(readable, (0..accessible as u64).collect(), "{accessible}");
        let unreadable = bytes_of(dirty.runs_by_access(false));
        assert_eq!(unreadable, (accessible as u64..8).collect(), "{accessible}");
    }
}
