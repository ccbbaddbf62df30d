//! [`Bytes`] by guest address.
//!
//! Nearly every access lies in one piece of host memory, and goes to it without an iterator; what does not is moved piece by
//! piece, out of line. The short way is always inlined: left to the compiler it is, in some builds and for some types, and an access then costs
//! twice as much.

use core::mem::{size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::{Error, GuestAddress, GuestMemory, GuestMemorySliceIterator as _, Permissions, Result};
use crate::access::{fault, Fault};
use crate::bitmap::{BitmapSlice, BS};
use crate::bytes::Bytes;
use crate::convert::to_u64;
use crate::io::{retry_interrupted, write_zero, ReadVolatile, WriteVolatile};
use crate::value::{AtomicAccess, ByteValued};
use crate::volatile_memory::{self, VolatileSlice};

/// Addresses are guest physical addresses, or IOVAs where an IOMMU is on.
///
/// An access that begins in a hole, or in memory that does not permit it, is an error. One that runs into such a place moves what
/// lies before it: see [`Bytes`] for how that is reported. The range may end at 2^64 exactly, and never passes it.
impl<T: GuestMemory + ?Sized> Bytes<GuestAddress> for T {
    type E = Error;

    #[inline(always)]
    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        let mut moved = 0;
        let done = in_one_piece(self, addr, buf.len(), Permissions::Write, |slice| {
            moved = moved_at(addr, slice, slice.write_part(buf, 0)?)?;
            Ok(())
        })?;
        match done {
            true => Ok(moved),
            false => write_pieces(self, buf, addr),
        }
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        let mut moved = 0;
        let done = in_one_piece(self, addr, buf.len(), Permissions::Read, |slice| {
            moved = moved_at(addr, slice, slice.read_part(buf, 0)?)?;
            Ok(())
        })?;
        match done {
            true => Ok(moved),
            false => read_pieces(self, buf, addr),
        }
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        let done = in_one_piece(self, addr, buf.len(), Permissions::Write, |slice| {
            slice.write_slice(buf, 0)
        })?;
        match done {
            true => Ok(()),
            false => write_slice_pieces(self, buf, addr),
        }
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        let done = in_one_piece(self, addr, buf.len(), Permissions::Read, |slice| {
            slice.read_slice(buf, 0)
        })?;
        match done {
            true => Ok(()),
            false => read_slice_pieces(self, buf, addr),
        }
    }

    #[inline(always)]
    fn write_obj<O: ByteValued>(&self, val: O, addr: GuestAddress) -> Result<()> {
        let done = in_one_piece(self, addr, size_of::<O>(), Permissions::Write, |slice| {
            slice.write_obj(val, 0)
        })?;
        match done {
            true => Ok(()),
            false => write_slice_pieces(self, val.as_slice(), addr),
        }
    }

    #[inline(always)]
    fn read_obj<O: ByteValued>(&self, addr: GuestAddress) -> Result<O> {
        let mut value = MaybeUninit::uninit();
        let mut read = None;
        let done = in_one_piece(self, addr, size_of::<O>(), Permissions::Read, |slice| {
            read = Some(slice.read_obj_into(&mut value, 0)?);
            Ok(())
        })?;
        match read {
            Some(value) if done => Ok(*value),
            _ => {
                let mut value = O::zeroed();
                read_slice_pieces(self, value.as_mut_slice(), addr).map(|()| value)
            }
        }
    }

    fn read_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        let mut moved = 0;
        let answer = for_each_piece(
            self,
            addr,
            count,
            Permissions::Write,
            &mut moved,
            |_, piece, _| {
                let mut piece = piece.clone();
                retry_interrupted(|| src.read_volatile(&mut piece))
            },
        );
        moved_first(answer, moved)
    }

    /// Fills memory that is scattered, from a source that delivers little at a time, until all of it has been moved.
    ///
    /// # Errors
    ///
    /// [`Error::PartialBuffer`] says how many bytes were moved before the end of the source, an error or a hole; the next call
    /// meets what it was. If nothing was moved, that error itself, or `PartialBuffer` at the end of the source.
    fn read_exact_volatile_from<F>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()>
    where
        F: ReadVolatile,
    {
        let mut moved = 0;
        let answer = for_each_piece(
            self,
            addr,
            count,
            Permissions::Write,
            &mut moved,
            |_, piece, moved| whole_piece(piece, moved, |rest| src.read_volatile(rest)),
        );
        all_of(count, moved_first(answer, moved)?)
    }

    /// Writes out memory that is scattered: each piece of it whole, to a target that takes little at a time.
    ///
    /// # Errors
    ///
    /// If nothing was moved: what the target answers, and `ErrorKind::WriteZero` if it takes nothing. After bytes have been moved, their count is
    /// returned first; the next call meets the error.
    fn write_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        let mut moved = 0;
        let answer = for_each_piece(
            self,
            addr,
            count,
            Permissions::Read,
            &mut moved,
            |_, piece, moved| {
                whole_piece(piece, moved, |rest| match dst.write_volatile(rest)? {
                    0 => Err(write_zero()),
                    written => Ok(written),
                })
            },
        );
        moved_first(answer, moved)
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
        all_of(count, self.write_volatile_to(addr, dst, count)?)
    }

    #[inline(always)]
    fn store<O: AtomicAccess>(&self, val: O, addr: GuestAddress, order: Ordering) -> Result<()> {
        let done = in_one_piece(self, addr, size_of::<O>(), Permissions::Write, |slice| {
            slice.store(val, 0, order)
        })?;
        match done {
            true => Ok(()),
            false => with_one_piece(self, addr, size_of::<O>(), Permissions::Write, |slice| {
                slice.store(val, 0, order)
            }),
        }
    }

    #[inline(always)]
    fn load<O: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<O> {
        let mut value = O::zeroed();
        let done = in_one_piece(self, addr, size_of::<O>(), Permissions::Read, |slice| {
            value = slice.load(0, order)?;
            Ok(())
        })?;
        match done {
            true => Ok(value),
            false => with_one_piece(self, addr, size_of::<O>(), Permissions::Read, |slice| {
                slice.load(0, order)
            }),
        }
    }
}

