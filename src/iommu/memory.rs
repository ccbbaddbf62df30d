//! [`IommuMemory`]: physical memory seen through an IOMMU.

use std::fmt::{self, Debug};
use std::iter::FusedIterator;
use std::sync::Arc;

use super::translated::{bitmap_at, Translated, TranslatedSlices};
use super::Iommu;
use crate::bitmap::{BS, MS};
use crate::guest_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemorySliceIterator, Permissions, Result,
    TranslationHold,
};
use crate::region::GuestMemoryRegion;
use crate::volatile_memory::VolatileSlice;

/// Guest physical memory, seen by a device through an IOMMU that can be switched off.
///
/// Where writes are marked depends on that, as vhost-user wants it (vhost-user specification, section "Migration"):
///
/// - while the IOMMU is off, in the bitmaps of the physical memory's regions;
/// - while it is on, in this object's own bitmap, by I/O virtual address.
///
/// A write whose mark that bitmap has no place for is refused before it happens ([`Error::IommuMisconfigured`](super::Error::IommuMisconfigured)): a page
/// that is written and not marked is lost to a migration.
///
/// Slices of this memory are translated once: an invalidation does not take back those that exist.
///
/// [`Iommu`] has an example.
pub struct IommuMemory<M: GuestMemoryBackend, I: Iommu> {
    translated: Translated<M, I>,
    bitmap: Arc<BitmapOf<M>>,
}

/// The bitmap type of a physical memory's regions.
pub(super) type BitmapOf<M> = <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

impl<M: GuestMemoryBackend, I: Iommu> IommuMemory<M, I> {
    /// Puts an IOMMU before `backend`, switched on or off; writes through it are marked in `bitmap`, by I/O virtual address.
    pub fn new(
        backend: M,
        iommu: I,
        use_iommu: bool,
        bitmap: <Self as GuestMemory>::Bitmap,
    ) -> Self {
        IommuMemory {
            translated: Translated::new(backend, iommu, use_iommu),
            bitmap: Arc::new(bitmap),
        }
    }

    /// Returns the same view of another physical memory. IOMMU and bitmap are shared with `self`; the switch is copied.
    pub fn with_replaced_backend(&self, new_backend: M) -> Self {
        IommuMemory {
            translated: self.translated.before(new_backend),
            bitmap: Arc::clone(&self.bitmap),
        }
    }

    /// Returns the bitmap that writes are marked in while the IOMMU is on, by I/O virtual address.
    pub fn bitmap(&self) -> &Arc<<Self as GuestMemory>::Bitmap> {
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
    /// use vm_memory::iommu::{IommuMemory, SharedIotlb};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x8000_0000), GuestAddress(0x1000), 0x1000, Permissions::Read)?;
    /// let memory = IommuMemory::new(physical, iotlb, true, ());
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
}

/// The same IOMMU and the same bitmap, before the same kind of physical memory.
impl<M: GuestMemoryBackend + Clone, I: Iommu> Clone for IommuMemory<M, I> {
    fn clone(&self) -> Self {
        self.with_replaced_backend(self.get_backend().clone())
    }
}

impl<M: GuestMemoryBackend + Debug, I: Iommu> Debug for IommuMemory<M, I>
where
    BitmapOf<M>: Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuMemory")
            .field("backend", self.get_backend())
            .field("iommu", self.iommu())
            .field("use_iommu", &self.get_iommu_enabled())
            .field("bitmap", &self.bitmap)
            .finish()
    }
}

/// The default physical memory behind the default IOMMU, which is off.
impl<M: GuestMemoryBackend + Default, I: Iommu + Default> Default for IommuMemory<M, I>
where
    BitmapOf<M>: Default,
{
    fn default() -> Self {
        IommuMemory::new(M::default(), I::default(), false, Default::default())
    }
}

impl<M: GuestMemoryBackend, I: Iommu> GuestMemory for IommuMemory<M, I> {
    type PhysicalMemory = M;
    type Bitmap = BitmapOf<M>;

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
        Ok(IommuMemorySliceIterator {
            slices: self.translated.slices(&*self.bitmap, addr, count, access)?,
            bitmap: &self.bitmap,
        })
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.translated.physical_memory()
    }

    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        // While it is on, the slice would outlive the guard of the IOTLB.
        self.physical_memory()?
            .contiguous_slice(addr, count, access)
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
        if let Some(physical) = self.physical_memory() {
            return physical.with_contiguous_slice(addr, count, access, transfer);
        }
        let bitmap = &*self.bitmap;
        self.translated
            .with_slice(bitmap, addr, count, access, |slice| {
                transfer(&slice.with_other_bitmap(bitmap_at(bitmap, addr)))
            })
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.translated.hold()
    }
}

/// The slices that a range of an [`IommuMemory`] consists of.
///
/// From its [`get_slices`](GuestMemory::get_slices). It holds on to the IOTLB (see [`IotlbIterator`](super::IotlbIterator)).
pub struct IommuMemorySliceIterator<'a, M: GuestMemoryBackend, I: Iommu + 'a> {
    slices: TranslatedSlices<'a, M, I>,
    bitmap: &'a BitmapOf<M>,
}

impl<'a, M: GuestMemoryBackend, I: Iommu> Iterator for IommuMemorySliceIterator<'a, M, I> {
    type Item = Result<VolatileSlice<'a, MS<'a, M>>>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = self.slices.next()?;
        Some(slice.map(|(slice, iova)| match iova {
            Some(iova) => slice.with_other_bitmap(bitmap_at(self.bitmap, iova)),
            None => slice,
        }))
    }
}

/// After the last slice or an error there is nothing more.
impl<M: GuestMemoryBackend, I: Iommu> FusedIterator for IommuMemorySliceIterator<'_, M, I> {}

impl<'a, M: GuestMemoryBackend, I: Iommu> GuestMemorySliceIterator<'a, MS<'a, M>>
    for IommuMemorySliceIterator<'a, M, I>
{
}

impl<'a, M: GuestMemoryBackend + Debug, I: Iommu> Debug for IommuMemorySliceIterator<'a, M, I>
where
    I::IotlbGuard<'a>: Debug,
    BitmapOf<M>: Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuMemorySliceIterator")
            .field("slices", &self.slices)
            .field("bitmap", &self.bitmap)
            .finish()
    }
}
