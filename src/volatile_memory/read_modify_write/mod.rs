//! Atomic read-modify-write operations of [`VolatileSlice`].
//!
//! Device models need them for indices and flags that the guest changes at the same time. Each
//! operation is one atomic instruction, or a loop of them, on guest memory.

#[cfg(test)]
mod tests;

use core::mem::size_of;
use core::sync::atomic::Ordering;

use super::location::Location;
use super::slice_bytes::without_atomic_form;
use super::{atomic, Error, Result, VolatileSlice};
use crate::access::fault::Direction;
use crate::access::Fetch;
use crate::bitmap::BitmapSlice;
use crate::value::{is_register_sized, AtomicAccess};

impl<B: BitmapSlice> VolatileSlice<'_, B> {
    /// Atomically replaces the integer at `addr`, and returns the previous value.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::atomic::Ordering;
    /// use vm_memory::VolatileSlice;
    ///
    /// # let mut storage = [0u64; 2];
    /// # // SAFETY: `storage` is aligned, outlives the slice, and is accessed only through it.
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
    /// - [`Error::OutOfBounds`] or [`Error::Overflow`] if the integer is not in the slice.
    /// - [`Error::Misaligned`] if its host address is not naturally aligned.
    /// - [`Error::TooBig`] if `T::A` is not an atomic integer of the size of `T`. Only a type of
    ///   another crate can cause this.
    /// - [`Error::IOError`] if the access [faults](crate::fault).
    #[inline]
    pub fn atomic_swap<T: AtomicAccess>(&self, val: T, addr: usize, order: Ordering) -> Result<T> {
        self.fetch(Fetch::Swap, val, addr, order)
    }

    /// Atomically adds `val` to the integer at `addr`, wrapping, and returns the previous value.
    ///
    /// # Errors
    ///
    /// Returns an error if the integer is out of bounds or misaligned, if no atomic integer has its
    /// size, or if the access faults. See [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_add<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::Add, val, addr, order)
    }

    /// Atomically replaces the integer at `addr` by its bitwise AND with `val`.
    ///
    /// Returns the previous value.
    ///
    /// # Errors
    ///
    /// Returns an error if the integer is out of bounds or misaligned, if no atomic integer has its
    /// size, or if the access faults. See [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_and<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::And, val, addr, order)
    }

    /// Atomically replaces the integer at `addr` by its bitwise OR with `val`.
    ///
    /// Returns the previous value.
    ///
    /// # Errors
    ///
    /// Returns an error if the integer is out of bounds or misaligned, if no atomic integer has its
    /// size, or if the access faults. See [`atomic_swap`](Self::atomic_swap).
    #[inline]
    pub fn atomic_fetch_or<T: AtomicAccess>(
        &self,
        val: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        self.fetch(Fetch::Or, val, addr, order)
    }

    /// Atomically replaces the integer at `addr` with `new` if it is `current`.
    ///
    /// Returns the previous value: in `Ok` if it was replaced, in `Err` if not.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::atomic::Ordering::{AcqRel, Acquire};
    /// use vm_memory::VolatileSlice;
    ///
    /// # let mut storage = [0u64; 2];
    /// # // SAFETY: `storage` is aligned, outlives the slice, and is accessed only through it.
    /// # let slice = unsafe { VolatileSlice::new(storage.as_mut_ptr().cast(), 16) };
    /// assert_eq!(slice.atomic_compare_exchange(0u16, 5, 2, AcqRel, Acquire)?, Ok(0));
    /// assert_eq!(slice.atomic_compare_exchange(0u16, 6, 2, AcqRel, Acquire)?, Err(5));
    /// # Ok::<(), vm_memory::VolatileMemoryError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns an error if the integer is out of bounds or misaligned, if no atomic integer has its
    /// size, or if the access faults. See [`atomic_swap`](Self::atomic_swap).
    ///
    /// # Panics
    ///
    /// Panics if `failure` is `Release` or `AcqRel`.
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
        let result = target.with(size_of::<T::A>(), Direction::Write, |target| {
            // SAFETY: `register_operand` returned the location of a `T::A` in the slice, aligned
            // for it, and checked that `T` is register sized. The slice's bytes are mapped for the
            // access and covered by no Rust reference except to atomics (contract of
            // `with_bitmap`).
            unsafe { atomic::compare_exchange::<T>(target, current, new, success, failure) }
        });
        let result = result.map_err(Error::from_fault)?;
        if result.is_ok() {
            self.bitmap.mark_dirty(addr, size_of::<T::A>());
        }
        // After the mark: the conversion of another crate may panic.
        Ok(result.map(atomic::value_of).map_err(atomic::value_of))
    }

    /// Applies `change` to the integer at `addr`, and marks it dirty.
    #[inline]
    fn fetch<T: AtomicAccess>(
        &self,
        change: Fetch,
        operand: T,
        addr: usize,
        order: Ordering,
    ) -> Result<T> {
        let target = self.register_operand::<T>(addr)?;
        let result = target.with(size_of::<T::A>(), Direction::Write, |target| {
            // SAFETY: `register_operand` returned the location of a `T::A` in the slice, aligned
            // for it, and checked that `T` is register sized. The slice's bytes are mapped for the
            // access and covered by no Rust reference except to atomics (contract of
            // `with_bitmap`).
            unsafe { atomic::fetch::<T>(target, change, operand, order) }
        });
        let result = result.map_err(Error::from_fault)?;
        self.bitmap.mark_dirty(addr, size_of::<T::A>());
        // After the mark: the conversion of another crate may panic.
        Ok(atomic::value_of(result))
    }

    /// Like [`atomic_operand`](Self::atomic_operand), for types that fit a register.
    #[inline]
    fn register_operand<T: AtomicAccess>(&self, addr: usize) -> Result<Location<'_>> {
        if !is_register_sized::<T>() {
            return Err(without_atomic_form::<T>());
        }
        self.atomic_operand::<T>(addr)
    }
}
