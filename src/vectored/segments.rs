//! [`Segments`]: the segments of scattered ranges, and their transfer from or to a descriptor.
//!
//! Invariants:
//!
//! - `vectors[i]` names the bytes of `slices[i]`, and `len` is the sum of their lengths.
//! - The bytes of each segment are mapped while the segment exists: by the memory, or by its hold.
//! - If the vectors were lent for writing, each segment is marked dirty before it is dropped.

use std::collections::TryReserveError;
use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use super::inline_vec::InlineVec;
use super::io_vector::IoVector;
use super::system_call::{call, FilePosition, Transfer, MAX_BYTES, MAX_VECTORS};
use crate::bitmap::{mark_each, BitmapSlice, OnPanic};
use crate::bytes::Bytes;
use crate::guest_memory::{Error, GuestAddress, GuestMemorySliceIterator, Permissions, Result};
use crate::volatile_memory::{self, HeldSlice, VolatileSlice};

/// The number of segments that are stored without an allocation.
pub(super) const INLINE: usize = 8;

#[cfg(test)]
std::thread_local! {
    /// The number of segments that this thread has passed to find positions.
    pub(super) static PASSED: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// The segments of one or more ranges, in order, each with its slice of the dirty bitmap.
#[derive(Debug)]
pub(super) struct Segments<'a, S: BitmapSlice> {
    slices: InlineVec<HeldSlice<'a, S>, INLINE>,
    /// The same segments, in the kernel's layout.
    vectors: InlineVec<IoVector, INLINE>,
    /// The number of bytes in all segments.
    len: usize,
    /// The access that the segments were checked for.
    access: Permissions,
    /// Whether a caller got the vectors for writing, and the pages have not been marked since.
    ///
    /// Relaxed accesses suffice. The flag is read by `drop` and by methods that take `&mut self` or
    /// consume the owner. A borrow by another thread has ended by then. Its end (by a join, a lock,
    /// or the count of an `Arc`) orders the store before the load.
    lent: AtomicBool,
}

impl<'a, S: BitmapSlice> Segments<'a, S> {
    /// Creates an empty list, for slices that were checked for `access`.
    pub(super) fn new(access: Permissions) -> Self {
        Segments {
            slices: InlineVec::new(),
            vectors: InlineVec::new(),
            len: 0,
            access,
            lent: AtomicBool::new(false),
        }
    }

