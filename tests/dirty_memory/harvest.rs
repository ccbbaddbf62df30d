//! A `DirtyMemory` loses no dirty page: with logs, after `put_back`, and when regions change.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use proptest::prelude::*;
use test_support::PAGE;
use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap, DirtyLog, DirtyPages};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::runs;

/// Creates regions of (first page, number of pages, pages per bit of the bitmap).
fn memory(regions: &[(u64, usize, usize)]) -> GuestMemoryMmap<AtomicBitmap> {
    let regions = regions.iter().map(|&(first, pages, factor)| {
        let len = pages * PAGE;
        let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(PAGE * factor).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(first * PAGE as u64)).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.collect()).unwrap()
}

/// Returns the numbers of the pages of 4 KiB that the runs cover.
fn pages(dirty: &DirtyMemory) -> BTreeSet<u64> {
    let page = PAGE as u64;
    dirty
        .runs()
        .flat_map(|(start, len)| start.0 / page..(start.0 + len as u64).div_ceil(page))
        .collect()
}

fn check_harvest(
    gap: u64,
    first: usize,
    second: usize,
    factors: (usize, usize),
    writes: Vec<(u64, usize)>,
    logs: Vec<(u64, Vec<u64>, usize)>,
) -> Result<(), TestCaseError> {
    let start = 5;
    let layout = [
        (start, first, factors.0),
        (start + first as u64 + gap, second, factors.1),
    ];
    let memory = memory(&layout);
    // A write marks the whole page of the bitmap, as far as it is in the region.
    let marked = |page: u64| {
        let region = layout
            .iter()
            .find(|(first, pages, _)| (*first..*first + *pages as u64).contains(&page));
        region.map(|&(first, pages, factor)| {
            let from = (page - first) / factor as u64 * factor as u64;
            first + from..first + (from + factor as u64).min(pages as u64)
        })
    };
    let mut expected = BTreeSet::new();
    for (page, pages) in writes {
        let written = memory
            .write(&vec![1; pages * PAGE], GuestAddress(page * PAGE as u64))
            .unwrap_or(0);
        expected.extend(
            (page..page + (written / PAGE) as u64)
                .filter_map(marked)
                .flatten(),
        );
    }
    for (from, words, size) in &logs {
        for bit in 0..words.len() * 64 {
            if words[bit / 64] >> (bit % 64) & 1 != 0 {
                let page = from + (bit * size) as u64;
                expected.extend((page..page + *size as u64).filter_map(marked).flatten());
            }
        }
    }
    let logs: Vec<_> = logs
        .iter()
        .map(|(from, words, size)| {
            LogWords::new(
                GuestAddress(from * PAGE as u64),
                words,
                NonZeroUsize::new(size * PAGE).unwrap(),
            )
        })
        .collect();

    let mut dirty = DirtyMemory::new();
    dirty.harvest_with(&memory, &logs);
    prop_assert_eq!(pages(&dirty), expected.clone());
    prop_assert_eq!(dirty.total_bytes(), expected.len() as u64 * PAGE as u64);

    // Pages stay in the set until it is cleared, and can be put back.
    dirty.harvest(&memory);
    prop_assert_eq!(pages(&dirty), expected.clone());
    dirty.put_back(&memory);
    dirty.clear();
    prop_assert_eq!(dirty.total_pages(), 0);
    dirty.harvest(&memory);
    prop_assert_eq!(pages(&dirty), expected);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn harvest_with_logs_returns_pages_written_and_logged(
        gap in 0u64..70,
        first in 1usize..150,
        second in 1usize..150,
        factors in (1usize..4, 1usize..4),
        writes in prop::collection::vec((0u64..400, 1usize..30), 0..8),
        logs in prop::collection::vec(
            (0u64..300, prop::collection::vec(any::<u64>(), 0..5), 1usize..4),
            0..3,
        ),
    ) {
        check_harvest(gap, first, second, factors, writes, logs)?;
    }
}

#[test]
fn harvest_after_region_change_follows_the_memory() {
    let memory = memory(&[(0, 4, 1), (10, 4, 1)]);
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    memory.write_obj(1u8, GuestAddress(0xa000)).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let (without, _) = memory.remove_region(GuestAddress(0xa000), 0x4000).unwrap();
    let more = GuestRegionMmap::from_range(GuestAddress(0x6000), 0x1000, None).unwrap();
    let other = without.insert_region(Arc::new(more)).unwrap();
    other.write_obj(1u8, GuestAddress(0x6fff)).unwrap();
    dirty.harvest(&other);
    assert_eq!(
        dirty.runs().collect::<Vec<_>>(),
        [(GuestAddress(0), 0x1000), (GuestAddress(0x6000), 0x1000)]
    );
    assert_eq!(dirty.regions().count(), 2);
}

