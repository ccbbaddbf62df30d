//! `DirtyMemory::try_reserve` returns an error if the pages of a region cannot be allocated, and
//! loses no page. The allocator of this program fails on request, so it is a separate program.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]
#![expect(unsafe_code, reason = "implements an allocator that fails")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// An allocation of the pages of a region is at least this large. No other one of a harvest is.
const LARGE: usize = 0x1000;

thread_local! {
    /// The number of large allocations of zeroes that this thread can still make.
    static LARGE_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

struct Limited;

#[global_allocator]
static ALLOCATOR: Limited = Limited;

fn is_refused(layout: Layout) -> bool {
    layout.size() >= LARGE && LARGE_LEFT.get() == Some(0)
}

// SAFETY: each method passes its arguments to the system's allocator, or returns null, which means
// that there is no memory.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_refused(layout) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller guarantees that the size is not 0.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_refused(layout) {
            return std::ptr::null_mut();
        }
        if layout.size() >= LARGE {
            LARGE_LEFT.set(LARGE_LEFT.get().map(|left| left - 1));
        }
        // SAFETY: the caller guarantees that the size is not 0.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller guarantees that `block` has this layout, and comes from this
        // allocator, which means from the system's.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Runs `act` with memory for this number of large allocations.
fn with_memory_for<T>(count: usize, act: impl FnOnce() -> T) -> T {
    LARGE_LEFT.set(Some(count));
    let result = act();
    LARGE_LEFT.set(None);
    result
}

type Memory = GuestMemoryMmap<AtomicBitmap>;

const SIZE: u64 = 1 << 30;
const PAGE: u64 = 0x1000;

/// Two regions of one mapping, whose bitmap they share, and a region of its own.
fn memory() -> Memory {
    let mapping = Arc::new(MmapRegion::new(SIZE as usize).unwrap());
    let shared = [0, SIZE]
        .map(|start| GuestRegionMmap::with_arc(Arc::clone(&mapping), GuestAddress(start)).unwrap());
    let own = GuestRegionMmap::from_range(GuestAddress(2 * SIZE), SIZE as usize, None).unwrap();
    Memory::from_regions(shared.into_iter().chain([own]).collect()).unwrap()
}

fn runs(dirty: &DirtyMemory) -> Vec<(u64, usize)> {
    dirty.runs().map(|(start, len)| (start.0, len)).collect()
}

#[test]
fn try_reserve_without_memory_returns_error_and_loses_no_page() {
    // The pages of three regions, and those that two of them share.
    const ALLOCATIONS: usize = 4;
    for count in 0..=ALLOCATIONS {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress(PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress(2 * SIZE)).unwrap();
        let all = [PAGE, SIZE + PAGE, 2 * SIZE].map(|start| (start, PAGE as usize));
        let mut dirty = DirtyMemory::new();
        let reserved = with_memory_for(count, || dirty.try_reserve(&memory));
        assert_eq!(reserved.is_ok(), count == ALLOCATIONS, "{count}");
        assert_eq!(runs(&dirty), []);
        // The harvest allocates what is not reserved.
        let left = if reserved.is_ok() { 0 } else { ALLOCATIONS };
        with_memory_for(left, || dirty.harvest(&memory));
        assert_eq!(runs(&dirty), all, "{count}");
    }
}

#[test]
fn try_reserve_without_memory_after_change_keeps_pages_of_set() {
    for count in 0..2 {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress(PAGE)).unwrap();
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        let before = runs(&dirty);
        assert_eq!(before.len(), 2);
        let added = GuestRegionMmap::from_range(GuestAddress(3 * SIZE), SIZE as usize, None);
        let memory = memory.insert_region(Arc::new(added.unwrap())).unwrap();
        memory.write_obj(1u8, GuestAddress(3 * SIZE)).unwrap();
        // The pages of the new region, and those that two regions share.
        let reserved = with_memory_for(count, || dirty.try_reserve(&memory));
        assert!(reserved.is_err());
        assert_eq!(runs(&dirty), before, "{count}");
        dirty.harvest(&memory);
        let after = [before, vec![(3 * SIZE, PAGE as usize)]].concat();
        assert_eq!(runs(&dirty), after, "{count}");
    }
}
