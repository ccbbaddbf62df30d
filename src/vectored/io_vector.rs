//! [`IoVector`]: the address and the length of a segment, as the kernel takes them.

use core::fmt;
use core::slice;

use crate::bitmap::BitmapSlice;
use crate::volatile_memory::VolatileSlice;

/// The host address and the length in bytes of one segment of guest memory.
///
/// It is an `iovec` that may be moved to another thread.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct IoVector(libc::iovec);

// SAFETY: an `IoVector` is a pointer and a length, which no method dereferences. Moving these two
// numbers to another thread accesses no memory.
unsafe impl Send for IoVector {}
// SAFETY: a shared `IoVector` has no interior mutability: threads can only copy the two numbers.
unsafe impl Sync for IoVector {}

impl IoVector {
    pub(super) fn new<S: BitmapSlice>(slice: &VolatileSlice<'_, S>) -> Self {
        IoVector(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    /// Returns the vectors as the kernel takes them.
    #[inline]
    #[expect(clippy::disallowed_methods, reason = "the array is not guest memory")]
    pub(super) fn as_iovecs(vectors: &[Self]) -> &[libc::iovec] {
        // SAFETY: an `IoVector` is a transparent wrapper of `iovec`, so this is an array of as many
        // initialised `iovec`s. `vectors` is borrowed for as long as the result.
        unsafe { slice::from_raw_parts(vectors.as_ptr().cast(), vectors.len()) }
    }
}

impl fmt::Debug for IoVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+0x{:x}", self.0.iov_base, self.0.iov_len)
    }
}
