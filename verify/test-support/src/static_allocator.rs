//! [`StaticAllocator`]: an allocator without system calls.

#![expect(unsafe_code, reason = "implements an allocator")]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

const LEN: usize = 64 << 20;

/// An allocator that hands out 64 MiB of static memory, each byte once. It makes no system calls,
/// so [`record_calls`](crate::record_calls) records those of the tested function only.
pub struct StaticAllocator {
    memory: UnsafeCell<[u8; LEN]>,
    next: AtomicUsize,
}

impl StaticAllocator {
    /// Creates it.
    #[expect(
        clippy::new_without_default,
        reason = "a static variable needs a constant function"
    )]
    pub const fn new() -> Self {
        Self {
            memory: UnsafeCell::new([0; LEN]),
            next: AtomicUsize::new(0),
        }
    }
}

// SAFETY: the bytes are reached only through `alloc`, which hands out each of them once.
unsafe impl Sync for StaticAllocator {}

// SAFETY: `alloc` returns disjoint parts of static memory, aligned and as long as the layout asks.
unsafe impl GlobalAlloc for StaticAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start: *mut u8 = self.memory.get().cast();
        let len = layout.size() + layout.align();
        let at = start.wrapping_add(self.next.fetch_add(len, Ordering::Relaxed));
        let padding = at.align_offset(layout.align());
        let end = at.wrapping_add(len).addr() - start.addr();
        match end <= LEN {
            true => at.wrapping_add(padding),
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}
