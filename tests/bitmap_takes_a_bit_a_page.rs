//! What a bitmap for 1 TiB takes of the heap. A program of its own, since it counts every allocation.
#![cfg(feature = "backend-bitmap")]
#![expect(unsafe_code, reason = "GlobalAlloc is an unsafe trait")]
#![expect(
    clippy::arithmetic_side_effects,
    reason = "a test that goes wrong may panic, and says what it does in fewer words"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};

/// The system's, and a count of the bytes that are out.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every method hands its arguments to the system's allocator unchanged and returns what that answers, so it keeps the contract as that does; the
// count is a number that nothing else depends on, and counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller of this keeps the contract of `alloc`, with the same layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller of this keeps the contract of `alloc_zeroed`, with the same layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `memory` came from `System` by one of the methods above, with this layout: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The bytes that are out after `make` made something, beyond those that were before.
fn taken_by<T>(make: impl FnOnce() -> T) -> (usize, T) {
    let before = BYTES.load(Ordering::Relaxed);
    let made = make();
    (BYTES.load(Ordering::Relaxed) - before, made)
}

#[test]
fn a_bitmap_of_a_tebibyte_takes_32_mebibytes_and_a_hundredth() {
    const PAGES: usize = 1 << 28;
    let page_size = NonZeroUsize::new(4096).unwrap();
    let most = (32 << 20) + (32 << 20) / 100;
    let within = 32 << 20..=most;

    let (bytes, bitmap) = taken_by(|| AtomicBitmap::new(PAGES * 4096, page_size));
    assert_eq!(bitmap.len(), PAGES);
    assert!(within.contains(&bytes), "{bytes} bytes");

    let (bytes, mut dirty) = taken_by(|| DirtyPages::new(PAGES * 4096, page_size));
    assert!(within.contains(&bytes), "{bytes} bytes");

    // Marking and harvesting take nothing.
    let (bytes, ()) = taken_by(|| {
        bitmap.mark_dirty(12345 * 4096, 1 << 30);
        bitmap.harvest_into(&mut dirty);
        bitmap.put_back(&dirty);
        assert_eq!(dirty.total_pages(), 1 << 18);
        dirty.clear();
    });
    assert_eq!(bytes, 0);
}
