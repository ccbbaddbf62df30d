//! [`MarkedIommuMemory`]: memory behind an IOMMU whose writes are marked where the guest's memory is.

use std::fmt::{self, Debug};
use std::iter::FusedIterator;
use std::sync::Arc;

use super::memory::BitmapOf;
use super::translated::{bitmap_at, Translated, TranslatedSlices};
use super::Iommu;
use crate::bitmap::{Bitmap, BS, MS};
use crate::guest_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemorySliceIterator, Permissions, Result,
    TranslationHold,
};
use crate::volatile_memory::VolatileSlice;

/// Guest physical memory, seen by a device through an IOMMU that can be switched off, with writes marked by guest physical address.
///
/// [`IommuMemory`](super::IommuMemory) marks by I/O virtual address while the IOMMU is on, as vhost-user wants it. A VMM that migrates the guest itself
/// wants to know which of the guest's pages were written: this marks in the bitmaps of the physical memory's regions, whether the IOMMU is on or off.
/// With a bitmap of its own ([`by_both`](Self::by_both)), it also marks there, by I/O virtual address, while the IOMMU is on; a write whose mark
/// that has no place for is refused before it happens ([`Error::IommuMisconfigured`](super::Error::IommuMisconfigured)).
///
/// ```
/// # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::DirtyMemory;
/// use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let physical: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let iotlb = SharedIotlb::new();
/// iotlb.set_mapping(GuestAddress(0x8000_0000), GuestAddress(0x3000), 0x1000, Permissions::ReadWrite)?;
///
/// let device = MarkedIommuMemory::by_guest_address(physical.clone(), iotlb, true);
/// device.write_obj(7u64, GuestAddress(0x8000_0010))?;
///
/// let mut dirty = DirtyMemory::new();
/// dirty.harvest(&physical);
/// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x3000), 0x1000)]);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MarkedIommuMemory<M: GuestMemoryBackend, I: Iommu, B = ()> {
    translated: Translated<M, I>,
    bitmap: Arc<B>,
}

impl<M: GuestMemoryBackend, I: Iommu> MarkedIommuMemory<M, I> {
    /// Puts an IOMMU before `backend`, switched on or off; writes are marked in the bitmaps of the backend's regions.
    pub fn by_guest_address(backend: M, iommu: I, use_iommu: bool) -> Self {
        Self::by_both(backend, iommu, use_iommu, ())
    }
}

impl<M: GuestMemoryBackend, I: Iommu, B: Bitmap> MarkedIommuMemory<M, I, B> {
    /// Puts an IOMMU before `backend`, switched on or off; writes are marked in the bitmaps of the backend's regions, and, through the IOMMU, in
    /// `bitmap` by I/O virtual address.
    pub fn by_both(backend: M, iommu: I, use_iommu: bool, bitmap: B) -> Self {
        MarkedIommuMemory {
            translated: Translated::new(backend, iommu, use_iommu),
            bitmap: Arc::new(bitmap),
        }
    }

    /// Returns the same view of another physical memory: after a region was added or taken away. IOMMU and bitmap are shared with `self`; the switch is
    /// copied.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x8000_0000), GuestAddress(0x4000), 0x1000, Permissions::ReadWrite)?;
    /// let device = MarkedIommuMemory::by_guest_address(physical.clone(), iotlb, true);
    /// assert!(device.read_obj::<u64>(GuestAddress(0x8000_0000)).is_err());
    ///
    /// let plugged = GuestRegionMmap::from_range(GuestAddress(0x4000), 0x1000, None)?;
    /// let device = device.with_replaced_backend(physical.insert_region(Arc::new(plugged))?);
    /// assert_eq!(device.read_obj::<u64>(GuestAddress(0x8000_0000))?, 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_replaced_backend(&self, new_backend: M) -> Self {
        self.before(new_backend)
    }

    /// Returns the bitmap by I/O virtual address.
    pub fn bitmap(&self) -> &Arc<B> {
        &self.bitmap
    }

    /// Switches the IOMMU on or off, for this object alone.
    pub fn set_iommu_enabled(&mut self, enabled: bool) {
        self.translated.use_iommu = enabled;
    }

    /// Returns whether the IOMMU is on.
    pub fn get_iommu_enabled(&self) -> bool {
        self.translated.use_iommu
    }

    /// Returns the IOMMU.
    pub fn iommu(&self) -> &Arc<I> {
        &self.translated.iommu
    }

    /// Returns what all of the `count` bytes from `addr` on permit: the IOMMU, while it is on, the physical memory behind it, and the bitmap, which
    /// must have a place for the marks of a write. `None` if one of them is not mapped, or not in the physical memory.
    ///
    /// It asks the IOMMU for one access after another: one that asks elsewhere for what is missing does so here, too.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::iommu::{MarkedIommuMemory, SharedIotlb};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x8000_0000), GuestAddress(0x1000), 0x1000, Permissions::Read)?;
    /// let memory = MarkedIommuMemory::by_guest_address(physical, iotlb, true);
    /// assert_eq!(memory.granted(GuestAddress(0x8000_0000), 0x1000), Some(Permissions::Read));
    /// assert_eq!(memory.granted(GuestAddress(0x8000_0800), 0x1000), None);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn granted(&self, addr: GuestAddress, count: usize) -> Option<Permissions> {
        self.translated.granted(&*self.bitmap, addr, count)
    }

    /// Returns the physical memory.
    pub fn get_backend(&self) -> &M {
        &self.translated.backend
    }

    /// A slice that marks in both places.
    #[inline(always)]
    fn marked<'a>(
        bitmap: &'a B,
        slice: VolatileSlice<'a, MS<'a, M>>,
        iova: Option<GuestAddress>,
    ) -> VolatileSlice<'a, BS<'a, (BitmapOf<M>, Option<B>)>> {
        let by_guest_address = slice.bitmap().clone();
        let by_iova = iova.map(|iova| bitmap_at(bitmap, iova));
        slice.with_other_bitmap((by_guest_address, by_iova))
    }
}

