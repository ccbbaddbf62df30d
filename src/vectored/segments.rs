//! [`Segments`]: the segments of scattered ranges, and their transfer from or to a descriptor.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;

use smallvec::SmallVec;

use super::io_vector::IoVector;
use super::system_call::{call, Direction, Position, MAX_VECTORS};
use crate::bitmap::BitmapSlice;
use crate::bytes::Bytes;
use crate::guest_memory::{Error, GuestMemorySliceIterator, Result};
use crate::volatile_memory::VolatileSlice;

/// The number of segments that are stored without an allocation.
pub(super) const INLINE: usize = 8;

/// The segments of one or more ranges, in order, each with its slice of the dirty bitmap.
#[derive(Clone, Debug)]
pub(super) struct Segments<'a, S> {
    slices: SmallVec<[VolatileSlice<'a, S>; INLINE]>,
    /// The same segments, in the kernel's layout.
    vectors: SmallVec<[IoVector; INLINE]>,
    /// The number of bytes in all segments.
    len: usize,
}

impl<'a, S: BitmapSlice> Segments<'a, S> {
    /// Appends slices up to the end or the first error. The slices before an error stay.
    pub(super) fn gather(
        &mut self,
        slices: &mut impl GuestMemorySliceIterator<'a, S>,
    ) -> Result<()> {
        slices.try_for_each_slice(|slice| self.push(slice))
    }

    pub(super) fn new() -> Self {
        Segments {
            slices: SmallVec::new(),
            vectors: SmallVec::new(),
            len: 0,
        }
    }

    /// Appends a segment, unless the length would overflow.
    pub(super) fn push(&mut self, slice: VolatileSlice<'a, S>) -> Result<()> {
        let Some(len) = self.len.checked_add(slice.len()) else {
            return Err(Error::GuestAddressOverflow);
        };
        self.vectors.push(IoVector::new(&slice));
        self.slices.push(slice);
        self.len = len;
        Ok(())
    }

    /// Appends all segments of `other`, or none if the length would overflow.
    pub(super) fn append(&mut self, mut other: Self) -> Result<()> {
        let Some(len) = self.len.checked_add(other.len) else {
            return Err(Error::GuestAddressOverflow);
        };
        self.vectors.append(&mut other.vectors);
        self.slices.append(&mut other.slices);
        self.len = len;
        Ok(())
    }

    /// Returns the number of bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn vectors(&self) -> &[IoVector] {
        &self.vectors
    }

    /// Returns the vectors at an address that stays the same when `self` is moved: on the heap.
    pub(super) fn vectors_on_heap(&mut self) -> &[IoVector] {
        if !self.vectors.spilled() {
            self.vectors.grow(INLINE.saturating_mul(2));
        }
        &self.vectors
    }

    /// Keeps the first `at` bytes, and returns the others. Returns `None`, and changes nothing, if
    /// there are fewer than `at` bytes.
    pub(super) fn split_off(&mut self, at: usize) -> Option<Self> {
        if at > self.len {
            return None;
        }
        let mut left = at;
        let mut first = SmallVec::new();
        let mut second = Segments::new();
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

    /// Returns the segments of the bytes from `offset` on. The first one may be shortened.
    fn beginning_at(&self, offset: usize) -> impl Iterator<Item = VolatileSlice<'a, S>> + '_ {
        let mut skip = offset;
        self.slices.iter().filter_map(move |slice| {
            let skipped = skip.min(slice.len());
            skip = skip.saturating_sub(skipped);
            slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
        })
    }

    /// Marks `count` bytes from `offset` on as dirty, as far as they exist.
    pub(super) fn mark_dirty(&self, offset: usize, count: usize) {
        if offset == 0 && count >= self.len {
            // The usual case: all bytes.
            for segment in &self.slices {
                segment.bitmap().mark_dirty(0, segment.len());
            }
            return;
        }
        let mut left = count;
        for segment in self.beginning_at(offset) {
            if left == 0 {
                return;
            }
            let marked = left.min(segment.len());
            segment.bitmap().mark_dirty(0, marked);
            left = left.saturating_sub(marked);
        }
    }

    /// Copies the bytes from `offset` on to `buf`, as many as both have, and returns how many.
    pub(super) fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0usize;
        for segment in self.beginning_at(offset) {
            let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            match segment.read(rest, 0) {
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Copies `buf` to the bytes from `offset` on, as many as both have, and returns how many.
    pub(super) fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        let mut done = 0usize;
        for segment in self.beginning_at(offset) {
            let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            match segment.write(rest, 0) {
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Transfers by one system call, for up to [`MAX_VECTORS`] segments. Returns the number of
    /// bytes moved.
    pub(super) fn transfer_once(
        &self,
        direction: Direction,
        fd: BorrowedFd<'_>,
        position: Position,
    ) -> std::io::Result<usize> {
        self.transfer_vectors(&self.vectors, 0, direction, fd, position)
    }

    /// Transfers all bytes, by as many system calls as it takes. Returns the number of bytes moved,
    /// and the error that ended the transfer early, if there was one.
    pub(super) fn transfer_all(
        &self,
        direction: Direction,
        fd: BorrowedFd<'_>,
        position: Position,
    ) -> (usize, Option<std::io::Error>) {
        let mut done = 0usize;
        let mut rest = None;
        while done < self.len {
            let vectors = rest.as_ref().unwrap_or(&self.vectors);
            match self.transfer_vectors(vectors, done, direction, fd, position.after(done)) {
                Ok(0) => return (done, Some(early_end(direction))),
                Ok(moved) => done = done.saturating_add(moved),
                Err(error) => return (done, Some(error)),
            }
            if done < self.len {
                rest = Some(
                    self.beginning_at(done)
                        .take(MAX_VECTORS)
                        .map(|slice| IoVector::new(&slice))
                        .collect(),
                );
            }
        }
        (done, None)
    }

    /// Transfers by one system call, and marks the bytes that it wrote. The bytes of `vectors`
    /// start at `offset` of the segments.
    fn transfer_vectors(
        &self,
        vectors: &[IoVector],
        offset: usize,
        direction: Direction,
        fd: BorrowedFd<'_>,
        position: Position,
    ) -> std::io::Result<usize> {
        let vectors = vectors.get(..MAX_VECTORS).unwrap_or(vectors);
        let result = loop {
            // SAFETY: each of `vectors` was made from a slice in `self.slices` or a part of one.
            // The contract of `VolatileSlice::with_bitmap` is that its memory stays mapped for its
            // lifetime `'a`, and that no Rust reference to it exists. `self` is borrowed here, so
            // `'a` has not ended.
            match unsafe { call(direction, fd, position, vectors) } {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        if direction == Direction::Read {
            match &result {
                Ok(moved) => self.mark_dirty(offset, *moved),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // The device may have written bytes that the kernel does not count.
                Err(_) => self.mark_dirty(offset, usize::MAX),
            }
        }
        result
    }
}

/// Returns the error for a system call that moved no bytes.
#[cold]
fn early_end(direction: Direction) -> std::io::Error {
    match direction {
        Direction::Read => std::io::Error::new(
            ErrorKind::UnexpectedEof,
            "the source ended before the range was filled",
        ),
        Direction::Write => {
            std::io::Error::new(ErrorKind::WriteZero, "the target accepts no more bytes")
        }
    }
}
