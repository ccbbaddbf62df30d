//! Host memory that the guest may change at any moment: slices, references and arrays.
//!
//! ```text
//!   VolatileSlice                      a host address, a length, and a dirty bitmap
//!   │
//!   ├─ subslice, offset, split_at   ─► VolatileSlice       a part of it
//!   ├─ get_ref::<T>(offset)         ─► VolatileRef         one value of type T
//!   ├─ get_array_ref::<T>(offset, n)─► VolatileArrayRef    n values of type T
//!   └─ ptr_guard, ptr_guard_mut     ─► PtrGuard(Mut)       raw pointers, for system calls
//! ```
//!
//! Rust references cannot point to these bytes, because the guest's CPUs may write them at any
//! moment. All accesses go through methods. The methods follow the crate's
//! [memory model](crate#memory-model), and mark the pages that they write. The memory model does
//! not cover accesses through a raw pointer or
//! [`get_atomic_ref`](VolatileMemory::get_atomic_ref).
//!
//! Lengths and offsets are in bytes. This module makes no system calls.
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Bytes, VolatileMemory, VolatileSlice};
//!
//! let mut buf = [0u8; 16];
//! let slice = VolatileSlice::from(buf.as_mut_slice());
//! slice.write_slice(b"virtio", 2)?;
//! let index = slice.get_ref::<u16>(0)?;
//! index.store(7);
//! assert_eq!(index.load(), 7);
//! # Ok::<(), vm_memory::VolatileMemoryError>(())
//! ```

mod array_ref;
mod atomic;
mod hold;
mod location;
mod on_demand;
mod ptr_guard;
mod read_modify_write;
mod slice;
mod slice_bytes;
mod value_ref;

#[cfg(test)]
mod tests;

use core::mem::{align_of, size_of};
use core::ptr::NonNull;

pub use array_ref::VolatileArrayRef;
pub(crate) use hold::{HeldSlice, Hold};
pub use ptr_guard::{PtrGuard, PtrGuardMut};
pub use slice::VolatileSlice;
pub use value_ref::VolatileRef;

use location::Location;

use crate::access::Fault;
use crate::atomic_integer::AtomicInteger;
use crate::bitmap::{Bitmap, BS};
use crate::value::ByteValued;

/// The error of an access to volatile memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The access starts or ends past the end of the memory.
    #[error("0x{addr:x} is past the end of the memory")]
    OutOfBounds {
        /// The first offset past the end. In an error of [`VolatileSlice::offset`], a host address.
        addr: usize,
    },
    /// The sum of an address and an offset exceeds the address space.
    #[error("0x{base:x} + 0x{offset:x} is past the end of the address space")]
    Overflow {
        /// The address.
        base: usize,
        /// The offset.
        offset: usize,
    },
    /// The array is larger than the address space, or the access has no atomic form.
    ///
    /// An access to a value has no atomic form if the atomic integer of the value
    /// ([`AtomicAccess`](crate::AtomicAccess)) has another size. A read-modify-write of a value
    /// that no register holds has none either.
    #[error(
        "cannot access {nelements} elements of {size} bytes as one array or one atomic integer"
    )]
    TooBig {
        /// The number of elements.
        nelements: usize,
        /// The size of an element in bytes.
        size: usize,
    },
    /// The value is not aligned.
    #[error("address 0x{addr:x} is not aligned to {alignment} bytes")]
    Misaligned {
        /// The host address.
        addr: usize,
        /// The required alignment in bytes.
        alignment: usize,
    },
    /// A stream failed, or the access [faulted](crate::fault).
    ///
    /// The number of a fault is `EFAULT`. If a page of a Xen guest cannot be mapped, it is that of
    /// the mapping. A page that is not granted is `EINVAL`.
    #[error("transfer from or to guest memory failed: {0}")]
    IOError(#[source] std::io::Error),
    /// Only the first bytes of the range were moved.
    #[error("only {completed} of {expected} bytes could be moved")]
    PartialBuffer {
        /// The requested number of bytes.
        expected: usize,
        /// The number of bytes moved.
        completed: usize,
    },
}

