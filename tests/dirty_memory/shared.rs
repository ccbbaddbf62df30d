//! A `DirtyMemory` reports a page in each region that shares its mapping or its bitmap.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use proptest::prelude::*;
use test_support::PAGE;
use vm_memory::bitmap::{ArcSlice, AtomicBitmap};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

use super::runs;

const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE).unwrap();

type Slices = GuestRegionCollection<GuestRegionMmap<ArcSlice<AtomicBitmap>>>;

/// Creates one mapping of four pages that is two regions: at 0 and at 0x1_0000.
fn mapped_twice() -> GuestMemoryMmap<AtomicBitmap> {
    let mapping = Arc::new(MmapRegion::new(4 * PAGE).unwrap());
    let region = |start| GuestRegionMmap::with_arc(Arc::clone(&mapping), GuestAddress(start));
    let regions = vec![region(0).unwrap(), region(0x1_0000).unwrap()];
    GuestMemoryMmap::from_regions(regions).unwrap()
}

#[test]
fn harvest_of_mapping_in_two_regions_reports_both() {
    let memory = mapped_twice();
    let mut dirty = DirtyMemory::new();
    for at in [0x1_1000, 0x2000] {
        memory.write_obj(1u8, GuestAddress(at)).unwrap();
        dirty.harvest(&memory);
    }
    assert_eq!(runs(&dirty), [(0x1000, 0x2000), (0x1_1000, 0x2000)]);
    dirty.clear();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), []);
}

#[test]
fn harvest_after_removal_of_either_region_keeps_page_of_the_other() {
    for (removed, kept) in [(0, 0x1_1000), (0x1_0000, 0x1000)] {
        let memory = mapped_twice();
        memory
            .write_obj(1u8, GuestAddress(removed + 0x1000))
            .unwrap();
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        let (rest, _) = memory.remove_region(GuestAddress(removed), 0x4000).unwrap();
        dirty.harvest(&rest);
        assert_eq!(runs(&dirty), [(kept, PAGE)]);
        // The remaining region does not share its marks, and is still harvested.
        rest.write_obj(1u8, GuestAddress(kept + 0x1000)).unwrap();
        dirty.clear();
        dirty.harvest(&rest);
        assert_eq!(runs(&dirty), [(kept + 0x1000, PAGE)]);
    }
}

#[test]
fn put_back_of_mapping_in_two_regions_reports_both_to_the_next_harvester() {
    let memory = mapped_twice();
    memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
    let mut failed = DirtyMemory::new();
    failed.harvest(&memory);
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), []);
    failed.put_back(&memory);
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), [(0x1000, PAGE), (0x1_1000, PAGE)]);
}

#[test]
fn add_log_of_mapping_in_two_regions_reports_both() {
    let memory = mapped_twice();
    let log = LogWords::new(GuestAddress(0xf000), &[0b1101], PAGE_SIZE);
    let mut dirty = DirtyMemory::new();
    dirty.add_log(&memory, &log);
    let both = [(0x1000, 2 * PAGE), (0x1_1000, 2 * PAGE)];
    assert_eq!(runs(&dirty), both);
    let mut harvested = DirtyMemory::new();
    harvested.harvest_with(&memory, &[log]);
    assert_eq!(runs(&harvested), both);
}

#[test]
fn insert_ring_of_mapping_in_two_regions_reports_both() {
    let memory = mapped_twice();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let slot = GuestAddress(0x1_0000);
    assert_eq!(dirty.insert_ring([(slot, 1), (slot, 4), (slot, 2)]), 1);
    assert_eq!(runs(&dirty), [(0x1000, 2 * PAGE), (0x1_1000, 2 * PAGE)]);
}

#[test]
fn insert_ring_whose_iterator_panics_keeps_earlier_entries() {
    let memory = mapped_twice();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let entries = (0..4).map(|offset| {
        assert!(offset < 2, "the ring of the caller fails");
        (GuestAddress(0), offset)
    });
    let inserted = std::panic::AssertUnwindSafe(|| dirty.insert_ring(entries));
    assert!(std::panic::catch_unwind(inserted).is_err());
    assert_eq!(runs(&dirty), [(0, 2 * PAGE), (0x1_0000, 2 * PAGE)]);
}

#[cfg(feature = "iommu")]
#[test]
fn insert_iova_log_of_mapping_in_two_regions_reports_both() {
    use vm_memory::{Iotlb, Permissions};

    let memory = mapped_twice();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let mut iotlb = Iotlb::new();
    let (iova, target) = (GuestAddress(0), GuestAddress(0x1000));
    iotlb
        .set_mapping(iova, target, 2 * PAGE, Permissions::Write)
        .unwrap();
    let log = LogWords::new(GuestAddress(0), &[0b110], PAGE_SIZE);
    let mut unmapped = Vec::new();
    let outside = dirty.insert_iova_log(&iotlb, &log, |range| unmapped.push(range.base.0));
    assert_eq!((outside, unmapped), (0, vec![0x2000]));
    assert_eq!(runs(&dirty), [(0x2000, PAGE), (0x1_2000, PAGE)]);
}

