//! [`IoBuffer`]: guest memory for I/O that completes later.

use core::fmt::{self, Debug};
use std::sync::Arc;

use super::io_vector::IoVector;
use super::segments::Segments;
use crate::bitmap::BS;
use crate::guest_memory::{Error, GuestAddress, GuestMemory, Permissions, Result, TranslationHold};

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
/// Behind an IOMMU, the buffer also keeps the translation in use. An invalidation of one of its
/// ranges does not complete before the buffer is dropped. [`push`](Self::push) fails if the IOMMU
/// does not support this ([`GuestMemory::hold_translation`]);
/// [`SharedIotlb`](crate::iommu::SharedIotlb) does.
///
/// # Dirty tracking
///
/// [`complete`](Self::complete) marks the pages that the device wrote. They are not marked earlier:
/// a harvest could then copy a page that is only half written, and the rest would not be marked.
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
    // of their declaration. The lifetime `'static` never leaves this type.
    //
    // The slices lie in `SmallVec`s, whose elements are `MaybeUninit` or on the heap. Plain
    // references in a buffer that is passed by value would promise to outlive the call that drops
    // `memory`; these do not.
    segments: Segments<'static, BS<'static, M::Bitmap>>,
    memory: Arc<M>,
    /// Keeps the translation of all ranges in use. It was taken before the first range was
    /// translated, so it also covers all later ones.
    hold: Option<TranslationHold>,
    access: Permissions,
}

// SAFETY: 1. `segments` holds host addresses of mappings that `memory` keeps, and bitmap slices.
// The addresses are not tied to a thread: any thread may access the memory of a `VolatileSlice` at
// any time. The bitmap slices are `Send` by the bound. 2. `memory` is an `Arc<M>` with
// `M: Send + Sync`, which is `Send`. 3. `hold` is a `TranslationHold`, which is `Send` by itself.
// 4. `access` is a plain value.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Send for IoBuffer<M> where
    BS<'static, M::Bitmap>: Send
{
}
// SAFETY: `&IoBuffer` allows four operations. 1. Reading the vectors, which are numbers. 2.
// Accessing guest memory through `VolatileSlice`s, which any number of threads may do at once. 3.
// Cloning the `Arc<M>`, which is `Sync` since `M: Send + Sync`. 4. Marking through shared bitmap
// slices, which are `Sync` by the bound. It does not reach `hold`, and `TranslationHold` is `Sync`
// by itself.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Sync for IoBuffer<M> where
    BS<'static, M::Bitmap>: Sync
{
}

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Makes an empty buffer in `memory` for accesses of the kind `access`.
    ///
    /// Use [`Permissions::Write`] if the device writes to the buffer, as for a disk read, and
    /// [`Permissions::Read`] if it reads from it.
    pub fn new(memory: Arc<M>, access: Permissions) -> Self {
        IoBuffer {
            segments: Segments::new(),
            memory,
            hold: None,
            access,
        }
    }

    /// Appends the `count` bytes at `addr`. If it fails, the buffer is unchanged.
    ///
    /// # Errors
    ///
    /// - the error of [`GuestMemory::get_slices`] if any byte of the range is not accessible;
    /// - [`Error::GuestAddressOverflow`] if the buffer would have more than `usize::MAX` bytes;
    /// - [`Error::IOError`] of the kind `Unsupported` behind an IOMMU that cannot keep translations
    ///   in use.
    pub fn push(&mut self, addr: GuestAddress, count: usize) -> Result<()> {
        // SAFETY: `self.memory` keeps the object at this address alive and in place until it is
        // dropped. `self.segments` is dropped before it (see the fields of `IoBuffer`).
        // Nothing else keeps the reference beyond this call: `get_slices` and `hold_translation`
        // are generic over the lifetime and cannot know that it is `'static`.
        let memory: &'static M = unsafe { &*Arc::as_ptr(&self.memory) };
        if self.hold.is_none() {
            // Before the translation, so that an invalidation in between waits for this buffer.
            self.hold = Some(memory.hold_translation().ok_or_else(cannot_hold)?);
        }
        let mut slices = memory.get_slices(addr, count, self.access)?;
        // Gathered separately, so that an error leaves the buffer as it is.
        let mut segments = Segments::new();
        segments.gather(&mut slices)?;
        self.segments.append(segments)
    }

    /// Returns the vectors, in the order in which their ranges were added.
    ///
    /// Their memory stays mapped while `self` lives, wherever `self` is moved to. No Rust reference
    /// to it may be made.
    ///
    /// The array itself may lie inside `self`, so it moves with it. io_uring reads the array only
    /// until the submission returns (`IORING_FEAT_SUBMIT_STABLE`, Linux 5.5, io_uring_setup(2)). If
    /// the array is needed for longer, use [`vectors_on_heap`](Self::vectors_on_heap).
    pub fn vectors(&self) -> &[IoVector] {
        self.segments.vectors()
    }

    /// Returns the vectors in an array whose address stays the same when `self` is moved.
    ///
    /// The address changes when ranges are added or split off.
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
    /// let read = opcode::Readv::new(fd, vectors.as_ptr().cast(), count).build();
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
    pub fn vectors_on_heap(&mut self) -> &[IoVector] {
        self.segments.vectors_on_heap()
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
        Some(IoBuffer {
            segments: self.segments.split_off(at)?,
            memory: Arc::clone(&self.memory),
            hold: self.hold.clone(),
            access: self.access,
        })
    }

    /// Shortens the buffer to its first `len` bytes. Does nothing if it has fewer.
    pub fn truncate(&mut self, len: usize) {
        let _ = self.segments.split_off(len);
    }

    /// Copies the bytes from `offset` on to `buf`, as many as both have, and returns how many.
    ///
    /// # Errors
    ///
    /// Returns an error if the first byte cannot be accessed, for example because its file was
    /// truncated; see [`fault`](crate::fault).
    pub fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        self.segments.copy_to(offset, buf)
    }

    /// Copies `buf` to the bytes from `offset` on, as many as both have, and returns how many.
    ///
    /// The pages written are marked dirty.
    ///
    /// # Errors
    ///
    /// Returns [`Error::HostAddressNotAvailable`] if the buffer was not made for
    /// [`Permissions::Write`]. Returns an error if the first byte cannot be accessed, for example
    /// because its file was truncated; see [`fault`](crate::fault).
    pub fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        if !self.access.has_write() {
            return Err(Error::HostAddressNotAvailable);
        }
        self.segments.copy_from(offset, buf)
    }

    /// Marks the first `written` bytes as dirty, after the device has written them.
    ///
    /// Returns the number of bytes marked, which is at most [`len`](Self::len). After a failed
    /// operation it may be unknown how many bytes were written. Pass [`len`](Self::len) then.
    pub fn complete(self, written: usize) -> usize {
        self.segments.mark_dirty(0, written);
        written.min(self.len())
    }
}

#[cold]
fn cannot_hold() -> Error {
    Error::IOError(std::io::Error::new(
        std::io::ErrorKind::Unsupported,
        "this IOMMU cannot keep a translation in use until an operation completes; \
         implement Iommu::hold_translation or use SharedIotlb",
    ))
}

impl<M: GuestMemory + 'static> Debug for IoBuffer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuffer")
            .field("vectors", &self.vectors())
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}
