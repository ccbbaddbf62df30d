//! [`VolatileRef`]: one value in memory that others write.

use core::marker::PhantomData;
use core::mem::{size_of, MaybeUninit};

use super::{PtrGuard, PtrGuardMut, VolatileSlice};
use crate::access;
use crate::bitmap::BitmapSlice;
use crate::value::ByteValued;

/// A reference to a value of type `T`, which need not be aligned, in memory that others write.
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
    addr: *mut u8,
    bitmap: B,
    phantom: PhantomData<(&'a T, *mut T)>,
}

impl<T> VolatileRef<'_, T, ()>
where
    T: ByteValued,
{
    /// Makes a reference to the value at `addr`, with nothing to mark its writes in.
    ///
    /// # Safety
    ///
    /// As [`with_bitmap`](VolatileRef::with_bitmap).
    pub unsafe fn new(addr: *mut u8) -> Self {
        // SAFETY: the caller's contract is the same.
        unsafe { VolatileRef::with_bitmap(addr, (), None) }
    }
}

#[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
impl<'a, T, B> VolatileRef<'a, T, B>
where
    T: ByteValued,
    B: BitmapSlice,
{
    /// Makes a reference to the value at `addr`, whose writes are marked in `bitmap`, from its first bit on.
    ///
    /// The last parameter has a meaning on platforms that map memory for each access; here, pass `None`.
    ///
    /// # Safety
    ///
    /// As [`VolatileSlice::with_bitmap`], for `size_of::<T>()` bytes.
    pub unsafe fn with_bitmap(
        addr: *mut u8,
        bitmap: B,
        _mmap: Option<&'a PhantomData<()>>,
    ) -> Self {
        VolatileRef {
            addr,
            bitmap,
            phantom: PhantomData,
        }
    }

    /// Returns a guard with a pointer to the value, for reading.
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.len())
    }

    /// Returns a guard with a pointer to the value, for writing. What is written through it is not marked dirty.
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(self.addr, self.len())
    }

    /// Returns the size of the value in bytes.
    pub fn len(&self) -> usize {
        size_of::<T>()
    }

    /// Returns the bitmap that writes are marked in, which begins with this value.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Writes the value; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn store(&self, v: T) {
        // SAFETY: the contract of `with_bitmap`: the bytes of a `T` lie at `addr`.
        // What a fault stops is not told: the signature has no room for it.
        let _ = unsafe { access::write_value(self.addr, &v) };
        self.bitmap.mark_dirty(0, size_of::<T>());
    }

    /// Reads the value; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn load(&self) -> T {
        // SAFETY: the contract of `with_bitmap`: the bytes of a `T` lie at `addr`.
        match unsafe { access::read_value(&mut MaybeUninit::uninit(), self.addr) } {
            Ok(value) => *value,
            Err(_fault) => T::zeroed(),
        }
    }

    /// Returns the bytes of the value.
    pub fn to_slice(&self) -> VolatileSlice<'a, B> {
        // SAFETY: the contract of `with_bitmap` is the slice's, for the bytes of a `T`.
        unsafe { VolatileSlice::with_bitmap(self.addr, size_of::<T>(), self.bitmap.clone(), None) }
    }
}
