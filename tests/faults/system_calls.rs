use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::*;
use vm_memory::io::{ReadVolatile, WriteVolatile};
use vm_memory::{fault, Bytes};

/// Where a transfer of so many bytes begins that ends behind the edge to a page which is gone.
const LEN: usize = 600;

fn numbered() -> Vec<u8> {
    (0..LEN).map(|i| (i % 251) as u8 + 1).collect()
}

fn place(inside: usize) -> GuestAddress {
    GuestAddress(BASE.0 + (PAGE - inside) as u64)
}

fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    let created = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(created, 0);
    // SAFETY: the descriptors were just made, and nobody else has them.
    let [reader, writer] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
    (reader, writer)
}

/// How many bytes a system call has moved; 0 if it has met the page at once. Any other error makes the test fail.
fn moved(answer: Result<usize, GuestMemoryError>) -> usize {
    match answer {
        Ok(moved) => {
            assert_ne!(moved, 0, "a page that is gone reads as an end");
            moved
        }
        Err(error) => {
            assert!(is_efault(&error), "{error}");
            0
        }
    }
}

/// read(2) of `LEN` numbered bytes over the edge: what was not counted is still to be read.
fn reads_over_the_edge(source: &mut (impl ReadVolatile + Read), inside: usize) {
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    let first = moved(memory.read_volatile_from(place(inside), source, LEN));
    assert!(first <= inside, "{first}");
    // Once more, from where it stopped: only an error, or more of what lies before the edge.
    let rest = place(inside - first);
    let second = moved(memory.read_volatile_from(rest, source, LEN - first));
    assert!(first + second <= inside);
    let done = first + second;
    // The exact form says how far it came, or that it came nowhere.
    let third = match memory
        .read_exact_volatile_from(place(inside - done), source, LEN - done)
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
    memory.read_slice(&mut seen, place(inside)).unwrap();
    let mut queued = vec![0; LEN - done];
    source.read_exact(&mut queued).unwrap();
    seen.extend(queued);
    assert_eq!(seen, numbered(), "{inside} and {done}");
}

/// write(2) of `LEN` numbered bytes over the edge: `received` gives what has arrived, which is what was counted.
fn writes_over_the_edge(
    target: &mut impl WriteVolatile,
    inside: usize,
    received: impl FnOnce() -> Vec<u8>,
) {
    let (memory, file) = shared(2);
    memory.write_slice(&numbered(), place(inside)).unwrap();
    file.set_len(PAGE as u64).unwrap();
    let mut done = moved(memory.write_volatile_to(place(inside), target, LEN));
    done += match memory
        .write_all_volatile_to(place(inside - done), target, LEN - done)
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
fn a_file_is_read_and_written_up_to_the_edge() {
    fault::install().unwrap();
    for inside in INSIDE {
        let file = memfd(0);
        (&*file).write_all(&numbered()).unwrap();
        std::io::Seek::rewind(&mut &*file).unwrap();
        reads_over_the_edge(&mut &*file, inside);

        let file = memfd(0);
        writes_over_the_edge(&mut &*file, inside, || {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        });
    }
}

#[test]
fn a_pipe_keeps_what_did_not_fit() {
    fault::install().unwrap();
    for inside in INSIDE {
        let (mut reader, mut writer) = pipe();
        writer.write_all(&numbered()).unwrap();
        reads_over_the_edge(&mut reader, inside);

        let (mut reader, mut writer) = pipe();
        writes_over_the_edge(&mut writer, inside, move || {
            let mut queued = 0i32;
            // SAFETY: FIONREAD writes an int.
            let answer = unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &mut queued) };
            assert_eq!(answer, 0);
            let mut bytes = vec![0; queued as usize];
            reader.read_exact(&mut bytes).unwrap();
            bytes
        });
    }
}

#[test]
fn a_socket_keeps_what_did_not_fit() {
    fault::install().unwrap();
    for inside in INSIDE {
        let (mut reader, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(&numbered()).unwrap();
        reads_over_the_edge(&mut reader, inside);

        let (mut reader, mut writer) = UnixStream::pair().unwrap();
        writes_over_the_edge(&mut writer, inside, move || {
            reader.set_nonblocking(true).unwrap();
            let mut bytes = vec![];
            let end = reader.read_to_end(&mut bytes).unwrap_err();
            assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
            bytes
        });
    }
}
