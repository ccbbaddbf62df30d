//! Accesses to memory that is mapped for each access.
//!
//! An access maps the pages that it touches, moves the bytes, and unmaps them before it returns. A
//! long transfer does so for one piece after the other.
//!
//! Without the feature `xen`, [`OnDemand`] has no values, so the compiler removes each call.
//!
//! The callers mark the whole range of a write dirty, even after an error. A piece that faults, or
//! a copy by the hypervisor that fails, may have written bytes past those that it counts. A missing
//! mark would lose them. An unneeded mark costs the transfer of a page.

use crate::access::fault::Direction;
use crate::access::{self, Fault};
use crate::value::ByteValued;
use crate::xen::{self, MappedGrants, OnDemand, PAGE_SIZE, TRANSFER_PAGES};

/// Runs `access` on `len` bytes, which are mapped together.
#[cold]
#[inline(never)]
pub(super) fn with<T>(
    memory: OnDemand<'_>,
    at: usize,
    len: usize,
    direction: Direction,
    access: impl FnOnce(*mut u8) -> Result<T, Fault>,
) -> Result<T, Fault> {
    if len == 0 {
        // No byte is accessed. The address is aligned for any type that a page can hold.
        return access(core::ptr::without_provenance_mut(PAGE_SIZE));
    }
    let grants = memory.map(at, len, direction);
    let grants = grants.map_err(|error| Fault::unmapped(at, direction, 0, &error))?;
    access(grants.as_ptr()).map_err(|fault| fault.at_addr(at, direction, 0))
}

/// Runs `access` on the pieces of a range of `len` bytes, in ascending order.
///
/// `access` gets the address of a piece, the number of bytes before it, and its length. Each piece
/// but the last ends at the end of a page.
///
/// # Errors
///
/// Returns the fault of the first byte that cannot be mapped or accessed. The bytes before it have
/// been moved.
#[cold]
#[inline(never)]
pub(super) fn pieces(
    memory: OnDemand<'_>,
    at: usize,
    len: usize,
    direction: Direction,
    mut access: impl FnMut(*mut u8, usize, usize) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut done = 0usize;
    while done < len {
        let (start, left) = (at.wrapping_add(done), len.wrapping_sub(done));
        let grants = memory.map_first(start, left, TRANSFER_PAGES, direction);
        let (grants, _) = grants.map_err(|error| Fault::unmapped(at, direction, done, &error))?;
        access(grants.as_ptr(), done, grants.size())
            .map_err(|fault| fault.at_addr(at, direction, done))?;
        // Does not wrap: a piece is not longer than the bytes that are left.
        done = done.wrapping_add(grants.size());
    }
    Ok(())
}

/// Copies the bytes to `buf`, through the hypervisor if the region requests that.
#[cold]
#[inline(never)]
pub(super) fn read(memory: OnDemand<'_>, at: usize, buf: &mut [u8]) -> Result<(), Fault> {
    if memory.copies(at, buf.len()) {
        return memory.copy_to(at, buf).map_err(|failed| {
            Fault::unmapped(at, Direction::Read, failed.completed, &failed.error)
        });
    }
    // SAFETY: `buf` is borrowed exclusively, so it is valid for writes of its bytes. The size of a
    // slice does not overflow.
    unsafe { read_elements(memory, at, buf.as_mut_ptr(), buf.len()) }
}

/// Copies `buf` to the bytes, through the hypervisor if the region requests that.
#[cold]
#[inline(never)]
pub(super) fn write(memory: OnDemand<'_>, at: usize, buf: &[u8]) -> Result<(), Fault> {
    if memory.copies(at, buf.len()) {
        return memory.copy_from(at, buf).map_err(|failed| {
            Fault::unmapped(at, Direction::Write, failed.completed, &failed.error)
        });
    }
    // SAFETY: `buf` is borrowed, so it is valid for reads of its bytes. The size of a slice does
    // not overflow.
    unsafe { write_elements(memory, at, buf.as_ptr(), buf.len()) }
}

