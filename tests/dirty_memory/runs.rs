//! `DirtyMemory` divides the dirty bytes into runs that can be read as a whole, and into unreadable
//! runs.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::dirty::DirtyMemory;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, Permissions,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Creates a region of `len` bytes whose dirty pages have `page` bytes, with plugged blocks.
fn region(start: u64, len: usize, page: usize, block: usize) -> Region {
    let size = |bytes| NonZeroUsize::new(bytes).unwrap();
    let blocks = Arc::new(PluggedBlocks::new(len, size(block)).unwrap());
    blocks.plug(0, len).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::new(len, size(page)))
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap();
    (region, blocks)
}

type Region = (GuestRegionMmap<AtomicBitmap>, Arc<PluggedBlocks>);

fn memory(region: GuestRegionMmap<AtomicBitmap>) -> Memory {
    Memory::from_regions(vec![region]).unwrap()
}

fn harvested(memory: &Memory) -> DirtyMemory {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(memory);
    dirty
}

/// Reads each run of `dirty`, and returns the runs.
fn read_runs(dirty: &DirtyMemory, memory: &Memory) -> Vec<(u64, usize)> {
    let mut runs = Vec::new();
    for (start, len) in dirty.runs() {
        let read = memory.read_slice(&mut vec![0; len], start);
        read.unwrap_or_else(|error| panic!("{start:?}, {len:#x} bytes: {error}"));
        runs.push((start.0, len));
    }
    runs
}

fn unreadable(dirty: &DirtyMemory) -> Vec<(u64, usize)> {
    dirty
        .unreadable_runs()
        .map(|(start, len)| (start.0, len))
        .collect()
}

#[test]
fn runs_around_unplugged_blocks_are_readable() {
    let (region, blocks) = region(0x10_0000, 0x10_000, 0x1000, 0x4000);
    let memory = memory(region);
    memory
        .write_slice(&[1; 0xe000], GuestAddress(0x10_1000))
        .unwrap();
    blocks.unplug(0x4000, 0x4000).unwrap();
    let mut dirty = harvested(&memory);
    let around = [(0x10_1000, 0x3000), (0x10_8000, 0x7000)];
    assert_eq!(read_runs(&dirty, &memory), around);
    assert_eq!(unreadable(&dirty), [(0x10_4000, 0x4000)]);
    assert_eq!((dirty.total_bytes(), dirty.total_pages()), (0xa000, 14));

    // The pages stay in the set. Plugged again, they can be read.
    blocks.plug(0x4000, 0x4000).unwrap();
    dirty.harvest(&memory);
    assert_eq!(read_runs(&dirty, &memory), [(0x10_1000, 0xe000)]);
    assert_eq!(unreadable(&dirty), []);

    // Both kinds are put back.
    blocks.unplug(0, 0x10_000).unwrap();
    dirty.harvest(&memory);
    assert_eq!(read_runs(&dirty, &memory), []);
    dirty.put_back(&memory);
    assert_eq!(unreadable(&harvested(&memory)), [(0x10_1000, 0xe000)]);
}

#[test]
fn runs_of_pages_larger_than_blocks_end_inside_the_page() {
    let (region, blocks) = region(0, 0x9000, 0x8000, 0x1000);
    let memory = memory(region);
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    blocks.unplug(0x3000, 0x2000).unwrap();
    let dirty = harvested(&memory);
    let around = [(0, 0x3000), (0x5000, 0x3000)];
    assert_eq!(read_runs(&dirty, &memory), around);
    assert_eq!(unreadable(&dirty), [(0x3000, 0x2000)]);
}

#[test]
fn runs_after_region_is_replaced_are_readable_in_the_new_memory() {
    let (old, _) = region(0x1000, 0x8000, 0x1000, 0x1000);
    let old = memory(old);
    old.write_slice(&[1; 0x8000], GuestAddress(0x1000)).unwrap();
    let mut dirty = harvested(&old);
    let (new, blocks) = region(0x1000, 0x8000, 0x1000, 0x2000);
    blocks.unplug(0x2000, 0x2000).unwrap();
    let new = memory(new);
    dirty.harvest(&new);
    let around = [(0x1000, 0x2000), (0x5000, 0x4000)];
    assert_eq!(read_runs(&dirty, &new), around);
    assert_eq!(unreadable(&dirty), [(0x3000, 0x2000)]);
}

#[test]
fn runs_of_region_that_cannot_be_read_are_unreadable() {
    let mapping = MmapRegionBuilder::<AtomicBitmap>::new(0x2000)
        .with_permissions(Permissions::No)
        .build()
        .unwrap();
    let hidden = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    hidden.bitmap().mark_dirty(0, 0x2000);
    // The next region is adjacent, and ends inside a page.
    let next = GuestRegionMmap::from_range(GuestAddress(0x2000), 0x1800, None).unwrap();
    let memory = Memory::from_regions(vec![hidden, next]).unwrap();
    let tail = [1; 0x1800];
    memory.write_slice(&tail, GuestAddress(0x2000)).unwrap();
    let dirty = harvested(&memory);
    assert_eq!(read_runs(&dirty, &memory), [(0x2000, 0x1800)]);
    assert_eq!(unreadable(&dirty), [(0, 0x2000)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn runs_and_unreadable_runs_are_the_dirty_bytes(
        len in 1usize..0x400,
        (page, block) in (0usize..8, 0usize..8),
        marked in prop::collection::vec((0usize..0x400, 1usize..0x80), 0..8),
        unplugged in prop::collection::vec(0usize..0x400, 0..40),
    ) {
        // The units are 64 bytes, and the end is inside a unit.
        let len = len * 64 + 5;
        let (region, blocks) = region(0x8000, len, 64 << page, 64 << block);
        let block = 64 << block;
        for number in unplugged {
            let start = number * 64 / block * block;
            let _ = blocks.unplug(start, block.min(len.saturating_sub(start)));
        }
        for (at, count) in marked {
            region.bitmap().mark_dirty(at * 64, count * 64);
        }
        let is_dirty = |byte: &usize| region.bitmap().dirty_at(*byte);
        let (open, closed): (BTreeSet<usize>, BTreeSet<usize>) =
            (0..len).filter(is_dirty).partition(|byte| blocks.is_plugged(*byte, 1));
        let memory = memory(region);
        let dirty = harvested(&memory);
        let bytes = |runs: Vec<(u64, usize)>| -> BTreeSet<usize> {
            let offsets = runs.into_iter().map(|(start, len)| (start as usize - 0x8000, len));
            offsets.flat_map(|(start, len)| start..start + len).collect()
        };
        prop_assert_eq!(bytes(read_runs(&dirty, &memory)), open);
        prop_assert_eq!(bytes(unreadable(&dirty)), closed);
    }
}
