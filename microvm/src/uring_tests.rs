//! Operations on files, on what comes in pieces, and on what ends too soon.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, Permissions};

use super::*;
use crate::memory::{harvest, map, Backing, GuestRam, HIGH_START, MIN_MEM, PAGE};

/// A ring, if the kernel lets this process have one; if not, says so aloud.
fn ring(test: &str) -> Option<Ring> {
    match Ring::open().unwrap() {
        Ok(ring) => Some(ring),
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
            None
        }
    }
}

fn ram() -> Arc<GuestRam> {
    Arc::new(map(MIN_MEM, Backing::Anonymous).unwrap())
}

/// An operation on the end of the low region and the beginning of the high one.
fn operation(
    ram: &Arc<GuestRam>,
    request: usize,
    file: &impl AsRawFd,
    len: usize,
    reads: bool,
) -> Operation<GuestRam> {
    let access = if reads {
        Permissions::Write
    } else {
        Permissions::Read
    };
    let mut buffer = IoBuffer::new(Arc::clone(ram), access);
    let low = len / 2;
    let end = MIN_MEM / 2;
    buffer.push(GuestAddress(end - low as u64), low).unwrap();
    buffer.push(GuestAddress(HIGH_START), len - low).unwrap();
    Operation {
        request,
        buffer,
        file: file.as_raw_fd(),
        offset: 0,
        reads,
    }
}

#[test]
fn what_comes_in_pieces_goes_on_where_it_stopped() {
    let Some(mut ring) = ring("what_comes_in_pieces_goes_on_where_it_stopped") else {
        return;
    };
    let ram = ram();
    // More than a pipe holds (pipe(7): 64 KiB), so that no read gets all of it.
    let bytes: Vec<u8> = (0..50 * PAGE).map(|n| (n * 7 / 3) as u8).collect();
    let (receiver, mut sender) = std::io::pipe().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || sender.write_all(&sent).unwrap());
    let (mut ended, len) = (Vec::new(), bytes.len());
    let read = operation(&ram, 3, &receiver, len, true);
    ring.run(vec![read], |request, moved| {
        ended.push((request, moved.is_ok()))
    })
    .unwrap();
    writer.join().unwrap();
    assert_eq!(ended, [(3, true)]);
    let counts = ring.counts;
    assert!(counts.short >= 3, "{counts:?}");
    assert_eq!(
        (counts.operations, counts.completed, counts.most),
        (counts.short + 1, counts.short + 1, 1)
    );
    assert_eq!(counts.bytes, len as u64);
    let mut got = vec![0; len];
    let (low, high) = got.split_at_mut(len / 2);
    ram.read_slice(low, GuestAddress(MIN_MEM / 2 - len as u64 / 2))
        .unwrap();
    ram.read_slice(high, GuestAddress(HIGH_START)).unwrap();
    assert_eq!(got, bytes);
    assert_eq!(harvest(&ram).count(), 50);
}

#[test]
fn a_file_that_ends_is_an_error_and_what_came_is_marked() {
    let Some(mut ring) = ring("a_file_that_ends_is_an_error_and_what_came_is_marked") else {
        return;
    };
    let ram = ram();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0x5a; 100]).unwrap();
    let mut ended = Vec::new();
    let read = operation(&ram, 0, &file, 2 * PAGE as usize, true);
    // A descriptor that cannot be written to.
    let closed = std::fs::File::open("/dev/null").unwrap();
    let write = operation(&ram, 1, &closed, 512, false);
    ring.run(vec![read, write], |request, moved| {
        ended.push((request, moved.map_err(|e| (e.kind(), e.raw_os_error()))))
    })
    .unwrap();
    ended.sort_unstable_by_key(|(request, _)| *request);
    assert_eq!(
        ended,
        [
            (0, Err((io::ErrorKind::UnexpectedEof, None))),
            (
                1,
                Err((
                    io::Error::from_raw_os_error(libc::EBADF).kind(),
                    Some(libc::EBADF)
                ))
            ),
        ]
    );
    assert_eq!(ring.counts.bytes, 100);
    // 100 bytes of the first page, and nothing by the write.
    let dirty = harvest(&ram);
    assert_eq!(
        (dirty.count(), dirty.first()),
        (1, Some(MIN_MEM / 2 - PAGE))
    );
    // Works as before.
    let mut ended = 0;
    let read = operation(&ram, 7, &file, 100, true);
    ring.run(vec![read], |_, moved| ended += i32::from(moved.is_ok()))
        .unwrap();
    assert_eq!((ended, ring.counts.bytes), (1, 200));
}

#[test]
fn more_operations_than_the_ring_holds_all_end_once() {
    let Some(mut ring) = ring("more_operations_than_the_ring_holds_all_end_once") else {
        return;
    };
    let ram = ram();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0x5a; 512]).unwrap();
    let count = 5 * usize::from(QUEUE_MAX) + 3;
    let operations = (0..count).map(|nth| operation(&ram, nth, &file, 512, true));
    let mut ended = vec![0; count];
    ring.run(operations.collect(), |request, moved| {
        moved.unwrap();
        ended[request] += 1;
    })
    .unwrap();
    assert!(ended.iter().all(|times| *times == 1));
    assert_eq!(ring.counts.most, u64::from(QUEUE_MAX));
    assert_eq!(ring.counts.operations, count as u64);
    // Nobody but this test has the memory.
    assert_eq!(Arc::strong_count(&ram), 1);
}
