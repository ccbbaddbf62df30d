//! Files, sockets and other descriptors as streams.
//!
//! `read(2)` and `write(2)` get a pointer into guest memory, so the kernel copies directly.

use std::fs::File;
use std::io::Stdout;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::{stream_may_have_written, ReadVolatile, WriteVolatile};
use crate::access::fault::Direction;
use crate::bitmap::BitmapSlice;
use crate::volatile_memory::{Error as VolatileMemoryError, VolatileSlice};

/// The maximum number of bytes that one system call accepts, if the system has one.
///
/// macOS refuses more than `INT_MAX` bytes with `EINVAL`. Linux moves the first 0x7fff_f000 bytes
/// of a longer transfer. This crate does the same on macOS. Other systems accept each length.
const MAX_TRANSFER: Option<usize> = if cfg!(target_vendor = "apple") {
    Some(0x7fff_f000)
} else {
    None
};

/// Returns how many of `len` bytes one system call accepts.
#[inline(always)]
fn accepted(len: usize) -> usize {
    MAX_TRANSFER.map_or(len, |limit| len.min(limit))
}

/// Reads from a descriptor into `buf`. Makes no call for 0 bytes, which could take a packet.
fn read_from<B: BitmapSlice>(
    fd: &impl AsFd,
    buf: &mut VolatileSlice<B>,
) -> Result<usize, VolatileMemoryError> {
    if buf.is_empty() {
        return Ok(0);
    }
    let target = buf.guard_of_first(Direction::Write)?;
    let len = accepted(target.len());
    // SAFETY: the kernel writes at most `len` bytes at `target`, which has as many. They are mapped
    // while `buf` and `target` live, and no Rust reference covers them (contract of
    // `VolatileSlice::with_bitmap`).
    let result = unsafe { libc::read(fd.as_fd().as_raw_fd(), target.as_ptr().cast(), len) };
    let result = usize::try_from(result).map_err(|_| std::io::Error::last_os_error());
    if stream_may_have_written(&result) {
        buf.bitmap().mark_dirty(0, len);
    }
    result.map_err(VolatileMemoryError::IOError)
}

/// Writes from `buf` to a descriptor. Makes no call for 0 bytes, which could send a packet.
fn write_to<B: BitmapSlice>(
    fd: &impl AsFd,
    buf: &VolatileSlice<B>,
) -> Result<usize, VolatileMemoryError> {
    if buf.is_empty() {
        return Ok(0);
    }
    let source = buf.guard_of_first(Direction::Read)?;
    let len = accepted(source.len());
    // SAFETY: the kernel reads at most `len` bytes at `source`, which has as many. They are mapped
    // while `buf` and `source` live (contract of `VolatileSlice::with_bitmap`).
    let result = unsafe { libc::write(fd.as_fd().as_raw_fd(), source.as_ptr().cast(), len) };
    usize::try_from(result)
        .map_err(|_| VolatileMemoryError::IOError(std::io::Error::last_os_error()))
}

macro_rules! read_by_descriptor {
    ($($stream:ty),*) => {
        $(
            impl ReadVolatile for $stream {
                fn read_volatile<B: BitmapSlice>(
                    &mut self,
                    buf: &mut VolatileSlice<B>,
                ) -> Result<usize, VolatileMemoryError> {
                    read_from(self, buf)
                }
            }
        )*
    };
}

macro_rules! write_by_descriptor {
    ($($stream:ty),*) => {
        $(
            impl WriteVolatile for $stream {
                fn write_volatile<B: BitmapSlice>(
                    &mut self,
                    buf: &VolatileSlice<B>,
                ) -> Result<usize, VolatileMemoryError> {
                    write_to(self, buf)
                }
            }
        )*
    };
}

macro_rules! both_by_descriptor {
    ($($stream:ty),*) => {
        read_by_descriptor!($($stream, &$stream, &mut $stream),*);
        write_by_descriptor!($($stream, &$stream, &mut $stream),*);
    };
}

both_by_descriptor!(File, TcpStream, UnixStream, OwnedFd, BorrowedFd<'_>);
write_by_descriptor!(Stdout, &Stdout);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Bytes;
    use std::io::{Read, Seek, SeekFrom};
    use test_support::temp_file;

    #[test]
    fn accepted_length_is_at_most_the_limit_of_macos() {
        let (limit, most) = (0x7fff_f000, usize::MAX);
        let long = if cfg!(target_vendor = "apple") {
            limit
        } else {
            most
        };
        assert_eq!([0, 1, limit, most].map(accepted), [0, 1, limit, long]);
    }

    #[test]
    fn file_read_and_write_volatile_move_bytes() {
        let mut file = temp_file(b"0123456789");
        let mut memory = [0u8; 6];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        slice.read_exact_volatile_from(0, &mut file, 6).unwrap();
        assert_eq!(slice.read_volatile_from(0, &mut &file, 6).unwrap(), 4);
        assert_eq!(slice.read_volatile_from(0, &mut &mut file, 6).unwrap(), 0);
        slice.write_all_volatile_to(4, &mut file, 2).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut all = String::new();
        file.read_to_string(&mut all).unwrap();
        assert_eq!(all, "012345678945");
        assert_eq!(&memory, b"678945");
    }

    #[test]
    fn socket_read_and_write_volatile_move_bytes() {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        let mut memory = *b"ping....";
        let slice = VolatileSlice::from(memory.as_mut_slice());
        slice.write_all_volatile_to(0, &mut left, 4).unwrap();
        slice.read_exact_volatile_from(4, &mut right, 4).unwrap();
        assert_eq!(&memory, b"pingping");
    }

    #[test]
    fn read_volatile_from_directory_returns_os_error() {
        let file = File::open("/").unwrap();
        let mut memory = [0u8; 4];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let error = slice.read_volatile_from(0, &mut &file, 4).unwrap_err();
        assert!(
            matches!(error, VolatileMemoryError::IOError(e) if e.raw_os_error() == Some(libc::EISDIR))
        );
    }
}
