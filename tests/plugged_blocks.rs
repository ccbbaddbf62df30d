//! An unplugged block of a region is a hole for every access.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, BS};
use vm_memory::guest_memory::{RefusalReason, Result};
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap,
    MemoryRegionAddress, Permissions, VolatileMemory, VolatileSlice,
};

const BLOCK: usize = 0x4000;
const START: u64 = 0x10_0000;

/// Creates one page of ordinary memory, followed by a region of four blocks.
fn memory() -> (GuestMemoryMmap<AtomicBitmap>, Arc<PluggedBlocks>) {
    let blocks =
        Arc::new(PluggedBlocks::new(4 * BLOCK, NonZeroUsize::new(BLOCK).unwrap()).unwrap());
    let mapping = MmapRegionBuilder::new(4 * BLOCK)
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let first = GuestRegionMmap::from_range(GuestAddress(START - 0x1000), 0x1000, None).unwrap();
    let second = GuestRegionMmap::new(mapping, GuestAddress(START)).unwrap();
    (
        GuestMemoryMmap::from_regions(vec![first, second]).unwrap(),
        blocks,
    )
}

fn reachable(memory: &GuestMemoryMmap<AtomicBitmap>, addr: u64, count: usize) -> bool {
    let range = GuestMemory::check_range(memory, GuestAddress(addr), count, Permissions::ReadWrite);
    assert_eq!(
        range,
        GuestMemoryBackend::check_range(memory, GuestAddress(addr), count)
    );
    range
}

#[test]
fn access_to_unplugged_block_fails_like_a_hole() {
    let (memory, blocks) = memory();
    let block = |n: u64| START + n * BLOCK as u64;
    blocks.plug(0, BLOCK).unwrap();
    blocks.plug(2 * BLOCK, 2 * BLOCK).unwrap();

    assert!(reachable(&memory, START - 8, 8 + BLOCK) && reachable(&memory, block(2), 2 * BLOCK));
    assert!(!reachable(&memory, START - 8, 9 + BLOCK) && !reachable(&memory, block(2) - 1, 1));

    // Accesses stop at the hole.
    let mut bytes = vec![7; BLOCK + 16];
    assert_eq!(
        memory.write(&bytes, GuestAddress(START - 8)).unwrap(),
        BLOCK + 8
    );
    assert!(matches!(
        memory.read_slice(&mut bytes, GuestAddress(START - 8)).unwrap_err(),
        GuestMemoryError::PartialBuffer { completed, .. } if completed == BLOCK + 8
    ));
    let refused = |error| matches!(error, GuestMemoryError::HostAddressNotAvailable);
    assert!(refused(
        memory.write_obj(1u64, GuestAddress(block(1))).unwrap_err()
    ));
    assert!(refused(
        memory
            .load::<u32>(GuestAddress(block(1)), Ordering::SeqCst)
            .unwrap_err()
    ));
    assert!(memory
        .get_slice(GuestAddress(block(2) - 1), 2)
        .is_err_and(refused));
    let slices: Vec<_> =
        GuestMemoryBackend::get_slices(&memory, GuestAddress(START - 8), 2 * BLOCK)
            .map(|slice| slice.map(|slice| slice.len()).map_err(|_| ()))
            .collect();
    assert_eq!(slices, [Ok(8), Ok(BLOCK), Err(())]);

    let mut zeroes = &[0u8; 2 * BLOCK][..];
    let moved = memory.read_volatile_from(GuestAddress(block(0)), &mut zeroes, 2 * BLOCK);
    assert_eq!(moved.unwrap(), BLOCK);
}

#[test]
fn region_access_ends_at_unplugged_block() {
    let (memory, blocks) = memory();
    let region = memory.find_region(GuestAddress(START)).unwrap();
    let at = |offset: usize| MemoryRegionAddress(offset as u64);
    assert!(region.as_volatile_slice().is_err() && region.get_mmap().get_slice(0, 1).is_err());
    assert!(matches!(
        region.write_obj(1u8, at(0)).unwrap_err(),
        GuestMemoryError::HostAddressNotAvailable
    ));
    blocks.plug(BLOCK, BLOCK).unwrap();
    region.write_obj(0x55u8, at(2 * BLOCK - 1)).unwrap();
    assert_eq!(
        region.get_mmap().get_slice(BLOCK, BLOCK).unwrap().len(),
        BLOCK
    );
    let mut seen = [0; 4];
    assert_eq!(region.read(&mut seen, at(2 * BLOCK - 1)).unwrap(), 1);
    assert_eq!(seen, [0x55, 0, 0, 0]);
    assert!(matches!(
        region.read_slice(&mut seen, at(2 * BLOCK - 1)).unwrap_err(),
        GuestMemoryError::PartialBuffer {
            expected: 4,
            completed: 1
        }
    ));
    assert!(region.bitmap().dirty_at(2 * BLOCK - 1) && !region.bitmap().dirty_at(0));
    for (offset, count) in [(4 * BLOCK, 1), (usize::MAX, 1), (3 * BLOCK, usize::MAX)] {
        assert!(matches!(
            region.get_slice(at(offset), count).unwrap_err(),
            GuestMemoryError::InvalidBackendAddress
        ));
        assert!(region.read(&mut seen, at(offset)).is_err());
    }
    blocks.plug(0, 4 * BLOCK).unwrap();
    assert_eq!(region.as_volatile_slice().unwrap().len(), 4 * BLOCK);
}

