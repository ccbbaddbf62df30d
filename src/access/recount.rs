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
    Fault::after(completed)
}

/// Counts the bytes of an operation of `len` bytes that faulted at `address`, and records the
/// fault.
///
/// `operand_at` returns the guest operand that contains an address. `repeat` performs the first
/// bytes of the same operation again, in ascending order. If it faults as well, the bytes below
/// that address count. Each round is shorter than the one before, so the loop ends; usually after
/// two rounds.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Recounts a copy of `len` bytes from 0x1000. Each round may reach `limits` bytes, and the
    /// last limit applies to all later rounds. Returns the count, and the number of rounds.
    fn recounted(len: usize, limits: &[usize]) -> (usize, usize) {
        let guest = core::ptr::without_provenance::<u8>(0x1000);
        let fault_after = |bytes: usize| FaultAddress::new(0x1000 + bytes).unwrap();
        let mut rounds = 0;
        let fault = recount(
            fault_after(limits[0]),
            len,
            |_| (guest, Direction::Read),
            |len| {
                rounds += 1;
                match limits[rounds.min(limits.len() - 1)] {
                    limit if limit < len => Err(fault_after(limit)),
                    _ => Ok(()),
                }
            },
        );
        (fault.completed(), rounds)
    }

    #[test]
    fn recount_takes_rounds_that_do_not_depend_on_length() {
        for len in [0x2000, 1 << 20, usize::MAX / 2] {
            assert_eq!(recounted(len, &[0x1000]), (0x1000, 1));
            // A routine may report a later byte than the first.
            assert_eq!(recounted(len, &[0x1800, 0x1000]), (0x1000, 2));
        }
    }

    #[test]
    fn recount_while_more_pages_become_inaccessible_ends() {
        assert_eq!(recounted(0x4000, &[0x3000, 0x2000, 0x1000, 0]), (0, 4));
    }

    #[test]
    fn recount_with_address_outside_operand_ends() {
        let guest = core::ptr::without_provenance::<u8>(0x1000);
        let outside = FaultAddress::new(0x9000).unwrap();
        let mut lengths = Vec::new();
        let operand_at = |_| (guest, Direction::Write);
        let fault = recount(outside, 3, operand_at, |len| {
            lengths.push(len);
            if len == 0 {
                Ok(())
            } else {
                Err(outside)
            }
        });
        assert_eq!((fault.completed(), lengths), (0, vec![2, 1, 0]));
    }
}