#[test]
fn set_tracking_switches_all_regions() {
    let memory = memory(&[(0, 1, 1), (1, 1, 1)]);
    DirtyMemory::set_tracking(&memory, false);
    memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
    assert!(memory.iter().all(|region| !region.bitmap().dirty_at(0)));
    DirtyMemory::set_tracking(&memory, true);
    memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
    assert!(memory.iter().all(|region| region.bitmap().dirty_at(0)));
}

#[test]
fn harvest_with_logs_of_memory_without_bitmaps_returns_logs() {
    fn harvested<B>() -> Vec<(GuestAddress, usize)>
    where
        B: vm_memory::bitmap::NewBitmap,
        for<'a> vm_memory::bitmap::BS<'a, B>: vm_memory::bitmap::DirtyLog,
    {
        let memory = GuestMemoryMmap::<B>::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
        memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
        let mut dirty = DirtyMemory::new();
        let log = LogWords::new(GuestAddress(0), &[0b100], NonZeroUsize::new(PAGE).unwrap());
        dirty.harvest_with(&memory, &[log]);
        dirty.runs().collect()
    }
    assert_eq!(harvested::<()>(), [(GuestAddress(0x2000), 0x1000)]);
    assert_eq!(
        harvested::<AtomicBitmap>(),
        [(GuestAddress(0x1000), 0x2000)]
    );
}

#[test]
fn harvest_after_region_change_keeps_unsent_pages() {
    let old = memory(&[(0, 4, 1), (4, 4, 1)]);
    for page in [1u64, 3, 4, 7] {
        old.write_obj(1u8, GuestAddress(page * 0x1000)).unwrap();
    }
    let mut found = DirtyMemory::new();
    found.harvest(&old);
    let after = |layout: &[(u64, usize, usize)]| {
        let mut dirty = found.clone();
        dirty.harvest(&memory(layout));
        runs(&dirty)
    };
    let all = [(0x1000, 0x1000), (0x3000, 0x2000), (0x7000, 0x1000)];
    assert_eq!(after(&[(0, 9, 1)]), all, "both merged into a longer region");
    assert_eq!(
        after(&[(0, 4, 2), (4, 4, 1)]),
        [(0, 0x4000), (0x4000, 0x1000), (0x7000, 0x1000)],
        "another page size"
    );
    assert_eq!(
        after(&[(0, 3, 1), (3, 4, 1)]),
        [(0x1000, 0x1000), (0x3000, 0x2000)],
        "other bounds, and one address removed"
    );
    assert_eq!(
        after(&[(6, 9, 1)]),
        [(0x7000, 0x1000)],
        "a region that begins inside a former one"
    );
    assert_eq!(after(&[(20, 1, 1)]), [], "no common addresses");
}

#[test]
fn put_back_after_region_change_marks_remaining_parts_of_runs() {
    let old = memory(&[(0, 200, 1)]);
    old.write_slice(&[1; 0x8000], GuestAddress(0)).unwrap();
    old.write_obj(1u8, GuestAddress(0xc7000)).unwrap();
    let mut found = DirtyMemory::new();
    found.harvest(&old);
    let new = memory(&[(2, 1, 1), (4, 1, 2), (6, 100, 1), (199, 4, 1)]);
    found.put_back(&new);
    let mut again = DirtyMemory::new();
    again.harvest(&new);
    assert_eq!(
        runs(&again),
        [
            (0x2000, 0x1000),
            (0x4000, 0x1000),
            (0x6000, 0x2000),
            (0xc7000, 0x1000)
        ]
    );
}

#[test]
fn harvest_of_page_shared_by_regions_keeps_mark_for_the_other() {
    let bitmap = Arc::new(AtomicBitmap::new(
        0x8000,
        NonZeroUsize::new(0x2000).unwrap(),
    ));
    let region = |start: usize, len: usize| {
        let mapping =
            MmapRegionBuilder::new_with_bitmap(len, ArcSlice::new(Arc::clone(&bitmap), start));
        GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(start as u64)).unwrap()
    };
    let regions = vec![
        region(0, 0x3000),
        region(0x3000, 0x2000),
        region(0x5000, 0x3000),
    ];
    let memory = GuestMemoryMmap::from_regions(regions).unwrap();
    for at in [0x3800u64, 0x4800, 0x7000] {
        memory.write_obj(1u8, GuestAddress(at)).unwrap();
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        let has = dirty
            .runs()
            .any(|(start, len)| (start.0..start.0 + len as u64).contains(&at));
        assert!(has, "{at:#x}: {dirty:?}");
    }
    // The second region is harvested first.
    memory.write_obj(1u8, GuestAddress(0x2800)).unwrap();
    let second = memory.find_region(GuestAddress(0x3000)).unwrap();
    let mut pages = DirtyPages::new(0x2000, NonZeroUsize::new(0x2000).unwrap());
    second.bitmap().harvest_into(&mut pages);
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty)[0], (0x2000, 0x1000));
    // A page of only one region is clean after the harvest; so is the last page of the bitmap.
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert!(!bitmap.dirty_at(0) && !bitmap.dirty_at(0x6000));
}

