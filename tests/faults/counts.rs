//! An access that faults reports the bytes that it moved before the fault.

use std::sync::atomic::Ordering;

use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::fault::{self, Direction};
use vm_memory::Bytes;

#[test]
fn read_and_write_count_bytes_before_fault() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    let edge = GuestAddress(BASE.0 + PAGE as u64);
    let host_edge = memory.get_host_address(edge).unwrap() as usize;
    let numbers: Vec<u8> = (0..4096).map(|i| (i % 251) as u8 + 1).collect();
    protect(&memory, 1, libc::PROT_NONE);
    for len in (1..=300usize).chain([1000, 2048, 4096]) {
        let source = &numbers[..len];
        for inside in (0..len).step_by(if len <= 300 { 1 } else { 13 }) {
            let addr = GuestAddress(edge.0 - inside as u64);
            let before = memory.get_slice(addr, inside).unwrap();
            let check = |direction| {
                let last = fault::last().unwrap();
                assert_eq!(last.guest_address, Some(edge));
                assert_eq!(last.host_address, host_edge);
                assert_eq!(last.direction, direction);
                assert_eq!(last.completed, inside, "{inside} of {len}");
            };

            before.fill_with_byte(0).unwrap();
            let result = memory.write(source, addr);
            match inside {
                0 => assert!(is_efault(&result.unwrap_err())),
                _ => assert_eq!(result.unwrap(), inside, "write {len}"),
            }
            check(Direction::Write);
            let mut buf = [0u8; 4096];
            let buf = &mut buf[..len];
            memory.read_slice(&mut buf[..inside], addr).unwrap();
            assert_eq!(buf[..inside], source[..inside]);
            assert!(is_efault(&memory.write_slice(source, addr).unwrap_err()));
            check(Direction::Write);

            buf.fill(0);
            let result = memory.read(buf, addr);
            match inside {
                0 => assert!(is_efault(&result.unwrap_err())),
                _ => assert_eq!(result.unwrap(), inside, "read {len}"),
            }
            check(Direction::Read);
            assert_eq!(buf[..inside], source[..inside]);
            assert!(is_efault(&memory.read_slice(buf, addr).unwrap_err()));
            check(Direction::Read);
        }
    }
}

#[test]
fn fault_in_second_region_has_guest_address_and_count_in_region() {
    fault::install().unwrap();
    let second = GuestAddress(BASE.0 + PAGE as u64);
    let memory = Memory::from_ranges(&[(BASE, PAGE), (second, 2 * PAGE)]).unwrap();
    let host = memory.get_host_address(second).unwrap();
    // SAFETY: a page of the mapping, which only accesses of the crate use.
    let status = unsafe { libc::mprotect(host.wrapping_add(PAGE).cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(status, 0);
    let gone = GuestAddress(second.0 + PAGE as u64);
    let mut buf = vec![0; 2 * PAGE];
    let start = GuestAddress(BASE.0 + 100);
    assert_eq!(memory.read(&mut buf, start).unwrap(), 2 * PAGE - 100);
    let fault = fault::last().unwrap();
    assert_eq!((fault.guest_address, fault.completed), (Some(gone), PAGE));
    assert_eq!(memory.write(&buf, start).unwrap(), 2 * PAGE - 100);
    let fault = fault::last().unwrap();
    assert_eq!(
        (fault.guest_address, fault.direction),
        (Some(gone), Direction::Write)
    );
    assert!(is_efault(&memory.read_slice(&mut buf, start).unwrap_err()));
    assert_eq!(fault::last().unwrap().guest_address, Some(gone));
}

#[test]
fn last_is_not_changed_by_access_without_fault() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    let gone = GuestAddress(BASE.0 + PAGE as u64);
    file.set_len(PAGE as u64).unwrap();
    memory
        .get_slice(gone, 8)
        .unwrap()
        .read_obj::<u64>(0)
        .unwrap_err();
    let old = fault::last().unwrap();
    assert_eq!(old.guest_address, None);
    file.set_len(2 * PAGE as u64).unwrap();

    // Streams that end inside the region, for ranges that end inside the region and past its end.
    assert_eq!(
        memory
            .read_volatile_from(gone, &mut &[1u8; 3][..], 64)
            .unwrap(),
        3
    );
    assert_eq!(
        memory
            .read_volatile_from(gone, &mut &[1u8; 3][..], 2 * PAGE)
            .unwrap(),
        3
    );
    memory
        .read_exact_volatile_from(gone, &mut &[1u8; 3][..], 64)
        .unwrap_err();
    // A misaligned access does not fault.
    memory
        .load::<u64>(GuestAddress(gone.0 - 4), Ordering::Acquire)
        .unwrap_err();
    // A system call that returns EFAULT does not fault.
    file.set_len(PAGE as u64).unwrap();
    let zero = File::open("/dev/zero").unwrap();
    assert!(is_efault(
        &memory.read_volatile_from(gone, &mut &zero, 64).unwrap_err()
    ));
    assert_eq!(fault::last(), Some(old));

    // A copy from a slice faults.
    assert!(is_efault(
        &memory
            .read_volatile_from(gone, &mut &[1u8; 3][..], 64)
            .unwrap_err()
    ));
    assert_eq!(fault::last().unwrap().guest_address, Some(gone));
}

#[test]
fn copy_to_and_copy_from_stop_after_whole_element() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    for elements in [1usize, 2, 31, 32, 100, 500] {
        let slice = memory
            .get_slice(
                GuestAddress(BASE.0 + (PAGE - elements * 4) as u64),
                elements * 4 + 400,
            )
            .unwrap();
        let source: Vec<u32> = (1..=(elements + 100) as u32).collect();
        protect(&memory, 1, libc::PROT_NONE);
        slice.copy_from(&source);
        let mut back = vec![0u32; elements + 100];
        assert_eq!(slice.copy_to(&mut back), elements);
        assert_eq!(back[..elements], source[..elements]);
        protect(&memory, 1, libc::PROT_READ | libc::PROT_WRITE);
    }
}

