//! Accesses to the bytes of an [`IoBuffer`].

use std::os::fd::AsFd;

use super::{IoBuffer, BUFFER};
use crate::guest_memory::{not_created_for, Error, GuestMemory, Permissions, Result};
use crate::vectored::system_call::{FilePosition, Transfer};

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Copies bytes at `offset` to `buf`, as many as both have, and returns their number.
    ///
    /// A short count is not an error. If fewer bytes are one, as for the header of a request, use
    /// [`read_obj`](Self::read_obj) or [`read_slice`](Self::read_slice).
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    /// [`Permissions::Read`] or `ReadWrite`: the memory may permit only writes. Returns an error if
    /// the first byte cannot be accessed, for example because its file was truncated. Bytes after
    /// one that cannot be accessed are not counted. Some of them may have been copied; see
    /// [`fault`](crate::fault).
    pub fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        self.require(Permissions::Read)?;
        self.segments.copy_to(offset, buf)
    }

    /// Copies `buf` to the bytes at `offset`, as many as both have, and returns their number.
    ///
    /// The pages written are marked dirty. A short count is not an error. If fewer bytes are one,
    /// use [`write_obj`](Self::write_obj) or [`write_slice`](Self::write_slice).
    ///
    /// # Errors
    ///
    /// Returns [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    /// [`Permissions::Write`] or `ReadWrite`. Returns an error if the first byte cannot be
    /// accessed, for example because its file was truncated. Bytes after one that cannot be
    /// accessed are not counted. Some of them may have been copied, and are marked; see
    /// [`fault`](crate::fault).
    pub fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        self.require(Permissions::Write)?;
        self.segments.copy_from(offset, buf)
    }

    /// Returns an error if the ranges were not checked for `access`.
    pub(super) fn require(&self, access: Permissions) -> Result<()> {
        if self.segments.access().allow(access) {
            Ok(())
        } else {
            Err(not_created_for(BUFFER, self.segments.access(), access))
        }
    }

    /// Reads from `fd` into the buffer, by one `readv(2)` at the descriptor's own position.
    ///
    /// Use it for a stream, such as a stream socket or a pipe. Use
    /// [`read_packet_from`](Self::read_packet_from) for a TAP device, and
    /// [`read_from_at`](Self::read_from_at) for a file. The call covers the first
    /// [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB, and is repeated after
    /// `EINTR`.
    ///
    /// Returns the number of bytes read; 0 at the end of the stream. An empty buffer makes no call
    /// and also returns 0: check [`is_empty`](Self::is_empty) first. To fill the whole buffer, use
    /// [`read_exact_from`](Self::read_exact_from).
    ///
    /// Marks all pages of the call dirty, even after a short count or an error. The kernel may have
    /// written bytes that it does not count. The bytes after those that were read are unspecified:
    /// a device must not report them. At the end of the stream, and after `EAGAIN`, it marks
    /// nothing.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::io::Write;
    /// use std::os::unix::net::UnixStream;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// let (mut peer, socket) = UnixStream::pair()?;
    /// peer.write_all(b"input of a console")?;
    ///
    /// let ranges = [(GuestAddress(0x1000), 6), (GuestAddress(0x3000), 0x40)];
    /// let mut input = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
    /// let received = input.read_from(&socket)?;
    /// assert_eq!(input.complete_front(received), 18);
    /// assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x3000))?, *b"of a");
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Write`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call: `EFAULT` if the first page that it
    ///   needs cannot be accessed.
    #[doc(alias = "readv")]
    pub fn read_from(&self, fd: &impl AsFd) -> Result<usize> {
        self.transfer(Transfer::Read, fd, FilePosition::Current)
    }

    /// Reads one packet from `fd` into the buffer, by one `readv(2)`, and marks only its pages.
    ///
    /// A network device offers 64 KiB for each packet, and most packets are short. Use this method
    /// if each `readv(2)` reads one packet, and counts all bytes that it writes:
    ///
    /// - a TAP device;
    /// - a packet socket (packet(7));
    /// - a Unix socket of the type `SOCK_DGRAM` or `SOCK_SEQPACKET`;
    /// - a UDP socket with a filter, as [`io`](crate::io#dirty-tracking) describes.
    ///
    /// Use [`read_from`](Self::read_from) for every other descriptor: pages that the kernel writes
    /// might otherwise never be marked. It may copy a part of a message to a stream socket or a
    /// pipe without counting it.
    ///
    /// The call covers the first [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. Returns the number of bytes read. An empty buffer makes no
    /// call and returns 0.
    ///
    /// Marks the pages of the bytes read dirty, and no others. The bytes after them are
    /// unspecified: a device must not report them. If the call fails, marks all pages of the call,
    /// except after `EAGAIN`.
    ///
    /// # Examples
    ///
    /// A packet fills a small part of its buffer:
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
    /// use std::os::unix::net::UnixDatagram;
    /// use std::sync::Arc;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion, Permissions};
    /// use vm_memory::GuestMemoryBackend;
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)])?;
    /// let memory = Arc::new(memory);
    /// let (wire, tap) = UnixDatagram::pair()?;
    /// wire.send(&[7; 60])?;
    ///
    /// let mut packet = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    /// packet.push(GuestAddress(0), 0x1_0000)?;
    /// assert_eq!(packet.read_packet_from(&tap)?, 60);
    /// let bitmap = memory.find_region(GuestAddress(0)).ok_or("no region")?.bitmap();
    /// assert!(bitmap.dirty_at(0) && !bitmap.dirty_at(0x1000));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Write`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call. If a page that the packet needs
    ///   cannot be accessed, a socket returns `EFAULT`. A TAP device returns no error, and counts
    ///   the bytes that are lost.
    #[doc(alias = "readv")]
    #[doc(alias = "TAP")]
    pub fn read_packet_from(&self, fd: &impl AsFd) -> Result<usize> {
        self.require(Permissions::Write)?;
        if self.is_empty() {
            return Ok(0);
        }
        let read = self.segments.read_packet(fd.as_fd());
        read.map_err(Error::IOError)
    }

    /// Reads at `offset` of `file` into the buffer, by one `preadv(2)`.
    ///
    /// The call covers the first [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. Returns the number of bytes read; 0 at the end of the file.
    /// An empty buffer makes no call and also returns 0.
    ///
    /// Marks all pages of the call dirty, whatever the result. With `O_DIRECT`, the storage writes
    /// whole blocks, and the parts of a call in any order.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::fs::File;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// memory.write_obj(u64::MAX, GuestAddress(0x1000))?;
    /// let mut data = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    /// data.push(GuestAddress(0x1000), 0x200)?;
    /// data.push(GuestAddress(0x3000), 0x200)?;
    /// assert_eq!(data.read_from_at(&File::open("/dev/zero")?, 0x10_0000)?, 0x400);
    /// assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1000))?, 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Write`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call: `EFAULT` if the first page cannot be
    ///   accessed, `EINVAL` if `offset` is larger than any file.
    #[doc(alias = "preadv")]
    pub fn read_from_at(&self, file: &impl AsFd, offset: u64) -> Result<usize> {
        self.transfer(Transfer::Read, file, FilePosition::Offset(offset))
    }

    /// Writes the bytes of the buffer to `fd`, by one `writev(2)` at the descriptor's own position.
    ///
    /// The call covers the first [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. Returns the number of bytes written. An empty buffer makes no
    /// call and returns 0.
    ///
    /// To continue after a short count, remove the written bytes with
    /// [`cancel_front`](Self::cancel_front), which marks nothing, and call this again. To write the
    /// whole buffer, use [`write_all_to`](Self::write_all_to).
    ///
    /// # Errors
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Read`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call: `EFAULT` if the first page cannot be
    ///   accessed.
    #[doc(alias = "writev")]
    pub fn write_to(&self, fd: &impl AsFd) -> Result<usize> {
        self.transfer(Transfer::Write, fd, FilePosition::Current)
    }

    /// Writes the bytes of the buffer to `file` at `offset`, by one `pwritev(2)`.
    ///
    /// The call covers the first [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. Returns the number of bytes written. An empty buffer makes no
    /// call and returns 0.
    ///
    /// To continue after a short count, remove the written bytes with
    /// [`cancel_front`](Self::cancel_front), which marks nothing, and call this again. To write the
    /// whole buffer, use [`write_all_to_at`](Self::write_all_to_at).
    ///
    /// # Errors
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Read`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call: `EFAULT` if the first page cannot be
    ///   accessed, `EINVAL` if `offset` is larger than any file.
    #[doc(alias = "pwritev")]
    pub fn write_to_at(&self, file: &impl AsFd, offset: u64) -> Result<usize> {
        self.transfer(Transfer::Write, file, FilePosition::Offset(offset))
    }

    /// Fills the buffer from `fd`, by as many `readv(2)` as necessary.
    ///
    /// Each call is at the descriptor's own position, covers at most
    /// [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB, and is repeated after
    /// `EINTR`. An empty buffer makes no call.
    ///
    /// Marks the pages of the bytes read dirty, and keeps the bytes in the buffer. After an error,
    /// marks all pages that a call may have written, counted or not. A device reports
    /// [`len`](Self::len) bytes, and those that it removed before. It then drops or
    /// [clears](Self::clear) the buffer.
    ///
    /// # Examples
    ///
    /// The socket has only a part of the bytes. A device removes this part, and waits for more:
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::io::Write;
    /// use std::os::unix::net::UnixStream;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// let (mut peer, socket) = UnixStream::pair()?;
    /// socket.set_nonblocking(true)?;
    ///
    /// let ranges = [(GuestAddress(0x1000), 4), (GuestAddress(0x3000), 4)];
    /// let mut request = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
    /// peer.write_all(&[1; 6])?;
    /// match request.read_exact_from(&socket) {
    ///     Err(GuestMemoryError::PartialBuffer { completed, .. }) => {
    ///         assert_eq!(request.complete_front(completed), 6);
    ///     }
    ///     other => return Err(format!("{other:?}").into()),
    /// }
    /// // The error itself: the socket has no more bytes.
    /// assert!(request.read_exact_from(&socket).is_err());
    /// peer.write_all(&[2; 2])?;
    /// request.read_exact_from(&socket)?;
    /// assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x3000))?, [1, 1, 2, 2]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If some bytes were read before the transfer ended early, returns [`Error::PartialBuffer`]
    /// with their number. [`complete_front`](Self::complete_front) removes them. The next call then
    /// returns the error itself, if it persists. Otherwise returns:
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Write`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call, or of the kind `UnexpectedEof` at
    ///   the end of the stream.
    #[doc(alias = "readv")]
    pub fn read_exact_from(&self, fd: &impl AsFd) -> Result<()> {
        self.transfer_all(Transfer::Read, fd, FilePosition::Current)
    }

    /// Fills the buffer from `file` at `offset`, by as many `preadv(2)` as necessary.
    ///
    /// Each call covers at most [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. An empty buffer makes no call.
    ///
    /// Marks the pages of the bytes read dirty, and keeps the bytes in the buffer. After an error,
    /// marks all pages that a call may have written, counted or not. A device reports
    /// [`len`](Self::len) bytes, and those that it removed before. It then drops or
    /// [clears](Self::clear) the buffer.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::fs::File;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// memory.write_obj(u64::MAX, GuestAddress(0x3000))?;
    /// let ranges = [(GuestAddress(0x1000), 0x200), (GuestAddress(0x3000), 0x200)];
    /// let data = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
    /// data.read_exact_from_at(&File::open("/dev/zero")?, 0x10_0000)?;
    /// assert_eq!(memory.read_obj::<u64>(GuestAddress(0x3000))?, 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If some bytes were read before the transfer ended early, returns [`Error::PartialBuffer`]
    /// with their number. Otherwise returns:
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Write`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call, or of the kind `UnexpectedEof` at
    ///   the end of the file.
    #[doc(alias = "preadv")]
    pub fn read_exact_from_at(&self, file: &impl AsFd, offset: u64) -> Result<()> {
        self.transfer_all(Transfer::Read, file, FilePosition::Offset(offset))
    }

    /// Writes the whole buffer to `fd`, by as many `writev(2)` as necessary.
    ///
    /// Each call is at the descriptor's own position, covers at most
    /// [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB, and is repeated after
    /// `EINTR`. An empty buffer makes no call. The bytes stay in the buffer.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::io::Read;
    /// use std::os::unix::net::UnixStream;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// memory.write_slice(b"packet", GuestAddress(0x1000))?;
    /// let ranges = [(GuestAddress(0x1003), 3), (GuestAddress(0x1000), 3)];
    /// let packet = IoBuffer::from_ranges(&memory, ranges, Permissions::Read)?;
    /// let (socket, mut peer) = UnixStream::pair()?;
    /// packet.write_all_to(&socket)?;
    /// let mut received = [0; 6];
    /// peer.read_exact(&mut received)?;
    /// assert_eq!(&received, b"ketpac");
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If some bytes were written before the transfer ended early, returns
    /// [`Error::PartialBuffer`] with their number. [`cancel_front`](Self::cancel_front) removes
    /// them. The next call then returns the error itself, if it persists, such as `EAGAIN`.
    /// Otherwise returns:
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Read`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call, or of the kind `WriteZero` if it
    ///   writes nothing.
    #[doc(alias = "writev")]
    pub fn write_all_to(&self, fd: &impl AsFd) -> Result<()> {
        self.transfer_all(Transfer::Write, fd, FilePosition::Current)
    }

    /// Writes the whole buffer to `file` at `offset`, by as many `pwritev(2)` as necessary.
    ///
    /// Each call covers at most [`MAX_VECTORS`](crate::vectored::MAX_VECTORS) segments and 64 MiB,
    /// and is repeated after `EINTR`. An empty buffer makes no call. The bytes stay in the buffer.
    ///
    /// # Examples
    ///
    /// See [`write_all_to`](Self::write_all_to).
    ///
    /// # Errors
    ///
    /// If some bytes were written before the transfer ended early, returns
    /// [`Error::PartialBuffer`] with their number. Otherwise returns:
    ///
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was not created for
    ///   [`Permissions::Read`] or `ReadWrite`;
    /// - [`Error::IOError`] with the error of the system call, or of the kind `WriteZero` if it
    ///   writes nothing.
    #[doc(alias = "pwritev")]
    pub fn write_all_to_at(&self, file: &impl AsFd, offset: u64) -> Result<()> {
        self.transfer_all(Transfer::Write, file, FilePosition::Offset(offset))
    }

    /// Transfers all bytes, by as many system calls as necessary.
    fn transfer_all(
        &self,
        direction: Transfer,
        fd: &impl AsFd,
        position: FilePosition,
    ) -> Result<()> {
        self.require(direction.access())?;
        match self.segments.transfer_all(direction, fd.as_fd(), position) {
            (_, None) => Ok(()),
            (0, Some(error)) => Err(Error::IOError(error)),
            (completed, Some(_)) => Err(Error::PartialBuffer {
                expected: self.len(),
                completed,
            }),
        }
    }

    /// Transfers by one system call, unless the buffer is empty.
    fn transfer(
        &self,
        direction: Transfer,
        fd: &impl AsFd,
        position: FilePosition,
    ) -> Result<usize> {
        self.require(direction.access())?;
        if self.is_empty() {
            return Ok(0);
        }
        self.segments
            .transfer_once(direction, fd.as_fd(), position)
            .map_err(Error::IOError)
    }
}
