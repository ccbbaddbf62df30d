//! [`IommuMemory`]: guest memory behind an IOMMU.

use std::fmt::{self, Debug};
use std::sync::Arc;

use super::iotlb::passes_the_end;
use super::marking::{bitmap_at, check_marks, BitmapOf};
use super::slices::IommuMemorySliceIterator;
use super::{widest, ByIova, Error, Iommu, IotlbIterator, Marking};
use crate::bitmap::BS;
use crate::convert::to_u64;
use crate::guest_memory::{
    Error as GuestMemoryError, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestMemorySliceIterator, Permissions, Refusal, Result, TranslationHold,
};
use crate::volatile_memory::VolatileSlice;

/// Guest memory as a device behind an IOMMU sees it.
///
/// Addresses are I/O virtual addresses while the IOMMU is on, and guest physical addresses while it
/// is off. All of [`Bytes`](crate::Bytes) and [`GuestMemory`] works through it.
///
/// # Dirty tracking
///
/// By default, writes are marked as in 0.18.0:
///
/// - while the IOMMU is on, in this object's own [`bitmap`](Self::bitmap), by I/O virtual address;
/// - while it is off, in the bitmaps of the physical memory's regions.
///
/// A migration needs guest physical addresses, and so does the log of a vhost-user back end
/// (vhost-user specification, "Migration"). For both, use
/// [`MarkedIommuMemory`](super::MarkedIommuMemory). It marks by guest physical address in both
/// cases.
///
/// A write that this object's bitmap does not track is refused before it happens, with
/// [`Error::IommuMisconfigured`]. A page that is written and not marked would be lost to a
/// migration.
///
/// # Invalidation
///
/// An iterator from [`get_slices`](GuestMemory::get_slices) holds the IOTLB that it was translated
/// with, and so does each access of `Bytes`, until it is complete. A slice that outlives its
/// iterator does not: drop it before you acknowledge an invalidation.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::iommu::{IommuMemory, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let iotlb = SharedIotlb::new();
/// let mut memory = IommuMemory::new(physical, iotlb.clone(), true, ());
///
/// let (iova, gpa) = (GuestAddress(0x8000_0000), GuestAddress(0x1000));
/// iotlb.set_mapping(iova, gpa, 0x1000, Permissions::ReadWrite)?;
/// memory.write_obj(7u64, iova)?;
///
/// memory.set_iommu_enabled(false);
/// assert_eq!(memory.read_obj::<u64>(gpa)?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "DMA")]
#[doc(alias = "vIOMMU")]
#[doc(alias = "vhost-user")]
pub struct IommuMemory<M: GuestMemoryBackend, I: Iommu, K: Marking<M> = ByIova> {
    backend: M,
    iommu: Arc<I>,
    use_iommu: bool,
    /// Marks by I/O virtual address, while the IOMMU is on.
    bitmap: Arc<K::IovaBitmap>,
}

impl<M: GuestMemoryBackend, I: Iommu> IommuMemory<M, I> {
    /// Creates a view of `backend` through `iommu`.
    ///
    /// `use_iommu` tells whether the IOMMU is on. Writes through it are marked in `bitmap`, by I/O
    /// virtual address.
    pub fn new(
        backend: M,
        iommu: I,
        use_iommu: bool,
        bitmap: <Self as GuestMemory>::Bitmap,
    ) -> Self {
        Self::with_bitmap(backend, iommu, use_iommu, bitmap)
    }
}

impl<M: GuestMemoryBackend, I: Iommu, K: Marking<M>> IommuMemory<M, I, K> {
    pub(super) fn with_bitmap(
        backend: M,
        iommu: I,
        use_iommu: bool,
        bitmap: K::IovaBitmap,
    ) -> Self {
        IommuMemory {
            backend,
            iommu: Arc::new(iommu),
            use_iommu,
            bitmap: Arc::new(bitmap),
        }
    }

