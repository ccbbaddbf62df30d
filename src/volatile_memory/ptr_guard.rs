//! [`PtrGuard`] and [`PtrGuardMut`]: raw pointers to the bytes of a slice.

use std::io;

use super::location::Location;
#[cfg(all(feature = "rawfd", unix))]
use super::{on_demand, Result};
use crate::access::fault::Direction;
use crate::xen::{Inaccessible, MappedGrants};

/// A pointer for reading from volatile memory, valid as long as the memory.
///
/// Pass it to a system call, or to code that accesses shared memory safely. The
/// [memory model](crate#memory-model) does not cover accesses through the pointer.
///
/// # Memory that is mapped for each access
///
/// With the feature `xen`, memory may have no host address (`MmapXenFlags::NO_ADVANCE_MAP`). The
/// guard then maps it, and the pointer is valid only as long as the guard. Keep the guard until the
/// last access, and drop it before the buffer is returned to the guest. A guard that is leaked
/// ([`mem::forget`](core::mem::forget)) keeps the guest's pages mapped, and the file open.
///
/// The mapping may fail. [`VolatileSlice::try_ptr_guard`](crate::VolatileSlice::try_ptr_guard)
/// returns the error. [`ptr_guard`](crate::VolatileSlice::ptr_guard) cannot return it. Its guard
/// then points to the same number of inaccessible bytes: a system call on them returns `EFAULT`,
/// and any other access raises SIGSEGV. [`error`](Self::error) then returns the error. Code that
/// does not check it, such as that of another crate, should get slices of
/// [`GuestMemory::held`](crate::GuestMemory::held).
///
/// # Examples
///
/// ```
/// use vm_memory::VolatileSlice;
///
/// let mut buf = *b"guest";
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// let guard = slice.ptr_guard();
/// assert_eq!(guard.len(), 5);
/// // SAFETY: the pointer is valid for five bytes, and no guest changes them.
/// assert_eq!(unsafe { guard.as_ptr().read() }, b'g');
/// ```
#[derive(Debug)]
pub struct PtrGuard {
    addr: *mut u8,
    len: usize,
    /// The mapping of memory that has no host address.
    mapping: Option<GuardMapping>,
}

/// The mapping of a guard.
#[derive(Debug)]
enum GuardMapping {
    /// The guest's pages.
    Granted { _grants: MappedGrants },
    /// Addresses that are not accessible, and the reason.
    Failed(Inaccessible),
}

impl PtrGuard {
    /// Creates a guard of `len` bytes, which cannot fail: see [`error`](Self::error).
    #[inline]
    pub(super) fn new(location: Location<'_>, len: usize, direction: Direction) -> Self {
        let Some(memory) = location.on_demand() else {
            return Self::mapped(location.as_ptr(), len);
        };
        Self::try_new(location, len, direction).unwrap_or_else(|error| {
            let inaccessible = memory.inaccessible(len, error);
            Self {
                addr: inaccessible.as_ptr(),
                len,
                mapping: Some(GuardMapping::Failed(inaccessible)),
            }
        })
    }

    /// Creates a guard of `len` bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if the memory is mapped for each access, and that fails.
    #[inline]
    pub(super) fn try_new(
        location: Location<'_>,
        len: usize,
        direction: Direction,
    ) -> io::Result<Self> {
        if let Some(memory) = location.on_demand() {
            if len == 0 {
                return Ok(Self::mapped(core::ptr::NonNull::dangling().as_ptr(), 0));
            }
            let grants = memory.map(location.addr(), len, direction)?;
            return Ok(Self::of_grants(grants));
        }
        Ok(Self::mapped(location.as_ptr(), len))
    }

    /// Creates a guard of the first of `len` bytes: of all, unless they must be mapped and that
    /// fails.
    ///
    /// # Errors
    ///
    /// Returns an error if the first byte cannot be mapped.
    #[cfg(all(feature = "rawfd", unix))]
    #[inline]
    pub(super) fn first(location: Location<'_>, len: usize, direction: Direction) -> Result<Self> {
        if let (Some(memory), true) = (location.on_demand(), len != 0) {
            let (grants, _) = on_demand::map_until_drop(memory, location.addr(), len, direction)?;
            return Ok(Self::of_grants(grants));
        }
        Self::try_new(location, len, direction).map_err(super::Error::IOError)
    }

    /// Creates a guard of memory that is mapped while it is borrowed.
    #[inline]
    fn mapped(addr: *mut u8, len: usize) -> Self {
        Self {
            addr,
            len,
            mapping: None,
        }
    }

    fn of_grants(grants: MappedGrants) -> Self {
        Self {
            addr: grants.as_ptr(),
            len: grants.size(),
            mapping: Some(GuardMapping::Granted { _grants: grants }),
        }
    }

    /// Returns the pointer to the first byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.addr
    }

    /// Returns the size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the reason why the memory could not be mapped, or `None` if the pointer is valid.
    ///
    /// Without the feature `xen`, and for memory that is mapped in advance, it returns `None`.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut buf = [0u8; 4];
    /// let guard = VolatileSlice::from(buf.as_mut_slice()).ptr_guard();
    /// assert!(guard.error().is_none());
    /// ```
    pub fn error(&self) -> Option<&io::Error> {
        match &self.mapping {
            Some(GuardMapping::Failed(inaccessible)) => Some(inaccessible.error()),
            _ => None,
        }
    }
}

/// A pointer for writing to volatile memory, valid as long as the memory.
///
/// The [memory model](crate#memory-model) does not cover accesses through the pointer. Writes are
/// not marked dirty: mark them in the [`bitmap`](crate::VolatileSlice::bitmap), after the write.
///
/// With the feature `xen`, the pointer may be valid only as long as the guard: see
/// [`PtrGuard`](PtrGuard#memory-that-is-mapped-for-each-access).
///
/// # Examples
///
/// ```
/// use vm_memory::bitmap::Bitmap;
/// use vm_memory::VolatileSlice;
///
/// let mut buf = [0u8; 4];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// let guard = slice.ptr_guard_mut();
/// // SAFETY: the pointer is valid for four bytes, and no guest accesses them.
/// unsafe { guard.as_ptr().write_bytes(7, guard.len()) };
/// slice.bitmap().mark_dirty(0, guard.len());
/// assert_eq!(buf, [7; 4]);
/// ```
#[derive(Debug)]
pub struct PtrGuardMut(PtrGuard);

impl PtrGuardMut {
    /// Creates a guard for writing. `guard` is one for [`Direction::Write`].
    #[inline]
    pub(super) fn new(guard: PtrGuard) -> Self {
        Self(guard)
    }

    /// Returns the pointer to the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.addr
    }

    /// Returns the size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Returns the reason why the memory could not be mapped, or `None` if the pointer is valid.
    ///
    /// Without the feature `xen`, and for memory that is mapped in advance, it returns `None`.
    pub fn error(&self) -> Option<&io::Error> {
        self.0.error()
    }
}
