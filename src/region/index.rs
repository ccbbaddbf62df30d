//! [`RegionIndex`]: the regions of a collection, and the search by address.

use std::sync::Arc;

use super::table::BucketTable;
use super::GuestMemoryRegion;
use crate::guest_memory::GuestAddress;

/// The regions of a collection, in ascending order of address.
///
/// An index is immutable. Inserting or removing a region creates another index. A clone shares the
/// entries.
#[derive(Debug)]
pub(super) enum RegionIndex<R> {
    /// A single region needs one comparison and no allocation.
    One(Entry<R>),
    /// No region, or at least two.
    ///
    /// ```text
    ///   entries   │ 0x0, 0xc000_0000, region │ 0x1_0000_0000, 0x4000_0000, region │ ...
    ///   table     0  0  0  0  1  ...             the number of an entry, for a range of addresses
    /// ```
    ///
    /// To find an address, the [table](BucketTable) guesses an entry. If that entry does not
    /// contain the address, a binary search decides.
    Many {
        entries: Arc<[Entry<R>]>,
        table: BucketTable,
    },
}

/// A region with its start and length, so that a search does not touch the region.
#[derive(Debug)]
pub(super) struct Entry<R> {
    start: u64,
    len: u64,
    region: Arc<R>,
}

impl<R: GuestMemoryRegion> Entry<R> {
    pub(super) fn new(region: Arc<R>) -> Self {
        let start = region.start_addr().0;
        // A region of a third party may claim addresses past 2^64. They do not exist.
        let len = region
            .len()
            .min(u64::MAX.saturating_sub(start).saturating_add(1));
        Entry { start, len, region }
    }
}

impl<R> Entry<R> {
    /// Returns the last address of the region, or its start if it is empty.
    pub(super) fn last(&self) -> u64 {
        self.start.saturating_add(self.len.saturating_sub(1))
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn region(&self) -> &Arc<R> {
        &self.region
    }

    #[inline(always)]
    fn contains(&self, addr: GuestAddress) -> bool {
        addr.0.wrapping_sub(self.start) < self.len
    }
}

impl<R> Clone for Entry<R> {
    fn clone(&self) -> Self {
        Self {
            region: Arc::clone(&self.region),
            ..*self
        }
    }
}

impl<R> Default for RegionIndex<R> {
    fn default() -> Self {
        Self::Many {
            entries: Arc::default(),
            table: BucketTable::default(),
        }
    }
}

impl<R> Clone for RegionIndex<R> {
    // Inlined here and below, because an index that is returned through memory stalls its copy.
    #[inline(always)]
    fn clone(&self) -> Self {
        match self {
            Self::One(only) => Self::One(only.clone()),
            Self::Many { entries, table } => Self::Many {
                entries: Arc::clone(entries),
                table: table.clone(),
            },
        }
    }
}

impl<R> RegionIndex<R> {
    /// Creates the index of regions that are sorted and do not overlap.
    #[inline(always)]
    pub(super) fn from_sorted(entries: Vec<Entry<R>>) -> Self {
        match <[Entry<R>; 1]>::try_from(entries) {
            Ok([only]) => Self::One(only),
            Err(entries) => Self::many(entries.into(), None),
        }
    }

    /// Returns the [rank](Self::rank) of a new region, or `None` if it overlaps one of the index.
    pub(super) fn rank_of_new(&self, new: &Entry<R>) -> Option<usize> {
        let rank = self.rank(GuestAddress(new.start));
        let (before, after) = self.entries().split_at_checked(rank)?;
        // The regions do not overlap each other: only a neighbour can overlap the new one.
        let overlaps = before
            .last()
            .is_some_and(|before| before.last() >= new.start)
            || after.first().is_some_and(|after| new.last() >= after.start);
        (!overlaps).then_some(rank)
    }

    /// Returns an index with a new region of that [rank](Self::rank).
    pub(super) fn inserted(&self, rank: usize, new: Entry<R>) -> Self {
        let (before, after) = split(self.entries(), rank);
        if before.is_empty() && after.is_empty() {
            return Self::One(new);
        }
        let start = new.start;
        let entries: Arc<[_]> = (before.iter().cloned())
            .chain([new])
            .chain(after.iter().cloned())
            .collect();
        let last = entries.last().map_or(start, Entry::start);
        let table = match self {
            Self::Many { table, .. } => table.inserted(start, last, entries.len()),
            Self::One(_) => None,
        };
        Self::many(entries, table)
    }

