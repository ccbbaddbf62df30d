//! Counting the bytes that were moved before a fault.

use super::fault::{self, Direction};
use super::routine_set::FaultAddress;
use super::Fault;

/// Records a fault at `address` in the operand at `guest`, with `completed` bytes moved before it.
#[cold]
pub(super) fn record_fault(
    address: FaultAddress,
    guest: *const u8,
    direction: Direction,
    completed: usize,
) -> Fault {
    // The address of a memory error may be the start of its page, below the operand.
    fault::record(address.get().max(guest.addr()), direction, completed);
    Fault { completed }
}

/// Counts the bytes of an operation of `len` bytes that faulted at `address`, and records the fault.
///
/// `operand_at` returns the guest operand that contains an address. `repeat` performs the first bytes
/// of the same operation again, in ascending order. If it faults as well, the bytes below that address
/// count. Each round is shorter than the one before, so the loop ends; usually after two rounds.
#[cold]
pub(super) fn recount(
    mut address: FaultAddress,
    len: usize,
    operand_at: impl Fn(FaultAddress) -> (*const u8, Direction),
    mut repeat: impl FnMut(usize) -> Result<(), FaultAddress>,
) -> Fault {
    let mut completed = len;
    loop {
        let (guest, direction) = operand_at(address);
        let below = address.get().saturating_sub(guest.addr());
        completed = below.min(completed.saturating_sub(1));
        match repeat(completed) {
            Ok(()) => return record_fault(address, guest, direction, completed),
            Err(lower) => address = lower,
        }
    }
}
