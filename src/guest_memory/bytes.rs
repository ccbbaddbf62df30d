//! [`Bytes`] by guest address.
//!
//! Nearly every access lies in one piece of host memory, and goes to it without an iterator; what does not is moved piece by
//! piece, out of line.

use core::mem::size_of;
use core::sync::atomic::Ordering;

use super::{Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions, Result};
use crate::address::Address;
use crate::bitmap::BS;
use crate::bytes::{AtomicAccess, ByteValued, Bytes};
use crate::io::{retry_interrupted, write_zero, ReadVolatile, WriteVolatile};
use crate::volatile_memory::{self, VolatileSlice};

/// Addresses are guest physical addresses, or IOVAs where an IOMMU is on.
///
/// An access that begins in a hole, or in memory that does not permit it, is an error. One that runs into such a place moves what
/// lies before it: see [`Bytes`] for how that is reported. The range may end at 2^64 exactly, and never passes it.
impl<T: GuestMemory + ?Sized> Bytes<GuestAddress> for T {
    type E = Error;

    #[inline]
    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        if let Some(slice) = self.slice_in_one_piece(addr, buf.len(), Permissions::Write) {
            return Ok(slice.write(buf, 0)?);
        }
        write_pieces(self, buf, addr)
    }

    #[inline]
    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        if let Some(slice) = self.slice_in_one_piece(addr, buf.len(), Permissions::Read) {
            return Ok(slice.read(buf, 0)?);
        }
        read_pieces(self, buf, addr)
    }

    #[inline]
    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        if let Some(slice) = self.slice_in_one_piece(addr, buf.len(), Permissions::Write) {
            return Ok(slice.write_slice(buf, 0)?);
        }
        write_slice_pieces(self, buf, addr)
    }

    #[inline]
    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        if let Some(slice) = self.slice_in_one_piece(addr, buf.len(), Permissions::Read) {
            return Ok(slice.read_slice(buf, 0)?);
        }
        read_slice_pieces(self, buf, addr)
    }

    #[inline]
    fn write_obj<O: ByteValued>(&self, val: O, addr: GuestAddress) -> Result<()> {
        if let Some(slice) = self.slice_in_one_piece(addr, size_of::<O>(), Permissions::Write) {
            return Ok(slice.write_obj(val, 0)?);
        }
        write_slice_pieces(self, val.as_slice(), addr)
    }

    #[inline]
    fn read_obj<O: ByteValued>(&self, addr: GuestAddress) -> Result<O> {
        if let Some(slice) = self.slice_in_one_piece(addr, size_of::<O>(), Permissions::Read) {
            return Ok(slice.read_obj(0)?);
        }
        let mut value = O::zeroed();
        read_slice_pieces(self, value.as_mut_slice(), addr).map(|()| value)
    }

    fn read_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        for_each_piece(self, addr, count, Permissions::Write, |_, mut piece| {
            retry_interrupted(|| src.read_volatile(&mut piece))
        })
    }

    /// Fills memory that is scattered, from a source that delivers little at a time, until all of it has been moved.
    ///
    /// # Errors
    ///
    /// [`Error::PartialBuffer`] says how many bytes were moved before the end of the source, an error or a hole; the next call
    /// meets what it was. If nothing was moved, that error itself, or `PartialBuffer` at the end of the source.
    fn read_exact_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<()>
    where
        F: ReadVolatile,
    {
        until_done(addr, count, |addr, count| {
            self.read_volatile_from(addr, src, count)
        })
    }

    fn write_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        for_each_piece(self, addr, count, Permissions::Read, |_, piece| {
            retry_interrupted(|| dst.write_volatile(&piece))
        })
    }

    /// Writes out memory that is scattered, to a target that takes little at a time, until all of it has been moved.
    ///
    /// # Errors
    ///
    /// [`Error::PartialBuffer`] says how many bytes were moved before the target took no more, an error or a hole; the next call
    /// meets what it was. If nothing was moved, that error itself; `ErrorKind::WriteZero` if the target takes nothing.
    fn write_all_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        let answer = until_done(addr, count, |addr, count| {
            self.write_volatile_to(addr, dst, count)
        });
        match answer {
            Err(Error::PartialBuffer { completed: 0, .. }) => Err(write_zero().into()),
            answer => answer,
        }
    }

    #[inline]
    fn store<O: AtomicAccess>(&self, val: O, addr: GuestAddress, order: Ordering) -> Result<()> {
        match self.slice_in_one_piece(addr, size_of::<O>(), Permissions::Write) {
            Some(slice) => Ok(slice.store(val, 0, order)?),
            None => Err(not_in_one_piece(self, addr, size_of::<O>(), Permissions::Write)),
        }
    }

    #[inline]
    fn load<O: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<O> {
        match self.slice_in_one_piece(addr, size_of::<O>(), Permissions::Read) {
            Some(slice) => Ok(slice.load(0, order)?),
            None => Err(not_in_one_piece(self, addr, size_of::<O>(), Permissions::Read)),
        }
    }
}

