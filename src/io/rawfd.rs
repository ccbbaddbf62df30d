//! Streams that are descriptors: `read(2)` and `write(2)` with a pointer into guest memory.

use std::fs::File;
use std::io::{ErrorKind, Stdout};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::{ReadVolatile, WriteVolatile};
use crate::bitmap::BitmapSlice;
use crate::volatile_memory::{Error as VolatileMemoryError, VolatileSlice};

/// Reads from a descriptor into `buf`.
fn read_from<B: BitmapSlice>(
    fd: &impl AsFd,
    buf: &mut VolatileSlice<B>,
) -> Result<usize, VolatileMemoryError> {
    let target = buf.ptr_guard_mut();
    // SAFETY: `target` points to `target.len()` bytes that are mapped as long as `buf` lives; the kernel writes no more than those. The
    // compiler does not see the kernel's writes, as it does not see a guest's.
    let answer =
        unsafe { libc::read(fd.as_fd().as_raw_fd(), target.as_ptr().cast(), target.len()) };
    let Ok(moved) = usize::try_from(answer) else {
        let error = std::io::Error::last_os_error();
        // Nothing was tried yet, or nothing was there: no byte has changed. After any other error a device may have left bytes
        // behind that the kernel does not count.
        if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
            buf.bitmap().mark_dirty(0, buf.len());
        }
        return Err(VolatileMemoryError::IOError(error));
    };
    buf.bitmap().mark_dirty(0, moved);
    Ok(moved)
}

/// Writes from `buf` to a descriptor.
fn write_to<B: BitmapSlice>(
    fd: &impl AsFd,
    buf: &VolatileSlice<B>,
) -> Result<usize, VolatileMemoryError> {
    let source = buf.ptr_guard();
    // SAFETY: `source` points to `source.len()` bytes that are mapped as long as `buf` lives; the kernel reads no more than those.
    let answer =
        unsafe { libc::write(fd.as_fd().as_raw_fd(), source.as_ptr().cast(), source.len()) };
    usize::try_from(answer)
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
    fn files_read_and_write_without_a_buffer() {
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
    fn sockets_read_and_write_without_a_buffer() {
        let (mut left, mut right) = UnixStream::pair().unwrap();
        let mut memory = *b"ping....";
        let slice = VolatileSlice::from(memory.as_mut_slice());
        slice.write_all_volatile_to(0, &mut left, 4).unwrap();
        slice.read_exact_volatile_from(4, &mut right, 4).unwrap();
        assert_eq!(&memory, b"pingping");
    }

    #[test]
    fn an_error_of_the_system_keeps_its_number() {
        let file = File::open("/").unwrap();
        let mut memory = [0u8; 4];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let error = slice.read_volatile_from(0, &mut &file, 4).unwrap_err();
        assert!(
            matches!(error, VolatileMemoryError::IOError(e) if e.raw_os_error() == Some(libc::EISDIR))
        );
    }

    /// B14: a read that finds nothing there yet changes nothing, and marks nothing.
    #[test]
    #[cfg(feature = "backend-bitmap")]
    fn b14_a_read_that_would_block_marks_nothing() {
        use std::io::Write as _;

        use crate::bitmap::{AtomicBitmap, Bitmap};
        let (left, right) = UnixStream::pair().unwrap();
        right.set_nonblocking(true).unwrap();
        let bitmap = AtomicBitmap::new(0x1000, 0x100.try_into().unwrap());
        let mut memory = [0u8; 0x1000];
        let ptr = memory.as_mut_ptr();
        // SAFETY: `memory` outlives the slice, and is accessed through it only.
        let slice = unsafe { VolatileSlice::with_bitmap(ptr, 0x1000, bitmap.slice_at(0), None) };
        let error = slice
            .read_volatile_from(0, &mut &right, 0x1000)
            .unwrap_err();
        assert!(
            matches!(error, VolatileMemoryError::IOError(e) if e.kind() == ErrorKind::WouldBlock)
        );
        assert_eq!(bitmap.get_and_reset(), [0]);

        (&left).write_all(&[7; 0x180]).unwrap();
        assert_eq!(
            slice
                .read_volatile_from(0x80, &mut &right, 0x1000 - 0x80)
                .unwrap(),
            0x180
        );
        assert_eq!(bitmap.get_and_reset(), [3]);

        // Other errors may have left bytes behind: the whole buffer counts as written.
        let directory = File::open("/").unwrap();
        slice
            .read_volatile_from(0x200, &mut &directory, 0x200)
            .unwrap_err();
        assert_eq!(bitmap.get_and_reset(), [0b1100]);
    }
}