/// Copies elements to `buf`. Those that are naturally aligned are not torn.
///
/// # Safety
///
/// `buf` is valid for writes of `count` elements, whose size does not overflow.
#[cold]
#[inline(never)]
pub(super) unsafe fn read_elements<T: ByteValued>(
    memory: OnDemand<'_>,
    at: usize,
    buf: *mut T,
    count: usize,
) -> Result<(), Fault> {
    let (size, len) = (size_of::<T>(), count.wrapping_mul(size_of::<T>()));
    if !are_whole_in_pages::<T>(at) {
        // SAFETY: `buf` is valid for writes of the `len` bytes of its elements, whose number does
        // not overflow (this function's contract).
        return unsafe { read_elements(memory, at, buf.cast::<u8>(), len) };
    }
    pieces(memory, at, len, Direction::Read, |src, done, len| {
        let count = len.checked_div(size).unwrap_or(0);
        // SAFETY: `src` is a guest operand of `len` bytes: a new mapping, which only this function
        // and the guest access. `done + len` is at most the size of the elements, so the target is
        // valid (this function's contract). The two do not overlap, since the mapping is new.
        unsafe { access::copy_elements_from_guest(buf.wrapping_byte_add(done), src, count) }
    })
}

/// Copies elements from `buf`. Those that are naturally aligned are not torn.
///
/// # Safety
///
/// `buf` is valid for reads of `count` elements, whose size does not overflow.
#[cold]
#[inline(never)]
pub(super) unsafe fn write_elements<T: ByteValued>(
    memory: OnDemand<'_>,
    at: usize,
    buf: *const T,
    count: usize,
) -> Result<(), Fault> {
    let (size, len) = (size_of::<T>(), count.wrapping_mul(size_of::<T>()));
    if !are_whole_in_pages::<T>(at) {
        // SAFETY: `buf` is valid for reads of the `len` bytes of its elements, whose number does
        // not overflow (this function's contract). `ByteValued` says that they are initialised.
        return unsafe { write_elements(memory, at, buf.cast::<u8>(), len) };
    }
    pieces(memory, at, len, Direction::Write, |dst, done, len| {
        let count = len.checked_div(size).unwrap_or(0);
        // SAFETY: `dst` is a guest operand of `len` bytes: a new mapping, which only this function
        // and the guest access. `done + len` is at most the size of the elements, so the source is
        // valid (this function's contract). The two do not overlap, since the mapping is new.
        unsafe { access::copy_elements_to_guest(dst, buf.wrapping_byte_add(done), count) }
    })
}

/// Returns whether elements of type `T` have 1, 2, 4 or 8 bytes, and are naturally aligned in their
/// pages. The first one is at `at`, an offset from the start of a page.
///
/// No page ends inside such an element. Others may be torn, and are copied as bytes.
fn are_whole_in_pages<T>(at: usize) -> bool {
    matches!(size_of::<T>(), 1 | 2 | 4 | 8) && at.is_multiple_of(size_of::<T>())
}

/// Copies bytes between overlapping ranges of one memory, through a buffer.
///
/// Two mappings of the same pages have different addresses, so a copy between them would not see
/// the overlap.
#[cold]
#[inline(never)]
pub(super) fn copy_overlapping(
    memory: OnDemand<'_>,
    target: usize,
    source: usize,
    len: usize,
) -> Result<(), Fault> {
    let mut buffer = [0u8; PAGE_SIZE];
    let mut done = 0usize;
    while done < len {
        let count = PAGE_SIZE.min(len.wrapping_sub(done));
        // Ascending if the target is lower, and otherwise descending: nothing is overwritten before
        // it is read.
        let at = if target < source {
            done
        } else {
            len.wrapping_sub(done).wrapping_sub(count)
        };
        let part = buffer.get_mut(..count).unwrap_or_default();
        read(memory, source.wrapping_add(at), part)?;
        write(memory, target.wrapping_add(at), part)?;
        done = done.wrapping_add(count);
    }
    Ok(())
}

/// Maps the first of `len` bytes, at least one, until the result is dropped.
///
/// If there are fewer than `len`, also returns the error of mapping more.
pub(super) fn map_until_drop(
    memory: OnDemand<'_>,
    at: usize,
    len: usize,
    direction: Direction,
) -> super::Result<(MappedGrants, Option<super::Error>)> {
    let grants = memory.map_first(at, len, usize::MAX, direction);
    let (grants, error) = grants.map_err(super::Error::IOError)?;
    let error = match (error, grants.size() == len) {
        (Some(error), _) => Some(error),
        (None, true) => None,
        // A host whose pages are not those of Xen maps one at a time.
        (None, false) => Some(xen::unsupported()),
    };
    Ok((grants, error.map(super::Error::IOError)))
}
