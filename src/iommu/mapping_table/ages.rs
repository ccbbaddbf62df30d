//! [`Ages`]: finds the leaf with the oldest mapping.
//!
//! ```text
//!   levels[2]   │ 3 │
//!   levels[1]   │ 7 │ 3 │ 9 │               the lowest of each group of 16 entries below
//!   levels[0]   │ 12  7 … │ 3 … │ 9 … │     one entry per leaf
//! ```
//!
//! A search and a change read at most two groups of each level. So they take about as long for a
//! million mappings as for a thousand.

use core::ops::Range;

/// The number of entries that one entry of the next level stands for.
const GROUP: usize = 16;

#[cfg(test)]
thread_local! {
    /// The number of entries, and of ages of mappings, that this thread has read.
    pub(in crate::iommu) static AGES_READ: core::cell::Cell<usize> =
        const { core::cell::Cell::new(0) };
}

/// Counts that this number of ages is read.
#[inline(always)]
pub(super) fn count_reads(_number: usize) {
    #[cfg(test)]
    AGES_READ.set(AGES_READ.get().wrapping_add(_number));
}

/// For each leaf, a lower bound of the ages of its mappings.
#[derive(Debug, Default)]
pub(super) struct Ages {
    /// The last level has at most [`GROUP`] entries. There are no levels until the first leaf is
    /// added.
    levels: Vec<Vec<u64>>,
}

/// Returns the lowest of some entries.
fn least(entries: &[u64]) -> u64 {
    count_reads(entries.len());
    entries.iter().copied().min().unwrap_or(u64::MAX)
}

/// Returns the entries of a level that one entry of the next level stands for.
fn group(level: &[u64], number: usize) -> &[u64] {
    level.chunks(GROUP).nth(number).unwrap_or_default()
}

impl Ages {
    /// Creates the ages of leaves.
    pub(super) fn new(leaves: impl Iterator<Item = u64>) -> Self {
        let levels = vec![leaves.collect()];
        let mut ages = Ages { levels };
        ages.rebuild(0);
        ages
    }

    /// Copies `source` into the existing allocations.
    pub(super) fn copy_from(&mut self, source: &Self) {
        self.levels.clone_from(&source.levels);
    }

    /// Returns the number of leaves.
    pub(super) fn len(&self) -> usize {
        self.levels.first().map_or(0, Vec::len)
    }

    /// Returns the lower bound of a leaf.
    pub(super) fn get(&self, leaf: usize) -> Option<u64> {
        self.levels.first()?.get(leaf).copied()
    }

    /// Updates the lower bound of a leaf that has received a mapping of this age.
    #[inline]
    pub(super) fn lower(&mut self, leaf: usize, age: u64) {
        let mut number = leaf;
        for level in &mut self.levels {
            match level.get_mut(number) {
                // The entries of the next levels are not higher than this one.
                Some(entry) if age < *entry => *entry = age,
                _ => return,
            }
            number /= GROUP;
        }
    }

    /// Sets the lower bound of a leaf.
    pub(super) fn set(&mut self, leaf: usize, age: u64) {
        let (mut number, mut age) = (leaf, age);
        for level in &mut self.levels {
            match level.get_mut(number) {
                Some(entry) if *entry != age => *entry = age,
                _ => return,
            }
            number /= GROUP;
            age = least(group(level, number));
        }
    }

    /// Adds a leaf before the one with this number, or at the end.
    pub(super) fn insert(&mut self, leaf: usize, age: u64) {
        if self.levels.is_empty() {
            self.levels.push(Vec::new());
        }
        if let Some(leaves) = self.levels.first_mut() {
            leaves.insert(leaf.min(leaves.len()), age);
        }
        self.rebuild(leaf);
    }

    /// Removes leaves.
    pub(super) fn remove(&mut self, range: Range<usize>) {
        let from = range.start;
        if let Some(leaves) = self.levels.first_mut() {
            leaves.drain(range);
        }
        self.rebuild(from);
    }

    /// Rebuilds the upper levels after a change of leaf `from` and the leaves after it.
    fn rebuild(&mut self, mut from: usize) {
        let mut depth = 0usize;
        while let Some((level, above)) = self
            .levels
            .get_mut(depth..)
            .and_then(<[Vec<u64>]>::split_first_mut)
            .filter(|(level, _)| level.len() > GROUP)
        {
            depth = depth.saturating_add(1);
            from /= GROUP;
            match above.first_mut() {
                Some(above) => {
                    above.truncate(from);
                    above.extend(level.chunks(GROUP).skip(from).map(least));
                }
                None => {
                    let above = level.chunks(GROUP).map(least).collect();
                    self.levels.push(above);
                }
            }
        }
        self.levels.truncate(depth.saturating_add(1));
    }

    /// Returns the leaf with the lowest bound among all leaves except some, and the bound.
    ///
    /// If several leaves have that bound, returns the first one.
    pub(super) fn oldest_except(&self, except: Range<usize>) -> Option<(usize, u64)> {
        let before = self.oldest_in(0..except.start.min(self.len()));
        let after = self.oldest_in(except.end..self.len());
        match (before, after) {
            (Some(before), Some(after)) if after.1 < before.1 => Some(after),
            (before, after) => before.or(after),
        }
    }

    /// Returns the leaf of a range with the lowest bound, and the bound.
    ///
    /// If several leaves have that bound, returns the first one.
    fn oldest_in(&self, range: Range<usize>) -> Option<(usize, u64)> {
        let Range {
            start: mut from,
            end: mut to,
        } = range;
        // The age, and the first leaf that the entry stands for, which decides between equal ages.
        let mut best: Option<(u64, usize)> = None;
        let mut best_at = (0usize, 0usize);
        let mut width = 1usize;
        for (depth, level) in self.levels.iter().enumerate() {
            // The entries whose groups are partly in the range. In the last level, all of them.
            let is_last = depth.saturating_add(1) == self.levels.len();
            let begin = from.next_multiple_of(GROUP);
            let end = to.saturating_sub(to % GROUP);
            let (begin, end) = if begin < end && !is_last {
                (begin, end)
            } else {
                (to, to)
            };
            for part in [from..begin, end..to] {
                let entries = level.get(part.clone()).unwrap_or_default();
                count_reads(entries.len());
                for (number, age) in part.zip(entries) {
                    let key = (*age, number.saturating_mul(width));
                    if best.is_none_or(|best| key < best) {
                        best = Some(key);
                        best_at = (depth, number);
                    }
                }
            }
            if begin == end {
                break;
            }
            (from, to) = (begin / GROUP, end / GROUP);
            width = width.saturating_mul(GROUP);
        }
        let (age, _) = best?;
        let (depth, mut number) = best_at;
        for level in self.levels.get(..depth)?.iter().rev() {
            let entries = group(level, number);
            count_reads(entries.len());
            let first = entries.iter().position(|entry| *entry == age)?;
            number = number.saturating_mul(GROUP).saturating_add(first);
        }
        Some((number, age))
    }
}
