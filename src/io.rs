//! Streams that read into and write from guest memory without a buffer between.
//!
//! [`std::io::Read`] and [`std::io::Write`] want a `&[u8]`, which guest memory can never be. [`ReadVolatile`] and [`WriteVolatile`] want
//! a [`VolatileSlice`]: for a file, a socket or a descriptor, the kernel copies straight into guest memory.
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
//!
//! System calls: with the feature `rawfd`, `read(2)` and `write(2)`, and no others.

use std::io::{Cursor, ErrorKind};

use crate::bitmap::BitmapSlice;
use crate::bytes::Bytes;
use crate::convert::to_u64;
use crate::volatile_memory::{Error as VolatileMemoryError, VolatileSlice};

#[cfg(all(feature = "rawfd", unix))]
mod rawfd;

/// What bytes can be read from, straight into volatile memory.
pub trait ReadVolatile {
    /// Reads some bytes into `buf`, and returns how many; 0 if `buf` is empty or there are no more.
    ///
    /// The bytes are the first ones of `buf`. The other rules are those of [`std::io::Read::read`].
    ///
    /// # Errors
    ///
    /// If nothing could be read. `ErrorKind::Interrupted` asks to try again.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError>;

    /// Fills the whole of `buf`.
    ///
    /// # Errors
    ///
    /// What [`read_volatile`](Self::read_volatile) answers, except `Interrupted`, after which it is tried again; `UnexpectedEof`
    /// if the bytes end first. How many had been read is not told.
    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        let mut rest = buf.offset(0)?;
        while !rest.is_empty() {
            match retry_interrupted(|| self.read_volatile(&mut rest))? {
                0 => return Err(unexpected_eof()),
                moved => rest = rest.offset(moved)?,
            }
        }
        Ok(())
    }
}

/// What bytes can be written to, straight from volatile memory.
pub trait WriteVolatile {
    /// Writes some bytes from `buf`, and returns how many; 0 if `buf` is empty or no more are taken.
    ///
    /// The bytes are the first ones of `buf`. The other rules are those of [`std::io::Write::write`].
    ///
    /// # Errors
    ///
    /// If nothing could be written. `ErrorKind::Interrupted` asks to try again.
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError>;

    /// Writes the whole of `buf`.
    ///
    /// # Errors
    ///
    /// What [`write_volatile`](Self::write_volatile) answers, except `Interrupted`, after which it is tried again; `WriteZero`
    /// if no more is taken. How many had been written is not told.
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

/// Repeats what a signal interrupted.
#[inline]
pub(crate) fn retry_interrupted<T>(
    mut attempt: impl FnMut() -> Result<T, VolatileMemoryError>,
) -> Result<T, VolatileMemoryError> {
    loop {
        match attempt() {
            Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
            answer => return answer,
        }
    }
}

#[cold]
fn unexpected_eof() -> VolatileMemoryError {
    VolatileMemoryError::IOError(std::io::Error::new(
        ErrorKind::UnexpectedEof,
        "the source ended before the buffer was full",
    ))
}

#[cold]
pub(crate) fn write_zero() -> VolatileMemoryError {
    VolatileMemoryError::IOError(std::io::Error::new(
        ErrorKind::WriteZero,
        "the target takes no more bytes",
    ))
}

/// Reads from the slice, which then begins behind what was read.
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
        // Nothing is moved if it is not enough: the length is known beforehand.
        if self.len() < buf.len() {
            return Err(unexpected_eof());
        }
        self.read_volatile(buf).map(|_| ())
    }
}

/// Writes into the slice, which then begins behind what was written.
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

/// Appends to the vector.
impl WriteVolatile for Vec<u8> {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let old_len = self.len();
        // Guests choose lengths: without memory for this one, an error and not the end of the process.
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

/// Reads from the position of the cursor, which moves.
impl<T> ReadVolatile for Cursor<T>
where
    T: AsRef<[u8]>,
{
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let moved = behind_position(self).read_volatile(buf)?;
        advance(self, moved);
        Ok(moved)
    }

    fn read_exact_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<(), VolatileMemoryError> {
        behind_position(self).read_exact_volatile(buf)?;
        advance(self, buf.len());
        Ok(())
    }
}

/// Writes at the position of the cursor, which moves; no further than the slice is long.
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

/// What is left to read: nothing if the position is behind the end.
fn behind_position<T: AsRef<[u8]>>(cursor: &Cursor<T>) -> &[u8] {
    let all = cursor.get_ref().as_ref();
    all.get(position_within(cursor.position(), all.len())..)
        .unwrap_or_default()
}

/// The position as an index, no further than `len`.
fn position_within(position: u64, len: usize) -> usize {
    usize::try_from(position).map_or(len, |position| position.min(len))
}

fn advance<T>(cursor: &mut Cursor<T>, moved: usize) {
    cursor.set_position(cursor.position().saturating_add(to_u64(moved)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `step` bytes at a time, and is interrupted before each.
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
    fn three_bytes_at_a_time_fill_a_buffer() {
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

    #[test]
    fn a_reader_that_claims_too_much_gets_an_error() {
        struct Liar;
        impl ReadVolatile for Liar {
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
            Liar.read_exact_volatile(&mut slice),
            Err(VolatileMemoryError::OutOfBounds { .. })
        ));
    }

    #[test]
    fn slices_are_used_up() {
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
    fn vectors_grow_by_what_is_written() {
        let mut memory = *b"guest";
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let mut target = b"the ".to_vec();
        slice.write_all_volatile_to(0, &mut target, 5).unwrap();
        assert_eq!(target, b"the guest");
    }

    #[test]
    fn cursors_move_and_stop_at_the_end() {
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
