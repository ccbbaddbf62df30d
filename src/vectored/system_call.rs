//! The system calls: one array of vectors, from or to one descriptor.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::convert::to_u64;
use crate::io::stream_may_have_written;

/// The maximum number of vectors that the kernel accepts in one call.
///
/// It is `UIO_MAXIOV` of Linux (`include/uapi/linux/uio.h`), and `IOV_MAX` of readv(2).
///
/// It is the default limit of an [`IoBuffer`](super::IoBuffer), and the limit of
/// [`io_vectors`](super::io_vectors()).
pub const MAX_VECTORS: usize = 1024;

/// The maximum number of bytes of a single call.
///
/// A read marks all bytes of its vectors. Without a limit, a loop over a long range would take
/// quadratic time. It is below the limit of each system. The lowest is that of macOS (`INT_MAX`).
pub(super) const MAX_BYTES: usize = 64 << 20;

/// The direction of a transfer, as the descriptor sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Transfer {
    /// From the descriptor into memory.
    Read,
    /// From memory to the descriptor.
    Write,
}

/// The position in the file at which a transfer starts.
#[derive(Clone, Copy, Debug)]
pub(super) enum FilePosition {
    /// The descriptor's own position, which the transfer moves.
    Current,
    /// A number of bytes from the start of the file.
    Offset(u64),
}

impl FilePosition {
    /// Returns the position after a transfer of `moved` bytes.
    pub(super) fn after(self, moved: usize) -> Self {
        match self {
            FilePosition::Current => FilePosition::Current,
            // `call` refuses an offset that is larger than any file.
            FilePosition::Offset(offset) => {
                FilePosition::Offset(offset.saturating_add(to_u64(moved)))
            }
        }
    }

    /// Returns whether a read from here with this result may have written bytes, counted or not.
    ///
    /// With `O_DIRECT`, the kernel may read several parts of the range at once. If the first one
    /// fails, the call returns its result, although other parts were written.
    pub(super) fn may_have_written(self, result: &Result<usize>) -> bool {
        match self {
            FilePosition::Current => stream_may_have_written(result),
            FilePosition::Offset(_) => true,
        }
    }
}

/// Moves bytes between `fd` and the memory of `vectors` by one system call. Returns their number.
///
/// The vectors have at most [`MAX_BYTES`] bytes.
///
/// # Safety
///
/// While the call runs, the memory of each vector must be mapped, and no Rust reference to it may
/// exist. Others may change it at any time.
pub(super) unsafe fn call(
    direction: Transfer,
    fd: BorrowedFd<'_>,
    position: FilePosition,
    vectors: &[libc::iovec],
) -> Result<usize> {
    let first = vectors.as_ptr();
    let count = libc::c_int::try_from(vectors.len().min(MAX_VECTORS)).unwrap_or(libc::c_int::MAX);
    let fd = fd.as_raw_fd();
    let moved = match (direction, position) {
        (Transfer::Read, FilePosition::Current) => {
            // SAFETY: `first` points to at least `count` initialised `iovec`s, those of `vectors`.
            // The kernel writes only to the memory that they name. It is mapped and free of
            // references, as the contract of `call` demands. So these writes, which the compiler
            // does not see, invalidate nothing that it assumes.
            unsafe { libc::readv(fd, first, count) }
        }
        (Transfer::Write, FilePosition::Current) => {
            // SAFETY: `first` points to at least `count` initialised `iovec`s, those of `vectors`.
            // The kernel only reads the memory that they name. It is mapped, as the contract of
            // `call` demands.
            unsafe { libc::writev(fd, first, count) }
        }
        (Transfer::Read, FilePosition::Offset(offset)) => {
            let offset = file_offset(offset)?;
            // SAFETY: `first` points to at least `count` initialised `iovec`s, those of `vectors`.
            // The kernel writes only to the memory that they name. It is mapped and free of
            // references, as the contract of `call` demands.
            unsafe { libc::preadv(fd, first, count, offset) }
        }
        (Transfer::Write, FilePosition::Offset(offset)) => {
            let offset = file_offset(offset)?;
            // SAFETY: `first` points to at least `count` initialised `iovec`s, those of `vectors`.
            // The kernel only reads the memory that they name. It is mapped, as the contract of
            // `call` demands.
            unsafe { libc::pwritev(fd, first, count, offset) }
        }
    };
    usize::try_from(moved).map_err(|_| Error::last_os_error())
}

/// Converts an offset to the kernel's type.
///
/// Returns `EINVAL` if it does not fit, as preadv(2) does for a negative offset.
fn file_offset(offset: u64) -> Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn read_at_offset_may_have_written_whatever_its_result() {
        let failed = |kind: ErrorKind| Err::<usize, _>(Error::from(kind));
        for (result, from_stream) in [
            (Ok(1), true),
            (Ok(0), false),
            (failed(ErrorKind::WouldBlock), false),
            (failed(ErrorKind::Interrupted), false),
            (failed(ErrorKind::PermissionDenied), true),
        ] {
            assert_eq!(FilePosition::Current.may_have_written(&result), from_stream);
            assert!(FilePosition::Offset(0).may_have_written(&result));
        }
    }
}
