//! The parts of a range for which a lookup fails.

use super::super::error::BoundRefusal;
use super::super::mapping_table::count_steps;
use super::super::{IotlbFails, IovaRange};
use super::priority::Verdict;
use super::{Iotlb, IovaMapping, Position, Span};
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::{GuestAddress, Permissions};

/// Returns the range from a first to a last address.
fn range_of(first: u64, last: u64) -> IovaRange {
    let length = last.wrapping_sub(first).saturating_add(1);
    IovaRange {
        base: GuestAddress(first),
        length: to_usize(length),
    }
}

/// Returns the outcome of a lookup of a range that passes the end of the address space.
#[cold]
pub(super) fn fails_past_the_end(base: GuestAddress, length: usize) -> IotlbFails {
    IotlbFails {
        misses: Vec::new(),
        access_fails: vec![IovaRange { base, length }],
    }
}

impl Iotlb {
    /// Returns the parts of the range from `first` to `last` that are missing, or do not permit an
    /// access.
    ///
    /// `position` is that of the last mapping that starts at or before `first`. If there is none,
    /// it is that of the first mapping.
    #[cold]
    pub(super) fn find_fails(
        &self,
        mut position: Position,
        first: u64,
        last: u64,
        access: Permissions,
    ) -> IotlbFails {
        let mappings = &self.mappings;
        // The mapping may end before the range.
        if mappings
            .get(position)
            .is_some_and(|mapping| mapping.last < first)
        {
            position = mappings.next(position);
        }
        if mappings
            .get(position)
            .is_none_or(|mapping| mapping.start > last)
        {
            let misses = vec![range_of(first, last)];
            return self.limit_tries(first, last, misses, Vec::new());
        }
        let refused_by_bound = self.needs_more_than_bound(position, first, last);
        let (mut misses, mut access_fails) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        loop {
            if let (Some(from), Some(leaf)) = (next, mappings.whole_leaf_at(position, last)) {
                if leaf.covers(from, access) {
                    // No mapping of the leaf fails.
                    position = leaf.next();
                    next = leaf.last().checked_add(1);
                    continue;
                }
            }
            let mapping = mappings.get(position).filter(|it| it.start <= last);
            let Some((mapping, from)) = mapping.zip(next) else {
                break;
            };
            count_steps(1);
            position = mappings.next(position);
            let start = mapping.start.max(first);
            let end = mapping.last.min(last);
            if from < start {
                misses.push(range_of(from, start.wrapping_sub(1)));
            }
            if !mapping.allows(access) {
                access_fails.push(range_of(start, end));
            }
            next = end.checked_add(1).filter(|_| end < last);
        }
        if let Some(from) = next {
            misses.push(range_of(from, last));
        }
        if refused_by_bound {
            self.record_end(Span { first, last });
            return IotlbFails::refused(BoundRefusal::NeedsMore, misses, access_fails);
        }
        self.limit_tries(first, last, misses, access_fails)
    }

    /// Records that a failed lookup is final, so that its caller does not repeat it.
    fn record_end(&self, range: Span) {
        if let Some(priority) = &self.priority {
            priority.ended(range);
        }
    }

    /// Returns the outcome of a failed lookup. With a bound, it counts the tries of the range, and
    /// refuses the range after the last one.
    fn limit_tries(
        &self,
        first: u64,
        last: u64,
        mut misses: Vec<IovaRange>,
        access_fails: Vec<IovaRange>,
    ) -> IotlbFails {
        if misses.is_empty() {
            self.record_end(Span { first, last });
        } else if let Some(priority) = &self.priority {
            let missing = misses
                .iter()
                .fold(0u64, |sum, range| sum.saturating_add(to_u64(range.length)));
            match priority.failed(Span { first, last }, missing) {
                Verdict::Refuse => {
                    return IotlbFails::refused(BoundRefusal::TriesSpent, misses, access_fails);
                }
                Verdict::AskForAll if access_fails.is_empty() => {
                    misses = vec![range_of(first, last)];
                }
                Verdict::AskForParts | Verdict::AskForAll => {}
            }
        }
        IotlbFails {
            misses,
            access_fails,
        }
    }

    /// Returns whether a range needs more mappings than the bound permits at a time.
    ///
    /// `position` is that of the first cached mapping of the range.
    ///
    /// Nothing was invalidated or replaced since `self.evicted` was evicted. So the guest's table
    /// still has this mapping, and all cached ones. The function counts those of the range, in the
    /// order of their addresses. Two successive ones that do not continue each other are two
    /// mappings. Two that do may become one: a mapping of the hole between them joins them. So the
    /// count is a lower bound of the mappings of the range.
    pub(super) fn needs_more_than_bound(
        &self,
        mut position: Position,
        first: u64,
        last: u64,
    ) -> bool {
        let (Some(bound), Some(evicted)) = (self.bound, self.evicted) else {
            return false;
        };
        if evicted.start > last || evicted.last < first {
            return false;
        }
        let mut evicted = Some(evicted);
        let mut before: Option<IovaMapping> = None;
        let mut needed = 0usize;
        // Counts `pieces` mappings from `first` to `end`.
        let mut count = |pieces: usize, first: &IovaMapping, end: &IovaMapping| {
            let is_same = before.is_some_and(|before| before.continues(first));
            let more = pieces.saturating_sub(usize::from(is_same));
            needed = needed.saturating_add(more);
            before = Some(*end);
        };
        while let Some(mapping) = self.mappings.get(position).filter(|it| it.start <= last) {
            if let Some(evicted) = evicted.take_if(|evicted| evicted.start < mapping.start) {
                count(1, &evicted, &evicted);
            }
            let leaf = self.mappings.whole_leaf_at(position, last);
            let leaf =
                leaf.filter(|leaf| evicted.is_none_or(|evicted| leaf.last() < evicted.start));
            match leaf
                .as_ref()
                .and_then(|leaf| Some((leaf, leaf.last_mapping()?)))
            {
                Some((leaf, end)) => {
                    count(leaf.pieces(), mapping, end);
                    position = leaf.next();
                }
                None => {
                    count_steps(1);
                    count(1, mapping, mapping);
                    position = self.mappings.next(position);
                }
            }
        }
        if let Some(evicted) = evicted {
            count(1, &evicted, &evicted);
        }
        needed > bound.get()
    }
}
