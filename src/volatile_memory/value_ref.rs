//! [`VolatileRef`]: a value in volatile memory.

use core::marker::PhantomData;
use core::mem::{size_of, MaybeUninit};

use super::location::Location;
use super::{Error, PtrGuard, PtrGuardMut, Result, VolatileSlice};
use crate::access;
use crate::access::fault::Direction;
use crate::bitmap::BitmapSlice;
use crate::value::ByteValued;
use crate::xen::MmapInfo;

/// A reference to a value of type `T` in volatile memory, which need not be aligned.
///
/// [`VolatileMemory::get_ref`](super::VolatileMemory::get_ref) creates it.
///
/// # Examples
///
/// ```
/// use vm_memory::{VolatileMemory, VolatileSlice};
///
/// let mut buf = [0u8; 8];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// let counter = slice.get_ref::<u32>(4)?;
/// counter.store(counter.load() + 1);
/// assert_eq!(counter.load(), 1);
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VolatileRef<'a, T, B = ()> {
    addr: Location<'a>,
    bitmap: B,
    phantom: PhantomData<(&'a T, *mut T)>,
}

impl<T> VolatileRef<'_, T, ()>
where
    T: ByteValued,
{
    /// Creates a reference to the value at `addr`, without a dirty bitmap.
    ///
    /// # Safety
    ///
    /// The contract is that of [`with_bitmap`](VolatileRef::with_bitmap).
    pub unsafe fn new(addr: *mut u8) -> Self {
        // SAFETY: the bytes of the value are mapped and covered by no Rust reference. Other
        // accesses are atomic or invisible to the compiler (this function's contract).
        unsafe { VolatileRef::with_bitmap(addr, (), None) }
    }
}

#[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
impl<'a, T, B> VolatileRef<'a, T, B>
where
    T: ByteValued,
    B: BitmapSlice,
{
    /// Creates a reference to the value at `addr`, with `bitmap` as its dirty bitmap.
    ///
    /// The last parameter is for platforms that map memory for each access. Pass `None`.
    ///
    /// # Safety
    ///
    /// The contract is that of [`VolatileSlice::with_bitmap`], for `size_of::<T>()` bytes.
    pub unsafe fn with_bitmap(addr: *mut u8, bitmap: B, mmap: Option<&'a MmapInfo>) -> Self {
        VolatileRef {
            addr: Location::new(addr, mmap),
            bitmap,
            phantom: PhantomData,
        }
    }

    /// Returns a pointer to the value, for reading.
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.len(), Direction::Read)
    }

    /// Returns a pointer to the value, for writing. Writes through it are not marked dirty.
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(PtrGuard::new(self.addr, self.len(), Direction::Write))
    }

    /// Returns a pointer to the value, for reading, or the reason why it cannot be mapped.
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard(&self) -> Result<PtrGuard> {
        PtrGuard::try_new(self.addr, self.len(), Direction::Read).map_err(Error::IOError)
    }

    /// Returns a pointer to the value, for writing, or the reason why it cannot be mapped.
    ///
    /// Writes through it are not marked dirty.
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard_mut(&self) -> Result<PtrGuardMut> {
        let guard = PtrGuard::try_new(self.addr, self.len(), Direction::Write);
        guard.map(PtrGuardMut::new).map_err(Error::IOError)
    }

    /// Returns the size of the value in bytes.
    pub fn len(&self) -> usize {
        size_of::<T>()
    }

    /// Returns the dirty bitmap. Its offset 0 is the first byte of the value.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Writes the value. A naturally aligned one of 1, 2, 4 or 8 bytes is never torn.
    ///
    /// A [fault](crate::fault) is not returned; read [`fault::last`](crate::fault::last) to detect
    /// it.
    #[inline]
    pub fn store(&self, v: T) {
        // A fault is not returned: the signature of 0.18.0 has no error.
        let _ = self.addr.with(size_of::<T>(), Direction::Write, |dst| {
            // SAFETY: `dst` is a guest operand of `size_of::<T>()` bytes (contract of
            // `with_bitmap`).
            unsafe { access::write_value(dst, &v) }
        });
        self.bitmap.mark_dirty(0, size_of::<T>());
    }

    /// Reads the value. A naturally aligned one of 1, 2, 4 or 8 bytes is never torn.
    ///
    /// After a [fault](crate::fault), returns zeroes; read [`fault::last`](crate::fault::last) to
    /// detect it.
    #[inline]
    pub fn load(&self) -> T {
        let mut value = MaybeUninit::uninit();
        let read = self.addr.with(size_of::<T>(), Direction::Read, |src| {
            // SAFETY: `src` is a guest operand of `size_of::<T>()` bytes (contract of
            // `with_bitmap`).
            unsafe { access::read_value(&mut value, src) }.copied()
        });
        read.unwrap_or_else(|_fault| T::zeroed())
    }

    /// Returns the bytes of the value.
    pub fn to_slice(&self) -> VolatileSlice<'a, B> {
        let (addr, mmap) = (self.addr.as_ptr(), self.addr.mmap_info());
        // SAFETY: for all of `'a`, the `size_of::<T>()` bytes at `self.addr` are mapped, or mapped
        // by each access, and covered by no Rust reference. Other accesses are atomic or invisible
        // to the compiler (contract of `VolatileRef::with_bitmap`).
        unsafe { VolatileSlice::with_bitmap(addr, size_of::<T>(), self.bitmap.clone(), mmap) }
    }
}
