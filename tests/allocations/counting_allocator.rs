//! The system's allocator, with a count of the allocations of each thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // `const` and without destructors, so that an access allocates nothing.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
    static NOT_ZEROED: Cell<usize> = const { Cell::new(0) };
}

/// The `#[global_allocator]` of this program.
pub(crate) struct Counting;

/// The allocations that a thread made during a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The number of allocations.
    pub(crate) allocations: usize,
    /// Bytes allocated minus bytes freed by this thread.
    pub(crate) bytes: isize,
    /// Allocated bytes that the allocator did not zero. The caller writes all of them.
    pub(crate) not_zeroed: usize,
}

/// Runs `work`. Returns the allocations that this thread made meanwhile, and the result.
pub(crate) fn taken_by<T>(work: impl FnOnce() -> T) -> (Taken, T) {
    let (allocations, bytes) = (ALLOCATIONS.get(), BYTES.get());
    let not_zeroed = NOT_ZEROED.get();
    let outcome = work();
    let taken = Taken {
        allocations: ALLOCATIONS.get() - allocations,
        bytes: BYTES.get() - bytes,
        not_zeroed: NOT_ZEROED.get() - not_zeroed,
    };
    (taken, outcome)
}

/// Returns the bytes allocated minus the bytes freed by this thread so far.
pub(crate) fn bytes_out() -> isize {
    BYTES.get()
}

impl Counting {
    fn count(layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size() as isize);
    }
}

// SAFETY: every method passes its arguments to `System` unchanged and returns its result. So the
// blocks are those of `System`: valid, of the layout, and aligned. Counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout);
        NOT_ZEROED.set(NOT_ZEROED.get() + layout.size());
        // SAFETY: `layout` has a size that is not 0 (contract of this method).
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(layout);
        // SAFETY: `layout` has a size that is not 0 (contract of this method).
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size() as isize);
        // SAFETY: `block` was allocated here with this layout (contract of this method). All blocks
        // that were allocated here come from `System`.
        unsafe { System.dealloc(block, layout) }
    }
}