impl Error {
    /// Creates the error of an access that faulted.
    pub(crate) fn from_fault(fault: Fault) -> Self {
        Error::IOError(std::io::Error::from_raw_os_error(fault.errno()))
    }
}

/// The result of an access to volatile memory.
pub type Result<T> = core::result::Result<T, Error>;

/// Returns `base + offset`.
///
/// # Examples
///
/// ```
/// use vm_memory::volatile_memory::compute_offset;
///
/// assert_eq!(compute_offset(4, 8).ok(), Some(12));
/// assert!(compute_offset(usize::MAX, 1).is_err());
/// ```
///
/// # Errors
///
/// Returns [`Error::Overflow`] if the sum exceeds `usize::MAX`.
#[inline]
pub fn compute_offset(base: usize, offset: usize) -> Result<usize> {
    base.checked_add(offset)
        .ok_or(Error::Overflow { base, offset })
}

/// Memory that can be accessed through [`VolatileSlice`]s.
///
/// [`VolatileSlice`] and [`MmapRegion`](crate::MmapRegion) implement it.
///
/// # Examples
///
/// ```
/// use vm_memory::{VolatileMemory, VolatileSlice};
///
/// let mut buf = [0u8; 32];
/// let memory = VolatileSlice::from(buf.as_mut_slice());
/// memory.get_ref::<u32>(8)?.store(7);
/// assert_eq!(memory.get_ref::<u32>(8)?.load(), 7);
/// assert!(memory.get_ref::<u32>(30).is_err());
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
pub trait VolatileMemory {
    /// The dirty bitmap.
    type B: Bitmap;

    /// Returns the size in bytes.
    fn len(&self) -> usize;

