//! [`IommuMemory`]: physical memory seen through an IOMMU.

use std::fmt::{self, Debug};
use std::iter::FusedIterator;
use std::sync::Arc;

use super::iotlb::passes_the_end;
use super::{Error, Iommu, IotlbIterator};
use crate::bitmap::{Bitmap, BS, MS};
use crate::guest_memory::{
    Error as GuestMemoryError, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestMemoryBackendSliceIterator, GuestMemorySliceIterator, Permissions, Result,
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
/// A write whose mark that bitmap has no place for is refused before it happens ([`Error::IommuMisconfigured`]): a page
/// that is written and not marked is lost to a migration.
///
/// Slices of this memory are translated once: an invalidation does not take back those that exist.
///
/// [`Iommu`] has an example.
pub struct IommuMemory<M: GuestMemoryBackend, I: Iommu> {
    backend: M,
    iommu: Arc<I>,
    use_iommu: bool,
    bitmap: Arc<BitmapOf<M>>,
}

/// The bitmap type of a physical memory's regions.
type BitmapOf<M> = <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

impl<M: GuestMemoryBackend, I: Iommu> IommuMemory<M, I> {
    /// Puts an IOMMU before `backend`, switched on or off; writes through it are marked in `bitmap`, by I/O virtual address.
    pub fn new(backend: M, iommu: I, use_iommu: bool, bitmap: <Self as GuestMemory>::Bitmap) -> Self {
        IommuMemory {
            backend,
            iommu: Arc::new(iommu),
            use_iommu,
            bitmap: Arc::new(bitmap),
        }
    }

    /// Returns the same view of another physical memory. IOMMU and bitmap are shared with `self`; the switch is copied.
    pub fn with_replaced_backend(&self, new_backend: M) -> Self {
        IommuMemory {
            backend: new_backend,
            iommu: Arc::clone(&self.iommu),
            use_iommu: self.use_iommu,
            bitmap: Arc::clone(&self.bitmap),
        }
    }

    /// Returns the bitmap that writes are marked in while the IOMMU is on, by I/O virtual address.
    pub fn bitmap(&self) -> &Arc<<Self as GuestMemory>::Bitmap> {
        &self.bitmap
    }

    /// Switches the IOMMU on or off, for this object alone.
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

    /// Translates a range, for an access that it permits and whose marks are kept.
    ///
    /// Inlined, since an iterator that is returned through memory costs as much as the search.
    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> std::result::Result<IotlbIterator<I::IotlbGuard<'_>>, Error> {
        // Checked before anybody's IOMMU is asked: one that asks its front end for what is missing would ask for ever.
        let more = u64::try_from(count.saturating_sub(1)).unwrap_or(u64::MAX);
        if iova.0.checked_add(more).is_none() {
            return Err(passes_the_end(iova, count));
        }
        if access.has_write() && !self.marks_are_kept(iova, count) {
            return Err(marks_are_lost(iova, count));
        }
        self.iommu.translate(iova, count, access)
    }

    fn marks_are_kept(&self, iova: GuestAddress, count: usize) -> bool {
        usize::try_from(iova.0).is_ok_and(|offset| self.bitmap.tracks_range(offset, count))
    }

    /// The slice of the bitmap that begins at an I/O virtual address.
    fn bitmap_at(&self, iova: GuestAddress) -> BS<'_, BitmapOf<M>> {
        // On a machine that cannot count to the address, the bitmap does not track it either: a write has been refused.
        self.bitmap
            .slice_at(usize::try_from(iova.0).unwrap_or(usize::MAX))
    }
}

/// The error of a write whose mark has no place.
#[cold]
fn marks_are_lost(iova: GuestAddress, count: usize) -> Error {
    Error::IommuMisconfigured {
        reason: format!(
            "the dirty bitmap does not track all of the {count} bytes at I/O address 0x{:x}",
            iova.0
        ),
    }
}

/// The same IOMMU and the same bitmap, before the same kind of physical memory.
impl<M: GuestMemoryBackend + Clone, I: Iommu> Clone for IommuMemory<M, I> {
    fn clone(&self) -> Self {
        self.with_replaced_backend(self.backend.clone())
    }
}

