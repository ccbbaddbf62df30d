//! Accesses of one value, by whichever kernels the module calls `kernel`.

macro_rules! single_tests {
    () => {
        #[test]
        fn single_accesses_move_their_width_aligned_or_not() {
            for at in 0..16usize {
                let mut memory = numbered(32);
                let ptr = memory[at..].as_mut_ptr();
                let source = memory.clone();
                let take = |n: usize| source[at..at + n].to_vec();
                // SAFETY: 16 bytes lie behind `ptr`.
                unsafe {
                    assert_eq!(
                        kernel::load_u8(ptr).unwrap().to_ne_bytes().to_vec(),
                        take(1)
                    );
                    assert_eq!(
                        kernel::load_u16(ptr).unwrap().to_ne_bytes().to_vec(),
                        take(2)
                    );
                    assert_eq!(
                        kernel::load_u32(ptr).unwrap().to_ne_bytes().to_vec(),
                        take(4)
                    );
                    assert_eq!(
                        kernel::load_u64(ptr).unwrap().to_ne_bytes().to_vec(),
                        take(8)
                    );
                    assert_eq!(
                        kernel::load_u128(ptr).unwrap().to_ne_bytes().to_vec(),
                        take(16)
                    );
                    let value = u128::from_ne_bytes(std::array::from_fn(|i| 0xa0 + i as u8));
                    kernel::store_u128(ptr, value).unwrap();
                    kernel::store_u64(ptr, 0x0807_0605_0403_0201).unwrap();
                    kernel::store_u32(ptr, 0xd4d3_d2d1).unwrap();
                    kernel::store_u16(ptr, 0xc2c1).unwrap();
                    kernel::store_u8(ptr, 0xb1).unwrap();
                }
                let mut expected = source.clone();
                expected[at..at + 16]
                    .copy_from_slice(&std::array::from_fn::<u8, 16, _>(|i| 0xa0 + i as u8));
                expected[at..at + 8].copy_from_slice(&0x0807_0605_0403_0201u64.to_ne_bytes());
                expected[at..at + 4].copy_from_slice(&0xd4d3_d2d1u32.to_ne_bytes());
                expected[at..at + 2].copy_from_slice(&0xc2c1u16.to_ne_bytes());
                expected[at] = 0xb1;
                assert_eq!(memory, expected);
            }
        }

        #[test]
        fn ordered_accesses_move_their_width() {
            let mut memory = [u64::MAX; 2];
            let ptr = memory.as_mut_ptr().cast::<u8>();
            for size in [1usize, 2, 4, 8] {
                let mask = u64::MAX >> (64 - 8 * size);
                for store in [Ordering::Relaxed, Ordering::Release, Ordering::SeqCst] {
                    for load in [Ordering::Relaxed, Ordering::Acquire, Ordering::SeqCst] {
                        // SAFETY: `memory` is 16 bytes at an alignment of 8.
                        unsafe {
                            kernel::store_ordered(ptr, 0x8877_6655_4433_2211, size, store).unwrap();
                            assert_eq!(
                                kernel::load_ordered(ptr, size, load).unwrap(),
                                0x8877_6655_4433_2211 & mask
                            );
                            kernel::store_ordered(ptr, u64::MAX, size, store).unwrap();
                        }
                    }
                }
            }
            assert_eq!(memory, [u64::MAX; 2]);
        }

        #[test]
        fn changes_in_one_piece_return_what_was_there() {
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
                            kernel::store_ordered(ptr, first, size, Ordering::Relaxed).unwrap();
                            let there = kernel::fetch(ptr, change, second, size, order).unwrap();
                            assert_eq!(there, first & mask, "{change:?} {order:?}");
                            let now = kernel::load_ordered(ptr, size, Ordering::Relaxed).unwrap();
                            assert_eq!(now, wanted & mask, "{change:?} {order:?}");
                            kernel::store_ordered(ptr, u64::MAX, size, Ordering::Relaxed).unwrap();
                        }
                        assert_eq!(memory, [u64::MAX; 2]);
                    }
                    for failure in [Ordering::Relaxed, Ordering::Acquire, Ordering::SeqCst] {
                        let mut memory = [0u64; 2];
                        let ptr = memory.as_mut_ptr().cast::<u8>();
                        // SAFETY: as above.
                        let (failed, done, now) = unsafe {
                            kernel::store_ordered(ptr, first, size, Ordering::Relaxed).unwrap();
                            (
                                kernel::compare_exchange(
                                    ptr,
                                    second & mask,
                                    0,
                                    size,
                                    order,
                                    failure,
                                )
                                .unwrap(),
                                kernel::compare_exchange(
                                    ptr,
                                    first & mask,
                                    second & mask,
                                    size,
                                    order,
                                    failure,
                                )
                                .unwrap(),
                                kernel::load_ordered(ptr, size, Ordering::Relaxed).unwrap(),
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

        /// Two threads that change one number lose no change to each other, whatever its width.
        #[test]
        fn changes_in_one_piece_are_not_lost() {
            let rounds = if cfg!(miri) { 50 } else { 20_000u64 };
            for size in [1usize, 2, 4, 8] {
                let mut memory = [0u64; 1];
                let ptr = memory.as_mut_ptr() as usize;
                std::thread::scope(|scope| {
                    for bit in 0..2 {
                        scope.spawn(move || {
                            let ptr = ptr as *mut u8;
                            for _ in 0..rounds {
                                // SAFETY: 8 aligned bytes that are accessed by kernels only while the threads run.
                                unsafe {
                                    kernel::fetch(ptr, Fetch::Add, 4, size, Ordering::Relaxed)
                                        .unwrap();
                                    kernel::fetch(
                                        ptr,
                                        Fetch::Or,
                                        1 << bit,
                                        size,
                                        Ordering::Relaxed,
                                    )
                                    .unwrap();
                                    let mask = u64::MAX >> (64 - 8 * size);
                                    let was = kernel::fetch(
                                        ptr,
                                        Fetch::And,
                                        mask & !(1 << bit),
                                        size,
                                        Ordering::Relaxed,
                                    )
                                    .unwrap();
                                    // Nobody else clears this bit.
                                    assert_ne!(was & (1 << bit), 0);
                                }
                            }
                        });
                    }
                });
                let mask = u64::MAX >> (64 - 8 * size);
                // SAFETY: as above; the threads are done.
                let now = unsafe { kernel::load_ordered(ptr as _, size, Ordering::Relaxed) };
                assert_eq!(now.unwrap(), (rounds * 8) & mask);
            }
        }

        /// A value is never seen half written.
        #[test]
        #[cfg(not(miri))]
        fn aligned_accesses_are_not_torn() {
            use std::sync::atomic::AtomicBool;
            let memory = std::sync::atomic::AtomicU64::new(0);
            let ptr = memory.as_ptr() as usize;
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut ones = false;
                    while !done.load(Ordering::Relaxed) {
                        ones = !ones;
                        // SAFETY: 8 aligned bytes that are accessed by kernels only while the threads run.
                        unsafe {
                            kernel::store_u64(ptr as *mut u8, if ones { u64::MAX } else { 0 })
                        }
                        .unwrap();
                    }
                });
                for _ in 0..200_000 {
                    let mut copied = [0u8; 8];
                    // SAFETY: as above.
                    let (single, ordered) = unsafe {
                        kernel::copy_from_guest(copied.as_mut_ptr(), ptr as *const u8, 8).unwrap();
                        (
                            kernel::load_u64(ptr as *const u8).unwrap(),
                            kernel::load_ordered(ptr as *const u8, 8, Ordering::Acquire).unwrap(),
                        )
                    };
                    for value in [single, ordered, u64::from_ne_bytes(copied)] {
                        assert!(value == 0 || value == u64::MAX, "torn: {value:#x}");
                    }
                }
                done.store(true, Ordering::Relaxed);
            });
        }

        /// Nothing of a neighbouring page is touched: pages without access lie right before and right behind.
        #[test]
        #[cfg(all(
            target_os = "linux",
            not(miri),
            any(feature = "rawfd", feature = "backend-mmap")
        ))]
        fn single_accesses_stay_off_the_pages_around() {
            let page = FencedPages::one();
            let (first, last) = (page.start(), page.end());
            macro_rules! plain {
                ($load:ident, $store:ident, $integer:ty) => {
                    let value = <$integer>::MAX / 7;
                    let size = size_of::<$integer>();
                    for at in [first, last.wrapping_sub(size)] {
                        // SAFETY: `size` bytes lie in the page.
                        let there = unsafe {
                            kernel::$store(at, value).unwrap();
                            kernel::$load(at).unwrap()
                        };
                        assert_eq!(there, value);
                    }
                };
            }
            plain!(load_u8, store_u8, u8);
            plain!(load_u16, store_u16, u16);
            plain!(load_u32, store_u32, u32);
            plain!(load_u64, store_u64, u64);
            plain!(load_u128, store_u128, u128);
            let order = Ordering::SeqCst;
            for size in [1usize, 2, 4, 8] {
                for at in [first, last.wrapping_sub(size)] {
                    // SAFETY: `size` bytes lie in the page, aligned to it.
                    unsafe {
                        kernel::store_ordered(at, 1, size, order).unwrap();
                        for (change, operand, expected) in [
                            (Fetch::Swap, 0x16, 0x16),
                            (Fetch::Add, 0x13, 0x29),
                            (Fetch::And, 0x0f, 0x09),
                            (Fetch::Or, 0x42, 0x4b),
                        ] {
                            kernel::fetch(at, change, operand, size, order).unwrap();
                            assert_eq!(kernel::load_ordered(at, size, order).unwrap(), expected);
                        }
                        kernel::compare_exchange(
                            at,
                            0x4b,
                            1,
                            size,
                            Ordering::AcqRel,
                            Ordering::Relaxed,
                        )
                        .unwrap();
                        assert_eq!(kernel::load_ordered(at, size, order).unwrap(), 1);
                    }
                }
            }
        }
    };
}
