//! [`Bytes`] by offset, for [`VolatileSlice`].

use core::mem::{align_of, size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::location::Location;
use super::{atomic, check_alignment, referable, Error, Result, VolatileMemory, VolatileSlice};
use crate::access::fault::Direction;
use crate::access::{self, Fault};
use crate::bitmap::{BitmapSlice, OnPanic};
use crate::bytes::Bytes;
use crate::io::{read_once, retry_interrupted, ReadVolatile, WriteVolatile};
use crate::value::{is_register_sized, AtomicAccess, ByteValued};

/// Accesses by offset in the slice. Writes are marked in the slice's dirty bitmap.
///
/// # Examples
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
        count_or_fault(self.write_part(buf, addr)?)
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], addr: usize) -> Result<usize> {
        count_or_fault(self.read_part(buf, addr)?)
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], addr: usize) -> Result<()> {
        all_or_fault(buf.len(), self.write_part(buf, addr)?)
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], addr: usize) -> Result<()> {
        all_or_fault(buf.len(), self.read_part(buf, addr)?)
    }

    #[inline(always)]
    fn write_obj<T: ByteValued>(&self, val: T, addr: usize) -> Result<()> {
        // On demand, a copy of the bytes is not torn either.
        if !self.holds(addr, size_of::<T>()) || self.addr.host().is_none() {
            return self.write_slice(val.as_slice(), addr);
        }
        let dst = self.addr.as_ptr().wrapping_add(addr);
        // SAFETY: `holds` checked that the bytes of a `T` are in the slice at `addr`. The slice is
        // a guest operand (contract of `with_bitmap`), and has a host address (just checked).
        let result = unsafe { access::write_value(dst, &val) };
        // Even after a fault: a value larger than a register may have been written in part.
        self.bitmap.mark_dirty(addr, size_of::<T>());
        result.map_err(Error::from_fault)
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
        let target = self.offset(addr)?.first(count);
        // A stream may claim to have moved more than it was given.
        Ok(read_once(src, &target)?.min(target.len()))
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
        let source = self.offset(addr)?.first(count);
        // A stream may claim to have moved more than it was given.
        Ok(retry_interrupted(|| dst.write_volatile(&source))?.min(source.len()))
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
        let size = size_of::<T::A>();
        // Such a store is code of another crate, which may panic after it has written.
        let in_other_code = !is_register_sized::<T>();
        let on_panic = in_other_code.then(|| OnPanic(|| self.bitmap.mark_dirty(addr, size)));
        let stored = target.with(size, Direction::Write, |target| {
            // SAFETY: `atomic_operand` returned an aligned location for the bytes of a `T::A` in
            // the slice, not null unless `T` is register sized. The slice's bytes are mapped for
            // the access and covered by no Rust reference except to atomics (contract of
            // `with_bitmap`).
            unsafe { atomic::store(target, val, order) }
        });
        core::mem::forget(on_panic);
        stored.map_err(Error::from_fault)?;
        // Not by the closure, which becomes a call when built for size.
        self.bitmap.mark_dirty(addr, size);
        Ok(())
    }

    #[inline(always)]
    fn load<T: AtomicAccess>(&self, addr: usize, order: Ordering) -> Result<T> {
        let source = self.atomic_operand::<T>(addr)?;
        let loaded = source.with(size_of::<T::A>(), Direction::Read, |source| {
            // SAFETY: `atomic_operand` returned an aligned location for the bytes of a `T::A` in
            // the slice, not null unless `T` is register sized. The slice's bytes are mapped for
            // the access and covered by no Rust reference except to atomics (contract of
            // `with_bitmap`).
            unsafe { atomic::load(source, order) }
        });
        loaded.map_err(Error::from_fault)
    }
}

