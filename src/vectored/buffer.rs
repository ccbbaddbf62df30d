//! [`IoBuffer`]: guest memory for I/O that completes later.

use core::fmt::{self, Debug};
use std::sync::Arc;

use super::segments::{too_many, Segments};
use super::MAX_VECTORS;
use crate::bitmap::BS;
use crate::guest_memory::{
    bounded_slices, hold_for, Error, GuestAddress, GuestMemory, Permissions, Result,
    TranslationHold,
};

/// Ranges of guest memory for an I/O operation that completes later, possibly on another thread.
///
/// An `IoBuffer` serves io_uring, AIO, vhost and other asynchronous I/O. It is a list of guest
/// ranges, such as the descriptors of one virtio request. Up to eight segments need no allocation.
///
/// # Lifetime
///
/// The buffer keeps the memory map, and with it the mappings, until it is dropped. It does not know
/// whether an operation still uses them. A caller that passes [`vectors`](Self::vectors) to the
/// kernel must keep the buffer until the operation is over.
///
/// Behind an IOMMU, a buffer with a range also keeps the translation in use. An invalidation of the
/// range does not complete before the buffer is dropped. [`push`](Self::push) fails if the IOMMU
/// does not support this ([`GuestMemory::hold_translation`]);
/// [`SharedIotlb`](crate::iommu::SharedIotlb) does. It keeps all its mappings in use together: an
/// invalidation of other addresses also waits for the buffer.
///
/// An IOMMU may ask its front end for a missing mapping. A front end may wait for an invalidation
/// before it sends the mapping. The first range of a buffer is therefore translated before the
/// buffer keeps anything. Translate the further ranges of a request before the first `push`, for
/// example with [`GuestMemory::check_range`]. Otherwise a `push` that misses waits for its own
/// buffer, until the IOMMU or the front end gives up.
///
/// # Segments
///
/// A guest chooses the number of segments, in particular behind an IOMMU. [`push`](Self::push)
/// fails if there would be more than [`MAX_VECTORS`], as many as one system call accepts. A device
/// may [set another limit](Self::set_segment_limit). A segment takes about 80 bytes.
///
/// # Dirty tracking
///
/// The pages of a buffer for writing are marked when it is completed or dropped, if its vectors
/// were used. So an early return or a panic loses no page. All pages are marked: after a short
/// count, a device may have written more bytes than it counts. They are not marked earlier: a
/// harvest could then copy a page that is only half written, and the rest would not be marked.
///
/// [`cancel`](Self::cancel) drops a buffer without marks. A buffer that is leaked
/// ([`mem::forget`](core::mem::forget)) is never marked. A device that leaks one, because the
/// kernel may still write to it, must treat all pages of the memory as dirty.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::vectored::IoBuffer;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = Arc::new(memory);
///
/// // Two descriptors of one request: the data, followed by a status byte.
/// let mut request = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
/// request.push(GuestAddress(0x1000), 0x200)?;
/// request.push(GuestAddress(0x3000), 1)?;
/// let status = request.split_off(0x200).expect("the request has 0x201 bytes");
///
/// // A worker thread stands in for the kernel, which would use `request.vectors()`.
/// let worker = std::thread::spawn(move || {
///     request.copy_from(0, &[0x5a; 0x200])?;
///     status.copy_from(0, &[0])?;
///     request.complete(0x200);
///     status.complete(1);
///     Ok::<(), vm_memory::GuestMemoryError>(())
/// });
/// worker.join().unwrap()?;
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x11ff))?, 0x5a);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "iovec")]
#[doc(alias = "io_uring")]
#[doc(alias = "DMA")]
#[doc(alias = "zero-copy")]
pub struct IoBuffer<M: GuestMemory + 'static> {
    // `segments` borrows from `memory`, and is declared before it: fields are dropped in the order
    // of their declaration. The lifetime `'static` never leaves this type. `memory` is never
    // replaced, and `split_off` moves segments only to a buffer with the same `memory`.
    //
    // A call that gets a buffer by value may drop `memory`. `HeldSlice` permits that.
    segments: Segments<'static, BS<'static, M::Bitmap>>,
    memory: Arc<M>,
    /// Keeps the translation of all ranges in use. `Some` if there are segments, and only then. It
    /// was taken before the first range was translated, so it also covers all later ones.
    hold: Option<TranslationHold>,
    segment_limit: usize,
}