    /// Appends slices up to the end, the first error, or a total of `limit` segments.
    ///
    /// Returns whether all slices were appended. The slices before an error stay.
    #[inline]
    pub(super) fn gather(
        &mut self,
        slices: &mut impl GuestMemorySliceIterator<'a, S>,
        limit: usize,
    ) -> Result<bool> {
        // At least `INLINE` segments need no allocation.
        let mut room = limit.min(INLINE).saturating_sub(self.count());
        // A local variable, which `make_room` does not force into memory.
        let mut len = self.len;
        let mut full = false;
        let result = slices.try_for_each_slice(|slice| {
            if room == 0 {
                room = self.make_room(limit)?;
                if room == 0 {
                    full = true;
                    // Ends the walk. The value is not used.
                    return Err(Error::InvalidBackendAddress);
                }
            }
            room = room.wrapping_sub(1);
            self.push(slice, &mut len)
        });
        self.len = len;
        match result {
            Err(_) if full => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Appends slices up to the end, the first error, or a total of `limit` segments.
    ///
    /// Unlike [`gather`](Self::gather), it leaves the other slices in the iterator.
    pub(super) fn fill(
        &mut self,
        slices: &mut impl GuestMemorySliceIterator<'a, S>,
        limit: usize,
    ) -> Result<()> {
        while self.make_room(limit)? != 0 {
            let Some(slice) = slices.next() else { break };
            let mut len = self.len;
            let pushed = self.push(slice?, &mut len);
            self.len = len;
            pushed?;
        }
        Ok(())
    }

    /// Appends a segment, for which there must be room, and adds its length to `len`.
    ///
    /// The caller stores `len`.
    ///
    /// # Errors
    ///
    /// Returns an error if the length would overflow. Returns an error if the memory is mapped for
    /// each access, and that fails; the bytes before the first that cannot be mapped are appended.
    #[inline(always)]
    fn push(&mut self, slice: VolatileSlice<'a, S>, len: &mut usize) -> Result<()> {
        let (held, inaccessible) = slice.hold(self.access.direction())?;
        // Not `ok_or`, which makes and drops an error when built for size.
        let Some(total) = len.checked_add(held.slice().len()) else {
            return Err(Error::GuestAddressOverflow);
        };
        *len = total;
        self.vectors.push(IoVector::new(held.slice()));
        self.slices.push(held);
        match inaccessible {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Makes room for a segment, unless there are `limit`.
    ///
    /// Returns the number of segments that can be added without an allocation, up to that total.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no memory.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, limit: usize) -> Result<usize> {
        if self.count() < limit {
            self.slices.try_reserve_one().map_err(out_of_memory)?;
            self.vectors.try_reserve_one().map_err(out_of_memory)?;
        }
        let capacity = self.slices.capacity().min(self.vectors.capacity());
        Ok(capacity.min(limit).saturating_sub(self.count()))
    }

    /// Returns the number of bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the number of segments.
    pub(super) fn count(&self) -> usize {
        self.slices.len()
    }

    /// Returns the access that the segments were checked for.
    pub(super) fn access(&self) -> Permissions {
        self.access
    }

    /// Returns the vectors, for a log.
    pub(super) fn vectors(&self) -> &[IoVector] {
        &self.vectors
    }

    /// Returns the vectors for an access by the kernel or a device.
    pub(super) fn lend(&self) -> &[libc::iovec] {
        if self.access.has_write() {
            self.lent.store(true, Ordering::Relaxed);
        }
        IoVector::as_iovecs(&self.vectors)
    }

    /// Returns the vectors on the heap, for an access by the kernel or a device.
    ///
    /// Their address stays the same when `self` is moved.
    pub(super) fn lend_on_heap(&mut self) -> &[libc::iovec] {
        self.vectors.move_to_heap();
        self.lend()
    }

    /// Ends the loan of the vectors, after which nobody writes through them.
    pub(super) fn end_loan(&mut self) {
        *self.lent.get_mut() = false;
    }

    /// Returns a guard that removes the segments added through it, unless they are kept.
    pub(super) fn add(&mut self) -> Addition<'_, 'a, S> {
        let (count, len) = (self.count(), self.len);
        Addition {
            segments: self,
            count,
            len,
        }
    }

    /// Keeps the first `at` bytes, and returns the others.
    ///
    /// Returns `None`, and changes nothing, if there are fewer than `at` bytes.
    pub(super) fn split_off(&mut self, at: usize) -> Option<Self> {
        let mut rest = Segments::new(self.access);
        rest.len = self.len.checked_sub(at)?;
        *rest.lent.get_mut() = *self.lent.get_mut();
        let (first, skipped) = self.position(at);
        // The segment that contains `at` may begin before it. It is split before anything changes:
        // a user's bitmap may panic.
        let parts = match self.slices.get(first) {
            Some(segment) if skipped != 0 => segment.split_at(skipped),
            _ => None,
        };
        rest.slices = self.slices.split_off(first);
        rest.vectors = self.vectors.split_off(first);
        self.len = at;
        let began = rest.slices.first_mut().zip(rest.vectors.first_mut());
        if let Some(((head, tail), (segment, vector))) = parts.zip(began) {
            self.vectors.push(IoVector::new(head.slice()));
            self.slices.push(head);
            *vector = IoVector::new(tail.slice());
            *segment = tail;
        }
        Some(rest)
    }

    /// Keeps the bytes from `at`, and returns the first `at` bytes.
    ///
    /// Returns `None`, and changes nothing, if there are fewer than `at` bytes.
    pub(super) fn split_to(&mut self, at: usize) -> Option<Self> {
        self.len.checked_sub(at)?;
        let mut front = Segments::new(self.access);
        // If a user's bitmap panics, both may mark a segment, and neither loses one.
        *front.lent.get_mut() = *self.lent.get_mut();
        for segment in self.slices.iter() {
            let count = at.saturating_sub(front.len).min(segment.slice().len());
            if count == 0 {
                break;
            }
            let (head, _) = segment.split_at(count)?;
            front.len = front.len.saturating_add(count);
            front.vectors.push(IoVector::new(head.slice()));
            front.slices.push(head);
        }
        self.remove_front(at);
        Some(front)
    }

    /// Removes the first `count` bytes, without marks. Returns their number, limited to the length.
    pub(super) fn remove_front(&mut self, count: usize) -> usize {
        let count = count.min(self.len);
        let (first, skipped) = self.position(count);
        // Splits the segment that contains the new start before anything changes, since a user's
        // bitmap may panic.
        let tail = match self.slices.get(first) {
            Some(segment) if skipped != 0 => segment.split_at(skipped).map(|(_, tail)| tail),
            _ => None,
        };
        self.len = self.len.saturating_sub(count);
        self.vectors.remove_front(first);
        self.slices.remove_front(first);
        let start = self.slices.first_mut().zip(self.vectors.first_mut());
        if let Some((tail, (segment, vector))) = tail.zip(start) {
            *vector = IoVector::new(tail.slice());
            *segment = tail;
        }
        count
    }

    /// Removes all segments, and keeps the allocations. Marks the segments if they were lent.
    pub(super) fn clear(&mut self) {
        if *self.lent.get_mut() {
            self.mark_all();
        }
        self.end_loan();
        self.len = 0;
        self.vectors.clear();
        self.slices.clear();
    }

    /// Returns the index of the segment that contains `offset`, and the offset in it.
    ///
    /// Past the end, returns the number of segments and 0.
    fn position(&self, offset: usize) -> (usize, usize) {
        self.position_after((0, 0), offset)
    }

    /// Returns the position `count` bytes after another one.
    ///
    /// Takes time in proportion to the segments between them.
    fn position_after(&self, from: (usize, usize), count: usize) -> (usize, usize) {
        let (first, skipped) = from;
        let mut skip = skipped.saturating_add(count);
        let segments = self.slices.get(first..).unwrap_or_default();
        for (index, segment) in (first..).zip(segments) {
            #[cfg(test)]
            PASSED.set(PASSED.get().saturating_add(1));
            let len = segment.slice().len();
            if skip < len {
                return (index, skip);
            }
            skip = skip.saturating_sub(len);
        }
        (self.slices.len(), 0)
    }

    /// Returns the parts of the segments that contain the `count` bytes at a position.
    ///
    /// Each part is a segment, an offset in it, and a number of bytes, which is not 0. Bytes past
    /// the end of the buffer are left out.
    fn ranges(
        &self,
        position: (usize, usize),
        count: usize,
    ) -> impl Iterator<Item = (&VolatileSlice<'a, S>, usize, usize)> + '_ {
        let (first, mut skip) = position;
        let mut left = count;
        let slices = self.slices.get(first..).unwrap_or_default();
        let slices = slices.iter().map(HeldSlice::slice);
        let ranges = slices.map_while(move |slice| {
            let offset = core::mem::take(&mut skip);
            let count = left.min(slice.len().saturating_sub(offset));
            let range = (left != 0).then_some((slice, offset, count));
            left = left.saturating_sub(count);
            range
        });
        ranges.filter(|(_, _, count)| *count != 0)
    }

    /// Returns the `count` bytes at a position, limited to the segments.
    fn parts(
        &self,
        position: (usize, usize),
        count: usize,
    ) -> impl Iterator<Item = VolatileSlice<'a, S>> + '_ {
        let ranges = self.ranges(position, count);
        ranges.map_while(|(slice, offset, count)| slice.subslice(offset, count).ok())
    }

    /// Marks all bytes as dirty.
    pub(super) fn mark_all(&self) {
        mark_each(self.slices.iter().map(HeldSlice::slice), |slice| {
            slice.bitmap().mark_dirty(0, slice.len());
        });
    }

    /// Marks the `count` bytes at `offset` as dirty, limited to the segments.
    pub(super) fn mark_dirty(&self, offset: usize, count: usize) {
        if offset == 0 && count >= self.len() {
            // The usual case.
            return self.mark_all();
        }
        self.mark_dirty_from(self.position(offset), count);
    }

    /// Marks the `count` bytes at a position as dirty, limited to the segments.
    fn mark_dirty_from(&self, position: (usize, usize), count: usize) {
        // Not `parts`, which slices the bitmaps: a bitmap may panic there.
        mark_each(self.ranges(position, count), |(slice, skip, count)| {
            slice.bitmap().mark_dirty(skip, count);
        });
    }

    /// Copies bytes at `offset` to `buf`, as many as both have, and returns their number.
    pub(super) fn copy_to(&self, offset: usize, buf: &mut [u8]) -> Result<usize> {
        self.copy(offset, buf.len(), |part, done| {
            part.read(buf.get_mut(done..).unwrap_or_default(), 0)
        })
    }

    /// Copies `buf` to the bytes at `offset`, as many as both have, and returns their number.
    pub(super) fn copy_from(&self, offset: usize, buf: &[u8]) -> Result<usize> {
        self.copy(offset, buf.len(), |part, done| {
            part.write(buf.get(done..).unwrap_or_default(), 0)
        })
    }

    /// Calls `copy` for each part of a range, with the number of bytes before it.
    ///
    /// The range is the `count` bytes at `offset`. Ends at the first part that is not copied
    /// completely: a fault, or an error.
    ///
    /// # Errors
    ///
    /// Returns the error of the first part.
    fn copy(
        &self,
        offset: usize,
        count: usize,
        mut copy: impl FnMut(&VolatileSlice<'a, S>, usize) -> volatile_memory::Result<usize>,
    ) -> Result<usize> {
        let mut done = 0usize;
        for part in self.parts(self.position(offset), count) {
            match copy(&part, done) {
                Ok(moved) => {
                    done = done.saturating_add(moved);
                    if moved < part.len() {
                        break;
                    }
                }
                Err(error) if done == 0 => return Err(error.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Transfers by one system call. Returns the number of bytes moved.
    ///
    /// The call covers the first [`MAX_VECTORS`] segments and [`MAX_BYTES`]. A read marks all its
    /// bytes, unless its [result](FilePosition::may_have_written) shows that none were written.
    pub(super) fn transfer_once(
        &self,
        direction: Transfer,
        fd: BorrowedFd<'_>,
        position: FilePosition,
    ) -> std::io::Result<usize> {
        let (result, reached) = self.call_first(direction, fd, position);
        if direction == Transfer::Read && position.may_have_written(&result) {
            self.mark_dirty(0, reached);
        }
        result
    }

    /// Reads one packet by one system call. Returns the number of bytes read.
    ///
    /// Marks these bytes. If the call fails, marks all bytes of the call, unless nothing was
    /// written.
    pub(super) fn read_packet(&self, fd: BorrowedFd<'_>) -> std::io::Result<usize> {
        let (result, reached) = self.call_first(Transfer::Read, fd, FilePosition::Current);
        if FilePosition::Current.may_have_written(&result) {
            self.mark_dirty(0, *result.as_ref().unwrap_or(&reached));
        }
        result
    }

    /// Makes one system call for the first segments, and marks nothing.
    ///
    /// Also returns the number of bytes that the call covers.
    fn call_first(
        &self,
        direction: Transfer,
        fd: BorrowedFd<'_>,
        position: FilePosition,
    ) -> (std::io::Result<usize>, usize) {
        let shortened = self.shortened();
        let vectors = shortened.as_ref().unwrap_or(&self.vectors);
        let result = self.transfer_vectors(vectors, direction, fd, position);
        (result, total_len(vectors))
    }

    /// Transfers all bytes, by as many system calls as necessary.
    ///
    /// Returns the number of bytes moved, and the error that ended the transfer early, if there was
    /// one. A read marks these bytes. After an error, it also marks what a failed call or a short
    /// call could reach, and may have written without counting it.
    pub(super) fn transfer_all(
        &self,
        direction: Transfer,
        fd: BorrowedFd<'_>,
        position: FilePosition,
    ) -> (usize, Option<std::io::Error>) {
        let mut done = 0usize;
        // The position of the byte at `done`. It is kept, because a peer may send single bytes.
        let mut at = (0, 0);
        // The end of the bytes that a call may have written, counted or not.
        let mut reached = 0usize;
        let mut rest = self.shortened();
        // A bitmap may also panic when it is sliced for the rest of the vectors.
        let reads = direction == Transfer::Read;
        let on_panic = reads.then(|| OnPanic(|| self.mark_all()));
        while done < self.len() {
            let vectors = rest.as_ref().unwrap_or(&self.vectors);
            let result = self.transfer_vectors(vectors, direction, fd, position.after(done));
            if reads && position.may_have_written(&result) {
                reached = reached.max(done.saturating_add(total_len(vectors)));
            }
            let error = match result {
                Ok(0) => early_end(direction),
                Ok(moved) => {
                    if reads && moved >= self.len() {
                        // The usual case.
                        self.mark_all();
                    } else if reads {
                        self.mark_dirty_from(at, moved);
                    }
                    done = done.saturating_add(moved);
                    at = self.position_after(at, moved);
                    // Collecting the parts takes no longer than the call, which checks all vectors.
                    rest = Some(self.vectors_at(at));
                    continue;
                }
                Err(error) => error,
            };
            // An earlier call may have reached these bytes, and had a short count. They are marked
            // only here: marking them after each short count would take quadratic time.
            self.mark_dirty_from(at, reached.saturating_sub(done));
            core::mem::forget(on_panic);
            return (done, Some(error));
        }
        core::mem::forget(on_panic);
        (done, None)
    }

    /// Returns the vectors of the first call, unless it covers all segments.
    fn shortened(&self) -> Option<InlineVec<IoVector, INLINE>> {
        let is_complete = self.count() <= MAX_VECTORS && self.len <= MAX_BYTES;
        (!is_complete).then(|| self.vectors_at((0, 0)))
    }

    /// Returns the vectors of a call at a position: up to [`MAX_VECTORS`], and [`MAX_BYTES`].
    fn vectors_at(&self, position: (usize, usize)) -> InlineVec<IoVector, INLINE> {
        let parts = self.parts(position, MAX_BYTES).take(MAX_VECTORS);
        parts.map(|part| IoVector::new(&part)).collect()
    }

    /// Makes the system call. The caller marks the bytes that a read may have written.
    fn transfer_vectors(
        &self,
        vectors: &[IoVector],
        direction: Transfer,
        fd: BorrowedFd<'_>,
        position: FilePosition,
    ) -> std::io::Result<usize> {
        debug_assert!(vectors.len() <= MAX_VECTORS && total_len(vectors) <= MAX_BYTES);
        loop {
            // SAFETY: each of `vectors` was made from a slice in `self.slices` or a part of one.
            // Its memory is mapped while the segment exists (invariant of this module), and `self`
            // is borrowed here. No Rust reference to it exists, by the contract of
            // `VolatileSlice::with_bitmap`, or because only the hold and the guest use its mapping.
            match unsafe { call(direction, fd, position, IoVector::as_iovecs(vectors)) } {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Removes the segments that were added through it, unless they are [kept](Self::keep).
///
/// So the segments stay as they were when an iterator of a user's memory fails or panics.
pub(super) struct Addition<'s, 'a, S: BitmapSlice> {
    segments: &'s mut Segments<'a, S>,
    /// The number of segments to keep.
    count: usize,
    /// The number of bytes in them.
    len: usize,
}

impl<'a, S: BitmapSlice> Addition<'_, 'a, S> {
    /// Appends slices, like [`Segments::gather`].
    pub(super) fn gather(
        &mut self,
        slices: &mut impl GuestMemorySliceIterator<'a, S>,
        limit: usize,
    ) -> Result<bool> {
        self.segments.gather(slices, limit)
    }

    /// Returns the number of bytes that were added.
    pub(super) fn len(&self) -> usize {
        self.segments.len.saturating_sub(self.len)
    }

    /// Keeps the segments that were added.
    pub(super) fn keep(mut self) {
        (self.count, self.len) = (self.segments.count(), self.segments.len);
    }
}

impl<S: BitmapSlice> Drop for Addition<'_, '_, S> {
    fn drop(&mut self) {
        // The removed segments were never lent.
        self.segments.len = self.len;
        self.segments.vectors.truncate(self.count);
        self.segments.slices.truncate(self.count);
    }
}

/// Marks the segments if the kernel or a device may have written to them.
impl<S: BitmapSlice> Drop for Segments<'_, S> {
    fn drop(&mut self) {
        if !*self.lent.get_mut() {
            return;
        }
        if std::thread::panicking() {
            // Another panic would end the process.
            drop(OnPanic(|| self.mark_all()));
        } else {
            self.mark_all();
        }
    }
}

/// Returns the number of bytes that vectors name.
fn total_len(vectors: &[IoVector]) -> usize {
    let lengths = IoVector::as_iovecs(vectors).iter().map(|one| one.iov_len);
    lengths.fold(0, usize::saturating_add)
}

/// Returns the error for a system call that moved no bytes.
#[cold]
fn early_end(direction: Transfer) -> std::io::Error {
    match direction {
        Transfer::Read => std::io::Error::new(
            ErrorKind::UnexpectedEof,
            "the source ended before the range was filled",
        ),
        Transfer::Write => {
            std::io::Error::new(ErrorKind::WriteZero, "the target accepts no more bytes")
        }
    }
}

#[cold]
fn out_of_memory(_: TryReserveError) -> Error {
    Error::IOError(ErrorKind::OutOfMemory.into())
}

/// Returns the error for a range that needs more than `limit` segments.
#[cold]
pub(super) fn too_many(addr: GuestAddress, count: usize, limit: usize) -> Error {
    let why = format!(
        "range of 0x{count:x} bytes at 0x{:x} has more than {limit} segments; \
         use smaller ranges, or IoBuffer::set_segment_limit",
        addr.0
    );
    Error::IOError(std::io::Error::new(ErrorKind::InvalidInput, why))
}
