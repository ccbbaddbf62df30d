//! [`HeldSlice`]: a slice, and the [`Hold`] that keeps its bytes mapped.

use core::fmt::{self, Debug};
use core::mem::MaybeUninit;

use super::on_demand;
use super::place::Place;
use super::{Error, Result, VolatileSlice};
use crate::access::fault::Direction;
use crate::bitmap::BitmapSlice;
use crate::xen::SharedWindow;

/// Keeps the bytes of a slice mapped, if the memory is mapped for each access.
///
/// For other memory, it is empty. Clones keep the same bytes.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    _window: Option<SharedWindow>,
}

/// A slice, and the hold that keeps its bytes mapped.
///
/// The owner of the value may also own the memory that the slice borrows from. A call that gets
/// such an owner by value may free the memory before it returns. A reference in an argument must
/// stay valid until then, and a slice of a bitmap may be a reference. `MaybeUninit` lifts that
/// requirement: its bytes need not be a valid value, so a reference among them promises nothing.
pub(crate) struct HeldSlice<'a, B: BitmapSlice> {
    /// Always initialised. Dropped before `hold`, without which its memory may not be mapped.
    slice: MaybeUninit<VolatileSlice<'a, B>>,
    hold: Hold,
}

impl<'a, B: BitmapSlice> HeldSlice<'a, B> {
    #[inline(always)]
    pub(crate) fn new(slice: VolatileSlice<'a, B>, hold: Hold) -> Self {
        Self {
            slice: MaybeUninit::new(slice),
            hold,
        }
    }

    /// Returns the slice.
    #[inline(always)]
    pub(crate) fn slice(&self) -> &VolatileSlice<'a, B> {
        // SAFETY: `slice` was initialised by `new`, and nothing else writes it. `drop` ends its
        // value, and nobody can call this method after that.
        unsafe { self.slice.assume_init_ref() }
    }

    /// Returns the first `mid` bytes and the others, or `None` if there are fewer than `mid`.
    #[cfg(all(feature = "rawfd", unix))]
    pub(crate) fn split_at(&self, mid: usize) -> Option<(Self, Self)> {
        let (head, tail) = self.slice().split_at(mid).ok()?;
        let head = Self::new(head, self.hold.clone());
        Some((head, Self::new(tail, self.hold.clone())))
    }
}

impl<B: BitmapSlice> Drop for HeldSlice<'_, B> {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `slice` was initialised by `new`, and nothing else writes it. It is dropped only
        // here, once.
        unsafe { self.slice.assume_init_drop() }
    }
}

impl<B: BitmapSlice> Debug for HeldSlice<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldSlice")
            .field("slice", self.slice())
            .field("hold", &self.hold)
            .finish()
    }
}

impl<B: BitmapSlice> VolatileSlice<'_, B> {
    /// Returns whether the memory has a host address: it is not mapped for each access.
    #[inline]
    pub(crate) fn has_host_address(&self) -> bool {
        self.addr.host().is_some()
    }

    /// Returns the slice as mapped memory, and the hold that keeps it mapped.
    ///
    /// If the memory is mapped for each access, perhaps only a part of it can be mapped. The slice
    /// then ends before the first byte that cannot be mapped, and the error is that of this byte.
    ///
    /// # Errors
    ///
    /// Returns an error if the first byte cannot be mapped.
    ///
    /// # Safety
    ///
    /// The slice, and all slices that are made from it, must be dropped before the last clone of
    /// the hold.
    #[inline(always)]
    pub(crate) unsafe fn hold(self, direction: Direction) -> Result<(Self, Hold, Option<Error>)> {
        if self.addr.on_demand().is_some() {
            // SAFETY: the caller drops the slice and its parts before the last clone of the hold
            // (this function's contract).
            return unsafe { self.hold_mapping(direction) };
        }
        Ok((self, Hold { _window: None }, None))
    }

    /// Maps the slice for [`hold`](Self::hold).
    ///
    /// # Safety
    ///
    /// The slice, and all slices that are made from it, must be dropped before the last clone of
    /// the hold.
    #[cold]
    #[inline(never)]
    unsafe fn hold_mapping(mut self, direction: Direction) -> Result<(Self, Hold, Option<Error>)> {
        let Some(memory) = self.addr.on_demand().filter(|_| self.size != 0) else {
            return Ok((self, Hold { _window: None }, None));
        };
        let window = on_demand::window(memory, self.addr.number(), self.size, direction);
        let (window, inaccessible) = window?;
        self.addr = Place::new(window.as_ptr(), None);
        self.size = window.size();
        let _window = Some(SharedWindow::from(window));
        Ok((self, Hold { _window }, inaccessible))
    }
}
