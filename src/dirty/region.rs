//! [`DirtyRegion`]: the dirty pages of one region of a memory.

use core::ops::Range;
use std::collections::TryReserveError;

use super::LogWords;
use crate::bitmap::{DirtyLog, DirtyPages};
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::{Error, GuestAddress, MemoryRegionAddress, Permissions};
use crate::region::GuestMemoryRegion;

/// The dirty pages of one region, at the guest address that it had when it was last seen.
#[derive(Clone, Debug)]
pub(super) struct DirtyRegion {
    pub(super) start: GuestAddress,
    pub(super) pages: DirtyPages,
    /// The region's marks: [`DirtyLog::bitmap_and_offset`] when it was last seen.
    ///
    /// The address may be that of a bitmap that was dropped. It is compared with those of the
    /// current bitmaps before it is used. If all are equal, the regions still share the same
    /// ranges.
    pub(super) marks: Option<(usize, usize)>,
    /// The index of the range of a bitmap that the region shares with others.
    pub(super) shared: Option<usize>,
    /// The offsets that could not be read when the region was last seen, ascending. Empty for most
    /// regions.
    unreadable: Vec<Range<usize>>,
}

impl DirtyRegion {
    /// Creates an empty set for a region. Returns an error if it cannot be allocated.
    pub(super) fn try_new<R: GuestMemoryRegion>(
        region: &R,
        log: &dyn DirtyLog,
    ) -> Result<Self, TryReserveError> {
        Ok(Self {
            start: region.start_addr(),
            pages: DirtyPages::try_new(tracked_bytes(region, log), log.page_size())?,
            marks: log.bitmap_and_offset(),
            shared: None,
            unreadable: Vec::new(),
        })
    }

    /// Makes [`is_for`](Self::is_for) return `false` for a region that may share its marks.
    pub(super) fn forget_marks(&mut self) {
        (self.marks, self.shared) = (self.marks.map(|_| (0, usize::MAX)), None);
    }

    /// Records which bytes of the region can be read now.
    pub(super) fn record_access<R: GuestMemoryRegion>(&mut self, region: &R) {
        self.unreadable.clear();
        let len = self.pages.byte_size();
        let is_readable = region.allowed_access().allow(Permissions::Read);
        let mut at = 0usize;
        while at < len {
            let left = len.saturating_sub(at);
            let next = if is_readable {
                region.reachable_range(MemoryRegionAddress(to_u64(at)), left)
            } else {
                left..left
            };
            // If the range is empty, wherever it starts, none of the bytes are accessible.
            let next = if next.is_empty() { left..left } else { next };
            let start = at.saturating_add(next.start.min(left));
            if at < start {
                self.unreadable.push(at..start);
            }
            at = at.saturating_add(next.end.min(left));
        }
    }

    /// Records that all bytes of the region can be read.
    pub(super) fn record_all_readable(&mut self) {
        self.unreadable.clear();
    }

    /// Returns the last guest address.
    pub(super) fn last(&self) -> u64 {
        let last = self.pages.byte_size().saturating_sub(1);
        self.start.0.saturating_add(to_u64(last))
    }

    /// Returns whether this is for a region with the bounds, the bitmap and the page size of
    /// `region`.
    pub(super) fn is_for<R: GuestMemoryRegion>(&self, region: &R, log: &dyn DirtyLog) -> bool {
        self.start == region.start_addr()
            && self.pages.byte_size() == tracked_bytes(region, log)
            && self.pages.page_size() == log.page_size()
            && self.marks == log.bitmap_and_offset()
    }

    /// Returns whether `other` has the same bounds and page size.
    pub(super) fn has_layout_of(&self, other: &Self) -> bool {
        self.start == other.start
            && self.pages.byte_size() == other.pages.byte_size()
            && self.pages.page_size() == other.pages.page_size()
    }

    /// Adds the part of the guest addresses `first..=last` that is in the region.
    pub(super) fn add(&mut self, first: u64, last: u64) {
        if let Some((offset, len)) = self.part_of(first, last) {
            self.pages.insert_range(offset, len);
        }
    }

    /// Removes the pages that are entirely in the guest addresses `first..=last`.
    pub(super) fn remove(&mut self, first: u64, last: u64) {
        if let Some((offset, len)) = self.part_of(first, last) {
            self.pages.remove_range(offset, len);
        }
    }

    /// Returns the offset and the length of the part of `first..=last` that is in the region.
    pub(super) fn part_of(&self, first: u64, last: u64) -> Option<(usize, usize)> {
        self.pages.byte_size().checked_sub(1)?;
        let from = first.max(self.start.0);
        let more = last.min(self.last()).checked_sub(from)?;
        let offset = to_usize(from.saturating_sub(self.start.0));
        Some((offset, to_usize(more).saturating_add(1)))
    }

