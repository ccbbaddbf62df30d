//! Copies and fills.

use super::*;

pub(in crate::access) fn copy_at_each_length_and_alignment_moves_only_its_bytes<R: TestedSet>() {
    let mut source = numbered(MAX_LEN + 64);
    let (clean, mut target) = (vec![0xeeu8; MAX_LEN + 128], vec![0xeeu8; MAX_LEN + 128]);
    for src_at in alignments() {
        for dst_at in alignments() {
            for len in 0..=MAX_LEN {
                for to_guest in [false, true] {
                    let src = source[src_at..].as_mut_ptr();
                    let dst = target[dst_at..].as_mut_ptr();
                    // SAFETY: both vectors have at least `len` bytes from there.
                    unsafe {
                        if to_guest {
                            R::copy(Destination, dst, src, len).unwrap();
                        } else {
                            R::copy(Source, dst, src, len).unwrap();
                        }
                    }
                    let (written, after) = (dst_at..dst_at + len, dst_at + len..);
                    assert!(
                        target[..dst_at] == clean[..dst_at]
                            && target[written.clone()] == source[src_at..src_at + len]
                            && target[after.clone()] == clean[after],
                        "{len} bytes from {src_at} to {dst_at}"
                    );
                    target[written.clone()].copy_from_slice(&clean[written]);
                }
            }
        }
    }
}

pub(in crate::access) fn fill_at_each_length_and_alignment_writes_only_its_bytes<R: TestedSet>() {
    let mut target = vec![0xeeu8; (1 << 16) + 128];
    const LENS: &[usize] = if cfg!(miri) {
        &[100]
    } else {
        &[1000, 4096, (1 << 14) - 1, 1 << 14, 1 << 16]
    };
    for len in (0..=MAX_LEN).chain(LENS.iter().copied()) {
        for at in alignments() {
            for ascending in [false, true] {
                let dst = target[at..].as_mut_ptr();
                // SAFETY: the vector has `len` bytes from there.
                unsafe {
                    if ascending {
                        R::fill_ascending(dst, 0x3c, len).unwrap();
                    } else {
                        R::fill(dst, 0x3c, len).unwrap();
                    }
                }
                let (before, rest) = target.split_at(at);
                let (filled, after) = rest.split_at(len);
                assert!(before.iter().all(|b| *b == 0xee), "{len} bytes at {at}");
                assert!(filled.iter().all(|b| *b == 0x3c), "{len} bytes at {at}");
                assert!(
                    after[..64].iter().all(|b| *b == 0xee),
                    "{len} bytes at {at}"
                );
                target[at..at + len].fill(0xee);
            }
        }
    }
}

pub(in crate::access) fn copy_of_long_ranges_moves_each_byte<R: TestedSet>() {
    const LENS: &[usize] = if cfg!(miri) {
        &[301]
    } else {
        &[
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
        ]
    };
    for &len in LENS {
        let mut source = numbered(len);
        let mut target = vec![0; len + 1];
        // SAFETY: both vectors have at least `len` bytes.
        unsafe { R::copy(Source, target.as_mut_ptr(), source.as_mut_ptr(), len) }.unwrap();
        assert_eq!(target[..len], source);
        assert_eq!(target[len], 0);
        target.fill(0);
        let (src, dst) = (source.as_mut_ptr(), target.as_mut_ptr());
        // SAFETY: both vectors have at least `len` bytes.
        unsafe {
            R::copy_ascending(Source, dst, src, len / 2).unwrap();
            assert_eq!(
                (&target[..len / 2], target[len / 2]),
                (&source[..len / 2], 0)
            );
            R::copy_ascending(Destination, dst, src, len - 1).unwrap();
            R::copy_ascending(Both, dst, src, len).unwrap();
        }
        assert_eq!(target[..len], source);
        assert_eq!(target[len], 0);
    }
}

pub(in crate::access) fn copy_overlapping_at_each_distance_reads_before_it_overwrites<
    R: TestedSet,