#[test]
fn put_back_while_tracking_is_off_marks() {
    let memory = memory(&[(0, 4, 1)]);
    memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    DirtyMemory::set_tracking(&memory, false);
    dirty.put_back(&memory);
    dirty.clear();
    DirtyMemory::set_tracking(&memory, true);
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), [(0x1000, 0x1000)]);
}

#[test]
fn add_log_before_harvest_is_kept_across_region_change() {
    let page_size = NonZeroUsize::new(PAGE).unwrap();
    let log = |words| LogWords::new(GuestAddress(0), words, page_size);
    let small = memory(&[(0, 4, 1), (8, 4, 1)]);
    let mut dirty = DirtyMemory::new();
    dirty.add_log(&small, &log(&[0b1000_1001_0000_0010]));
    assert_eq!(
        runs(&dirty),
        [(0x1000, 0x1000), (0x8000, 0x1000), (0xb000, 0x1000)]
    );
    let large = memory(&[(0, 12, 1)]);
    large.write_obj(1u8, GuestAddress(0x9000)).unwrap();
    dirty.add_log(&large, &log(&[0b1]));
    dirty.harvest(&large);
    assert_eq!(
        runs(&dirty),
        [(0, 0x2000), (0x8000, 0x2000), (0xb000, 0x1000)]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn mark_from_log_equals_harvest_with_log(
        start in 0u64..100,
        first in 1usize..150,
        gap in 0u64..70,
        second in 1usize..150,
        factors in (1usize..4, 1usize..4),
        from in 0u64..300,
        words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..5),
        log_page in prop_oneof![Just(PAGE), Just(2 * PAGE), Just(3 * PAGE), Just(1024), Just(3000)],
        tracking in any::<bool>(),
    ) {
        let other = start + first as u64 + gap;
        let memory = memory(&[(start, first, factors.0), (other, second, factors.1)]);
        DirtyMemory::set_tracking(&memory, tracking);
        let log = LogWords::new(GuestAddress(from * PAGE as u64), &words, NonZeroUsize::new(log_page).unwrap());
        let (mut marked, mut with) = (DirtyMemory::new(), DirtyMemory::new());
        with.harvest_with(&memory, &[log]);
        DirtyMemory::mark(&memory, &log);
        marked.harvest(&memory);
        prop_assert_eq!(runs(&marked), runs(&with));
    }
}

proptest! {
    #[test]
    fn estimate_without_writers_equals_harvest(
        writes in prop::collection::vec((0u64..40, 1usize..9), 0..12),
        factors in (1usize..5, 1usize..5),
    ) {
        let memory = memory(&[(0, 17, factors.0), (20, 13, factors.1)]);
        for (page, pages) in writes {
            let _ = memory.write(&vec![1; pages * PAGE], GuestAddress(page * PAGE as u64));
        }
        let mut dirty = DirtyMemory::new();
        let estimate = DirtyMemory::estimate(&memory);
        dirty.harvest(&memory);
        // The last page of a region may be shorter than the others.
        let shorter: u64 = dirty.regions().map(|(_, pages)| pages.page_size().get() as u64).sum();
        let exact = dirty.total_bytes();
        prop_assert!((exact..=exact + shorter).contains(&estimate));
        prop_assert_eq!(DirtyMemory::estimate(&memory), 0);
    }
}

#[test]
fn estimate_of_part_of_bitmap_counts_its_pages_only() {
    let bitmap = Arc::new(AtomicBitmap::new(
        8 * PAGE,
        NonZeroUsize::new(PAGE).unwrap(),
    ));
    for page in [0, 2, 3, 6] {
        bitmap.mark_dirty(page * PAGE, 1);
    }
    let part = ArcSlice::new(Arc::clone(&bitmap), 2 * PAGE);
    assert_eq!(part.estimate(4 * PAGE), 2 * PAGE);
    assert_eq!(part.estimate(usize::MAX), 3 * PAGE);
    assert_eq!(ArcSlice::new(bitmap, 9 * PAGE).estimate(PAGE), 0);
    assert_eq!(
        ().estimate(PAGE) + None::<ArcSlice<AtomicBitmap>>.estimate(PAGE),
        0
    );
}
