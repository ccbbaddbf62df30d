//! [`IoVectors`]: a range as raw vectors, while the memory is borrowed.

use core::fmt::{self, Debug};

use super::segments::{too_many, Segments};
use super::MAX_VECTORS;
use crate::bitmap::{BitmapSlice, BS};
use crate::guest_memory::{
    bounded_slices, not_created_for, Error, GuestAddress, GuestMemory, Permissions, Result,
};

/// A range of guest memory as raw vectors, for as long as the memory is borrowed.
///
/// [`io_vectors`] returns it, and has an example. `H` keeps the translation of the range in use:
/// behind an IOMMU, an invalidation of the range does not complete before this value is dropped.
///
/// # Dirty tracking
///
/// If the range is for writing, and [`vectors`](Self::vectors) was called, dropping this value
/// marks all its pages. So an early return or a panic loses no page. Keep it until the kernel no
/// longer writes. [`cancel`](Self::cancel) is for a range that nobody wrote to.
#[doc(alias = "iovec")]
#[must_use = "its memory is mapped and translated only until it is dropped"]
pub struct IoVectors<'a, S: BitmapSlice, H> {
    segments: Segments<'a, S>,
    /// Declared after the segments, so that it is dropped after them.
    _held: H,
}

/// Returns the `count` bytes at `addr` as raw vectors, for an access of the kind `access`.
///
/// It serves system calls for which this module has no function. There are at most
/// [`MAX_VECTORS`] vectors, as many as one call accepts.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::vectored::io_vectors;
/// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])?;
/// let range = io_vectors(&memory, GuestAddress(0xf00), 0x180, Permissions::Read)?;
/// let lengths: Vec<usize> = range.vectors().iter().map(|vector| vector.iov_len).collect();
/// assert_eq!(lengths, [0x100, 0x80]);
/// assert!(io_vectors(&memory, GuestAddress(0x1f00), 0x180, Permissions::Read).is_err());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// - The error of [`GuestMemory::get_slices`] if a byte of the range is not in guest memory, not
///   mapped by the IOMMU, or not accessible.
/// - [`Error::IOError`] of the kind `PermissionDenied` if `access` is [`Permissions::No`].
/// - [`Error::IOError`] of the kind `InvalidInput` if the range has more than [`MAX_VECTORS`]
///   segments, or `OutOfMemory` if an allocation fails.
/// - [`Error::IOError`] with the error of the system if a page of a Xen guest cannot be mapped. A
///   page that is not granted is `EINVAL`.
#[doc(alias = "iovec")]
#[doc(alias = "readv")]
#[doc(alias = "writev")]
pub fn io_vectors<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
) -> Result<IoVectors<'a, BS<'a, M::Bitmap>, impl Sized + 'a>> {
    if access == Permissions::No {
        return Err(not_created_for("range", access, access));
    }
    let mut slices = bounded_slices(memory, addr, count, access)?;
    let mut segments = Segments::new(access);
    if !segments.gather(&mut slices, MAX_VECTORS)? {
        return Err(too_many(addr, count, MAX_VECTORS));
    }
    // An implementation of `get_slices` may return fewer bytes than it should.
    if segments.len() != count {
        return Err(Error::InvalidBackendAddress);
    }
    Ok(IoVectors {
        segments,
        _held: slices,
    })
}

impl<S: BitmapSlice, H> IoVectors<'_, S, H> {
    /// Returns the vectors, in the order of the guest addresses.
    ///
    /// Their memory stays mapped while `self` lives. It may change at any time, so no Rust
    /// reference to it may be made.
    pub fn vectors(&self) -> &[libc::iovec] {
        self.segments.lend()
    }

    /// Returns the number of bytes in the range.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Returns whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Marks the `count` bytes at `offset` as dirty, limited to the range.
    ///
    /// Call it after the bytes have been written. Dropping the range marks all bytes again.
    pub fn mark_dirty(&self, offset: usize, count: usize) {
        self.segments.mark_dirty(offset, count);
    }

    /// Drops the range without marking it.
    ///
    /// Call it if nobody wrote to the range, or if [`mark_dirty`](Self::mark_dirty) has marked all
    /// bytes that were written.
    pub fn cancel(mut self) {
        self.segments.end_loan();
    }
}

impl<S: BitmapSlice, H> Debug for IoVectors<'_, S, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoVectors")
            .field("vectors", &self.segments.vectors())
            .field("access", &self.segments.access())
            .finish_non_exhaustive()
    }
}
