//! [`VolatileArrayRef`]: an array of values in volatile memory.

use core::marker::PhantomData;
use core::mem::size_of;

use super::location::Location;
use super::{Error, PtrGuard, PtrGuardMut, Result, VolatileRef, VolatileSlice};
use crate::access::fault::Direction;
use crate::bitmap::BitmapSlice;
use crate::value::ByteValued;
use crate::xen::MmapInfo;

/// A reference to an array of values of type `T` in volatile memory, which need not be aligned.
///
/// [`VolatileMemory::get_array_ref`](super::VolatileMemory::get_array_ref) creates it. A ring of a
/// virtqueue is such an array.
///
/// # Examples
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
    addr: Location<'a>,
    nelem: usize,
    bitmap: B,
    phantom: PhantomData<&'a T>,
}

impl<T> VolatileArrayRef<'_, T>
where
    T: ByteValued,
{
    /// Creates a reference to `nelem` values at `addr`, without a dirty bitmap.
    ///
    /// # Safety
    ///
    /// The contract is that of [`with_bitmap`](VolatileArrayRef::with_bitmap).
    pub unsafe fn new(addr: *mut u8, nelem: usize) -> Self {
        // SAFETY: the bytes of the array are mapped and covered by no Rust reference, and are at
        // most `isize::MAX`. Other accesses are atomic or invisible to the compiler (this
        // function's contract).
        unsafe { VolatileArrayRef::with_bitmap(addr, nelem, (), None) }
    }
}

impl<'a, T, B> VolatileArrayRef<'a, T, B>
where
    T: ByteValued,
    B: BitmapSlice,
{
    /// Creates a reference to `nelem` values at `addr`, with `bitmap` as their dirty bitmap.
    ///
    /// The last parameter is for platforms that map memory for each access. Pass `None`.
    ///
    /// # Safety
    ///
    /// The contract is that of [`VolatileSlice::with_bitmap`], for `nelem * size_of::<T>()` bytes.
    /// That number must not exceed `isize::MAX`.
    pub unsafe fn with_bitmap(
        addr: *mut u8,
        nelem: usize,
        bitmap: B,
        mmap: Option<&'a MmapInfo>,
    ) -> Self {
        VolatileArrayRef {
            addr: Location::new(addr, mmap),
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

    /// Returns a pointer to the elements, for reading. Its length is in bytes.
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.size(), Direction::Read)
    }

    /// Returns a pointer to the elements, for writing. Its length is in bytes.
    ///
    /// Writes through it are not marked dirty.
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(PtrGuard::new(self.addr, self.size(), Direction::Write))
    }

    /// Returns a pointer to the elements, for reading, or the reason why they cannot be mapped.
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard(&self) -> Result<PtrGuard> {
        PtrGuard::try_new(self.addr, self.size(), Direction::Read).map_err(Error::IOError)
    }

    /// Returns a pointer to the elements, for writing, or the reason why they cannot be mapped.
    ///
    /// Writes through it are not marked dirty.
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard_mut(&self) -> Result<PtrGuardMut> {
        let guard = PtrGuard::try_new(self.addr, self.size(), Direction::Write);
        guard.map(PtrGuardMut::new).map_err(Error::IOError)
    }

    /// Returns the dirty bitmap. Its offset 0 is the first byte of the array.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Returns the bytes of the array.
    pub fn to_slice(&self) -> VolatileSlice<'a, B> {
        let (addr, mmap) = (self.addr.as_ptr(), self.addr.mmap_info());
        // SAFETY: for all of `'a`, the `self.size()` bytes at `self.addr` are mapped, or mapped by
        // each access, and covered by no Rust reference. Other accesses are atomic or invisible to
        // the compiler (contract of `VolatileArrayRef::with_bitmap`).
        unsafe { VolatileSlice::with_bitmap(addr, self.size(), self.bitmap.clone(), mmap) }
    }

    /// Returns a reference to the element at `index`.
    ///
    /// # Panics
    ///
    /// Panics if `index` is not less than the length.
    pub fn ref_at(&self, index: usize) -> VolatileRef<'a, T, B> {
        assert!(
            index < self.nelem,
            "index {index} is out of bounds of an array of length {}",
            self.nelem
        );
        // This does not wrap: the size of the array does not (contract of `with_bitmap`).
        let offset = index.wrapping_mul(size_of::<T>());
        let (addr, mmap) = (
            self.addr.as_ptr().wrapping_add(offset),
            self.addr.mmap_info(),
        );
        // SAFETY: the assertion above keeps the element in the array. For all of `'a`, the bytes of
        // the array are mapped and covered by no Rust reference. Other accesses are atomic or
        // invisible to the compiler (contract of `VolatileArrayRef::with_bitmap`).
        unsafe { VolatileRef::with_bitmap(addr, self.bitmap.slice_at(offset), mmap) }
    }

    /// Reads the element at `index`. A naturally aligned one of 1, 2, 4 or 8 bytes is never torn.
    ///
    /// # Panics
    ///
    /// Panics if `index` is not less than the length.
    pub fn load(&self, index: usize) -> T {
        self.ref_at(index).load()
    }

    /// Writes the element at `index`. A naturally aligned one of 1, 2, 4 or 8 bytes is never torn.
    ///
    /// # Panics
    ///
    /// Panics if `index` is not less than the length.
    pub fn store(&self, index: usize, value: T) {
        self.ref_at(index).store(value);
    }

    /// Copies elements into `buf`, as many as fit, and returns their number.
    ///
    /// A naturally aligned element of 1, 2, 4 or 8 bytes is never torn. Elements are read in
    /// ascending order, except that elements in the same aligned 32 bytes may be read together. For
    /// a [fault](crate::fault), see [`VolatileSlice::copy_to`].
    pub fn copy_to(&self, buf: &mut [T]) -> usize {
        let count = self.nelem.min(buf.len());
        buf.get_mut(..count)
            .map_or(0, |buf| self.to_slice().copy_to(buf))
    }

    /// Copies bytes to `slice`, as many as fit.
    ///
    /// The two may overlap. For a [fault](crate::fault), see
    /// [`VolatileSlice::copy_to_volatile_slice`].
    pub fn copy_to_volatile_slice<S: BitmapSlice>(&self, slice: VolatileSlice<'_, S>) {
        self.to_slice().copy_to_volatile_slice(slice);
    }

    /// Copies elements from `buf` into the array, as many as fit.
    ///
    /// A naturally aligned element of 1, 2, 4 or 8 bytes is never torn. Elements are written in
    /// ascending order, except that elements in the same aligned 32 bytes may be written together.
    /// For a [fault](crate::fault), see [`VolatileSlice::copy_from`].
    pub fn copy_from(&self, buf: &[T]) {
        self.to_slice().copy_from(buf);
    }

    /// Returns the size of the array in bytes.
    fn size(&self) -> usize {
        // This does not wrap (contract of `with_bitmap`).
        self.nelem.wrapping_mul(size_of::<T>())
    }
}

impl<'a, B: BitmapSlice> From<VolatileSlice<'a, B>> for VolatileArrayRef<'a, u8, B> {
    fn from(slice: VolatileSlice<'a, B>) -> Self {
        let len = slice.len();
        // SAFETY: the slice has `len` bytes. No mapping is larger than `isize::MAX`.
        unsafe { slice.into_array_ref(len) }
    }
}
