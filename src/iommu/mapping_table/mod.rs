//! The mappings of an IOTLB, sorted by address.
//!
//! ```text
//!   hints     │ 0 │ 0 │ 1 │ 1 │ 2 │ …     a guess of the leaf, by the high bits of the address
//!               ▼       ▼       ▼
//!   leaves    │ first, scale, len │ …     corrected by one step, or by a binary search
//!               │
//!               ▼
//!   mappings  │ start last offset tag │ × 128, sorted; `scale` gives a guess of the index
//! ```
//!
//! # Lookup
//!
//! Mappings of an I/O address space that is mapped page by page are spread evenly. Then both
//! guesses are right, and a search loads three cache lines, for any number of mappings. A guest can
//! make both guesses wrong. The search then makes two binary searches, which the guest cannot make
//! longer.
//!
//! A search of a long range skips the leaves that are entirely in it: each has a [`Summary`].
//!
//! A guess is never trusted. A mapping is used only if the address is at or after its start and
//! before the start of the next mapping.
//!
//! # Size
//!
//! Mappings that are made in ascending order fill their leaves. When mappings are removed, two
//! adjacent leaves that together fill at most three quarters of one are joined. They are not joined
//! earlier: a mapping that comes and goes would make them split and join each time. So two adjacent
//! leaves have at least 97 mappings, and a mapping takes at most 4096 * 2 / 97 = 85 bytes.
//!
//! Adding or removing a leaf moves the entries of the leaves after it, in one copy. At most one in
//! 32 changes of a leaf does so.
//!
//! # Age
//!
//! [`Ages`] finds the leaf with the oldest mapping. Removing the oldest mapping therefore takes
//! about as long in a large table as in a small one.
//!
//! # Copies
//!
//! Copies share leaves until one of them changes a leaf; the change copies that leaf. A copy costs
//! one reference count per leaf. Updating a copy with [`clone_from`](Clone::clone_from) costs one
//! comparison per leaf that both have.

mod ages;
mod hints;
mod leaf;
mod mapping;
mod oldest;
mod summary;
#[cfg(test)]
mod tests;

use core::ops::Range;

use crate::guest_memory::Permissions;

use ages::Ages;
use hints::Hints;
use leaf::{Leaf, CAPACITY};
use summary::Summary;

#[cfg(test)]
pub(super) use ages::AGES_READ;
pub(super) use mapping::{IovaMapping, Span};

/// The maximum number of mappings of two adjacent leaves that are joined.
const JOINED: usize = CAPACITY / 4 * 3;
/// The hints are rebuilt when more than one in `STALE` leaves was added or removed.
const STALE: usize = 16;

/// The position of a mapping: a leaf, and an index in it. A guess, if the table may have changed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Position {
    leaf: usize,
    index: usize,
}

#[cfg(test)]
thread_local! {
    /// The number of searches that this thread has made.
    pub(super) static SEARCHES: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
    /// The number of mappings and leaves that the searches of ranges by this thread have read.
    pub(super) static STEPS: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// Counts mappings and leaves that the search of a range reads.
#[inline(always)]
pub(super) fn count_steps(_number: usize) {
    #[cfg(test)]
    STEPS.set(STEPS.get().wrapping_add(_number));
}

/// A leaf that is entirely in a range.
pub(super) struct WholeLeaf<'a> {
    leaf: &'a Leaf,
    summary: Summary,
    /// The position after its last mapping.
    next: Position,
}

/// Mappings that do not overlap, sorted by address.
#[derive(Debug, Default)]
pub(super) struct MappingTable {
    leaves: Vec<Leaf>,
    oldest: Ages,
    hints: Hints,
    /// The number of leaves that were added or removed since the hints were built.
    stale: usize,
    len: usize,
}

/// Shares the leaves.
impl Clone for MappingTable {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.clone_from(self);
        copy
    }

    fn clone_from(&mut self, source: &Self) {
        let Self {
            leaves,
            oldest,
            hints,
            stale,
            len,
        } = source;
        self.leaves.clone_from(leaves);
        self.oldest.copy_from(oldest);
        self.hints.copy_from(hints);
        self.stale = *stale;
        self.len = *len;
    }
}

