//! A read or write across an inaccessible page counts exactly the bytes that the stream moved.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::*;
use vm_memory::io::{ReadVolatile, WriteVolatile};
use vm_memory::{fault, Bytes};

/// The length of a transfer that reaches into an inaccessible page.
const LEN: usize = 600;

fn numbered() -> Vec<u8> {
    (0..LEN).map(|i| (i % 251) as u8 + 1).collect()
}

/// Returns the address `inside` bytes before the inaccessible page.
fn before_edge(inside: usize) -> GuestAddress {
    GuestAddress(BASE.0 + (PAGE - inside) as u64)
}

fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    let created = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(created, 0);
    // SAFETY: the descriptors are new and have no other owner.
    let [reader, writer] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
    (reader, writer)
}

/// Returns how many bytes a system call moved: 0 if it returned `EFAULT`.
fn moved(result: Result<usize, GuestMemoryError>) -> usize {
    match result {
        Ok(moved) => {
            assert_ne!(moved, 0, "an inaccessible page looks like an end of file");
            moved
        }
        Err(error) => {
            assert!(is_efault(&error), "{error}");
            0
        }
    }
}

/// Checks that a read across the edge leaves in `source` all bytes that it does not count.
fn check_read_across_edge(source: &mut (impl ReadVolatile + Read), inside: usize) {
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    let first = moved(memory.read_volatile_from(before_edge(inside), source, LEN));
    assert!(first <= inside, "{first}");
    let rest = before_edge(inside - first);
    let second = moved(memory.read_volatile_from(rest, source, LEN - first));
    assert!(first + second <= inside);
    let done = first + second;
    let third = match memory
        .read_exact_volatile_from(before_edge(inside - done), source, LEN - done)
        .unwrap_err()
    {
        GuestMemoryError::PartialBuffer {
            expected,
            completed,
        } => {
            assert_eq!(expected, LEN - done);
            completed
        }
        error => moved(Err(error)),
    };
    let done = done + third;
    let mut seen = vec![0; done];
    memory.read_slice(&mut seen, before_edge(inside)).unwrap();
    let mut queued = vec![0; LEN - done];
    source.read_exact(&mut queued).unwrap();
    seen.extend(queued);
    assert_eq!(seen, numbered(), "{inside} and {done}");
}

/// Checks that a write across the edge sends exactly the bytes that it counts.
fn check_write_across_edge(
    target: &mut impl WriteVolatile,
    inside: usize,
    received: impl FnOnce() -> Vec<u8>,
) {
    let (memory, file) = shared(2);
    memory
        .write_slice(&numbered(), before_edge(inside))
        .unwrap();
    file.set_len(PAGE as u64).unwrap();
    let mut done = moved(memory.write_volatile_to(before_edge(inside), target, LEN));
    done += match memory
        .write_all_volatile_to(before_edge(inside - done), target, LEN - done)
        .unwrap_err()
    {
        GuestMemoryError::PartialBuffer { completed, .. } => completed,
        error => moved(Err(error)),
    };
    assert!(done <= inside);
    assert_eq!(received(), numbered()[..done], "{inside}");
}

const INSIDE: [usize; 7] = [0, 1, 8, 100, 255, 511, LEN - 1];

#[test]
fn read_and_write_of_file_across_fault_count_exactly() {
    fault::install().unwrap();
    for inside in INSIDE {
        let file = memfd(0);
        (&*file).write_all(&numbered()).unwrap();
        std::io::Seek::rewind(&mut &*file).unwrap();
        check_read_across_edge(&mut &*file, inside);

        let file = memfd(0);
        check_write_across_edge(&mut &*file, inside, || {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        });
    }
}

#[test]
fn read_and_write_of_pipe_across_fault_count_exactly() {
    fault::install().unwrap();
    for inside in INSIDE {
        let (mut reader, mut writer) = pipe();
        writer.write_all(&numbered()).unwrap();
        check_read_across_edge(&mut reader, inside);

        let (mut reader, mut writer) = pipe();
        check_write_across_edge(&mut writer, inside, move || {
            let mut queued = 0i32;
            // SAFETY: FIONREAD writes an int.
            let status = unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &mut queued) };
            assert_eq!(status, 0);
            let mut bytes = vec![0; queued as usize];
            reader.read_exact(&mut bytes).unwrap();
            bytes
        });
    }
}

#[test]
fn read_and_write_of_socket_across_fault_count_exactly() {
    fault::install().unwrap();
    for inside in INSIDE {
        let (mut reader, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(&numbered()).unwrap();
        check_read_across_edge(&mut reader, inside);

        let (mut reader, mut writer) = UnixStream::pair().unwrap();
        check_write_across_edge(&mut writer, inside, move || {
            reader.set_nonblocking(true).unwrap();
            let mut bytes = vec![];
            let end = reader.read_to_end(&mut bytes).unwrap_err();
            assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
            bytes
        });
    }
}
