//! [`IoBuffer`]: guest memory for I/O that completes later.

use core::fmt::{self, Debug};
use std::sync::Arc;

use super::pieces::{IoVector, Pieces};
use crate::bitmap::BS;
use crate::guest_memory::{Error, GuestAddress, GuestMemory, Permissions, Result, TranslationHold};

/// Ranges of guest memory that an I/O operation uses, which completes later and maybe on another thread.
///
/// For io_uring, AIO, vhost and the like. It is put together of the descriptors of a request, or any other ranges; up to eight pieces take no
/// allocation. It keeps the memory map, and with it the mappings, until it is dropped: *the operation must be over by then*, which is the
/// promise that whoever gives [`vectors`](Self::vectors) to the kernel makes.
///
/// What the device writes is marked dirty by [`complete`](Self::complete), and not before: a page that is marked while it is being written may be
/// harvested half written, and would not be marked when the rest arrives.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::vectored::IoBuffer;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// let memory: Arc<GuestMemoryMmap> = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?);
///
/// // Two descriptors of a request: data, and a byte of status behind it.
/// let mut request = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
/// request.push(GuestAddress(0x1000), 0x200)?;
/// request.push(GuestAddress(0x3000), 1)?;
/// let status = request.split_off(0x200).expect("it is longer");
///
/// // A worker's part: the kernel would be given `request.vectors()`.
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
///
/// Behind an IOMMU, invalidations have to wait for the operation: it keeps what [`GuestMemory::hold_translation`] returns, and [`push`](Self::push) refuses where that
/// is nothing. A [`SharedIotlb`](crate::iommu::SharedIotlb) has it.
pub struct IoBuffer<M: GuestMemory + 'static> {
    // Borrows from `memory`, and goes before it: fields are dropped in the order of their declaration. The lifetime is never given out. What borrows lies in
    // `SmallVec`s, whose elements are `MaybeUninit` or on the heap: a buffer that is handed over by value does not promise that they outlive the call
    // that drops `memory`, as references that lie in it plainly would.
    pieces: Pieces<'static, BS<'static, M::Bitmap>>,
    memory: Arc<M>,
    /// What the first range was translated through, and what holds that for all that come later: it is the oldest.
    hold: Option<TranslationHold>,
    access: Permissions,
}

// SAFETY: the pieces are addresses in mappings that `memory` keeps, and slices of its bitmaps. Memory behind a `VolatileSlice` may be accessed by
// any thread at any time; `memory` may be shared with (`Sync`) and dropped on (`Send`) another thread, and so may the bitmap slices be moved.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Send for IoBuffer<M> where
    BS<'static, M::Bitmap>: Send
{
}
// SAFETY: `&IoBuffer` gives out addresses, accesses to guest memory, and marks through shared bitmap slices.
unsafe impl<M: GuestMemory + Send + Sync + 'static> Sync for IoBuffer<M> where
    BS<'static, M::Bitmap>: Sync
{
}

