//! One set of tests for every set of kernels: the ones in use, and the portable ones beside them.

use super::*;
use core::sync::atomic::Ordering;

/// Longest copy that is tried at every alignment.
const MAX_LEN: usize = if cfg!(miri) { 40 } else { 300 };

macro_rules! kernel_tests {
    ($name:ident, $kernel:path) => {
        mod $name {
            use super::*;
            use $kernel as kernel;

            /// Fills a buffer so that a byte tells where it came from.
            fn numbered(len: usize) -> Vec<u8> {
                (0..len).map(|i| (i % 251) as u8 ^ 0x5a).collect()
            }

            /// Every alignment to 64.
            fn alignments() -> impl Iterator<Item = usize> {
                (0..64).step_by(if cfg!(miri) { 21 } else { 1 })
            }

            #[test]
            fn copies_move_every_length_at_every_alignment_and_nothing_else() {
                let source = numbered(MAX_LEN + 64);
                let (clean, mut target) = (vec![0xeeu8; MAX_LEN + 128], vec![0xeeu8; MAX_LEN + 128]);
                for src_at in alignments() {
                    for dst_at in alignments() {
                        for len in 0..=MAX_LEN {
                            for to_guest in [false, true] {
                                let src = source[src_at..].as_ptr();
                                let dst = target[dst_at..].as_mut_ptr();
                                // SAFETY: both vectors have at least `len` bytes from there on.
                                unsafe {
                                    if to_guest {
                                        kernel::copy_to_guest(dst, src, len).unwrap();
                                    } else {
                                        kernel::copy_from_guest(dst, src, len).unwrap();
                                    }
                                }
                                let (written, behind) = (dst_at..dst_at + len, dst_at + len..);
                                assert!(
                                    target[..dst_at] == clean[..dst_at]
                                        && target[written.clone()] == source[src_at..src_at + len]
                                        && target[behind.clone()] == clean[behind],
                                    "{len} bytes from {src_at} to {dst_at}"
                                );
                                target[written.clone()].copy_from_slice(&clean[written]);
                            }
                        }
                    }
                }
            }

            #[test]
            fn fills_write_every_length_at_every_alignment_and_nothing_else() {
                let mut target = vec![0xeeu8; (1 << 16) + 128];
                for len in (0..=MAX_LEN).chain([1000, 4096, (1 << 14) - 1, 1 << 14, 1 << 16]) {
                    for at in alignments() {
                        for ascending in [false, true] {
                            let dst = target[at..].as_mut_ptr();
                            // SAFETY: the vector has `len` bytes from there on.
                            unsafe {
                                if ascending {
                                    kernel::fill_guest_ascending(dst, 0x3c, len).unwrap();
                                } else {
                                    kernel::fill_guest(dst, 0x3c, len).unwrap();
                                }
                            }
                            let (before, rest) = target.split_at(at);
                            let (filled, behind) = rest.split_at(len);
                            assert!(before.iter().all(|b| *b == 0xee), "{len} bytes at {at}");
                            assert!(filled.iter().all(|b| *b == 0x3c), "{len} bytes at {at}");
                            assert!(
                                behind[..64].iter().all(|b| *b == 0xee),
                                "{len} bytes at {at}"
                            );
                            target[at..at + len].fill(0xee);
                        }
                    }
                }
            }

            #[test]
            fn long_copies_move_every_byte() {
                for len in [
                    301,
                    511,
                    512,
                    513,
                    1000,
                    2047,
                    2048,
                    2049,
                    4095,
                    4096,
                    65_537,
                    (4 << 20) - 1,
                    (4 << 20) + 77,
                ] {
                    let source = numbered(len);
                    let mut target = vec![0; len + 1];
                    // SAFETY: both vectors have at least `len` bytes.
                    unsafe { kernel::copy_from_guest(target.as_mut_ptr(), source.as_ptr(), len) }.unwrap();
                    assert_eq!(target[..len], source);
                    assert_eq!(target[len], 0);
                    target.fill(0);
                    let (src, dst) = (source.as_ptr(), target.as_mut_ptr());
                    // SAFETY: as above.
                    unsafe {
                        kernel::copy_from_guest_ascending(dst, src, len / 2).unwrap();
                        assert_eq!(
                            (&target[..len / 2], target[len / 2]),
                            (&source[..len / 2], 0)
                        );
                        kernel::copy_to_guest_ascending(dst, src, len - 1).unwrap();
                        kernel::copy_within_guest_ascending(dst, src, len).unwrap();
                    }
                    assert_eq!(target[..len], source);
                    assert_eq!(target[len], 0);
                }
            }

            #[test]
            fn overlapping_copies_read_before_they_write() {
                let steps = if cfg!(miri) { 17 } else { 1 };
                let fresh = numbered(MAX_LEN + 256);
                let (mut memory, mut expected) = (fresh.clone(), fresh.clone());
                for len in (1..=MAX_LEN).step_by(steps) {
                    // From 128 bytes further down to 128 bytes further up.
                    for dst_at in (0..=256).step_by(steps) {
                        let src_at = 128;
                        memory.copy_from_slice(&fresh);
                        expected.copy_from_slice(&fresh);
                        expected.copy_within(src_at..src_at + len, dst_at);
                        let base = memory.as_mut_ptr();
                        // SAFETY: both ranges lie in `memory`, which nothing refers to meanwhile.
                        unsafe { kernel::copy_within_guest(base.add(dst_at), base.add(src_at), len) }
                            .unwrap();
                        assert!(memory == expected, "{len} bytes from {src_at} to {dst_at}");
                    }
                }
            }

            #[test]
            fn elements_are_moved_in_order_and_number() {
                for size in [2, 4, 8] {
                    for count in [0, 1, 2, 3, 17, 100] {
                        // Eight-byte storage gives the alignment that the kernel asks for.
                        let source: Vec<u64> = (0..101u64)
                            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                            .collect();
                        for to_guest in [false, true] {
                            let mut target = vec![0u64; 101];
                            let (src, dst) = (
                                source.as_ptr().cast::<u8>(),
                                target.as_mut_ptr().cast::<u8>(),
                            );
                            // SAFETY: 101 * 8 bytes are more than `count * size`, and the vectors are aligned to 8.
                            unsafe {
                                if to_guest {
                                    kernel::copy_elements_to_guest(dst, src, count, size).unwrap();
                                } else {
                                    kernel::copy_elements_from_guest(dst, src, count, size).unwrap();
                                }
                            }
                            let bytes =
                                |v: &[u64]| v.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
                            let (source, target) = (bytes(&source), bytes(&target));
                            assert_eq!(target[..count * size], source[..count * size]);
                            assert!(target[count * size..].iter().all(|&b| b == 0));
                        }
                    }
                }
            }

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
                                    kernel::compare_exchange(ptr, second & mask, 0, size, order, failure)
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
                                        kernel::fetch(ptr, Fetch::Add, 4, size, Ordering::Relaxed).unwrap();
                                        kernel::fetch(ptr, Fetch::Or, 1 << bit, size, Ordering::Relaxed)
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
                    let now = unsafe { kernel::load_ordered(ptr as *const u8, size, Ordering::Relaxed) };
                    assert_eq!(now.unwrap(), (rounds * 8) & mask);
                }
            }

            /// Nothing of a neighbouring page is touched: pages without access lie right before and right behind both operands.
            #[test]
            #[cfg(all(
                target_os = "linux",
                not(miri),
                any(feature = "rawfd", feature = "backend-mmap")
            ))]
            fn copies_stay_off_the_pages_around() {
                let (one, other) = (FencedPage::new(), FencedPage::new());
                for len in (0..=MAX_LEN).chain([1000, 4095, 4096]) {
                    for ends in 0..4 {
                        let place = |page: &FencedPage, at_end: bool| match at_end {
                            true => page.end().wrapping_sub(len),
                            false => page.start(),
                        };
                        let (src, dst) = (place(&one, ends & 1 != 0), place(&other, ends & 2 != 0));
                        // SAFETY: `len` bytes lie in either page from there on.
                        unsafe {
                            kernel::fill_guest(src, (len % 250) as u8 + 1, len).unwrap();
                            kernel::fill_guest_ascending(dst, 0, len).unwrap();
                            kernel::copy_to_guest(dst, src, len).unwrap();
                            let copied = (0..len)
                                .all(|i| kernel::load_u8(dst.add(i)).unwrap() == (len % 250) as u8 + 1);
                            assert!(copied, "{len} bytes");
                            kernel::copy_from_guest(dst, src, len).unwrap();
                            kernel::copy_from_guest_ascending(dst, src, len).unwrap();
                            kernel::copy_to_guest_ascending(dst, src, len).unwrap();
                            kernel::copy_within_guest(dst, src, len).unwrap();
                            kernel::copy_within_guest_ascending(dst, src, len).unwrap();
                            kernel::copy_within_guest(src, src, len).unwrap();
                        }
                        for size in [2, 4, 8] {
                            // At the end of the page, or at its start, at the size's alignment.
                            let bytes = len / size * size;
                            let place = |page: &FencedPage, at_end: bool| match at_end {
                                true => page.end().wrapping_sub(bytes),
                                false => page.start(),
                            };
                            let (src, dst) = (place(&one, ends & 1 != 0), place(&other, ends & 2 != 0));
                            // SAFETY: as above, aligned to `size` since pages are.
                            unsafe {
                                kernel::copy_elements_to_guest(dst, src, len / size, size).unwrap();
                                kernel::copy_elements_from_guest(dst, src, len / size, size).unwrap();
                            }
                        }
                    }
                    // Overlapping, from the first byte and up to the last.
                    let shift = len.min(4096 - len).min(13);
                    let (low, high) = (one.start(), one.end().wrapping_sub(len));
                    // SAFETY: as above: `shift` bytes are left.
                    unsafe {
                        kernel::copy_within_guest(low, low.add(shift), len).unwrap();
                        kernel::copy_within_guest(low.add(shift), low, len).unwrap();
                        kernel::copy_within_guest(high, high.sub(shift), len).unwrap();
                        kernel::copy_within_guest(high.sub(shift), high, len).unwrap();
                    }
                }
                for (first, last) in [(one.start(), one.end()), (other.start(), other.end())] {
                    for size in [1usize, 2, 4, 8] {
                        for ptr in [first, last.wrapping_sub(size)] {
                            // SAFETY: `size` bytes lie in the page, aligned to it.
                            unsafe {
                                kernel::load_ordered(ptr, size, Ordering::SeqCst).unwrap();
                                kernel::store_ordered(ptr, 1, size, Ordering::SeqCst).unwrap();
                                kernel::fetch(ptr, Fetch::Add, 1, size, Ordering::SeqCst).unwrap();
                                kernel::fetch(ptr, Fetch::Or, 1, size, Ordering::SeqCst).unwrap();
                                kernel::compare_exchange(
                                    ptr,
                                    3,
                                    1,
                                    size,
                                    Ordering::AcqRel,
                                    Ordering::Relaxed,
                                )
                                .unwrap();
                            }
                        }
                    }
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
                            unsafe { kernel::store_u64(ptr as *mut u8, if ones { u64::MAX } else { 0 }) }
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
        }
    };
}