/// Why an atomic access has no slice to go to.
#[cold]
fn not_in_one_piece<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
) -> Error {
    match memory.get_slices(addr, count, access) {
        Err(error) => error,
        Ok(mut pieces) => match pieces.next() {
            Some(Err(error)) => error,
            // There is memory, but it ends or is scattered.
            _ => Error::InvalidBackendAddress,
        },
    }
}

#[cold]
fn read_slice_pieces<M: GuestMemory + ?Sized>(memory: &M, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
    let completed = read_pieces(memory, buf, addr)?;
    if completed != buf.len() {
        return Err(Error::PartialBuffer {
            expected: buf.len(),
            completed,
        });
    }
    Ok(())
}

#[cold]
fn write_slice_pieces<M: GuestMemory + ?Sized>(memory: &M, buf: &[u8], addr: GuestAddress) -> Result<()> {
    let completed = write_pieces(memory, buf, addr)?;
    if completed != buf.len() {
        return Err(Error::PartialBuffer {
            expected: buf.len(),
            completed,
        });
    }
    Ok(())
}

#[cold]
fn read_pieces<M: GuestMemory + ?Sized>(memory: &M, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
    for_each_piece(
        memory,
        addr,
        buf.len(),
        Permissions::Read,
        |done, piece| match buf.get_mut(done..).and_then(|rest| rest.get_mut(..piece.len())) {
            Some(part) => piece.read(part, 0),
            None => Ok(0),
        },
    )
}

#[cold]
fn write_pieces<M: GuestMemory + ?Sized>(memory: &M, buf: &[u8], addr: GuestAddress) -> Result<usize> {
    for_each_piece(
        memory,
        addr,
        buf.len(),
        Permissions::Write,
        |done, piece| match buf.get(done..).and_then(|rest| rest.get(..piece.len())) {
            Some(part) => piece.write(part, 0),
            None => Ok(0),
        },
    )
}

/// Moves a range piece by piece, and returns how many bytes were moved. `transfer` is given how many were before, and a piece.
///
/// Stops at the first piece that is not moved whole, so that the bytes moved are without a gap; and at the first error, which is
/// returned only if nothing was moved.
fn for_each_piece<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
    mut transfer: impl FnMut(usize, VolatileSlice<'a, BS<'a, M::Bitmap>>) -> volatile_memory::Result<usize>,
) -> Result<usize> {
    if count == 0 {
        return Ok(0);
    }
    let mut done = 0usize;
    let mut one_piece = |piece: VolatileSlice<'a, BS<'a, M::Bitmap>>, done: &mut usize| -> Result<bool> {
        let wanted = piece.len();
        match transfer(*done, piece) {
            Ok(moved) => {
                // A stream that claims more than it was given has not moved more.
                *done = done.saturating_add(moved.min(wanted));
                Ok(moved >= wanted)
            }
            Err(error) if *done == 0 => Err(error.into()),
            Err(_) => Ok(false),
        }
    };
    if let Some(piece) = memory.slice_in_one_piece(addr, count, access) {
        one_piece(piece, &mut done)?;
        return Ok(done);
    }
    for piece in memory.get_slices(addr, count, access)?.stop_on_error()? {
        if !one_piece(piece, &mut done)? {
            break;
        }
    }
    Ok(done)
}

/// Repeats a transfer that moves at least a byte each time, until `count` bytes have been moved.
fn until_done(
    addr: GuestAddress,
    count: usize,
    mut transfer: impl FnMut(GuestAddress, usize) -> Result<usize>,
) -> Result<()> {
    let mut completed = 0usize;
    while completed < count {
        let partial = Err(Error::PartialBuffer {
            expected: count,
            completed,
        });
        let Some(next) = u64::try_from(completed)
            .ok()
            .and_then(|done| addr.checked_add(done))
        else {
            return partial;
        };
        match transfer(next, count.saturating_sub(completed)) {
            Ok(0) => return partial,
            Ok(moved) => completed = completed.saturating_add(moved),
            Err(error) if completed == 0 => return Err(error),
            Err(_) => return partial,
        }
    }
    Ok(())
}
