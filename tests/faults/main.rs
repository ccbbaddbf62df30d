//! With the fault handler, an access to a page that became inaccessible returns an error.
#![cfg(all(
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap",
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    not(vm_memory_portable)
))]
#![expect(
    clippy::disallowed_methods,
    unsafe_code,
    reason = "calls mmap(2) and sigaction(2), and reads the mappings directly"
)]

mod buffers;
mod causes;
mod counts;
mod kinds;
mod many;
mod previous;
mod processes;
mod short_counts;
mod system_calls;
mod typed_copies;
mod windows;
mod within;
mod without_address;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use test_support::PAGE;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

const BASE: GuestAddress = GuestAddress(0x10_0000);

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memfd(pages: usize) -> Arc<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"faults".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len((pages * PAGE) as u64).unwrap();
    Arc::new(file)
}

/// Returns memory of `pages` pages, and the file that it maps.
fn shared(pages: usize) -> (Memory, Arc<File>) {
    let file = memfd(pages);
    let backing = FileOffset::from_arc(file.clone(), 0);
    (
        Memory::from_ranges_with_files([(BASE, pages * PAGE, Some(backing))]).unwrap(),
        file,
    )
}

fn protect(memory: &Memory, page: usize, protection: i32) {
    let host = memory.get_host_address(BASE).unwrap();
    let host = host.wrapping_add(page * PAGE);
    // SAFETY: a page of the mapping, which only accesses of the crate use.
    let status = unsafe { libc::mprotect(host.cast(), PAGE, protection) };
    assert_eq!(status, 0);
}

fn is_efault(error: &GuestMemoryError) -> bool {
    matches!(error, GuestMemoryError::IOError(e) if e.raw_os_error() == Some(libc::EFAULT))
}
