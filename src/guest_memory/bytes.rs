//! [`Bytes`] by guest address, for every [`GuestMemory`].
//!
//! ```text
//!   an access of `count` bytes at `addr`
//!        │
//!        ▼
//!   contiguous()    fast path, inlined: the range is one slice of host memory, and one access
//!        │          routine moves it.
//!        │ the range is not contiguous
//!        ▼
//!   scattered()     slow path, out of line: moves one segment after the other, and keeps count
//!                   in a Progress.
//! ```
//!
//! Invariants:
//!
//! - The bytes moved have no gap: a transfer stops at the first segment that it cannot complete.
//! - The translation of an IOVA is held until the last byte is moved.
//! - When an access faults, [`fault::last`] returns the guest address of the fault.

use core::mem::{size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::{
    bounded_slices, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator as _, Permissions,
    Result,
};
use crate::access::{fault, Fault};
use crate::bitmap::{BitmapSlice, BS};
use crate::bytes::Bytes;
use crate::convert::to_u64;
use crate::io::{
    first_part, read_once, retry_interrupted, write_zero, ReadVolatile, WriteVolatile,
};
use crate::value::{AtomicAccess, ByteValued};
use crate::volatile_memory::{self, VolatileSlice};

/// Accesses by guest physical address, or by IOVA behind an IOMMU.
///
/// An access that starts in a hole, or in memory that does not permit it, returns an error. An
/// access that reaches a hole moves the bytes before it; see [`Bytes`] for how each method reports
/// that. A range may end at 2^64, but not wrap around.
///
/// Behind an IOMMU, the whole range is translated first. If a byte of it is not mapped, the access
/// returns that error and moves nothing. There may still be a hole in the physical memory: the
/// access then moves the bytes before it.
impl<T: GuestMemory + ?Sized> Bytes<GuestAddress> for T {
    type E = Error;

    #[inline(always)]
    fn write(&self, buf: &[u8], addr: GuestAddress) -> Result<usize> {
        let mut moved = 0;
        let range = (addr, buf.len(), Permissions::Write);
        let ran = contiguous(self, range, |slice| {
            counted(slice.write_part(buf, 0)?, &mut moved)
        });
        match ran {
            Ok(true) => Ok(moved),
            Ok(false) => write_scattered(self, buf, addr, Progress::count),
            Err(error) => count_or_error(moved, error),
        }
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], addr: GuestAddress) -> Result<usize> {
        let mut moved = 0;
        let range = (addr, buf.len(), Permissions::Read);
        let ran = contiguous(self, range, |slice| {
            counted(slice.read_part(buf, 0)?, &mut moved)
        });
        match ran {
            Ok(true) => Ok(moved),
            Ok(false) => read_scattered(self, buf, addr, Progress::count),
            Err(error) => count_or_error(moved, error),
        }
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], addr: GuestAddress) -> Result<()> {
        let range = (addr, buf.len(), Permissions::Write);
        if contiguous(self, range, |slice| slice.write_slice(buf, 0))? {
            Ok(())
        } else {
            write_scattered(self, buf, addr, Progress::all_or_fault)
        }
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], addr: GuestAddress) -> Result<()> {
        let range = (addr, buf.len(), Permissions::Read);
        if contiguous(self, range, |slice| slice.read_slice(buf, 0))? {
            Ok(())
        } else {
            read_scattered(self, buf, addr, Progress::all_or_fault)
        }
    }

    #[inline(always)]
    fn write_obj<O: ByteValued>(&self, val: O, addr: GuestAddress) -> Result<()> {
        let ran = contiguous(
            self,
            (addr, size_of::<O>(), Permissions::Write),
            #[inline(always)]
            |slice| slice.write_obj(val, 0),
        )?;
        if ran {
            Ok(())
        } else {
            write_scattered(self, val.as_slice(), addr, Progress::all_or_fault)
        }
    }

    #[inline(always)]
    fn read_obj<O: ByteValued>(&self, addr: GuestAddress) -> Result<O> {
        let (mut value, mut read) = (MaybeUninit::uninit(), None);
        contiguous_with::<_, u64>(
            self,
            (addr, size_of::<O>(), Permissions::Read),
            #[inline(always)]
            |slice| {
                read = Some(slice.read_obj_into(&mut value, 0)?);
                Ok(())
            },
        )?;
        match read {
            Some(value) => Ok(*value),
            None => {
                let mut value = O::zeroed();
                read_scattered(self, value.as_mut_slice(), addr, Progress::all_or_fault)
                    .map(|()| value)
            }
        }
    }

    fn read_volatile_from<F>(&self, addr: GuestAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        let read = |segment: Segment<'_, T>, moved: &mut usize| {
            *moved = read_once(src, &segment)?;
            Ok(())
        };
        scattered(self, (addr, count, Permissions::Write), read).count()
    }

    /// Fills the range from a source that may deliver a few bytes at a time.
    ///
    /// # Errors
    ///
    /// - [`Error::PartialBuffer`] with the count, if the source ended, or if bytes were moved
    ///   before it failed or before a hole.
    /// - Otherwise the error of the source, or of the first address.
    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: GuestAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()> {
        let read = |segment: Segment<'_, T>, moved: &mut usize| {
            repeat_until_full(&segment, moved, |rest| {
                let part = first_part(rest);
                // A stream may claim to have moved more than it was given.
                Ok(read_once(src, &part)?.min(part.len()))
            })
        };
        let range = (addr, count, Permissions::Write);
        all_of(count, scattered(self, range, read).count()?)
    }

    /// Writes the range to a target that may accept a few bytes at a time.
    ///
    /// # Errors
    ///
    /// Returns the error of the target if no byte was moved, or `ErrorKind::WriteZero` if it
    /// accepts no bytes. If bytes were moved, returns their count; the next call returns the error.
    fn write_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        let write = |segment: Segment<'_, T>, moved: &mut usize| {
            repeat_until_full(&segment, moved, |rest| {
                match retry_interrupted(|| dst.write_volatile(rest))? {
                    0 => Err(write_zero()),
                    written => Ok(written),
                }
            })
        };
        scattered(self, (addr, count, Permissions::Read), write).count()
    }

    /// Writes the range to a target that may accept a few bytes at a time, until all is written.
    ///
    /// # Errors
    ///
    /// - [`Error::PartialBuffer`] with the count, if bytes were moved before the target failed or
    ///   accepted no more, or before a hole.
    /// - Otherwise the error of the target or of the first address, or `ErrorKind::WriteZero` if
    ///   the target accepts no bytes.
    fn write_all_volatile_to<F>(&self, addr: GuestAddress, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        all_of(count, self.write_volatile_to(addr, dst, count)?)
    }

    #[inline(always)]
    fn store<O: AtomicAccess>(&self, val: O, addr: GuestAddress, order: Ordering) -> Result<()> {
        let ran = contiguous(
            self,
            (addr, size_of::<O>(), Permissions::Write),
            #[inline(always)]
            |slice| slice.store(val, 0, order),
        )?;
        if ran {
            Ok(())
        } else {
            only_segment(self, addr, size_of::<O>(), Permissions::Write, |slice| {
                slice.store(val, 0, order)
            })
        }
    }

    #[inline(always)]
    fn load<O: AtomicAccess>(&self, addr: GuestAddress, order: Ordering) -> Result<O> {
        let mut value = O::zeroed();
        let ran = contiguous(
            self,
            (addr, size_of::<O>(), Permissions::Read),
            #[inline(always)]
            |slice| {
                value = slice.load(0, order)?;
                Ok(())
            },
        )?;
        if ran {
            Ok(value)
        } else {
            only_segment(self, addr, size_of::<O>(), Permissions::Read, |slice| {
                slice.load(0, order)
            })
        }
    }
}

