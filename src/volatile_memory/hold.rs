//! [`HeldSlice`]: a slice, and the [`Hold`] that keeps its bytes mapped.

use core::fmt::{self, Debug};
use core::mem::{self, ManuallyDrop, MaybeUninit};
use core::ptr;

use super::location::Location;
use super::on_demand;
use super::{Error, Result, VolatileSlice};
use crate::access::fault::Direction;
use crate::bitmap::BitmapSlice;
use crate::xen::{SharedGrants, PAGE_SIZE};

/// Keeps the bytes of a slice mapped, if the memory is mapped for each access.
///
/// For other memory, it is empty. Clones keep the same bytes.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    _grants: Option<SharedGrants>,
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
    fn new(slice: VolatileSlice<'a, B>, hold: Hold) -> Self {
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

    /// Returns the slice and the hold.
    ///
    /// # Safety
    ///
    /// The slice, and all slices that are made from it, must be dropped before the last clone of
    /// the hold.
    pub(crate) unsafe fn into_parts(self) -> (VolatileSlice<'a, B>, Hold) {
        let mut this = ManuallyDrop::new(self);
        // The rest of `this` needs no drop: an empty hold keeps nothing.
        let hold = mem::replace(&mut this.hold, Hold { _grants: None });
        // SAFETY: `slice` was initialised by `new`, and nothing else writes it. Its value is moved
        // out once, since `this` is neither used again nor dropped.
        let slice = unsafe { this.slice.assume_init_read() };
        (slice, hold)
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

impl<'a, B: BitmapSlice> VolatileSlice<'a, B> {
    /// Returns whether the memory has a host address: it is not mapped for each access.
    #[inline]
    pub(crate) fn has_host_address(&self) -> bool {
        self.addr.host().is_some()
    }

    /// Returns the slice as mapped memory, with the hold that keeps it mapped.
    ///
    /// If the memory is mapped for each access, perhaps only a part of it can be mapped. The slice
    /// then ends before the first byte that cannot be mapped, and the error is that of this byte.
    ///
    /// # Errors
    ///
    /// Returns an error if the first byte cannot be mapped.
    #[inline(always)]
    pub(crate) fn hold(self, direction: Direction) -> Result<(HeldSlice<'a, B>, Option<Error>)> {
        if self.addr.on_demand().is_some() {
            return self.hold_mapping(direction);
        }
        Ok((HeldSlice::new(self, Hold { _grants: None }), None))
    }

    /// Maps the slice for [`hold`](Self::hold).
    #[cold]
    #[inline(never)]
    fn hold_mapping(mut self, direction: Direction) -> Result<(HeldSlice<'a, B>, Option<Error>)> {
        let Some(memory) = self.addr.on_demand().filter(|_| self.size != 0) else {
            // No byte is accessed. The slice must not refer to the memory: its owner may copy the
            // location out of the `HeldSlice`.
            self.addr = Location::new(ptr::without_provenance_mut(PAGE_SIZE), None);
            return Ok((HeldSlice::new(self, Hold { _grants: None }), None));
        };
        let grants = on_demand::map_until_drop(memory, self.addr.addr(), self.size, direction);
        let (grants, inaccessible) = grants?;
        self.addr = Location::new(grants.as_ptr(), None);
        self.size = grants.size();
        let _grants = Some(SharedGrants::from(grants));
        Ok((HeldSlice::new(self, Hold { _grants }), inaccessible))
    }
}

#[cfg(all(test, feature = "xen"))]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::address::GuestAddress;
    use crate::xen::{MmapXen, References};

    #[test]
    fn hold_of_empty_slice_does_not_refer_to_the_memory() {
        let references = References::of(GuestAddress(1 << 63 | 0x5400), 0x1000).unwrap();
        let device = Arc::new(File::open("/dev/null").unwrap());
        let flags = (libc::PROT_READ, libc::MAP_SHARED);
        let memory = MmapXen::new(device, 1, references, flags, false);
        let addr = ptr::without_provenance_mut(memory.offset_from_first_page(0));
        // SAFETY: the slice has no bytes.
        let slice = unsafe { VolatileSlice::with_bitmap(addr, 0, (), Some(&memory)) };
        let (held, inaccessible) = slice.hold(Direction::Read).unwrap();
        assert!(held.slice().has_host_address() && inaccessible.is_none());
        assert!(held.slice().is_empty());
    }
}
