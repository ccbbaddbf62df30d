//! Copies within guest memory, whose ranges may overlap.

use super::fault::{self, Direction};
use super::kernel::{self, FaultAddress};
use super::{met, overlap, recover, Fault};

/// Copies bytes from guest memory to guest memory. The ranges may overlap; the result is that of a copy through a third place,
/// as far as nobody else writes meanwhile.
///
/// After a fault in ranges that overlap, bytes that have been moved cannot be moved again, for they may have been overwritten. A copy to a lower
/// place goes in pieces that do not overlap, and its count is exact, unless it is lower by less than [`PIECE_MIN`]. No byte counts as moved after a
/// fault of any other: a copy to a higher place begins with the last bytes.
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
    if distance < len && distance >= PIECE_MIN {
        // SAFETY: the caller's contract; the destination is `distance` bytes below the source, which is not 0.
        return unsafe { copy_down_in_pieces(dst, src, len, distance) };
    }
    // SAFETY: the caller's contract covers both operands.
    match unsafe { kernel::copy_within_guest(dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: the caller's contract.
        Err(address) => Err(unsafe { recover_within_guest(address, dst, src, len) }),
    }
}

/// Pieces of fewer bytes cost more than they are worth.
const PIECE_MIN: usize = 16;

/// Copies bytes to a lower place in guest memory, the lowest first, in pieces as long as the distance: none overlaps the place that it goes to, and no
/// later one has been overwritten.
///
/// # Safety
///
/// As [`copy_within_guest`]; `dst` is `distance` bytes below `src`, at least one.
unsafe fn copy_down_in_pieces(
    dst: *mut u8,
    src: *const u8,
    len: usize,
    distance: usize,
) -> Result<(), Fault> {
    let mut done = 0usize;
    while done < len {
        let piece = distance.min(len.wrapping_sub(done));
        let (dst, src) = (dst.wrapping_add(done), src.wrapping_add(done));
        // SAFETY: the caller's contract, for `piece` bytes at `done`, which end with the operands or before.
        match unsafe { kernel::copy_within_guest(dst, src, piece) } {
            Ok(()) => done = done.wrapping_add(piece),
            Err(address) => {
                // SAFETY: as above.
                let fault = unsafe { recover_within_guest(address, dst, src, piece) };
                fault::add_completed(done);
                let completed = done.wrapping_add(fault.completed);
                return Err(Fault { completed });
            }
        }
    }
    Ok(())
}

/// [`recover`] for a copy from guest memory to guest memory.
///
/// # Safety
///
/// As [`copy_within_guest`].
#[cold]
unsafe fn recover_within_guest(
    address: FaultAddress,
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Fault {
    // SAFETY: the caller's contract, for a first part of the operands; called only if they do not overlap.
    let again = |len| unsafe { kernel::copy_within_guest_ascending(dst, src, len) };
    let operand_of = |at: FaultAddress| match at.get().wrapping_sub(src.addr()) {
        offset if offset < len => (src, Direction::Read),
        _ => (dst.cast_const(), Direction::Write),
    };
    if overlap(dst, src, len) {
        let (guest, direction) = operand_of(address);
        return met(address, guest, direction, 0);
    }
    recover(address, len, operand_of, again)
}