    /// Returns an index without the region of that number.
    #[inline(always)]
    pub(super) fn removed(&self, number: usize) -> Self {
        let Self::Many { entries, table } = self else {
            return Self::default();
        };
        let (before, after) = split(entries, number);
        let Some((removed, after)) = after.split_first() else {
            return self.clone();
        };
        if let ([only], []) | ([], [only]) = (before, after) {
            return Self::One(only.clone());
        }
        let entries: Arc<[_]> = before.iter().chain(after).cloned().collect();
        let table = table.removed(number, removed.start, entries.len());
        Self::many(entries, table)
    }

    /// Creates an index of several entries, with a new table if there is none.
    #[inline(always)]
    fn many(entries: Arc<[Entry<R>]>, table: Option<BucketTable>) -> Self {
        let table = table.unwrap_or_else(|| BucketTable::new(entries.iter().map(Entry::start)));
        Self::Many { entries, table }
    }

    /// Returns the entry that starts at `addr`, and its number.
    pub(super) fn starting_at(&self, addr: GuestAddress) -> Option<(usize, &Entry<R>)> {
        let number = self.rank(addr).checked_sub(1)?;
        let entry = self.entries().get(number)?;
        (entry.start == addr.0).then_some((number, entry))
    }

    /// Returns the regions, in ascending order of address.
    #[inline]
    pub(super) fn regions(&self) -> impl Iterator<Item = &R> {
        self.entries().iter().map(|entry| &*entry.region)
    }

    /// Returns the number of regions.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    #[inline(always)]
    fn entries(&self) -> &[Entry<R>] {
        match self {
            Self::One(only) => core::slice::from_ref(only),
            Self::Many { entries, .. } => entries,
        }
    }

    /// Returns the region that contains `addr`.
    #[inline(always)]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<&R> {
        let (_, entry) = self.find_entry(addr)?;
        Some(&entry.region)
    }

    /// Returns the region that contains `addr`, and the regions that follow it without a hole.
    #[inline(always)]
    pub(super) fn find_run(&self, addr: GuestAddress) -> impl Iterator<Item = &R> {
        let (from, mut next) = self
            .find_entry(addr)
            .map_or((usize::MAX, 0), |(number, entry)| (number, entry.start));
        self.entries()
            .get(from..)
            .unwrap_or_default()
            .iter()
            .map_while(move |entry| {
                if entry.start != next {
                    return None;
                }
                // This may wrap to 0, where no following region starts.
                next = entry.start.wrapping_add(entry.len);
                Some(&*entry.region)
            })
    }

    /// Returns the entry that contains `addr`, and its number.
    #[inline(always)]
    fn find_entry(&self, addr: GuestAddress) -> Option<(usize, &Entry<R>)> {
        match self {
            Self::One(only) => only.contains(addr).then_some((0, only)),
            Self::Many { entries, table } => {
                let number = table.guess(addr.0);
                match entries.get(number) {
                    Some(entry) if entry.contains(addr) => Some((number, entry)),
                    _ => search(entries, addr),
                }
            }
        }
    }

    /// Returns the number of entries that start at `addr` or below.
    fn rank(&self, addr: GuestAddress) -> usize {
        rank(self.entries(), addr)
    }
}

/// Returns the entry that contains `addr`, and its number.
#[cold]
fn search<R>(entries: &[Entry<R>], addr: GuestAddress) -> Option<(usize, &Entry<R>)> {
    let number = rank(entries, addr).checked_sub(1)?;
    let entry = entries.get(number)?;
    entry.contains(addr).then_some((number, entry))
}

/// Returns the first `at` entries, and the others.
fn split<R>(entries: &[Entry<R>], at: usize) -> (&[Entry<R>], &[Entry<R>]) {
    entries.split_at_checked(at).unwrap_or((entries, &[]))
}

