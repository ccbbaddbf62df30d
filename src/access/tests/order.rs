//! The order of elements.
//!
//! Routines move elements in ascending program order. On x86_64, other processors see that order.
//! On aarch64, they need not, so these tests run on x86_64 only.

use super::*;
use crate::access::copy::are_atomic;

/// The bytes that are copied: a head, many blocks, and a tail.
const LEN: usize = 1024 + 32 - 8;
/// The number of copies, which fits into two bytes.
const GENERATIONS: u64 = 6_000;
const ROUNDS: usize = 5;

/// Returns the offsets of the elements that are compared: one in each block, in ascending order.
///
/// Within a block, the order is unspecified. The first block is shorter.
fn compared(size: usize) -> impl DoubleEndedIterator<Item = usize> {
    core::iter::once(size).chain((32..LEN - size).step_by(32))
}

/// A reader in descending order never finds an element older than one that it has read before.
pub(in crate::access) fn copy_elements_to_guest_is_seen_in_ascending_order<R: TestedSet>() {
    for size in [2usize, 4, 8] {
        for _ in 0..ROUNDS {
            let mut guest = Aligned([0u8; LEN]);
            let guest = guest.0.as_mut_ptr() as usize;
            let done = std::sync::atomic::AtomicBool::new(false);
            let first_newer_than_its_predecessors = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _done = test_support::SetOnDrop(&done);
                    let mut host = vec![0u8; LEN];
                    for generation in 1..=GENERATIONS {
                        for block in compared(size) {
                            host[block..block + size]
                                .copy_from_slice(&generation.to_le_bytes()[..size]);
                        }
                        let (dst, src) = ((guest + size) as *mut u8, host[size..].as_ptr());
                        // SAFETY: the operands are at offset `size` of `guest` and of `host`, two
                        // separate allocations of `LEN` bytes. `guest` is aligned and outlives the
                        // scope, and only routines access it while the threads run. Only this
                        // thread uses `host`.
                        unsafe { R::copy_elements(Destination, dst, src, LEN / size - 1, size) }
                            .unwrap();
                    }
                });
                let generation_at = |at: usize| {
                    // SAFETY: the operand is one aligned element of `guest`, a local array that
                    // outlives the scope. While the threads run, only routines access it, which
                    // makes it a guest operand.
                    unsafe { R::load_ordered((guest + at) as *const u8, size, Ordering::Acquire) }
                };
                let mut wrong = None;
                while !done.load(Ordering::Acquire) && wrong.is_none() {
                    let mut newest = 0;
                    for block in compared(size).rev() {
                        let generation = generation_at(block).unwrap();
                        if generation < newest {
                            wrong = Some((block, generation, newest));
                        }
                        newest = newest.max(generation);
                    }
                }
                wrong
            });
            assert_eq!(
                first_newer_than_its_predecessors, None,
                "elements of {size} bytes"
            );
        }
    }
}

/// After writes in descending order, no element is older than one at a lower address.
pub(in crate::access) fn copy_elements_from_guest_sees_ascending_order<R: TestedSet>() {
    for size in [2usize, 4, 8] {
        for _ in 0..ROUNDS {
            let mut guest = Aligned([0u8; LEN]);
            let guest = guest.0.as_mut_ptr() as usize;
            let done = std::sync::atomic::AtomicBool::new(false);
            let older_than_its_predecessor = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _done = test_support::SetOnDrop(&done);
                    for generation in 1..=GENERATIONS / 4 {
                        for block in compared(size).rev() {
                            let dst = (guest + block) as *mut u8;
                            // SAFETY: the operand is one aligned element of `guest`, a local array
                            // that outlives the scope. While the threads run, only routines access
                            // it, which makes it a guest operand.
                            unsafe { R::store_ordered(dst, generation, size, Ordering::Release) }
                                .unwrap();
                        }
                    }
                });
                let mut host = vec![0u8; LEN];
                let mut wrong = None;
                while !done.load(Ordering::Acquire) && wrong.is_none() {
                    let (dst, src) = (host[size..].as_mut_ptr(), (guest + size) as *const u8);
                    // SAFETY: the operands are at offset `size` of `guest` and of `host`, two
                    // separate allocations of `LEN` bytes. `guest` is aligned and outlives the
                    // scope, and only routines access it while the threads run. Only this thread
                    // uses `host`.
                    unsafe { R::copy_elements(Source, dst, src, LEN / size - 1, size) }.unwrap();
                    let mut newest = 0;
                    for block in compared(size) {
                        let mut bytes = [0; 8];
                        bytes[..size].copy_from_slice(&host[block..block + size]);
                        let generation = u64::from_le_bytes(bytes);
                        if generation < newest {
                            wrong = Some((block, generation, newest));
                        }
                        newest = generation;
                    }
                }
                wrong
            });
            assert_eq!(older_than_its_predecessor, None, "elements of {size} bytes");
        }
    }
}

#[test]
fn only_aligned_elements_of_2_4_and_8_bytes_are_ordered() {
    fn ordered<T>() -> [bool; 2] {
        let aligned = core::ptr::without_provenance::<u8>(64);
        [aligned, aligned.wrapping_add(1)].map(are_atomic::<T>)
    }
    assert_eq!(ordered::<u8>(), [false, false]);
    assert_eq!(ordered::<u16>(), [true, false]);
    assert_eq!(ordered::<[u8; 3]>(), [false, false]);
    assert_eq!(ordered::<[u16; 2]>(), [true, false]);
    assert_eq!(ordered::<u64>(), [true, false]);
    assert_eq!(ordered::<u128>(), [false, false]);
}

macro_rules! order_tests {
    ($routines:ty) => {
        instantiate!(
            order, $routines:
            copy_elements_to_guest_is_seen_in_ascending_order,
            copy_elements_from_guest_sees_ascending_order
        );
    };
}
