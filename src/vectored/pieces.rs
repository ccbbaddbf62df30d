//! The pieces of a range, and the vector that names them to the kernel.

use core::fmt;
use std::io::ErrorKind;
use std::os::fd::BorrowedFd;

use smallvec::SmallVec;

use super::descriptor::{call, Place, Transfer, MAX_PIECES};
use crate::bitmap::{BitmapSlice, BS};
use crate::bytes::Bytes;
use crate::guest_memory::{
    Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions, Result,
};
use crate::volatile_memory::VolatileSlice;

/// So many pieces take no allocation.
pub(super) const INLINE: usize = 8;

/// Address in this process and length in bytes of a piece of guest memory.
///
/// It is laid out as the kernel's `struct iovec` (readv(2)), `libc::iovec`, so that a pointer to one is a pointer to the other. It may be read on any thread; what may be done with the memory that it names is said where it comes from.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVector(libc::iovec);

// SAFETY: an address and a length, which are numbers; nothing is done with them here.
unsafe impl Send for IoVector {}
// SAFETY: as above; a shared one is only read.
unsafe impl Sync for IoVector {}

impl IoVector {
    fn new<S: BitmapSlice>(slice: &VolatileSlice<'_, S>) -> Self {
        IoVector(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
    }

    /// Returns the address in this process.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Returns whether that is 0.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

impl fmt::Debug for IoVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+0x{:x}", self.base(), self.len())
    }
}

/// The pieces of a range, in order, each with the part of the bitmap that marks it.
#[derive(Clone, Debug)]
pub(super) struct Pieces<'a, S> {
    slices: SmallVec<[VolatileSlice<'a, S>; INLINE]>,
    /// The same pieces for the kernel.
    vectors: SmallVec<[IoVector; INLINE]>,
    /// Bytes in all pieces.
    len: usize,
}

impl<'a, S: BitmapSlice> Pieces<'a, S> {
    /// Appends slices until they end or one is an error.
    pub(super) fn gather(
        &mut self,
        slices: &mut impl GuestMemorySliceIterator<'a, S>,
    ) -> Result<()> {
        slices.try_for_each_slice(|slice| self.push(slice))
    }

    pub(super) fn new() -> Self {
        Pieces {
            slices: SmallVec::new(),
            vectors: SmallVec::new(),
            len: 0,
        }
    }

    /// Appends a piece.
    pub(super) fn push(&mut self, slice: VolatileSlice<'a, S>) -> Result<()> {
        let Some(len) = self.len.checked_add(slice.len()) else {
            return Err(Error::GuestAddressOverflow);
        };
        self.vectors.push(IoVector::new(&slice));
        self.slices.push(slice);
        self.len = len;
        Ok(())
    }

    /// Appends all pieces of another, or none.
    pub(super) fn append(&mut self, mut other: Self) -> Result<()> {
        let Some(len) = self.len.checked_add(other.len) else {
            return Err(Error::GuestAddressOverflow);
        };
        self.vectors.append(&mut other.vectors);
        self.slices.append(&mut other.slices);
        self.len = len;
        Ok(())
    }

