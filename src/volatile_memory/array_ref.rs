//! [`VolatileArrayRef`]: values of one type, one after the other, in memory that others write.

use core::marker::PhantomData;
use core::mem::size_of;

use super::{PtrGuard, PtrGuardMut, VolatileRef, VolatileSlice};
use crate::bitmap::BitmapSlice;
use crate::value::ByteValued;

/// A reference to an array of values of type `T`, which need not be aligned, in memory that others write.
///
/// ```
/// use vm_memory::{VolatileMemory, VolatileSlice};
///
/// let mut buf = [0u8; 32];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// let ring = slice.get_array_ref::<u16>(4, 8)?;
/// ring.store(7, 0x1234);
/// let mut copy = [0u16; 8];
/// assert_eq!(ring.copy_to(&mut copy), 8);
/// assert_eq!(copy[7], 0x1234);
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VolatileArrayRef<'a, T, B = ()> {
    addr: *mut u8,
    nelem: usize,
    bitmap: B,
    phantom: PhantomData<&'a T>,
}

impl<T> VolatileArrayRef<'_, T>
where
    T: ByteValued,
{
    /// Makes a reference to `nelem` values at `addr`, with nothing to mark their writes in.
    ///
    /// # Safety
    ///
    /// As [`with_bitmap`](VolatileArrayRef::with_bitmap).
    pub unsafe fn new(addr: *mut u8, nelem: usize) -> Self {
        // SAFETY: the caller's contract is the same.
        unsafe { VolatileArrayRef::with_bitmap(addr, nelem, (), None) }
    }
}

impl<'a, T, B> VolatileArrayRef<'a, T, B>
where
    T: ByteValued,
    B: BitmapSlice,
{
    /// Makes a reference to `nelem` values at `addr`, whose writes are marked in `bitmap`, from its first bit on.
    ///
    /// The last parameter has a meaning on platforms that map memory for each access; here, pass `None`.
    ///
    /// # Safety
    ///
    /// As [`VolatileSlice::with_bitmap`], for `nelem * size_of::<T>()` bytes, a number that must not overflow.
    pub unsafe fn with_bitmap(
        addr: *mut u8,
        nelem: usize,
        bitmap: B,
        _mmap: Option<&'a PhantomData<()>>,
    ) -> Self {
        VolatileArrayRef {
            addr,
            nelem,
            bitmap,
            phantom: PhantomData,
        }
    }

    /// Returns whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.nelem == 0
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.nelem
    }

    /// Returns the size of an element in bytes.
    pub fn element_size(&self) -> usize {
        size_of::<T>()
    }

    /// Returns a guard with a pointer to the elements, for reading. Its length is in bytes.
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.size())
    }

    /// Returns a guard with a pointer to the elements, for writing. Its length is in bytes. What is written through it is not
    /// marked dirty.
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(self.addr, self.size())
    }

    /// Returns the bitmap that writes are marked in, which begins with this array.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Returns the bytes of the array.
    pub fn to_slice(&self) -> VolatileSlice<'a, B> {
        // SAFETY: the contract of `with_bitmap` is the slice's, for the bytes of all elements.
        unsafe { VolatileSlice::with_bitmap(self.addr, self.size(), self.bitmap.clone(), None) }
    }

    /// Returns a reference to the element at `index`.
    ///
    /// # Panics
    ///
    /// If there is no such element.
    pub fn ref_at(&self, index: usize) -> VolatileRef<'a, T, B> {
        assert!(
            index < self.nelem,
            "index {index} is not below the length {}",
            self.nelem
        );
        // No overflow: the bytes of all elements are countable (the contract of `with_bitmap`).
        let offset = index.wrapping_mul(size_of::<T>());
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: the element lies in the array (just checked), which is mapped for `'a` (the contract of `with_bitmap`).
        unsafe { VolatileRef::with_bitmap(addr, self.bitmap.slice_at(offset), None) }
    }

    /// Reads the element at `index`; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
    ///
    /// # Panics
    ///
    /// If there is no such element.
    pub fn load(&self, index: usize) -> T {
        self.ref_at(index).load()
    }

    /// Writes the element at `index`; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
    ///
    /// # Panics
    ///
    /// If there is no such element.
    pub fn store(&self, index: usize, value: T) {
        self.ref_at(index).store(value);
    }

    /// Copies as many elements as the array and `buf` both have into `buf`, and returns how many.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are each read in one piece, in ascending order; those that lie in the same aligned 32 bytes
    /// may be read together, in no particular order.
    pub fn copy_to(&self, buf: &mut [T]) -> usize {
        let count = self.nelem.min(buf.len());
        buf.get_mut(..count)
            .map_or(0, |buf| self.to_slice().copy_to(buf))
    }

    /// Copies as many bytes as the array and `slice` both have into `slice`, in no particular order. The two may overlap.
    pub fn copy_to_volatile_slice<S: BitmapSlice>(&self, slice: VolatileSlice<'_, S>) {
        self.to_slice().copy_to_volatile_slice(slice);
    }

    /// Copies as many elements as the array and `buf` both have from `buf` into the array.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are each written in one piece, in ascending order.
    pub fn copy_from(&self, buf: &[T]) {
        self.to_slice().copy_from(buf);
    }

    /// The size of the whole array in bytes.
    fn size(&self) -> usize {
        // No overflow, by the contract of `with_bitmap`.
        self.nelem.wrapping_mul(size_of::<T>())
    }
}

impl<'a, B: BitmapSlice> From<VolatileSlice<'a, B>> for VolatileArrayRef<'a, u8, B> {
    fn from(slice: VolatileSlice<'a, B>) -> Self {
        let (addr, len) = (slice.as_mut_ptr(), slice.len());
        // SAFETY: as many elements of one byte as the slice has, under the slice's own contract.
        unsafe { VolatileArrayRef::with_bitmap(addr, len, slice.into_bitmap(), None) }
    }
}
