//! Streams that read into and write from guest memory without a buffer in between.
//!
//! [`std::io::Read`] and [`std::io::Write`] take a `&[u8]`. A reference to guest memory cannot be
//! one, because the guest may change the bytes. [`ReadVolatile`] and [`WriteVolatile`] take a
//! [`VolatileSlice`] instead. For files, sockets and other descriptors, the kernel copies directly
//! to or from guest memory.
//!
//! System calls: with the feature `rawfd`, `read(2)` and `write(2)`; none for 0 bytes. Methods that
//! repeat a call after `EINTR` do so without a limit. The server of a FUSE file can cause such a
//! loop. It can also block the call by not replying.
//!
//! # Dirty tracking
//!
//! A source marks the pages that it writes. Writes through the methods of the slice are marked
//! exactly. A system call that gets a pointer to guest memory may write more bytes than it counts.
//! The kernel does not count a message that it copied in part, and a disk does not write in order.
//!
//! This crate therefore marks all bytes that the system call was given. A read at the current
//! position does not mark them after a count of 0, `EAGAIN` and `EINTR`. A stream returns these
//! before the kernel writes. A read at an offset ([`vectored`](crate::vectored)) marks them after
//! each result.
//!
//! A custom source, and a custom call with pointers
//! ([`ptr_guard_mut`](VolatileSlice::ptr_guard_mut), [`vectored`](crate::vectored)), must follow
//! this rule. `IoBuffer::read_packet_from` marks fewer bytes: it is for descriptors that count all
//! bytes.
//!
//! Two kinds of descriptors break this rule for streams. The pages that they write before such a
//! result are not marked:
//!
//! - A UDP socket without a filter. The kernel writes a packet with a wrong checksum, drops it, and
//!   returns `EAGAIN` or the next packet. With a filter (`SO_ATTACH_FILTER`, socket(7)), which may
//!   accept everything, it verifies checksums before it copies.
//! - A file with `O_DIRECT` on a file system that reads several parts at once, such as FUSE with
//!   `FUSE_ASYNC_DIO`. If its server replies to the first part with no bytes, `EAGAIN` or `EINTR`,
//!   the call returns that, after other parts were written. Read such a file at an offset.
//!
//! Marking takes time in proportion to the range. If a stream delivers a long range in small parts,
//! pass parts of the range, or use an exact method.
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Bytes, ReadVolatile, VolatileSlice};
//!
//! let mut memory = [0u8; 8];
//! let slice = VolatileSlice::from(memory.as_mut_slice());
//! let mut source: &[u8] = b"sector";
//! assert_eq!(source.read_volatile(&mut slice.offset(2)?)?, 6);
//! assert_eq!(&memory, b"\0\0sector");
//! # Ok::<(), vm_memory::VolatileMemoryError>(())
//! ```

use std::io::{Cursor, ErrorKind};

use crate::bitmap::BitmapSlice;
use crate::bytes::Bytes;
use crate::convert::to_u64;
use crate::volatile_memory::{Error as VolatileMemoryError, VolatileSlice};

#[cfg(all(feature = "rawfd", unix))]
mod rawfd;

/// A source of bytes that can fill volatile memory directly.
///
/// `&[u8]` and [`Cursor`] implement it, and with the feature `rawfd` also files, sockets and other
/// descriptors. [`Bytes::read_volatile_from`] reads from a source by guest address.
///
/// # Examples
///
/// A device that produces its bytes while they are read:
///
/// ```
/// use vm_memory::bitmap::BitmapSlice;
/// use vm_memory::{Bytes, ReadVolatile, VolatileMemoryError, VolatileSlice};
///
/// struct Zeros;
///
/// impl ReadVolatile for Zeros {
///     fn read_volatile<B: BitmapSlice>(
///         &mut self,
///         buf: &mut VolatileSlice<B>,
///     ) -> Result<usize, VolatileMemoryError> {
///         buf.fill_with_byte(0)?;
///         Ok(buf.len())
///     }
/// }
///
/// let mut memory = [0xffu8; 4];
/// let slice = VolatileSlice::from(memory.as_mut_slice());
/// slice.read_exact_volatile_from(1, &mut Zeros, 2)?;
/// assert_eq!(memory, [0xff, 0, 0, 0xff]);
/// # Ok::<(), VolatileMemoryError>(())
/// ```
#[doc(alias = "zero-copy")]
#[doc(alias = "DMA")]
#[doc(alias = "read(2)")]
pub trait ReadVolatile {
    /// Reads bytes into the beginning of `buf`, and returns their number.
    ///
    /// Returns 0 if `buf` is empty or the source is at its end. May return fewer bytes than `buf`
    /// has room for, like [`std::io::Read::read`]. An implementation marks all pages that it may
    /// have written ([rule](self#dirty-tracking)). It may advance `buf`: this crate passes a slice
    /// that it does not use afterwards.
    ///
    /// # Errors
    ///
    /// Returns an error if no byte was read. After `ErrorKind::Interrupted`, callers try again.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError>;

