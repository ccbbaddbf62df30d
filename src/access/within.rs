//! Copies between ranges of guest memory, which may overlap.

use super::arch::Routines;
use super::copy::copy_below_fault;
use super::fault;
use super::recount::record_fault;
use super::routine_set::{FaultAddress, GuestSide, RoutineSet};
use super::Fault;

/// Copies bytes within guest memory. The ranges may overlap.
///
/// Without concurrent writers, the result is that of a copy through a separate buffer.
///
/// After a fault in overlapping ranges, the copy cannot be repeated to count the bytes: some of the
/// source may be overwritten. The count therefore depends on the destination:
///
/// - Lower by at least [`STEP_MIN`] bytes: the copy proceeds in steps that do not overlap, and the
///   count is exact.
/// - Lower by less, or higher: the count is 0. A copy to a higher address begins with the last
///   bytes.
///
/// # Safety
///
/// `dst` and `src` are guest operands (see [`access`](super)) of `len` bytes each.
#[inline]
pub(crate) unsafe fn copy_within_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), Fault> {
    let distance = src.addr().wrapping_sub(dst.addr());
    if distance < len && distance >= STEP_MIN {
        // SAFETY: both are guest operands of `len` bytes, by this function's contract. `src` is
        // `distance` bytes above `dst`, which is at least `STEP_MIN` (just checked).
        return unsafe { copy_down_in_steps(dst, src, len, distance) };
    }
    // SAFETY: both are guest operands of `len` bytes, by this function's contract.
    match unsafe { Routines::copy_overlapping(dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: both are guest operands of `len` bytes, by this function's contract.
        Err(address) => Err(unsafe { count_within(address, dst, src, len) }),
    }
}

/// The shortest step. Shorter ones would cost more than an exact count is worth.
const STEP_MIN: usize = 16;

/// Copies bytes to a lower address, in ascending steps of `distance` bytes.
///
/// A step does not overlap its destination, and writing it does not overwrite any later one.
///
/// # Safety
///
/// `dst` and `src` are guest operands of `len` bytes. `src` is `distance` bytes above `dst`, at
/// least one.
unsafe fn copy_down_in_steps(
    dst: *mut u8,
    src: *const u8,
    len: usize,
    distance: usize,
) -> Result<(), Fault> {
    let mut done = 0usize;
    while done < len {
        let step = distance.min(len.wrapping_sub(done));
        let (dst, src) = (dst.wrapping_add(done), src.wrapping_add(done));
        // SAFETY: `done + step` is at most `len`, so these are `step` bytes of the guest
        // operands of this function's contract.
        match unsafe { Routines::copy_overlapping(dst, src, step) } {
            Ok(()) => done = done.wrapping_add(step),
            Err(address) => {
                // SAFETY: `done + step` is at most `len`, so these are `step` bytes of the
                // guest operands of this function's contract.
                let fault = unsafe { count_within(address, dst, src, step) };
                fault::add_completed(done);
                let completed = done.wrapping_add(fault.completed);
                return Err(Fault::after(completed));
            }
        }
    }
    Ok(())
}

/// Counts the bytes that a copy within guest memory moved before it faulted at `address`.
///
/// # Safety
///
/// `dst` and `src` are guest operands of `len` bytes each.
#[cold]
unsafe fn count_within(address: FaultAddress, dst: *mut u8, src: *const u8, len: usize) -> Fault {
    if overlap(dst, src, len) {
        let (guest, direction) = GuestSide::Both.operand_at(address, dst, src, len);
        return record_fault(address, guest, direction, 0);
    }
    // SAFETY: both are guest operands of `len` bytes, by this function's contract, and they do not
    // overlap (just checked).
    unsafe { copy_below_fault(address, GuestSide::Both, dst, src, len) }
}

/// Returns whether two ranges of `len` bytes overlap.
#[inline(always)]
pub(super) fn overlap(one: *const u8, other: *const u8, len: usize) -> bool {
    let distance = one.addr().wrapping_sub(other.addr());
    distance < len || distance.wrapping_neg() < len
}
