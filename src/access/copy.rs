//! Copies and fills.

use core::mem::size_of;

use super::arch::Routines;
use super::fault::Direction;
use super::recount::recount;
use super::routine_set::{FaultAddress, GuestSide, RoutineSet};
use super::{Fault, Plain};

/// Copies bytes from guest memory to host memory.
///
/// # Safety
///
/// `src` is a guest operand (see [`access`](super)) of `len` bytes. `dst` is valid for writes of
/// `len` bytes. The two do not overlap.
#[inline]
pub(crate) unsafe fn copy_from_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), Fault> {
    let side = GuestSide::Source;
    // SAFETY: this function's contract is that of `copy` with a guest source.
    match unsafe { Routines::copy(side, dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: `copy_below_fault` has the contract of `copy`, which this function's is.
        Err(address) => Err(unsafe { copy_below_fault(address, side, dst, src, len) }),
    }
}

/// Copies bytes from host memory to guest memory.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `len` bytes. `src` is valid for reads of
/// `len` initialised bytes. The two do not overlap.
#[inline]
pub(crate) unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), Fault> {
    let side = GuestSide::Destination;
    // SAFETY: this function's contract is that of `copy` with a guest destination.
    match unsafe { Routines::copy(side, dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: `copy_below_fault` has the contract of `copy`, which this function's is.
        Err(address) => Err(unsafe { copy_below_fault(address, side, dst, src, len) }),
    }
}

/// Counts the bytes that a copy moved before it faulted at `address`, by moving them once more.
///
/// # Safety
///
/// As for [`RoutineSet::copy`].
#[cold]
pub(super) unsafe fn copy_below_fault(
    address: FaultAddress,
    side: GuestSide,
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Fault {
    // SAFETY: `recount` passes at most `len`; the contract holds for a first part of the operands.
    let repeat = |len| unsafe { Routines::copy_ascending(side, dst, src, len) };
    recount(
        address,
        len,
        |at| side.operand_at(at, dst, src, len),
        repeat,
    )
}

/// Sets all bytes of a range of guest memory to `value`.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `len` bytes.
#[inline]
pub(crate) unsafe fn fill_guest(dst: *mut u8, value: u8, len: usize) -> Result<(), Fault> {
    // SAFETY: `dst` is a guest operand of `len` bytes, by this function's contract.
    let result = unsafe { Routines::fill(dst, value, len) };
    // SAFETY: `recount` passes at most `len`; a first part of a guest operand is one.
    let repeat = |len| unsafe { Routines::fill_ascending(dst, value, len) };
    result.map_err(|at| recount(at, len, |_| (dst, Direction::Write), repeat))
}

/// Copies `count` elements from guest memory to host memory.
///
/// Naturally aligned elements of 1, 2, 4 or 8 bytes are not torn, and are read in ascending order.
///
/// # Safety
///
/// As for [`copy_from_guest`], for `count * size_of::<T>()` bytes. The product does not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_from_guest<T: Plain>(
    dst: *mut T,
    src: *const u8,
    count: usize,
) -> Result<(), Fault> {
    if are_atomic::<T>(src) {
        let size = size_of::<T>();
        // SAFETY: `size` is 2, 4 or 8, and `src` is aligned to it (both by `are_atomic`). The rest
        // is this function's contract.
        return unsafe { copy_elements(GuestSide::Source, dst.cast(), src, count, size) };
    }
    // SAFETY: this function's contract, in bytes.
    unsafe { copy_from_guest(dst.cast(), src, count.wrapping_mul(size_of::<T>())) }
}

/// Copies `count` elements from host memory to guest memory.
///
/// Naturally aligned elements of 1, 2, 4 or 8 bytes are not torn, and are written in ascending
/// order.
///
/// # Safety
///
/// As for [`copy_to_guest`], for `count * size_of::<T>()` bytes. The product does not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_to_guest<T: Plain>(
    dst: *mut u8,
    src: *const T,
    count: usize,
) -> Result<(), Fault> {
    if are_atomic::<T>(dst) {
        let size = size_of::<T>();
        // SAFETY: `size` is 2, 4 or 8, and `dst` is aligned to it (both by `are_atomic`). The rest
        // is this function's contract; the bytes of a `Plain` value are initialised.
        return unsafe { copy_elements(GuestSide::Destination, dst, src.cast(), count, size) };
    }
    // SAFETY: this function's contract, in bytes.
    unsafe { copy_to_guest(dst, src.cast(), count.wrapping_mul(size_of::<T>())) }
}

/// Copies elements, and counts the bytes that were moved if there is a fault.
///
/// # Safety
///
/// As for [`RoutineSet::copy_elements`].
#[inline(always)]
unsafe fn copy_elements(
    side: GuestSide,
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), Fault> {
    // SAFETY: this function's contract, or for fewer elements.
    let copy = |count| unsafe { Routines::copy_elements(side, dst, src, count, size) };
    copy(count).map_err(|at| {
        let len = count.wrapping_mul(size);
        recount(
            at,
            len,
            |at| side.operand_at(at, dst, src, len),
            |bytes| copy(bytes.checked_div(size).unwrap_or(0)),
        )
    })
}

/// Returns whether elements of type `T` at `guest` must not be torn. Single bytes cannot be.
#[inline(always)]
fn are_atomic<T>(guest: *const u8) -> bool {
    matches!(size_of::<T>(), 2 | 4 | 8) && guest.addr().is_multiple_of(size_of::<T>())
}
