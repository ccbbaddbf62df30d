//! [`IoBuffer`]: guest memory for I/O that completes later.

mod completion;
mod exact;
mod transfer;

use core::fmt::{self, Debug};
use std::sync::Arc;

use super::segments::{too_many, Segments};
use super::MAX_VECTORS;
use crate::bitmap::BS;
use crate::guest_memory::{
    bounded_slices, hold_for, not_created_for, Error, GuestAddress, GuestMemory, IntoMap,
    Permissions, Result, TranslationHold,
};

/// The name of an [`IoBuffer`] in error messages.
const BUFFER: &str = "buffer";

/// Ranges of guest memory for I/O, such as the descriptors of one virtio request.
///
/// [`read_exact_from`](Self::read_exact_from), [`write_all_to`](Self::write_all_to) and their
/// variants for a file transfer the whole list. [`read_from`](Self::read_from),
/// [`read_packet_from`](Self::read_packet_from), [`write_to`](Self::write_to) and their variants
/// make one system call. The
/// [vectors](Self::vectors) serve io_uring, AIO, vhost and other asynchronous I/O, which completes
/// later, possibly on another thread. Up to eight segments need no allocation, nor does a buffer
/// that is [cleared](Self::clear) and used again.
///
/// # Lifetime
///
/// The buffer keeps the memory map, and with it the mappings, until it is dropped or gets another
/// map ([`set_memory`](Self::set_memory)). It does not know whether an operation still uses the
/// mappings. A caller that passes [`vectors`](Self::vectors) to the kernel must keep the buffer,
/// and all bytes in it, until the operation is complete. [`clear`](Self::clear),
/// [`truncate`](Self::truncate), [`complete_front`](Self::complete_front) and
/// [`cancel_front`](Self::cancel_front) remove bytes. Bytes that are split off stay in use by the
/// other buffer.
///
/// Behind an IOMMU, a buffer with a range also keeps the translation in use. An invalidation of the
/// range does not complete before the buffer is dropped. [`try_extend`](Self::try_extend) fails if
/// the IOMMU does not support this ([`GuestMemory::hold_translation`]).
/// [`SharedIotlb`](crate::iommu::SharedIotlb) supports it, and keeps all its mappings in use
/// together: an invalidation of other addresses also waits for the buffer.
///
/// An IOMMU may ask its front end for a missing mapping. A front end may wait for an invalidation
/// before it sends the mapping. [`from_ranges`](Self::from_ranges), and
/// [`try_extend`](Self::try_extend) of an empty buffer, therefore translate all their ranges before
/// the buffer keeps anything. A later `try_extend` or `push` that misses waits for its own buffer,
/// until the IOMMU or the front end gives up.
///
/// # Segments
///
/// A guest chooses the number of segments, in particular behind an IOMMU. A buffer has at most
/// [`MAX_VECTORS`] segments, 1024, as many as one system call accepts. A device may
/// [set another limit](Self::set_segment_limit). [`try_extend`](Self::try_extend) returns an error
/// beyond the limit. A segment takes about 80 bytes. Segments that were removed from the front keep
/// their space while they are fewer than the others.
///
/// # Dirty tracking
///
/// [`copy_from`](Self::copy_from), [`write_slice`](Self::write_slice) and
/// [`write_obj`](Self::write_obj) mark the pages that they write. [`read_from`](Self::read_from),
/// [`read_exact_from`](Self::read_exact_from) and their variants for a file mark all pages that the
/// kernel may have written. [`read_packet_from`](Self::read_packet_from) marks only the bytes that
/// the kernel counts, for descriptors of which it counts all.
///
/// If the [vectors](Self::vectors) of a buffer for writing were used, its pages are marked when it
/// is completed or dropped. So an early return or a panic loses no page. All pages are marked:
/// after a short count, a device may have written more bytes than it counts. Pages are not marked
/// earlier, since a harvest could then copy a page before the device has written all of it.
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
/// let ranges = [(GuestAddress(0x1000), 0x200), (GuestAddress(0x3000), 1)];
/// let mut request = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
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
#[must_use = "dropping it without a completion marks all pages that a device may have written"]
pub struct IoBuffer<M: GuestMemory + 'static> {
    // `segments` borrows from `memory`, and is declared before it: fields are dropped in the order
    // of their declaration. The lifetime `'static` never leaves this type. `memory` is replaced
    // only while there are no segments. `split_off` and `split_to` move segments only to a buffer
    // with the same `memory`.
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
    ///
    /// `memory` is an `Arc` of the map, a guard of the current map, or a reference to either.
    pub fn new(memory: impl IntoMap<M = M>, access: Permissions) -> Self {
        IoBuffer {
            segments: Segments::new(access),
            memory: memory.into_map(),
            hold: None,
            segment_limit: MAX_VECTORS,
        }
    }

    /// Creates a buffer of `ranges`, such as the descriptors of a chain.
    ///
    /// The buffer has at most [`MAX_VECTORS`] segments. For another limit, create an empty buffer,
    /// and call [`set_segment_limit`](Self::set_segment_limit) and
    /// [`try_extend`](Self::try_extend).
    ///
    /// # Examples
    ///
    /// With the crate `virtio-queue`, the ranges are
    /// `chain.writable().map(|descriptor| (descriptor.addr(), descriptor.len() as usize))`.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// let descriptors = [(0x1000, 0x200), (0x3000, 1)];
    /// let ranges = descriptors.map(|(addr, len)| (GuestAddress(addr), len));
    /// let request = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
    /// assert_eq!((request.len(), request.vectors().len()), (0x201, 2));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the errors of [`try_extend`](Self::try_extend).
    #[doc(alias = "descriptor chain")]
    pub fn from_ranges<I>(
        memory: impl IntoMap<M = M>,
        ranges: I,
        access: Permissions,
    ) -> Result<Self>
    where
        I: IntoIterator<Item = (GuestAddress, usize), IntoIter: Clone>,
    {
        let mut buffer = IoBuffer::new(memory, access);
        buffer.try_extend(ranges)?;
        Ok(buffer)
    }

    /// Limits the number of segments to `limit`. The default is [`MAX_VECTORS`].
    ///
    /// Segments that the buffer has already stay. Buffers that are split off have the same limit.
    /// With more than [`MAX_VECTORS`] segments, pass that number to one operation, and continue
    /// with [`split_off`](Self::split_off). [`read_exact_from`](Self::read_exact_from) and
    /// [`write_all_to`](Self::write_all_to) take any number.
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
    /// Returns the errors of [`try_extend`](Self::try_extend).
    pub fn push(&mut self, addr: GuestAddress, count: usize) -> Result<()> {
        self.try_extend([(addr, count)])
    }

    /// Appends ranges: for each one, the address and the number of bytes.
    ///
    /// If it fails, the buffer is unchanged.
    ///
    /// Behind an IOMMU, an empty buffer translates all ranges, takes its hold, and then translates
    /// the ranges again (see [Lifetime](IoBuffer#lifetime)). So the iterator is cloned.
    ///
    /// # Examples
    ///
    /// See [`from_ranges`](Self::from_ranges).
    ///
    /// # Errors
    ///
    /// - the error of [`GuestMemory::get_slices`] if any byte of a range is not accessible;
    /// - [`Error::IOError`] of the kind `PermissionDenied` if the buffer was created for
    ///   [`Permissions::No`];
    /// - [`Error::GuestAddressOverflow`] if the buffer would have more than `usize::MAX` bytes;
    /// - [`Error::IOError`] of the kind `InvalidInput` if the buffer would have more segments than
    ///   its [limit](Self::set_segment_limit), or `OutOfMemory` if an allocation fails;
    /// - [`Error::IOError`] of the kind `Unsupported` behind an IOMMU that cannot keep translations
    ///   in use;
    /// - [`Error::IOError`] with the error of the system if a page of a Xen guest cannot be mapped.
    ///   A page that is not granted is `EINVAL`.
    ///
    /// The iterator cannot fail. To read descriptors that may be unreadable, collect them in a
    /// vector first, and reuse it.
    #[doc(alias = "descriptor chain")]
    pub fn try_extend<I>(&mut self, ranges: I) -> Result<()>
    where
        I: IntoIterator<Item = (GuestAddress, usize), IntoIter: Clone>,
    {
        let access = self.segments.access();
        if access == Permissions::No {
            return Err(not_created_for(BUFFER, access, access));
        }
        // SAFETY: `self.memory` keeps the object at this address alive and in place until it is
        // dropped. `self.segments` is dropped before it (see the fields of `IoBuffer`).
        // Nothing else keeps the reference beyond this call: `get_slices` and `hold_translation`
        // are generic over the lifetime and cannot know that it is `'static`. The iterators over
        // slices are dropped before this call returns, and `self` is borrowed until then.
        let memory: &'static M = unsafe { &*Arc::as_ptr(&self.memory) };
        let (ranges, limit) = (ranges.into_iter(), self.segment_limit);
        let hold = match self.hold {
            Some(_) => None,
            None => {
                // Each of these ranges has at least one segment. With more ranges, the call fails.
                let first = ranges.clone().filter(|(_, count)| *count != 0).take(limit);
                Some(hold_for(memory, first, access)?)
            }
        };
        let mut addition = self.segments.add();
        for (addr, count) in ranges {
            let mut slices = bounded_slices(memory, addr, count, access)?;
            let before = addition.len();
            if !addition.gather(&mut slices, limit)? {
                return Err(too_many(addr, count, limit));
            }
            // An implementation of `get_slices` may return fewer bytes than it should.
            if addition.len().checked_sub(before) != Some(count) {
                return Err(Error::InvalidBackendAddress);
            }
        }
        addition.keep();
        if self.segments.count() != 0 {
            self.hold = self.hold.take().or(hold);
        }
        Ok(())
    }

    /// Returns the vectors, in the order in which their ranges were added.
    ///
    /// Their memory stays mapped while `self` has these bytes, wherever `self` is moved to: see
    /// [Lifetime](IoBuffer#lifetime). No Rust reference to it may be made.
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
    /// The address, or the vectors there, change when ranges are added, removed, completed or split
    /// off. After this call, a buffer for writing counts as written: see
    /// [Dirty tracking](IoBuffer#dirty-tracking).
    ///
    /// # Examples
    ///
    /// With the crate `io-uring`, whose operations take a pointer to `iovec`s:
    ///
    /// ```no_run
    /// # #[cfg(all(target_os = "linux", target_arch = "x86_64", feature = "backend-mmap"))] {
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
    /// It moves all other segments, and allocates if there are more than eight. To take a header
    /// from the front, use [`split_to`](Self::split_to).
    ///
    /// Returns `None`, and changes nothing, if the buffer has fewer than `at` bytes.
    pub fn split_off(&mut self, at: usize) -> Option<Self> {
        let segments = self.segments.split_off(at)?;
        Some(self.part(segments))
    }

    /// Keeps the bytes from `at`, and returns the first `at` bytes as a new buffer.
    ///
    /// Use it for a header in front of data that the device moves. Up to eight segments in the
    /// first `at` bytes need no allocation, however many segments follow.
    ///
    /// Returns `None`, and changes nothing, if the buffer has fewer than `at` bytes.
    ///
    /// # Examples
    ///
    /// A network device receives packets without a header, and writes the header itself:
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::os::unix::net::UnixDatagram;
    /// use std::sync::Arc;
    /// use vm_memory::vectored::IoBuffer;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let memory = Arc::new(memory);
    /// let ranges = [(GuestAddress(0x1000), 0x600), (GuestAddress(0x3000), 0x600)];
    /// let mut chains = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
    /// let (wire, tap) = UnixDatagram::pair()?;
    /// wire.send(&[7; 60])?;
    ///
    /// // If there is no packet yet, the device keeps `header` for the next one.
    /// let header = chains.split_to(12).ok_or("no room for a header")?;
    /// let received = chains.read_packet_from(&tap)?;
    /// header.write_obj([0u8; 12], 0)?;
    /// header.complete(12);
    /// assert_eq!(chains.complete_front(received), 60);
    /// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100c))?, 7);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn split_to(&mut self, at: usize) -> Option<Self> {
        let segments = self.segments.split_to(at)?;
        Some(self.part(segments))
    }

    /// Creates a buffer of segments that were split from this one.
    fn part(&mut self, segments: Segments<'static, BS<'static, M::Bitmap>>) -> Self {
        let hold = match segments.count() {
            0 => None,
            _ => self.hold.clone(),
        };
        self.release_if_empty();
        IoBuffer {
            segments,
            memory: Arc::clone(&self.memory),
            hold,
            segment_limit: self.segment_limit,
        }
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
