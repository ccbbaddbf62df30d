//! Copies by the hypervisor (`GNTDEV_GRANT_COPY`), which map nothing.

use std::io;

use super::devices::{copy_grants, CopySegment, GrantedPlace};
use super::{invalid, MmapXen, PAGE_SIZE};
use crate::access::fault::Direction;

/// The maximum number of pages of one request.
const BATCH: usize = 64;

/// A copy that failed: the bytes copied before, and the error.
#[derive(Debug)]
pub(crate) struct CopyError {
    pub(crate) completed: usize,
    pub(crate) error: io::Error,
}

impl MmapXen {
    /// Copies the bytes at an [offset](Self::offset_from_first_page) to `buf`.
    pub(crate) fn copy_to(&self, at: usize, buf: &mut [u8]) -> Result<(), CopyError> {
        let target = buf.as_mut_ptr();
        let segment = |place, done: usize, len| {
            CopySegment::from_grant(place, target.wrapping_add(done), len)
        };
        // SAFETY: `copy` makes segments of parts of `0..buf.len()`, so their memory is in `buf`,
        // which is borrowed exclusively.
        unsafe { self.copy(at, buf.len(), Direction::Read, segment) }
    }

    /// Copies `buf` to the bytes at an [offset](Self::offset_from_first_page).
    ///
    /// After an error, bytes after those that were counted may have been written.
    pub(crate) fn copy_from(&self, at: usize, buf: &[u8]) -> Result<(), CopyError> {
        let source = buf.as_ptr();
        let segment =
            |place, done: usize, len| CopySegment::to_grant(place, source.wrapping_add(done), len);
        // SAFETY: `copy` makes segments of parts of `0..buf.len()`, so their memory is in `buf`,
        // which is borrowed, and the kernel only reads it.
        unsafe { self.copy(at, buf.len(), Direction::Write, segment) }
    }

    /// Copies `len` bytes in segments, each in one page.
    ///
    /// `segment` gets the place in the page, the offset of the segment, and its length.
    ///
    /// # Safety
    ///
    /// The memory of a segment that `segment` makes must be valid for the access, for each part of
    /// `0..len`.
    unsafe fn copy(
        &self,
        at: usize,
        len: usize,
        direction: Direction,
        segment: impl Fn(GrantedPlace, usize, u16) -> CopySegment,
    ) -> Result<(), CopyError> {
        let failed = |completed, error| CopyError { completed, error };
        self.check(direction).map_err(|error| failed(0, error))?;
        let mut done = 0usize;
        while done < len {
            let mut batch = [CopySegment::EMPTY; BATCH];
            let (mut used, mut next) = (0usize, done);
            for slot in &mut batch {
                if next == len {
                    break;
                }
                let made = self.segment_at(at, next, len);
                let (place, count) = made.map_err(|error| failed(done, error))?;
                *slot = segment(place, next, count);
                used = used.saturating_add(1);
                next = next.saturating_add(usize::from(count));
            }
            let segments = batch.get_mut(..used).unwrap_or_default();
            // SAFETY: the segments are parts of `0..len`, made by `segment`: their memory is valid
            // for the access, by the contract of this function.
            let result = unsafe { copy_grants(self.device(), segments) };
            result.map_err(|error| failed(done, error))?;
            for segment in segments {
                if !segment.is_done() {
                    // The error that mapping the page would have.
                    return Err(failed(done, invalid()));
                }
                done = done.saturating_add(segment.len());
            }
        }
        Ok(())
    }

    /// Returns the place of the byte at offset `done` of a copy, and a number of bytes.
    ///
    /// The bytes end with the page or with the copy.
    fn segment_at(&self, at: usize, done: usize, len: usize) -> io::Result<(GrantedPlace, u16)> {
        let at = at.checked_add(done).ok_or_else(invalid)?;
        let rest = len.saturating_sub(done);
        let page = self.references().part(at, rest)?.in_pages(1);
        let offset = u16::try_from(page.page_offset()).map_err(|_| invalid())?;
        let place = GrantedPlace {
            reference: page.first(),
            offset,
            domid: self.domid(),
        };
        Ok((place, u16::try_from(page.size()).map_err(|_| invalid())?))
    }
}

// A segment has the length and the offset in 16 bits.
const _: () = assert!(PAGE_SIZE <= 1 << 15);
