//! Access routines in assembly, for x86_64 and aarch64.
//!
//! This module contains what the processors share: the division of a copy among routines, and the
//! fault table with its handler. The module of a processor contains the single accesses
//! ([`Register`](super::routine_set::Register), [`Word`](super::routine_set::Word)), the routines,
//! and the choice of a routine by length ([`Select`]).

#[macro_use]
mod fault_table;
#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(all(
    any(target_os = "linux", windows),
    any(
        feature = "rawfd",
        feature = "backend-mmap",
        feature = "backend-bitmap"
    )
))]
mod handler;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as processor;
#[cfg(target_arch = "x86_64")]
use x86_64 as processor;

use core::marker::PhantomData;
use core::num::NonZeroUsize;

use processor::routines::{
    ascending_bytes, descending_bytes, elements_of_2, elements_of_4, elements_of_8, fill_ascending,
    small_bytes, SMALL_MAX,
};
use processor::{invoke, Routine};

use super::routine_set::{FaultAddress, GuestSide, RoutineSet};
use super::within::overlap;

/// The routines for the processor that this program runs on.
pub(crate) type Routines = Assembly<processor::Detected>;

/// The routines that `S` selects.
pub(crate) struct Assembly<S>(PhantomData<S>);

/// The choice of routines for one kind of processor.
///
/// # Safety
///
/// Each routine is for the operation and the length, and this processor has the features that it
/// needs.
pub(super) unsafe trait Select {
    /// Returns the routine for a copy of `len` bytes between ranges that do not overlap.
    fn copy(len: usize) -> Routine;

    /// Returns the routine for a fill of `len` bytes.
    fn fill(len: usize) -> Routine;

    /// Returns the routine for copies of aligned blocks of [`BLOCK`] bytes, in ascending order.
    ///
    /// It does not tear any aligned 8 bytes. There is no order within a block.
    fn blocks() -> Routine;
}

/// The size of the blocks in which [`RoutineSet::copy_elements`] moves elements.
const BLOCK: usize = 32;

/// The bounds of a guest operand, which the fault handler reads from registers of a routine.
#[derive(Clone, Copy)]
struct Operand {
    start: usize,
    end: usize,
}

impl Operand {
    /// An operand that contains no address.
    const NONE: Operand = Operand { start: 0, end: 0 };

    fn new(ptr: *const u8, len: usize) -> Self {
        Operand {
            start: ptr.addr(),
            end: ptr.addr().wrapping_add(len),
        }
    }
}

impl GuestSide {
    /// Returns the guest operands of a copy.
    #[inline(always)]
    fn operands(self, dst: *const u8, src: *const u8, len: usize) -> [Operand; 2] {
        match self {
            GuestSide::Source => [Operand::new(src, len), Operand::NONE],
            GuestSide::Destination => [Operand::new(dst, len), Operand::NONE],
            GuestSide::Both => [Operand::new(src, len), Operand::new(dst, len)],
        }
    }
}

/// Returns `value`, or the address of the fault if it is not 0.
#[inline(always)]
fn fault_result<T>(value: T, fault: usize) -> Result<T, FaultAddress> {
    match NonZeroUsize::new(fault) {
        None => Ok(value),
        Some(address) => Err(address),
    }
}

