//! Physical memory and the IOMMU before it: what memories that mark in different places have in common.

use std::fmt::{self, Debug};
use std::sync::Arc;

use super::iotlb::passes_the_end;
use super::{widest, Error, Iommu, IotlbIterator, IovaRange};
use crate::bitmap::{Bitmap, BS, MS};
use crate::guest_memory::{
    Error as GuestMemoryError, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestMemoryBackendSliceIterator, Permissions, Result, TranslationHold,
};
use crate::volatile_memory::VolatileSlice;

/// Physical memory behind an IOMMU that can be switched off.
pub(super) struct Translated<M: GuestMemoryBackend, I: Iommu> {
    pub(super) backend: M,
    pub(super) iommu: Arc<I>,
    pub(super) use_iommu: bool,
}

/// The slice of a bitmap that begins at an I/O virtual address.
pub(super) fn bitmap_at<B: Bitmap>(bitmap: &B, iova: GuestAddress) -> BS<'_, B> {
    // On a machine that cannot count to the address, the bitmap does not track it either: a write has been refused.
    bitmap.slice_at(usize::try_from(iova.0).unwrap_or(usize::MAX))
}

impl<M: GuestMemoryBackend, I: Iommu> Translated<M, I> {
    pub(super) fn new(backend: M, iommu: I, use_iommu: bool) -> Self {
        Self {
            backend,
            iommu: Arc::new(iommu),
            use_iommu,
        }
    }

    /// The same IOMMU before another memory.
    pub(super) fn before(&self, backend: M) -> Self {
        Self {
            backend,
            iommu: Arc::clone(&self.iommu),
            use_iommu: self.use_iommu,
        }
    }

    /// The physical memory, while the IOMMU is off.
    #[inline]
    pub(super) fn physical_memory(&self) -> Option<&M> {
        (!self.use_iommu).then_some(&self.backend)
    }

    /// Translates a range, for an access that it permits and whose marks `bitmap` keeps.
    ///
    /// Inlined, since an iterator that is returned through memory costs as much as the search.
    #[inline(always)]
    fn translate(
        &self,
        bitmap: &impl Bitmap,
        iova: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> core::result::Result<IotlbIterator<I::IotlbGuard<'_>>, Error> {
        // Checked before anybody's IOMMU is asked: one that asks its front end for what is missing would ask for ever.
        let more = u64::try_from(count.saturating_sub(1)).unwrap_or(u64::MAX);
        if iova.0.checked_add(more).is_none() {
            return Err(passes_the_end(iova, count));
        }
        if access.has_write() && !marks_are_kept(bitmap, iova, count) {
            return Err(marks_are_lost(iova, count));
        }
        self.iommu.translate(iova, count, access)
    }

