//! The mappings of an IOTLB in the order of their addresses, made for being searched.
//!
//! ```text
//!   hints     │ 0 │ 0 │ 1 │ 1 │ 2 │ …     by the high bits of an address: about which leaf
//!               ▼       ▼       ▼
//!   leaves    │ first, scale, len │ …     a step right or left of the hint, or a binary search, if it was wrong
//!               │
//!               ▼
//!   entries   │ start last offset tag │ × 128, sorted; `scale` says about which
//! ```
//!
//! Where addresses are spread evenly, as they are in an I/O address space that is mapped page by page, both guesses are right and a search looks
//! at three places, however many mappings there are. Where they are not, a guest may make both wrong: then there are two binary
//! searches, which it cannot make longer. Nothing trusts a guess: an entry is taken if the address lies behind its start and before the next one's.
//!
//! Leaves are full after mappings that were made in ascending order. Where mappings go, neighbouring leaves that fill less than half of one become
//! one.

use core::ops::Range;

use crate::guest_memory::Permissions;

/// Mappings in a leaf at most.
const CAPACITY: usize = 128;
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
    pub(super) fn new(start: u64, last: u64, offset: u64, permissions: Permissions, age: u64) -> Self {
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
#[derive(Clone, Debug)]
struct Leaf {
    /// The start of the first one.
    first: u64,
    /// How many mappings begin in an address, as a fraction of 2^64, if they are spread evenly.
    scale: u64,
    /// Sorted up to `len`.
    entries: Box<[Mapping; CAPACITY]>,
    len: usize,
}

impl Leaf {
    fn of(mappings: &[Mapping]) -> Self {
        let mut leaf = Leaf {
            first: 0,
            scale: 0,
            entries: Box::new([Mapping::default(); CAPACITY]),
            len: mappings.len().min(CAPACITY),
        };
        if let Some(to) = leaf.entries.get_mut(..mappings.len()) {
            to.copy_from_slice(mappings);
        }
        leaf.measure();
        leaf
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
        let product = u128::from(addr.wrapping_sub(self.first)).wrapping_mul(u128::from(self.scale));
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
        if let Some(moved) = self.entries.get_mut(at..self.len.saturating_add(1)) {
            moved.rotate_right(1);
            if let Some(first) = moved.first_mut() {
                *first = mapping;
            }
            self.len = self.len.saturating_add(1);
            self.measure();
        }
    }

    /// Takes mappings out.
    fn remove(&mut self, range: Range<usize>) {
        if range.end <= self.len {
            self.entries.copy_within(range.end..self.len, range.start);
            self.len = self.len.saturating_sub(range.len());
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
    leaves: Vec<u32>,
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
            leaves: hints,
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

/// Mappings that have no address in common.
#[derive(Clone, Debug, Default)]
pub(super) struct MappingTable {
    leaves: Vec<Leaf>,
    hints: Hints,
    /// How many leaves have come or gone since the hints were made.
    stale: usize,
    len: usize,
}

impl MappingTable {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// All of them, in order.
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
        let begins = self.leaves.get(guess).is_some_and(|leaf| leaf.first <= addr);
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
        if leaf.len <= CAPACITY / 2 {
            self.join_small(place.leaf);
        }
        true
    }

    /// Puts a mapping in. It has no address in common with any other.
    pub(super) fn insert(&mut self, mapping: Mapping) {
        self.len = self.len.saturating_add(1);
        // Before the first leaf there is none; there it goes into the first.
        let number = self.leaf_of(mapping.start).unwrap_or(0);
        let is_last = number.saturating_add(1) >= self.leaves.len();
        let Some(leaf) = self.leaves.get_mut(number) else {
            self.leaves.push(Leaf::of(&[mapping]));
            self.leaves_changed(1);
            return;
        };
        let at = leaf
            .mappings()
            .partition_point(|other| other.start < mapping.start);
        if leaf.len < CAPACITY {
            leaf.insert(at, mapping);
            if mapping.start < self.hints.base {
                // No hint is for it.
                self.leaves_changed(1);
            }
            return;
        }
        // Behind everything: leaves stay full.
        if is_last && at == leaf.len {
            self.leaves.push(Leaf::of(&[mapping]));
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
        self.leaves_changed(1);
    }

    /// Calls `change` with the mapping at a place, whose start must stay between its neighbours'.
    pub(super) fn change(&mut self, place: Place, change: impl FnOnce(&mut Mapping)) {
        let Place { leaf, entry } = place;
        if let Some(leaf) = self.leaves.get_mut(leaf).filter(|leaf| entry < leaf.len) {
            if let Some(mapping) = leaf.entries.get_mut(entry) {
                let start = mapping.start;
                change(mapping);
                if mapping.start != start {
                    leaf.measure();
                }
            }
        }
    }

    /// Takes out all mappings that lie between two addresses with all of theirs, and calls `taken` with each.
    pub(super) fn remove_within(&mut self, first: u64, last: u64, mut taken: impl FnMut(&Mapping)) {
        let Some((place, _)) = self.first_at_or_behind(first) else {
            return;
        };
        let from = place.leaf;
        let mut emptied: Option<Range<usize>> = None;
        for (number, leaf) in self.leaves.iter_mut().enumerate().skip(from) {
            if leaf.first > last {
                break;
            }
            let begin = leaf.mappings().partition_point(|mapping| mapping.start < first);
            let end = leaf.mappings().partition_point(|mapping| mapping.last <= last);
            if begin >= end {
                // The first mapping of this leaf reaches past the range, or the last one of the leaf lies before it.
                continue;
            }
            leaf.mappings()
                .get(begin..end)
                .unwrap_or_default()
                .iter()
                .for_each(&mut taken);
            self.len = self.len.saturating_sub(end.wrapping_sub(begin));
            leaf.remove(begin..end);
            if leaf.len == 0 {
                let start = emptied.map_or(number, |range| range.start);
                emptied = Some(start..number.saturating_add(1));
            }
        }
        if let Some(range) = emptied {
            let gone = range.len();
            self.leaves.drain(range);
            self.leaves_changed(gone);
        }
        self.join_small(from);
    }

    /// Makes one leaf of two neighbours that would fill no more than half of it, around the leaf with that number.
    fn join_small(&mut self, number: usize) {
        for left in [number.saturating_add(1), number, number.saturating_sub(1)] {
            let right = left.saturating_add(1);
            let (Some(a), Some(b)) = (self.leaves.get(left), self.leaves.get(right)) else {
                continue;
            };
            if a.len.saturating_add(b.len) <= CAPACITY / 2 {
                let mut both = a.mappings().to_vec();
                both.extend_from_slice(b.mappings());
                if let Some(leaf) = self.leaves.get_mut(left) {
                    *leaf = Leaf::of(&both);
                }
                self.leaves.remove(right);
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
