//! [`SharedMarks`]: the marks of one bitmap that several regions of a memory share.

use core::num::NonZeroUsize;
use std::collections::TryReserveError;

use super::region::DirtyRegion;
use super::{reached, LogWords};
use crate::bitmap::DirtyPages;
use crate::convert::to_u64;

/// A range of one bitmap whose marks belong to several regions, and the marks found there.
///
/// A harvest clears a mark, so it finds the mark only once. It collects the marks of such a range
/// here, and then adds them to all regions of the range.
///
/// ```text
///   bitmap    │ 0 1 0 0 1 0 1 0 │
///   region 0  └───────────┘
///   region 3        └───────────┘
///   range     └─────────────────┘   harvested once, through region 0
/// ```
#[derive(Clone, Debug)]
pub(super) struct SharedMarks {
    /// The offset in the bitmap at which the range begins.
    start: usize,
    /// The marks found by the current harvest, and the pages of its logs. Empty between harvests.
    pub(super) pages: DirtyPages,
    /// The regions whose marks are in the range, as indices.
    members: Vec<usize>,
}

/// Moves the pages of shared marks to their regions when it is dropped.
pub(super) struct Distribution<'a> {
    pub(super) regions: &'a mut [DirtyRegion],
    pub(super) shared: &'a mut [SharedMarks],
}

impl Distribution<'_> {
    /// Adds the pages of the guest addresses `first..=last` to all regions that have their bytes.
    ///
    /// Returns the number of addresses that are in no region.
    pub(super) fn add(&mut self, first: u64, last: u64) -> u64 {
        let mut outside = last.saturating_sub(first).saturating_add(1);
        for region in reached(self.regions, first, last) {
            let Some((offset, len)) = region.part_of(first, last) else {
                continue;
            };
            outside = outside.saturating_sub(to_u64(len));
            match region.shared.and_then(|number| self.shared.get_mut(number)) {
                Some(shared) => {
                    let start = shared.offset_of(region).saturating_add(offset);
                    shared.pages.insert_range(start, len);
                }
                None => region.pages.insert_range(offset, len),
            }
        }
        outside
    }
}

impl Drop for Distribution<'_> {
    fn drop(&mut self) {
        for shared in &mut *self.shared {
            shared.distribute(self.regions);
        }
    }
}

impl SharedMarks {
    /// Finds the ranges of bitmaps that regions share, and records in each region its range.
    ///
    /// Returns an error if a set of pages cannot be allocated.
    pub(super) fn try_find(regions: &mut [DirtyRegion]) -> Result<Vec<Self>, TryReserveError> {
        for region in regions.iter_mut() {
            region.shared = None;
        }
        let mut by_marks: Vec<_> = regions
            .iter()
            .enumerate()
            .filter(|(_, region)| region.pages.byte_size() != 0)
            .filter_map(|(number, region)| Some((region.marks?, number)))
            .collect();
        by_marks.sort_unstable();
        let mut found = Vec::new();
        let mut rest = by_marks.as_slice();
        while let Some(&((bitmap, start), first)) = rest.first() {
            let page = regions.get(first).map(|region| region.pages.page_size());
            let page = page.map_or(1, NonZeroUsize::get);
            // Slices also share the page in which one of them ends and another begins.
            let page_end = |end: usize| end.checked_next_multiple_of(page).unwrap_or(usize::MAX);
            let mut end = start;
            let mut members = Vec::new();
            while let Some((&((other, offset), number), after)) = rest.split_first() {
                let joins = number == first || (other == bitmap && offset < page_end(end));
                let Some(region) = regions.get(number).filter(|_| joins) else {
                    break;
                };
                end = end.max(offset.saturating_add(region.pages.byte_size()));
                members.push(number);
                rest = after;
            }
            if members.len() < 2 {
                continue;
            }
            for member in &members {
                if let Some(region) = regions.get_mut(*member) {
                    region.shared = Some(found.len());
                }
            }
            if let Some(first) = regions.get(first) {
                let size = end.saturating_sub(start);
                let pages = DirtyPages::try_new(size, first.pages.page_size())?;
                found.push(Self {
                    start,
                    pages,
                    members,
                });
            }
        }
        Ok(found)
    }

    /// Adds the part of a log that lies in one of the regions.
    pub(super) fn add_log(&mut self, region: &DirtyRegion, log: &LogWords<'_>) {
        #[cfg(test)]
        super::region::LOGS_ADDED.set(super::region::LOGS_ADDED.get().saturating_add(1));
        let offset = self.offset_of(region);
        for range in log.ranges_in(region.start, region.pages.byte_size()) {
            let start = offset.saturating_add(range.start);
            self.pages.insert_range(start, range.len());
        }
    }

    /// Returns the offset of a region's first byte in the range.
    pub(super) fn offset_of(&self, region: &DirtyRegion) -> usize {
        let offset = region.marks.map_or(self.start, |(_, offset)| offset);
        offset.saturating_sub(self.start)
    }

    /// Moves the pages to all regions of the range.
    pub(super) fn distribute(&mut self, regions: &mut [DirtyRegion]) {
        for member in &self.members {
            if let Some(region) = regions.get_mut(*member) {
                let start = self.offset_of(region);
                let end = start.saturating_add(region.pages.byte_size());
                let runs = self.pages.runs_around(start);
                for run in runs.take_while(|run| run.start < end) {
                    let (from, to) = (run.start.max(start), run.end.min(end));
                    let len = to.saturating_sub(from);
                    region.pages.insert_range(from.saturating_sub(start), len);
                }
            }
        }
        self.pages.clear();
    }
}
