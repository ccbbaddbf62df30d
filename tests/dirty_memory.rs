//! The dirty pages of a whole memory, against a set of single bytes.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap, DirtyLog, DirtyPages};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

const PAGE: usize = 4096;

/// Regions of (first page, pages, pages of the host's in a page of the bitmap).
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

/// The pages of the host's size that the runs cover.
fn pages(dirty: &DirtyMemory) -> BTreeSet<u64> {
    let page = PAGE as u64;
    dirty
        .runs()
        .flat_map(|(start, len)| start.0 / page..(start.0 + len as u64).div_ceil(page))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_harvest_is_what_was_written_and_what_others_logged(
        gap in 0u64..70,
        first in 1usize..150,
        second in 1usize..150,
        factors in (1usize..4, 1usize..4),
        writes in prop::collection::vec((0u64..400, 1usize..30), 0..8),
        logs in prop::collection::vec((0u64..300, prop::collection::vec(any::<u64>(), 0..5), 1usize..4), 0..3),
    ) {
        let start = 5;
        let layout = [(start, first, factors.0), (start + first as u64 + gap, second, factors.1)];
        let memory = memory(&layout);
        // What is marked of a page is all of the bitmap's page that it is in, within its region.
        let marked = |page: u64| {
            let region = layout.iter().find(|(first, pages, _)| (*first..*first + *pages as u64).contains(&page));
            region.map(|&(first, pages, factor)| {
                let from = (page - first) / factor as u64 * factor as u64;
                first + from..first + (from + factor as u64).min(pages as u64)
            })
        };
        let mut expected = BTreeSet::new();
        for (page, pages) in writes {
            let written = memory.write(&vec![1; pages * PAGE], GuestAddress(page * PAGE as u64)).unwrap_or(0);
            expected.extend((page..page + (written / PAGE) as u64).filter_map(marked).flatten());
        }
        for (from, words, size) in &logs {
            for bit in 0..words.len() * 64 {
                if words[bit / 64] >> (bit % 64) & 1 != 0 {
                    let page = from + (bit * size) as u64;
                    expected.extend((page..page + *size as u64).filter_map(marked).flatten());
                }
            }
        }
        let logs: Vec<_> = logs.iter().map(|(from, words, size)| LogWords {
            start: GuestAddress(from * PAGE as u64),
            words,
            page_size: NonZeroUsize::new(size * PAGE).unwrap(),
        }).collect();

        let mut dirty = DirtyMemory::new();
        dirty.harvest_with(&memory, &logs);
        prop_assert_eq!(pages(&dirty), expected.clone());
        prop_assert_eq!(dirty.total_bytes(), expected.len() as u64 * PAGE as u64);

        // It stays until it is cleared, and goes back where it came from.
        dirty.harvest(&memory);
        prop_assert_eq!(pages(&dirty), expected.clone());
        dirty.put_back(&memory);
        dirty.clear();
        prop_assert_eq!(dirty.total_pages(), 0);
        dirty.harvest(&memory);
        prop_assert_eq!(pages(&dirty), expected);
    }
}

