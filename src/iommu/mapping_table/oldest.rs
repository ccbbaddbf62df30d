//! The removal of the oldest mappings.

use core::ops::Range;

use super::ages::{count_reads, Ages};
use super::hints::Hints;
use super::leaf::{Leaf, CAPACITY};
use super::{IovaMapping, MappingTable, Position, Span};

/// The oldest of some mappings.
struct Found {
    position: Position,
    mapping: IovaMapping,
    /// A lower bound of the ages of the other mappings of its leaf.
    next: u64,
}

/// Returns the value that orders mappings by age. No two mappings have the same value.
fn key(mapping: &IovaMapping) -> (u64, u64) {
    (mapping.age(), mapping.start)
}

impl MappingTable {
    /// Removes the oldest mapping. If several are as old, removes the one with the lowest
    /// addresses.
    pub(in crate::iommu) fn remove_oldest(&mut self) -> Option<IovaMapping> {
        let oldest = self.oldest_except(0..0)?;
        Some(self.remove_found(oldest))
    }

    /// Removes the oldest mapping that has no address of `kept`.
    ///
    /// If several are as old, removes the one with the lowest addresses.
    pub(in crate::iommu) fn remove_oldest_outside(&mut self, kept: Span) -> Option<IovaMapping> {
        // The leaves with mappings of the range. Other mappings are only in the first and the last.
        let begin = self.leaf_of(kept.first).unwrap_or(0);
        let last = self.leaf_of(kept.last);
        let end = last.map_or(begin, |last| last.saturating_add(1));
        let mut found = self.oldest_except(begin..end);
        for leaf in [Some(begin), last].into_iter().flatten() {
            let here = self.leaves.get(leaf).filter(|_| leaf < end);
            let mappings = here.map(Leaf::mappings).unwrap_or_default();
            count_reads(mappings.len());
            for (index, mapping) in mappings.iter().enumerate() {
                let is_older = |other: &Found| key(mapping) < key(&other.mapping);
                if !mapping.is_in(kept) && found.as_ref().is_none_or(is_older) {
                    found = Some(Found {
                        position: Position { leaf, index },
                        mapping: *mapping,
                        next: 0,
                    });
                }
            }
        }
        found.map(|found| self.remove_found(found))
    }

    /// Removes the oldest mappings until `kept` are left. Returns the number of those removed.
    ///
    /// The time is proportional to the number of mappings before the call.
    pub(in crate::iommu) fn keep_newest(&mut self, kept: usize) -> usize {
        let surplus = self.len.saturating_sub(kept);
        let Some(last) = surplus.checked_sub(1) else {
            return 0;
        };
        let all = || self.leaves.iter().flat_map(Leaf::mappings);
        count_reads(self.len.saturating_mul(2));
        let mut keys: Vec<_> = all().map(key).collect();
        let (_, &mut newest_surplus, _) = keys.select_nth_unstable(last);
        drop(keys);
        let mut rest = all().filter(|mapping| key(mapping) > newest_surplus);
        let mut leaves = Vec::new();
        loop {
            let part: Vec<_> = rest.by_ref().take(CAPACITY).copied().collect();
            if part.is_empty() {
                break;
            }
            leaves.push(Leaf::new(&part));
        }
        let ages = leaves.iter().map(|leaf| {
            let ages = leaf.mappings().iter().map(IovaMapping::age);
            ages.min().unwrap_or(0)
        });
        *self = Self {
            oldest: Ages::new(ages),
            hints: Hints::new(&leaves),
            stale: 0,
            len: kept,
            leaves,
        };
        surplus
    }

    /// Returns the oldest mapping of all leaves except some.
    ///
    /// If several are as old, returns the one with the lowest addresses.
    fn oldest_except(&mut self, except: Range<usize>) -> Option<Found> {
        loop {
            let (number, age) = self.oldest.oldest_except(except.clone())?;
            let leaf = self.leaves.get(number)?;
            count_reads(leaf.len);
            let mut next = u64::MAX;
            let mut found: Option<(usize, IovaMapping)> = None;
            for (index, mapping) in leaf.mappings().iter().enumerate() {
                match found {
                    Some((_, oldest)) if oldest.age() <= mapping.age() => {
                        next = next.min(mapping.age())
                    }
                    _ => {
                        next = found.map_or(next, |(_, oldest)| oldest.age());
                        found = Some((index, *mapping));
                    }
                }
            }
            let (index, mapping) = found?;
            if mapping.age() <= age {
                let leaf = number;
                return Some(Found {
                    position: Position { leaf, index },
                    mapping,
                    next,
                });
            }
            // The bound was too low: the mapping of that age was removed before. Each removal
            // causes at most one such round.
            self.oldest.set(number, mapping.age());
        }
    }

    /// Removes a mapping that was found.
    fn remove_found(&mut self, found: Found) -> IovaMapping {
        let Found {
            position,
            mapping,
            next,
        } = found;
        // Valid for the rest of the leaf, wherever these mappings are afterwards.
        let bound = self.oldest.get(position.leaf);
        if bound.is_some_and(|age| age < next) {
            self.oldest.set(position.leaf, next);
        }
        if !self.remove_at(position) {
            self.remove_within(mapping.start, mapping.last);
        }
        mapping
    }
}
