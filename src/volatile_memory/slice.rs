//! [`VolatileSlice`]: bytes that others write while we look.

use core::marker::PhantomData;
use core::mem::{offset_of, size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::{atomic, compute_offset, Error, PtrGuard, PtrGuardMut, Result, VolatileMemory};
use crate::access::{self, Fault, Fetch};
use crate::bitmap::{BitmapSlice, BS};
use crate::bytes::Bytes;
use crate::io::{retry_interrupted, ReadVolatile, WriteVolatile};
use crate::value::{is_register_sized, AtomicAccess, ByteValued};

/// A slice of memory that others write while we look, and the bitmap that its writes are marked in.
///
/// It is neither `Send` nor `Sync`: it carries a raw pointer, and a bitmap that may not be.
///
/// ```
/// use vm_memory::{Bytes, VolatileSlice};
///
/// let mut buf = [0u8; 16];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// slice.write_obj(0xabcdu16, 4)?;
/// let (head, tail) = slice.split_at(5)?;
/// assert_eq!((head.len(), tail.len()), (5, 11));
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
// The address and the length come first, as in the `iovec` of readv(2).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VolatileSlice<'a, B = ()> {
    addr: *mut u8,
    size: usize,
    bitmap: B,
    phantom: PhantomData<&'a u8>,
}

