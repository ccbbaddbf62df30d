//! Scattered I/O: a range of guest memory in one `preadv(2)`, `pwritev(2)` or io_uring operation.
//!
//! A range of guest memory may span several regions. Behind an IOMMU, it may have as many segments
//! as it has mappings. [`ReadVolatile`](crate::ReadVolatile) makes one system call per segment. An
//! array of `struct iovec` (readv(2)) lists all segments, so one call moves them.
//!
//! ```text
//!   guest range      ├────────────── addr, count ──────────────┤
//!   segments         ├─ region 0 ─┤├─ region 1 ─┤├─ region 2 ──┤
//!                          │             │              │
//!   iovec[]           base, len     base, len      base, len     ──► one preadv(2)
//! ```
//!
//! | type or function | use |
//! |---|---|
//! | [`read_from`], [`write_to`] and their variants | a file, a socket or any other descriptor |
//! | [`io_vectors()`] | raw `iovec`s for another system call, while the memory is borrowed |
//! | [`IoBuffer`] | several ranges, such as a descriptor chain; I/O that completes later: io_uring, AIO, vhost |
//!
//! The vectors are never `IoSlice` or `IoSliceMut`. Those hold Rust references, and nothing else
//! may write the referenced bytes while they exist. A guest may write to its memory at any time.
//!
//! # Examples
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
//! The programs `examples/net_device.rs` and `examples/block_device.rs` use this module in a
//! device.
//!
//! # Counts and errors
//!
//! Interrupted calls (`EINTR`) are repeated. A call covers at most [`MAX_VECTORS`] segments and
//! 64 MiB. For a range of 0 bytes, no function makes a call.
//!
//! The functions without `exact` or `all` make one call, which may move fewer bytes than requested.
//! If a range ends in a hole, or in a region that does not permit the access, the call transfers
//! the bytes before that.
//!
//! The functions with `exact` or `all` repeat the call until all bytes are moved. If they cannot
//! finish, they return [`PartialBuffer`](crate::GuestMemoryError::PartialBuffer) with the number of
//! bytes moved, or the error itself if no byte was moved. The exact methods of [`IoBuffer`] and of
//! [`Bytes`](crate::Bytes) do the same.
//!
//! Behind an IOMMU, a translation fails as a whole if one of its bytes is not mapped. The function
//! then returns that error, and moves nothing. The functions with `exact` or `all` translate the
//! whole range. The others translate only as much as they need for one call: 4 MiB, then four times
//! as much until there are [`MAX_VECTORS`] segments. An unmapped byte after that part causes an
//! error in a later call.
//!
//! If a page cannot be accessed (see [`fault`](crate::fault)), the kernel ends the call there. It
//! returns `EFAULT` if that is the first page. A page of a Xen guest that cannot be mapped ends the
//! call in the same way, with the error of that mapping.
//!
//! # Dirty tracking
//!
//! A read at an offset marks all pages of its vectors dirty, whatever its result. The kernel or a
//! device may have written bytes that are not counted. A read at the current position marks them
//! too. A stream socket, for example, counts the messages that it copied completely, and may have
//! copied a part of the next one. The exceptions are a count of 0 and `EAGAIN`, which a stream
//! returns before the kernel writes. The module [`io`](crate::io) names two kinds of descriptors
//! for which that does not hold.
//!
//! [`IoBuffer::read_packet_from`] marks only the bytes of a packet. It is for descriptors of which
//! each call reads one packet, and counts all bytes that it writes.
//!
//! # Costs
//!
//! A transfer takes memory for [`MAX_VECTORS`] segments at most, and time in proportion to the
//! segments that it moves. The functions with `exact` or `all` translate the range once. Behind an
//! IOMMU, the others may translate its beginning several times, each time a longer part.
//!
//! # System calls
//!
//! `readv(2)`, `writev(2)`, `preadv(2)`, `pwritev(2)`. A seccomp filter for 0.18.0 may not allow
//! them; no other module of this crate makes them. Memory of a Xen guest that is not mapped in
//! advance also needs the calls of a mapping.

mod buffer;
mod inline_vec;
mod io_vector;
mod io_vectors;
mod segments;
mod system_call;
#[cfg(all(test, feature = "backend-mmap", feature = "backend-bitmap"))]
mod tests;

use std::os::fd::AsFd;