#[test]
fn access_that_begins_after_unplug_fails() {
    let (memory, blocks) = memory();
    let gone = AtomicBool::new(false);
    for _ in 0..2_000 {
        blocks.plug(BLOCK, BLOCK).unwrap();
        gone.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !gone.load(Ordering::Acquire) {
                    // Both results are correct until `gone` is set.
                    let _ = memory.write_obj(1u64, GuestAddress(START + BLOCK as u64));
                }
                assert!(memory
                    .write_obj(1u64, GuestAddress(START + BLOCK as u64))
                    .is_err());
            });
            blocks.unplug(BLOCK, BLOCK).unwrap();
            gone.store(true, Ordering::Release);
        });
    }
}

#[derive(Debug)]
struct Kept(Arc<AtomicBool>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn owner_lives_as_long_as_region_and_is_found_by_type() {
    let dropped = Arc::new(AtomicBool::new(false));
    let region = MmapRegionBuilder::<()>::new(0x1000)
        .with_owner(Arc::new(Kept(Arc::clone(&dropped))))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    assert!(region.owner::<String>().is_none());
    assert!(Arc::ptr_eq(&region.owner::<Kept>().unwrap().0, &dropped));
    let mapping = region.get_mmap();
    drop(region);
    assert!(!dropped.load(Ordering::Relaxed));
    drop(mapping);
    assert!(dropped.load(Ordering::Relaxed));
}

#[test]
fn as_volatile_slice_with_unplugged_block_is_empty() {
    let (memory, blocks) = memory();
    let region = memory.find_region(GuestAddress(START)).unwrap();
    blocks.plug(0, 4 * BLOCK).unwrap();
    assert_eq!(region.get_mmap().as_volatile_slice().len(), 4 * BLOCK);
    blocks.unplug(BLOCK, BLOCK).unwrap();
    assert_eq!(region.get_mmap().as_volatile_slice().len(), 0);
    assert!(GuestMemoryRegion::as_volatile_slice(region).is_err());
}

/// A region whose second block another thread plugs or unplugs after each query.
struct Flickering {
    region: GuestRegionMmap<AtomicBitmap>,
    blocks: Arc<PluggedBlocks>,
}

impl Flickering {
    fn change(&self) {
        let change = if self.blocks.is_plugged(BLOCK, BLOCK) {
            PluggedBlocks::unplug
        } else {
            PluggedBlocks::plug
        };
        change(&self.blocks, BLOCK, BLOCK).unwrap();
    }
}

impl GuestMemoryRegion for Flickering {
    type B = AtomicBitmap;

    fn len(&self) -> u64 {
        GuestMemoryRegion::len(&self.region)
    }
    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }
    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        GuestMemoryRegion::bitmap(&self.region)
    }
    fn get_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        let slice = GuestMemoryRegion::get_slice(&self.region, addr, count);
        self.change();
        slice
    }
    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        let reachable = self.region.reachable_bytes(addr, count);
        self.change();
        reachable
    }
    fn reachable_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        let slice = self.region.reachable_slice(addr, count);
        self.change();
        slice
    }
    fn is_fully_reachable(&self) -> bool {
        let is_fully_reachable = self.region.is_fully_reachable();
        self.change();
        is_fully_reachable
    }
}

impl GuestMemoryRegionBytes for Flickering {}

/// Other threads may change a later block at any time. The bytes before it stay accessible.
#[test]
fn access_moves_bytes_before_a_block_that_changes_meanwhile() {
    for (others, plugged_first) in [(false, false), (false, true), (true, false), (true, true)] {
        let size = NonZeroUsize::new(BLOCK).unwrap();
        let blocks = Arc::new(PluggedBlocks::new(3 * BLOCK, size).unwrap());
        blocks.plug(0, BLOCK).unwrap();
        if others {
            blocks.plug(2 * BLOCK, BLOCK).unwrap();
        }
        let mapping = MmapRegionBuilder::new(3 * BLOCK)
            .with_plugged_blocks(Arc::clone(&blocks))
            .build()
            .unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        let flickering = Flickering { region, blocks };
        if plugged_first {
            flickering.change();
        }
        let memory = GuestRegionCollection::from_regions(vec![flickering]).unwrap();
        let region = memory.iter().next().unwrap();

        let (addr, count) = (GuestAddress(16), BLOCK);
        let (before, mut buf) = (BLOCK - 16, vec![1; BLOCK]);
        let moved = |result: Result<usize>| {
            let moved = result.unwrap();
            assert!(moved == before || moved == count, "{moved:#x}");
        };
        // An odd number of queries begins the next access in the other state.
        for _ in 0..4 {
            moved(memory.write(&buf, addr));
            moved(memory.read(&mut buf, addr));
            moved(memory.write_volatile_to(addr, &mut Vec::new(), count));
            moved(region.write(&buf, MemoryRegionAddress(16)));
            moved(region.read(&mut buf, MemoryRegionAddress(16)));
            let refusal = memory.explain(addr, count, Permissions::Read);
            if let Some(refusal) = refusal {
                assert_eq!(
                    (refusal.offset, refusal.reason),
                    (before, RefusalReason::Unplugged)
                );
            }
            region.change();
        }
    }
}
