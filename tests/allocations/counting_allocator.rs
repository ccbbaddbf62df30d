//! The system's allocator, and a count of what each thread takes from it. For programs whose tests are about that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Constants without destructors: reaching them allocates nothing.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

/// To be a program's `#[global_allocator]`.
pub(crate) struct Counting;

/// What this thread has taken so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// How often.
    pub(crate) allocations: usize,
    /// Bytes that were not given back. What another thread gives back is less here.
    pub(crate) bytes: isize,
}

/// What this thread takes while something is done, and what comes of it.
pub(crate) fn taken_by<T>(of: impl FnOnce() -> T) -> (Taken, T) {
    let (allocations, bytes) = (ALLOCATIONS.get(), BYTES.get());
    let outcome = of();
    let taken = Taken {
        allocations: ALLOCATIONS.get() - allocations,
        bytes: BYTES.get() - bytes,
    };
    (taken, outcome)
}

/// How many bytes this thread has out.
pub(crate) fn bytes_out() -> isize {
    BYTES.get()
}

impl Counting {
    fn count(layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size() as isize);
    }
}

// SAFETY: every method hands its arguments to the system's allocator unchanged and returns what that answers, so it keeps the contract as that does; counting
// allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout);
        // SAFETY: the caller of this keeps the contract of `alloc`, with the same layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(layout);
        // SAFETY: the caller of this keeps the contract of `alloc_zeroed`, with the same layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size() as isize);
        // SAFETY: `block` came from `System` by one of the methods above, with this layout: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(block, layout) }
    }
}