#[test]
fn regions_come_and_go_between_harvests() {
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
fn tracking_is_switched_for_all_regions() {
    let memory = memory(&[(0, 1, 1), (1, 1, 1)]);
    DirtyMemory::set_tracking(&memory, false);
    memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
    assert!(memory.iter().all(|region| !region.bitmap().dirty_at(0)));
    DirtyMemory::set_tracking(&memory, true);
    memory.write_slice(&[1; 0x2000], GuestAddress(0)).unwrap();
    assert!(memory.iter().all(|region| region.bitmap().dirty_at(0)));
}

/// Memory whose bitmap is `None`, or nothing at all, has the logs of others.
#[test]
fn memory_without_bitmaps_has_what_others_logged() {
    fn harvested<B>() -> Vec<(GuestAddress, usize)>
    where
        B: vm_memory::bitmap::NewBitmap,
        for<'a> vm_memory::bitmap::BS<'a, B>: vm_memory::bitmap::DirtyLog,
    {
        let memory = GuestMemoryMmap::<B>::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
        memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
        let mut dirty = DirtyMemory::new();
        let log = LogWords {
            start: GuestAddress(0),
            words: &[0b100],
            page_size: NonZeroUsize::new(PAGE).unwrap(),
        };
        dirty.harvest_with(&memory, &[log]);
        dirty.runs().collect()
    }
    assert_eq!(harvested::<()>(), [(GuestAddress(0x2000), 0x1000)]);
    assert_eq!(
        harvested::<AtomicBitmap>(),
        [(GuestAddress(0x1000), 0x2000)]
    );
}

/// Runs by numbers.
fn runs(dirty: &DirtyMemory) -> Vec<(u64, usize)> {
    dirty.runs().map(|(start, len)| (start.0, len)).collect()
}

/// A region that grew where it is, shrank, moved to other bounds, or has other pages now, has what was found before and is not sent yet.
#[test]
fn what_is_not_sent_outlives_a_change_of_the_regions() {
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
    assert_eq!(after(&[(0, 9, 1)]), all, "both in one, which is longer");
    assert_eq!(
        after(&[(0, 4, 2), (4, 4, 1)]),
        [(0, 0x4000), (0x4000, 0x1000), (0x7000, 0x1000)],
        "other pages"
    );
    assert_eq!(
        after(&[(0, 3, 1), (3, 4, 1)]),
        [(0x1000, 0x1000), (0x3000, 0x2000)],
        "other bounds, and a page that is gone"
    );
    assert_eq!(
        after(&[(6, 9, 1)]),
        [(0x7000, 0x1000)],
        "one that begins within a former one"
    );
    assert_eq!(after(&[(20, 1, 1)]), [], "none of them");
}

/// Of a run whose start is gone, or a piece of its middle, the rest is put back.
#[test]
fn what_is_left_of_a_run_is_put_back() {
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

/// Two regions share a bitmap, and one of its pages, of which each has a part.
#[test]
fn a_page_over_the_edge_of_a_region_stays_marked_for_the_other_one() {
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
    // The other way round: the region behind is harvested first.
    memory.write_obj(1u8, GuestAddress(0x2800)).unwrap();
    let behind = memory.find_region(GuestAddress(0x3000)).unwrap();
    let mut pages = DirtyPages::new(0x2000, NonZeroUsize::new(0x2000).unwrap());
    behind.bitmap().harvest_into(&mut pages);
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty)[0], (0x2000, 0x1000));
    // A page that one region has as a whole gets clean, and the one at the end of the bitmap, too.
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert!(!bitmap.dirty_at(0) && !bitmap.dirty_at(0x6000));
}

/// Tracking is off, and on again: what was put back in between is marked.
#[test]
fn what_is_put_back_while_tracking_is_off_is_kept() {
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

/// A log that comes before the first harvest is in there, and one that is older than a change of the regions.
#[test]
fn a_log_that_comes_first_is_kept() {
    let page_size = NonZeroUsize::new(PAGE).unwrap();
    let log = |words| LogWords {
        start: GuestAddress(0),
        words,
        page_size,
    };
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

    /// Marking from a log is harvesting with it, at any granularity of either, whether tracking is on or off.
    #[test]
    fn marking_from_a_log_is_harvesting_with_it(
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
        let memory = memory(&[(start, first, factors.0), (start + first as u64 + gap, second, factors.1)]);
        DirtyMemory::set_tracking(&memory, tracking);
        let log = LogWords {
            start: GuestAddress(from * PAGE as u64),
            words: &words,
            page_size: NonZeroUsize::new(log_page).unwrap(),
        };
        let (mut marked, mut with) = (DirtyMemory::new(), DirtyMemory::new());
        with.harvest_with(&memory, &[log]);
        DirtyMemory::mark(&memory, &log);
        marked.harvest(&memory);
        prop_assert_eq!(runs(&marked), runs(&with));
    }
}