    /// Number of bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn vectors(&self) -> &[IoVector] {
        &self.vectors
    }

    /// Moves the vector to the heap, where it stays when this is moved.
    pub(super) fn vectors_on_heap(&mut self) -> &[IoVector] {
        if !self.vectors.spilled() {
            self.vectors.grow(INLINE.saturating_mul(2));
        }
        &self.vectors
    }

    /// Keeps the first `at` bytes, and returns the others; `None`, and nothing changes, if there are fewer than `at`.
    pub(super) fn split_off(&mut self, at: usize) -> Option<Self> {
        if at > self.len {
            return None;
        }
        let mut left = at;
        let mut first = SmallVec::new();
        let mut second = Pieces::new();
        for slice in &self.slices {
            let (head, tail) = slice.split_at(left.min(slice.len())).ok()?;
            left = left.saturating_sub(head.len());
            if !head.is_empty() {
                first.push(head);
            }
            if !tail.is_empty() {
                second.push(tail).ok()?;
            }
        }
        self.vectors = first.iter().map(IoVector::new).collect();
        self.slices = first;
        self.len = at;
        Some(second)
    }

    /// The pieces of the bytes from `offset` on, the first one cut.
    fn beginning_at(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'a, S>> + '_ {
        let mut skip = offset;
        self.slices.iter().filter_map(move |slice| {
            let skipped = skip.min(slice.len());
            skip = skip.saturating_sub(skipped);
            slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
        })
    }

    /// Marks `count` bytes from `offset` on as written, as far as there are any.
    pub(super) fn mark_dirty(&self, offset: usize, count: usize) {
        if offset == 0 && count >= self.len {
            // All of it, as a rule.
            for piece in &self.slices {
                piece.bitmap().mark_dirty(0, piece.len());
            }
            return;
        }
        let mut left = count;
        for piece in self.beginning_at(offset) {
            if left == 0 {
                return;
            }
            let marked = left.min(piece.len());
            piece.bitmap().mark_dirty(0, marked);
            left = left.saturating_sub(marked);
        }
    }

    /// Copies from the bytes at `offset` into `buf`, as many as there are; returns how many.
    pub(super) fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0usize;
        for piece in self.beginning_at(offset) {
            let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            match piece.read(rest, 0) {
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Copies `buf` to the bytes at `offset`, as many as there are; returns how many.
    pub(super) fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        let mut done = 0usize;
        for piece in self.beginning_at(offset) {
            let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            match piece.write(rest, 0) {
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// One call for the first pieces; returns the number of bytes moved.
    pub(super) fn transfer_once(
        &self,
        transfer: Transfer,
        fd: BorrowedFd<'_>,
        place: Place,
    ) -> std::io::Result<usize> {
        self.transfer_vectors(&self.vectors, 0, transfer, fd, place)
    }

    /// As many calls as it takes; returns the number of bytes moved, and why it ended if those are not all.
    pub(super) fn transfer_all(
        &self,
        transfer: Transfer,
        fd: BorrowedFd<'_>,
        place: Place,
    ) -> (usize, Option<std::io::Error>) {
        let mut done = 0usize;
        let mut rest = None;
        while done < self.len {
            let vectors = rest.as_ref().unwrap_or(&self.vectors);
            match self.transfer_vectors(vectors, done, transfer, fd, place.behind(done)) {
                Ok(0) => return (done, Some(ended(transfer))),
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) => return (done, Some(error)),
            }
            if done < self.len {
                rest = Some(
                    self.beginning_at(done)
                        .take(MAX_PIECES)
                        .map(|slice| IoVector::new(&slice))
                        .collect(),
                );
            }
        }
        (done, None)
    }

    /// One call for vectors that begin at `offset` of the pieces; marks what it wrote.
    fn transfer_vectors(
        &self,
        vectors: &[IoVector],
        offset: usize,
        transfer: Transfer,
        fd: BorrowedFd<'_>,
        place: Place,
    ) -> std::io::Result<usize> {
        let vectors = vectors.get(..MAX_PIECES).unwrap_or(vectors);
        let answer = loop {
            // SAFETY: the vectors were made of slices in `self.slices`, which are mapped as long as those live, and which nobody has
            // references of Rust's to: that is what a `VolatileSlice` is.
            match unsafe { call(transfer, fd, place, vectors) } {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                answer => break answer,
            }
        };
        if transfer == Transfer::Read {
            match &answer {
                Ok(moved) => self.mark_dirty(offset, *moved),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // A device may have left bytes behind that the kernel does not count.
                Err(_) => self.mark_dirty(offset, usize::MAX),
            }
        }
        answer
    }
}

#[cold]
fn ended(transfer: Transfer) -> std::io::Error {
    match transfer {
        Transfer::Read => std::io::Error::new(
            ErrorKind::UnexpectedEof,
            "the source ended before the range was full",
        ),
        Transfer::Write => {
            std::io::Error::new(ErrorKind::WriteZero, "the target takes no more bytes")
        }
    }
}

/// A range of guest memory as raw vectors, for as long as the memory is borrowed. From [`io_vectors`].
///
/// `H` is what was held on to when the range was translated: behind an IOMMU, no invalidation is over while this is there.
#[derive(Debug)]
pub struct IoVectors<'a, S, H> {
    pieces: Pieces<'a, S>,
    /// Behind the pieces: it goes after them.
    _held: H,
}

/// Returns the `count` bytes at `addr` as raw vectors, for an access of the kind `access`.
///
/// For what this crate has no function for. Whoever writes through them marks it ([`IoVectors::mark_dirty`]).
///
/// # Errors
///
/// If any byte of the range cannot be accessed so; see [`GuestMemory::get_slices`].
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::vectored::io_vectors;
/// use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])?;
/// let range = io_vectors(&memory, GuestAddress(0xf00), 0x180, Permissions::Read)?;
/// let lengths: Vec<usize> = range.vectors().iter().map(|vector| vector.len()).collect();
/// assert_eq!(lengths, [0x100, 0x80]);
/// assert!(io_vectors(&memory, GuestAddress(0x1f00), 0x180, Permissions::Read).is_err());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn io_vectors<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
) -> Result<IoVectors<'a, BS<'a, M::Bitmap>, impl Sized + 'a>> {
    let mut slices = memory.get_slices(addr, count, access)?;
    let mut pieces = Pieces::new();
    pieces.gather(&mut slices)?;
    Ok(IoVectors {
        pieces,
        _held: slices,
    })
}

impl<S: BitmapSlice, H> IoVectors<'_, S, H> {
    /// Returns the vectors, in the order of the guest addresses; for the kernel, a pointer to them is one to `struct iovec`s.
    ///
    /// The memory that they name is mapped while `self` lives. It may change at any time: no reference of Rust's may be made to it.
    pub fn vectors(&self) -> &[IoVector] {
        self.pieces.vectors()
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Returns whether that is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Marks `count` bytes from `offset` on as written, as far as there are any. To be called after they have been.
    pub fn mark_dirty(&self, offset: usize, count: usize) {
        self.pieces.mark_dirty(offset, count);
    }
}