/// The short way: an access to bytes that lie in one piece. `false` if they do not, or may not be accessed; it has not run then.
///
/// Values and errors leave `transfer` by reference: what is handed up in an `Option<Result<_>>` is written to the stack in one size and read back
/// in another, which the processor does not forward, and that costs more than all the rest.
#[inline(always)]
fn in_one_piece<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
    transfer: impl for<'s> FnOnce(&VolatileSlice<'s, BS<'s, M::Bitmap>>) -> volatile_memory::Result<()>,
) -> Result<bool> {
    let mut failure = None;
    let ran = memory.with_contiguous_slice(addr, count, access, |slice| {
        if let Err(error) = at_guest(addr, slice, transfer(slice)) {
            failure = Some(error);
        }
    })?;
    match failure {
        Some(error) => Err(error),
        None => Ok(ran.is_some()),
    }
}

/// An atomic access to memory that lends no slice by itself: what it was translated through is held until the access is done.
#[cold]
#[inline(never)]
fn with_one_piece<'a, M: GuestMemory + ?Sized, T>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
    transfer: impl FnOnce(&VolatileSlice<'a, BS<'a, M::Bitmap>>) -> volatile_memory::Result<T>,
) -> Result<T> {
    let mut pieces = memory.get_slices(addr, count, access)?;
    match pieces.next() {
        Some(Ok(slice)) if slice.len() == count => at_guest(addr, &slice, transfer(&slice)),
        Some(Err(error)) => Err(error),
        // There is memory, but it ends or is scattered.
        _ => Err(Error::InvalidBackendAddress),
    }
}

/// The answer of an access to the slice at `addr`; an error of it gets to know the guest address.
#[inline(always)]
fn at_guest<T, B: BitmapSlice>(
    addr: GuestAddress,
    slice: &VolatileSlice<'_, B>,
    answer: volatile_memory::Result<T>,
) -> Result<T> {
    answer.map_err(|error| failed_at(addr, slice.as_mut_ptr(), slice.len(), error))
}

