//! The mappings of an IOTLB in the order of their addresses, made for being searched.
//!
//! ```text
//!   hints     │ 0 │ 0 │ 1 │ 1 │ 2 │ …     by the high bits of an address: about which leaf
//!               ▼       ▼       ▼
//!   leaves    │ first, scale, len │ …     a step right or left of the hint, or a binary search, if it was wrong
//!               │
//!               ▼
//!   entries   │ start last offset tag │ × 128, sorted; `scale` says about which; shared by copies of the table until one of them changes it
//! ```
//!
//! Where addresses are spread evenly, as they are in an I/O address space that is mapped page by page, both guesses are right and a search looks
//! at three places, however many mappings there are. Where they are not, a guest may make both wrong: then there are two binary
//! searches, which it cannot make longer. Nothing trusts a guess: an entry is taken if the address lies behind its start and before the next one's.
//!
//! Leaves are full after mappings that were made in ascending order. Where mappings go, neighbouring leaves that fill three quarters of one become
//! one: not more, or a mapping that comes and goes would have them split and join each time. So two neighbours fill more than that, and a mapping
//! takes no more than 4096 * 2 / 97 = 85 bytes in its leaf.
//!
//! A copy of a table costs a count for each leaf, and each leaf that is changed afterwards, a copy of that. A copy that is brought up to date
//! ([`clone_from`](Clone::clone_from)) costs a comparison for each leaf that both have.

use core::ops::Range;
use std::sync::Arc;

use crate::guest_memory::Permissions;

/// Mappings in a leaf at most.
const CAPACITY: usize = 128;
/// Neighbouring leaves of so many mappings together become one.
const JOINED: usize = CAPACITY / 4 * 3;
/// Hints for each leaf: the more, the less often a hint is one leaf off.
const HINTS_PER_LEAF: usize = 4;
/// The hints are made anew when one in so many leaves has come or gone.
const STALE: usize = 16;

/// What the addresses from a first to a last one are mapped to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mapping {
    /// The first address.
    pub(super) start: u64,
    /// The last address: a range may end with the address space, where there is no next one.
    pub(super) last: u64,
    /// What to add to an I/O virtual address, wrapping, for its guest physical address.
    pub(super) offset: u64,
    /// Age and permissions.
    pub(super) tag: u64,
}

/// Bits of the tag that are permissions.
const PERMISSION_BITS: u32 = 2;
const PERMISSION_MASK: u64 = (1 << PERMISSION_BITS) - 1;

impl Mapping {
    pub(super) fn new(
        start: u64,
        last: u64,
        offset: u64,
        permissions: Permissions,
        age: u64,
    ) -> Self {
        Mapping {
            start,
            last,
            offset,
            tag: age.wrapping_shl(PERMISSION_BITS) | u64::from(permissions.bits()),
        }
    }

    /// Whether it permits an access.
    #[inline(always)]
    pub(super) fn allows(&self, access: Permissions) -> bool {
        u64::from(access.bits()) & !self.tag == 0
    }

    /// When it was made, or last grew: later is greater.
    pub(super) fn age(&self) -> u64 {
        self.tag >> PERMISSION_BITS
    }

    /// Whether two mappings that are neighbours are one.
    pub(super) fn continues(&self, other: &Mapping) -> bool {
        self.offset == other.offset && (self.tag ^ other.tag) & PERMISSION_MASK == 0
    }
}

/// The place of a mapping: its leaf, and its number in there. A guess, once the table may have changed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    leaf: usize,
    entry: usize,
}

/// Neighbouring mappings. Never empty.
#[derive(Debug)]
struct Leaf {
    /// The start of the first one.
    first: u64,
    /// How many mappings begin in an address, as a fraction of 2^64, if they are spread evenly.
    scale: u64,
    /// Sorted up to `len`. Other tables may have them, too: whoever changes them takes a copy then.
    entries: Arc<[Mapping; CAPACITY]>,
    len: usize,
}

/// Shares the mappings.
impl Clone for Leaf {
    fn clone(&self) -> Self {
        Leaf {
            entries: Arc::clone(&self.entries),
            ..*self
        }
    }

