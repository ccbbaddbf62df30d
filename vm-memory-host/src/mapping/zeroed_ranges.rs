//! [`ZeroedRanges`]: ranges of a private file that were replaced by zeroes.

use std::collections::BTreeMap;

use crate::vma::VmaBudget;

/// Ranges of the mapping of a private file in whose place pages of zeroes were mapped, by where they begin.
///
/// How many areas of addresses the kernel keeps for them is up to what the guest does with its pages, and is not asked for: what is counted is what it can
/// be at most. What is put in its place untouched (`Mapped::splice_over`) becomes one with a range that it touches, whatever has been done to that; two ranges
/// that it touches may have pages each of its own, and stay apart. All ranges of a mapping have the same options.
#[derive(Debug, Default)]
pub(crate) struct ZeroedRanges {
    ranges: BTreeMap<usize, Range>,
    /// The areas that these ranges and protected blocks can be.
    pub(crate) vmas: VmaBudget,
}

/// A range of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    /// Where it ends.
    end: usize,
    /// How many areas it can be.
    pieces: usize,
}

impl Range {
    /// The areas that it can be, and what comes behind it.
    fn areas(self) -> usize {
        self.pieces.saturating_add(1)
    }
}

impl ZeroedRanges {
    /// Puts zeroes in a range by `put`, if a process may have so many areas; nothing is done if it may not. A range that is [in one](Self::has) must not be
    /// put there again.
    pub(crate) fn replace<E>(
        &mut self,
        start: usize,
        end: usize,
        put: impl FnOnce() -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        // Those that it touches or overlaps become one with it.
        let up_to = self.ranges.range(..=end).rev();
        let touched: Vec<(usize, Range)> = up_to
            .take_while(|(_, range)| range.end >= start)
            .map(|(&at, &range)| (at, range))
            .collect();
        let (mut from, mut to, mut pieces, mut before) = (start, end, 0usize, 0usize);
        for (at, range) in &touched {
            before = before.saturating_add(range.areas());
            // Of those that it covers nothing stays.
            if *at < start || range.end > end {
                pieces = pieces.saturating_add(range.pieces);
            }
            from = from.min(*at);
            to = to.max(range.end);
        }
        let joined = Range {
            end: to,
            pieces: pieces.max(1),
        };
        let more = joined.areas().saturating_sub(before);
        if !self.vmas.try_take(more) {
            return None;
        }
        let answer = put();
        if answer.is_err() {
            self.vmas.release(more);
            return Some(answer);
        }
        for (at, _) in &touched {
            self.ranges.remove(at);
        }
        self.ranges.insert(from, joined);
        self.vmas.release(before.saturating_sub(joined.areas()));
        Some(answer)
    }

    /// Whether all of a range is in one of them.
    pub(crate) fn has(&self, start: usize, end: usize) -> bool {
        self.ranges
            .range(..=start)
            .next_back()
            .is_some_and(|(_, range)| range.end >= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::provisioned;
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    fn put(replaced: &mut ZeroedRanges, start: usize, end: usize) -> usize {
        assert_eq!(
            replaced.replace(start, end, || Ok::<(), ()>(())),
            Some(Ok(()))
        );
        replaced.vmas.count()
    }

    #[test]
    fn ranges_that_touch_are_one() {
        let mut replaced = ZeroedRanges::default();
        assert_eq!(put(&mut replaced, 10, 20), 2);
        assert_eq!(put(&mut replaced, 40, 50), 4);
        assert_eq!(put(&mut replaced, 30, 35), 6);
        // What touches two leaves their areas apart, and takes the one between them.
        assert_eq!(put(&mut replaced, 20, 30), 5);
        assert_eq!(replaced.ranges.len(), 2);
        assert!(replaced.has(10, 35) && !replaced.has(10, 36) && !replaced.has(9, 11));
        // What touches one takes nothing of what a process may have.
        assert_eq!(put(&mut replaced, 35, 36), 5);
        assert_eq!(put(&mut replaced, 9, 12), 5);
        // What is covered is nothing any more, and what is covered in part may be all that it was.
        assert_eq!(put(&mut replaced, 30, 60), 3);
        assert_eq!(put(&mut replaced, 0, 100), 2);
        assert_eq!((replaced.ranges.len(), replaced.has(0, 100)), (1, true));
    }

    #[test]
    fn what_is_refused_takes_no_areas() {
        let mut replaced = ZeroedRanges::default();
        assert_eq!(replaced.replace(10, 20, || Err(())), Some(Err(())));
        assert_eq!((replaced.ranges.len(), replaced.vmas.count()), (0, 0));
        put(&mut replaced, 10, 20);
        assert_eq!(replaced.replace(15, 30, || Err(())), Some(Err(())));
        assert!(replaced.has(10, 20) && !replaced.has(10, 30) && replaced.vmas.count() == 2);
    }

    /// Whatever a guest gives back and writes to, and in whatever order: the kernel keeps no more areas for it than are counted.
    #[test]
    fn areas_are_never_more_than_are_counted() {
        const PAGES: u64 = 64;
        const PAGE: u64 = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * PAGE).unwrap();
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
            let memory: vm_memory::GuestMemoryMmap =
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
                    vm_memory::Bytes::write_obj(&memory, 1u8, touched).unwrap();
                    vm_memory::Bytes::write_obj(&memory, 1u8, GuestAddress(page * PAGE)).unwrap();
                }
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let starts = maps.lines().filter_map(|line| line.split_once('-'));
                let starts = starts.filter_map(|(start, _)| usize::from_str_radix(start, 16).ok());
                let areas = starts.filter(|start| inside.contains(start)).count();
                let counted = mapping.hold_blocks().vmas.count();
                assert!(areas <= counted + 1, "{areas} areas, {counted} are counted");
                most = most.max(areas);
            }
        }
        assert!(most > 10, "{most}");
    }
}
