//! The end of an operation on an [`IoBuffer`], or on a part of it.

use super::IoBuffer;
use crate::guest_memory::{GuestMemory, IntoMap};

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Ends the operation, for which the device reports `written` bytes.
    ///
    /// Marks all pages of a buffer for writing, even after a short count or an error. Returns
    /// `written`, or the length of the buffer if that is less. Do not report more to the guest.
    ///
    /// If the device cannot have written past its count, use
    /// [`complete_front`](Self::complete_front), and [`cancel`](Self::cancel) the rest. A packet of
    /// a TAP device is an example: [`read_packet_from`](Self::read_packet_from) lists others.
    ///
    /// # Examples
    ///
    /// A packet that fills a small part of its buffer marks one page:
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
    /// use std::sync::Arc;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
    /// use vm_memory::Permissions;
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)])?;
    /// let memory = Arc::new(memory);
    /// let mut packet = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    /// packet.push(GuestAddress(0), 0x1_0000)?;
    /// // io_uring reads a packet of 60 bytes from a TAP device into `packet.vectors()`.
    /// # let _ = packet.vectors();
    /// assert_eq!(packet.complete_front(60), 60);
    /// packet.cancel();
    /// let bitmap = memory.find_region(GuestAddress(0)).ok_or("no region")?.bitmap();
    /// assert!(bitmap.dirty_at(0) && !bitmap.dirty_at(0x1000));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn complete(mut self, written: usize) -> usize {
        if self.segments.access().has_write() {
            self.segments.mark_all();
        }
        self.segments.end_loan();
        written.min(self.len())
    }

    /// Drops the buffer without marking it, because no device wrote to it.
    ///
    /// Use it if the operation was not submitted, or if a stream returned 0 or `EAGAIN`. A read of
    /// a file may have written bytes before such a result. If in doubt, drop the buffer.
    pub fn cancel(mut self) {
        self.segments.end_loan();
    }

    /// Ends the operation for the first `written` bytes: marks their pages, and removes them.
    ///
    /// Returns `written`, or the length of the buffer if that is less. The other bytes stay in the
    /// buffer. If the vectors were used, the other bytes are marked when they are completed or
    /// dropped. [`cancel_front`](Self::cancel_front) removes bytes that no device wrote.
    ///
    /// It allocates nothing. After [`read_from`](Self::read_from) or
    /// [`read_packet_from`](Self::read_packet_from), the pages are already marked, and
    /// `complete_front` only removes the bytes. A buffer that was not created for writes is
    /// never marked: use it, or [`cancel_front`](Self::cancel_front), to continue after a short
    /// [`write_to`](Self::write_to).
    ///
    /// # Examples
    ///
    /// A network device keeps the buffers of several chains, and completes the front ones:
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::os::unix::net::UnixDatagram;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// let memory = Arc::new(memory);
    /// let mut chains = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
    /// for chain in 0..4 {
    ///     chains.push(GuestAddress(0x1000 * chain), 0x600)?;
    /// }
    ///
    /// let (wire, tap) = UnixDatagram::pair()?;
    /// wire.send(&[1; 0x700])?;
    /// wire.send(&[2; 0x100])?;
    /// // The first packet takes two chains, and leaves the end of the second one unused.
    /// let received = chains.read_packet_from(&tap)?;
    /// assert_eq!(chains.complete_front(received), 0x700);
    /// chains.cancel_front(2 * 0x600 - received);
    /// // The next packet is in the third chain.
    /// chains.read_packet_from(&tap)?;
    /// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2000))?, 2);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn complete_front(&mut self, written: usize) -> usize {
        if self.segments.access().has_write() {
            self.segments.mark_dirty(0, written);
        }
        self.cancel_front(written)
    }

    /// Removes the first `count` bytes without marking them, because no device wrote to them.
    ///
    /// Returns `count`, or the length of the buffer if that is less. If in doubt, use
    /// [`complete_front`](Self::complete_front), which marks them.
    ///
    /// It also removes the bytes that a short [`write_to`](Self::write_to) has written. In a buffer
    /// for [`Permissions::Read`](crate::Permissions::Read), nothing is to be marked.
    pub fn cancel_front(&mut self, count: usize) -> usize {
        let removed = self.segments.remove_front(count);
        self.release_if_empty();
        removed
    }

    /// Shortens the buffer to its first `len` bytes. Does nothing if it has fewer.
    ///
    /// The removed bytes are marked as if a buffer of them were dropped.
    pub fn truncate(&mut self, len: usize) {
        drop(self.split_off(len));
    }

    /// Removes all ranges, and keeps the memory map and the space for the segments.
    ///
    /// The bytes are marked as if the buffer were dropped. A device can use one buffer for all its
    /// requests. It then allocates only for a request with more segments than any before.
    ///
    /// The buffer still keeps the memory map. While a device waits with an empty buffer, removed
    /// regions stay mapped, and `RetiredMap::wait` returns an error. Drop the buffer before a long
    /// wait, or [move it to the current map](Self::set_memory).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Read);
    /// let null = std::fs::File::options().write(true).open("/dev/null")?;
    /// for request in [0x1000, 0x2000] {
    ///     buffer.clear();
    ///     buffer.push(GuestAddress(request), 0x200)?;
    ///     assert_eq!(buffer.write_to(&null)?, 0x200);
    /// }
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clear(&mut self) {
        self.segments.clear();
        self.release_if_empty();
    }

    /// [Clears](Self::clear) the buffer, and replaces its memory map.
    ///
    /// The buffer keeps the space for the segments, the permissions and the limit of segments.
    pub fn set_memory(&mut self, memory: impl IntoMap<M = M>) {
        self.clear();
        // No segment borrows from the previous map.
        self.memory = memory.into_map();
    }

    /// Ends the hold on the translation and the loan of the vectors, if there is no range.
    pub(super) fn release_if_empty(&mut self) {
        if self.segments.count() == 0 {
            self.segments.end_loan();
            self.hold = None;
        }
    }
}
