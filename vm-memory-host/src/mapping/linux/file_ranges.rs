//! [`FileRanges`]: the bytes of a file that several regions map.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges of a file, as start and end. No range is adjacent to another one.
#[derive(Default)]
pub(crate) struct FileRanges {
    ends: BTreeMap<u64, u64>,
    /// The number of bytes in all ranges.
    total: u64,
}

impl FileRanges {
    /// Adds a range, which may overlap others. Returns its parts that no range has covered before.
    pub(crate) fn insert(&mut self, start: u64, len: u64) -> Vec<Range<u64>> {
        let Range { mut start, mut end } = start..start.saturating_add(len);
        let (first, mut rest, mut added) = (start, end, Vec::new());
        // Each step removes a range, so the cost of all calls grows with their number only.
        while let Some((&other, &other_end)) = self.ends.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            if other_end < rest {
                added.push(other_end..rest);
            }
            rest = rest.min(other);
            self.ends.remove(&other);
            self.total = self.total.saturating_sub(other_end.saturating_sub(other));
            (start, end) = (start.min(other), end.max(other_end));
        }
        self.ends.insert(start, end);
        self.total = self.total.saturating_add(end.saturating_sub(start));
        if first < rest {
            added.push(first..rest);
        }
        added.reverse();
        added
    }

    /// Returns the number of bytes in all ranges.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insert_of_ranges_counts_each_byte_once() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut ranges, mut all) = (FileRanges::default(), [false; 32]);
            for step in 0..8 {
                let (start, len) = (random.u64(..16), random.u64(..16));
                let added = ranges.insert(start, len);
                let is_new = |at: &u64| !all[*at as usize];
                let expected: Vec<_> = (start..start + len).filter(is_new).collect();
                assert_eq!(added.into_iter().flatten().collect::<Vec<_>>(), expected);
                all[start as usize..(start + len) as usize].fill(true);
                let count = all.iter().filter(|has| **has).count();
                assert_eq!(ranges.total, count as u64, "{seed} {step}");
            }
        }
    }
}