    /// Returns the same view of another physical memory, after a region was added or removed.
    ///
    /// The views share the IOMMU and the bitmap. Each has its own switch, set as in `self`.
    ///
    /// # Examples
    ///
    /// A `GuestMemoryAtomic` replaces the view of a device, and reports when the device no longer
    /// uses the old one. Only then may the VMM reuse the memory of a removed region.
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "backend-atomic"))] {
    /// use std::sync::Arc;
    /// use std::time::{Duration, Instant};
    /// use vm_memory::iommu::{IommuMemory, SharedIotlb};
    /// use vm_memory::GuestRegionCollectionError;
    /// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
    /// use vm_memory::{GuestMemoryMmap, GuestRegionMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let iotlb = SharedIotlb::new();
    /// let iova = GuestAddress(0x8000_0000);
    /// iotlb.set_mapping(iova, GuestAddress(0x4000), 0x1000, Permissions::ReadWrite)?;
    /// let device = GuestMemoryAtomic::new(IommuMemory::new(physical, iotlb, true, ()));
    /// assert!(device.memory().read_obj::<u64>(iova).is_err());
    ///
    /// let added = Arc::new(GuestRegionMmap::from_range(GuestAddress(0x4000), 0x1000, None)?);
    /// let old = device.update(|view| {
    ///     let physical = view.get_backend().insert_region(added)?;
    ///     Ok::<_, GuestRegionCollectionError>(view.with_replaced_backend(physical))
    /// })?;
    /// old.wait(Instant::now() + Duration::from_secs(1))?;
    /// assert_eq!(device.memory().read_obj::<u64>(iova)?, 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "hotplug")]
    pub fn with_replaced_backend(&self, new_backend: M) -> Self {
        IommuMemory {
            backend: new_backend,
            iommu: Arc::clone(&self.iommu),
            use_iommu: self.use_iommu,
            bitmap: Arc::clone(&self.bitmap),
        }
    }

    /// Returns the bitmap by I/O virtual address, in which writes are marked while the IOMMU is on.
    pub fn bitmap(&self) -> &Arc<K::IovaBitmap> {
        &self.bitmap
    }

    /// Switches the IOMMU on or off, for this object only.
    pub fn set_iommu_enabled(&mut self, enabled: bool) {
        self.use_iommu = enabled;
    }

    /// Returns whether the IOMMU is on.
    pub fn get_iommu_enabled(&self) -> bool {
        self.use_iommu
    }

    /// Returns the IOMMU.
    pub fn iommu(&self) -> &Arc<I> {
        &self.iommu
    }

    /// Returns the physical memory.
    pub fn get_backend(&self) -> &M {
        &self.backend
    }

    /// Returns the most permissive access that all of the `count` bytes at `addr` permit.
    ///
    /// The access must be permitted by the IOMMU (while it is on) and by the physical memory, and
    /// the bitmap must track a write. Returns `None` if a byte is not mapped, or is not in the
    /// physical memory.
    ///
    /// The IOMMU is queried for one access after another. An IOMMU that asks its front end for
    /// missing mappings also does so here.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::iommu::{IommuMemory, SharedIotlb};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x8000), GuestAddress(0x1000), 0x1000, Permissions::Read)?;
    /// let memory = IommuMemory::new(physical, iotlb, true, ());
    /// assert_eq!(memory.granted(GuestAddress(0x8000), 0x1000), Some(Permissions::Read));
    /// assert_eq!(memory.granted(GuestAddress(0x8800), 0x1000), None);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn granted(&self, addr: GuestAddress, count: usize) -> Option<Permissions> {
        widest(|access| self.check_range(addr, count, access))
    }

    /// Translates a range for an access, after checking that the bitmap keeps its marks.
    ///
    /// Inlined: an iterator that is returned through memory costs as much as the lookup.
    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> core::result::Result<IotlbIterator<I::IotlbGuard<'_>>, Error> {
        // Checked first: an IOMMU that asks its front end for missing mappings would never get one.
        let more = to_u64(count.saturating_sub(1));
        if iova.0.checked_add(more).is_none() {
            return Err(passes_the_end(iova, count));
        }
        if access.has_write() {
            check_marks(&*self.bitmap, iova, count)?;
        }
        self.iommu.translate(iova, count, access)
    }
}

