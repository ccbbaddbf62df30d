//! [`Marking`]: the bitmaps in which an [`IommuMemory`] marks writes.

use core::marker::PhantomData;

use super::{Error, Iommu, IommuMemory};
use crate::bitmap::{Bitmap, BS, MS};
use crate::convert::to_usize;
use crate::guest_memory::{GuestAddress, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;
use crate::volatile_memory::VolatileSlice;

/// The bitmap type of a physical memory's regions.
pub(super) type BitmapOf<M> = <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

/// A strategy for marking the writes that go through an IOMMU: [`ByIova`] or [`ByGuestAddress`].
///
/// This trait is sealed: no other type can implement it.
pub trait Marking<M: GuestMemoryBackend>: sealed::Sealed {
    /// The bitmap by I/O virtual address.
    type IovaBitmap: Bitmap;

    /// The bitmap of the memory's slices.
    type SliceBitmap: Bitmap;

    /// Returns a slice of the physical memory with the bitmap for its marks.
    ///
    /// `by_iova` is the part of the bitmap by I/O virtual address that begins at the slice, or
    /// `None` while the IOMMU is off.
    #[doc(hidden)]
    fn with_marks<'a>(
        slice: VolatileSlice<'a, MS<'a, M>>,
        by_iova: Option<BS<'a, Self::IovaBitmap>>,
    ) -> VolatileSlice<'a, BS<'a, Self::SliceBitmap>>;
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for super::ByIova {}
    impl<B> Sealed for super::ByGuestAddress<B> {}
}

/// Marks writes by I/O virtual address: the [`Marking`] of an [`IommuMemory`] by default.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::iommu::{ByIova, IommuMemory, SharedIotlb};
/// use vm_memory::GuestMemoryMmap;
///
/// type Marked = IommuMemory<GuestMemoryMmap, SharedIotlb, ByIova>;
/// let physical = GuestMemoryMmap::<()>::new();
/// // The same type: it is the default.
/// let memory: IommuMemory<_, _> = Marked::new(physical, SharedIotlb::new(), true, ());
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ByIova(());

impl<M: GuestMemoryBackend> Marking<M> for ByIova {
    type IovaBitmap = BitmapOf<M>;
    type SliceBitmap = BitmapOf<M>;

    #[inline(always)]
    fn with_marks<'a>(
        slice: VolatileSlice<'a, MS<'a, M>>,
        by_iova: Option<BS<'a, Self::IovaBitmap>>,
    ) -> VolatileSlice<'a, BS<'a, Self::SliceBitmap>> {
        match by_iova {
            Some(by_iova) => slice.with_other_bitmap(by_iova),
            None => slice,
        }
    }
}

/// Marks writes by guest physical address: the [`Marking`] of a [`MarkedIommuMemory`].
///
/// A bitmap `B` also marks by I/O virtual address; `()` marks nothing. [`MarkedIommuMemory`] has an
/// example.
#[derive(Clone, Copy, Debug)]
pub struct ByGuestAddress<B = ()>(PhantomData<B>);

impl<M: GuestMemoryBackend, B: Bitmap> Marking<M> for ByGuestAddress<B> {
    type IovaBitmap = B;
    type SliceBitmap = (BitmapOf<M>, Option<B>);

    #[inline(always)]
    fn with_marks<'a>(
        slice: VolatileSlice<'a, MS<'a, M>>,
        by_iova: Option<BS<'a, Self::IovaBitmap>>,
    ) -> VolatileSlice<'a, BS<'a, Self::SliceBitmap>> {
        let by_guest_address = slice.bitmap().clone();
        slice.with_other_bitmap((by_guest_address, by_iova))
    }
}

