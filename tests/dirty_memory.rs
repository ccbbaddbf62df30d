//! The dirty pages of a whole memory, against a set of single bytes.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::unwrap_used,
    reason = "a test that goes wrong may panic, and says what it does in fewer words"
)]

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyMemory, LogWords};
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
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap).build().unwrap();
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
    assert_eq!(harvested::<AtomicBitmap>(), [(GuestAddress(0x1000), 0x2000)]);
}