    /// Fills all of `buf`, at most 16 MiB in one call of [`read_volatile`](Self::read_volatile).
    ///
    /// # Errors
    ///
    /// Returns the error of [`read_volatile`](Self::read_volatile), except `Interrupted`, which is
    /// retried. Returns `UnexpectedEof` if the source ends before `buf` is full. The error does not
    /// say how many bytes were read.
    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        let mut rest = buf.offset(0)?;
        while !rest.is_empty() {
            let part = first_part(&rest);
            match read_once(self, &part)? {
                0 => return Err(unexpected_eof()),
                moved => {
                    // Fails if the source claims more bytes than it was given.
                    part.offset(moved)?;
                    rest = rest.offset(moved)?;
                }
            }
        }
        Ok(())
    }
}

/// A sink of bytes that can read volatile memory directly.
///
/// `Vec<u8>`, `&mut [u8]` and `Cursor<&mut [u8]>` implement it, and with the feature `rawfd` also
/// files, sockets and other descriptors. [`Bytes::write_volatile_to`] writes to a sink by guest
/// address.
///
/// # Examples
///
/// ```
/// use vm_memory::{VolatileSlice, WriteVolatile};
///
/// let mut memory = *b"guest";
/// let slice = VolatileSlice::from(memory.as_mut_slice());
/// let mut sink = b"the ".to_vec();
/// sink.write_all_volatile(&slice)?;
/// assert_eq!(sink, b"the guest");
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
#[doc(alias = "zero-copy")]
#[doc(alias = "DMA")]
#[doc(alias = "write(2)")]
pub trait WriteVolatile {
    /// Writes bytes from the beginning of `buf`, and returns their number.
    ///
    /// Returns 0 if `buf` is empty or the sink accepts no more bytes. May return fewer bytes than
    /// `buf` has, like [`std::io::Write::write`].
    ///
    /// # Errors
    ///
    /// Returns an error if no byte was written. After `ErrorKind::Interrupted`, callers try again.
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError>;

    /// Writes all of `buf`.
    ///
    /// A region or a slice calls this method. A [`GuestMemory`](crate::GuestMemory) repeats
    /// [`write_volatile`](Self::write_volatile) instead, to count the bytes before an error. A sink
    /// that waits for its peer must also do so in `write_volatile`.
    ///
    /// # Errors
    ///
    /// Returns the error of [`write_volatile`](Self::write_volatile), except `Interrupted`, which
    /// is retried. Returns `WriteZero` if the sink accepts no more bytes. The error does not say
    /// how many bytes were written.
    fn write_all_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        let mut rest = buf.offset(0)?;
        while !rest.is_empty() {
            match retry_interrupted(|| self.write_volatile(&rest))? {
                0 => return Err(write_zero()),
                moved => rest = rest.offset(moved)?,
            }
        }
        Ok(())
    }
}

/// Reads into the beginning of `buf`, and repeats the read while it is interrupted.
///
/// Returns the count that `source` returned.
///
/// Each read gets its own copy of the slice, because a source may advance it. A caller that
/// compares the count with `buf.len()` then uses the length that the source was given.
pub(crate) fn read_once<R: ReadVolatile + ?Sized, B: BitmapSlice>(
    source: &mut R,
    buf: &VolatileSlice<'_, B>,
) -> Result<usize, VolatileMemoryError> {
    retry_interrupted(|| source.read_volatile(&mut buf.clone()))
}