    /// A leaf that has the same mappings keeps them: no count is touched, which costs more than all the rest.
    #[inline]
    fn clone_from(&mut self, source: &Self) {
        if !Arc::ptr_eq(&self.entries, &source.entries) {
            self.entries = Arc::clone(&source.entries);
        }
        self.first = source.first;
        self.scale = source.scale;
        self.len = source.len;
    }
}

impl Leaf {
    fn of(mappings: &[Mapping]) -> Self {
        let mut entries = [Mapping::default(); CAPACITY];
        let len = mappings.len().min(CAPACITY);
        for (to, from) in entries.iter_mut().zip(mappings) {
            *to = *from;
        }
        let mut leaf = Leaf {
            first: 0,
            scale: 0,
            entries: Arc::new(entries),
            len,
        };
        leaf.measure();
        leaf
    }

    /// The mappings, to be changed: by this table alone.
    fn own(&mut self) -> &mut [Mapping; CAPACITY] {
        Arc::make_mut(&mut self.entries)
    }

    #[inline(always)]
    fn mappings(&self) -> &[Mapping] {
        self.entries.get(..self.len).unwrap_or_default()
    }

    /// After a change of the mappings.
    fn measure(&mut self) {
        let (Some(first), Some(last)) = (self.mappings().first(), self.mappings().last()) else {
            return;
        };
        let (first, span) = (first.start, last.start.wrapping_sub(first.start));
        self.first = first;
        // Rounded up, so that the start of a mapping is its own and not the one's before.
        self.scale = match u64::try_from(self.len.saturating_sub(1)) {
            Ok(steps) if steps != 0 && span > steps => {
                // In the upper 32 bits of the span: a division of 128 bits takes as long as the rest, and guesses are checked.
                let shift = 32u32.saturating_sub(span.leading_zeros());
                let part = steps
                    .wrapping_shl(56)
                    .checked_div(span.wrapping_shr(shift))
                    .unwrap_or(0);
                match shift.checked_sub(8) {
                    Some(less) => part.wrapping_shr(less).saturating_add(1),
                    None => part
                        .saturating_add(1)
                        .saturating_mul(1u64.wrapping_shl(8u32.saturating_sub(shift))),
                }
            }
            Ok(0) | Err(_) => 0,
            Ok(_) => u64::MAX,
        };
    }

    /// The number of the last mapping that begins at or before an address, which is not before the first.
    #[inline(always)]
    fn last_at_or_before(&self, addr: u64) -> usize {
        let product =
            u128::from(addr.wrapping_sub(self.first)).wrapping_mul(u128::from(self.scale));
        let guess = usize::try_from(product.wrapping_shr(64))
            .unwrap_or(usize::MAX)
            .min(self.len.wrapping_sub(1));
        let mappings = self.mappings();
        if let Some(here) = mappings.get(guess) {
            let before_next = mappings
                .get(guess.wrapping_add(1))
                .is_none_or(|next| addr < next.start);
            if here.start <= addr && before_next {
                return guess;
            }
        }
        mappings
            .partition_point(|mapping| mapping.start <= addr)
            .saturating_sub(1)
    }

    /// Puts a mapping in at a number, before those from there on. There is room.
    fn insert(&mut self, at: usize, mapping: Mapping) {
        let end = self.len.saturating_add(1);
        if let Some(moved) = self.own().get_mut(at..end) {
            moved.rotate_right(1);
            if let Some(first) = moved.first_mut() {
                *first = mapping;
            }
            self.len = end;
            self.measure();
        }
    }

    /// Takes mappings out.
    fn remove(&mut self, range: Range<usize>) {
        let len = self.len;
        if range.end <= len {
            if range.end < len {
                self.own().copy_within(range.end..len, range.start);
            }
            self.len = len.saturating_sub(range.len());
            self.measure();
        }
    }

    /// Takes over the mappings of the leaf behind this one. There is room.
    fn append(&mut self, behind: &Leaf) {
        let (len, end) = (self.len, self.len.saturating_add(behind.len));
        if let Some(to) = self.own().get_mut(len..end) {
            to.copy_from_slice(behind.mappings());
            self.len = end;
            self.measure();
        }
    }
}

/// About which leaf an address is in.
#[derive(Clone, Debug, Default)]
struct Hints {
    /// The address that the first one is for.
    base: u64,
    /// Each is for so many addresses, as a power of two.
    shift: u32,
    /// Shared by copies of the table.
    leaves: Arc<[u32]>,
}

