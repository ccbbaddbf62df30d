//! A read at an offset with `O_DIRECT` marks all its pages, also if the kernel returns the result
//! of a failed first part.
#![cfg(all(
    target_os = "linux",
    feature = "backend-mmap",
    feature = "backend-bitmap",
    feature = "rawfd"
))]

use std::sync::Arc;

use test_support::FuseServer;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::vectored::{self, IoBuffer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

const START: GuestAddress = GuestAddress(0);
const LEN: usize = 0x4000;

#[test]
fn direct_read_at_offset_whose_first_part_fails_marks_all_pages() {
    let test = "direct_read_at_offset_whose_first_part_fails_marks_all_pages";
    for first_error in [0, libc::EAGAIN, libc::EIO] {
        for function in 0..4 {
            let Some(server) = FuseServer::mount(test) else {
                return;
            };
            let file = server.open_direct(first_error);
            let ranges = [(START, 2 * LEN)];
            let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
            let memory = Arc::new(memory);
            let buffer = || {
                let mut buffer = IoBuffer::new(&memory, Permissions::Write);
                buffer.push(START, LEN).unwrap();
                buffer
            };
            let read = match function {
                0 => vectored::read_from_at(&*memory, START, LEN, &file, 0).is_ok(),
                1 => vectored::read_exact_from_at(&*memory, START, LEN, &file, 0).is_ok(),
                2 => buffer().read_from_at(&file, 0).is_ok(),
                _ => buffer().read_exact_from_at(&file, 0).is_ok(),
            };
            // A read of 0 bytes is complete for the functions that read once.
            assert_eq!(read, first_error == 0 && function % 2 == 0);
            // The other parts were written.
            assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3fff)).unwrap(), 0xaa);
            let mut dirty = DirtyMemory::new();
            dirty.harvest(&*memory);
            let runs: Vec<_> = dirty.runs().collect();
            assert_eq!(runs, [(START, LEN)], "{first_error} {function}");
        }
    }
}
