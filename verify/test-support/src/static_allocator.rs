//! [`StaticAllocator`]: an allocator without system calls.

#![expect(unsafe_code, reason = "implements an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The number of bytes of static memory.
const LEN: usize = 64 << 20;

/// An allocator that hands out static memory once, and makes no system calls.
///
/// With it as `#[global_allocator]`, [`record_calls`](crate::record_calls) records only the calls
/// of the function itself. After 64 MiB it uses the system's allocator: the backtrace of a
/// failed test needs more.
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

// SAFETY: `alloc` returns disjoint parts of static memory, aligned and as long as the layout
// requires, or memory of `System`, which `dealloc` returns to it.
unsafe impl GlobalAlloc for StaticAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Includes room for the alignment.
        let len = layout.size().saturating_add(layout.align());
        // Relaxed: the number protects no other memory. Not added if it does not fit, so that it
        // never wraps, and no byte is handed out twice.
        let end = |used: usize| used.checked_add(len).filter(|end| *end <= LEN);
        let used = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, end);
        let Ok(used) = used else {
            // SAFETY: the size of `layout` is not 0 (contract of `GlobalAlloc::alloc`).
            return unsafe { System.alloc(layout) };
        };
        let start = self.memory.get().cast::<u8>().wrapping_add(used);
        start.wrapping_add(start.align_offset(layout.align()))
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let start = self.memory.get().addr();
        if !(start..start + LEN).contains(&at.addr()) {
            // SAFETY: `alloc` returned `at` for `layout` (contract of `GlobalAlloc::dealloc`). It
            // is outside the static memory, so it is from `System`.
            unsafe { System.dealloc(at, layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alloc_of_sizes_that_wrap_hands_out_no_byte_twice() {
        static ALLOCATOR: StaticAllocator = StaticAllocator::new();
        let small = Layout::from_size_align(64, 1).unwrap();
        // Two of them are 32 bytes less than the address space.
        let huge = Layout::from_size_align(isize::MAX as usize - 16, 1).unwrap();
        // SAFETY: the layouts have bytes.
        let [first, refused, refused_again, second] =
            [small, huge, huge, small].map(|layout| unsafe { ALLOCATOR.alloc(layout) });
        assert!(refused.is_null() && refused_again.is_null());
        assert!(first.addr() + 64 <= second.addr());
    }
}
