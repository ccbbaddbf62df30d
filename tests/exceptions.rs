//! With the fault handler, an access to a page that became inaccessible on Windows returns an
//! error, and every other access violation ends the process.
#![cfg(all(
    windows,
    target_arch = "x86_64",
    feature = "backend-mmap",
    feature = "backend-bitmap",
    not(vm_memory_portable)
))]
#![expect(
    clippy::disallowed_methods,
    unsafe_code,
    reason = "changes pages of regions, and reads inaccessible bytes directly"
)]

use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use test_support::{temp_file_of_len, PAGE};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    fault, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};
use windows_sys::Win32::Foundation::ERROR_NOACCESS;
use windows_sys::Win32::System::Memory::{
    UnmapViewOfFile, VirtualFree, VirtualProtect, MEMORY_MAPPED_VIEW_ADDRESS, MEM_DECOMMIT,
    PAGE_NOACCESS, PAGE_READONLY,
};

const BASE: GuestAddress = GuestAddress(0x10_0000);

/// The accessible bytes of the memory, which precede the others.
const ACCESSIBLE: usize = 3 * PAGE;
const SIZE: usize = 8 * PAGE;

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memory() -> Memory {
    fault::install().unwrap();
    Memory::from_ranges(&[(BASE, SIZE)]).unwrap()
}

fn at(offset: usize) -> GuestAddress {
    GuestAddress(BASE.0 + offset as u64)
}

fn host(memory: &Memory) -> *mut u8 {
    memory.get_host_address(BASE).unwrap()
}

fn protect(memory: &Memory, protection: u32) {
    let (mut before, from) = (0, host(memory).wrapping_add(ACCESSIBLE));
    // SAFETY: pages of the region, which only accesses of the crate use.
    let succeeded =
        unsafe { VirtualProtect(from.cast(), SIZE - ACCESSIBLE, protection, &mut before) };
    assert_ne!(succeeded, 0);
}

fn decommit(memory: &Memory) {
    let from = host(memory).wrapping_add(ACCESSIBLE);
    // SAFETY: pages of the region, which only accesses of the crate use.
    let succeeded = unsafe { VirtualFree(from.cast(), SIZE - ACCESSIBLE, MEM_DECOMMIT) };
    assert_ne!(succeeded, 0);
}

fn is_no_access(error: &GuestMemoryError) -> bool {
    let number = Some(ERROR_NOACCESS as i32);
    matches!(error, GuestMemoryError::IOError(e) if e.raw_os_error() == number)
}

/// Checks accesses that end in inaccessible pages. Reads succeed if `readable`.
fn check(memory: &Memory, readable: bool) {
    for before in [0, 1, 7, 64, 100, PAGE, 2 * PAGE + 5] {
        let start = at(ACCESSIBLE - before);
        for len in [1, 8, 200, PAGE, 4 * PAGE] {
            let len = before + len;
            let mut bytes = vec![0u8; len];
            let last = |direction| {
                let last = fault::last().unwrap();
                assert_eq!(last.guest_address, Some(at(ACCESSIBLE)));
                let first = host(memory).wrapping_add(ACCESSIBLE);
                assert_eq!(
                    (last.host_address, last.direction),
                    (first.addr(), direction)
                );
                assert_eq!(last.completed, before);
            };
            let results = [
                (
                    readable,
                    memory.read(&mut bytes, start),
                    fault::Direction::Read,
                ),
                (
                    false,
                    memory.write(&vec![0x3c; len], start),
                    fault::Direction::Write,
                ),
            ];
            for (succeeds, result, _) in &results {
                match result {
                    Ok(moved) if *succeeds => assert_eq!(*moved, len),
                    Ok(moved) => assert!(before > 0 && *moved == before, "{moved} of {before}"),
                    Err(error) => assert!(before == 0 && is_no_access(error), "{error}"),
                }
            }
            last(fault::Direction::Write);
            if !readable {
                assert!(memory.read_slice(&mut bytes, start).is_err());
                last(fault::Direction::Read);
            }
        }
        assert!(before == 0 || memory.read_obj::<u8>(start).unwrap() == 0x3c);
    }
    let first = at(ACCESSIBLE);
    assert!(is_no_access(&memory.write_obj(1u64, first).unwrap_err()));
    assert!(is_no_access(
        &memory.store(1u32, first, Ordering::SeqCst).unwrap_err()
    ));
    let load = memory.load::<u16>(first, Ordering::Acquire);
    assert_eq!(load.is_ok(), readable);
    let region = memory.find_region(BASE).unwrap();
    assert!(GuestMemoryRegion::bitmap(region).dirty_at(ACCESSIBLE - 1));
}

