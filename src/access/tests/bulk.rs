//! Copies and fills, by whichever kernels the module calls `kernel`.

macro_rules! bulk_tests {
    () => {
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
                unsafe { kernel::copy_from_guest(target.as_mut_ptr(), source.as_ptr(), len) }
                    .unwrap();
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
        fn copies_that_overlap_further_apart_read_before_they_write() {
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
        fn copies_within_the_guest_move_every_length_at_every_alignment_and_nothing_else() {
            let source = numbered(MAX_LEN + 64);
            let (clean, mut target) = (vec![0xeeu8; MAX_LEN + 128], vec![0xeeu8; MAX_LEN + 128]);
            for src_at in alignments() {
                for dst_at in alignments() {
                    for len in 0..=MAX_LEN {
                        let (src, dst) = (source[src_at..].as_ptr(), target[dst_at..].as_mut_ptr());
                        // SAFETY: both vectors have at least `len` bytes from there on.
                        unsafe { kernel::copy_within_guest(dst, src, len) }.unwrap();
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

        #[test]
        fn overlapping_copies_move_every_length_at_every_alignment_and_nothing_else() {
            let fresh = numbered(MAX_LEN + 128);
            let mut memory = fresh.clone();
            for src_at in alignments() {
                for dst_at in alignments() {
                    for len in 0..=MAX_LEN {
                        let base = memory.as_mut_ptr();
                        // SAFETY: both ranges lie in `memory`, which nothing refers to meanwhile.
                        unsafe {
                            kernel::copy_within_guest(base.add(dst_at), base.add(src_at), len)
                        }
                        .unwrap();
                        let (written, behind) = (dst_at..dst_at + len, dst_at + len..);
                        assert!(
                            memory[..dst_at] == fresh[..dst_at]
                                && memory[written.clone()] == fresh[src_at..src_at + len]
                                && memory[behind.clone()] == fresh[behind],
                            "{len} bytes from {src_at} to {dst_at}"
                        );
                        memory[written.clone()].copy_from_slice(&fresh[written]);
                    }
                }
            }
        }

        /// Long enough for every loop of every kernel to go round more than once.
        #[test]
        fn long_copies_move_every_byte_at_every_alignment() {
            const LENS: [usize; 3] = [1023, (1 << 14) + 191, (1 << 15) + 4096 + 77];
            let source = numbered(LENS[2] + 64);
            let mut target = vec![0xeeu8; LENS[2] + 128];
            let check = |target: &mut [u8], src_at: usize, dst_at: usize, len: usize| {
                assert!(
                    target[..dst_at].iter().all(|b| *b == 0xee)
                        && target[dst_at..dst_at + len] == source[src_at..src_at + len]
                        && target[dst_at + len..][..64].iter().all(|b| *b == 0xee),
                    "{len} bytes from {src_at} to {dst_at}"
                );
                target[dst_at..dst_at + len].fill(0xee);
            };
            for len in LENS {
                // The kernels align the destination, so that all of its alignments are tried.
                for src_at in alignments().step_by(13) {
                    for dst_at in alignments() {
                        let (src, dst) = (source[src_at..].as_ptr(), target[dst_at..].as_mut_ptr());
                        // SAFETY: both vectors have at least `len` bytes from there on.
                        unsafe { kernel::copy_to_guest(dst, src, len) }.unwrap();
                        check(&mut target, src_at, dst_at, len);
                    }
                }
            }
        }

        #[test]
        fn elements_are_moved_at_every_start_in_every_number_and_nothing_else() {
            let steps = if cfg!(miri) { 11 } else { 1 };
            let (mut guest, mut host) = (Aligned([0xeeu8; 448]), Aligned([0xeeu8; 448]));
            let source: Aligned<448> = Aligned(numbered(448).try_into().unwrap());
            let clean = [0xeeu8; 448];
            for size in [2, 4, 8] {
                // The guest's elements are aligned, the host's need not be.
                for guest_at in (0..32).step_by(size) {
                    for host_at in (0..32).step_by(steps) {
                        for count in (0..=MAX_LEN / size).step_by(steps) {
                            let len = count * size;
                            for to_guest in [false, true] {
                                let (target, dst_at, src_at) = if to_guest {
                                    (&mut guest.0, guest_at, host_at)
                                } else {
                                    (&mut host.0, host_at, guest_at)
                                };
                                let (src, dst) =
                                    (source.0[src_at..].as_ptr(), target[dst_at..].as_mut_ptr());
                                // SAFETY: `len` bytes lie behind both, and the guest's of the two is aligned to `size`.
                                unsafe {
                                    if to_guest {
                                        kernel::copy_elements_to_guest(dst, src, count, size)
                                            .unwrap();
                                    } else {
                                        kernel::copy_elements_from_guest(dst, src, count, size)
                                            .unwrap();
                                    }
                                }
                                let (written, behind) = (dst_at..dst_at + len, dst_at + len..);
                                assert!(
                                    target[..dst_at] == clean[..dst_at]
                                        && target[written.clone()]
                                            == source.0[src_at..src_at + len]
                                        && target[behind.clone()] == clean[behind],
                                    "{count} elements of {size} bytes from {src_at} to {dst_at}"
                                );
                                target[written.clone()].copy_from_slice(&clean[written]);
                            }
                        }
                    }
                }
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
            let (one, other) = (FencedPages::one(), FencedPages::one());
            for len in (0..=MAX_LEN).chain([1000, 4095, 4096]) {
                for ends in 0..4 {
                    let place = |page: &FencedPages, at_end: bool| match at_end {
                        true => page.end().wrapping_sub(len),
                        false => page.start(),
                    };
                    let (src, dst) = (place(&one, ends & 1 != 0), place(&other, ends & 2 != 0));
                    // SAFETY: `len` bytes lie in either page from there on.
                    unsafe {
                        kernel::fill_guest(src, (len % 250) as u8 + 1, len).unwrap();
                        kernel::fill_guest_ascending(dst, 0, len).unwrap();
                        kernel::copy_to_guest(dst, src, len).unwrap();
                        let copied = (0..len).all(|i| {
                            let byte =
                                kernel::load_ordered(dst.add(i), 1, Ordering::Relaxed).unwrap();
                            byte == (len % 250) as u64 + 1
                        });
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
                        let place = |page: &FencedPages, at_end: bool| match at_end {
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
        }
    };
}