// An array of slices without a bitmap can be handed to readv(2) as it is (POSIX, <sys/uio.h>: `iov_base`, then `iov_len`).
const _: () = {
    assert!(size_of::<VolatileSlice<'_, ()>>() == 2 * size_of::<usize>());
    assert!(align_of::<VolatileSlice<'_, ()>>() == align_of::<usize>());
    assert!(offset_of!(VolatileSlice<'_, ()>, addr) == 0);
    assert!(offset_of!(VolatileSlice<'_, ()>, size) == size_of::<usize>());
};

impl<'a> VolatileSlice<'a, ()> {
    /// Makes a slice of `size` bytes at `addr`, with nothing to mark its writes in.
    ///
    /// # Safety
    ///
    /// As [`with_bitmap`](VolatileSlice::with_bitmap).
    pub unsafe fn new(addr: *mut u8, size: usize) -> VolatileSlice<'a> {
        // SAFETY: the caller's contract is the same.
        unsafe { VolatileSlice::with_bitmap(addr, size, (), None) }
    }
}

impl<'a> From<&'a mut [u8]> for VolatileSlice<'a, ()> {
    fn from(value: &'a mut [u8]) -> Self {
        // SAFETY: the bytes are borrowed exclusively for `'a`, which this slice carries on.
        unsafe { VolatileSlice::new(value.as_mut_ptr(), value.len()) }
    }
}

impl<'a, B: BitmapSlice> VolatileSlice<'a, B> {
    /// Makes a slice of `size` bytes at `addr`, whose writes are marked in `bitmap`, from its first bit on.
    ///
    /// The last parameter has a meaning on platforms that map memory for each access; here, pass `None`.
    ///
    /// # Safety
    ///
    /// For the whole of `'a`, the bytes must be mapped, and be accessed only through this crate, by atomics or by what the compiler does not see (a
    /// guest, a system call): no reference of Rust's to them may be alive. An access that the mapping's protection refuses faults, as one to a page that
    /// is gone does ([`fault`](crate::fault)).
    pub unsafe fn with_bitmap(
        addr: *mut u8,
        size: usize,
        bitmap: B,
        _mmap: Option<&'a PhantomData<()>>,
    ) -> VolatileSlice<'a, B> {
        VolatileSlice {
            addr,
            size,
            bitmap,
            phantom: PhantomData,
        }
    }

    /// Returns a guard with a pointer to the bytes, for reading.
    pub fn ptr_guard(&self) -> PtrGuard {
        PtrGuard::new(self.addr, self.size)
    }

    /// Returns a guard with a pointer to the bytes, for writing. What is written through it is not marked dirty.
    pub fn ptr_guard_mut(&self) -> PtrGuardMut {
        PtrGuardMut::new(self.addr, self.size)
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

    /// Returns the bitmap that writes are marked in, which begins with this slice.
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }

    /// Splits the slice in two: the first `mid` bytes, and the rest.
    ///
    /// # Errors
    ///
    /// If `mid` is greater than the length.
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
    /// If they do not all lie in the slice.
    #[inline]
    pub fn subslice(&self, offset: usize, count: usize) -> Result<Self> {
        self.compute_end_offset(offset, count)?;
        Ok(self.part(offset, count))
    }

    /// Returns the slice without its first `count` bytes.
    ///
    /// # Errors
    ///
    /// If `count` is greater than the length. The address in the error is the host's.
    #[inline]
    pub fn offset(&self, count: usize) -> Result<VolatileSlice<'a, B>> {
        let addr = compute_offset(self.addr.addr(), count)?;
        let rest = self
            .size
            .checked_sub(count)
            .ok_or(Error::OutOfBounds { addr })?;
        Ok(self.part(count, rest))
    }

    /// The `count` bytes at `offset`, which the caller has found to lie in the slice.
    #[inline]
    fn part(&self, offset: usize, count: usize) -> Self {
        debug_assert!(offset
            .checked_add(count)
            .is_some_and(|end| end <= self.size));
        VolatileSlice {
            addr: self.addr.wrapping_add(offset),
            size: count,
            bitmap: self.bitmap.slice_at(offset),
            phantom: PhantomData,
        }
    }

    /// Copies elements of type `T` from the slice into `buf`: as many as `buf` holds or the slice has whole ones of,
    /// whichever is less, and returns how many.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are each read in one piece, in ascending order; those that lie in the same aligned 32 bytes
    /// may be read together, in no particular order.
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut memory = [1u8, 0, 2, 0, 3];
    /// let mut buf = [0u16; 4];
    /// assert_eq!(VolatileSlice::from(memory.as_mut_slice()).copy_to(&mut buf), 2);
    /// assert_eq!(buf.map(u16::from_le), [1, 2, 0, 0]);
    /// ```
    pub fn copy_to<T>(&self, buf: &mut [T]) -> usize
    where
        T: ByteValued,
    {
        let count = whole_elements::<T>(self.size, buf.len());
        // SAFETY: `count` elements are within the slice and within `buf`, whose exclusive borrow keeps it apart from the slice.
        match unsafe { access::copy_elements_from_guest(buf.as_mut_ptr(), self.addr, count) } {
            Ok(()) => count,
            Err(fault) => whole_elements::<T>(fault.completed(), count),
        }
    }

    /// Copies as many bytes as both slices have from this one into `slice`, in no particular order. The two may overlap.
    pub fn copy_to_volatile_slice<S: BitmapSlice>(&self, slice: VolatileSlice<'_, S>) {
        let count = self.size.min(slice.size);
        // SAFETY: `count` bytes are within both slices, which are guest operands by the contract of `with_bitmap`.
        // What a fault stops is not told: the signature has no room for it.
        let _ = unsafe { access::copy_within_guest(slice.addr, self.addr, count) };
        slice.bitmap.mark_dirty(0, count);
    }

    /// Copies elements of type `T` from `buf` into the slice: as many as `buf` holds or the slice has room for whole ones of,
    /// whichever is less.
    ///
    /// Naturally aligned elements of 1, 2, 4 or 8 bytes are each written in one piece, in ascending order; those that lie in the same aligned 32
    /// bytes may be written together, in no particular order.
    ///
    /// ```
    /// use vm_memory::VolatileSlice;
    ///
    /// let mut memory = [0u8; 5];
    /// VolatileSlice::from(memory.as_mut_slice()).copy_from(&[1u16.to_le(), 2u16.to_le(), 3u16.to_le()]);
    /// assert_eq!(memory, [1, 0, 2, 0, 0]);
    /// ```
    pub fn copy_from<T>(&self, buf: &[T])
    where
        T: ByteValued,
    {
        let count = whole_elements::<T>(self.size, buf.len());
        // SAFETY: `count` elements are within the slice and within `buf`, which a slice over the same bytes could not borrow.
        // What a fault stops is not told: the signature has no room for it.
        let _ = unsafe { access::copy_elements_to_guest(self.addr, buf.as_ptr(), count) };
        // No overflow: the elements are within the slice.
        self.bitmap
            .mark_dirty(0, count.saturating_mul(size_of::<T>()));
    }

    /// Writes the byte `value` everywhere, in no particular order.
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
    /// `IOError` with `EFAULT` at a page that is not there ([`fault`](crate::fault)); which byte it was, [`fault::last`](crate::fault::last) tells.
    pub fn fill_with_byte(&self, value: u8) -> Result<()> {
        // SAFETY: the whole slice is a guest operand by the contract of `with_bitmap`.
        let answer = unsafe { access::fill_guest(self.addr, value, self.size) };
        // After a fault as well: bytes before it have been written.
        self.bitmap.mark_dirty(0, self.size);
        answer.map_err(Error::from_fault)
    }

    /// Writes the integer at `addr` in one piece, and returns what was there.
    ///
    /// ```
    /// use std::sync::atomic::Ordering;
    /// use vm_memory::VolatileSlice;
    ///
    /// # let mut storage = [0u64; 2];
    /// # // SAFETY: aligned storage of its own.
    /// # let slice = unsafe { VolatileSlice::new(storage.as_mut_ptr().cast(), 16) };
    /// assert_eq!(slice.atomic_swap(7u32, 4, Ordering::AcqRel)?, 0);
    /// assert_eq!(slice.atomic_fetch_add(u32::MAX, 4, Ordering::Relaxed)?, 7);
    /// assert_eq!(slice.atomic_fetch_or(8u32, 4, Ordering::SeqCst)?, 6);
    /// assert_eq!(slice.atomic_fetch_and(12u32, 4, Ordering::Release)?, 14);
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`load`](Bytes::load): if the integer does not lie in the slice, is not aligned, or its page is not there. `TooBig` if the atomic
    /// counterpart of `T`, a user's own type, does not have the size of `T`.
    #[inline]
    pub fn atomic_swap<T: AtomicAccess>(&self, val: T, addr: usize, order: Ordering) -> Result<T> {
        self.fetch(Fetch::Swap, val, addr, order)
    }

    /// Adds `val` to the integer at `addr` in one piece, wrapping around, and returns what was there.
    ///
    /// # Errors
    ///
    /// As [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_add<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::Add, val, addr, order)
    }

    /// Clears the bits that `val` does not have in the integer at `addr`, in one piece, and returns what was there.
    ///
    /// # Errors
    ///
    /// As [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_and<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::And, val, addr, order)
    }

    /// Sets the bits of `val` in the integer at `addr`, in one piece, and returns what was there.
    ///
    /// # Errors
    ///
    /// As [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_or<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::Or, val, addr, order)
    }

    /// Writes `new` to the integer at `addr` in one piece if `current` is there. Returns what was there: `Ok` if it was written, `Err` if not.
    ///
    /// ```
    /// use std::sync::atomic::Ordering::{AcqRel, Acquire};
    /// use vm_memory::VolatileSlice;
    ///
    /// # let mut storage = [0u64; 2];
    /// # // SAFETY: aligned storage of its own.
    /// # let slice = unsafe { VolatileSlice::new(storage.as_mut_ptr().cast(), 16) };
    /// assert_eq!(slice.atomic_compare_exchange(0u16, 5, 2, AcqRel, Acquire)?, Ok(0));
    /// assert_eq!(slice.atomic_compare_exchange(0u16, 6, 2, AcqRel, Acquire)?, Err(5));
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`atomic_swap`](Self::atomic_swap).
    ///
    /// # Panics
    ///
    /// If `failure` is `Release` or `AcqRel`, as the standard library's atomics do.
    #[inline]
    pub fn atomic_compare_exchange<T: AtomicAccess>(
        &self,
        current: T,
        new: T,
        addr: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<std::result::Result<T, T>> {
        let target = self.register_operand::<T>(addr)?;
        // SAFETY: the bytes of a `T::A` lie at `target` in the slice, aligned for it, and it is register sized.
        let answer = unsafe { atomic::compare_exchange(target, current, new, success, failure) }
            .map_err(Error::from_fault)?;
        if answer.is_ok() {
            self.bitmap.mark_dirty(addr, size_of::<T::A>());
        }
        Ok(answer)
    }

    /// Changes the integer at `addr`, and marks it.
    #[inline]
    fn fetch<T: AtomicAccess>(
        &self,
        change: Fetch,
        operand: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        let target = self.register_operand::<T>(addr)?;
        // SAFETY: the bytes of a `T::A` lie at `target` in the slice, aligned for it, and it is register sized.
        let answer =
            unsafe { atomic::fetch(target, change, operand, order) }.map_err(Error::from_fault)?;
        self.bitmap.mark_dirty(addr, size_of::<T::A>());
        Ok(answer)
    }

    /// As [`atomic_operand`](Self::atomic_operand), of a type that moves as one register.
    #[inline]
    fn register_operand<T: AtomicAccess>(&self, addr: usize) -> Result<*mut u8> {
        if !is_register_sized::<T>() {
            return Err(Error::TooBig {
                nelements: 1,
                size: size_of::<T::A>(),
            });
        }
        self.atomic_operand::<T>(addr)
    }

    /// The address of the first byte.
    #[inline]
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.addr
    }

    /// The bitmap alone.
    #[inline]
    pub(crate) fn into_bitmap(self) -> B {
        self.bitmap
    }

    /// The same bytes, marked in another bitmap.
    #[cfg(feature = "iommu")]
    pub(crate) fn with_other_bitmap<N: BitmapSlice>(self, bitmap: N) -> VolatileSlice<'a, N> {
        VolatileSlice {
            addr: self.addr,
            size: self.size,
            bitmap,
            phantom: PhantomData,
        }
    }

    /// Fails if the first byte does not lie at a multiple of `alignment`.
    #[inline]
    pub(crate) fn check_alignment(&self, alignment: usize) -> Result<()> {
        let addr = self.addr.addr();
        // No division: an alignment is a power of two.
        if addr & alignment.wrapping_sub(1) != 0 {
            return Err(misaligned(addr, alignment));
        }
        Ok(())
    }

    /// Whether a value of `size` bytes at `offset` lies in the slice.
    #[inline(always)]
    fn holds(&self, offset: usize, size: usize) -> bool {
        offset <= self.size && size <= self.size.wrapping_sub(offset)
    }

    /// How many of `wanted` bytes at `offset` lie in the slice; an error if there are none.
    #[inline]
    fn available(&self, offset: usize, wanted: usize) -> Result<usize> {
        match self.size.checked_sub(offset) {
            Some(rest) if rest != 0 => Ok(wanted.min(rest)),
            _ => Err(Error::OutOfBounds { addr: offset }),
        }
    }
}

