//! [`IommuMemorySliceIterator`]: the slices of a translated range.

use std::fmt::{self, Debug};
use std::iter::FusedIterator;

use super::marking::bitmap_at;
use super::{ByIova, Error, Iommu, IotlbIterator, IovaRange, Marking};
use crate::bitmap::BS;
use crate::convert::to_u64;
use crate::guest_memory::{
    Error as GuestMemoryError, GuestAddress, GuestMemoryBackend, GuestMemoryBackendSliceIterator,
    GuestMemorySliceIterator, Permissions, Result,
};
use crate::volatile_memory::VolatileSlice;

/// An iterator over the slices of a range of an [`IommuMemory`](super::IommuMemory).
///
/// [`get_slices`](crate::GuestMemory::get_slices) creates it. It holds the IOTLB that the range was
/// translated with: see [`IotlbIterator`].
pub struct IommuMemorySliceIterator<
    'a,
    M: GuestMemoryBackend,
    I: Iommu + 'a,
    K: Marking<M> + 'a = ByIova,
> {
    backend: &'a M,
    /// The bitmap by I/O virtual address.
    bitmap: &'a K::IovaBitmap,
    /// The address of the next slice.
    addr: GuestAddress,
    /// The number of bytes that are left; 0 after an error.
    left: usize,
    access: Permissions,
    /// The translated ranges that are left; `None` while the IOMMU is off.
    segments: Option<IotlbIterator<I::IotlbGuard<'a>>>,
    /// The slices that are left of the current segment.
    physical: Option<GuestMemoryBackendSliceIterator<'a, M>>,
}

impl<'a, M: GuestMemoryBackend, I: Iommu, K: Marking<M>> IommuMemorySliceIterator<'a, M, I, K> {
    /// Creates an iterator over a range that was translated to `segments`.
    ///
    /// Without segments, the IOMMU is off, and the addresses of the range are guest physical
    /// addresses.
    pub(super) fn new(
        backend: &'a M,
        bitmap: &'a K::IovaBitmap,
        segments: Option<IotlbIterator<I::IotlbGuard<'a>>>,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Self {
        let physical = match segments {
            Some(_) => None,
            None => Some(GuestMemoryBackendSliceIterator::new(
                backend, addr, count, access,
            )),
        };
        Self {
            backend,
            bitmap,
            addr,
            left: count,
            access,
            segments,
            physical,
        }
    }

    /// Returns the next slice. There are bytes left.
    fn advance(&mut self) -> Result<VolatileSlice<'a, BS<'a, K::SliceBitmap>>> {
        loop {
            if let Some(slice) = self.physical.as_mut().and_then(Iterator::next) {
                let (slice, addr) = (slice?, self.addr);
                let len = to_u64(slice.len());
                // Wraps only after the last slice of a range that ends at 2^64.
                self.addr = GuestAddress(addr.0.wrapping_add(len));
                self.left = self.left.saturating_sub(slice.len());
                let by_iova = match self.segments {
                    Some(_) => Some(bitmap_at(self.bitmap, addr)),
                    None => None,
                };
                return Ok(K::with_marks(slice, by_iova));
            }
            // The IOMMU of another crate may translate less than requested.
            let Some(segment) = self.segments.as_mut().and_then(Iterator::next) else {
                return Err(GuestMemoryError::IommuError(Error::CannotResolve {
                    iova_range: IovaRange {
                        base: self.addr,
                        length: self.left,
                    },
                    reason: "the translation ended early".into(),
                }));
            };
            self.physical = Some(GuestMemoryBackendSliceIterator::new(
                self.backend,
                segment.base,
                segment.length.min(self.left),
                self.access,
            ));
        }
    }
}

impl<'a, M: GuestMemoryBackend, I: Iommu, K: Marking<M>> Iterator
    for IommuMemorySliceIterator<'a, M, I, K>
{
    type Item = Result<VolatileSlice<'a, BS<'a, K::SliceBitmap>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let slice = self.advance();
        if slice.is_err() {
            self.left = 0;
        }
        Some(slice)
    }
}

impl<M: GuestMemoryBackend, I: Iommu, K: Marking<M>> FusedIterator
    for IommuMemorySliceIterator<'_, M, I, K>
{
}

impl<'a, M: GuestMemoryBackend, I: Iommu, K: Marking<M>>
    GuestMemorySliceIterator<'a, BS<'a, K::SliceBitmap>> for IommuMemorySliceIterator<'a, M, I, K>
{
    #[inline(always)]
    fn is_bounded_by_range(&self) -> bool {
        true
    }
}

impl<'a, M: GuestMemoryBackend + Debug, I: Iommu, K: Marking<M>> Debug
    for IommuMemorySliceIterator<'a, M, I, K>
where
    I::IotlbGuard<'a>: Debug,
    K::IovaBitmap: Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuMemorySliceIterator")
            .field("addr", &self.addr)
            .field("left", &self.left)
            .field("access", &self.access)
            .field("segments", &self.segments)
            .field("physical", &self.physical)
            .field("bitmap", &self.bitmap)
            .finish_non_exhaustive()
    }
}
