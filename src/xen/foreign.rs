//! [`ForeignMapping`]: frames of another domain that are mapped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::Duration;

use super::area::Area;
use super::devices::{map_frames, NOT_PRESENT};
use super::{invalid, out_of_memory, PAGE_SHIFT, PAGE_SIZE};
use crate::address::GuestAddress;
use crate::convert::{to_u64, to_usize};
use crate::page_size::host_page_size;

/// Frames of another domain that are mapped until this value is dropped.
#[derive(Debug)]
pub(crate) struct ForeignMapping {
    area: Area,
    page_offset: usize,
}

/// The frames of a range of guest addresses, in whole pages of the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Frames {
    first: u64,
    count: usize,
    /// The offset of the first byte in the first page of the host.
    page_offset: usize,
}

impl Frames {
    /// Returns the frames of the `size` bytes at `addr`, for a host with pages of `page_size`.
    fn of(addr: GuestAddress, size: usize, page_size: usize) -> io::Result<Self> {
        let page_offset = to_usize(addr.0 & to_u64(page_size.wrapping_sub(1)));
        let len = page_offset
            .checked_add(size)
            .and_then(|len| len.checked_next_multiple_of(page_size));
        let last = addr.0.checked_add(to_u64(size.saturating_sub(1)));
        match len {
            Some(len) if size != 0 && last.is_some() => Ok(Self {
                // A multiple of the frames in a page of the host.
                first: addr.0.wrapping_sub(to_u64(page_offset)) >> PAGE_SHIFT,
                count: len >> PAGE_SHIFT,
                page_offset,
            }),
            _ => Err(invalid()),
        }
    }
}

/// The maximum number of further attempts to map frames that are paged out.
///
/// The hypervisor asks a program in dom0 to page them in. All pauses together take a second.
const ATTEMPTS: u32 = 84;

/// Returns the pause before attempt `number`: 100 µs at first, 12.8 ms at most.
fn pause_before(number: u32) -> Duration {
    Duration::from_micros(100 << number.min(7))
}

impl ForeignMapping {
    /// Maps the `size` bytes at `addr` of the domain `domid`.
    ///
    /// `prot` and `flags` are those of mmap(2). The request needs 12 bytes of memory for each page.
    ///
    /// # Errors
    ///
    /// - the error of the first frame that could not be mapped, such as `EINVAL` for one that does
    ///   not exist. On Arm, an access to it would kill the process or stop the host;
    /// - `ENOENT` if a frame is paged out for longer than a second;
    /// - another error of ioctl(2) or mmap(2).
    pub(crate) fn new(
        device: &File,
        domid: u16,
        (addr, size): (GuestAddress, usize),
        (prot, flags): (i32, i32),
    ) -> io::Result<Self> {
        let wanted = Frames::of(addr, size, host_page_size().get())?;
        // The kernel counts them in 32 bits.
        u32::try_from(wanted.count).map_err(|_| invalid())?;
        let (mut frames, mut errors) = (Vec::new(), Vec::new());
        let reserved = frames.try_reserve_exact(wanted.count);
        reserved.map_err(|_| out_of_memory())?;
        let reserved = errors.try_reserve_exact(wanted.count);
        reserved.map_err(|_| out_of_memory())?;
        // Does not overflow: `Frames::of` checked the address of the last byte.
        frames.extend((wanted.first..).take(wanted.count));
        errors.resize(wanted.count, NOT_PRESENT);

        let len = wanted.count.saturating_mul(PAGE_SIZE);
        let mapping = Self {
            area: Area::of_device(device, len, prot, flags | libc::MAP_SHARED, 0)?,
            page_offset: wanted.page_offset,
        };
        let mut result = mapping.map(device, domid, 0..wanted.count, &frames, &mut errors);
        for attempt in 0..ATTEMPTS {
            if !is_paged_out(result, &errors)? {
                return Ok(mapping);
            }
            std::thread::sleep(pause_before(attempt));
            result = Ok(());
            for missing in runs_paged_out(&errors, host_page_size().get() / PAGE_SIZE) {
                match mapping.map(device, domid, missing, &frames, &mut errors) {
                    // The request for another run may return `ENOENT`, which would hide this error.
                    Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                    tried => result = result.and(tried),
                }
            }
        }
        if is_paged_out(result, &errors)? {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(mapping)
    }

    /// Maps a range of the frames.
    fn map(
        &self,
        device: &File,
        domid: u16,
        range: Range<usize>,
        frames: &[u64],
        errors: &mut [i32],
    ) -> io::Result<()> {
        let at = range.start.saturating_mul(PAGE_SIZE);
        let frames = frames.get(range.clone()).ok_or_else(invalid)?;
        let errors = errors.get_mut(range).ok_or_else(invalid)?;
        if at.saturating_add(frames.len().saturating_mul(PAGE_SIZE)) > self.area.len() {
            return Err(invalid());
        }
        let addr = self.area.as_ptr().wrapping_add(at);
        // SAFETY: the pages are in the area of the device (just checked), which nobody accesses:
        // `new` hands it out after the last call.
        unsafe { map_frames(device, domid, addr, frames, errors) }
    }

    /// Returns the address of the first byte of the range.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.area.as_ptr().wrapping_add(self.page_offset)
    }

