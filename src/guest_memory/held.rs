//! [`HeldMemory`]: a view of guest memory whose slices stay mapped.

use core::fmt::{self, Debug};
use core::iter::FusedIterator;
use std::io::{self, ErrorKind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::hold::{hold_for, TranslationHold};
use super::{
    Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions, Refusal, Result,
};
use crate::bitmap::BS;
use crate::volatile_memory::{Hold, VolatileSlice};

/// The maximum number of slices that a view keeps mapped.
///
/// The driver decides how scattered a request is, and each slice may take a VMA.
const MAX_SLICES: usize = 1024;

/// A view of guest memory whose slices stay mapped until the view is dropped.
///
/// [`GuestMemory::held`] creates it. Give it to code that takes slices of the memory and uses their
/// pointers, such as the `Reader` and the `Writer` of virtio-queue. Create one for each request.
///
/// - With the feature `xen`, memory may be mapped for each access. A slice of this view is mapped
///   once, and [`get_slices`](GuestMemory::get_slices) returns the error of a page that is not
///   granted. A guard of the memory itself would have an inaccessible pointer for such a page. At
///   most 1024 slices are mapped.
/// - Behind an IOMMU, the view keeps the translation in use after the first call of `get_slices`.
///   An invalidation then completes only after the view is dropped.
/// - For other memory, it does nothing, and takes no memory.
///
/// Accesses by [`Bytes`](crate::Bytes) in one region keep nothing mapped.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
///
/// // For virtio-queue: `Reader::new(&request, chain.clone())?`.
/// let request = memory.held();
/// let mut pointers = Vec::new();
/// for slice in request.get_slices(GuestAddress(0x800), 0x100, Permissions::Read)? {
///     pointers.push(slice?.ptr_guard().as_ptr());
/// }
/// assert_eq!(pointers.len(), 1);
/// // The pointers are valid until here.
/// drop(request);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "pin")]
pub struct HeldMemory<'m, M: ?Sized> {
    memory: &'m M,
    kept: Mutex<HeldState>,
}

/// The state that a view keeps. It only grows.
#[derive(Default)]
struct HeldState {
    pages: Vec<Hold>,
    /// Taken before the first range is translated, so it covers all later ones.
    translation: Option<TranslationHold>,
}

impl<'m, M: GuestMemory + ?Sized> HeldMemory<'m, M> {
    pub(super) fn new(memory: &'m M) -> Self {
        Self {
            memory,
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, HeldState> {
        // Each change is complete when the lock is released, even by a panic.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the translation of a range in use. The caller translates the range next.
    fn keep_translation(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<()> {
        if self.kept().translation.is_some() {
            return Ok(());
        }
        // Without the lock: the IOMMU may wait for other threads.
        let hold = hold_for(self.memory, [(addr, count)], access)?;
        self.kept().translation.get_or_insert(hold);
        Ok(())
    }

    /// Maps a slice until the view is dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if the slice is not mapped as a whole.
    fn keep<'a>(
        &'a self,
        slice: VolatileSlice<'a, BS<'a, M::Bitmap>>,
        access: Permissions,
    ) -> Result<VolatileSlice<'a, BS<'a, M::Bitmap>>> {
        if slice.has_host_address() {
            return Ok(slice);
        }
        // Before the slice is mapped, which is expensive. Without the lock: dropping a slice may be
        // code of another crate.
        drop(self.room()?);
        let (held, inaccessible) = slice.hold(access.direction())?;
        if let Some(error) = inaccessible {
            return Err(error.into());
        }
        // Other threads may have mapped slices since.
        let mut kept = self.room()?;
        // SAFETY: the slice and its parts live at most for `'a`, while `self` is borrowed. The hold
        // goes into `kept`, which has room, only grows, and is dropped with `self`.
        let (slice, hold) = unsafe { held.into_parts() };
        kept.pages.push(hold);
        Ok(slice)
    }

    /// Locks the state, which then has room for one more slice.
    ///
    /// # Errors
    ///
    /// Returns an error if the maximum number of slices is mapped, or if there is no memory.
    fn room(&self) -> Result<MutexGuard<'_, HeldState>> {
        let mut kept = self.kept();
        if kept.pages.len() >= MAX_SLICES {
            return Err(too_many());
        }
        let reserved = kept.pages.try_reserve(1);
        reserved.map_err(|error| Error::IOError(io::Error::new(ErrorKind::OutOfMemory, error)))?;
        Ok(kept)
    }
}

#[cold]
fn too_many() -> Error {
    Error::IOError(io::Error::new(
        ErrorKind::InvalidInput,
        format!(
            "held memory already has {MAX_SLICES} slices mapped, which is the limit; use a view \
             for each request"
        ),
    ))
}

impl<M: GuestMemory + ?Sized> GuestMemory for HeldMemory<'_, M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = M::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.memory.check_range(addr, count, access)
    }

    /// Returns the slices, which are mapped until the view is dropped.
    ///
    /// # Errors
    ///
    /// In addition to those of the memory, [`Error::IOError`] of the kind `Unsupported` behind an
    /// IOMMU that cannot keep translations in use. If a page of a Xen guest cannot be mapped,
    /// the iterator returns the system's error instead of the slice.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        self.keep_translation(addr, count, access)?;
        let memory: &'a M = self.memory;
        Ok(HeldSlices {
            slices: Some(memory.get_slices(addr, count, access)?),
            view: self,
            access,
        })
    }

    #[cold]
    fn explain(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Refusal> {
        self.memory.explain(addr, count, access)
    }

    #[inline]
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.memory.physical_memory()
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.memory.hold_translation()
    }

    // `contiguous_slice` returns `None`: it has no error for pages that cannot be mapped.

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
        let memory = self.memory;
        memory.with_contiguous_slice(addr, count, access, transfer)
    }
}

impl<M: ?Sized> Debug for HeldMemory<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldMemory").finish_non_exhaustive()
    }
}

/// The slices of a range, each of which the view keeps mapped.
struct HeldSlices<'a, 'm, M: ?Sized, I> {
    /// `None` after an error.
    slices: Option<I>,
    view: &'a HeldMemory<'m, M>,
    access: Permissions,
}

impl<'a, M, I> Iterator for HeldSlices<'a, '_, M, I>
where
    M: GuestMemory + ?Sized,
    I: GuestMemorySliceIterator<'a, BS<'a, M::Bitmap>>,
{
    type Item = Result<VolatileSlice<'a, BS<'a, M::Bitmap>>>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = self.slices.as_mut()?.next()?;
        let kept = slice.and_then(|slice| self.view.keep(slice, self.access));
        if kept.is_err() {
            self.slices = None;
        }
        Some(kept)
    }
}

impl<'a, M, I> FusedIterator for HeldSlices<'a, '_, M, I>
where
    M: GuestMemory + ?Sized,
    I: GuestMemorySliceIterator<'a, BS<'a, M::Bitmap>>,
{
}

impl<'a, M, I> GuestMemorySliceIterator<'a, BS<'a, M::Bitmap>> for HeldSlices<'a, '_, M, I>
where
    M: GuestMemory + ?Sized,
    I: GuestMemorySliceIterator<'a, BS<'a, M::Bitmap>>,
{
}