/// A contiguous part of the memory.
type Segment<'a, M> = VolatileSlice<'a, BS<'a, <M as GuestMemory>::Bitmap>>;

/// The address and length of a range, and the permission that its access needs.
type Range = (GuestAddress, usize, Permissions);

/// The progress of a transfer: the bytes moved, and the error that stopped it, if one did.
struct Progress {
    expected: usize,
    moved: usize,
    error: Option<Error>,
}

impl Progress {
    /// Returns the number of bytes moved, or the error if it is 0.
    #[inline]
    fn count(self) -> Result<usize> {
        match self.error {
            Some(error) => count_or_error(self.moved, error),
            None => Ok(self.moved),
        }
    }

    /// Returns `Ok` if all bytes were moved. Returns a fault even if bytes were moved before it.
    #[inline]
    fn all_or_fault(self) -> Result<()> {
        match self.error {
            Some(error @ Error::IOError(_)) => Err(error),
            _ => all_of(self.expected, self.count()?),
        }
    }
}

/// Returns the number of bytes moved before an error, or the error if there are none.
#[cold]
#[inline(never)]
fn count_or_error(moved: usize, error: Error) -> Result<usize> {
    match moved {
        0 => Err(error),
        _ => Ok(moved),
    }
}

/// Returns `Ok` if `completed` is all of `expected`.
fn all_of(expected: usize, completed: usize) -> Result<()> {
    if completed != expected {
        return Err(Error::PartialBuffer {
            expected,
            completed,
        });
    }
    Ok(())
}

