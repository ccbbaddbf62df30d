//! [`ZeroedRanges`]: the ranges of a private file that were replaced by zeroes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops;
use std::sync::Arc;

use crate::host::VmaBudget;

/// The ranges of a private file's mapping that were replaced by zeroes, and their VMAs.
///
/// The number of VMAs depends on which pages the guest touches. This type tracks an upper bound
/// instead of querying the kernel:
///
/// - Zeroes are unpopulated when `Mapped::splice_over` puts them in place, so the kernel merges
///   them with one adjacent range, whatever its state.
/// - Two adjacent ranges may both have pages, and then stay separate VMAs.
///
/// All ranges of a mapping have the same options, so these do not prevent a merge.
#[derive(Debug, Default)]
pub(crate) struct ZeroedRanges {
    /// The ranges by their start. They neither touch nor overlap.
    ranges: BTreeMap<usize, Range>,
    /// The VMAs that these ranges, or the protected blocks of the mapping, can add to its own.
    pub(crate) vmas: VmaBudget,
    /// Huge pages of a shared region that have returned to the pool, by their offset in the region.
    /// The region no longer reserves them.
    pub(crate) released: BTreeSet<usize>,
    /// The VMAs of the reservation, whose regions share it: one for each region, and the guards.
    _run: Arc<VmaBudget>,
}

/// A range of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    end: usize,
    /// The maximum number of VMAs in the range.
    parts: usize,
}

impl Range {
    /// Returns the VMAs that the range can add: its own, and one more by splitting a VMA.
    fn added_vmas(self) -> usize {
        self.parts.saturating_add(1)
    }
}

impl ZeroedRanges {
    /// Creates the record of a mapping without zeroed ranges, whose blocks can add `vmas`. Its
    /// reservation has `run`.
    pub(crate) fn new(vmas: VmaBudget, run: Arc<VmaBudget>) -> Self {
        Self {
            ranges: BTreeMap::new(),
            vmas,
            released: BTreeSet::new(),
            _run: run,
        }
    }

    /// Replaces a range by zeroes with `splice`, if the VMA budget allows it.
    ///
    /// Otherwise returns `None` and does nothing. The range must not be [zeroed](Self::contains)
    /// already.
    pub(crate) fn replace<E>(
        &mut self,
        start: usize,
        end: usize,
        splice: impl FnOnce() -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        let up_to_end = self.ranges.range(..=end).rev();
        let touched: Vec<(usize, Range)> = up_to_end
            .take_while(|(_, range)| range.end >= start)
            .map(|(&at, &range)| (at, range))
            .collect();
        let (mut from, mut to, mut parts, mut before) = (start, end, 0usize, 0usize);
        for (at, range) in &touched {
            before = before.saturating_add(range.added_vmas());
            let is_covered = *at >= start && range.end <= end;
            if !is_covered {
                parts = parts.saturating_add(range.parts);
            }
            from = from.min(*at);
            to = to.max(range.end);
        }
        let joined = Range {
            end: to,
            parts: parts.max(1),
        };
        let more = joined.added_vmas().saturating_sub(before);
        if more > 0 && !self.vmas.try_take_for_guest(more) {
            return None;
        }
        let result = splice();
        if result.is_err() {
            self.vmas.release(more);
            return Some(result);
        }
        for (at, _) in &touched {
            self.ranges.remove(at);
        }
        self.ranges.insert(from, joined);
        self.vmas
            .release(before.saturating_sub(joined.added_vmas()));
        Some(result)
    }

