use std::num::NonZeroUsize;

use super::*;
use crate::bitmap::barrier::BARRIERS;
use crate::bitmap::AtomicBitmap;
use crate::mmap::MmapRegionBuilder;
use crate::{Bytes, GuestMemoryMmap, GuestRegionMmap};
use test_support::skipped;

#[test]
fn harvest_of_many_regions_issues_one_barrier() {
    let memory = |test_first: bool| {
        let regions = (0..5u64).map(|number| {
            let mut marks = AtomicBitmap::new(0x2000, NonZeroUsize::new(4096).unwrap());
            if test_first && number != 2 {
                // If the kernel refuses the barrier, the test is skipped.
                marks.test_before_marking().ok()?;
            }
            let mapping = MmapRegionBuilder::new_with_bitmap(0x2000, marks).build();
            GuestRegionMmap::new(mapping.unwrap(), GuestAddress(number * 0x4000))
        });
        let regions = regions.collect::<Option<Vec<_>>>()?;
        Some(GuestMemoryMmap::from_regions(regions).unwrap())
    };
    for (test_first, expected) in [(false, 0), (true, 1)] {
        let Some(memory) = memory(test_first) else {
            skipped(
                "harvest_of_many_regions_issues_one_barrier",
                "no membarrier(2)",
            );
            continue;
        };
        for number in 0..5u64 {
            memory
                .write_obj(1u8, GuestAddress(number * 0x4000))
                .unwrap();
        }
        let before = BARRIERS.get();
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        assert_eq!(BARRIERS.get() - before, expected);
        assert_eq!(dirty.total_pages(), 5);
    }
    let memory = memory(false).unwrap();
    let before = BARRIERS.get();
    DirtyMemory::set_tracking(&memory, false);
    assert_eq!(BARRIERS.get() - before, 0);
    let _ = DirtyMemory::start_tracking(&memory);
    assert_eq!(BARRIERS.get() - before, 1);
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert_eq!(dirty.total_pages(), 1);
}
