//! [`Numbers`]: the numbers of memory slots, which are used again.

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet};

/// The numbers of slots, and the first guest address of each slot.
#[derive(Debug)]
pub(super) struct Numbers {
    used: BTreeMap<u32, u64>,
    /// The numbers below `fresh` that are not in use.
    free: BTreeSet<u32>,
    /// The numbers that were never used.
    fresh: Range<u32>,
    limit: u64,
}

impl Numbers {
    pub(super) fn new(all: Range<u32>) -> Self {
        Self {
            used: BTreeMap::new(),
            free: BTreeSet::new(),
            limit: u64::from(all.end.saturating_sub(all.start)),
            fresh: all,
        }
    }

    /// Returns the number of slots that may exist.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns the number of slots that may be created.
    pub(super) fn available(&self) -> u64 {
        let used = u64::try_from(self.used.len()).unwrap_or(u64::MAX);
        self.limit.saturating_sub(used)
    }

    /// Takes the lowest number that is free, for the slot at `start`.
    pub(super) fn take(&mut self, start: u64) -> Option<u32> {
        let number = self.free.pop_first().or_else(|| self.fresh.next())?;
        self.used.insert(number, start);
        Some(number)
    }

    /// Frees a number.
    pub(super) fn release(&mut self, number: u32) {
        if self.used.remove(&number).is_some() {
            self.free.insert(number);
        }
    }

    /// Returns the first guest address of the slot with a number.
    pub(super) fn start_of(&self, number: u32) -> Option<u64> {
        self.used.get(&number).copied()
    }
}