/// The error of an access to `len` bytes that lie at `addr` for the guest and at `host` here.
#[cold]
#[inline(never)]
fn failed_at(
    addr: GuestAddress,
    host: *const u8,
    len: usize,
    error: volatile_memory::Error,
) -> Error {
    // Any other error has nothing to do with the thread's last fault.
    if matches!(error, volatile_memory::Error::IOError(_)) {
        fault::note_guest_address(addr, host, len);
    }
    error.into()
}

/// How much of the slice at `addr` was moved; a fault is one of the access only if that is nothing. It gets to know the guest address in either case.
#[inline(always)]
fn moved_at<B: BitmapSlice>(
    addr: GuestAddress,
    slice: &VolatileSlice<'_, B>,
    answer: std::result::Result<usize, Fault>,
) -> volatile_memory::Result<usize> {
    answer.or_else(|fault| faulted_at(addr, slice.as_mut_ptr(), slice.len(), fault))
}

/// The answer of an access to `len` bytes, at `addr` for the guest and at `host` here, that met a fault.
#[cold]
#[inline(never)]
fn faulted_at(
    addr: GuestAddress,
    host: *const u8,
    len: usize,
    fault: Fault,
) -> volatile_memory::Result<usize> {
    fault::note_guest_address(addr, host, len);
    match fault.completed() {
        0 => Err(volatile_memory::Error::from_fault(fault)),
        completed => Ok(completed),
    }
}

#[cold]
#[inline(never)]
fn read_slice_pieces<M: GuestMemory + ?Sized>(
    memory: &M,
    buf: &mut [u8],
    addr: GuestAddress,
) -> Result<()> {
    let mut moved = 0;
    let count = buf.len();
    let answer = for_each_piece(
        memory,
        addr,
        count,
        Permissions::Read,
        &mut moved,
        |done, piece, _| {
            let part = buf
                .get_mut(done..)
                .and_then(|rest| rest.get_mut(..piece.len()));
            part.map_or(Ok(0), |part| {
                piece.read_slice(part, 0).map(|()| piece.len())
            })
        },
    );
    all_or_fault(answer, count, moved)
}

#[cold]
#[inline(never)]
fn write_slice_pieces<M: GuestMemory + ?Sized>(
    memory: &M,
    buf: &[u8],
    addr: GuestAddress,
) -> Result<()> {
    let mut moved = 0;
    let count = buf.len();
    let answer = for_each_piece(
        memory,
        addr,
        count,
        Permissions::Write,
        &mut moved,
        |done, piece, _| {
            let part = buf.get(done..).and_then(|rest| rest.get(..piece.len()));
            part.map_or(Ok(0), |part| {
                piece.write_slice(part, 0).map(|()| piece.len())
            })
        },
    );
    all_or_fault(answer, count, moved)
}

#[cold]
#[inline(never)]
fn read_pieces<M: GuestMemory + ?Sized>(
    memory: &M,
    buf: &mut [u8],
    addr: GuestAddress,
) -> Result<usize> {
    let mut moved = 0;
    let count = buf.len();
    let answer = for_each_piece(
        memory,
        addr,
        count,
        Permissions::Read,
        &mut moved,
        |done, piece, _| {
            let part = buf
                .get_mut(done..)
                .and_then(|rest| rest.get_mut(..piece.len()));
            part.map_or(Ok(0), |part| piece.read(part, 0))
        },
    );
    moved_first(answer, moved)
}

#[cold]
#[inline(never)]
fn write_pieces<M: GuestMemory + ?Sized>(
    memory: &M,
    buf: &[u8],
    addr: GuestAddress,
) -> Result<usize> {
    let mut moved = 0;
    let answer = for_each_piece(
        memory,
        addr,
        buf.len(),
        Permissions::Write,
        &mut moved,
        |done, piece, _| {
            let part = buf.get(done..).and_then(|rest| rest.get(..piece.len()));
            part.map_or(Ok(0), |part| piece.write(part, 0))
        },
    );
    moved_first(answer, moved)
}