>() {
    let steps = if cfg!(miri) { 17 } else { 1 };
    let fresh = numbered(MAX_LEN + 256);
    let (mut memory, mut expected) = (fresh.clone(), fresh.clone());
    for len in (1..=MAX_LEN).step_by(steps) {
        // From 128 bytes below the source to 128 bytes above it.
        for dst_at in (0..=256).step_by(steps) {
            let src_at = 128;
            memory.copy_from_slice(&fresh);
            expected.copy_from_slice(&fresh);
            expected.copy_within(src_at..src_at + len, dst_at);
            let base = memory.as_mut_ptr();
            // SAFETY: both ranges are in `memory`, which nothing else refers to.
            unsafe { R::copy_overlapping(base.add(dst_at), base.add(src_at), len) }.unwrap();
            assert!(memory == expected, "{len} bytes from {src_at} to {dst_at}");
        }
    }
}

pub(in crate::access) fn copy_overlapping_of_disjoint_ranges_moves_only_its_bytes<R: TestedSet>() {
    let mut source = numbered(MAX_LEN + 64);
    let (clean, mut target) = (vec![0xeeu8; MAX_LEN + 128], vec![0xeeu8; MAX_LEN + 128]);
    for src_at in alignments() {
        for dst_at in alignments() {
            for len in 0..=MAX_LEN {
                let src = source[src_at..].as_mut_ptr();
                let dst = target[dst_at..].as_mut_ptr();
                // SAFETY: both vectors have at least `len` bytes from there.
                unsafe { R::copy_overlapping(dst, src, len) }.unwrap();
                let (written, after) = (dst_at..dst_at + len, dst_at + len..);
                assert!(
                    target[..dst_at] == clean[..dst_at]
                        && target[written.clone()] == source[src_at..src_at + len]
                        && target[after.clone()] == clean[after],
                    "{len} bytes from {src_at} to {dst_at}"
                );
                target[written.clone()].copy_from_slice(&clean[written]);
            }
        }
    }
}

pub(in crate::access) fn copy_overlapping_at_each_length_and_alignment_moves_only_its_bytes<
    R: TestedSet,
>() {
    let fresh = numbered(MAX_LEN + 128);
    let mut memory = fresh.clone();
    for src_at in alignments() {
        for dst_at in alignments() {
            for len in 0..=MAX_LEN {
                let base = memory.as_mut_ptr();
                // SAFETY: both ranges are in `memory`, which nothing else refers to.
                unsafe { R::copy_overlapping(base.add(dst_at), base.add(src_at), len) }.unwrap();
                let (written, after) = (dst_at..dst_at + len, dst_at + len..);
                assert!(
                    memory[..dst_at] == fresh[..dst_at]
                        && memory[written.clone()] == fresh[src_at..src_at + len]
                        && memory[after.clone()] == fresh[after],
                    "{len} bytes from {src_at} to {dst_at}"
                );
                memory[written.clone()].copy_from_slice(&fresh[written]);
            }
        }
    }
}

/// Processors execute `rep movsb` in different ways if the destination is a little above the source
/// modulo the size of a page.
pub(in crate::access) fn copy_at_each_distance_within_page_moves_only_its_bytes<R: TestedSet>() {
    const PAGE: usize = 4096;
    const LENS: &[usize] = if cfg!(miri) {
        &[191]
    } else {
        &[129, 300, (1 << 14) + 191]
    };
    let longest = LENS[LENS.len() - 1];
    let mut source = numbered(longest + PAGE);
    let mut target = vec![0xeeu8; longest + 4 * PAGE];
    let to_page = |bytes: &[u8]| bytes.as_ptr().addr().wrapping_neg() % PAGE;
    let (source_page, target_page) = (to_page(&source), to_page(&target));
    for &len in LENS {
        for distance in alignments().chain([PAGE - 1]) {
            for offset in [0, 5] {
                let (from, to) = (source_page + offset, target_page + offset + distance);
                let src = source[from..][..len].as_mut_ptr();
                let dst = target[to..][..len].as_mut_ptr();
                // SAFETY: both slices have `len` bytes.
                unsafe { R::copy(Destination, dst, src, len) }.unwrap();
                let (before, copy) = target.split_at_mut(to);
                let (copy, after) = copy.split_at_mut(len);
                assert!(copy == &source[from..][..len], "{len} bytes, {distance}");
                assert!(before.iter().chain(&*after).all(|b| *b == 0xee), "{len}");
                copy.fill(0xee);
            }
        }
    }
}