/// Runs `transfer` on the range if it is contiguous. Returns whether it ran.
///
/// `transfer` passes values out through captured references. An `Option<Result<_>>` would be
/// written and read in different sizes, which defeats store forwarding. Closures for values are
/// inlined always: by default, the compiler calls one that a program uses in several places.
///
/// # Errors
///
/// Returns the error of `transfer`, or of the translation of the address.
#[inline(always)]
fn contiguous<M: GuestMemory + ?Sized>(
    memory: &M,
    range: Range,
    transfer: impl for<'s> FnOnce(&Segment<'s, M>) -> volatile_memory::Result<()>,
) -> Result<bool> {
    contiguous_with::<M, ()>(memory, range, transfer).map(|ran| ran.is_some())
}

/// Does what [`contiguous`] does, and returns a value of type `N` if `transfer` ran.
///
/// Built for size, the compiler lets the result share memory with a value that the caller reads.
/// With a `u64` in it, both are written and read in the same sizes, and store forwarding works.
/// Calls without such a value take fewer instructions with `()`.
#[inline(always)]
fn contiguous_with<M: GuestMemory + ?Sized, N: Default>(
    memory: &M,
    (addr, count, access): Range,
    transfer: impl for<'s> FnOnce(&Segment<'s, M>) -> volatile_memory::Result<()>,
) -> Result<Option<N>> {
    let mut failure = None;
    let ran = memory.with_contiguous_slice(
        addr,
        count,
        access,
        #[inline(always)]
        |slice| {
            if let Err(error) = transfer(slice) {
                failure = Some(located(error, addr, slice.as_mut_ptr(), slice.len()));
            }
            N::default()
        },
    )?;
    match failure {
        Some(error) => Err(error),
        None => Ok(ran),
    }
}

/// Runs an atomic access on a range that the memory does not lend as a [contiguous slice].
///
/// The iterator holds the translation until the access is done.
///
/// [contiguous slice]: GuestMemory::with_contiguous_slice
#[cold]
#[inline(never)]
fn only_segment<'a, M: GuestMemory + ?Sized, T>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
    transfer: impl FnOnce(&Segment<'a, M>) -> volatile_memory::Result<T>,
) -> Result<T> {
    let mut segments = memory.get_slices(addr, count, access)?;
    let first = segments.next().ok_or(Error::InvalidBackendAddress)??;
    // If the range is scattered, or ends in a hole, the segment is too short for the access.
    transfer(&first).map_err(|error| located(error, addr, first.as_mut_ptr(), first.len()))
}

