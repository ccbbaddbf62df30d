//! [`StaticAllocator`]: an allocator without system calls.

#![expect(unsafe_code, reason = "implements an allocator")]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of bytes that it hands out.
const LEN: usize = 64 << 20;

/// An allocator that hands out static memory once, and makes no system calls.
///
/// With it as `#[global_allocator]`, [`record_calls`](crate::record_calls) records only the calls
/// of the function itself.
#[derive(Debug)]
pub struct StaticAllocator {
    memory: UnsafeCell<[u8; LEN]>,
    /// The number of bytes that were handed out.
    used: AtomicUsize,
}

// SAFETY: the bytes are reached only through `alloc`, which hands out each of them once.
unsafe impl Sync for StaticAllocator {}

impl StaticAllocator {
    /// Creates the allocator.
    #[expect(clippy::new_without_default, reason = "its place is a static")]
    pub const fn new() -> Self {
        Self {
            memory: UnsafeCell::new([0; LEN]),
            used: AtomicUsize::new(0),
        }
    }
}

// SAFETY: `alloc` returns disjoint parts of static memory, aligned and as long as the layout asks.
unsafe impl GlobalAlloc for StaticAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Room to align it.
        let len = layout.size().saturating_add(layout.align());
        let used = self.used.fetch_add(len, Ordering::Relaxed);
        if used.checked_add(len).is_none_or(|end| end > LEN) {
            return null_mut();
        }
        let start = self.memory.get().cast::<u8>().wrapping_add(used);
        start.wrapping_add(start.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}