impl<M: GuestMemoryBackend, I: Iommu, B> MarkedIommuMemory<M, I, B> {
    fn before(&self, backend: M) -> Self {
        MarkedIommuMemory {
            translated: self.translated.before(backend),
            bitmap: Arc::clone(&self.bitmap),
        }
    }
}

/// The same IOMMU and the same bitmap, before the same kind of physical memory.
impl<M: GuestMemoryBackend + Clone, I: Iommu, B> Clone for MarkedIommuMemory<M, I, B> {
    fn clone(&self) -> Self {
        self.before(self.translated.backend.clone())
    }
}

impl<M: GuestMemoryBackend + Debug, I: Iommu, B: Debug> Debug for MarkedIommuMemory<M, I, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MarkedIommuMemory")
            .field("backend", &self.translated.backend)
            .field("iommu", &self.translated.iommu)
            .field("use_iommu", &self.translated.use_iommu)
            .field("bitmap", &self.bitmap)
            .finish()
    }
}

impl<M: GuestMemoryBackend, I: Iommu, B: Bitmap> GuestMemory for MarkedIommuMemory<M, I, B> {
    type PhysicalMemory = M;
    type Bitmap = (BitmapOf<M>, Option<B>);

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.translated
            .check_range(&*self.bitmap, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        Ok(MarkedSlices {
            slices: self.translated.slices(&*self.bitmap, addr, count, access)?,
            bitmap: &*self.bitmap,
        })
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.translated.physical_memory()
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
        let bitmap = &*self.bitmap;
        if let Some(physical) = self.physical_memory() {
            return Ok(physical
                .contiguous_slice(addr, count, access)
                .map(|slice| transfer(&Self::marked(bitmap, slice, None))));
        }
        self.translated
            .with_slice(bitmap, addr, count, access, |slice| {
                transfer(&Self::marked(bitmap, slice, Some(addr)))
            })
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.translated.hold()
    }
}

/// The slices that a range of a [`MarkedIommuMemory`] consists of. It holds on to the IOTLB.
struct MarkedSlices<'a, M: GuestMemoryBackend, I: Iommu, B> {
    slices: TranslatedSlices<'a, M, I>,
    bitmap: &'a B,
}

impl<'a, M: GuestMemoryBackend, I: Iommu, B: Bitmap> Iterator for MarkedSlices<'a, M, I, B> {
    type Item = Result<VolatileSlice<'a, BS<'a, (BitmapOf<M>, Option<B>)>>>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = self.slices.next()?;
        Some(
            slice.map(|(slice, iova)| {
                MarkedIommuMemory::<M, I, B>::marked(self.bitmap, slice, iova)
            }),
        )
    }
}

/// After the last slice or an error there is nothing more.
impl<M: GuestMemoryBackend, I: Iommu, B: Bitmap> FusedIterator for MarkedSlices<'_, M, I, B> {}

impl<'a, M: GuestMemoryBackend, I: Iommu, B: Bitmap>
    GuestMemorySliceIterator<'a, BS<'a, (BitmapOf<M>, Option<B>)>> for MarkedSlices<'a, M, I, B>
{
}