/// Repeats `attempt` while it returns `ErrorKind::Interrupted`.
#[inline]
pub(crate) fn retry_interrupted<T>(
    mut attempt: impl FnMut() -> Result<T, VolatileMemoryError>,
) -> Result<T, VolatileMemoryError> {
    loop {
        match attempt() {
            Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The maximum number of bytes that a loop passes to a source in one call.
///
/// After a short count, a source may mark all that it was given. Without a limit, filling a long
/// range from a socket would take quadratic time. With it, marking takes less time than the system
/// call.
const PART_MAX: usize = 16 << 20;

/// Returns the bytes of `rest` that a loop passes to a source next.
pub(crate) fn first_part<'a, B: BitmapSlice>(rest: &VolatileSlice<'a, B>) -> VolatileSlice<'a, B> {
    rest.first(PART_MAX)
}

/// Returns whether a read from a stream with this result may have written bytes, counted or not.
///
/// The kernel returns 0, `EAGAIN` and `EINTR` before it writes. The documentation of this module
/// names the exceptions.
#[cfg(all(feature = "rawfd", unix))]
pub(crate) fn stream_may_have_written(result: &std::io::Result<usize>) -> bool {
    match result {
        Ok(moved) => *moved != 0,
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}

#[cold]
fn unexpected_eof() -> VolatileMemoryError {
    VolatileMemoryError::IOError(std::io::Error::new(
        ErrorKind::UnexpectedEof,
        "source ended before the buffer was full",
    ))
}

#[cold]
pub(crate) fn write_zero() -> VolatileMemoryError {
    VolatileMemoryError::IOError(std::io::Error::new(
        ErrorKind::WriteZero,
        "sink accepts no more bytes",
    ))
}

/// Reads from the beginning of the slice, and advances it past the bytes read.
impl ReadVolatile for &[u8] {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let moved = buf.write(self.get(..buf.len()).unwrap_or(self), 0)?;
        *self = self.get(moved..).unwrap_or_default();
        Ok(moved)
    }

    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        // Without enough bytes, no byte is moved: the length is known in advance.
        if self.len() < buf.len() {
            return Err(unexpected_eof());
        }
        // The first call moves all bytes, or those before a fault. The second returns the fault.
        let mut rest = buf.offset(0)?;
        while !rest.is_empty() {
            let moved = self.read_volatile(&mut rest)?;
            rest = rest.offset(moved)?;
        }
        Ok(())
    }
}

/// Writes to the beginning of the slice, and advances it past the bytes written.
impl WriteVolatile for &mut [u8] {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let count = self.len().min(buf.len());
        let moved = buf.read(self.get_mut(..count).unwrap_or_default(), 0)?;
        *self = core::mem::take(self).get_mut(moved..).unwrap_or_default();
        Ok(moved)
    }
}

/// Appends to the vector, which grows as needed.
impl WriteVolatile for Vec<u8> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let old_len = self.len();
        // A guest may choose the length: a failed allocation must not abort the process.
        self.try_reserve(buf.len()).map_err(|e| {
            VolatileMemoryError::IOError(std::io::Error::new(ErrorKind::OutOfMemory, e))
        })?;
        self.resize(old_len.saturating_add(buf.len()), 0);
        let moved = self
            .get_mut(old_len..)
            .map_or(Ok(0), |target| buf.read(target, 0));
        self.truncate(old_len.saturating_add(*moved.as_ref().unwrap_or(&0)));
        moved
    }
}

/// Reads at the position of the cursor, and advances it.
impl<T> ReadVolatile for Cursor<T>
where
    T: AsRef<[u8]>,
{
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let moved = remaining(self).read_volatile(buf)?;
        advance(self, moved);
        Ok(moved)
    }

    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        remaining(self).read_exact_volatile(buf)?;
        advance(self, buf.len());
        Ok(())
    }
}

/// Writes at the position of the cursor up to the end of the slice, and advances it.
impl WriteVolatile for Cursor<&mut [u8]> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let start = position_within(self.position(), self.get_ref().len());
        let moved = match self.get_mut().get_mut(start..) {
            Some(mut target) => target.write_volatile(buf)?,
            None => 0,
        };
        advance(self, moved);
        Ok(moved)
    }
}

/// Returns the remaining bytes, or none if the position is past the end.
fn remaining<T: AsRef<[u8]>>(cursor: &Cursor<T>) -> &[u8] {
    let all = cursor.get_ref().as_ref();
    all.get(position_within(cursor.position(), all.len())..)
        .unwrap_or_default()
}

/// Returns the position as an index, at most `len`.
fn position_within(position: u64, len: usize) -> usize {
    usize::try_from(position).map_or(len, |position| position.min(len))
}