kernel_tests!(chosen, super::super::kernel);
#[cfg(all(not(miri), not(vm_memory_portable)))]
kernel_tests!(portable_beside, super::super::portable);

/// A page of memory between two that nothing may touch.
#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
struct FencedPage {
    base: *mut u8,
    page: usize,
}

#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
impl FencedPage {
    fn new() -> Self {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        // SAFETY: a new mapping, wherever the kernel puts it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                3 * page,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base.cast::<u8>();
        // SAFETY: the middle page of the mapping just made.
        let answer =
            unsafe { libc::mprotect(base.add(page).cast(), page, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(answer, 0);
        Self { base, page }
    }

    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.page)
    }

    fn end(&self) -> *mut u8 {
        self.start().wrapping_add(self.page)
    }
}

#[cfg(all(
    target_os = "linux",
    not(miri),
    any(feature = "rawfd", feature = "backend-mmap")
))]
impl Drop for FencedPage {
    fn drop(&mut self) {
        // SAFETY: the whole of the mapping that `new` made, which nothing refers to any more.
        unsafe { libc::munmap(self.base.cast(), 3 * self.page) };
    }
}

#[test]
fn values_of_every_size_survive_a_round_trip() {
    fn check<T: ByteValued + PartialEq + core::fmt::Debug>(value: T) {
        let mut memory = [0u8; 64];
        for at in 0..16 {
            let ptr = memory[at..].as_mut_ptr();
            // SAFETY: at least 48 bytes lie behind `ptr`, and no value here is larger.
            unsafe {
                write_value(ptr, &value).unwrap();
                assert_eq!(*read_value(&mut MaybeUninit::<T>::uninit(), ptr).unwrap(), value);
            }
        }
    }
    check([(); 0].map(|()| 0u8));
    check(0xa1u8);
    check(0xa1a2u16);
    check([1u8, 2, 3]);
    check(0xa1a2_a3a4u32);
    check(0xa1a2_a3a4_a5a6_a7a8u64);
    check(u128::MAX / 7);
    check([0x1234_5678u32; 12]);
}

