//! [`VolatileSlice`]: host memory that the guest may change.

use core::mem::size_of;

use super::location::Location;
use super::{
    compute_offset, Error, PtrGuard, PtrGuardMut, Result, VolatileArrayRef, VolatileMemory,
    VolatileRef,
};
use crate::access::fault::Direction;
use crate::bitmap::{BitmapSlice, BS};
use crate::bytes::Bytes;
use crate::value::ByteValued;
use crate::xen::MmapInfo;

/// A slice of host memory that the guest may change at any moment, with its dirty bitmap.
///
/// It takes the place of `&mut [u8]` for guest memory. [`Bytes<usize>`](crate::Bytes) reads and
/// writes at an offset; [`VolatileMemory`] makes references to values and arrays. Cloning a slice
/// does not copy its bytes.
///
/// ```text
///               offset          offset + len
///   VolatileSlice  ├───────────────┤
///   host memory  ──┴───────────────┴────────
///   bitmap      ···│ 0 │ 1 │ 0 │ 0 │···        one bit per page, set after a write
/// ```
///
/// `VolatileSlice` has the layout of an `iovec` of `readv(2)` if it has no bitmap (`B = ()`) and
/// the feature `xen` is off. It is neither `Send` nor `Sync`, because it holds a raw pointer.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, VolatileSlice};
///
/// let mut buf = [0u8; 16];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// slice.write_obj(0xabcdu16, 4)?;
/// let (head, tail) = slice.split_at(5)?;
/// assert_eq!((head.len(), tail.len()), (5, 11));
/// assert_eq!(head.read_obj::<u8>(4)?, 0xabcdu16.to_ne_bytes()[0]);
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
#[doc(alias = "iovec")]
#[doc(alias = "volatile copy")]
#[doc(alias = "IoSlice")]
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VolatileSlice<'a, B = ()> {
    pub(super) addr: Location<'a>,
    pub(super) size: usize,
    pub(super) bitmap: B,
}

