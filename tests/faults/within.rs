//! A copy within guest memory counts the bytes before a fault, and marks its whole target.

use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::fault::{self, Direction, LastFault};
use vm_memory::Bytes;

fn numbered(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 + 1).collect()
}

/// Copies `len` bytes within `memory`, from and to offsets, and returns the fault.
fn copy(memory: &Memory, from: usize, to: usize, len: usize) -> LastFault {
    let slice = |at: usize| {
        memory
            .get_slice(GuestAddress(BASE.0 + at as u64), len)
            .unwrap()
    };
    memory.find_region(BASE).unwrap().bitmap().reset();
    slice(from).copy_to_volatile_slice(slice(to));
    fault::last().unwrap()
}

/// Returns whether the pages of a range are dirty, and no others are.
fn is_marked(memory: &Memory, at: usize, len: usize) -> bool {
    let region = memory.find_region(BASE).unwrap();
    (0..region.size() / PAGE).all(|page| {
        region.bitmap().dirty_at(page * PAGE)
            == (page >= at / PAGE && page <= (at + len - 1) / PAGE)
    })
}

#[test]
fn copy_within_disjoint_ranges_counts_bytes_before_fault() {
    fault::install().unwrap();
    let (memory, _file) = shared(8);
    let (low, high) = (PAGE, 5 * PAGE);
    for (source_gone, gone) in [(true, low / PAGE + 1), (false, high / PAGE + 1)] {
        protect(&memory, gone, libc::PROT_NONE);
        let edge = gone * PAGE;
        let host_edge = memory
            .get_host_address(GuestAddress(BASE.0 + edge as u64))
            .unwrap() as usize;
        for len in (1..=300usize).chain([1000, 4096]) {
            for inside in (0..len).step_by(if len <= 300 { 1 } else { 61 }) {
                // The alignment of the other operand varies.
                let (from, to) = if source_gone {
                    (edge - inside, high + inside % 61)
                } else {
                    (low + inside % 61 - PAGE, edge - inside)
                };
                let bytes = numbered(inside);
                let readable = memory
                    .get_slice(GuestAddress(BASE.0 + from as u64), inside)
                    .unwrap();
                readable.copy_from(&bytes);
                let fault = copy(&memory, from, to, len);
                let direction = if source_gone {
                    Direction::Read
                } else {
                    Direction::Write
                };
                assert_eq!(
                    (fault.direction, fault.completed),
                    (direction, inside),
                    "{len}"
                );
                assert_eq!((fault.host_address, fault.guest_address), (host_edge, None));
                let mut moved = vec![0; inside];
                memory
                    .read_slice(&mut moved, GuestAddress(BASE.0 + to as u64))
                    .unwrap();
                assert_eq!(moved, bytes, "{inside} of {len}");
                assert!(is_marked(&memory, to, len), "{inside} of {len}");
            }
        }
        protect(&memory, gone, libc::PROT_READ | libc::PROT_WRITE);
    }
}

#[test]
fn copy_within_to_lower_overlapping_address_counts_bytes_before_fault() {
    fault::install().unwrap();
    let (memory, _file) = shared(5);
    let len = 2 * PAGE;
    for distance in [
        16,
        17,
        64,
        100,
        1000,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        2 * PAGE - 1,
    ] {
        for shift in [0, 1, 8, 1000, PAGE - 1] {
            let (to, from) = (shift, shift + distance);
            for (page, protection) in [
                (1, libc::PROT_NONE),
                (2, libc::PROT_NONE),
                (1, libc::PROT_READ),
                (2, libc::PROT_READ),
            ] {
                let edge = page * PAGE;
                let is_read = protection == libc::PROT_NONE && edge >= from && edge < from + len;
                let completed = if is_read {
                    edge.wrapping_sub(from)
                } else {
                    edge.wrapping_sub(to)
                };
                if completed >= len
                    || (protection == libc::PROT_NONE && edge < from && from < edge + PAGE)
                {
                    // The copy does not reach the page, or begins in it.
                    continue;
                }
                let all = numbered(5 * PAGE);
                memory.write_slice(&all, BASE).unwrap();
                protect(&memory, page, protection);
                let fault = copy(&memory, from, to, len);
                protect(&memory, page, libc::PROT_READ | libc::PROT_WRITE);
                let case = (distance, shift, page, protection);
                let direction = if is_read {
                    Direction::Read
                } else {
                    Direction::Write
                };
                assert_eq!(
                    (fault.completed, fault.direction),
                    (completed, direction),
                    "{case:?}"
                );
                let mut moved = vec![0; completed];
                memory
                    .read_slice(&mut moved, GuestAddress(BASE.0 + to as u64))
                    .unwrap();
                assert_eq!(moved, all[from..from + completed], "{case:?}");
                assert!(is_marked(&memory, to, len), "{case:?}");
            }
        }
    }
}

#[test]
fn copy_within_to_higher_or_close_address_counts_nothing_and_marks_all() {
    fault::install().unwrap();
    let (memory, _file) = shared(4);
    let len = 2 * PAGE;
    // The last page that the copy reaches is inaccessible, so it has written the others.
    for (from, to, gone) in [
        (0, 1000, 0),
        (100, 101, 0),
        (PAGE, PAGE - 15, 2),
        (PAGE, PAGE - 1, 2),
    ] {
        memory.write_slice(&numbered(4 * PAGE), BASE).unwrap();
        protect(&memory, gone, libc::PROT_NONE);
        let fault = copy(&memory, from, to, len);
        protect(&memory, gone, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(fault.completed, 0, "{from} to {to}");
        let mut now = vec![0; 4 * PAGE];
        memory.read_slice(&mut now, BASE).unwrap();
        assert_ne!(now, numbered(4 * PAGE), "{from} to {to}");
        assert!(is_marked(&memory, to, len), "{from} to {to}");
    }
}