/// Shares the IOMMU and the bitmap, as
/// [`with_replaced_backend`](IommuMemory::with_replaced_backend) does.
impl<M: GuestMemoryBackend + Clone, I: Iommu, K: Marking<M>> Clone for IommuMemory<M, I, K> {
    fn clone(&self) -> Self {
        self.with_replaced_backend(self.backend.clone())
    }
}

impl<M: GuestMemoryBackend + Debug, I: Iommu, K: Marking<M>> Debug for IommuMemory<M, I, K>
where
    K::IovaBitmap: Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuMemory")
            .field("backend", &self.backend)
            .field("iommu", &self.iommu)
            .field("use_iommu", &self.use_iommu)
            .field("bitmap", &self.bitmap)
            .finish()
    }
}

/// Creates a view of the default physical memory, with the default IOMMU switched off.
impl<M: GuestMemoryBackend + Default, I: Iommu + Default> Default for IommuMemory<M, I>
where
    BitmapOf<M>: Default,
{
    fn default() -> Self {
        IommuMemory::new(M::default(), I::default(), false, Default::default())
    }
}

impl<M: GuestMemoryBackend, I: Iommu, K: Marking<M>> GuestMemory for IommuMemory<M, I, K> {
    type PhysicalMemory = M;
    type Bitmap = K::SliceBitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        if !self.use_iommu {
            return GuestMemory::check_range(&self.backend, addr, count, access);
        }
        let Ok(mut segments) = self.translate(addr, count, access) else {
            return false;
        };
        // The IOMMU of another crate may translate less or more than requested.
        let mut left = count;
        segments.all(|segment| {
            let length = segment.length.min(left);
            left = left.saturating_sub(length);
            GuestMemory::check_range(&self.backend, segment.base, length, access)
        }) && left == 0
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let segments = if self.use_iommu {
            Some(
                self.translate(addr, count, access)
                    .map_err(GuestMemoryError::IommuError)?,
            )
        } else {
            None
        };
        Ok(IommuMemorySliceIterator::<M, I, K>::new(
            &self.backend,
            &self.bitmap,
            segments,
            addr,
            count,
            access,
        ))
    }

    #[cold]
    fn explain(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Refusal> {
        if self.use_iommu {
            self.explain_translated(addr, count, access)
        } else {
            self.backend.explain(addr, count, access)
        }
    }

    #[inline]
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        (!self.use_iommu).then_some(&self.backend)
    }

    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        // None while the IOMMU is on: the slice would outlive the guard of the IOTLB.
        let slice = self
            .physical_memory()?
            .contiguous_slice(addr, count, access)?;
        Some(K::with_marks(slice, None))
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
            // `Option::map` is a call when built for size.
            return match physical.contiguous_slice(addr, count, access) {
                Some(slice) => Ok(Some(transfer(&K::with_marks(slice, None)))),
                None => Ok(None),
            };
        }
        // Holds the guard of the IOTLB until `transfer` has returned.
        let mut segments = self
            .translate(addr, count, access)
            .map_err(GuestMemoryError::IommuError)?;
        let Some(segment) = segments.next().filter(|segment| segment.length >= count) else {
            return Ok(None);
        };
        match self.backend.contiguous_slice(segment.base, count, access) {
            Some(slice) => {
                let by_iova = bitmap_at(&*self.bitmap, addr);
                Ok(Some(transfer(&K::with_marks(slice, Some(by_iova)))))
            }
            None => Ok(None),
        }
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        if self.use_iommu {
            self.iommu.hold_translation()
        } else {
            Some(TranslationHold::nothing())
        }
    }
}
