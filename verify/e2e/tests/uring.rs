//! A ring ends each operation once: after short transfers, at the end of a file, and with more
//! operations than fit. A ring that the system refuses returns its error.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use e2e::uring::{Operation, Ring};
use microvm::memory::{build, harvest, pages, Backing, GuestRam, HIGH_START, PAGE};
use microvm::virtio_mmio::QUEUE_MAX;
use test_support::{refuse_calls, skipped, temp_file};
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, Permissions};

const LOW_END: u64 = 8 << 20;

fn ring(test: &str) -> Option<Ring> {
    let ring = Ring::new();
    if let Err(e) = &ring {
        skipped(test, format!("io_uring: {e}"));
    }
    ring.ok()
}

fn ram() -> Arc<GuestRam> {
    Arc::new(build(16 << 20, &Backing::Anonymous).unwrap())
}

/// Returns an operation on the end of the low region and the start of the high region.
fn operation(
    ram: &Arc<GuestRam>,
    number: usize,
    file: &Arc<File>,
    len: usize,
    is_read: bool,
) -> Operation<GuestRam> {
    let access = if is_read {
        Permissions::Write
    } else {
        Permissions::Read
    };
    let mut buffer = IoBuffer::new(Arc::clone(ram), access);
    let low = len / 2;
    buffer
        .push(GuestAddress(LOW_END - low as u64), low)
        .unwrap();
    buffer.push(GuestAddress(HIGH_START), len - low).unwrap();
    Operation {
        number,
        buffer,
        file: Arc::clone(file),
        offset: 0,
        is_read,
    }
}

#[test]
fn run_continues_short_transfers() {
    let Some(mut ring) = ring("run_continues_short_transfers") else {
        return;
    };
    let ram = ram();
    // More than a pipe can hold (pipe(7): 64 KiB), so no read returns all of it.
    let bytes: Vec<u8> = (0..50 * PAGE).map(|n| (n * 7 / 3) as u8).collect();
    let (receiver, mut sender) = io::pipe().unwrap();
    let receiver = Arc::new(File::from(OwnedFd::from(receiver)));
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || sender.write_all(&sent).unwrap());
    let mut ended = Vec::new();
    let read = operation(&ram, 3, &receiver, bytes.len(), true);
    ring.run(vec![read], |number, outcome| {
        ended.push((number, outcome.is_ok()))
    })
    .unwrap();
    writer.join().unwrap();
    assert_eq!(ended, [(3, true)]);
    let counts = ring.counts;
    assert!(counts.short >= 3, "{counts:?}");
    assert_eq!(
        (counts.submitted, counts.completed),
        (counts.short + 1, counts.short + 1)
    );
    assert_eq!((counts.most, counts.bytes), (1, bytes.len() as u64));
    let mut found = vec![0; bytes.len()];
    let (low, high) = found.split_at_mut(bytes.len() / 2);
    ram.read_slice(low, GuestAddress(LOW_END - bytes.len() as u64 / 2))
        .unwrap();
    ram.read_slice(high, GuestAddress(HIGH_START)).unwrap();
    assert_eq!(found, bytes);
    assert_eq!(harvest(&ram).total_pages(), 50);
}

#[test]
fn run_at_end_of_file_returns_error_and_marks_all_pages() {
    let Some(mut ring) = ring("run_at_end_of_file_returns_error_and_marks_all_pages") else {
        return;
    };
    let ram = ram();
    let file = Arc::new(temp_file(&[0x5a; 100]));
    let mut ended = Vec::new();
    let read = operation(&ram, 0, &file, 2 * PAGE as usize, true);
    // Opened for reading only.
    let read_only = Arc::new(File::open("/dev/null").unwrap());
    let write = operation(&ram, 1, &read_only, 512, false);
    ring.run(vec![read, write], |number, outcome| {
        ended.push((number, outcome.map_err(|e| (e.kind(), e.raw_os_error()))));
    })
    .unwrap();
    ended.sort_unstable_by_key(|(number, _)| *number);
    let bad_descriptor = io::Error::from_raw_os_error(libc::EBADF);
    let expected = [
        (0, Err((io::ErrorKind::UnexpectedEof, None))),
        (1, Err((bad_descriptor.kind(), Some(libc::EBADF)))),
    ];
    assert_eq!(ended, expected);
    assert_eq!(ring.counts.bytes, 100);
    // The first read was given both pages, and had a short count.
    assert_eq!(pages(&harvest(&ram)), [LOW_END - PAGE, HIGH_START].into());

    // The ring continues to work.
    let mut succeeded = 0;
    let read = operation(&ram, 7, &file, 100, true);
    ring.run(vec![read], |_, outcome| {
        succeeded += i32::from(outcome.is_ok())
    })
    .unwrap();
    assert_eq!((succeeded, ring.counts.bytes), (1, 200));
}

#[test]
fn run_with_more_operations_than_fit_ends_each_once() {
    let Some(mut ring) = ring("run_with_more_operations_than_fit_ends_each_once") else {
        return;
    };
    let ram = ram();
    let file = Arc::new(temp_file(&[0x5a; 512]));
    let count = 5 * usize::from(QUEUE_MAX) + 3;
    let operations = (0..count).map(|number| operation(&ram, number, &file, 512, true));
    let mut ended = vec![0; count];
    ring.run(operations.collect(), |number, outcome| {
        outcome.unwrap();
        ended[number] += 1;
    })
    .unwrap();
    assert!(ended.iter().all(|times| *times == 1));
    assert_eq!(ring.counts.most, u64::from(QUEUE_MAX));
    assert_eq!(ring.counts.submitted, count as u64);
    // Each operation released its reference to the memory.
    assert_eq!(Arc::strong_count(&ram), 1);
}

/// The seccomp filters of many containers refuse io_uring.
#[test]
fn ring_refused_by_seccomp_returns_the_error_of_the_filter() {
    let number = || Ring::new().err().and_then(|error| error.raw_os_error());
    let refused = refuse_calls(libc::SYS_io_uring_setup, libc::EPERM, number);
    assert_eq!(refused.unwrap(), Some(libc::EPERM));
}