#[cold]
fn misaligned(addr: usize, alignment: usize) -> Error {
    Error::Misaligned { addr, alignment }
}

/// How many elements of type `T` fit whole into `bytes`, but no more than `wanted`. Elements without a size always fit.
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

/// Offsets count from the start of the slice. Writes are marked in the slice's bitmap.
///
/// ```
/// use vm_memory::{Bytes, VolatileMemoryError, VolatileSlice};
///
/// let mut buf = [0u8; 8];
/// let slice = VolatileSlice::from(buf.as_mut_slice());
/// assert_eq!(slice.write(&[1, 2, 3], 6)?, 2);
/// assert!(matches!(slice.write(&[1], 8), Err(VolatileMemoryError::OutOfBounds { addr: 8 })));
/// # Ok::<(), VolatileMemoryError>(())
/// ```
impl<B: BitmapSlice> Bytes<usize> for VolatileSlice<'_, B> {
    type E = Error;

    #[inline(always)]
    fn write(&self, buf: &[u8], addr: usize) -> Result<usize> {
        moved_first(self.write_part(buf, addr)?)
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], addr: usize) -> Result<usize> {
        moved_first(self.read_part(buf, addr)?)
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], addr: usize) -> Result<()> {
        everything(buf.len(), self.write_part(buf, addr)?)
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], addr: usize) -> Result<()> {
        everything(buf.len(), self.read_part(buf, addr)?)
    }

    #[inline(always)]
    fn write_obj<T: ByteValued>(&self, val: T, addr: usize) -> Result<()> {
        if !self.holds(addr, size_of::<T>()) {
            return self.write_slice(val.as_slice(), addr);
        }
        // SAFETY: the bytes of a `T` lie in the slice at `addr` (just checked).
        let answer = unsafe { access::write_value(self.addr.wrapping_add(addr), &val) };
        // After a fault as well: a value of several pieces may have been written in part.
        self.bitmap.mark_dirty(addr, size_of::<T>());
        answer.map_err(Error::from_fault)
    }

    #[inline(always)]
    fn read_obj<T: ByteValued>(&self, addr: usize) -> Result<T> {
        self.read_obj_into(&mut MaybeUninit::uninit(), addr)
            .map(|value| *value)
    }

    fn read_volatile_from<F>(&self, addr: usize, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        let rest = self.offset(addr)?;
        let mut target = rest.part(0, rest.size.min(count));
        retry_interrupted(|| src.read_volatile(&mut target))
    }

    fn read_exact_volatile_from<F>(&self, addr: usize, src: &mut F, count: usize) -> Result<()>
    where
        F: ReadVolatile,
    {
        src.read_exact_volatile(&mut self.subslice(addr, count)?)
    }

    fn write_volatile_to<F>(&self, addr: usize, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        let rest = self.offset(addr)?;
        let source = rest.part(0, rest.size.min(count));
        retry_interrupted(|| dst.write_volatile(&source))
    }

    fn write_all_volatile_to<F>(&self, addr: usize, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        dst.write_all_volatile(&self.subslice(addr, count)?)
    }

    #[inline(always)]
    fn store<T: AtomicAccess>(&self, val: T, addr: usize, order: Ordering) -> Result<()> {
        let target = self.atomic_operand::<T>(addr)?;
        // SAFETY: the bytes of a `T::A` lie at `target` in the slice, aligned for it.
        unsafe { atomic::store(target, val, order) }.map_err(Error::from_fault)?;
        self.bitmap.mark_dirty(addr, size_of::<T::A>());
        Ok(())
    }

    #[inline(always)]
    fn load<T: AtomicAccess>(&self, addr: usize, order: Ordering) -> Result<T> {
        let source = self.atomic_operand::<T>(addr)?;
        // SAFETY: the bytes of a `T::A` lie at `source` in the slice, aligned for it.
        unsafe { atomic::load(source, order) }.map_err(Error::from_fault)
    }
}