/// The lengths make each loop of each routine run more than once.
pub(in crate::access) fn copy_of_long_ranges_at_each_alignment_moves_only_its_bytes<
    R: TestedSet,
>() {
    const LENS: &[usize] = if cfg!(miri) {
        &[191]
    } else {
        &[1023, (1 << 14) + 191, (1 << 15) + 4096 + 77]
    };
    let longest = LENS[LENS.len() - 1];
    let mut source = numbered(longest + 64);
    let mut target = vec![0xeeu8; longest + 128];
    let check = |source: &[u8], target: &mut [u8], src_at: usize, dst_at: usize, len: usize| {
        assert!(
            target[..dst_at].iter().all(|b| *b == 0xee)
                && target[dst_at..dst_at + len] == source[src_at..src_at + len]
                && target[dst_at + len..][..64].iter().all(|b| *b == 0xee),
            "{len} bytes from {src_at} to {dst_at}"
        );
        target[dst_at..dst_at + len].fill(0xee);
    };
    for &len in LENS {
        // Routines align the destination, so each of its alignments is tried.
        for src_at in alignments().step_by(13) {
            for dst_at in alignments() {
                let src = source[src_at..].as_mut_ptr();
                let dst = target[dst_at..].as_mut_ptr();
                // SAFETY: both vectors have at least `len` bytes from there.
                unsafe { R::copy(Destination, dst, src, len) }.unwrap();
                check(&source, &mut target, src_at, dst_at, len);
            }
        }
    }
}

pub(in crate::access) fn copy_elements_at_each_start_and_count_moves_only_its_bytes<
    R: TestedSet,
>() {
    let steps = if cfg!(miri) { 11 } else { 1 };
    let (mut guest, mut host) = (Aligned([0xeeu8; 448]), Aligned([0xeeu8; 448]));
    let mut source: Aligned<448> = Aligned(numbered(448).try_into().unwrap());
    let clean = [0xeeu8; 448];
    for size in [2, 4, 8] {
        // The guest operand is aligned; the host operand need not be.
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
                        let src = source.0[src_at..].as_mut_ptr();
                        let dst = target[dst_at..].as_mut_ptr();
                        // SAFETY: `len` bytes follow both, and the guest operand is aligned to
                        // `size`.
                        unsafe {
                            if to_guest {
                                R::copy_elements(Destination, dst, src, count, size).unwrap();
                            } else {
                                R::copy_elements(Source, dst, src, count, size).unwrap();
                            }
                        }
                        let (written, after) = (dst_at..dst_at + len, dst_at + len..);
                        assert!(
                            target[..dst_at] == clean[..dst_at]
                                && target[written.clone()] == source.0[src_at..src_at + len]
                                && target[after.clone()] == clean[after],
                            "{count} elements of {size} bytes from {src_at} to {dst_at}"
                        );
                        target[written.clone()].copy_from_slice(&clean[written]);
                    }
                }
            }
        }
    }
}

macro_rules! bulk_tests {
    ($routines:ty) => {
        instantiate!(
            bulk, $routines:
            copy_at_each_length_and_alignment_moves_only_its_bytes,
            fill_at_each_length_and_alignment_writes_only_its_bytes,
            copy_of_long_ranges_moves_each_byte,
            copy_overlapping_at_each_distance_reads_before_it_overwrites,
            copy_overlapping_of_disjoint_ranges_moves_only_its_bytes,
            copy_overlapping_at_each_length_and_alignment_moves_only_its_bytes,
            copy_at_each_distance_within_page_moves_only_its_bytes,
            copy_of_long_ranges_at_each_alignment_moves_only_its_bytes,
            copy_elements_at_each_start_and_count_moves_only_its_bytes
        );
    };
}
