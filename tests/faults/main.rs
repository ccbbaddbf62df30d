//! Pages that go away under an access: errors where the handler is installed, and everything else as before.
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

/// What makes pages go away.
mod causes;
/// How many bytes were moved before.
mod counts;
/// What each access answers.
mod kinds;
/// Faults by the thousand.
mod many;
/// What must still kill, and who else hears of it.
mod processes;
/// System calls, which meet such pages themselves.
mod system_calls;
/// Copies from guest memory to guest memory.
mod within;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

const PAGE: usize = 4096;
const BASE: GuestAddress = GuestAddress(0x10_0000);

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn memfd(pages: usize) -> Arc<File> {
    // SAFETY: a name that ends with a zero; the answer is a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"faults".as_ptr(), 0) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made, and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len((pages * PAGE) as u64).unwrap();
    Arc::new(file)
}

/// Memory of a file of so many pages, and the file.
fn shared(pages: usize) -> (Memory, Arc<File>) {
    let file = memfd(pages);
    let place = FileOffset::from_arc(file.clone(), 0);
    (
        Memory::from_ranges_with_files([(BASE, pages * PAGE, Some(place))]).unwrap(),
        file,
    )
}

fn protect(memory: &Memory, page: usize, protection: i32) {
    let host = memory.get_host_address(BASE).unwrap();
    let host = host.wrapping_add(page * PAGE);
    // SAFETY: a page of the mapping, which nothing but accesses of the crate touches.
    let answer = unsafe { libc::mprotect(host.cast(), PAGE, protection) };
    assert_eq!(answer, 0);
}

fn is_efault(error: &GuestMemoryError) -> bool {
    matches!(error, GuestMemoryError::IOError(e) if e.raw_os_error() == Some(libc::EFAULT))
}