impl<B: BitmapSlice> VolatileSlice<'_, B> {
    /// [`read_obj`](Bytes::read_obj), to where the caller wants the value.
    #[inline(always)]
    pub(crate) fn read_obj_into<'v, T: ByteValued>(
        &self,
        value: &'v mut MaybeUninit<T>,
        addr: usize,
    ) -> Result<&'v mut T> {
        if !self.holds(addr, size_of::<T>()) {
            let value = value.write(T::zeroed());
            return self.read_slice(value.as_mut_slice(), addr).map(|()| value);
        }
        // SAFETY: the bytes of a `T` lie in the slice at `addr` (just checked).
        unsafe { access::read_value(value, self.addr.wrapping_add(addr)) }
            .map_err(Error::from_fault)
    }

    /// Writes what fits of `buf` at `addr`: how many bytes, or the fault that stopped it.
    #[inline(always)]
    pub(crate) fn write_part(
        &self,
        buf: &[u8],
        addr: usize,
    ) -> Result<std::result::Result<usize, Fault>> {
        if buf.is_empty() {
            return Ok(Ok(0));
        }
        let count = self.available(addr, buf.len())?;
        let dst = self.addr.wrapping_add(addr);
        // SAFETY: `count` bytes from `addr` on are within the slice (by `available`), and as many within `buf`, which cannot be the
        // slice's own bytes: no reference covers those.
        let answer = unsafe { access::copy_to_guest(dst, buf.as_ptr(), count) };
        // After a fault as well: bytes behind those that count may have been written.
        self.bitmap.mark_dirty(addr, count);
        Ok(answer.map(|()| count))
    }

    /// Reads what there is at `addr` into `buf`: how many bytes, or the fault that stopped it.
    #[inline(always)]
    pub(crate) fn read_part(
        &self,
        buf: &mut [u8],
        addr: usize,
    ) -> Result<std::result::Result<usize, Fault>> {
        if buf.is_empty() {
            return Ok(Ok(0));
        }
        let count = self.available(addr, buf.len())?;
        let src = self.addr.wrapping_add(addr);
        // SAFETY: as in `write_part`, in the other direction.
        let answer = unsafe { access::copy_from_guest(buf.as_mut_ptr(), src, count) };
        Ok(answer.map(|()| count))
    }

    /// The host address of the atomic counterpart of a `T` at `addr`, which lies in the slice and is aligned.
    #[inline(always)]
    fn atomic_operand<T: AtomicAccess>(&self, addr: usize) -> Result<*mut u8> {
        self.compute_end_offset(addr, size_of::<T::A>())?;
        let host = self.addr.wrapping_add(addr);
        let alignment = align_of::<T::A>();
        if host.addr() & alignment.wrapping_sub(1) != 0 {
            return Err(misaligned(host.addr(), alignment));
        }
        Ok(host)
    }
}

/// The answer of an access that may end early: what was moved, or the fault if that is nothing.
#[inline(always)]
fn moved_first(answer: std::result::Result<usize, Fault>) -> Result<usize> {
    match answer {
        Ok(moved) => Ok(moved),
        Err(fault) if fault.completed() != 0 => Ok(fault.completed()),
        Err(fault) => Err(Error::from_fault(fault)),
    }
}

/// The answer of an access that must move everything.
#[inline(always)]
fn everything(expected: usize, answer: std::result::Result<usize, Fault>) -> Result<()> {
    match answer {
        Ok(completed) if completed == expected => Ok(()),
        Ok(completed) => Err(Error::PartialBuffer {
            expected,
            completed,
        }),
        Err(fault) => Err(Error::from_fault(fault)),
    }
}