// A slice without a bitmap is an `iovec` (POSIX, <sys/uio.h>): `iov_base`, then `iov_len`. With
// the feature `xen`, a third word names memory that is mapped for each access.
#[cfg(not(feature = "xen"))]
const _: () = {
    assert!(size_of::<VolatileSlice<'_, ()>>() == 2 * size_of::<usize>());
    assert!(align_of::<VolatileSlice<'_, ()>>() == align_of::<usize>());
    assert!(core::mem::offset_of!(VolatileSlice<'_, ()>, addr) == 0);
    assert!(core::mem::offset_of!(VolatileSlice<'_, ()>, size) == size_of::<usize>());
};

impl<'a> VolatileSlice<'a, ()> {
    /// Creates a slice of `size` bytes at `addr`, without a dirty bitmap.
    ///
    /// # Safety
    ///
    /// The contract is that of [`with_bitmap`](VolatileSlice::with_bitmap).
    pub unsafe fn new(addr: *mut u8, size: usize) -> VolatileSlice<'a> {
        // SAFETY: for all of `'a`, the bytes are mapped and covered by no Rust reference. Other
        // accesses are atomic or invisible to the compiler (this function's contract).
        unsafe { VolatileSlice::with_bitmap(addr, size, (), None) }
    }
}

impl<'a> From<&'a mut [u8]> for VolatileSlice<'a, ()> {
    fn from(value: &'a mut [u8]) -> Self {
        // SAFETY: the bytes are mapped and exclusively borrowed for `'a`. So, during `'a`, only the
        // slice accesses them, and no other reference to them is used.
        unsafe { VolatileSlice::new(value.as_mut_ptr(), value.len()) }
    }
}

impl<'a, B: BitmapSlice> VolatileSlice<'a, B> {
    /// Creates a slice of `size` bytes at `addr`, with `bitmap` as its dirty bitmap.
    ///
    /// Offset 0 of the slice is offset 0 of `bitmap`. The last parameter is for platforms that map
    /// memory for each access. Pass `None`. Only this crate creates such memory, and `addr` is
    /// then an offset in it.
    ///
    /// # Safety
    ///
    /// For all of `'a`:
    ///
    /// - the bytes must be mapped, or belong to memory that is mapped for each access,
    /// - no Rust reference may cover them, except to atomics,
    /// - other accesses must be atomic, or invisible to the compiler (by the guest or the kernel).
    ///
    /// An access that the mapping's protection does not permit, or to a missing page,
    /// [faults](crate::fault).
    #[inline(always)]
    pub unsafe fn with_bitmap(
        addr: *mut u8,
        size: usize,
        bitmap: B,
        mmap: Option<&'a MmapInfo>,
    ) -> VolatileSlice<'a, B> {
        VolatileSlice {
            addr: Location::new(addr, mmap),
            size,
            bitmap,
        }
    }

    /// Returns a pointer to the bytes, for reading.
    ///
    /// Memory that is mapped for each access (feature `xen`) is mapped as long as the guard lives.
    /// If that fails, the pointer is not accessible: see [`PtrGuard::error`].
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.size, Direction::Read)
    }

    /// Returns a pointer to the bytes, for writing. Writes through it are not marked dirty.
    ///
    /// Memory that is mapped for each access (feature `xen`) is mapped as long as the guard lives.
    /// If that fails, the pointer is not accessible: see [`PtrGuardMut::error`].
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(PtrGuard::new(self.addr, self.size, Direction::Write))
    }

    /// Returns a pointer to the bytes, for reading, or the reason why they cannot be mapped.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut buf = *b"guest";
    /// let guard = VolatileSlice::from(buf.as_mut_slice()).try_ptr_guard()?;
    /// assert_eq!(guard.len(), 5);
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard(&self) -> Result<PtrGuard> {
        PtrGuard::try_new(self.addr, self.size, Direction::Read).map_err(Error::IOError)
    }

    /// Returns a pointer to the bytes, for writing, or the reason why they cannot be mapped.
    ///
    /// Writes through it are not marked dirty.
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the memory is mapped for each access (feature `xen`), and that
    /// fails. Other memory is mapped already.
    pub fn try_ptr_guard_mut(&self) -> Result<PtrGuardMut> {
        let guard = PtrGuard::try_new(self.addr, self.size, Direction::Write);
        guard.map(PtrGuardMut::new).map_err(Error::IOError)
    }

    /// Returns a pointer to the first bytes, for an access in `direction`.
    ///
    /// The guard covers fewer bytes than the slice if the memory is mapped for each access and a
    /// page cannot be mapped.
    #[cfg(all(feature = "rawfd", unix))]
    pub(crate) fn guard_of_first(&self, direction: Direction) -> Result<PtrGuardMut> {
        PtrGuard::first(self.addr, self.size, direction).map(PtrGuardMut::new)
    }

    /// Returns the size in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.size
    }

    /// Returns whether the size is 0.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Returns the dirty bitmap. Its offset 0 is the first byte of the slice.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Returns the first `mid` bytes, and the rest.
    ///
    /// # Errors
    ///
    /// Returns [`Error::OutOfBounds`] if `mid` is greater than the length.
    pub fn split_at(&self, mid: usize) -> Result<(Self, Self)> {
        let end = self.offset(mid)?;
        let start = VolatileSlice {
            size: mid,
            ..self.clone()
        };
        Ok((start, end))
    }

    /// Returns the `count` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// Returns [`Error::OutOfBounds`] or [`Error::Overflow`] if a byte is not in the slice.
    #[inline]
    pub fn subslice(&self, offset: usize, count: usize) -> Result<Self> {
        self.compute_end_offset(offset, count)?;
        // SAFETY: `compute_end_offset` checked that the range does not pass the end of the slice.
        Ok(unsafe { self.part(offset, count) })
    }

    /// Returns the slice without its first `count` bytes.
    ///
    /// # Errors
    ///
    /// Returns [`Error::OutOfBounds`], with a host address, if `count` is greater than the length.
    #[inline]
    pub fn offset(&self, count: usize) -> Result<VolatileSlice<'a, B>> {
        let addr = compute_offset(self.addr.as_ptr().addr(), count)?;
        let rest = self
            .size
            .checked_sub(count)
            .ok_or(Error::OutOfBounds { addr })?;
        // SAFETY: `rest` is the size less `count`, so the range ends at the end of the slice.
        Ok(unsafe { self.part(count, rest) })
    }

    /// Returns the first `count` bytes, or all of them if there are fewer.
    #[inline]
    pub(crate) fn first(&self, count: usize) -> Self {
        // SAFETY: the range begins at 0 and is not longer than the slice.
        unsafe { self.part(0, self.size.min(count)) }
    }

    /// Returns the `count` bytes at `offset`.
    ///
    /// # Safety
    ///
    /// The sum of `offset` and `count` is at most the size of the slice.
    #[inline]
    unsafe fn part(&self, offset: usize, count: usize) -> Self {
        debug_assert!(offset
            .checked_add(count)
            .is_some_and(|end| end <= self.size));
        VolatileSlice {
            addr: self.addr.wrapping_add(offset),
            size: count,
            bitmap: self.bitmap.slice_at(offset),
        }
    }

    /// Copies whole elements of type `T` from the slice into `buf`, and returns their number.
    ///
    /// Copies as many elements as fit into both.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are never torn. Those of 2, 4 or 8 bytes
    /// are read in ascending order, except within the same aligned 32 bytes. Other elements are
    /// read in any order.
    ///
    /// A [fault](crate::fault) ends the copy. The elements before it count. A part of the next one
    /// may be in `buf`: [`LastFault::completed`](crate::fault::LastFault::completed) counts bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut memory = [1u8, 0, 2, 0, 3];
    /// let mut buf = [0u16; 4];
    /// assert_eq!(VolatileSlice::from(memory.as_mut_slice()).copy_to(&mut buf), 2);
    /// assert_eq!(buf.map(u16::from_le), [1, 2, 0, 0]);
    /// ```
    #[inline(always)]
    pub fn copy_to<T>(&self, buf: &mut [T]) -> usize
    where
        T: ByteValued,
    {
        let count = whole_elements::<T>(self.size, buf.len());
        // SAFETY: `whole_elements` limits `count` to the slice and to `buf`, so the size of the
        // elements does not overflow. The slice is a guest operand (contract of `with_bitmap`).
        match unsafe { self.addr.read_elements(buf, count) } {
            Ok(()) => count,
            Err(fault) => whole_elements::<T>(fault.completed(), count),
        }
    }

    /// Copies bytes to `slice`, as many as fit. The two may overlap.
    ///
    /// The order of the bytes is unspecified. A [fault](crate::fault) ends the copy; read
    /// [`fault::last`](crate::fault::last) to detect it.
    pub fn copy_to_volatile_slice<S: BitmapSlice>(&self, slice: VolatileSlice<'_, S>) {
        let count = self.size.min(slice.size);
        // A fault is not returned: the signature of 0.18.0 has no error.
        // SAFETY: `count` bytes are in both slices, which are guest operands (contract of
        // `with_bitmap`).
        let _ = unsafe { self.addr.copy_to(slice.addr, count) };
        slice.bitmap.mark_dirty(0, count);
    }

    /// Copies whole elements of type `T` from `buf` into the slice, as many as fit into both.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are never torn. Those of 2, 4 or 8 bytes
    /// are written in ascending order, except within the same aligned 32 bytes. Other elements are
    /// written in any order.
    ///
    /// A [fault](crate::fault) ends the copy, possibly inside an element. Read
    /// [`fault::last`](crate::fault::last) to detect it and the number of bytes before it.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut memory = [0u8; 5];
    /// let slice = VolatileSlice::from(memory.as_mut_slice());
    /// slice.copy_from(&[1u16, 2, 3].map(u16::to_le));
    /// assert_eq!(memory, [1, 0, 2, 0, 0]);
    /// ```
    #[inline(always)]
    pub fn copy_from<T>(&self, buf: &[T])
    where
        T: ByteValued,
    {
        let count = whole_elements::<T>(self.size, buf.len());
        // A fault is not returned: the signature of 0.18.0 has no error.
        // SAFETY: `whole_elements` limits `count` to the slice and to `buf`, so the size of the
        // elements does not overflow. The slice is a guest operand (contract of `with_bitmap`).
        let _ = unsafe { self.addr.write_elements(buf, count) };
        // This does not saturate: the elements are in the slice.
        self.bitmap
            .mark_dirty(0, count.saturating_mul(size_of::<T>()));
    }

    /// Sets all bytes of the slice to `value`. The order of the bytes is unspecified.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut memory = [1u8; 5];
    /// VolatileSlice::from(memory.as_mut_slice()).subslice(1, 3)?.fill_with_byte(7)?;
    /// assert_eq!(memory, [1, 7, 7, 7, 1]);
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the access [faults](crate::fault).
    /// [`fault::last`](crate::fault::last) returns the address.
    pub fn fill_with_byte(&self, value: u8) -> Result<()> {
        // SAFETY: the whole slice is a guest operand (contract of `with_bitmap`).
        let result = unsafe { self.addr.fill(value, self.size) };
        // Even after a fault: the bytes before it have been written.
        self.bitmap.mark_dirty(0, self.size);
        result.map_err(Error::from_fault)
    }

    /// Returns whether all bytes of the slice are 0. A migration need not send such a page.
    ///
    /// Reads 64 bytes at a time, and stops at the first 64 that are not all 0. The result is valid
    /// only for bytes that the guest does not write during the call.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{Bytes, VolatileSlice};
    ///
    /// let mut page = vec![0u8; 0x1000];
    /// let slice = VolatileSlice::from(page.as_mut_slice());
    /// assert!(slice.is_zero()?);
    /// slice.write_obj(1u8, 0xfff)?;
    /// assert!(!slice.is_zero()?);
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] if the access [faults](crate::fault) before it stops.
    /// [`fault::last`](crate::fault::last) returns the address.
    #[doc(alias = "zero page")]
    #[doc(alias = "buffer_is_zero")]
    pub fn is_zero(&self) -> Result<bool> {
        // Memory that is mapped for each access is mapped once.
        let (held, inaccessible) = self.clone().hold(Direction::Read)?;
        let slice = held.slice();
        let mut rest = slice.len();
        while rest >= size_of::<Line>() {
            let words: Line = slice.read_obj(slice.len().saturating_sub(rest))?;
            if words.iter().fold(0, |all, word| all | word) != 0 {
                return Ok(false);
            }
            rest = rest.saturating_sub(size_of::<Line>());
        }
        for offset in slice.len().saturating_sub(rest)..slice.len() {
            if slice.read_obj::<u8>(offset)? != 0 {
                return Ok(false);
            }
        }
        match inaccessible {
            Some(error) => Err(error),
            None => Ok(true),
        }
    }

    /// Returns the address of the first byte.
    ///
    /// For memory without a host address, this is the number that a fault reports for the byte.
    #[inline]
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }

    /// Returns the host address of the first byte, or `None` if the memory has none, because it is
    /// mapped for each access.
    #[inline]
    pub(crate) fn host_address(&self) -> Option<*mut u8> {
        self.addr.host()
    }

    /// Returns a reference to a value in the first bytes.
    ///
    /// # Safety
    ///
    /// The slice has `size_of::<T>()` bytes.
    #[inline]
    pub(super) unsafe fn into_ref<T: ByteValued>(self) -> VolatileRef<'a, T, B> {
        let (addr, mmap) = (self.addr.as_ptr(), self.addr.mmap_info());
        // SAFETY: for all of `'a`, the bytes of the slice, and so of the value (contract of this
        // function), are mapped or mapped by each access. No Rust reference covers them. Other
        // accesses are atomic or invisible to the compiler (contract of `with_bitmap`).
        unsafe { VolatileRef::with_bitmap(addr, self.bitmap, mmap) }
    }

    /// Returns a reference to an array of `n` values in the first bytes.
    ///
    /// # Safety
    ///
    /// The slice has `n * size_of::<T>()` bytes, at most `isize::MAX`.
    #[inline]
    pub(super) unsafe fn into_array_ref<T: ByteValued>(
        self,
        n: usize,
    ) -> VolatileArrayRef<'a, T, B> {
        let (addr, mmap) = (self.addr.as_ptr(), self.addr.mmap_info());
        // SAFETY: for all of `'a`, the bytes of the slice, and so of the array (contract of this
        // function), are mapped or mapped by each access. No Rust reference covers them. Other
        // accesses are atomic or invisible to the compiler (contract of `with_bitmap`). They are at
        // most `isize::MAX` (contract of this function).
        unsafe { VolatileArrayRef::with_bitmap(addr, n, self.bitmap, mmap) }
    }

    /// Returns the same bytes with another dirty bitmap.
    pub(crate) fn with_other_bitmap<N: BitmapSlice>(self, bitmap: N) -> VolatileSlice<'a, N> {
        VolatileSlice {
            addr: self.addr,
            size: self.size,
            bitmap,
        }
    }

    /// Returns whether `size` bytes at `offset` are in the slice.
    #[inline(always)]
    pub(crate) fn holds(&self, offset: usize, size: usize) -> bool {
        offset <= self.size && size <= self.size.wrapping_sub(offset)
    }

    /// Returns how many of `wanted` bytes at `offset` are in the slice, or an error if none is.
    #[inline]
    pub(super) fn available(&self, offset: usize, wanted: usize) -> Result<usize> {
        match self.size.checked_sub(offset) {
            Some(rest) if rest != 0 => Ok(wanted.min(rest)),
            _ => Err(Error::OutOfBounds { addr: offset }),
        }
    }
}

/// The number of bytes that are compared at a time: the largest access that is inlined.
type Line = [u64; 8];

/// Returns how many of `wanted` elements fit into `bytes`. Zero-sized elements always fit.
#[inline(always)]
fn whole_elements<T>(bytes: usize, wanted: usize) -> usize {
    bytes
        .checked_div(size_of::<T>())
        .map_or(wanted, |fit| fit.min(wanted))
}

impl<B: BitmapSlice> VolatileMemory for VolatileSlice<'_, B> {
    type B = B;

    #[inline]
    fn len(&self) -> usize {
        self.size
    }

    #[inline]
    fn get_slice(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        self.subslice(offset, count)
    }
}
