//! Accesses to one register or word.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64};

use super::*;

/// Returns the number of up to 16 bytes in memory.
fn number(bytes: &[u8]) -> u128 {
    let append = |number: u128, byte: &u8| number << 8 | u128::from(*byte);
    if cfg!(target_endian = "big") {
        bytes.iter().fold(0, append)
    } else {
        bytes.iter().rev().fold(0, append)
    }
}

pub(in crate::access) fn load_and_store_at_each_alignment_move_only_their_width<R: TestedSet>() {
    for at in 0..16usize {
        for size in [1, 2, 4, 8, 16] {
            let mut memory = numbered(48);
            let source = memory.clone();
            let ptr = memory[at..].as_mut_ptr();
            let bytes: [u8; 16] = std::array::from_fn(|i| 0xa0 + i as u8);
            // SAFETY: at least 16 bytes follow `ptr`.
            let loaded = unsafe {
                let loaded = R::load(ptr, size).unwrap();
                R::store(ptr, number(&bytes[..size]), size).unwrap();
                loaded
            };
            assert_eq!(loaded, number(&source[at..at + size]));
            let mut expected = source.clone();
            expected[at..at + size].copy_from_slice(&bytes[..size]);
            assert_eq!(memory, expected);
        }
    }
}

pub(in crate::access) fn load_ordered_and_store_ordered_move_only_their_width<R: TestedSet>() {
    let mut memory = [u64::MAX; 2];
    let ptr = memory.as_mut_ptr().cast::<u8>();
    for size in [1usize, 2, 4, 8] {
        let mask = u64::MAX >> (64 - 8 * size);
        for store in [Ordering::Relaxed, Ordering::Release, Ordering::SeqCst] {
            for load in [Ordering::Relaxed, Ordering::Acquire, Ordering::SeqCst] {
                // SAFETY: `memory` is 16 bytes at an alignment of 8.
                unsafe {
                    R::store_ordered(ptr, 0x8877_6655_4433_2211, size, store).unwrap();
                    assert_eq!(
                        R::load_ordered(ptr, size, load).unwrap(),
                        0x8877_6655_4433_2211 & mask
                    );
                    R::store_ordered(ptr, u64::MAX, size, store).unwrap();
                }
            }
        }
    }
    assert_eq!(memory, [u64::MAX; 2]);
}

pub(in crate::access) fn fetch_and_compare_exchange_return_previous_value<R: TestedSet>() {
    let (first, second) = (0x8877_6655_4433_2211u64, 0xf0e1_d2c3_b4a5_9687u64);
    let orders = [
        Ordering::Relaxed,
        Ordering::Acquire,
        Ordering::Release,
        Ordering::AcqRel,
        Ordering::SeqCst,
    ];
    for size in [1usize, 2, 4, 8] {
        let mask = u64::MAX >> (64 - 8 * size);
        for order in orders {
            for (change, wanted) in [
                (Fetch::Swap, second),
                (Fetch::Add, first.wrapping_add(second)),
                (Fetch::And, first & second),
                (Fetch::Or, first | second),
            ] {
                let mut memory = [u64::MAX; 2];
                let ptr = memory.as_mut_ptr().cast::<u8>();
                // SAFETY: `memory` is 16 bytes at an alignment of 8.
                unsafe {
                    R::store_ordered(ptr, first, size, Ordering::Relaxed).unwrap();
                    let previous = R::fetch(ptr, change, second, size, order).unwrap();
                    assert_eq!(previous, first & mask, "{change:?} {order:?}");
                    let now = R::load_ordered(ptr, size, Ordering::Relaxed).unwrap();
                    assert_eq!(now, wanted & mask, "{change:?} {order:?}");
                    R::store_ordered(ptr, u64::MAX, size, Ordering::Relaxed).unwrap();
                }
                assert_eq!(memory, [u64::MAX; 2]);
            }
            for failure in [Ordering::Relaxed, Ordering::Acquire, Ordering::SeqCst] {
                let mut memory = [0u64; 2];
                let ptr = memory.as_mut_ptr().cast::<u8>();
                // SAFETY: `memory` is 16 bytes at an alignment of 8.
                let (failed, done, now) = unsafe {
                    R::store_ordered(ptr, first, size, Ordering::Relaxed).unwrap();
                    (
                        R::compare_exchange(ptr, second & mask, 0, size, order, failure).unwrap(),
                        R::compare_exchange(ptr, first & mask, second & mask, size, order, failure)
                            .unwrap(),
                        R::load_ordered(ptr, size, Ordering::Relaxed).unwrap(),
                    )
                };
                assert_eq!(
                    [failed, done, now],
                    [first & mask, first & mask, second & mask]
                );
                assert_eq!(memory[1], 0);
            }
        }
    }
}