impl<B: BitmapSlice> VolatileSlice<'_, B> {
    /// Like [`read_obj`](Bytes::read_obj), but the caller provides the memory of the value.
    #[inline(always)]
    pub(crate) fn read_obj_into<'v, T: ByteValued>(
        &self,
        value: &'v mut MaybeUninit<T>,
        addr: usize,
    ) -> Result<&'v mut T> {
        // On demand, a copy of the bytes is not torn either.
        if !self.holds(addr, size_of::<T>()) || self.addr.host().is_none() {
            let value = value.write(T::zeroed());
            return self.read_slice(value.as_mut_slice(), addr).map(|()| value);
        }
        let src = self.addr.as_ptr().wrapping_add(addr);
        // SAFETY: `holds` checked that the bytes of a `T` are in the slice at `addr`. The slice is
        // a guest operand (contract of `with_bitmap`), and has a host address (just checked).
        // `value` is a reference to memory for one.
        unsafe { access::read_value(value, src) }.map_err(Error::from_fault)
    }

    /// Writes the bytes of `buf` that fit at `addr`. Returns their number, or the fault.
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
        // SAFETY: `available` checked that `count` bytes at `addr` are in the slice; `count` is at
        // most `buf.len()`. The slice is a guest operand (contract of `with_bitmap`).
        let result = unsafe { self.addr.wrapping_add(addr).write(buf, count) };
        // Even after a fault: bytes past the completed ones may have been written.
        self.bitmap.mark_dirty(addr, count);
        Ok(result.map(|()| count))
    }

    /// Reads the bytes at `addr` that fit into `buf`. Returns their number, or the fault.
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
        // SAFETY: `available` checked that `count` bytes at `addr` are in the slice; `count` is at
        // most `buf.len()`. The slice is a guest operand (contract of `with_bitmap`).
        let result = unsafe { self.addr.wrapping_add(addr).read(buf, count) };
        Ok(result.map(|()| count))
    }

    /// Returns the location of a `T::A` at `addr`, after checking its size, bounds and alignment.
    ///
    /// If `T` is not [register sized](is_register_sized), the host address is not null.
    ///
    /// If `T` has no bytes, it is any such address.
    #[inline(always)]
    pub(super) fn atomic_operand<T: AtomicAccess>(&self, addr: usize) -> Result<Location<'_>> {
        if size_of::<T::A>() != size_of::<T>() {
            return Err(without_atomic_form::<T>());
        }
        self.compute_end_offset(addr, size_of::<T::A>())?;
        let location = self.addr.wrapping_add(addr);
        if !is_register_sized::<T>() && location.host().is_some() {
            let host = referable::<T::A>(location)?.as_ptr().cast();
            return Ok(Location::new(host, None));
        }
        // Memory that is mapped for the access is aligned to a page, wherever it begins.
        if location.host().is_none() && align_of::<T::A>() > crate::xen::PAGE_SIZE {
            return Err(without_atomic_form::<T>());
        }
        check_alignment(location, align_of::<T::A>())?;
        Ok(location)
    }
}

/// Returns the error of an atomic access to a type of another crate that does not support it.
#[cold]
pub(super) fn without_atomic_form<T: AtomicAccess>() -> Error {
    Error::TooBig {
        nelements: 1,
        size: size_of::<T::A>(),
    }
}

/// Returns the number of bytes moved, even after a fault. Returns the fault if that number is 0.
#[inline(always)]
fn count_or_fault(result: std::result::Result<usize, Fault>) -> Result<usize> {
    match result {
        Ok(moved) => Ok(moved),
        Err(fault) if fault.completed() != 0 => Ok(fault.completed()),
        Err(fault) => Err(Error::from_fault(fault)),
    }
}

/// Returns `Ok` if all `expected` bytes were moved.
#[inline(always)]
fn all_or_fault(expected: usize, result: std::result::Result<usize, Fault>) -> Result<()> {
    match result {
        Ok(completed) if completed == expected => Ok(()),
        Ok(completed) => Err(Error::PartialBuffer {
            expected,
            completed,
        }),
        Err(fault) => Err(Error::from_fault(fault)),
    }
}
