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
    // SAFETY: `src` is a guest operand and `dst` host memory, both of `len` bytes, and they do not
    // overlap (this function's contract). The side names the source.
    unsafe { copy(GuestSide::Source, dst, src, len) }
}

/// Copies bytes from host memory to guest memory.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `len` bytes. `src` is valid for reads of
/// `len` initialised bytes. The two do not overlap.
#[inline]
pub(crate) unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), Fault> {
    // SAFETY: `dst` is a guest operand and `src` host memory, both of `len` bytes, and they do not
    // overlap (this function's contract). The side names the destination.
    unsafe { copy(GuestSide::Destination, dst, src, len) }
}

/// Copies bytes. After a fault, counts those that were moved.
///
/// # Safety
///
/// `src` and `dst` are operands of `len` bytes, which do not overlap. `side` says which of them are
/// guest operands.
#[inline(always)]
unsafe fn copy(side: GuestSide, dst: *mut u8, src: *const u8, len: usize) -> Result<(), Fault> {
    // SAFETY: `src` and `dst` are operands of `len` bytes, which do not overlap, and `side` says
    // which of them are guest operands (this function's contract).
    match unsafe { Routines::copy(side, dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: `src` and `dst` are operands of `len` bytes, which do not overlap, and `side`
        // says which of them are guest operands (this function's contract).
        Err(address) => Err(unsafe { copy_below_fault(address, side, dst, src, len) }),
    }
}

/// Counts the bytes that a copy moved before it faulted at `address`, by moving them once more.
///
/// # Safety
///
/// `src` and `dst` are operands of `len` bytes, which do not overlap. `side` says which of them are
/// guest operands.
#[cold]
pub(super) unsafe fn copy_below_fault(
    address: FaultAddress,
    side: GuestSide,
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Fault {
    let repeat = |offset, len| {
        let (dst, src) = (dst.wrapping_add(offset), src.wrapping_add(offset));
        // SAFETY: `recount` passes parts of the `len` bytes of the operands, which do not overlap.
        // `side` names the guest operands (this function's contract).
        unsafe { Routines::copy_ascending(side, dst, src, len) }
    };
    recount(
        address,
        (len, 1),
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
    // SAFETY: `recount` passes parts of the `len` bytes. A part of a guest operand is one.
    let repeat =
        |offset, len| unsafe { Routines::fill_ascending(dst.wrapping_add(offset), value, len) };
    result.map_err(|at| recount(at, (len, 1), |_| (dst, Direction::Write), repeat))
}

/// Copies `count` elements from guest memory to host memory.
///
/// Naturally aligned elements of 1, 2, 4 or 8 bytes are not torn. Those of 2, 4 or 8 bytes are read
/// in ascending order, except within the same aligned 32 bytes.
///
/// # Safety
///
/// `src` is a guest operand (see [`access`](super)) of `count * size_of::<T>()` bytes. `dst` is
/// valid for writes of as many bytes. The two do not overlap, and the product does not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_from_guest<T: Plain>(
    dst: *mut T,
    src: *const u8,
    count: usize,
) -> Result<(), Fault> {
    if are_atomic::<T>(src) {
        let size = size_of::<T>();
        // SAFETY: `size` is 2, 4 or 8, and `src` is aligned to it (both by `are_atomic`). `src`
        // is a guest operand and `dst` host memory, both of `count * size` bytes, and they do not
        // overlap (this function's contract).
        return unsafe { copy_elements(GuestSide::Source, dst.cast(), src, count, size) };
    }
    // SAFETY: `src` is a guest operand and `dst` host memory, both of this many bytes. They do not
    // overlap, and the product does not wrap (this function's contract).
    unsafe { copy_from_guest(dst.cast(), src, count.wrapping_mul(size_of::<T>())) }
}

/// Copies `count` elements from host memory to guest memory.
///
/// Naturally aligned elements of 1, 2, 4 or 8 bytes are not torn. Those of 2, 4 or 8 bytes are
/// written in ascending order, except within the same aligned 32 bytes.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `count * size_of::<T>()` bytes. `src` is
/// valid for reads of as many bytes. The two do not overlap, and the product does not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_to_guest<T: Plain>(
    dst: *mut u8,
    src: *const T,
    count: usize,
) -> Result<(), Fault> {
    if are_atomic::<T>(dst) {
        let size = size_of::<T>();
        // SAFETY: `size` is 2, 4 or 8, and `dst` is aligned to it (both by `are_atomic`). `dst`
        // is a guest operand and `src` host memory, both of `count * size` bytes, and they do not
        // overlap (this function's contract). The bytes of a `Plain` value are initialised.
        return unsafe { copy_elements(GuestSide::Destination, dst, src.cast(), count, size) };
    }
    // SAFETY: `dst` is a guest operand and `src` host memory, both of this many bytes. They do not
    // overlap, and the product does not wrap (this function's contract). The bytes of a `Plain`
    // value are initialised.
    unsafe { copy_to_guest(dst, src.cast(), count.wrapping_mul(size_of::<T>())) }
}

/// Copies elements. After a fault, counts the bytes that were moved.
///
/// # Safety
///
/// `size` is 2, 4 or 8. `src` and `dst` are operands of `count * size` bytes, which do not overlap;
/// the product does not overflow. `side` names one guest operand, which is aligned to `size`.
#[inline(always)]
unsafe fn copy_elements(
    side: GuestSide,
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), Fault> {
    let copy = |offset, count| {
        let (dst, src) = (dst.wrapping_add(offset), src.wrapping_add(offset));
        // SAFETY: these are the elements of this function's contract or, when bytes are counted,
        // some of them. `recount` passes parts whose offset is a multiple of `size`. They do not
        // overlap, and the guest operand is aligned to `size`.
        unsafe { Routines::copy_elements(side, dst, src, count, size) }
    };
    copy(0, count).map_err(|at| {
        let len = count.wrapping_mul(size);
        recount(
            at,
            (len, size),
            |at| side.operand_at(at, dst, src, len),
            |offset, bytes| copy(offset, bytes.checked_div(size).unwrap_or(0)),
        )
    })
}

/// Returns whether elements of type `T` at `guest` move whole and in ascending order.
///
/// Single bytes cannot be torn, and need no order.
#[inline(always)]
pub(super) fn are_atomic<T>(guest: *const u8) -> bool {
    matches!(size_of::<T>(), 2 | 4 | 8) && guest.addr().is_multiple_of(size_of::<T>())
}
