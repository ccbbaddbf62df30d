//! Host memory that others write while we look: slices, references and arrays over it.
//!
//! ```text
//!   VolatileSlice         addr .. addr + len, and the bitmap that its writes are marked in
//!   │
//!   ├─ get_ref::<T>()           ─► VolatileRef       one value of type T
//!   ├─ get_array_ref::<T>(n)    ─► VolatileArrayRef  n values of type T, one after the other
//!   ├─ subslice, offset, split_at ─► VolatileSlice   a part of it
//!   └─ ptr_guard, ptr_guard_mut ─► PtrGuard(Mut)     raw pointers, for system calls and other code
//! ```
//!
//! A guest's CPUs may write these bytes at any moment. That is why there is no `&[u8]` here, and why every access goes through
//! methods: they promise not to be torn where the crate's [memory model](crate#memory-model) says so, and mark what they write.
//! What a raw pointer or [`get_atomic_ref`](VolatileMemory::get_atomic_ref) does is up to the code that uses it.
//!
//! Addresses and lengths are in bytes; offsets count from the start of the object.

mod array_ref;
mod atomic;
mod slice;
mod value_ref;

#[cfg(test)]
mod read_modify_write_tests;
#[cfg(test)]
mod tests;

use core::mem::{align_of, size_of};

pub use array_ref::VolatileArrayRef;
pub use slice::VolatileSlice;
pub use value_ref::VolatileRef;

use crate::access::Fault;
use crate::atomic_integer::AtomicInteger;
use crate::bitmap::{Bitmap, BS};
use crate::value::ByteValued;

/// What is wrong with an access to volatile memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The access begins or ends behind the memory.
    #[error("address 0x{addr:x} is out of bounds")]
    OutOfBounds {
        /// The first offset (or, from [`VolatileSlice::offset`], host address) that is outside.
        addr: usize,
    },
    /// A sum of an address and an offset is greater than the address space.
    #[error("0x{base:x} + 0x{offset:x} is past the end of the address space")]
    Overflow {
        /// The address.
        base: usize,
        /// The offset that was added.
        offset: usize,
    },
    /// An array has more bytes than the address space.
    #[error("{nelements} elements of {size} bytes are more than the address space holds")]
    TooBig {
        /// The number of elements.
        nelements: usize,
        /// The size of one, in bytes.
        size: usize,
    },
    /// The value does not lie at its alignment.
    #[error("address 0x{addr:x} is not aligned to {alignment} bytes")]
    Misaligned {
        /// The host address.
        addr: usize,
        /// The alignment that the type asks for, in bytes.
        alignment: usize,
    },
    /// A stream or the system answered with an error.
    #[error("{0}")]
    IOError(std::io::Error),
    /// Not everything could be moved.
    #[error("only {completed} of {expected} bytes could be moved")]
    PartialBuffer {
        /// How many bytes were to be moved.
        expected: usize,
        /// How many were, from the first on.
        completed: usize,
    },
}

/// "Bad address": the number of the error on every Unix.
const EFAULT: i32 = 14;

impl Error {
    /// The error that an access reports which met a page that is not there.
    pub(crate) fn from_fault(fault: Fault) -> Self {
        let _ = fault;
        Error::IOError(std::io::Error::from_raw_os_error(EFAULT))
    }
}

/// What the methods of this module return.
pub type Result<T> = core::result::Result<T, Error>;

/// Returns `base + offset`.
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
/// [`Error::Overflow`] if the sum does not fit.
#[inline]
pub fn compute_offset(base: usize, offset: usize) -> Result<usize> {
    base.checked_add(offset)
        .ok_or(Error::Overflow { base, offset })
}

