//! [`IoVector`]: the address and the length of a segment, as the kernel takes them.

use core::fmt;

use crate::bitmap::BitmapSlice;
use crate::volatile_memory::VolatileSlice;

/// The host address and the length in bytes of one segment of guest memory.
///
/// It has the layout of `struct iovec` (readv(2), `libc::iovec`). A pointer to an array of
/// `IoVector`s can therefore be passed as a pointer to an array of `iovec`s. The source of a vector
/// documents how long its memory stays mapped; see [`IoBuffer::vectors`](super::IoBuffer::vectors)
/// and [`IoVectors::vectors`](super::IoVectors::vectors).
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::vectored::{io_vectors, IoVector};
/// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
///
/// assert_eq!(size_of::<IoVector>(), size_of::<libc::iovec>());
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let range = io_vectors(&memory, GuestAddress(0x10), 0x20, Permissions::Read)?;
/// let vector = range.vectors()[0];
/// assert!(!vector.base().is_null());
/// assert_eq!(vector.len(), 0x20);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "iovec")]
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVector(libc::iovec);

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

    /// Returns the host address of the first byte.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Returns whether the segment has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

impl fmt::Debug for IoVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+0x{:x}", self.base(), self.len())
    }
}