/// Runs `transfer` on each segment of the range, until one is not moved completely.
///
/// `transfer` gets the segment and a count. It sets the count to the number of bytes that it moved,
/// even if it fails. A count that exceeds the length of the segment is reduced to it: a stream may
/// claim too much.
///
/// A hole is an error only if no byte was moved before it.
#[inline(always)]
fn scattered<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    (addr, count, access): Range,
    mut transfer: impl FnMut(Segment<'a, M>, &mut usize) -> volatile_memory::Result<()>,
) -> Progress {
    let mut progress = Progress {
        expected: count,
        moved: 0,
        error: None,
    };
    if count == 0 {
        return progress;
    }
    let faults_before = fault::count();
    let mut stopped = false;
    let walk = bounded_slices(memory, addr, count, access).and_then(|mut segments| {
        segments.try_for_each_slice(|segment| {
            let (host, len, offset) = (segment.as_mut_ptr(), segment.len(), progress.moved);
            let mut moved = 0;
            let result = transfer(segment, &mut moved);
            if result.is_ok() && moved >= len {
                progress.moved = offset.saturating_add(len);
                return Ok(());
            }
            progress.moved = offset.saturating_add(moved.min(len));
            // A stream that ends, or a system call that fails at the page, is not a fault of this
            // access. The last fault must then keep its address.
            if fault::count() != faults_before {
                let guest = GuestAddress(addr.0.wrapping_add(to_u64(offset)));
                fault::record_guest_address(guest, host, len);
            }
            stopped = true;
            progress.error = result.err().map(Error::from);
            // Ends the walk. The value is not used.
            Err(Error::InvalidBackendAddress)
        })
    });
    if !stopped && progress.moved == 0 {
        progress.error = walk.err();
    }
    progress
}

#[cold]
#[inline(never)]
fn write_scattered<M: GuestMemory + ?Sized, T>(
    memory: &M,
    mut buf: &[u8],
    addr: GuestAddress,
    finish: impl FnOnce(Progress) -> Result<T>,
) -> Result<T> {
    let range = (addr, buf.len(), Permissions::Write);
    finish(scattered(memory, range, |segment, moved| {
        let part = buf.split_off(..segment.len()).unwrap_or_default();
        counted(segment.write_part(part, 0)?, moved)
    }))
}

#[cold]
#[inline(never)]
fn read_scattered<M: GuestMemory + ?Sized, T>(
    memory: &M,
    mut buf: &mut [u8],
    addr: GuestAddress,
    finish: impl FnOnce(Progress) -> Result<T>,
) -> Result<T> {
    let range = (addr, buf.len(), Permissions::Read);
    finish(scattered(memory, range, |segment, moved| {
        let part = buf.split_off_mut(..segment.len()).unwrap_or_default();
        counted(segment.read_part(part, 0)?, moved)
    }))
}

/// Stores the number of bytes that an access moved in `moved`, even if it faulted.
#[inline(always)]
fn counted(
    result: std::result::Result<usize, Fault>,
    moved: &mut usize,
) -> volatile_memory::Result<()> {
    *moved = match &result {
        Ok(count) => *count,
        Err(fault) => fault.completed(),
    };
    result.map(drop).map_err(volatile_memory::Error::from_fault)
}

/// Converts the error of an access to `len` bytes, and records the guest address of a fault.
///
/// The bytes are at `addr` for the guest and at `host` in this process.
#[cold]
#[inline(never)]
pub(super) fn located(
    error: volatile_memory::Error,
    addr: GuestAddress,
    host: *const u8,
    len: usize,
) -> Error {
    // Other errors are unrelated to the thread's last fault.
    if matches!(error, volatile_memory::Error::IOError(_)) {
        fault::record_guest_address(addr, host, len);
    }
    error.into()
}

/// Repeats `transfer` on the rest of a segment, until all of it is moved.
///
/// Ends if a transfer moves nothing. `moved` counts the bytes.
fn repeat_until_full<B: BitmapSlice>(
    segment: &VolatileSlice<'_, B>,
    moved: &mut usize,
    mut transfer: impl FnMut(&VolatileSlice<'_, B>) -> volatile_memory::Result<usize>,
) -> volatile_memory::Result<()> {
    while *moved < segment.len() {
        match transfer(&segment.offset(*moved)?)? {
            0 => break,
            // A stream may claim to have moved more than it was given.
            now => *moved = moved.saturating_add(now).min(segment.len()),
        }
    }
    Ok(())
}
