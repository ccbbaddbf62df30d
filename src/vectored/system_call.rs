//! The system calls: one array of vectors, from or to one descriptor.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::convert::to_u64;
use crate::io::MAX_TRANSFER;

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
/// quadratic time.
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
}

/// Moves bytes between `fd` and the memory of `vectors` by one system call. Returns their number.
///
/// It moves at most [`MAX_TRANSFER`] bytes.
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
    let mut shortened = None;
    let vectors = accepted(vectors, MAX_TRANSFER, &mut shortened);
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

/// Returns the vectors that one call of at most `limit` bytes accepts. `None` accepts all.
///
/// They have bytes if `vectors` has. If the first of these bytes are those of a vector that is
/// longer than `limit`, its start is returned, in `shortened`.
#[inline(always)]
fn accepted<'v>(
    vectors: &'v [libc::iovec],
    limit: Option<usize>,
    shortened: &'v mut Option<libc::iovec>,
) -> &'v [libc::iovec] {
    let Some(limit) = limit else {
        return vectors;
    };
    let mut rest = limit;
    for (at, vector) in vectors.iter().enumerate() {
        match rest.checked_sub(vector.iov_len) {
            Some(after) => rest = after,
            None if rest == limit => {
                let start = libc::iovec {
                    iov_base: vector.iov_base,
                    iov_len: limit,
                };
                return core::slice::from_ref(shortened.insert(start));
            }
            None => return vectors.get(..at).unwrap_or(vectors),
        }
    }
    vectors
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

    /// The lengths of the vectors that a call of at most `limit` bytes gets.
    fn lengths(lengths: &[usize], limit: impl Into<Option<usize>>) -> Vec<usize> {
        let vector = |len: &usize| libc::iovec {
            iov_base: core::ptr::null_mut(),
            iov_len: *len,
        };
        let vectors: Vec<_> = lengths.iter().map(vector).collect();
        let accepted = accepted(&vectors, limit.into(), &mut None)
            .iter()
            .map(|vector| vector.iov_len)
            .collect();
        accepted
    }

    #[test]
    fn accepted_vectors_have_at_most_as_many_bytes_as_the_limit() {
        assert_eq!(lengths(&[4, 3, 2], 9), [4, 3, 2]);
        assert_eq!(lengths(&[4, 3, 2], 8), [4, 3]);
        assert_eq!(lengths(&[4, usize::MAX, 2], 8), [4]);
        assert_eq!(lengths(&[4, 3, 2], 3), [3]);
        assert_eq!(lengths(&[0, 4, 2], 3), [3]);
        assert_eq!(lengths(&[0, 0], 3), [0, 0]);
        assert_eq!(lengths(&[4, usize::MAX, 2], None), [4, usize::MAX, 2]);
        assert!(lengths(&[], 3).is_empty());
    }
}