    /// Adds the part of a log that is in the region.
    pub(super) fn add_log(&mut self, log: &LogWords<'_>) {
        #[cfg(test)]
        LOGS_ADDED.set(LOGS_ADDED.get().saturating_add(1));
        // The log begins inside the region or before it.
        match log.start.0.checked_sub(self.start.0) {
            Some(offset) => self
                .pages
                .add_words(to_usize(offset), log.words, log.page_size),
            None => {
                let before = self.start.0.saturating_sub(log.start.0);
                self.pages
                    .add_words_before(before, log.words, log.page_size);
            }
        }
    }

    /// Returns the dirty pages as ranges of guest addresses: the first address and the length.
    pub(super) fn runs(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.pages.runs().map(|run| self.at(run))
    }

    /// Returns the dirty pages: the guest address and the length of each.
    pub(super) fn each_page(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let size = self.pages.page_size().get();
        self.pages.runs().flat_map(move |run| {
            let end = run.end;
            // The last page ends with the region.
            let page = move |start: usize| start..start.saturating_add(size).min(end);
            run.step_by(size).map(move |start| self.at(page(start)))
        })
    }

    /// Returns the parts of [`runs`](Self::runs) that can be read, or those that cannot.
    pub(super) fn runs_by_access(
        &self,
        readable: bool,
    ) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let pieces = self.pages.runs().flat_map(|run| self.pieces_of(run));
        let pieces = pieces.filter(move |(is_readable, _)| *is_readable == readable);
        pieces.map(|(_, piece)| self.at(piece))
    }

    /// Splits a range where the bytes before can be read and those after cannot, or the reverse.
    fn pieces_of(&self, range: Range<usize>) -> impl Iterator<Item = (bool, Range<usize>)> + '_ {
        let first = self
            .unreadable
            .partition_point(|gap| gap.end <= range.start);
        let mut gaps = self.unreadable.iter().skip(first).peekable();
        let mut at = range.start;
        core::iter::from_fn(move || {
            let start = at;
            let gap = gaps.peek().map_or(range.end, |gap| gap.start);
            let readable = start < gap;
            at = if readable {
                gap.min(range.end)
            } else {
                gaps.next().map_or(range.end, |gap| gap.end.min(range.end))
            };
            (start < range.end).then_some((readable, start..at))
        })
    }

    /// Returns the guest address of a range in the region, and its length.
    fn at(&self, range: Range<usize>) -> (GuestAddress, usize) {
        // Inside the region, so the sum does not overflow.
        let start = self.start.0.wrapping_add(to_u64(range.start));
        (GuestAddress(start), range.len())
    }

    /// Returns the dirty ranges in the `len` bytes at `start`, as offsets from `start`.
    pub(super) fn ranges_in(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        // The range begins inside the region or before it: one of the two differences is 0.
        let skipped = to_usize(start.0.saturating_sub(self.start.0));
        let offset = to_usize(self.start.0.saturating_sub(start.0));
        let within = move |byte: usize| {
            let byte = byte.saturating_sub(skipped);
            offset.saturating_add(byte).min(len)
        };
        let runs = self.pages.runs_around(skipped);
        let ranges = runs.map(move |run| within(run.start)..within(run.end));
        // The runs ascend: after a run that starts past the end, no run is inside.
        let inside = ranges.take_while(move |range| range.start < len);
        inside.filter(|range| !range.is_empty())
    }
}

/// Returns the number of addresses of a region.
///
/// A region of another crate may claim addresses past 2^64, which do not exist.
pub(super) fn existing_len<R: GuestMemoryRegion>(region: &R) -> u64 {
    let after_start = u64::MAX.saturating_sub(region.start_addr().0);
    region.len().min(after_start.saturating_add(1))
}

/// Returns the number of bytes of a region that can be dirty.
///
/// A region that is not RAM may be of any length. It takes no bits, unless its log has some.
fn tracked_bytes<R: GuestMemoryRegion>(region: &R, log: &dyn DirtyLog) -> usize {
    let len = to_usize(existing_len(region));
    let host = region.get_slice(MemoryRegionAddress(0), 0);
    let is_ram = !matches!(host, Err(Error::HostAddressNotAvailable));
    // No mapping is longer than `isize::MAX`, whatever the region of another crate claims.
    if is_ram && isize::try_from(len).is_ok() {
        len
    } else {
        len.min(log.tracked_bytes())
    }
}

#[cfg(test)]
std::thread_local! {
    /// The number of logs that this thread has added to a region or its shared marks.
    pub(super) static LOGS_ADDED: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}