pub use buffer::IoBuffer;
pub use io_vectors::{io_vectors, IoVectors};
pub use system_call::MAX_VECTORS;

use crate::guest_memory::{bounded_slices, Error, GuestAddress, GuestMemory, Permissions, Result};
use segments::Segments;
use system_call::{FilePosition, Transfer, MAX_BYTES};

/// Reads up to `count` bytes from `fd` into guest memory at `addr`.
///
/// It makes one `readv(2)`, at the descriptor's own position. Returns the number of bytes read; 0
/// at the end of a file.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::io::Write;
/// use std::os::unix::net::UnixStream;
/// use vm_memory::{vectored, Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let (mut peer, socket) = UnixStream::pair()?;
/// peer.write_all(b"packet")?;
/// assert_eq!(vectored::read_from(&memory, GuestAddress(0x100), 1500, &socket)?, 6);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x105))?, b't');
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// - [`Error::IOError`] if the system call fails;
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for writing;
/// - the same error if a byte that an IOMMU must translate is
///   [not mapped](self#counts-and-errors).
#[doc(alias = "readv")]
pub fn read_from<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<usize> {
    let direction = Transfer::Read;
    transfer_once(memory, addr, count, direction, fd, FilePosition::Current)
}

/// Reads up to `count` bytes at `offset` of `file` into guest memory at `addr`.
///
/// It makes one `preadv(2)`. Returns the number of bytes read; 0 at the end of the file.
///
/// # Errors
///
/// - [`Error::IOError`] if the system call fails;
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for writing;
/// - the same error if a byte that an IOMMU must translate is
///   [not mapped](self#counts-and-errors).
#[doc(alias = "preadv")]
pub fn read_from_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<usize> {
    let (direction, position) = (Transfer::Read, FilePosition::Offset(offset));
    transfer_once(memory, addr, count, direction, file, position)
}

/// Writes up to `count` bytes of guest memory at `addr` to `fd`.
///
/// It makes one `writev(2)`, at the descriptor's own position. Returns the number of bytes written.
///
/// # Errors
///
/// - [`Error::IOError`] if the system call fails;
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for reading;
/// - the same error if a byte that an IOMMU must translate is
///   [not mapped](self#counts-and-errors).
#[doc(alias = "writev")]
pub fn write_to<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<usize> {
    let direction = Transfer::Write;
    transfer_once(memory, addr, count, direction, fd, FilePosition::Current)
}

/// Writes up to `count` bytes of guest memory at `addr` to `file` at `offset`.
///
/// It makes one `pwritev(2)`. Returns the number of bytes written.
///
/// # Errors
///
/// - [`Error::IOError`] if the system call fails;
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for reading;
/// - the same error if a byte that an IOMMU must translate is
///   [not mapped](self#counts-and-errors).
#[doc(alias = "pwritev")]
pub fn write_to_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<usize> {
    let (direction, position) = (Transfer::Write, FilePosition::Offset(offset));
    transfer_once(memory, addr, count, direction, file, position)
}

/// Reads exactly `count` bytes from `fd` into guest memory at `addr`.
///
/// It repeats `readv(2)` at the descriptor's own position until all bytes are read.
///
/// # Errors
///
/// If some bytes were read before the transfer ended early, returns [`Error::PartialBuffer`] with
/// their number. Otherwise returns:
///
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for writing;
/// - the same error if an IOMMU does not map a byte of the range;
/// - [`Error::IOError`] if the system call fails, or of the kind `UnexpectedEof` if it reads
///   nothing.
#[doc(alias = "readv")]
pub fn read_exact_from<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<()> {
    let direction = Transfer::Read;
    transfer_all(memory, addr, count, direction, fd, FilePosition::Current)
}

/// Reads exactly `count` bytes at `offset` of `file` into guest memory at `addr`.
///
/// It repeats `preadv(2)` until all bytes are read.
///
/// # Errors
///
/// If some bytes were read before the transfer ended early, returns [`Error::PartialBuffer`] with
/// their number. Otherwise returns:
///
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for writing;
/// - the same error if an IOMMU does not map a byte of the range;
/// - [`Error::IOError`] if the system call fails, or of the kind `UnexpectedEof` if it reads
///   nothing.
#[doc(alias = "preadv")]
pub fn read_exact_from_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<()> {
    let (direction, position) = (Transfer::Read, FilePosition::Offset(offset));
    transfer_all(memory, addr, count, direction, file, position)
}

