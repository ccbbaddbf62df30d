//! Atomic accesses to one word.

use core::sync::atomic::Ordering;

use super::fault::Direction;
use super::recount::record_fault;
use super::{Fault, Fetch, Word};

/// Reads a word with the ordering `order`: relaxed, acquire or sequentially consistent.
///
/// # Safety
///
/// `src` is a guest operand (see [`access`](super)) of `size_of::<W>()` bytes, aligned to that
/// size.
#[inline(always)]
pub(crate) unsafe fn load_ordered<W: Word>(src: *const u8, order: Ordering) -> Result<W, Fault> {
    // SAFETY: `src` is an aligned guest operand of a `W`, by this function's contract.
    unsafe { W::load_ordered(src, order) }.map_err(|at| record_fault(at, src, Direction::Read, 0))
}

/// Writes a word with the ordering `order`: relaxed, release or sequentially consistent.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `size_of::<W>()` bytes, aligned to that
/// size.
#[inline(always)]
pub(crate) unsafe fn store_ordered<W: Word>(
    dst: *mut u8,
    value: W,
    order: Ordering,
) -> Result<(), Fault> {
    // SAFETY: `dst` is an aligned guest operand of a `W`, by this function's contract.
    unsafe { W::store_ordered(dst, value, order) }
        .map_err(|at| record_fault(at, dst, Direction::Write, 0))
}

/// Applies `change` to a word atomically, and returns the previous value.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `size_of::<W>()` bytes, aligned to that
/// size.
#[inline(always)]
pub(crate) unsafe fn fetch<W: Word>(
    dst: *mut u8,
    change: Fetch,
    operand: W,
    order: Ordering,
) -> Result<W, Fault> {
    // SAFETY: `dst` is an aligned guest operand of a `W`, by this function's contract.
    unsafe { W::fetch(dst, change, operand, order) }
        .map_err(|at| record_fault(at, dst, Direction::Write, 0))
}

/// Writes `new` atomically if the word is `current`.
///
/// Returns the previous value, in `Ok` if it was `current` and in `Err` otherwise.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `size_of::<W>()` bytes, aligned to that
/// size.
#[inline(always)]
pub(crate) unsafe fn compare_exchange<W: Word>(
    dst: *mut u8,
    current: W,
    new: W,
    success: Ordering,
    failure: Ordering,
) -> Result<Result<W, W>, Fault> {
    // SAFETY: `dst` is an aligned guest operand of a `W`, by this function's contract.
    let previous = unsafe { W::compare_exchange(dst, current, new, success, failure) }
        .map_err(|at| record_fault(at, dst, Direction::Write, 0))?;
    Ok(if previous == current {
        Ok(previous)
    } else {
        Err(previous)
    })
}