impl<M: GuestMemory + 'static> IoBuffer<M> {
    /// Makes a buffer of no bytes in `memory`, for accesses of the kind `access`: [`Permissions::Write`] for what a device writes (a read of a
    /// disk), [`Permissions::Read`] for what it reads.
    pub fn new(memory: Arc<M>, access: Permissions) -> Self {
        IoBuffer {
            pieces: Pieces::new(),
            memory,
            hold: None,
            access,
        }
    }

    /// Appends the `count` bytes at `addr`; all, or none if there is an error.
    ///
    /// # Errors
    ///
    /// If any byte of the range cannot be accessed (see [`GuestMemory::get_slices`]), or the buffer would have more than `usize::MAX`
    /// bytes. `ErrorKind::Unsupported` behind an IOMMU that cannot be held.
    pub fn push(&mut self, addr: GuestAddress, count: usize) -> Result<()> {
        // SAFETY: `self.memory` keeps the object at this address, and its mappings, until it is dropped, which is after the pieces are. `get_slices` works
        // for every lifetime and cannot know this one, so that nothing else keeps what borrows from it.
        let memory: &'static M = unsafe { &*Arc::as_ptr(&self.memory) };
        if self.hold.is_none() {
            // Before the translation: an invalidation in between waits for it.
            self.hold = Some(memory.hold_translation().ok_or_else(not_held)?);
        }
        let mut slices = memory.get_slices(addr, count, self.access)?;
        // Beside the others, so that an error leaves those as they are.
        let mut pieces = Pieces::new();
        pieces.gather(&mut slices)?;
        self.pieces.append(pieces)
    }

    /// Returns the vectors, in the order in which their ranges were added.
    ///
    /// The memory that they name stays mapped while `self` lives, wherever it is moved to; no reference of Rust's may be made to it. The
    /// slice itself may lie inside `self`: io_uring needs it until the submission has returned (`IORING_FEAT_SUBMIT_STABLE`, Linux 5.5,
    /// io_uring_setup(2)). For what needs it longer there is [`vectors_on_heap`](Self::vectors_on_heap).
    pub fn vectors(&self) -> &[IoVector] {
        self.pieces.vectors()
    }

    /// Returns the vectors as [`vectors`](Self::vectors) does, at an address that stays the same when `self` is moved, until ranges are added
    /// or split off.
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
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    /// let disk = std::fs::File::open("disk.img")?;
    /// let mut ring = IoUring::new(8)?;
    ///
    /// let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Write);
    /// buffer.push(GuestAddress(0x1000), 0x2000)?;
    /// let vectors = buffer.vectors_on_heap();
    /// let count = u32::try_from(vectors.len())?;
    /// let read = opcode::Readv::new(types::Fd(disk.as_raw_fd()), vectors.as_ptr().cast(), count).build();
    /// // SAFETY: vectors and memory stay in place until the operation is over, since `buffer` is kept until then.
    /// unsafe { ring.submission().push(&read)? };
    /// ring.submit_and_wait(1)?;
    ///
    /// let answer = ring.completion().next().ok_or("no completion")?.result();
    /// // A negative answer is an error, after which all of it may have been written.
    /// let written = usize::try_from(answer).unwrap_or(buffer.len());
    /// buffer.complete(written);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn vectors_on_heap(&mut self) -> &[IoVector] {
        self.pieces.vectors_on_heap()
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Returns whether that is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the memory map that it keeps.
    pub fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    /// Keeps the first `at` bytes and returns the others as a buffer of their own; `None`, and nothing changes, if there are fewer than `at`.
    pub fn split_off(&mut self, at: usize) -> Option<Self> {
        Some(IoBuffer {
            pieces: self.pieces.split_off(at)?,
            memory: Arc::clone(&self.memory),
            hold: self.hold.clone(),
            access: self.access,
        })
    }

    /// Keeps the first `len` bytes, if there are more.
    pub fn truncate(&mut self, len: usize) {
        let _ = self.pieces.split_off(len);
    }

    /// Copies bytes from `offset` on into `buf`, as many as there are; returns how many.
    ///
    /// # Errors
    ///
    /// If the first of them is gone; see [`fault`](crate::fault).
    pub fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        self.pieces.copy_to(offset, buf)
    }

    /// Copies `buf` to the bytes from `offset` on, as many as there are; returns how many. Their pages are marked dirty.
    ///
    /// # Errors
    ///
    /// If the buffer is not for writing ([`Permissions::Write`]), or the first byte is gone; see [`fault`](crate::fault).
    pub fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        if !self.access.has_write() {
            return Err(Error::HostAddressNotAvailable);
        }
        self.pieces.copy_from(offset, buf)
    }

    /// Notes that the operation is over and the device has written the first `written` bytes: their pages are marked dirty.
    ///
    /// Returns how many bytes that are: no more than [`len`](Self::len). After an operation that failed nobody may know; then all may have
    /// been written, and `written` is `len`.
    pub fn complete(self, written: usize) -> usize {
        self.pieces.mark_dirty(0, written);
        written.min(self.len())
    }
}

#[cold]
fn not_held() -> Error {
    Error::IOError(std::io::Error::new(
        std::io::ErrorKind::Unsupported,
        "nothing keeps what this memory translates in use until an operation completes (Iommu::hold_translation)",
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