#[test]
fn access_to_page_without_access_returns_error_with_exact_count() {
    let memory = memory();
    protect(&memory, PAGE_NOACCESS);
    check(&memory, false);
}

#[test]
fn access_to_page_that_is_read_only_returns_error_of_writes() {
    let memory = memory();
    protect(&memory, PAGE_READONLY);
    check(&memory, true);
}

#[test]
fn access_to_decommitted_page_returns_error_with_exact_count() {
    let memory = memory();
    decommit(&memory);
    check(&memory, false);
}

/// Another part of the program unmaps a view that a region borrows.
#[test]
fn access_to_unmapped_view_returns_error() {
    fault::install().unwrap();
    // In a process of its own, no other thread takes the place of the view.
    test_support::in_own_process("access_to_unmapped_view_returns_error", |_| {
        let backing = FileOffset::new(temp_file_of_len(SIZE as u64), 0);
        let view = MmapRegionBuilder::<()>::new(SIZE)
            .with_file_offset(backing)
            .build()
            .unwrap();
        let builder = MmapRegionBuilder::new(SIZE);
        // SAFETY: 1. The view has as many bytes, which are readable and writable. 2. It is unmapped
        // below, and each access afterwards faults and returns. 3. No reference to it exists.
        let builder = unsafe { builder.with_raw_mmap_pointer(view.as_ptr()) };
        let region = GuestRegionMmap::new(builder.build().unwrap(), BASE).unwrap();
        let memory = Memory::from_regions(vec![region]).unwrap();
        memory.write_obj(7u64, BASE).unwrap();
        let address = MEMORY_MAPPED_VIEW_ADDRESS {
            Value: view.as_ptr().cast(),
        };
        // SAFETY: the view exists, and only accesses of the crate use it.
        assert_ne!(unsafe { UnmapViewOfFile(address) }, 0);
        assert!(is_no_access(&memory.read_obj::<u64>(BASE).unwrap_err()));
        assert!(is_no_access(&memory.write(&[0; 300], at(5)).unwrap_err()));
        // Unmapping it again fails, which dropping the region ignores.
        view.unmap().unwrap_err();
    });
}

#[test]
fn accesses_of_many_threads_to_inaccessible_pages_return_errors() {
    let memory = Arc::new(memory());
    protect(&memory, PAGE_NOACCESS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..2000 {
                    let before = round % 50;
                    let mut bytes = [0; 100];
                    let start = at(ACCESSIBLE - before);
                    match memory.read(&mut bytes, start) {
                        Ok(moved) => assert_eq!(moved, before),
                        Err(error) => assert!(before == 0 && is_no_access(&error)),
                    }
                }
            });
        }
    });
}

/// Starts this program again for a test that must end by an access violation.
fn dies(test: &str) -> bool {
    const DEADLY: &str = "EXCEPTIONS_DEADLY";
    if std::env::var_os(DEADLY).is_some() {
        fault::install().unwrap();
        return false;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(DEADLY, "")
        .output()
        .unwrap()
        .status;
    // EXCEPTION_ACCESS_VIOLATION
    assert_eq!(status.code(), Some(0xc000_0005_u32 as i32), "{status}");
    true
}

#[test]
fn null_pointer_outside_of_guest_access_ends_process() {
    if dies("null_pointer_outside_of_guest_access_ends_process") {
        return;
    }
    let null = std::hint::black_box(std::ptr::without_provenance::<u64>(8));
    // SAFETY: not sound; the process must end here.
    let value = unsafe { null.read_volatile() };
    std::hint::black_box(value);
}

#[test]
fn host_buffer_in_inaccessible_page_ends_process() {
    if dies("host_buffer_in_inaccessible_page_ends_process") {
        return;
    }
    let (memory, buffer) = (memory(), memory());
    protect(&buffer, PAGE_NOACCESS);
    let start = host(&buffer).wrapping_add(ACCESSIBLE);
    // SAFETY: not sound; the process must end when the access reads the buffer.
    let inaccessible = unsafe { std::slice::from_raw_parts(start, PAGE) };
    let moved = memory.write(inaccessible, BASE);
    std::hint::black_box(moved.is_ok());
}