/// An [`IommuMemory`] that marks writes by guest physical address.
///
/// A VMM that migrates its guest needs the guest pages that devices wrote to. This memory marks
/// them in the bitmaps of the physical memory's regions, whether the IOMMU is on or off. A
/// vhost-user back end also needs this memory: the bits of its log are guest pages.
///
/// With a bitmap `B` of its own ([`by_both`](Self::by_both)), it also marks there, by I/O virtual
/// address, while the IOMMU is on.
///
/// # Examples
///
/// ```
/// # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::DirtyMemory;
/// use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let physical: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let iotlb = SharedIotlb::new();
/// let iova = GuestAddress(0x8000_0000);
/// iotlb.set_mapping(iova, GuestAddress(0x3000), 0x1000, Permissions::ReadWrite)?;
///
/// let device = MarkedIommuMemory::by_guest_address(physical.clone(), iotlb, true);
/// device.write_obj(7u64, iova)?;
///
/// let mut dirty = DirtyMemory::new();
/// dirty.harvest(&physical);
/// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x3000), 0x1000)]);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "dirty log")]
#[doc(alias = "migrate")]
pub type MarkedIommuMemory<M, I, B = ()> = IommuMemory<M, I, ByGuestAddress<B>>;

impl<M: GuestMemoryBackend, I: Iommu> IommuMemory<M, I, ByGuestAddress> {
    /// Creates a view of `backend` through `iommu` that marks writes by guest physical address.
    ///
    /// Without the IOMMU (`use_iommu` is `false`), addresses are guest physical addresses.
    ///
    /// # Examples
    ///
    /// See [`MarkedIommuMemory`].
    pub fn by_guest_address(backend: M, iommu: I, use_iommu: bool) -> Self {
        Self::by_both(backend, iommu, use_iommu, ())
    }
}

impl<M: GuestMemoryBackend, I: Iommu, B: Bitmap> IommuMemory<M, I, ByGuestAddress<B>> {
    /// Creates a view of `backend` through `iommu` that marks writes by both kinds of address.
    ///
    /// Writes are marked in the bitmaps of the backend's regions. Writes through the IOMMU are also
    /// marked in `bitmap`, by I/O virtual address.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    /// use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, Permissions};
    /// use vm_memory::GuestMemoryBackend;
    ///
    /// let physical: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let iotlb = SharedIotlb::new();
    /// let iova = GuestAddress(0x1_0000);
    /// iotlb.set_mapping(iova, GuestAddress(0x3000), 0x1000, Permissions::ReadWrite)?;
    ///
    /// let by_iova = AtomicBitmap::new(0x2_0000, NonZeroUsize::new(0x1000).unwrap());
    /// let device = MarkedIommuMemory::by_both(physical.clone(), iotlb, true, by_iova);
    /// device.write_obj(7u64, iova)?;
    /// assert!(device.bitmap().dirty_at(0x1_0000));
    /// let region = physical.find_region(GuestAddress(0x3000)).unwrap();
    /// assert!(region.bitmap().dirty_at(0x3000));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn by_both(backend: M, iommu: I, use_iommu: bool, bitmap: B) -> Self {
        Self::with_bitmap(backend, iommu, use_iommu, bitmap)
    }
}

/// Returns the part of a bitmap that begins at an I/O virtual address.
#[inline]
pub(super) fn bitmap_at<B: Bitmap>(bitmap: &B, iova: GuestAddress) -> BS<'_, B> {
    // An address that `usize` cannot express is not tracked: `check_marks` has refused the write.
    bitmap.slice_at(to_usize(iova.0))
}

/// Checks that a bitmap by I/O virtual address keeps the marks of a range.
///
/// A page that is written and not marked would be lost to a migration.
///
/// # Errors
///
/// Returns [`Error::IommuMisconfigured`] if it does not.
#[inline(always)]
pub(super) fn check_marks(
    bitmap: &impl Bitmap,
    iova: GuestAddress,
    count: usize,
) -> Result<(), Error> {
    match usize::try_from(iova.0) {
        Ok(offset) if bitmap.tracks_range(offset, count) => Ok(()),
        _ => Err(untracked(iova, count)),
    }
}

#[cold]
fn untracked(iova: GuestAddress, count: usize) -> Error {
    Error::IommuMisconfigured {
        reason: format!(
            "dirty bitmap does not track all {count:#x} bytes at IOVA {:#x}; \
             use a larger bitmap",
            iova.0
        ),
    }
}