    /// Returns whether the size is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the `count` bytes at `offset` as a slice.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte is outside the memory.
    fn get_slice(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_, BS<'_, Self::B>>>;

    /// Returns the whole memory as a slice.
    ///
    /// # Panics
    ///
    /// Panics if [`get_slice`](Self::get_slice) returns an error for the whole memory. No
    /// implementation in this crate does.
    #[expect(
        clippy::expect_used,
        reason = "the signature has no error, and the range is the whole memory"
    )]
    fn as_volatile_slice(&self) -> VolatileSlice<'_, BS<'_, Self::B>> {
        self.get_slice(0, self.len())
            .expect("get_slice must accept the whole memory")
    }

    /// Returns a reference to the value of type `T` at `offset`, which need not be aligned.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte of the value is outside the memory.
    fn get_ref<T: ByteValued>(&self, offset: usize) -> Result<VolatileRef<'_, T, BS<'_, Self::B>>> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        // SAFETY: `slice_of_exactly` returned `size_of::<T>()` bytes. While `self` is borrowed,
        // they are mapped, no Rust reference covers them, and other accesses are atomic or
        // invisible to the compiler (contract of `VolatileSlice::with_bitmap`).
        Ok(unsafe { slice.into_ref() })
    }

    /// Returns a reference to an array of `n` values of type `T` at `offset`.
    ///
    /// # Errors
    ///
    /// - [`Error::TooBig`] if the array is larger than `isize::MAX` bytes.
    /// - Another error if a byte of the array is outside the memory.
    fn get_array_ref<T: ByteValued>(
        &self,
        offset: usize,
        n: usize,
    ) -> Result<VolatileArrayRef<'_, T, BS<'_, Self::B>>> {
        let size = size_of::<T>();
        // No object is larger than `isize::MAX` bytes, and no array has more elements.
        let countable = |number: &usize| isize::try_from(*number).is_ok();
        let count = n
            .checked_mul(size)
            .filter(|count| countable(count) && countable(&n));
        let count = count.ok_or(Error::TooBig { nelements: n, size })?;
        let slice = slice_of_exactly(self, offset, count)?;
        // SAFETY: `slice_of_exactly` returned the bytes of `n` values, at most `isize::MAX`
        // (checked above). While `self` is borrowed, they are mapped, no Rust reference covers
        // them, and other accesses are atomic or invisible to the compiler (contract of
        // `VolatileSlice::with_bitmap`).
        Ok(unsafe { slice.into_array_ref(n) })
    }

    /// Returns a plain reference to the value of type `T` at `offset`.
    ///
    /// # Errors
    ///
    /// - [`Error::Misaligned`] if the host address is not aligned for `T`.
    /// - [`Error::IOError`] with `EOPNOTSUPP` if the memory is mapped for each access (feature
    ///   `xen`).
    /// - Another error if a byte of the value is outside the memory.
    ///
    /// # Safety
    ///
    /// While the reference exists, nothing may write the value: no other thread, no device, and not
    /// the guest.
    #[expect(
        clippy::disallowed_methods,
        reason = "the contract of the method excludes writes by others"
    )]
    unsafe fn aligned_as_ref<T: ByteValued>(&self, offset: usize) -> Result<&T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        let value = referable::<T>(slice.addr)?;
        // SAFETY: 1. `slice_of_exactly` returned `size_of::<T>()` bytes, which are mapped while
        // `self` is borrowed. 2. `referable` returned their address, aligned and not null, or
        // another such address for a value without bytes. 3. Any bytes are a `T` (contract of
        // `ByteValued`). 4. Nothing writes them while the reference exists (this method's
        // contract).
        Ok(unsafe { value.as_ref() })
    }

    /// Returns a plain mutable reference to the value of type `T` at `offset`.
    ///
    /// Writes through the reference are not marked dirty.
    ///
    /// # Errors
    ///
    /// - [`Error::Misaligned`] if the host address is not aligned for `T`.
    /// - [`Error::IOError`] with `EOPNOTSUPP` if the memory is mapped for each access (feature
    ///   `xen`).
    /// - Another error if a byte of the value is outside the memory.
    ///
    /// # Safety
    ///
    /// While the reference exists, nothing else may read or write the value: no other thread,
    /// device or guest, and no second reference from this method.
    #[expect(
        clippy::disallowed_methods,
        clippy::mut_from_ref,
        reason = "the contract of the method makes the reference unique"
    )]
    unsafe fn aligned_as_mut<T: ByteValued>(&self, offset: usize) -> Result<&mut T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        let mut value = referable::<T>(slice.addr)?;
        // SAFETY: 1. `slice_of_exactly` returned `size_of::<T>()` bytes, which are mapped while
        // `self` is borrowed. 2. `referable` returned their address, aligned and not null, or
        // another such address for a value without bytes. 3. Any bytes are a `T` (contract of
        // `ByteValued`). 4. Nothing else accesses them while the reference exists (this method's
        // contract).
        Ok(unsafe { value.as_mut() })
    }

    /// Returns a reference to the atomic integer at `offset`.
    ///
    /// Prefer [`Bytes::load`](crate::Bytes::load) and [`Bytes::store`](crate::Bytes::store). This
    /// method is safe to call for compatibility with 0.18.0, but it is not sound by itself:
    ///
    /// - Concurrent atomic accesses of different sizes to the same bytes are a data race in Rust.
    /// - A store to memory that is mapped read-only is undefined behaviour.
    /// - Stores are not marked dirty.
    /// - An access to a missing page kills the process, even with the [fault
    ///   handler](crate::fault).
    ///
    /// # Errors
    ///
    /// - [`Error::Misaligned`] if the host address is not aligned for `T`.
    /// - [`Error::IOError`] with `EOPNOTSUPP` if the memory is mapped for each access (feature
    ///   `xen`). Use [`Bytes::load`](crate::Bytes::load) and [`Bytes::store`](crate::Bytes::store).
    /// - Another error if a byte of the integer is outside the memory.
    #[expect(
        clippy::disallowed_methods,
        reason = "a reference to an atomic integer is not a copy of guest bytes"
    )]
    fn get_atomic_ref<T: AtomicInteger>(&self, offset: usize) -> Result<&T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        let integer = referable::<T>(slice.addr)?;
        // SAFETY: 1. `slice_of_exactly` returned `size_of::<T>()` bytes, which are mapped while
        // `self` is borrowed. 2. `referable` returned their address, aligned and not null, or
        // another such address for a value without bytes. 3. Any bytes are a `T`, and they may
        // change under a shared reference (contract of `AtomicInteger`).
        Ok(unsafe { integer.as_ref() })
    }

    /// Returns `base + offset`, which must not exceed the size of the memory.
    ///
    /// # Errors
    ///
    /// - [`Error::Overflow`] if the sum exceeds `usize::MAX`.
    /// - [`Error::OutOfBounds`] if the sum exceeds the size of the memory.
    #[inline]
    fn compute_end_offset(&self, base: usize, offset: usize) -> Result<usize> {
        match base.checked_add(offset) {
            Some(end) if end <= self.len() => Ok(end),
            _ => Err(no_such_end(base, offset)),
        }
    }
}