#[test]
fn harvest_after_region_takes_another_bitmap_reports_its_pages() {
    // The bounds stay, so only the bitmaps show that the regions share their marks now.
    let apart = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[
        (GuestAddress(0), 4 * PAGE),
        (GuestAddress(0x1_0000), 4 * PAGE),
    ])
    .unwrap();
    let mut dirty = DirtyMemory::new();
    apart.write_obj(1u8, GuestAddress(0)).unwrap();
    dirty.harvest(&apart);
    let together = mapped_twice();
    together.write_obj(1u8, GuestAddress(0x1_1000)).unwrap();
    dirty.harvest(&together);
    assert_eq!(runs(&dirty), [(0, 2 * PAGE), (0x1_1000, PAGE)]);
    dirty.clear();
    apart.write_obj(1u8, GuestAddress(0x2000)).unwrap();
    dirty.harvest(&apart);
    assert_eq!(runs(&dirty), [(0x2000, PAGE)]);
}

/// Creates regions of (first page of the bitmap, number of pages), 64 pages apart.
fn slices(parts: &[(usize, usize)]) -> Slices {
    let bitmap = Arc::new(AtomicBitmap::new(48 * PAGE, PAGE_SIZE));
    let region = |(number, &(first, pages)): (usize, &(usize, usize))| {
        let slice = ArcSlice::new(Arc::clone(&bitmap), first * PAGE);
        let mapping = MmapRegionBuilder::new_with_bitmap(pages * PAGE, slice).build();
        GuestRegionMmap::new(mapping.unwrap(), GuestAddress((number * 64 * PAGE) as u64)).unwrap()
    };
    GuestRegionCollection::from_regions(parts.iter().enumerate().map(region).collect()).unwrap()
}

/// Writes to pages of regions, a word of a log, and what follows the harvest.
type Round = (Vec<(usize, usize)>, u64, u8);

fn check_rounds(parts: Vec<(usize, usize)>, rounds: Vec<Round>) -> Result<(), TestCaseError> {
    let memory = slices(&parts);
    let mut dirty = DirtyMemory::new();
    // The dirty pages, as pages of the bitmap.
    let mut expected = BTreeSet::new();
    for (writes, word, then) in rounds {
        for (number, page) in writes {
            let addr = GuestAddress(((number * 64 + page) * PAGE) as u64);
            if memory.write_obj(1u8, addr).is_ok() {
                expected.insert(parts[number].0 + page);
            }
        }
        // A log of the first region.
        let start = GuestAddress(0);
        dirty.harvest_with(&memory, &[LogWords::new(start, &[word], PAGE_SIZE)]);
        expected.extend(
            (0..parts[0].1)
                .filter(|page| word >> page & 1 == 1)
                .map(|page| parts[0].0 + page),
        );
        let found: Vec<usize> = dirty
            .runs()
            .flat_map(|(start, len)| {
                let first = start.0 as usize / PAGE;
                first..first + len / PAGE
            })
            .collect();
        let each: Vec<usize> = parts
            .iter()
            .enumerate()
            .flat_map(|(number, &(first, pages))| {
                let inside = expected.range(first..first + pages);
                inside.map(move |page| number * 64 + page - first)
            })
            .collect();
        prop_assert_eq!(found, each);
        match then {
            0 => {
                dirty.put_back(&memory);
                dirty.clear();
            }
            1 => {
                dirty.clear();
                expected.clear();
            }
            2 => {
                dirty.put_back(&memory);
                dirty = DirtyMemory::new();
            }
            _ => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn harvest_of_overlapping_slices_reports_page_in_each_of_them(
        parts in prop::collection::vec((0usize..24, 1usize..24), 1..6),
        rounds in prop::collection::vec(
            (prop::collection::vec((0usize..6, 0usize..24), 0..4), any::<u64>(), 0u8..4), 1..6),
    ) {
        check_rounds(parts, rounds)?;
    }
}

/// The pages of the bitmap are larger than the regions. The regions share pages, but no bytes.
#[test]
fn harvest_of_bitmap_with_larger_pages_finds_a_mark_once() {
    const LARGE: usize = 4 * PAGE;
    let bitmap = Arc::new(AtomicBitmap::new(6 * PAGE, LARGE.try_into().unwrap()));
    let region = |number: usize| {
        let slice = ArcSlice::new(Arc::clone(&bitmap), number * PAGE);
        let mapping = MmapRegionBuilder::new_with_bitmap(PAGE, slice).build();
        GuestRegionMmap::new(mapping.unwrap(), GuestAddress(number as u64 * 0x1_0000)).unwrap()
    };
    let memory = Slices::from_regions((0..6).map(region).collect()).unwrap();
    let mut dirty = DirtyMemory::new();
    for (written, reported) in [(1, 0..4), (5, 4..6), (3, 0..4)] {
        let at = GuestAddress(written * 0x1_0000);
        memory.write_obj(1u8, at).unwrap();
        dirty.harvest(&memory);
        let reported: Vec<_> = reported.map(|number| (number * 0x1_0000, PAGE)).collect();
        assert_eq!(runs(&dirty), reported);
        dirty.clear();
        dirty.harvest(&memory);
        assert_eq!(runs(&dirty), []);
    }
}