impl Hints {
    fn of(leaves: &[Leaf]) -> Self {
        let (Some(first), Some(last)) = (leaves.first(), leaves.last()) else {
            return Hints::default();
        };
        let (base, span) = (first.first, last.first.wrapping_sub(first.first));
        let wanted = u64::try_from(leaves.len().saturating_mul(HINTS_PER_LEAF)).unwrap_or(u64::MAX);
        let mut shift = 0u32;
        while span.wrapping_shr(shift) >= wanted {
            shift = shift.saturating_add(1);
        }
        let mut hints = Vec::with_capacity(
            usize::try_from(span.wrapping_shr(shift))
                .unwrap_or(0)
                .saturating_add(1),
        );
        for (number, leaf) in leaves.iter().enumerate() {
            // The leaf is for all hints whose addresses begin from its first one on, up to the next leaf's.
            let next = leaves.get(number.saturating_add(1));
            let end = next.map_or(span, |next| next.first.wrapping_sub(base).saturating_sub(1));
            let end = usize::try_from(end.wrapping_shr(shift)).unwrap_or(usize::MAX);
            debug_assert!(leaf.first >= base);
            while hints.len() <= end {
                hints.push(u32::try_from(number).unwrap_or(0));
            }
        }
        Hints {
            base,
            shift,
            leaves: hints.into(),
        }
    }

    #[inline(always)]
    fn of_address(&self, addr: u64) -> usize {
        let number = addr.wrapping_sub(self.base).wrapping_shr(self.shift);
        let number = usize::try_from(number)
            .unwrap_or(usize::MAX)
            .min(self.leaves.len().wrapping_sub(1));
        let leaf = self.leaves.get(number).copied().unwrap_or(0);
        usize::try_from(leaf).unwrap_or(0)
    }
}

#[cfg(test)]
thread_local! {
    /// How many searches this thread has made.
    pub(super) static SEARCHES: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// Mappings that have no address in common.
#[derive(Debug, Default)]
pub(super) struct MappingTable {
    leaves: Vec<Leaf>,
    /// For each leaf, an age that no mapping in it is older than.
    oldest: Vec<u64>,
    hints: Hints,
    /// How many leaves have come or gone since the hints were made.
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
        self.oldest.clone_from(oldest);
        self.hints.base = hints.base;
        self.hints.shift = hints.shift;
        if !Arc::ptr_eq(&self.hints.leaves, &hints.leaves) {
            self.hints.leaves = Arc::clone(&hints.leaves);
        }
        self.stale = *stale;
        self.len = *len;
    }
}