/// Returns the number of entries that start at `addr` or below.
fn rank<R>(entries: &[Entry<R>], addr: GuestAddress) -> usize {
    entries.partition_point(|entry| entry.start <= addr.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(start: u64, len: u64, region: usize) -> Entry<usize> {
        Entry {
            start,
            len,
            region: Arc::new(region),
        }
    }

    fn index(places: impl IntoIterator<Item = (u64, u64)>) -> RegionIndex<usize> {
        let places = places.into_iter().zip(0..);
        let entries = places.map(|((start, len), region)| entry(start, len, region));
        RegionIndex::from_sorted(entries.collect())
    }

    /// Gaps between regions: mostly small, so that buckets are crowded, and some huge ones.
    fn gap() -> impl Strategy<Value = u64> {
        prop_oneof![20 => 0u64..3, 1 => 0u64..1 << 20, 1 => 0u64..1 << 56]
    }

    #[test]
    #[cfg_attr(
        miri,
        ignore = "takes minutes under Miri, and runs the same code as fewer regions"
    )]
    fn find_with_more_regions_than_table_counts_succeeds() {
        let many = usize::from(u16::MAX) + 10;
        let index = index((0..many as u64).map(|number| (number * 8, 4)));
        for number in (0..many).step_by(97).chain(many - 30..many) {
            let start = number as u64 * 8;
            assert_eq!(index.find(GuestAddress(start + 3)), Some(&number));
            assert_eq!(index.find(GuestAddress(start + 4)), None);
        }
    }

    #[test]
    fn removed_last_region_leaves_empty_index() {
        let index = index([(0, 1), (2, 1)]).removed(0).removed(0);
        assert_eq!((index.len(), index.entries().len()), (0, 0));
        assert!(index.find(GuestAddress(0)).is_none());
    }

    /// Grows and shrinks an index at random, and compares each step with a sorted list.
    #[test]
    fn inserted_and_removed_in_any_order_agree_with_list() {
        let mut random = 1u64;
        let mut next = || {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            random >> 33
        };
        for spread in [1u64, 1 << 12, 1 << 50] {
            let mut present: Vec<(u64, u64)> = Vec::new();
            let mut grown = RegionIndex::default();
            for step in 0..400 {
                let start = (next() % 256) * 16 * spread;
                let new = entry(start, 1 + next() % 16, step);
                let position = present.partition_point(|&(other, _)| other <= start);
                let is_there = position > 0 && present[position - 1].0 == start;
                assert_eq!(grown.starting_at(GuestAddress(start)).is_some(), is_there);
                if let Some(rank) = grown
                    .rank_of_new(&new)
                    .filter(|_| next() % 400 > step as u64)
                {
                    present.insert(position, (start, new.len));
                    grown = grown.inserted(rank, new);
                } else if !present.is_empty() {
                    let (start, _) = present.remove(next() as usize % present.len());
                    let (number, _) = grown.starting_at(GuestAddress(start)).unwrap();
                    grown = grown.removed(number);
                }
                assert_eq!(grown.len(), present.len());
                let entries = grown.entries().iter();
                let places: Vec<_> = entries.map(|entry| (entry.start, entry.len)).collect();
                assert_eq!(places, present);
                for &(start, len) in &present {
                    let last = grown.find(GuestAddress(start + len - 1));
                    assert!(last.is_some(), "{spread} {step}");
                    assert_eq!(grown.find(GuestAddress(start)), last);
                    let past = present.iter().any(|&(other, _)| other == start + len);
                    assert_eq!(grown.find(GuestAddress(start + len)).is_some(), past);
                }
            }
        }
    }

    proptest! {
        /// Compares with a linear search, up to the end of the address space.
        #[test]
        fn find_agrees_with_linear_search(
            gaps in prop::collection::vec((gap(), 0u64..4), 0..64),
            from_top in any::<bool>(),
            probes in prop::collection::vec(any::<u64>(), 20),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let total: u64 = gaps.iter().map(|(gap, len)| gap + len).sum();
            let mut next = if from_top { 0u64.wrapping_sub(total) } else { 0 };
            let mut regions = Vec::new();
            for (gap, len) in gaps {
                next = next.wrapping_add(gap);
                // Collections reject two regions with the same start, which empty regions could
                // have.
                if len != 0 {
                    regions.push((GuestAddress(next), len));
                }
                next = next.wrapping_add(len);
            }
            let mut index = index(regions.iter().map(|&(start, len)| (start.0, len)));
            for at in removed {
                if regions.is_empty() {
                    break;
                }
                let at = at.index(regions.len());
                let (start, len) = &mut regions[at];
                if let Some((number, _)) = index.starting_at(*start) {
                    index = index.removed(number);
                    *len = 0;
                }
            }
            let around = regions.iter().flat_map(|&(start, len)| {
                let (last, past) = (start.0.wrapping_add(len).wrapping_sub(1), start.0.wrapping_add(len));
                [start.0.wrapping_sub(1), start.0, last, past]
            });
            for probe in around.chain(probes).chain([0, u64::MAX]) {
                let slow = regions.iter().position(|&(start, len)| {
                    u128::from(probe) >= u128::from(start.0)
                        && u128::from(probe) < u128::from(start.0) + u128::from(len)
                });
                let found = index.find(GuestAddress(probe)).copied();
                prop_assert_eq!(found, slow, "address {:#x}", probe);
            }
        }
    }
}