impl<M: GuestMemoryBackend + Debug, I: Iommu> Debug for IommuMemory<M, I>
where
    BitmapOf<M>: Debug,
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
        if !self.use_iommu {
            return GuestMemory::check_range(&self.backend, addr, count, access);
        }
        let Ok(mut pieces) = self.translate(addr, count, access) else {
            return false;
        };
        let mut translated = 0usize;
        pieces.all(|piece| {
            translated = translated.saturating_add(piece.length);
            GuestMemory::check_range(&self.backend, piece.base, piece.length, access)
        })
        // An IOMMU of another crate's may have translated less than it was asked for.
        && translated >= count
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.use_iommu {
            let physical = GuestMemoryBackendSliceIterator::new(&self.backend, addr, count, access);
            return Ok(IommuMemorySliceIterator {
                memory: self,
                addr,
                left: count,
                access,
                pieces: None,
                physical: Some(physical),
            });
        }
        let pieces = self
            .translate(addr, count, access)
            .map_err(GuestMemoryError::IommuError)?;
        Ok(IommuMemorySliceIterator {
            memory: self,
            addr,
            left: count,
            access,
            pieces: Some(pieces),
            physical: None,
        })
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        (!self.use_iommu).then_some(&self.backend)
    }

    #[inline]
    fn slice_in_one_piece(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        if !self.use_iommu {
            return self.backend.slice_in_one_piece(addr, count, access);
        }
        // The slice would outlive the guard of the IOTLB.
        None
    }

    #[inline(always)]
    fn with_slice_in_one_piece<T, F>(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
        transfer: F,
    ) -> Result<Option<T>>
    where
        F: for<'s> FnOnce(&VolatileSlice<'s, BS<'s, Self::Bitmap>>) -> T,
    {
        if !self.use_iommu {
            return self
                .backend
                .with_slice_in_one_piece(addr, count, access, transfer);
        }
        // The guard of the IOTLB is in there until the end.
        let mut pieces = self
            .translate(addr, count, access)
            .map_err(GuestMemoryError::IommuError)?;
        let Some(piece) = pieces.next().filter(|piece| piece.length >= count) else {
            return Ok(None);
        };
        self.backend
            .with_slice_in_one_piece(piece.base, count, access, |slice| {
                transfer(&slice.clone().with_other_bitmap(self.bitmap_at(addr)))
            })
    }
}

/// The slices that a range of an [`IommuMemory`] consists of.
///
/// From its [`get_slices`](GuestMemory::get_slices). It holds on to the IOTLB (see [`IotlbIterator`]).
pub struct IommuMemorySliceIterator<'a, M: GuestMemoryBackend, I: Iommu + 'a> {
    memory: &'a IommuMemory<M, I>,
    /// The I/O virtual address of the next slice.
    addr: GuestAddress,
    /// How many bytes are still wanted; 0 after an error.
    left: usize,
    access: Permissions,
    /// The translated ranges that are still to come; `None` while the IOMMU is off.
    pieces: Option<IotlbIterator<I::IotlbGuard<'a>>>,
    /// The slices of the range at hand.
    physical: Option<GuestMemoryBackendSliceIterator<'a, M>>,
}

impl<'a, M: GuestMemoryBackend, I: Iommu> IommuMemorySliceIterator<'a, M, I> {
    /// The next slice, when there are bytes left.
    fn step(&mut self) -> Result<VolatileSlice<'a, MS<'a, M>>> {
        loop {
            if let Some(slice) = self.physical.as_mut().and_then(Iterator::next) {
                return self.marked_by_iova(slice?);
            }
            // An IOMMU of another crate's may have translated less than it was asked for.
            let Some(piece) = self.pieces.as_mut().and_then(Iterator::next) else {
                return Err(GuestMemoryError::IommuError(Error::CannotResolve {
                    iova_range: super::IovaRange {
                        base: self.addr,
                        length: self.left,
                    },
                    reason: "the translation ended early".into(),
                }));
            };
            let wanted = piece.length.min(self.left);
            self.physical = Some(GuestMemoryBackendSliceIterator::new(
                &self.memory.backend,
                piece.base,
                wanted,
                self.access,
            ));
        }
    }

    /// Counts a slice off, and exchanges its bitmap if the IOMMU is on.
    fn marked_by_iova(
        &mut self,
        slice: VolatileSlice<'a, MS<'a, M>>,
    ) -> Result<VolatileSlice<'a, MS<'a, M>>> {
        let iova = self.addr;
        let len = u64::try_from(slice.len()).unwrap_or(u64::MAX);
        // Wraps only behind the last slice of a range that ends at 2^64.
        self.addr = GuestAddress(iova.0.wrapping_add(len));
        self.left = self.left.saturating_sub(slice.len());
        match self.pieces {
            Some(_) => Ok(slice.with_other_bitmap(self.memory.bitmap_at(iova))),
            None => Ok(slice),
        }
    }
}

impl<'a, M: GuestMemoryBackend, I: Iommu> Iterator for IommuMemorySliceIterator<'a, M, I> {
    type Item = Result<VolatileSlice<'a, MS<'a, M>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.left = 0;
        }
        Some(step)
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
            .field("memory", &self.memory)
            .field("addr", &self.addr)
            .field("left", &self.left)
            .field("access", &self.access)
            .field("pieces", &self.pieces)
            .field("physical", &self.physical)
            .finish()
    }
}