// SAFETY: each routine that `S` selects is for the operation and the length (contract of `Select`).
// Like those named here, it accesses only the bytes of its operands, and has written all of the
// destination before it returns 0.
unsafe impl<S: Select> RoutineSet for Assembly<S> {
    #[cfg(all(
        any(target_os = "linux", windows),
        any(
            feature = "rawfd",
            feature = "backend-mmap",
            feature = "backend-bitmap"
        )
    ))]
    const INSTALL_FAULT_HANDLER: Option<fn() -> std::io::Result<()>> = Some(handler::install);

    #[inline(always)]
    unsafe fn copy(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        let operands = side.operands(dst, src, len);
        // SAFETY: both are valid for `len` bytes and do not overlap (contract of `copy`). The
        // routine is one for that length (contract of `Select`). `side` gives the guest operands.
        unsafe { invoke(S::copy(len), dst, src, len, operands) }
    }

    unsafe fn copy_ascending(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        let operands = side.operands(dst, src, len);
        // SAFETY: both are valid for `len` bytes and do not overlap (contract of `copy_ascending`).
        // `ascending_bytes` takes any length. `side` gives the guest operands.
        unsafe { invoke(ascending_bytes, dst, src, len, operands) }
    }

    unsafe fn copy_overlapping(
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        let operands = GuestSide::Both.operands(dst, src, len);
        let routine: Routine = if len <= SMALL_MAX {
            // Reads all bytes before it writes any.
            small_bytes
        } else if !overlap(dst, src, len) {
            S::copy(len)
        } else if dst.addr().wrapping_sub(src.addr()) < len {
            // The destination begins within the source: each byte is read before it is overwritten
            // only if the last bytes go first.
            descending_bytes
        } else {
            ascending_bytes
        };
        // SAFETY: both are guest operands of `len` bytes (contract of `copy_overlapping`).
        // `small_bytes` takes at most `SMALL_MAX` bytes, and `S::copy(len)` ranges that do not
        // overlap (both checked above). The other two take any ranges.
        unsafe { invoke(routine, dst, src, len, operands) }
    }

    #[inline]
    unsafe fn fill(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
        // SAFETY: `dst` is a guest operand of `len` bytes (contract of `fill`). The routine is a
        // fill (contract of `Select`).
        unsafe { invoke_fill(S::fill(len), dst, value, len) }
    }

    unsafe fn fill_ascending(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
        // SAFETY: `dst` is a guest operand of `len` bytes (contract of `fill_ascending`). The
        // routine is a fill.
        unsafe { invoke_fill(fill_ascending, dst, value, len) }
    }

    unsafe fn copy_elements(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        count: usize,
        size: usize,
    ) -> Result<(), FaultAddress> {
        let len = count.wrapping_mul(size);
        let operands @ [guest, _] = side.operands(dst, src, len);
        let elements: Routine = match size {
            2 => elements_of_2,
            4 => elements_of_4,
            _ => elements_of_8,
        };
        // Elements up to the first block boundary in guest memory, blocks, and the remaining
        // elements.
        let head = (guest.start.wrapping_neg() & (BLOCK - 1)).min(len);
        let body = len.wrapping_sub(head) & !(BLOCK - 1);
        let tail = len.wrapping_sub(head).wrapping_sub(body);
        let mut offset = 0usize;
        for (routine, len) in [(elements, head), (S::blocks(), body), (elements, tail)] {
            if len != 0 {
                let (dst, src) = (dst.wrapping_add(offset), src.wrapping_add(offset));
                // SAFETY: the three parts make up the operands, which are valid for `len` bytes and
                // do not overlap (contract of `copy_elements`). No part is empty. Each is a
                // multiple of the size that its routine moves: `size` divides the address of the
                // guest operand, the length, and `BLOCK`.
                unsafe { invoke(routine, dst, src, len, operands) }?;
            }
            offset = offset.wrapping_add(len);
        }
        Ok(())
    }
}

/// Invokes a routine that fills.
///
/// # Safety
///
/// `routine` is a fill, and `dst` a guest operand of `len` bytes.
#[inline]
unsafe fn invoke_fill(
    routine: Routine,
    dst: *mut u8,
    value: u8,
    len: usize,
) -> Result<(), FaultAddress> {
    // The register of the source holds eight copies of the byte.
    let pattern = usize::from(value).wrapping_mul(usize::from_ne_bytes([1; 8]));
    let pattern = core::ptr::without_provenance(pattern);
    let operands = GuestSide::Destination.operands(dst, pattern, len);
    // SAFETY: `dst` is the guest operand, of `len` bytes (this function's contract). A fill does
    // not access memory at its source.
    unsafe { invoke(routine, dst, pattern, len, operands) }
}