    pub(super) fn check_range(
        &self,
        bitmap: &impl Bitmap,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> bool {
        if !self.use_iommu {
            return GuestMemory::check_range(&self.backend, addr, count, access);
        }
        let Ok(mut pieces) = self.translate(bitmap, addr, count, access) else {
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

    /// The most that all of a range permits.
    pub(super) fn granted(
        &self,
        bitmap: &impl Bitmap,
        addr: GuestAddress,
        count: usize,
    ) -> Option<Permissions> {
        widest(|access| self.check_range(bitmap, addr, count, access))
    }

    /// The slices of a range, with the bitmaps of the physical memory.
    pub(super) fn slices(
        &self,
        bitmap: &impl Bitmap,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<TranslatedSlices<'_, M, I>> {
        let (pieces, physical) = if self.use_iommu {
            let pieces = self.translate(bitmap, addr, count, access);
            (Some(pieces.map_err(GuestMemoryError::IommuError)?), None)
        } else {
            let physical = GuestMemoryBackendSliceIterator::new(&self.backend, addr, count, access);
            (None, Some(physical))
        };
        Ok(TranslatedSlices {
            backend: &self.backend,
            addr,
            left: count,
            access,
            pieces,
            physical,
        })
    }

    /// [`GuestMemory::with_contiguous_slice`] while the IOMMU is on, with the bitmap of the physical memory.
    #[inline(always)]
    pub(super) fn with_slice<'a, T>(
        &'a self,
        bitmap: &impl Bitmap,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
        transfer: impl FnOnce(VolatileSlice<'a, MS<'a, M>>) -> T,
    ) -> Result<Option<T>> {
        // The guard of the IOTLB is in there until the end.
        let mut pieces = self
            .translate(bitmap, addr, count, access)
            .map_err(GuestMemoryError::IommuError)?;
        let Some(piece) = pieces.next().filter(|piece| piece.length >= count) else {
            return Ok(None);
        };
        match self.backend.contiguous_slice(piece.base, count, access) {
            Some(slice) => Ok(Some(transfer(slice))),
            None => Ok(None),
        }
    }

    /// [`GuestMemory::hold_translation`].
    pub(super) fn hold(&self) -> Option<TranslationHold> {
        match self.use_iommu {
            true => self.iommu.hold_translation(),
            false => Some(TranslationHold::nothing()),
        }
    }
}

/// Whether a bitmap by I/O virtual address keeps the marks of a range.
#[inline(always)]
fn marks_are_kept(bitmap: &impl Bitmap, iova: GuestAddress, count: usize) -> bool {
    usize::try_from(iova.0).is_ok_and(|offset| bitmap.tracks_range(offset, count))
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

/// A slice of the physical memory, and its I/O virtual address, if it is one.
type Translation<'a, M> = (VolatileSlice<'a, MS<'a, M>>, Option<GuestAddress>);

/// The slices of a translated range, each with its I/O virtual address, if it is one. It holds on to the IOTLB.
pub(super) struct TranslatedSlices<'a, M: GuestMemoryBackend, I: Iommu + 'a> {
    backend: &'a M,
    /// The address of the next slice.
    addr: GuestAddress,
    /// How many bytes are still wanted; 0 after an error.
    left: usize,
    access: Permissions,
    /// The translated ranges that are still to come; `None` while the IOMMU is off.
    pieces: Option<IotlbIterator<I::IotlbGuard<'a>>>,
    /// The slices of the range at hand.
    physical: Option<GuestMemoryBackendSliceIterator<'a, M>>,
}

impl<'a, M: GuestMemoryBackend, I: Iommu> TranslatedSlices<'a, M, I> {
    /// The next slice, when there are bytes left.
    fn step(&mut self) -> Result<Translation<'a, M>> {
        loop {
            if let Some(slice) = self.physical.as_mut().and_then(Iterator::next) {
                let (slice, iova) = (slice?, self.addr);
                let len = u64::try_from(slice.len()).unwrap_or(u64::MAX);
                // Wraps only behind the last slice of a range that ends at 2^64.
                self.addr = GuestAddress(iova.0.wrapping_add(len));
                self.left = self.left.saturating_sub(slice.len());
                return Ok((slice, self.pieces.is_some().then_some(iova)));
            }
            // An IOMMU of another crate's may have translated less than it was asked for.
            let Some(piece) = self.pieces.as_mut().and_then(Iterator::next) else {
                return Err(GuestMemoryError::IommuError(Error::CannotResolve {
                    iova_range: IovaRange {
                        base: self.addr,
                        length: self.left,
                    },
                    reason: "the translation ended early".into(),
                }));
            };
            let wanted = piece.length.min(self.left);
            self.physical = Some(GuestMemoryBackendSliceIterator::new(
                self.backend,
                piece.base,
                wanted,
                self.access,
            ));
        }
    }

    pub(super) fn next(&mut self) -> Option<Result<Translation<'a, M>>> {
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

impl<'a, M: GuestMemoryBackend + Debug, I: Iommu> Debug for TranslatedSlices<'a, M, I>
where
    I::IotlbGuard<'a>: Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TranslatedSlices")
            .field("addr", &self.addr)
            .field("left", &self.left)
            .field("access", &self.access)
            .field("pieces", &self.pieces)
            .field("physical", &self.physical)
            .finish_non_exhaustive()
    }
}
