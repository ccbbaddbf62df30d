//! An `IoBuffer` can be submitted to io_uring, moved to another thread, and completed there.
#![cfg(all(
    target_os = "linux",
    // The targets of io-uring, as in Cargo.toml.
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    ),
    feature = "rawfd",
    feature = "backend-mmap",
    feature = "backend-bitmap"
))]
#![expect(unsafe_code, reason = "io_uring takes pointers")]

use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, types, IoUring};
use test_support::{skipped, temp_file, PAGE};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::vectored::IoBuffer;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Permissions,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

fn ring(test: &str) -> Option<IoUring> {
    match IoUring::new(8) {
        Ok(ring) => Some(ring),
        Err(error) => {
            skipped(test, format!("io_uring is not available: {error}"));
            None
        }
    }
}

fn dirty(memory: &Memory) -> Vec<u64> {
    let regions = memory.iter();
    regions
        .filter(|region| region.get_mmap().bitmap().get_and_reset() != [0])
        .map(|region| region.start_addr().0)
        .collect()
}

#[test]
fn io_buffer_completed_on_another_thread_marks_all_pages() {
    let test = "io_buffer_completed_on_another_thread_marks_all_pages";
    let Some(mut ring) = ring(test) else { return };
    let ranges: Vec<_> = (0..8).map(|i| (GuestAddress(i * 0x1000), PAGE)).collect();
    let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
    let bytes: Vec<u8> = (0..5 * PAGE + 100)
        .map(|i| u8::try_from(i * 11 / 3 % 251).unwrap())
        .collect();
    let mut file = temp_file(&bytes);

    // The file fills five of the eight regions, and a part of the sixth.
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    buffer.push(GuestAddress(0), 8 * PAGE).unwrap();
    let vectors = buffer.vectors_on_heap();
    let read = opcode::Readv::new(types::Fd(file.as_raw_fd()), vectors.as_ptr(), 8)
        .build()
        .user_data(1);
    // SAFETY: the vectors and their memory stay in place until the operation is over, because
    // `buffer` lives until then.
    unsafe { ring.submission().push(&read) }.unwrap();
    // Now only the buffer keeps the memory alive.
    let weak = Arc::downgrade(&memory);
    drop(memory);
    let memory = std::thread::spawn(move || {
        ring.submit_and_wait(1).unwrap();
        let entry = ring.completion().next().unwrap();
        assert_eq!(entry.user_data(), 1);
        let count = usize::try_from(entry.result()).unwrap();
        assert_eq!(count, 5 * PAGE + 100);
        let memory = weak.upgrade().unwrap();
        assert_eq!(dirty(&memory), [0u64; 0], "marked before completion");
        assert_eq!(buffer.complete(count), count);
        memory
    })
    .join()
    .unwrap();
    // After a short count, all pages of the operation are marked.
    assert_eq!(
        dirty(&memory),
        (0..8).map(|i| i * 0x1000).collect::<Vec<_>>()
    );
    let mut seen = vec![0; bytes.len()];
    memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
    assert_eq!(seen, bytes);

    // Write to the file, from the middle of a region.
    let Some(mut ring) = self::ring(test) else {
        return;
    };
    let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Read);
    buffer.push(GuestAddress(0x800), 2 * PAGE).unwrap();
    let vectors = buffer.vectors_on_heap();
    let write = opcode::Writev::new(types::Fd(file.as_raw_fd()), vectors.as_ptr(), 3).build();
    // SAFETY: the vectors and their memory stay in place until the operation is over, because
    // `buffer` lives until then.
    unsafe { ring.submission().push(&write) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    let count = ring.completion().next().unwrap().result();
    assert_eq!(usize::try_from(count).unwrap(), 2 * PAGE);
    drop(buffer);
    assert_eq!(dirty(&memory), [0u64; 0]);
    let mut written = vec![0; 2 * PAGE];
    file.seek(SeekFrom::Start(0)).unwrap();
    std::io::Read::read_exact(&mut file, &mut written).unwrap();
    assert_eq!(written, bytes[0x800..0x800 + 2 * PAGE]);
}
