//! [`HostRange`]: the addresses of a mapping, and the accesses that it permits.

use crate::bitmap::BitmapSlice;
use crate::guest_memory::Permissions;
use crate::volatile_memory::VolatileSlice;

/// The host addresses of a mapping, and the accesses that it permits.
///
/// A region of guest memory keeps a copy, so that the fast path finds it next to the guest address.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostRange {
    addr: *mut u8,
    size: usize,
    /// The number of bytes that the fast path may access: all, or 0 if
    /// [`PluggedBlocks`](crate::mmap::PluggedBlocks) decide.
    open: usize,
    permissions: Permissions,
}

// SAFETY: the pointer is not tied to a thread, and `HostRange` does not dereference it. Accesses go
// through the `VolatileSlice`s that `slice` makes, whose memory any thread may access at any time.
unsafe impl Send for HostRange {}
// SAFETY: no field can be changed through `&HostRange`, and the pointer is handed out by value
// only.
unsafe impl Sync for HostRange {}

impl HostRange {
    pub(super) fn new(addr: *mut u8, size: usize, permissions: Permissions) -> Self {
        Self {
            addr,
            size,
            open: size,
            permissions,
        }
    }

    #[inline(always)]
    pub(super) fn addr(&self) -> *mut u8 {
        self.addr
    }

    #[inline(always)]
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Returns the accesses that the mapping permits.
    #[inline(always)]
    pub(super) fn permissions(&self) -> Permissions {
        self.permissions
    }

    /// Closes the range to the fast path.
    ///
    /// [`slice`](Self::slice) then returns `None` for every range that is not empty.
    pub(super) fn close(&mut self) {
        self.open = 0;
    }

    /// Returns the same range, open to the fast path.
    pub(super) fn opened(self) -> Self {
        Self {
            open: self.size,
            ..self
        }
    }

    /// Returns the `count` bytes at `offset`, with the bitmap that `bitmap` returns.
    ///
    /// Returns `None` if they are not all in the mapping, or if the range is closed.
    ///
    /// # Safety
    ///
    /// The mapping must stay in place for `'a`.
    #[inline(always)]
    pub(super) unsafe fn slice<'a, S: BitmapSlice>(
        &self,
        offset: usize,
        count: usize,
        bitmap: impl FnOnce() -> S,
    ) -> Option<VolatileSlice<'a, S>> {
        if offset.checked_add(count)? > self.open {
            return None;
        }
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: 1. The bytes are mapped for `'a`. They are in the mapping, since `open` is at
        // most its size, and the mapping stays in place (contract of `slice`). 2. No Rust reference
        // covers them, except to atomics: clause 3 of `build_raw` and `with_raw_mmap_pointer`
        // excludes those of others. This crate makes them only in `get_atomic_ref`, which are to
        // atomics, and in two unsafe methods. `aligned_as_mut` excludes all other accesses, and
        // `aligned_as_ref` all writes, so a slice at most reads bytes that nothing changes. 3.
        // Other accesses of this crate are those of `access`, which are atomic to the compiler.
        Some(unsafe { VolatileSlice::with_bitmap(addr, count, bitmap(), None) })
    }
}