// SAFETY: 1. `segments` holds host addresses of mappings that `memory` or a `Hold` keeps, and
// bitmap slices. The addresses are not tied to a thread: any thread may access the memory of a
// `VolatileSlice` at any time. The bitmap slices are `Send` by the bound, and a `Hold` is `Send`
// and `Sync` by itself. 2. `memory` is an `Arc<M>`, which is `Send` since `M: Send + Sync`. 3.
// `hold` is a `TranslationHold`, which is `Send` by itself.
// 4. `segment_limit` is a plain value.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Send for IoBuffer<M> where
    BS<'static, M::Bitmap>: Send
{
}
// SAFETY: `&IoBuffer` allows five operations. 1. Reading the vectors, which are numbers. 2. Noting
// that they were lent, in an atomic. 3. Accessing guest memory through `VolatileSlice`s, which any
// number of threads may do at once. 4. Cloning the `Arc<M>`, which is `Sync` since
// `M: Send + Sync`. 5. Marking through shared bitmap slices, which are `Sync` by the bound. It does
// not reach `hold`, and `TranslationHold` is `Sync` by itself.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Sync for IoBuffer<M> where
    BS<'static, M::Bitmap>: Sync
{
}

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Creates an empty buffer in `memory` for accesses of the kind `access`.
    ///
    /// Use [`Permissions::Write`] if the device writes to the buffer, as for a disk read, and
    /// [`Permissions::Read`] if it reads from it.
    pub fn new(memory: Arc<M>, access: Permissions) -> Self {
        IoBuffer {
            segments: Segments::new(access),
            memory,
            hold: None,
            segment_limit: MAX_VECTORS,
        }
    }

    /// Limits the number of segments to `limit`. The default is [`MAX_VECTORS`].
    ///
    /// Segments that the buffer has already stay. Buffers that are split off have the same limit.
    /// With more than [`MAX_VECTORS`] segments, pass that number to one operation, and continue
    /// with [`split_off`](Self::split_off).
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
    /// let mut request = IoBuffer::new(Arc::new(memory), Permissions::Read);
    /// request.set_segment_limit(2);
    /// request.push(GuestAddress(0x1000), 16)?;
    /// request.push(GuestAddress(0x2000), 0x200)?;
    /// assert!(request.push(GuestAddress(0x3000), 1).is_err());
    /// assert_eq!(request.len(), 0x210);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_segment_limit(&mut self, limit: usize) {
        self.segment_limit = limit;
    }

    /// Appends the `count` bytes at `addr`. If it fails, the buffer is unchanged.
    ///
    /// # Errors
    ///
    /// - the error of [`GuestMemory::get_slices`] if any byte of the range is not accessible;
    /// - [`Error::HostAddressNotAvailable`] if the buffer was created for [`Permissions::No`];
    /// - [`Error::GuestAddressOverflow`] if the buffer would have more than `usize::MAX` bytes;
    /// - [`Error::IOError`] of the kind `InvalidInput` if the buffer would have more segments than
    ///   its [limit](Self::set_segment_limit), or `OutOfMemory` if an allocation fails;
    /// - [`Error::IOError`] of the kind `Unsupported` behind an IOMMU that cannot keep translations
    ///   in use;
    /// - [`Error::IOError`] with the error of the system if memory of a Xen guest cannot be mapped,
    ///   such as `EINVAL` for a page that is not granted.
    pub fn push(&mut self, addr: GuestAddress, count: usize) -> Result<()> {
        if self.segments.access() == Permissions::No {
            return Err(Error::HostAddressNotAvailable);
        }
        // SAFETY: `self.memory` keeps the object at this address alive and in place until it is
        // dropped. `self.segments` is dropped before it (see the fields of `IoBuffer`).
        // Nothing else keeps the reference beyond this call: `get_slices` and `hold_translation`
        // are generic over the lifetime and cannot know that it is `'static`. The iterator is
        // dropped before this call returns, and `self` is borrowed until then.
        let memory: &'static M = unsafe { &*Arc::as_ptr(&self.memory) };
        let access = self.segments.access();
        let hold = match self.hold {
            Some(_) => None,
            None => Some(hold_for(memory, addr, count, access)?),
        };
        let mut slices = bounded_slices(memory, addr, count, access)?;
        let mut addition = self.segments.add();
        if !addition.gather(&mut slices, self.segment_limit)? {
            return Err(too_many(addr, count, self.segment_limit));
        }
        // An implementation of `get_slices` may return fewer bytes than it should.
        if addition.len() != count {
            return Err(Error::InvalidBackendAddress);
        }
        addition.keep();
        if self.segments.count() != 0 {
            self.hold = self.hold.take().or(hold);
        }
        Ok(())
    }

    /// Returns the vectors, in the order in which their ranges were added.
    ///
    /// Their memory stays mapped while `self` lives, wherever `self` is moved to. No Rust reference
    /// to it may be made.
    ///
    /// After this call, a buffer for writing counts as written: see
    /// [Dirty tracking](IoBuffer#dirty-tracking).
    ///
    /// The array itself may be inside `self`, so it moves with it. io_uring reads the array only
    /// until the submission returns (`IORING_FEAT_SUBMIT_STABLE`, Linux 5.5, io_uring_setup(2)). If
    /// the array is needed for longer, use [`vectors_on_heap`](Self::vectors_on_heap).
    pub fn vectors(&self) -> &[libc::iovec] {
        self.segments.lend()
    }

    /// Returns the vectors in an array whose address stays the same when `self` is moved.
    ///
    /// The address changes when ranges are added or split off. After this call, a buffer for
    /// writing counts as written: see [Dirty tracking](IoBuffer#dirty-tracking).
    ///
    /// # Examples
    ///
    /// With the crate `io-uring`, whose operations take a pointer to `iovec`s:
    ///
    /// ```no_run
    /// # #[cfg(all(target_os = "linux", feature = "backend-mmap"))] {
    /// use std::os::fd::AsRawFd;
    /// use std::sync::Arc;
    ///
    /// use io_uring::{opcode, types, IoUring};
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    /// let disk = std::fs::File::open("disk.img")?;
    /// let mut ring = IoUring::new(8)?;
    ///
    /// let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Write);
    /// buffer.push(GuestAddress(0x1000), 0x2000)?;
    /// let vectors = buffer.vectors_on_heap();
    /// let count = u32::try_from(vectors.len())?;
    /// let fd = types::Fd(disk.as_raw_fd());
    /// let read = opcode::Readv::new(fd, vectors.as_ptr(), count).build();
    /// // SAFETY: `buffer` keeps the vectors and their memory in place until the operation is over.
    /// unsafe { ring.submission().push(&read)? };
    /// ring.submit_and_wait(1)?;
    ///
    /// let result = ring.completion().next().ok_or("no completion")?.result();
    /// // A negative result is an error, after which any byte may have been written.
    /// let written = usize::try_from(result).unwrap_or(buffer.len());
    /// buffer.complete(written);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn vectors_on_heap(&mut self) -> &[libc::iovec] {
        self.segments.lend_on_heap()
    }

    /// Returns the number of bytes in all ranges.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Returns whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the memory map that the buffer keeps.
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    /// Keeps the first `at` bytes, and returns the others as a new buffer.
    ///
    /// Returns `None`, and changes nothing, if the buffer has fewer than `at` bytes.
    pub fn split_off(&mut self, at: usize) -> Option<Self> {
        let segments = self.segments.split_off(at)?;
        let hold = match segments.count() {
            0 => None,
            _ => self.hold.clone(),
        };
        if self.segments.count() == 0 {
            self.hold = None;
        }
        Some(IoBuffer {
            segments,
            memory: Arc::clone(&self.memory),
            hold,
            segment_limit: self.segment_limit,
        })
    }

    /// Shortens the buffer to its first `len` bytes. Does nothing if it has fewer.
    ///
    /// The other bytes are marked as if a buffer of them were dropped.
    pub fn truncate(&mut self, len: usize) {
        drop(self.split_off(len));
    }

    /// Copies bytes at `offset` to `buf`, as many as both have, and returns their number.
    ///
    /// # Errors
    ///
    /// Returns [`Error::HostAddressNotAvailable`] if the buffer was not created for
    /// [`Permissions::Read`] or `ReadWrite`: the memory may permit only writes. Returns an error if
    /// the first byte cannot be accessed, for example because its file was truncated. Bytes after
    /// one that cannot be accessed are not copied; see [`fault`](crate::fault).
    pub fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        self.require(Permissions::Read)?;
        self.segments.copy_to(offset, buf)
    }

    /// Copies `buf` to the bytes at `offset`, as many as both have, and returns their number.
    ///
    /// The pages written are marked dirty.
    ///
    /// # Errors
    ///
    /// Returns [`Error::HostAddressNotAvailable`] if the buffer was not created for
    /// [`Permissions::Write`] or `ReadWrite`. Returns an error if the first byte cannot be
    /// accessed, for example because its file was truncated. Bytes after one that cannot be
    /// accessed are not copied; see [`fault`](crate::fault).
    pub fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        self.require(Permissions::Write)?;
        self.segments.copy_from(offset, buf)
    }

    /// Returns an error if the ranges were not checked for `access`.
    fn require(&self, access: Permissions) -> Result<()> {
        if self.segments.access().allow(access) {
            Ok(())
        } else {
            Err(Error::HostAddressNotAvailable)
        }
    }

    /// Ends the operation, for which the device reports `written` bytes.
    ///
    /// Marks all pages of a buffer for writing, even after a short count or an error. Returns
    /// `written`, or the length of the buffer if that is less. Do not report more to the guest.
    ///
    /// If the device cannot have written past its count, split the rest off first, and
    /// [`cancel`](Self::cancel) it.
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
    /// // readv(2) of a packet of 60 bytes into `packet.vectors()`.
    /// # let _ = packet.vectors();
    /// if let Some(rest) = packet.split_off(60) {
    ///     rest.cancel();
    /// }
    /// assert_eq!(packet.complete(60), 60);
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
    /// That is the case if the operation was not submitted, or failed before its first byte, as
    /// with `EAGAIN`. If in doubt, drop the buffer.
    pub fn cancel(mut self) {
        self.segments.end_loan();
    }
}

impl<M: GuestMemory + 'static> Debug for IoBuffer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuffer")
            .field("vectors", &self.segments.vectors())
            .field("access", &self.segments.access())
            .finish_non_exhaustive()
    }
}