/// Memory that is accessed through [`VolatileSlice`]s.
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
    /// What marks the memory's pages dirty.
    type B: Bitmap;

    /// Returns the size in bytes.
    fn len(&self) -> usize;

    /// Returns whether the size is 0.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the `count` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// If they do not all lie in the memory.
    fn get_slice(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_, BS<'_, Self::B>>>;

    /// Returns the whole of the memory as a slice.
    ///
    /// # Panics
    ///
    /// If [`get_slice`](Self::get_slice) refuses the whole of the memory, which no implementation in this crate does.
    #[expect(
        clippy::expect_used,
        reason = "the signature leaves no other way, and the range is the memory's own"
    )]
    fn as_volatile_slice(&self) -> VolatileSlice<'_, BS<'_, Self::B>> {
        self.get_slice(0, self.len())
            .expect("a memory gives out the whole of itself")
    }

    /// Returns a reference to the value of type `T` at `offset`, which need not be aligned.
    ///
    /// # Errors
    ///
    /// If the value does not lie in the memory.
    fn get_ref<T: ByteValued>(&self, offset: usize) -> Result<VolatileRef<'_, T, BS<'_, Self::B>>> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        // SAFETY: the slice has as many bytes as a `T` (just checked), and lives as long as the result.
        Ok(unsafe { VolatileRef::with_bitmap(slice.as_mut_ptr(), slice.into_bitmap(), None) })
    }

    /// Returns a reference to `n` values of type `T`, one after the other from `offset` on.
    ///
    /// # Errors
    ///
    /// If they do not all lie in the memory.
    fn get_array_ref<T: ByteValued>(
        &self,
        offset: usize,
        n: usize,
    ) -> Result<VolatileArrayRef<'_, T, BS<'_, Self::B>>> {
        let size = size_of::<T>();
        // No object is larger than `isize::MAX`, and no array longer.
        let countable = |number: &usize| isize::try_from(*number).is_ok();
        let count = n
            .checked_mul(size)
            .filter(|count| countable(count) && countable(&n));
        let count = count.ok_or(Error::TooBig { nelements: n, size })?;
        let slice = slice_of_exactly(self, offset, count)?;
        // SAFETY: the slice has as many bytes as `n` values of type `T` (just checked), and lives as long as the result.
        Ok(unsafe {
            VolatileArrayRef::with_bitmap(slice.as_mut_ptr(), n, slice.into_bitmap(), None)
        })
    }

    /// Returns a plain reference to the value of type `T` at `offset`. Nothing marks or orders what is read through it.
    ///
    /// # Errors
    ///
    /// If the value does not lie in the memory, or not at its alignment.
    ///
    /// # Safety
    ///
    /// Nobody may write the value as long as the reference lives: no other thread, no device and no guest.
    unsafe fn aligned_as_ref<T: ByteValued>(&self, offset: usize) -> Result<&T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        slice.check_alignment(align_of::<T>())?;
        // SAFETY: 1. As many bytes as a `T` (just checked), mapped as long as `self` is borrowed. 2. Aligned (just checked). 3. Any bytes
        // are a `T`. 4. Nobody writes them meanwhile (the caller's contract).
        Ok(unsafe { &*slice.as_mut_ptr().cast::<T>() })
    }

    /// Returns a plain reference to the value of type `T` at `offset`, to be changed in place. Nothing marks or orders what is
    /// written through it.
    ///
    /// # Errors
    ///
    /// If the value does not lie in the memory, or not at its alignment.
    ///
    /// # Safety
    ///
    /// Nobody else may read or write the value as long as the reference lives: no other thread, no device and no guest, and
    /// no second reference from this method.
    #[expect(
        clippy::mut_from_ref,
        reason = "the memory is shared; that this reference is the only one is the caller's contract"
    )]
    unsafe fn aligned_as_mut<T: ByteValued>(&self, offset: usize) -> Result<&mut T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        slice.check_alignment(align_of::<T>())?;
        // SAFETY: as in `aligned_as_ref`, and nobody else accesses the bytes meanwhile (the caller's contract).
        Ok(unsafe { &mut *slice.as_mut_ptr().cast::<T>() })
    }

    /// Returns a reference to the atomic integer at `offset`.
    ///
    /// The one method of this crate's that is safe to call and not sound by itself: 0.18.0 has it so. To the language, atomics of different sizes on the
    /// same bytes race with each other, and one that is written to memory that cannot be is undefined; [`Bytes::load`](crate::Bytes::load) and
    /// [`Bytes::store`](crate::Bytes::store) are neither. Nothing marks what is written through it, and where its page is gone the process is killed,
    /// whatever is [installed](crate::fault).
    ///
    /// # Errors
    ///
    /// If the integer does not lie in the memory, or not at its alignment.
    fn get_atomic_ref<T: AtomicInteger>(&self, offset: usize) -> Result<&T> {
        let slice = slice_of_exactly(self, offset, size_of::<T>())?;
        slice.check_alignment(align_of::<T>())?;
        // SAFETY: 1. As many bytes as a `T` (just checked), mapped as long as `self` is borrowed. 2. Aligned (just checked). 3. Any bytes are
        // a `T`, and all of it may change under a shared reference (the contract of `AtomicInteger`).
        Ok(unsafe { &*slice.as_mut_ptr().cast::<T>() })
    }

    /// Returns `base + offset`, if that is no greater than the size of the memory.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] if the sum does not fit, [`Error::OutOfBounds`] if it is greater than the size.
    #[inline]
    fn compute_end_offset(&self, base: usize, offset: usize) -> Result<usize> {
        match base.checked_add(offset) {
            Some(end) if end <= self.len() => Ok(end),
            _ => Err(no_such_end(base, offset)),
        }
    }
}

/// What is wrong with an end that is not in memory.
#[cold]
fn no_such_end(base: usize, offset: usize) -> Error {
    match compute_offset(base, offset) {
        Ok(end) => Error::OutOfBounds { addr: end },
        Err(error) => error,
    }
}

/// Returns a slice of exactly `count` bytes, whatever an implementation of [`VolatileMemory`] outside this crate hands out.
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

/// A pointer to bytes of a [`VolatileSlice`], valid as long as the slice's memory is.
///
/// What is read through it is outside the crate's promises: hand it to a system call or to code with promises of its own.
#[derive(Debug)]
pub struct PtrGuard {
    addr: *mut u8,
    len: usize,
}

impl PtrGuard {
    pub(crate) fn new(addr: *mut u8, len: usize) -> Self {
        Self { addr, len }
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
}

/// A pointer to bytes of a [`VolatileSlice`] that may be written, valid as long as the slice's memory is.
///
/// What is written through it is outside the crate's promises, and is not marked dirty: mark it in the slice's
/// [`bitmap`](VolatileSlice::bitmap), after the write.
#[derive(Debug)]
pub struct PtrGuardMut(PtrGuard);

impl PtrGuardMut {
    pub(crate) fn new(addr: *mut u8, len: usize) -> Self {
        Self(PtrGuard::new(addr, len))
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
}