impl MappingTable {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// How many leaves there are.
    pub(super) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// All of them, in order.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.leaves.iter().flat_map(Leaf::mappings)
    }

    /// The mapping at a place, if there is one.
    #[inline(always)]
    pub(super) fn get(&self, place: Place) -> Option<&Mapping> {
        let Place { leaf, entry } = place;
        self.leaves.get(leaf)?.mappings().get(entry)
    }

    /// The place behind one.
    #[inline(always)]
    pub(super) fn next(&self, place: Place) -> Place {
        let Place { leaf, entry } = place;
        match self.leaves.get(leaf) {
            Some(this) if entry.wrapping_add(1) >= this.len => Place {
                leaf: leaf.wrapping_add(1),
                entry: 0,
            },
            _ => Place {
                leaf,
                entry: entry.wrapping_add(1),
            },
        }
    }

    /// Whether the mappings from a place on have all addresses from `first`, which is the first one's, to `last`, and permit an access.
    pub(super) fn cover(&self, place: Place, first: u64, last: u64, access: Permissions) -> bool {
        let mut next = first;
        let mut entry = place.entry;
        for leaf in self.leaves.get(place.leaf..).unwrap_or_default() {
            for mapping in leaf.mappings().get(entry..).unwrap_or_default() {
                if mapping.start > next || next > mapping.last || !mapping.allows(access) {
                    return false;
                }
                if last <= mapping.last {
                    return true;
                }
                // Less than `last`, so that there is a next one.
                next = mapping.last.wrapping_add(1);
            }
            entry = 0;
        }
        false
    }

    /// The last mapping that begins at or before an address.
    #[inline(always)]
    pub(super) fn last_at_or_before(&self, addr: u64) -> Option<(Place, &Mapping)> {
        #[cfg(test)]
        SEARCHES.set(SEARCHES.get().wrapping_add(1));
        let leaf = self.leaf_of(addr)?;
        let mappings = self.leaves.get(leaf)?;
        let entry = mappings.last_at_or_before(addr);
        Some((Place { leaf, entry }, mappings.mappings().get(entry)?))
    }

    /// The first mapping that begins at an address or behind it.
    pub(super) fn first_at_or_behind(&self, addr: u64) -> Option<(Place, &Mapping)> {
        let place = match self.last_at_or_before(addr) {
            Some((place, mapping)) if mapping.start == addr => place,
            Some((place, _)) => self.next(place),
            None => Place::default(),
        };
        Some((place, self.get(place)?))
    }

    /// The leaf of the last mapping that begins at or before an address.
    #[inline(always)]
    fn leaf_of(&self, addr: u64) -> Option<usize> {
        // The second look would wait for the first.
        if let [only] = self.leaves.as_slice() {
            return (only.first <= addr).then_some(0);
        }
        let guess = self.hints.of_address(addr);
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

    /// When the guess was wrong.
    #[cold]
    fn leaf_by_search(&self, addr: u64, guess: usize) -> Option<usize> {
        // Mostly it is the next one.
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

    /// Puts a mapping in right behind the one at a place, which is the last that begins before it.
    pub(super) fn insert_behind(&mut self, place: Place, mapping: Mapping) {
        match self.leaves.get_mut(place.leaf) {
            Some(leaf) if leaf.len < CAPACITY => {
                leaf.insert(place.entry.wrapping_add(1), mapping);
                self.has_age(place.leaf, mapping.age());
                self.len = self.len.saturating_add(1);
            }
            _ => self.insert(mapping),
        }
    }

    /// Takes out the mapping at a place, if it is not the only one of its leaf; else it stays, and the answer is `false`.
    pub(super) fn remove_at(&mut self, place: Place) -> bool {
        let Some(leaf) = self
            .leaves
            .get_mut(place.leaf)
            .filter(|leaf| leaf.len > 1 && place.entry < leaf.len)
        else {
            return false;
        };
        leaf.remove(place.entry..place.entry.wrapping_add(1));
        self.len = self.len.saturating_sub(1);
        if leaf.len < JOINED {
            self.join_small(place.leaf);
        }
        true
    }

    /// Takes out the oldest mapping; of several, the one of the lowest addresses.
    pub(super) fn remove_oldest(&mut self) -> Option<Mapping> {
        loop {
            // Of leaves with the same age the first, as of mappings.
            let (number, age) = self
                .oldest
                .iter()
                .copied()
                .enumerate()
                .min_by_key(|(_, age)| *age)?;
            let leaf = self.leaves.get(number)?;
            let mut next = u64::MAX;
            let mut found: Option<(usize, Mapping)> = None;
            for (entry, mapping) in leaf.mappings().iter().enumerate() {
                match found {
                    Some((_, oldest)) if oldest.age() <= mapping.age() => {
                        next = next.min(mapping.age())
                    }
                    _ => {
                        next = found.map_or(next, |(_, oldest)| oldest.age());
                        found = Some((entry, *mapping));
                    }
                }
            }
            let (entry, mapping) = found?;
            if mapping.age() > age {
                // The one that was so old is gone. Each time it is not there, it was taken out before: that is paid for.
                self.set_age(number, mapping.age());
                continue;
            }
            // The others of this leaf are so old, whatever leaf they are in afterwards.
            self.set_age(number, next);
            if !self.remove_at(Place {
                leaf: number,
                entry,
            }) {
                self.remove_within(mapping.start, mapping.last);
            }
            return Some(mapping);
        }
    }

    fn set_age(&mut self, leaf: usize, age: u64) {
        if let Some(oldest) = self.oldest.get_mut(leaf) {
            *oldest = age;
        }
    }

    /// A mapping of that age has come into a leaf.
    #[inline]
    fn has_age(&mut self, leaf: usize, age: u64) {
        if let Some(oldest) = self.oldest.get_mut(leaf) {
            *oldest = age.min(*oldest);
        }
    }

    /// Puts a mapping in. It has no address in common with any other.
    pub(super) fn insert(&mut self, mapping: Mapping) {
        self.len = self.len.saturating_add(1);
        // Before the first leaf there is none; there it goes into the first.
        let number = self.leaf_of(mapping.start).unwrap_or(0);
        let is_last = number.saturating_add(1) >= self.leaves.len();
        let Some(leaf) = self.leaves.get_mut(number) else {
            self.leaves.push(Leaf::of(&[mapping]));
            self.oldest.push(mapping.age());
            self.leaves_changed(1);
            return;
        };
        let at = leaf
            .mappings()
            .partition_point(|other| other.start < mapping.start);
        if leaf.len < CAPACITY {
            leaf.insert(at, mapping);
            self.has_age(number, mapping.age());
            if mapping.start < self.hints.base {
                // No hint is for it.
                self.leaves_changed(1);
            }
            return;
        }
        // Behind everything: leaves stay full.
        if is_last && at == leaf.len {
            self.leaves.push(Leaf::of(&[mapping]));
            self.oldest.push(mapping.age());
            self.leaves_changed(1);
            return;
        }
        let half = leaf.len / 2;
        let mut upper = Leaf::of(leaf.mappings().get(half..).unwrap_or_default());
        leaf.remove(half..leaf.len);
        if at <= half {
            leaf.insert(at, mapping);
        } else {
            upper.insert(at.saturating_sub(half), mapping);
        }
        self.leaves.insert(number.saturating_add(1), upper);
        self.has_age(number, mapping.age());
        let age = self.oldest.get(number).copied().unwrap_or(0);
        self.oldest.insert(number.saturating_add(1), age);
        self.leaves_changed(1);
        // A half may go together with what did not go together with the whole.
        self.join_small(number);
    }

    /// Calls `change` with the mapping at a place, whose start must stay between its neighbours', and which must not become older.
    pub(super) fn change(&mut self, place: Place, change: impl FnOnce(&mut Mapping)) {
        let Place { leaf, entry } = place;
        if let Some(leaf) = self.leaves.get_mut(leaf).filter(|leaf| entry < leaf.len) {
            if let Some(mapping) = leaf.own().get_mut(entry) {
                let start = mapping.start;
                change(mapping);
                if mapping.start != start {
                    leaf.measure();
                }
            }
        }
    }

    /// Takes out all mappings that lie between two addresses with all of theirs.
    pub(super) fn remove_within(&mut self, first: u64, last: u64) {
        let Some((place, _)) = self.first_at_or_behind(first) else {
            return;
        };
        let from = place.leaf;
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
                // The first mapping of this leaf reaches past the range, or the last one of the leaf lies before it.
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
            let gone = range.len();
            self.leaves.drain(range.clone());
            self.oldest.drain(range);
            self.leaves_changed(gone);
        }
        self.join_small(from);
    }

    /// Makes one leaf of two neighbours that fill no more than [`JOINED`] together, around the leaf with that number.
    fn join_small(&mut self, number: usize) {
        for left in [number.saturating_add(1), number, number.saturating_sub(1)] {
            let right = left.saturating_add(1);
            let len = |number: usize| self.leaves.get(number).map(|leaf| leaf.len);
            let (Some(a), Some(b)) = (len(left), len(right)) else {
                continue;
            };
            if a.saturating_add(b) <= JOINED {
                let (upper, age) = (self.leaves.remove(right), self.oldest.remove(right));
                if let Some(leaf) = self.leaves.get_mut(left) {
                    leaf.append(&upper);
                }
                self.has_age(left, age);
                self.leaves_changed(1);
            }
        }
    }

    fn leaves_changed(&mut self, count: usize) {
        self.stale = self.stale.saturating_add(count);
        if self.stale.saturating_mul(STALE) > self.leaves.len() {
            self.hints = Hints::of(&self.leaves);
            self.stale = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::btree_map::Entry;
    use std::collections::{BTreeMap, BTreeSet};

    /// Thousands of mappings that come, go and are evicted in any order, in a table and in one that is made equal to it now and then: the oldest go, every one that
    /// there is is found, and neither table sees what the other one does.
    #[test]
    fn the_oldest_go_and_copies_stay_what_they_were() {
        let mut state = 1u64;
        let mut random = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        // By first address: the age. By age, the first address.
        let (mut table, mut model) = (MappingTable::default(), BTreeMap::new());
        let mut ages = BTreeSet::new();
        let (mut copy, mut model_of_copy) = (MappingTable::default(), Vec::new());
        let contents = |table: &MappingTable| -> Vec<(u64, u64)> {
            table
                .iter()
                .map(|mapping| (mapping.start, mapping.age()))
                .collect()
        };
        let steps: u64 = if cfg!(miri) { 2_000 } else { 60_000 };
        for step in 0..steps {
            let start = random(1 << 13) * 16;
            match random(100) {
                // It grows to some thousands, and shrinks to nothing.
                0..=79 if step / 10_000 % 2 == 0 => {
                    if let Entry::Vacant(free) = model.entry(start) {
                        // Of the same age, now and then, or older than others.
                        let age = (step / 3).saturating_sub(random(2) * random(100));
                        table.insert(Mapping::new(start, start + 9, 0, Permissions::Read, age));
                        free.insert(age);
                        ages.insert((age, start));
                    }
                }
                0..=59 => {
                    let oldest = table
                        .remove_oldest()
                        .map(|mapping| (mapping.age(), mapping.start));
                    assert_eq!(oldest, ages.pop_first());
                    model.remove(&oldest.unwrap_or_default().1);
                }
                60..=89 => {
                    let end = start + 16 * random(20);
                    table.remove_within(start, end);
                    model.retain(|at, age| {
                        let stays = *at < start || at + 9 > end;
                        if !stays {
                            ages.remove(&(*age, *at));
                        }
                        stays
                    });
                }
                _ if step % 50 == 0 => {
                    copy.clone_from(&table);
                    model_of_copy = contents(&table);
                }
                _ => {
                    let found = table
                        .last_at_or_before(start)
                        .map(|(_, mapping)| mapping.start);
                    let expected = model.range(..=start).next_back().map(|(start, _)| *start);
                    assert_eq!(found, expected);
                }
            }
            assert_eq!(table.len(), model.len());
            if step % 500 == 0 {
                let all: Vec<_> = model.iter().map(|(start, age)| (*start, *age)).collect();
                assert_eq!(contents(&table), all);
                assert_eq!(contents(&copy), model_of_copy);
                assert_eq!(table.oldest.len(), table.leaves.len());
                for pair in table.leaves.windows(2) {
                    assert!(pair[0].len + pair[1].len > JOINED, "two that could be one");
                }
            }
        }
    }

    /// A half of a leaf goes together with a small neighbour, which the whole did not go together with.
    #[test]
    fn the_halves_of_a_leaf_join_their_neighbours() {
        let mut table = MappingTable::default();
        let mapping = |start: u64| Mapping::new(start, start + 9, 0, Permissions::Read, start);
        for start in 0..256u64 {
            table.insert(mapping(start * 32));
        }
        table.remove_within(133 * 32, u64::MAX);
        let lens = |table: &MappingTable| -> Vec<usize> {
            table.leaves.iter().map(|leaf| leaf.len).collect()
        };
        assert_eq!(lens(&table), [128, 5]);
        table.insert(mapping(3 * 32 + 16));
        assert_eq!(lens(&table), [65, 69]);
    }

    /// What a copy costs that is brought up to date: the leaves that are the same stay as they are.
    #[test]
    fn a_copy_that_is_brought_up_to_date_shares_all_and_counts_only_what_changed() {
        let mut table = MappingTable::default();
        for start in 0..1000u64 {
            table.insert(Mapping::new(
                start * 16,
                start * 16 + 9,
                0,
                Permissions::Read,
                start,
            ));
        }
        let mut copy = table.clone();
        let counts = |table: &MappingTable| -> Vec<usize> {
            table
                .leaves
                .iter()
                .map(|leaf| Arc::strong_count(&leaf.entries))
                .collect()
        };
        assert_eq!(counts(&table), [2; 8]);
        table.remove_within(16 * 130, 16 * 130 + 9);
        assert_eq!(counts(&table), [2, 1, 2, 2, 2, 2, 2, 2]);
        assert_eq!((table.len(), copy.len()), (999, 1000));
        copy.clone_from(&table);
        assert_eq!(counts(&table), [2; 8]);
        assert_eq!(copy.len(), 999);
        drop(copy);
        assert_eq!(counts(&table), [1; 8]);
    }
}