fn advance<T>(cursor: &mut Cursor<T>, moved: usize) {
    cursor.set_position(cursor.position().saturating_add(to_u64(moved)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source that is interrupted before each read, and then reads `step` bytes.
    struct Slow<'a> {
        bytes: &'a [u8],
        step: usize,
        interrupt: bool,
    }

    impl ReadVolatile for Slow<'_> {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            self.interrupt = !self.interrupt;
            if self.interrupt {
                return Err(VolatileMemoryError::IOError(ErrorKind::Interrupted.into()));
            }
            let count = self.step.min(buf.len());
            self.bytes.read_volatile(&mut buf.subslice(0, count)?)
        }
    }

    #[test]
    fn read_exact_volatile_from_slow_source_fills_buffer() {
        let mut memory = [0u8; 10];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let source: Vec<u8> = (1..=12).collect();
        let mut slow = Slow {
            bytes: &source,
            step: 3,
            interrupt: false,
        };
        slow.read_exact_volatile(&mut slice.offset(0).unwrap())
            .unwrap();
        assert_eq!(slow.bytes, [11, 12]);
        let end = slow
            .read_exact_volatile(&mut slice.offset(0).unwrap())
            .unwrap_err();
        assert!(
            matches!(end, VolatileMemoryError::IOError(e) if e.kind() == ErrorKind::UnexpectedEof)
        );
        assert_eq!(memory, [11, 12, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    /// A source that advances the slice before it reports an interrupt, and after it read.
    struct Advancing<'a>(Slow<'a>);

    impl ReadVolatile for Advancing<'_> {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            let result = self.0.read_volatile(buf);
            *buf = buf.offset(*result.as_ref().unwrap_or(&1))?;
            result
        }
    }

    #[test]
    fn slice_reads_from_advancing_source_leave_no_gap() {
        let mut memory = [0u8; 10];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let source: Vec<u8> = (1..=12).collect();
        let mut advancing = Advancing(Slow {
            bytes: &source,
            step: 4,
            interrupt: false,
        });
        let read = slice.read_volatile_from(8, &mut advancing, 2);
        assert_eq!(read.unwrap(), 2);
        slice
            .read_exact_volatile_from(0, &mut advancing, 8)
            .unwrap();
        assert_eq!(memory, [3, 4, 5, 6, 7, 8, 9, 10, 1, 2]);
    }

    #[test]
    fn read_exact_volatile_with_excessive_count_returns_error() {
        struct Excessive;
        impl ReadVolatile for Excessive {
            fn read_volatile<B: BitmapSlice>(
                &mut self,
                buf: &mut VolatileSlice<B>,
            ) -> Result<usize, VolatileMemoryError> {
                Ok(buf.len() + 1)
            }
        }
        let mut memory = [0u8; 4];
        let mut slice = VolatileSlice::from(memory.as_mut_slice());
        assert!(matches!(
            Excessive.read_exact_volatile(&mut slice),
            Err(VolatileMemoryError::OutOfBounds { .. })
        ));
    }

    #[test]
    fn slice_streams_advance_past_moved_bytes() {
        let mut memory = [0u8; 4];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let mut source: &[u8] = &[1, 2, 3, 4, 5];
        assert_eq!(slice.read_volatile_from(1, &mut source, 9).unwrap(), 3);
        assert_eq!(source, [4, 5]);
        assert!(slice.read_exact_volatile_from(0, &mut source, 3).is_err());
        assert_eq!(source, [4, 5]);

        let mut target = [0u8; 3];
        let mut rest = target.as_mut_slice();
        assert_eq!(slice.write_volatile_to(0, &mut rest, 2).unwrap(), 2);
        assert_eq!(rest.len(), 1);
        assert!(slice.write_all_volatile_to(0, &mut rest, 2).is_err());
        assert_eq!(target, [0, 1, 0]);
    }

    #[test]
    fn write_all_volatile_to_vec_appends() {
        let mut memory = *b"guest";
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let mut target = b"the ".to_vec();
        slice.write_all_volatile_to(0, &mut target, 5).unwrap();
        assert_eq!(target, b"the guest");
    }

    #[test]
    fn cursor_streams_advance_and_stop_at_end() {
        let mut memory = [0u8; 4];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let mut source = Cursor::new(vec![1, 2, 3, 4, 5, 6]);
        slice.read_exact_volatile_from(0, &mut source, 4).unwrap();
        assert_eq!(source.position(), 4);
        assert_eq!(slice.read_volatile_from(0, &mut source, 4).unwrap(), 2);
        source.set_position(u64::MAX);
        assert_eq!(slice.read_volatile_from(0, &mut source, 4).unwrap(), 0);
        assert_eq!(source.position(), u64::MAX);

        let mut storage = [0u8; 3];
        let mut target = Cursor::new(storage.as_mut_slice());
        target.set_position(1);
        assert_eq!(slice.write_volatile_to(0, &mut target, 4).unwrap(), 2);
        assert_eq!(slice.write_volatile_to(0, &mut target, 4).unwrap(), 0);
        target.set_position(u64::MAX);
        assert_eq!(slice.write_volatile_to(0, &mut target, 4).unwrap(), 0);
        assert_eq!(storage, [0, 5, 6]);
    }
}