    /// Returns the zeroed parts of a range.
    pub(crate) fn ranges_in<'a>(
        &'a self,
        range: &ops::Range<usize>,
    ) -> impl Iterator<Item = ops::Range<usize>> + 'a {
        let (start, end) = (range.start, range.end);
        let before = self.ranges.range(..start).next_back();
        let all = before.into_iter().chain(self.ranges.range(start..end));
        let parts = all.map(move |(at, range)| (*at).max(start)..range.end.min(end));
        parts.filter(|part| !part.is_empty())
    }

    /// Returns whether all of a range is zeroed.
    pub(crate) fn contains(&self, start: usize, end: usize) -> bool {
        let at_or_before = self.ranges.range(..=start).next_back();
        at_or_before.is_some_and(|(_, range)| range.end >= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::provisioned;
    use test_support::PAGE_U64 as PAGE;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn replace(ranges: &mut ZeroedRanges, start: usize, end: usize) -> usize {
        assert_eq!(
            ranges.replace(start, end, || Ok::<(), ()>(())),
            Some(Ok(()))
        );
        ranges.vmas.count()
    }

    #[test]
    fn replace_joins_ranges_that_touch() {
        let mut ranges = ZeroedRanges::default();
        assert_eq!(replace(&mut ranges, 10, 20), 2);
        assert_eq!(replace(&mut ranges, 40, 50), 4);
        assert_eq!(replace(&mut ranges, 30, 35), 6);
        // A range between two others joins them. The VMA between them is gone.
        assert_eq!(replace(&mut ranges, 20, 30), 5);
        assert_eq!(ranges.ranges.len(), 2);
        assert!(ranges.contains(10, 35) && !ranges.contains(10, 36) && !ranges.contains(9, 11));
        // A range that touches one other needs no VMA.
        assert_eq!(replace(&mut ranges, 35, 36), 5);
        assert_eq!(replace(&mut ranges, 9, 12), 5);
        // A covered range no longer needs a VMA. A partly covered one keeps all its VMAs.
        assert_eq!(replace(&mut ranges, 30, 60), 3);
        assert_eq!(replace(&mut ranges, 0, 100), 2);
        assert_eq!((ranges.ranges.len(), ranges.contains(0, 100)), (1, true));
    }

    #[test]
    fn replace_whose_splice_fails_takes_no_vmas() {
        let mut ranges = ZeroedRanges::default();
        assert_eq!(ranges.replace(10, 20, || Err(())), Some(Err(())));
        assert_eq!((ranges.ranges.len(), ranges.vmas.count()), (0, 0));
        replace(&mut ranges, 10, 20);
        assert_eq!(ranges.replace(15, 30, || Err(())), Some(Err(())));
        assert!(ranges.contains(10, 20) && !ranges.contains(10, 30) && ranges.vmas.count() == 2);
    }

    /// Compares the upper bound with the kernel's VMAs, for random discards and writes.
    #[test]
    fn vmas_of_random_discards_never_exceed_the_count() {
        const PAGES: u64 = 64;
        let file = test_support::temp_file_of_len(PAGES * PAGE);
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut most = 0;
        for _ in 0..40 {
            let backing = crate::Backing::private_file(file.try_clone().unwrap(), 0);
            let region = crate::Region::new(GuestAddress(0), PAGES * PAGE).backing(backing);
            let memory: GuestMemoryMmap =
                crate::MemoryBuilder::new().region(region).build().unwrap();
            let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
            let first = mapping.host_address();
            let inside = first..first + mapping.mapped().len();
            for _ in 0..80 {
                let page = random(PAGES);
                let len = match random(4) {
                    0 => 1 + random(PAGES - page),
                    _ => 1,
                };
                crate::discard(&memory, GuestAddress(page * PAGE), len * PAGE).unwrap();
                if random(2) == 0 {
                    let touched = GuestAddress(random(PAGES) * PAGE);
                    memory.write_obj(1u8, touched).unwrap();
                    memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
                }
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let starts = maps.lines().filter_map(|line| line.split_once('-'));
                let starts = starts.filter_map(|(start, _)| usize::from_str_radix(start, 16).ok());
                let vmas = starts.filter(|start| inside.contains(start)).count();
                let counted = mapping.hold_blocks().unwrap().vmas.count();
                // The VMA of the mapping itself is not counted here.
                assert!(vmas <= counted + 1, "{vmas} VMAs, {counted} counted");
                most = most.max(vmas);
            }
        }
        assert!(most > 10, "{most}");
    }
}
