//! The dirty pages that contain only zeroes.

use std::num::NonZeroUsize;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::runs;

const PAGE: usize = 0x1000;

#[test]
fn take_zero_pages_splits_set_by_content() {
    // The last page of the first region has 0x800 bytes, and the second region is adjacent to it.
    let ranges = [(GuestAddress(0), 0x4800), (GuestAddress(0x4800), 0x4000)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    dirty.insert_all();
    // The first and the last byte of a page count. A page that is not dirty does not.
    dirty.remove_range(GuestAddress(0x2000), PAGE as u64);
    for addr in [0x1000, 0x2000, 0x47ff, 0x57ff] {
        memory.write_obj(1u8, GuestAddress(addr)).unwrap();
    }
    let all = dirty.clone();
    let zero = dirty.take_zero_pages(&memory);
    assert_eq!(
        runs(&dirty),
        [(0x1000, PAGE), (0x4000, 0x800), (0x4800, PAGE)]
    );
    assert_eq!(runs(&zero), [(0, PAGE), (0x3000, PAGE), (0x5800, 0x3000)]);
    let mut both = dirty.clone();
    both.union_with(&zero);
    assert!(both == all);
    // Nothing is left to take.
    assert_eq!(dirty.take_zero_pages(&memory).total_pages(), 0);
    assert_eq!(dirty.total_pages(), 3);
    assert_eq!(DirtyMemory::new().take_zero_pages(&memory).total_pages(), 0);
}

/// Returns a region of two plugged blocks with two pages each.
fn two_blocks() -> (GuestMemoryMmap<AtomicBitmap>, Arc<PluggedBlocks>) {
    let blocks = PluggedBlocks::new(4 * PAGE, NonZeroUsize::new(2 * PAGE).unwrap());
    let blocks = Arc::new(blocks.unwrap());
    blocks.plug(0, 4 * PAGE).unwrap();
    let mapping = MmapRegionBuilder::<AtomicBitmap>::new(4 * PAGE)
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    (GuestMemoryMmap::from_regions(vec![region]).unwrap(), blocks)
}

/// A destination that did not zero these pages would keep the bytes from before the unplugging.
#[test]
fn take_zero_pages_returns_pages_of_block_plugged_after_harvest_in_runs() {
    let (memory, blocks) = two_blocks();
    let mut dirty = DirtyMemory::new();
    blocks.unplug(2 * PAGE, 2 * PAGE).unwrap();
    dirty.harvest(&memory);
    dirty.insert_all();
    blocks.plug(2 * PAGE, 2 * PAGE).unwrap();
    memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();
    let zero = dirty.take_zero_pages(&memory);
    assert_eq!(runs(&zero), [(0, 3 * PAGE)]);
    assert_eq!(zero.unreadable_runs().count(), 0);
    // The set still has what it knew at the harvest.
    let unreadable: Vec<_> = dirty.unreadable_runs().collect();
    assert_eq!(unreadable, [(GuestAddress(0x3000), PAGE)]);
    assert_eq!(runs(&dirty), []);
    // The write is in the next harvest.
    dirty.clear();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), [(0x3000, PAGE)]);
}

#[test]
fn take_zero_pages_leaves_pages_that_cannot_be_read() {
    let (memory, blocks) = two_blocks();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    dirty.insert_all();
    // Unplugged after the harvest.
    blocks.unplug(2 * PAGE, 2 * PAGE).unwrap();
    let zero = dirty.take_zero_pages(&memory);
    assert_eq!(runs(&zero), [(0, 2 * PAGE)]);
    assert_eq!(runs(&dirty), [(0x2000, 2 * PAGE)]);
    // Another memory has none of the pages.
    let other = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(1 << 32), PAGE)]);
    assert_eq!(dirty.take_zero_pages(&other.unwrap()).total_pages(), 0);
    assert_eq!(runs(&dirty), [(0x2000, 2 * PAGE)]);
}
