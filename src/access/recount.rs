//! Counting the bytes that were moved before a fault.

use super::fault::{self, Direction};
use super::routine_set::{FaultAddress, NO_ADDRESS};
use super::Fault;

/// Records a fault at `address` in the operand at `guest`, with `completed` bytes moved before it.
#[cold]
pub(super) fn record_fault(
    address: FaultAddress,
    guest: *const u8,
    direction: Direction,
    completed: usize,
) -> Fault {
    let host_address = match address {
        NO_ADDRESS => guest.addr().saturating_add(completed),
        // The address of a memory error may be the start of its page, below the operand.
        _ => address.get().max(guest.addr()),
    };
    fault::record(host_address, direction, completed);
    Fault::after(completed)
}

/// The number of bytes that are moved again at a time.
///
/// A page may become inaccessible at any moment. So a piece may have to be repeated as often as it
/// has pages. The number is a multiple of the size of each element.
const PIECE: usize = 1 << 16;

/// Counts the bytes of an operation of `len` bytes that faulted at `address`, and records the
/// fault.
///
/// The operation moves elements of `unit` bytes, a power of two. `operand_at` returns the guest
/// operand that contains an address. `repeat` performs a part of the same operation again, in
/// ascending order: the bytes at an offset, and their number. If it faults as well, the bytes below
/// that address count. Without an address, half of the part is tried, down to one element.
///
/// The bytes are moved again in pieces. A piece that was moved without a fault is not repeated. So
/// the time is proportional to `len`, even if another process truncates the file by a page for each
/// fault.
#[cold]
pub(super) fn recount(
    address: FaultAddress,
    (len, unit): (usize, usize),
    operand_at: impl Fn(FaultAddress) -> (*const u8, Direction),
    mut repeat: impl FnMut(usize, usize) -> Result<(), FaultAddress>,
) -> Fault {
    // Without an address, any number of bytes may have been moved.
    let below = |address: FaultAddress, (guest, _): (*const u8, Direction)| match address {
        NO_ADDRESS => usize::MAX,
        _ => address.get().saturating_sub(guest.addr()),
    };
    let (mut address, mut operand) = (address, operand_at(address));
    let mut end = below(address, operand).min(len.saturating_sub(unit));
    let (mut done, mut longest) = (0usize, PIECE);
    while done < end {
        let piece = longest.min(end.wrapping_sub(done));
        let piece_end = done.wrapping_add(piece);
        match repeat(done, piece) {
            Ok(()) => done = piece_end,
            Err(lower) => {
                (address, operand) = (lower, operand_at(lower));
                // Each round is shorter than the one before, so the loop ends.
                let less = piece_end.saturating_sub(unit);
                end = below(address, operand).min(less).max(done);
                if address == NO_ADDRESS {
                    let half = piece.wrapping_shr(1) & !unit.wrapping_sub(1);
                    longest = half.max(unit);
                }
            }
        }
    }
    let (guest, direction) = operand;
    record_fault(address, guest, direction, end)
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
            (len, 1),
            |_| (guest, Direction::Read),
            |offset, len| {
                rounds += 1;
                match limits[rounds.min(limits.len() - 1)] {
                    limit if limit < offset + len => Err(fault_after(limit)),
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
        assert_eq!(recounted(0x4000, &[0x3000, 0x2000, 0x1000, 0]), (0, 3));
    }

    /// Another process truncates the file by one page whenever the copy is about to reach its end.
    #[test]
    fn recount_of_shrinking_file_moves_few_bytes_more_than_its_length() {
        const PAGE: usize = 0x1000;
        let guest = core::ptr::without_provenance::<u8>(PAGE);
        for pages in [1, 16, 17, 5000] {
            let (mut size, mut moved) = (pages * PAGE, 0);
            let first = FaultAddress::new(PAGE + size).unwrap();
            let fault_at = |size: usize| FaultAddress::new(PAGE + size).unwrap();
            let repeat = |offset: usize, len: usize| {
                assert!(len <= PIECE && offset.is_multiple_of(PIECE));
                moved += len;
                if offset + len < size {
                    return Ok(());
                }
                // Pages that were already moved may also become inaccessible. They count.
                size = size.saturating_sub(PAGE);
                Err(fault_at(size.max(offset)))
            };
            let operand_at = |_| (guest, Direction::Read);
            let fault = recount(first, (pages * PAGE + 1, 1), operand_at, repeat);
            assert!(fault.completed() <= pages * PAGE);
            assert!(fault.completed() + 18 * PAGE >= pages * PAGE, "{pages}");
            assert!(moved <= pages * PAGE + 20 * PIECE, "{pages}: {moved}");
        }
    }

    #[test]
    fn recount_with_address_outside_operand_ends() {
        let guest = core::ptr::without_provenance::<u8>(0x1000);
        let outside = FaultAddress::new(0x9000).unwrap();
        let mut parts = Vec::new();
        let operand_at = |_| (guest, Direction::Write);
        let fault = recount(outside, (3, 1), operand_at, |offset, len| {
            parts.push((offset, len));
            Err(outside)
        });
        assert_eq!((fault.completed(), parts), (0, vec![(0, 2), (0, 1)]));
    }

    /// Without an address, the last byte that can be moved is found by halving.
    #[test]
    fn recount_without_address_counts_elements_before_fault() {
        let guest = core::ptr::without_provenance::<u8>(0x1000);
        for unit in [1, 2, 4, 8] {
            for len in [1, 2, 3, 16, 1000, PIECE, 3 * PIECE + 8, 3 * PIECE + 56].map(|n| n * unit) {
                for fault_at in [0, 1, 7, len / 3, len / 2, len - 1].map(|at| at.min(len - 1)) {
                    let (mut moved, mut rounds) = (0, 0);
                    let repeat = |offset: usize, part: usize| {
                        assert!(offset.is_multiple_of(unit) && part.is_multiple_of(unit));
                        assert!(offset + part <= len);
                        (moved, rounds) = (moved + part, rounds + 1);
                        match offset + part {
                            end if end <= fault_at => Ok(()),
                            _ => Err(NO_ADDRESS),
                        }
                    };
                    let operand_at = |_| (guest, Direction::Write);
                    let fault = recount(NO_ADDRESS, (len, unit), operand_at, repeat);
                    let before = fault_at / unit * unit;
                    assert_eq!(fault.completed(), before, "{unit} {len} {fault_at}");
                    let last = fault::last().unwrap();
                    assert_eq!(
                        (last.host_address, last.completed),
                        (0x1000 + before, before)
                    );
                    assert!(moved <= len + 2 * PIECE, "{moved} of {len}");
                    assert!(rounds <= len / PIECE + 40, "{rounds} for {len}");
                }
            }
        }
    }

    /// The repetition may succeed: other instructions move the bytes.
    #[test]
    fn recount_without_address_and_without_second_fault_counts_all_but_last_element() {
        let guest = core::ptr::without_provenance::<u8>(0x1000);
        for (len, unit) in [(1, 1), (100, 1), (64, 8), (2 * PIECE, 4)] {
            let operand_at = |_| (guest, Direction::Read);
            let fault = recount(NO_ADDRESS, (len, unit), operand_at, |_, _| Ok(()));
            assert_eq!(fault.completed(), len - unit);
        }
    }
}
