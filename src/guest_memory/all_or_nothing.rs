//! [`AllOrNothing`]: accesses that check the whole range before they move a byte.

use super::{
    bounded_slices, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions,
    Refusal, Result, TranslationHold,
};
use crate::bitmap::BS;
use crate::volatile_memory::VolatileSlice;

/// A view of guest memory whose accesses move all bytes of their range, or none.
///
/// [`GuestMemory::all_or_nothing`] creates it. An access by [`Bytes`](crate::Bytes) normally moves
/// the bytes before a hole. Through this view, it first checks that the whole range exists and
/// permits the access. If not, it returns the error of the first address that fails the check. The
/// [`vectored`](crate::vectored) functions whose names contain `exact` or `all` check the range in
/// the same way when called on this view.
///
/// An access within one region has no extra cost. A scattered range is walked twice.
///
/// # Limits
///
/// Some bytes may still be moved before an error if:
///
/// - a page has disappeared, because its file was truncated before or during the access (see
///   [`fault`](crate::fault));
/// - another thread changes a mapping of the IOMMU, or unplugs a block, during the access; or
/// - a stream ends or fails in the middle.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
/// let buf = [7; 0x1000];
/// assert!(memory.all_or_nothing().write_slice(&buf, GuestAddress(0x1800)).is_err());
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1800))?, 0);
/// memory.all_or_nothing().write_slice(&buf, GuestAddress(0x800))?;
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x17ff))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AllOrNothing<'m, M: ?Sized>(pub(super) &'m M);

impl<M: ?Sized> Clone for AllOrNothing<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: ?Sized> Copy for AllOrNothing<'_, M> {}

impl<M: GuestMemory + ?Sized> GuestMemory for AllOrNothing<'_, M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = M::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.0.check_range(addr, count, access)
    }

    /// Returns the slices if all of them exist, and otherwise the first error.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        // Drop the first iterator before creating the second: it may hold a lock.
        let mut left = count;
        bounded_slices(self.0, addr, count, access)?.try_for_each_slice(|slice| {
            left = left.saturating_sub(slice.len());
            Ok(())
        })?;
        // An implementation of `get_slices` may return fewer bytes than it should.
        if left != 0 {
            return Err(Error::InvalidBackendAddress);
        }
        self.0.get_slices(addr, count, access)
    }

    #[cold]
    fn explain(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Refusal> {
        self.0.explain(addr, count, access)
    }

    #[inline]
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.0.physical_memory()
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.0.hold_translation()
    }

    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        self.0.contiguous_slice(addr, count, access)
    }

    #[inline(always)]
    fn with_contiguous_slice<T, F>(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
        transfer: F,
    ) -> Result<Option<T>>
    where
        F: for<'s> FnOnce(&VolatileSlice<'s, BS<'s, Self::Bitmap>>) -> T,
    {
        self.0.with_contiguous_slice(addr, count, access, transfer)
    }
}