    /// Unmaps the frames, and returns the error that dropping the value would ignore.
    ///
    /// Afterwards, dropping it does nothing.
    pub(crate) fn unmap(&mut self) -> io::Result<()> {
        self.area.unmap()
    }
}

/// Returns whether frames are still paged out after a request with this result.
///
/// # Errors
///
/// Returns the error of the first frame that failed otherwise, or that of the request.
fn is_paged_out(result: io::Result<()>, errors: &[i32]) -> io::Result<bool> {
    let failed = |error: &&i32| !matches!(**error, 0 | NOT_PRESENT);
    if let Some(error) = errors.iter().find(failed) {
        return Err(io::Error::from_raw_os_error(error.saturating_neg()));
    }
    let paged_out = errors.contains(&NOT_PRESENT);
    match result {
        Err(error) if !(paged_out && error.raw_os_error() == Some(libc::ENOENT)) => Err(error),
        _ => Ok(paged_out),
    }
}

/// Returns the runs of frames that are paged out, extended to whole pages of the host.
///
/// A page of the host has `frames` of them.
fn runs_paged_out(errors: &[i32], frames: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, page) in errors.chunks(frames.max(1)).enumerate() {
        if !page.contains(&NOT_PRESENT) {
            continue;
        }
        let start = at.saturating_mul(frames);
        let end = start.saturating_add(page.len());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(addr: u64, size: usize, page_size: usize) -> Option<(u64, usize, usize)> {
        let frames = Frames::of(GuestAddress(addr), size, page_size).ok()?;
        Some((frames.first, frames.count, frames.page_offset))
    }

    #[test]
    fn frames_of_range_are_whole_pages_of_the_host() {
        assert_eq!(frames(0, 1, 4096), Some((0, 1, 0)));
        assert_eq!(frames(0x5400, 0xc00, 4096), Some((5, 1, 0x400)));
        assert_eq!(frames(0x5400, 0xc01, 4096), Some((5, 2, 0x400)));
        assert_eq!(frames(0x5400, 0xc01, 0x1_0000), Some((0, 16, 0x5400)));
        assert_eq!(frames(0x1_f000, 0x1001, 0x1_0000), Some((16, 32, 0xf000)));
        assert_eq!(frames(u64::MAX, 1, 4096), Some((u64::MAX >> 12, 1, 0xfff)));
        for (addr, size) in [(0, 0), (u64::MAX, 2), (0, usize::MAX), (0xfff, usize::MAX)] {
            assert_eq!(frames(addr, size, 4096), None);
        }
    }

    #[test]
    fn is_paged_out_with_failed_frame_returns_its_error() {
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        let number = |result: io::Result<bool>| result.map_err(|error| error.raw_os_error());
        assert_eq!(number(is_paged_out(Ok(()), &[0, 0])), Ok(false));
        assert_eq!(
            number(is_paged_out(Err(gone()), &[0, NOT_PRESENT])),
            Ok(true)
        );
        assert_eq!(number(is_paged_out(Ok(()), &[0, NOT_PRESENT])), Ok(true));
        let invalid = Err(Some(libc::EINVAL));
        assert_eq!(
            number(is_paged_out(Ok(()), &[0, -libc::EINVAL, -1])),
            invalid
        );
        let hidden = [NOT_PRESENT, -libc::EINVAL];
        assert_eq!(number(is_paged_out(Err(gone()), &hidden)), invalid);
        // A request that failed without a frame that did.
        assert_eq!(
            number(is_paged_out(Err(gone()), &[0])),
            Err(Some(libc::ENOENT))
        );
        let denied = Err(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(
            number(is_paged_out(denied, &[NOT_PRESENT])),
            Err(Some(libc::EPERM))
        );
        assert!(is_paged_out(Ok(()), &[i32::MIN]).is_err());
    }

    #[test]
    fn runs_paged_out_are_whole_pages_of_the_host() {
        let (out, in_memory) = (NOT_PRESENT, 0);
        let errors = [
            out, out, in_memory, out, in_memory, in_memory, in_memory, out,
        ];
        assert_eq!(runs_paged_out(&errors, 1), [0..2, 3..4, 7..8]);
        assert_eq!(runs_paged_out(&errors, 2), [0..4, 6..8]);
        assert_eq!(runs_paged_out(&errors[2..6], 4).first(), Some(&(0..4)));
        assert!(runs_paged_out(&[in_memory; 4], 1).is_empty());
    }

    #[test]
    fn pauses_end_after_a_second() {
        let all: Duration = (0..ATTEMPTS).map(pause_before).sum();
        assert!(all > Duration::from_millis(900) && all < Duration::from_millis(1100));
    }
}