/// The count, or what went wrong if that is 0.
fn moved_first(answer: Result<()>, moved: usize) -> Result<usize> {
    match answer {
        Err(error) if moved == 0 => Err(error),
        _ => Ok(moved),
    }
}

/// Everything; or the error of a page that is not there; or how far it came.
fn all_or_fault(answer: Result<()>, expected: usize, moved: usize) -> Result<()> {
    match answer {
        Err(error @ Error::IOError(_)) => Err(error),
        answer => all_of(expected, moved_first(answer, moved)?),
    }
}

/// Moves a range piece by piece. What it was translated through is held until the last byte has been moved.
///
/// `transfer` is given how many bytes were moved before, a piece, and a count that it may keep of the bytes of that piece that it has moved
/// before an error; it answers how many it has moved in all. The sum is kept in `moved`, which is 0 before: handing it out with the error, by
/// value, cost more than all the rest.
///
/// Stops at the first piece that is not moved whole, so that the bytes moved are without a gap.
///
/// # Errors
///
/// The first one that `transfer` answers; a hole only if nothing was moved before it.
fn for_each_piece<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
    moved: &mut usize,
    mut transfer: impl FnMut(
        usize,
        &VolatileSlice<'a, BS<'a, M::Bitmap>>,
        &mut usize,
    ) -> volatile_memory::Result<usize>,
) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let faults_before = fault::count();
    let mut one_piece =
        |piece: &VolatileSlice<'a, BS<'a, M::Bitmap>>, moved: &mut usize| -> Result<bool> {
            let (done, wanted) = (*moved, piece.len());
            let mut before_error = 0usize;
            match transfer(done, piece, &mut before_error) {
                Ok(now) if now >= wanted => {
                    // A stream that claims more than it was given has not moved more.
                    *moved = done.saturating_add(wanted);
                    Ok(true)
                }
                stopped => {
                    // If it was a fault, it gets to know the guest address. A stream that ended, or a system call that met the page, leaves the last fault
                    // of an earlier access alone, which may well have been at the same place in this process.
                    if fault::count() != faults_before {
                        let before = to_u64(done);
                        fault::note_guest_address(
                            GuestAddress(addr.0.wrapping_add(before)),
                            piece.as_mut_ptr(),
                            wanted,
                        );
                    }
                    *moved =
                        done.saturating_add(*stopped.as_ref().unwrap_or(&before_error.min(wanted)));
                    stopped.map(|_| false).map_err(Error::from)
                }
            }
        };
    // What the last transfer answered, if it was not all.
    let mut last = None;
    let end = memory
        .get_slices(addr, count, access)?
        .try_for_each_slice(|piece| match one_piece(&piece, moved) {
            Ok(true) => Ok(()),
            stopped => {
                last = Some(stopped.map(|_| ()));
                Err(Error::InvalidBackendAddress)
            }
        });
    match (last, end) {
        (Some(last), _) => last,
        (None, Err(error)) if *moved == 0 => Err(error),
        (None, _) => Ok(()),
    }
}

/// Repeats transfers until a piece has been moved whole, or one of them moves nothing. `moved` counts along.
fn whole_piece<B: BitmapSlice>(
    piece: &VolatileSlice<'_, B>,
    moved: &mut usize,
    mut transfer: impl FnMut(&mut VolatileSlice<'_, B>) -> volatile_memory::Result<usize>,
) -> volatile_memory::Result<usize> {
    let wanted = piece.len();
    while *moved < wanted {
        let mut rest = piece.offset(*moved)?;
        match retry_interrupted(|| transfer(&mut rest))? {
            0 => break,
            // A stream that claims more than it was given has not moved more.
            now => *moved = moved.saturating_add(now).min(wanted),
        }
    }
    Ok(*moved)
}

/// Makes an error of a count that is not everything.
fn all_of(expected: usize, completed: usize) -> Result<()> {
    if completed != expected {
        return Err(Error::PartialBuffer {
            expected,
            completed,
        });
    }
    Ok(())
}