#[test]
fn fill_with_byte_counts_bytes_before_fault() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    for len in (1..300).chain([PAGE]) {
        let start = GuestAddress(BASE.0 + (PAGE - len) as u64);
        for more in [1, 63, PAGE] {
            let slice = memory.get_slice(BASE, 2 * PAGE).unwrap();
            slice
                .subslice(PAGE - len, len)
                .unwrap()
                .fill_with_byte(0)
                .unwrap();
            slice
                .subslice(PAGE - len, len + more)
                .unwrap()
                .fill_with_byte(0xab)
                .unwrap_err();
            let fault = fault::last().unwrap();
            assert_eq!((fault.completed, fault.direction), (len, Direction::Write));
            let mut written = vec![0; len];
            memory.read_slice(&mut written, start).unwrap();
            assert!(written.iter().all(|b| *b == 0xab), "{len} and {more}");
        }
    }
}

#[test]
fn write_marks_pages_before_fault() {
    fault::install().unwrap();
    let (memory, _file) = shared(3);
    protect(&memory, 2, libc::PROT_NONE);
    let region = memory.find_region(BASE).unwrap();
    region.bitmap().reset();
    assert_eq!(memory.write(&[1; 3 * PAGE], BASE).unwrap(), 2 * PAGE);
    assert!(region.bitmap().dirty_at(0) && region.bitmap().dirty_at(PAGE));
}

#[test]
fn write_obj_that_faults_marks_written_part() {
    fault::install().unwrap();
    let (memory, _file) = shared(2);
    let region = memory.find_region(BASE).unwrap();
    let addr = GuestAddress(BASE.0 + PAGE as u64 - 8);
    protect(&memory, 1, libc::PROT_NONE);
    region.bitmap().reset();
    assert!(is_efault(&memory.write_obj([7u8; 16], addr).unwrap_err()));
    assert_eq!(memory.read_obj::<[u8; 8]>(addr).unwrap(), [7; 8]);
    assert!(region.bitmap().dirty_at(0));
}

#[test]
fn long_copy_at_inaccessible_page_counts_bytes_before_fault() {
    fault::install().unwrap();
    let pages = 32 << 8;
    let (memory, file) = shared(pages);
    file.set_len(PAGE as u64).unwrap();
    let mut buf = vec![0u8; pages * PAGE];
    assert_eq!(memory.read(&mut buf, BASE).unwrap(), PAGE);
    assert_eq!(memory.write(&buf[..16_000], BASE).unwrap(), PAGE);
}

#[test]
fn is_zero_across_truncated_page_returns_error_unless_bytes_before_decide() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    for len in [1, 63, 64, 65, 200] {
        let start = GuestAddress(BASE.0 + (PAGE - len) as u64);
        let slice = memory.get_slice(start, len + PAGE).unwrap();
        assert!(is_efault(&slice.is_zero().unwrap_err().into()));
        assert_eq!(fault::last().unwrap().direction, Direction::Read);
        assert!(slice.subslice(0, len).unwrap().is_zero().unwrap());
        if len >= 64 {
            memory.write_obj(1u8, start).unwrap();
            assert!(!slice.is_zero().unwrap());
            memory.write_obj(0u8, start).unwrap();
        }
    }
}