pub(in crate::access) fn fetch_by_two_threads_loses_no_change<R: TestedSet>() {
    let rounds = if cfg!(miri) { 50 } else { 20_000u64 };
    for size in [1usize, 2, 4, 8] {
        let mut memory = [0u64; 1];
        let shared = AtomicPtr::new(memory.as_mut_ptr().cast::<u8>());
        std::thread::scope(|scope| {
            for bit in 0..2 {
                let shared = &shared;
                scope.spawn(move || {
                    let ptr = shared.load(Ordering::Relaxed);
                    for _ in 0..rounds {
                        // SAFETY: 8 aligned bytes that only routines access while the threads run.
                        unsafe {
                            R::fetch(ptr, Fetch::Add, 4, size, Ordering::Relaxed).unwrap();
                            R::fetch(ptr, Fetch::Or, 1 << bit, size, Ordering::Relaxed).unwrap();
                            let mask = u64::MAX >> (64 - 8 * size);
                            let was = R::fetch(
                                ptr,
                                Fetch::And,
                                mask & !(1 << bit),
                                size,
                                Ordering::Relaxed,
                            )
                            .unwrap();
                            assert_ne!(was & (1 << bit), 0);
                        }
                    }
                });
            }
        });
        let mask = u64::MAX >> (64 - 8 * size);
        // SAFETY: 8 aligned bytes; the threads have ended.
        let now =
            unsafe { R::load_ordered(shared.load(Ordering::Relaxed), size, Ordering::Relaxed) };
        assert_eq!(now.unwrap(), (rounds * 8) & mask);
    }
}

pub(in crate::access) fn aligned_load_and_store_are_not_torn<R: TestedSet>() {
    let memory = AtomicU64::new(0);
    let shared = AtomicPtr::new(memory.as_ptr().cast::<u8>());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut ones = false;
            while !done.load(Ordering::Relaxed) {
                ones = !ones;
                let value = if ones { u128::MAX } else { 0 };
                let ptr = shared.load(Ordering::Relaxed);
                // SAFETY: 8 aligned bytes that only routines access while the threads run.
                unsafe { R::store(ptr, value, 8) }.unwrap();
            }
        });
        let _done = test_support::SetOnDrop(&done);
        for _ in 0..if cfg!(miri) { 100 } else { 200_000 } {
            let mut copied = [0u8; 8];
            let ptr = shared.load(Ordering::Relaxed);
            // SAFETY: `ptr` is 8 aligned bytes that only routines access; `copied` is a local
            // variable.
            let (single, ordered) = unsafe {
                R::copy(Source, copied.as_mut_ptr(), ptr, 8).unwrap();
                (
                    R::load(ptr, 8).unwrap() as u64,
                    R::load_ordered(ptr, 8, Ordering::Acquire).unwrap(),
                )
            };
            for value in [single, ordered, u64::from_ne_bytes(copied)] {
                assert!(value == 0 || value == u64::MAX, "torn: {value:#x}");
            }
        }
    });
}

macro_rules! single_tests {
    ($routines:ty) => {
        instantiate!(
            single, $routines:
            load_and_store_at_each_alignment_move_only_their_width,
            load_ordered_and_store_ordered_move_only_their_width,
            fetch_and_compare_exchange_return_previous_value,
            fetch_by_two_threads_loses_no_change,
            aligned_load_and_store_are_not_torn
        );
    };
}