/// Returns the error of [`VolatileMemory::compute_end_offset`].
#[cold]
fn no_such_end(base: usize, offset: usize) -> Error {
    match compute_offset(base, offset) {
        Ok(end) => Error::OutOfBounds { addr: end },
        Err(error) => error,
    }
}

/// Returns a slice of exactly `count` bytes.
///
/// An implementation of [`VolatileMemory`] outside this crate may return another length, which is
/// an error here.
#[inline]
fn slice_of_exactly<M: VolatileMemory + ?Sized>(
    memory: &M,
    offset: usize,
    count: usize,
) -> Result<VolatileSlice<'_, BS<'_, M::B>>> {
    let slice = memory.get_slice(offset, count)?;
    if slice.len() != count {
        return Err(Error::PartialBuffer {
            expected: count,
            completed: slice.len(),
        });
    }
    Ok(slice)
}

/// Returns the pointer of a reference to a `T` at `location`, aligned and not null.
///
/// A slice without bytes may begin at null. A value without bytes may be at any aligned address, so
/// the pointer of its reference is another one.
///
/// # Errors
///
/// - [`Error::Misaligned`] if `location` is not aligned for `T`.
/// - [`Error::OutOfBounds`] if it is null, and `T` has bytes.
/// - [`Error::IOError`] with `EOPNOTSUPP` if the memory is mapped for each access, and `T` has
///   bytes: nothing would keep it mapped for the reference.
#[inline]
fn referable<T>(location: Location<'_>) -> Result<NonNull<T>> {
    check_alignment(location, align_of::<T>())?;
    if size_of::<T>() == 0 {
        return Ok(NonNull::dangling());
    }
    let Some(addr) = location.host() else {
        return Err(not_referable());
    };
    NonNull::new(addr.cast()).ok_or(Error::OutOfBounds { addr: 0 })
}

/// Returns the error of a reference to memory that is mapped for each access.
#[cold]
fn not_referable() -> Error {
    Error::IOError(crate::xen::unsupported())
}

/// Returns an error if `location` is not aligned to `alignment`.
#[inline(always)]
fn check_alignment(location: Location<'_>, alignment: usize) -> Result<()> {
    let addr = location.addr();
    // An alignment is a power of two: a mask is faster than a division.
    if addr & alignment.wrapping_sub(1) != 0 {
        return Err(misaligned(addr, alignment));
    }
    Ok(())
}

#[cold]
fn misaligned(addr: usize, alignment: usize) -> Error {
    Error::Misaligned { addr, alignment }
}