/// Writes all `count` bytes of guest memory at `addr` to `fd`.
///
/// It repeats `writev(2)` at the descriptor's own position until all bytes are written.
///
/// # Errors
///
/// If some bytes were written before the transfer ended early, returns [`Error::PartialBuffer`]
/// with their number. Otherwise returns:
///
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for reading;
/// - the same error if an IOMMU does not map a byte of the range;
/// - [`Error::IOError`] if the system call fails, or of the kind `WriteZero` if it writes nothing.
#[doc(alias = "writev")]
pub fn write_all_to<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    fd: &impl AsFd,
) -> Result<()> {
    let direction = Transfer::Write;
    transfer_all(memory, addr, count, direction, fd, FilePosition::Current)
}

/// Writes all `count` bytes of guest memory at `addr` to `file` at `offset`.
///
/// It repeats `pwritev(2)` until all bytes are written.
///
/// # Errors
///
/// If some bytes were written before the transfer ended early, returns [`Error::PartialBuffer`]
/// with their number. Otherwise returns:
///
/// - the error of [`GuestMemory::get_slices`] if the first byte is not accessible for reading;
/// - the same error if an IOMMU does not map a byte of the range;
/// - [`Error::IOError`] if the system call fails, or of the kind `WriteZero` if it writes nothing.
#[doc(alias = "pwritev")]
pub fn write_all_to_at<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    file: &impl AsFd,
    offset: u64,
) -> Result<()> {
    let (direction, position) = (Transfer::Write, FilePosition::Offset(offset));
    transfer_all(memory, addr, count, direction, file, position)
}

/// The number of bytes of a range that are translated first: [`MAX_VECTORS`] pages of 4 KiB.
const FIRST_TRANSLATION: usize = MAX_VECTORS * 0x1000;

/// Transfers a range by one system call.
fn transfer_once<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    direction: Transfer,
    fd: &impl AsFd,
    position: FilePosition,
) -> Result<usize> {
    if count == 0 {
        return Ok(0);
    }
    let count = count.min(MAX_BYTES);
    // A translation takes time for the whole range, and one call may move a small part of it. The
    // caller's loop over the rest would take quadratic time.
    let mut translated = match memory.physical_memory() {
        Some(_) => count,
        None => count.min(FIRST_TRANSLATION),
    };
    loop {
        // The iterator keeps the translation of the range in use until the bytes have been moved.
        let mut slices = bounded_slices(memory, addr, translated, direction.access())?;
        let mut segments = Segments::new(direction.access());
        match segments.gather(&mut slices, MAX_VECTORS) {
            Err(error) if segments.len() == 0 => return Err(error),
            Ok(true) if translated < count && segments.count() < MAX_VECTORS => {
                // The loop drops this iterator before it creates the next one: an iterator may hold
                // a lock.
                translated = translated.saturating_mul(4).min(count);
            }
            _ => {
                return segments
                    .transfer_once(direction, fd.as_fd(), position)
                    .map_err(Error::IOError);
            }
        }
    }
}

/// Transfers a range by as many system calls as necessary.
fn transfer_all<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    direction: Transfer,
    fd: &impl AsFd,
    position: FilePosition,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    // The iterator keeps the translation of the range in use until the bytes have been moved.
    let mut slices = bounded_slices(memory, addr, count, direction.access())?;
    let mut completed = 0usize;
    let stopped_by = loop {
        let mut segments = Segments::new(direction.access());
        let inaccessible = segments.fill(&mut slices, MAX_VECTORS).err();
        let (moved, failed) =
            segments.transfer_all(direction, fd.as_fd(), position.after(completed));
        completed = completed.saturating_add(moved);
        match failed.map(Error::IOError).or(inaccessible) {
            None if segments.count() == MAX_VECTORS => {}
            stopped_by => break stopped_by,
        }
    };
    match stopped_by {
        Some(error) if completed == 0 => Err(error),
        None if completed == count => Ok(()),
        _ => Err(Error::PartialBuffer {
            expected: count,
            completed,
        }),
    }
}

impl Transfer {
    /// Returns the access to guest memory that the transfer needs.
    fn access(self) -> Permissions {
        match self {
            Transfer::Read => Permissions::Write,
            Transfer::Write => Permissions::Read,
        }
    }
}
