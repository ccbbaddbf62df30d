//! The system calls: one vector, to or from one descriptor.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::pieces::IoVector;

/// How many pieces the kernel takes in one call (`UIO_MAXIOV`, Linux `include/uapi/linux/uio.h`; `IOV_MAX` of readv(2)).
pub(super) const MAX_PIECES: usize = 1024;

/// Which way the bytes go, seen from the descriptor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Transfer {
    /// From the descriptor into memory.
    Read,
    /// From memory to the descriptor.
    Write,
}

/// Where in the file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// At the position that the descriptor has, and moves.
    Position,
    /// So many bytes from the start.
    Offset(u64),
}

impl Place {
    /// The place behind `moved` bytes.
    pub(super) fn behind(self, moved: usize) -> Self {
        match self {
            Place::Position => Place::Position,
            // An offset past the end of what a file can have is refused by `call`.
            Place::Offset(offset) => {
                Place::Offset(offset.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX)))
            }
        }
    }
}

/// Moves bytes between the vectors and a descriptor, and returns how many.
///
/// # Safety
///
/// The memory of `vectors` is mapped, may be changed by others at any time, and is borrowed by nobody as a reference of Rust's.
pub(super) unsafe fn call(
    transfer: Transfer,
    fd: BorrowedFd<'_>,
    place: Place,
    vectors: &[IoVector],
) -> Result<usize> {
    // `IoVector` is a `struct iovec`.
    let first = vectors.as_ptr().cast::<libc::iovec>();
    let count = libc::c_int::try_from(vectors.len().min(MAX_PIECES)).unwrap_or(libc::c_int::MAX);
    let fd = fd.as_raw_fd();
    let answer = match (transfer, place) {
        (Transfer::Read, Place::Position) => {
            // SAFETY: `first` points to `count` initialised `iovec`s; the kernel writes to their memory only, which the caller allows. The
            // compiler does not see those writes, as it does not see a guest's.
            unsafe { libc::readv(fd, first, count) }
        }
        (Transfer::Write, Place::Position) => {
            // SAFETY: `first` points to `count` initialised `iovec`s; the kernel reads their memory only, which the caller allows.
            unsafe { libc::writev(fd, first, count) }
        }
        (Transfer::Read, Place::Offset(offset)) => {
            let offset = file_offset(offset)?;
            // SAFETY: as for `readv`.
            unsafe { libc::preadv(fd, first, count, offset) }
        }
        (Transfer::Write, Place::Offset(offset)) => {
            let offset = file_offset(offset)?;
            // SAFETY: as for `writev`.
            unsafe { libc::pwritev(fd, first, count, offset) }
        }
    };
    usize::try_from(answer).map_err(|_| Error::last_os_error())
}

/// An offset as the kernel counts it. `EINVAL` where it cannot, as the kernel answers for a negative one (pread(2)).
fn file_offset(offset: u64) -> Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| Error::from_raw_os_error(libc::EINVAL))
}
