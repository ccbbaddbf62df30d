//! Faults in copies and fills. Their results for users are tested in `tests/faults/`.

use super::guard_pages::GuardedPages;
use super::*;

pub(in crate::access) fn copy_and_fill_at_inaccessible_page_return_its_address<R: TestedSet>() {
    if crate::fault::install().is_err() {
        return; // these routines do not recover from faults
    }
    let memory = GuardedPages::new(16);
    let mut host = vec![0x3cu8; 40_000];
    let host = host.as_mut_ptr();
    for len in (1..=MAX_LEN).chain([1000, 5000, 17_000, 40_000]) {
        for accessible in (0..len).step_by(len / 4 + 1) {
            // The accessible bytes are the first ones, or the last.
            for guest in [
                memory.end().wrapping_sub(accessible),
                memory.start().wrapping_sub(len - accessible),
            ] {
                let check = |result: Result<(), _>| {
                    let at: usize = core::num::NonZeroUsize::get(result.unwrap_err());
                    assert!((guest.addr()..guest.addr() + len).contains(&at));
                    assert!(!(memory.start().addr()..memory.end().addr()).contains(&at));
                };
                // SAFETY: the handler recovers from faults at inaccessible bytes of the guest
                // operand; `host` has as many bytes, and none of them.
                unsafe {
                    check(R::copy(Source, host, guest, len));
                    check(R::copy(Destination, guest, host, len));
                    check(R::copy_overlapping(host, guest, len));
                    check(R::copy_overlapping(guest, host, len));
                    check(R::copy_ascending(Source, host, guest, len));
                    check(R::copy_ascending(Destination, guest, host, len));
                    check(R::fill(guest, 1, len));
                    check(R::fill_ascending(guest, 1, len));
                }
                for size in [2, 4, 8] {
                    if guest.addr() % size == 0 && len % size == 0 {
                        // SAFETY: the handler recovers, and the guest operand is aligned to `size`.
                        unsafe {
                            check(R::copy_elements(Source, host, guest, len / size, size));
                            check(R::copy_elements(Destination, guest, host, len / size, size));
                        }
                    }
                }
            }
        }
    }
}

/// Routines may treat a destination a little above the source, modulo the size of a page, in a way
/// of their own.
pub(in crate::access) fn copy_just_above_source_within_page_returns_address_of_fault<
    R: TestedSet,
>() {
    if crate::fault::install().is_err() {
        return; // these routines do not recover from faults
    }
    const LEN: usize = 20_000;
    const ACCESSIBLE: usize = 10_000;
    let (guest, host) = (GuardedPages::new(16), GuardedPages::new(16));
    for distance in [1, 12, 31, 32] {
        let check = |result: Result<(), _>| {
            let at: usize = core::num::NonZeroUsize::get(result.unwrap_err());
            let inaccessible = guest.end().addr()..guest.end().addr() + LEN;
            assert!(inaccessible.contains(&at), "{distance}");
        };
        let operand = guest.end().wrapping_sub(ACCESSIBLE);
        let within_page = operand.addr() % 4096;
        let above = host.start().wrapping_add(within_page + distance);
        let below = host.start().wrapping_add(4096 + within_page - distance);
        // SAFETY: the handler recovers from faults at inaccessible bytes of the guest operand;
        // `LEN` bytes follow the two addresses in their pages.
        unsafe {
            check(R::copy(Source, above, operand, LEN));
            check(R::copy(Destination, operand, below, LEN));
        }
    }
}

macro_rules! fault_tests {
    ($routines:ty) => {
        instantiate!(
            faults, $routines:
            copy_and_fill_at_inaccessible_page_return_its_address,
            copy_just_above_source_within_page_returns_address_of_fault
        );
    };
}
