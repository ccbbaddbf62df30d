//! A range of guest memory as one vector of the kernel's: `preadv(2)`, `writev(2)`, io_uring, AIO, vhost.
//!
//! A range may lie in several regions, and behind an IOMMU in as many pieces as its mappings. [`ReadVolatile`](crate::ReadVolatile) makes a system
//! call for each; a `struct iovec` (`readv(2)`) names them all, so that one call moves them.
//!
//! - [`read_from`], [`write_to`] and their kin do that for a file, a socket or any other descriptor.
//! - [`io_vectors`] gives the range as raw `iovec`s, for whatever else takes them while the memory is borrowed.
//! - [`IoBuffer`] owns its memory map and can be sent to another thread: for I/O that completes later. It marks what the device has written when
//!   it is told so, and not before.
//!
//! They are never `IoSlice` or `IoSliceMut`: those are `&[u8]`, which memory that a guest changes at any moment cannot be.
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use std::fs::File;
//! use vm_memory::{vectored, Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let memory: GuestMemoryMmap =
//!     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])?;
//! let disk = File::open("/dev/zero")?;
//! memory.write_obj(u64::MAX, GuestAddress(0xffc))?;
//!
//! // Two regions, one preadv(2).
//! vectored::read_exact_from_at(&memory, GuestAddress(0x800), 0x1000, &disk, 0)?;
//! assert_eq!(memory.read_obj::<u64>(GuestAddress(0xffc))?, 0);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Counts and errors
//!
//! Interrupted calls (`EINTR`) are repeated. The forms without `exact` or `all` make one call for the first 1024 pieces (`UIO_MAXIOV`, Linux
//! `include/uapi/linux/uio.h`) and return what it moved, which may be less than was asked for. The others go on where a call stopped,
//! until all is moved; if they cannot, they return
//! [`PartialBuffer`](crate::GuestMemoryError::PartialBuffer) with what was moved once that is more than nothing, as the exact forms of
//! [`Bytes`](crate::Bytes) do. A range that ends in a hole, or in memory that does not permit the access, is moved up to there.
//!
//! A page that is gone (see [`fault`](crate::fault)) is the kernel's to meet: the call ends there, with `EFAULT` if it is the first one.
//!
//! Every page that a call has written is marked dirty after it. After an error other than `EAGAIN` and `EINTR` all pages of the call are: a device
//! may have left bytes behind that the kernel does not count.
//!
//! System calls: `readv(2)`, `writev(2)`, `preadv(2)`, `pwritev(2)`. A seccomp filter made for 0.18.0 may not allow them: nothing else in
//! this crate makes them.

mod buffer;
mod descriptor;
mod pieces;
#[cfg(all(test, feature = "backend-mmap", feature = "backend-bitmap"))]
mod tests;

use std::os::fd::AsFd;

pub use buffer::IoBuffer;
pub use pieces::{io_vectors, IoVector, IoVectors};

use crate::guest_memory::{Error, GuestAddress, GuestMemory, Permissions, Result};
use descriptor::{Place, Transfer};
use pieces::Pieces;

/// Reads up to `count` bytes from `fd`, at its own position, into guest memory at `addr`, by one `readv(2)`. Returns how many; 0 at the end of a file.
///
/// # Errors
///
/// If no byte of the range can be written, or the call answers an error ([`Error::IOError`]).
pub fn read_from<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<usize> {
    once(memory, addr, count, Transfer::Read, fd, Place::Position)
}

/// Reads up to `count` bytes at `offset` (bytes) of `file` into guest memory at `addr`, by one `preadv(2)`. Returns how many; 0 at the end of the file.
///
/// # Errors
///
/// As [`read_from`].
pub fn read_from_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<usize> {
    once(
        memory,
        addr,
        count,
        Transfer::Read,
        file,
        Place::Offset(offset),
    )
}

/// Writes up to `count` bytes of guest memory at `addr` to `fd`, at its own position, by one `writev(2)`. Returns how many.
///
/// # Errors
///
/// If no byte of the range can be read, or the call answers an error ([`Error::IOError`]).
pub fn write_to<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<usize> {
    once(memory, addr, count, Transfer::Write, fd, Place::Position)
}

/// Writes up to `count` bytes of guest memory at `addr` to `file` at `offset` (bytes), by one `pwritev(2)`. Returns how many.
///
/// # Errors
///
/// As [`write_to`].
pub fn write_to_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<usize> {
    once(
        memory,
        addr,
        count,
        Transfer::Write,
        file,
        Place::Offset(offset),
    )
}

/// Reads `count` bytes from `fd` into guest memory at `addr`; as [`read_from`], until all are read.
///
/// # Errors
///
/// As [`read_from`]; `UnexpectedEof` if the bytes end before the first one; [`Error::PartialBuffer`] if some had been read.
pub fn read_exact_from<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<()> {
    whole(memory, addr, count, Transfer::Read, fd, Place::Position)
}

/// Reads `count` bytes at `offset` of `file` into guest memory at `addr`; as [`read_from_at`], until all are read.
///
/// # Errors
///
/// As [`read_exact_from`].
pub fn read_exact_from_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<()> {
    whole(
        memory,
        addr,
        count,
        Transfer::Read,
        file,
        Place::Offset(offset),
    )
}

/// Writes `count` bytes of guest memory at `addr` to `fd`; as [`write_to`], until all are written.
///
/// # Errors
///
/// As [`write_to`]; `WriteZero` if no byte is taken; [`Error::PartialBuffer`] if some had been.
pub fn write_all_to<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<()> {
    whole(memory, addr, count, Transfer::Write, fd, Place::Position)
}

/// Writes `count` bytes of guest memory at `addr` to `file` at `offset`; as [`write_to_at`], until all are written.
///
/// # Errors
///
/// As [`write_all_to`].
pub fn write_all_to_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<()> {
    whole(
        memory,
        addr,
        count,
        Transfer::Write,
        file,
        Place::Offset(offset),
    )
}

/// One call for a range.
fn once<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    transfer: Transfer,
    fd: &impl AsFd,
    place: Place,
) -> Result<usize> {
    // The iterator is kept until the bytes have been moved: it holds on to what the range was translated through.
    let mut slices = memory.get_slices(addr, count, transfer.access())?;
    let mut pieces = Pieces::new();
    match pieces.gather(&mut slices) {
        Err(error) if pieces.len() == 0 => Err(error),
        _ => pieces
            .transfer_once(transfer, fd.as_fd(), place)
            .map_err(Error::IOError),
    }
}

/// As many calls as it takes for a range.
fn whole<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    transfer: Transfer,
    fd: &impl AsFd,
    place: Place,
) -> Result<()> {
    // As in `once`.
    let mut slices = memory.get_slices(addr, count, transfer.access())?;
    let mut pieces = Pieces::new();
    let error = pieces.gather(&mut slices).err();
    let (completed, stopped_by) = pieces.transfer_all(transfer, fd.as_fd(), place);
    match stopped_by.map(Error::IOError).or(error) {
        None => Ok(()),
        Some(error) if completed == 0 => Err(error),
        Some(_) => Err(Error::PartialBuffer {
            expected: count,
            completed,
        }),
    }
}

impl Transfer {
    /// What the transfer does to guest memory.
    fn access(self) -> Permissions {
        match self {
            Transfer::Read => Permissions::Write,
            Transfer::Write => Permissions::Read,
        }
    }
}