#[test]
#[should_panic(expected = "a load cannot have the ordering Release")]
fn a_load_with_release_panics() {
    let value = 0u32;
    // SAFETY: a local variable of that type.
    let _ = unsafe { load_ordered::<u32>(core::ptr::from_ref(&value).cast(), Ordering::Release) };
}

#[test]
#[should_panic(expected = "a store cannot have the ordering Acquire")]
fn a_store_with_acquire_panics() {
    let mut value = 0u32;
    // SAFETY: a local variable of that type.
    let _ = unsafe { store_ordered::<u32>(core::ptr::from_mut(&mut value).cast(), 1, Ordering::Acquire) };
}

/// A user's own atomic, larger than any register: moved through its own methods.
#[test]
fn an_atomic_of_an_unusual_size_goes_through_its_own_methods() {
    use crate::atomic_integer::AtomicInteger;
    use core::sync::atomic::AtomicU32;

    #[derive(Clone, Copy, Debug, PartialEq)]
    #[repr(C)]
    struct Pair(u32, u32, u32);
    // SAFETY: three integers of four bytes, without padding.
    unsafe impl ByteValued for Pair {}
    #[repr(C)]
    struct AtomicPair(AtomicU32, AtomicU32, AtomicU32);
    // SAFETY: consists of atomic integers only.
    unsafe impl AtomicInteger for AtomicPair {
        type V = Pair;
        fn new(v: Pair) -> Self {
            Self(v.0.into(), v.1.into(), v.2.into())
        }
        fn load(&self, order: Ordering) -> Pair {
            Pair(self.0.load(order), self.1.load(order), self.2.load(order))
        }
        fn store(&self, v: Pair, order: Ordering) {
            self.0.store(v.0, order);
            self.1.store(v.1, order);
            self.2.store(v.2, order);
        }
    }
    impl AtomicAccess for Pair {
        type A = AtomicPair;
    }
    let mut memory = [0u32; 3];
    let ptr = memory.as_mut_ptr().cast::<u8>();
    // SAFETY: 12 bytes, aligned to 4, that only these calls access.
    unsafe {
        store_ordered(ptr, Pair(1, 2, 3), Ordering::SeqCst).unwrap();
        assert_eq!(
            load_ordered::<Pair>(ptr, Ordering::Acquire).unwrap(),
            Pair(1, 2, 3)
        );
    }
}