impl WholeLeaf<'_> {
    /// Returns whether the leaf has all addresses from `first` to its last one, and permits an
    /// access.
    pub(super) fn covers(&self, first: u64, access: Permissions) -> bool {
        self.leaf.first == first && self.summary.covers(access)
    }

    /// Returns the last address.
    pub(super) fn last(&self) -> u64 {
        self.summary.last
    }

    /// Returns the last mapping.
    pub(super) fn last_mapping(&self) -> Option<&IovaMapping> {
        self.leaf.mappings().last()
    }

    /// Returns the position after the last mapping.
    pub(super) fn next(&self) -> Position {
        self.next
    }

    /// Returns the number of mappings that do not continue the one before in the leaf.
    pub(super) fn pieces(&self) -> usize {
        self.summary.pieces()
    }
}

impl MappingTable {
    /// Returns the number of mappings.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Returns the number of leaves.
    pub(super) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    /// Removes all mappings.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns an iterator over all mappings in the order of their addresses.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &IovaMapping> {
        self.leaves.iter().flat_map(Leaf::mappings)
    }

    /// Returns the mapping at a position, if there is one.
    #[inline(always)]
    pub(super) fn get(&self, position: Position) -> Option<&IovaMapping> {
        let Position { leaf, index } = position;
        self.leaves.get(leaf)?.mappings().get(index)
    }

    /// Returns the position after another one.
    #[inline(always)]
    pub(super) fn next(&self, position: Position) -> Position {
        let Position { leaf, index } = position;
        match self.leaves.get(leaf) {
            Some(this) if index.wrapping_add(1) >= this.len => Position {
                leaf: leaf.wrapping_add(1),
                index: 0,
            },
            _ => Position {
                leaf,
                index: index.wrapping_add(1),
            },
        }
    }

    /// Returns whether mappings cover all addresses from `first` to `last`, and permit an access.
    ///
    /// The mapping at `position` must be that of `first`.
    pub(super) fn cover(
        &self,
        position: Position,
        first: u64,
        last: u64,
        access: Permissions,
    ) -> bool {
        let mut next = first;
        let leaf = self.leaves.get(position.leaf);
        let mappings = leaf.and_then(|leaf| leaf.mappings().get(position.index..));
        for mapping in mappings.unwrap_or_default() {
            count_steps(1);
            if mapping.start > next || next > mapping.last || !mapping.allows(access) {
                return false;
            }
            if last <= mapping.last {
                return true;
            }
            // `mapping.last` is less than `last`, so there is a next address.
            next = mapping.last.wrapping_add(1);
        }
        self.leaves_cover(position.leaf.wrapping_add(1), next, last, access)
    }

    /// Returns whether the mappings of `leaf` and the leaves after it cover all addresses from
    /// `first` to `last`, and permit an access.
    #[inline(never)]
    fn leaves_cover(&self, leaf: usize, first: u64, last: u64, access: Permissions) -> bool {
        let (mut number, mut next) = (leaf, first);
        // The leaves that are entirely in the range.
        while let Some(leaf) = self.whole_leaf(number, last) {
            if !leaf.covers(next, access) {
                return false;
            }
            // The first mapping of the next leaf starts after that address.
            next = leaf.last().wrapping_add(1);
            number = number.wrapping_add(1);
        }
        let mut position = Position {
            leaf: number,
            index: 0,
        };
        while let Some(mapping) = self.get(position) {
            count_steps(1);
            if mapping.start != next || !mapping.allows(access) {
                return false;
            }
            if last <= mapping.last {
                return true;
            }
            // `mapping.last` is less than `last`, so there is a next address.
            next = mapping.last.wrapping_add(1);
            position = self.next(position);
        }
        false
    }

    /// Returns a leaf if all its mappings, and the first of the next leaf, start at or before
    /// `last`.
    fn whole_leaf(&self, number: usize, last: u64) -> Option<WholeLeaf<'_>> {
        let after = number.saturating_add(1);
        self.leaves.get(after).filter(|next| next.first <= last)?;
        count_steps(1);
        let leaf = self.leaves.get(number)?;
        Some(WholeLeaf {
            leaf,
            summary: leaf.summary(),
            next: Position {
                leaf: after,
                index: 0,
            },
        })
    }

    /// Returns the leaf that begins at a position, if it is entirely in a range that ends at
    /// `last`.
    pub(super) fn whole_leaf_at(&self, position: Position, last: u64) -> Option<WholeLeaf<'_>> {
        match position.index {
            0 => self.whole_leaf(position.leaf, last),
            _ => None,
        }
    }

    /// Returns the last mapping that starts at or before an address.
    #[inline(always)]
    pub(super) fn last_at_or_before(&self, addr: u64) -> Option<(Position, &IovaMapping)> {
        #[cfg(test)]
        SEARCHES.set(SEARCHES.get().wrapping_add(1));
        let number = self.leaf_of(addr)?;
        let leaf = self.leaves.get(number)?;
        let index = leaf.last_at_or_before(addr);
        let position = Position {
            leaf: number,
            index,
        };
        Some((position, leaf.mappings().get(index)?))
    }

    /// Returns the first mapping that starts at or after an address.
    pub(super) fn first_at_or_after(&self, addr: u64) -> Option<(Position, &IovaMapping)> {
        let position = match self.last_at_or_before(addr) {
            Some((position, mapping)) if mapping.start == addr => position,
            Some((position, _)) => self.next(position),
            None => Position::default(),
        };
        Some((position, self.get(position)?))
    }

    /// Returns the leaf of the last mapping that starts at or before an address.
    #[inline(always)]
    fn leaf_of(&self, addr: u64) -> Option<usize> {
        // Hints are not used: the load of the leaf would wait for the load of the hint.
        if let [only] = self.leaves.as_slice() {
            return (only.first <= addr).then_some(0);
        }
        let guess = self.hints.leaf_of(addr);
        let begins = self
            .leaves
            .get(guess)
            .is_some_and(|leaf| leaf.first <= addr);
        let before_next = self
            .leaves
            .get(guess.wrapping_add(1))
            .is_none_or(|next| addr < next.first);
        if begins && before_next {
            return Some(guess);
        }
        self.leaf_by_search(addr, guess)
    }

    /// Corrects a wrong guess.
    #[cold]
    fn leaf_by_search(&self, addr: u64, guess: usize) -> Option<usize> {
        // Most wrong guesses are one leaf too low.
        let next = guess.wrapping_add(1);
        let is_next = self.leaves.get(next).is_some_and(|leaf| leaf.first <= addr);
        let before_its_next = self
            .leaves
            .get(next.wrapping_add(1))
            .is_none_or(|leaf| addr < leaf.first);
        if is_next && before_its_next {
            return Some(next);
        }
        self.leaves
            .partition_point(|leaf| leaf.first <= addr)
            .checked_sub(1)
    }

    /// Inserts a mapping after the one at `position`, which is the last that starts before it.
    pub(super) fn insert_after(&mut self, position: Position, mapping: IovaMapping) {
        match self.leaves.get_mut(position.leaf) {
            Some(leaf) if leaf.len < CAPACITY => {
                leaf.insert(position.index.wrapping_add(1), mapping);
                self.oldest.lower(position.leaf, mapping.age());
                self.len = self.len.saturating_add(1);
            }
            _ => self.insert(mapping),
        }
    }

    /// Removes the mapping at a position, unless it is the only one of its leaf.
    ///
    /// Returns whether it was removed.
    pub(super) fn remove_at(&mut self, position: Position) -> bool {
        let Position {
            leaf: number,
            index,
        } = position;
        let Some(leaf) = self
            .leaves
            .get_mut(number)
            .filter(|leaf| leaf.len > 1 && index < leaf.len)
        else {
            return false;
        };
        leaf.remove(index..index.wrapping_add(1));
        self.len = self.len.saturating_sub(1);
        if leaf.len < JOINED {
            self.join_small(number);
        }
        true
    }

    /// Inserts a mapping, which must not overlap another one.
    pub(super) fn insert(&mut self, mapping: IovaMapping) {
        self.len = self.len.saturating_add(1);
        // A mapping before the first leaf goes into the first leaf.
        let number = self.leaf_of(mapping.start).unwrap_or(0);
        let is_last = number.saturating_add(1) >= self.leaves.len();
        let Some(leaf) = self.leaves.get_mut(number) else {
            self.push_leaf(mapping);
            return;
        };
        let at = leaf
            .mappings()
            .partition_point(|other| other.start < mapping.start);
        if leaf.len < CAPACITY {
            leaf.insert(at, mapping);
            self.oldest.lower(number, mapping.age());
            if mapping.start < self.hints.base {
                // No hint covers it.
                self.leaves_changed(1);
            }
            return;
        }
        // Past the end of all mappings, the last leaf stays full instead of being split.
        if is_last && at == leaf.len {
            self.push_leaf(mapping);
            return;
        }
        let half = leaf.len / 2;
        let mut upper = Leaf::new(leaf.mappings().get(half..).unwrap_or_default());
        leaf.remove(half..leaf.len);
        if at <= half {
            leaf.insert(at, mapping);
        } else {
            upper.insert(at.saturating_sub(half), mapping);
        }
        self.leaves.insert(number.saturating_add(1), upper);
        self.oldest.lower(number, mapping.age());
        let age = self.oldest.get(number).unwrap_or(0);
        self.oldest.insert(number.saturating_add(1), age);
        self.leaves_changed(1);
        // A half may fit a neighbour that the whole did not fit.
        self.join_small(number);
    }

    /// Appends a leaf with one mapping.
    fn push_leaf(&mut self, mapping: IovaMapping) {
        self.leaves.push(Leaf::new(&[mapping]));
        self.oldest.insert(self.oldest.len(), mapping.age());
        self.leaves_changed(1);
    }

    /// Changes the mapping at a position.
    ///
    /// Its start must stay between those of its neighbours, and it must not become older.
    pub(super) fn change(&mut self, position: Position, change: impl FnOnce(&mut IovaMapping)) {
        if let Some(leaf) = self.leaves.get_mut(position.leaf) {
            leaf.change(position.index, change);
        }
    }

    /// Removes the mappings that are entirely between two addresses.
    pub(super) fn remove_within(&mut self, first: u64, last: u64) {
        let Some((position, _)) = self.first_at_or_after(first) else {
            return;
        };
        let from = position.leaf;
        let mut emptied: Option<Range<usize>> = None;
        for (number, leaf) in self.leaves.iter_mut().enumerate().skip(from) {
            if leaf.first > last {
                break;
            }
            let begin = leaf
                .mappings()
                .partition_point(|mapping| mapping.start < first);
            let end = leaf
                .mappings()
                .partition_point(|mapping| mapping.last <= last);
            if begin >= end {
                // The leaf's first mapping extends past the range, or all of the leaf is before it.
                continue;
            }
            self.len = self.len.saturating_sub(end.wrapping_sub(begin));
            leaf.remove(begin..end);
            if leaf.len == 0 {
                let start = emptied.map_or(number, |range| range.start);
                emptied = Some(start..number.saturating_add(1));
            }
        }
        if let Some(range) = emptied {
            let removed = range.len();
            self.leaves.drain(range.clone());
            self.oldest.remove(range);
            self.leaves_changed(removed);
        }
        self.join_small(from);
    }

    /// Joins a leaf, or the next one, to a neighbour, if both fill at most [`JOINED`].
    fn join_small(&mut self, number: usize) {
        for left in [number.saturating_add(1), number, number.saturating_sub(1)] {
            let right = left.saturating_add(1);
            let len = |number: usize| self.leaves.get(number).map(|leaf| leaf.len);
            let (Some(a), Some(b)) = (len(left), len(right)) else {
                continue;
            };
            if a.saturating_add(b) <= JOINED {
                let age = self.oldest.get(right).unwrap_or(0);
                let upper = self.leaves.remove(right);
                self.oldest.remove(right..right.saturating_add(1));
                if let Some(leaf) = self.leaves.get_mut(left) {
                    leaf.append(&upper);
                }
                self.oldest.lower(left, age);
                self.leaves_changed(1);
            }
        }
    }

    /// Records that leaves were added or removed, and rebuilds the hints if they are too old.
    fn leaves_changed(&mut self, count: usize) {
        self.stale = self.stale.saturating_add(count);
        if self.stale.saturating_mul(STALE) > self.leaves.len() {
            self.hints = Hints::new(&self.leaves);
            self.stale = 0;
        }
    }
}
