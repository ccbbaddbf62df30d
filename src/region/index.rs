//! [`RegionIndex`]: the regions of a collection, and the search by address.

use core::{iter, slice};
use std::sync::Arc;

use super::list::{joined, RegionList};
use super::table::BucketTable;
use super::GuestMemoryRegion;
use crate::guest_memory::GuestAddress;

/// The regions of a collection, in ascending order of address.
///
/// An index is immutable. Inserting or removing a region creates another index. A clone shares the
/// list of regions.
///
/// The list is copied when a region is inserted or removed. Therefore, it has only pointers: an
/// access reads the start and the length from the region, which it reads in any case.
#[derive(Debug)]
pub(super) enum RegionIndex<R> {
    /// A single region, with its start, and its length below 2^64.
    ///
    /// It needs one comparison and no allocation.
    One {
        start: GuestAddress,
        len: u64,
        region: Arc<R>,
    },
    /// No region, or at least two.
    ///
    /// ```text
    ///   regions   │ 0x0, 0xc000_0000 bytes │ 0x1_0000_0000, 0x4000_0000 bytes │ ...
    ///   table     0  0  0  0  1  ...       the number of a region, for a range of addresses
    /// ```
    ///
    /// To find an address, the [table](BucketTable) guesses a region. If that region does not
    /// contain the address, a binary search decides.
    Many {
        regions: RegionList<R>,
        table: BucketTable,
    },
}

impl<R> Default for RegionIndex<R> {
    fn default() -> Self {
        Self::Many {
            regions: RegionList::default(),
            table: BucketTable::new(iter::empty()),
        }
    }
}

impl<R> Clone for RegionIndex<R> {
    // Inlined here and below, because an index that is returned through memory stalls its copy.
    #[inline(always)]
    fn clone(&self) -> Self {
        match self {
            Self::One { start, len, region } => Self::One {
                start: *start,
                len: *len,
                region: Arc::clone(region),
            },
            Self::Many { regions, table } => Self::Many {
                regions: regions.clone(),
                table: table.clone(),
            },
        }
    }
}

impl<R> RegionIndex<R> {
    /// Returns the regions, in ascending order of address.
    #[inline]
    pub(super) fn regions(&self) -> impl Iterator<Item = &R> {
        self.list().iter().map(|region| &**region)
    }

    /// Returns the number of regions.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.list().len()
    }

    #[inline(always)]
    fn list(&self) -> &[Arc<R>] {
        match self {
            Self::One { region, .. } => slice::from_ref(region),
            Self::Many { regions, .. } => regions,
        }
    }
}

impl<R: GuestMemoryRegion> RegionIndex<R> {
    /// Creates the index of regions that are sorted and do not overlap.
    #[inline(always)]
    pub(super) fn from_sorted(regions: Vec<Arc<R>>) -> Self {
        match <[Arc<R>; 1]>::try_from(regions) {
            Ok([only]) => Self::one(only),
            Err(regions) => Self::many(RegionList::new(regions)),
        }
    }

    /// Returns the [rank] of a new region, or `None` if it overlaps one of the index.
    pub(super) fn rank_of_new(&self, new: &R) -> Option<usize> {
        let rank = rank(self.list(), new.start_addr());
        let (before, after) = self.list().split_at_checked(rank)?;
        // The regions do not overlap each other: only a neighbour can overlap the new one.
        let overlap = |low: &R, high: &R| last_addr(low) >= high.start_addr();
        let is_free = !before.last().is_some_and(|before| overlap(before, new))
            && !after.first().is_some_and(|after| overlap(new, after));
        is_free.then_some(rank)
    }

    /// Returns an index with a new region of that [rank].
    #[inline(always)]
    pub(super) fn inserted(&self, rank: usize, region: Arc<R>) -> Self {
        self.changed(rank, Some(region))
    }

    /// Returns an index without the region of that number.
    #[inline(always)]
    pub(super) fn removed(&self, number: usize) -> Self {
        self.changed(number, None)
    }

    /// Returns an index with a new region of that [rank], or without the region of that number.
    #[inline(always)]
    fn changed(&self, number: usize, new: Option<Arc<R>>) -> Self {
        let (list, change) = (self.list(), if new.is_some() { 1 } else { -1 });
        let Some(changed) = new.as_ref().or(list.get(number)) else {
            return self.clone();
        };
        let start = changed.start_addr();
        let (regions, table) = match (list, number, new, self) {
            ([], _, Some(only), _) => return Self::one(only),
            ([_], _, None, _) => return Self::default(),
            ([only, _], 1, None, _) | ([_, only], 0, None, _) => {
                return Self::one(Arc::clone(only))
            }
            (_, _, new, Self::One { .. }) => {
                (RegionList::from_chunk(joined(list, number, new)), None)
            }
            (_, _, new, Self::Many { regions, table }) => {
                (regions.changed(number, new), Some(table))
            }
        };
        let last = regions.last().map_or(start, |last| last.start_addr());
        match table.and_then(|table| table.changed(start.0, change, last.0, regions.len())) {
            Some(table) => Self::Many { regions, table },
            None => Self::many(regions),
        }
    }

    #[inline(always)]
    fn one(region: Arc<R>) -> Self {
        let start = region.start_addr();
        // A region of a third party may claim addresses past 2^64. They do not exist.
        let rest = u64::MAX.saturating_sub(start.0).saturating_add(1);
        let len = region.len().min(rest);
        Self::One { start, len, region }
    }

    /// Creates an index of several regions.
    #[inline(always)]
    fn many(regions: RegionList<R>) -> Self {
        let table = BucketTable::new(regions.iter().map(|region| region.start_addr().0));
        Self::Many { regions, table }
    }

    /// Returns the region that starts at `addr`, and its number.
    pub(super) fn starting_at(&self, addr: GuestAddress) -> Option<(usize, &Arc<R>)> {
        let number = match self.find_number(addr) {
            Some((number, _)) => number,
            // No address is in an empty region.
            None => rank(self.list(), addr).checked_sub(1)?,
        };
        let region = self.list().get(number)?;
        (region.start_addr() == addr).then_some((number, region))
    }

    /// Returns the region that contains `addr`.
    #[inline(always)]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<&R> {
        Some(self.find_number(addr)?.1)
    }

    /// Returns the region that contains `addr`, and the regions that follow it without a hole.
    #[inline(always)]
    pub(super) fn find_run(&self, addr: GuestAddress) -> impl Iterator<Item = &R> {
        let (from, mut next) = self
            .find_number(addr)
            .map_or((usize::MAX, 0), |(number, region)| {
                (number, region.start_addr().0)
            });
        self.list()
            .get(from..)
            .unwrap_or_default()
            .iter()
            .map_while(move |region| {
                if region.start_addr().0 != next {
                    return None;
                }
                // This may wrap to 0, where no following region starts.
                next = next.wrapping_add(region.len());
                Some(&**region)
            })
    }

    /// Returns the region that contains `addr`, and its number.
    #[inline(always)]
    fn find_number(&self, addr: GuestAddress) -> Option<(usize, &R)> {
        match self {
            Self::One { start, len, region } => {
                (addr.0.wrapping_sub(start.0) < *len).then_some((0, region))
            }
            Self::Many { regions, table } => {
                let number = table.guess(addr.0);
                match regions.get(number) {
                    Some(region) if contains(&**region, addr) => Some((number, region)),
                    _ => search(regions, addr),
                }
            }
        }
    }
}

/// Returns whether the region contains `addr`.
///
/// A region of a third party may claim addresses past 2^64. They do not exist.
#[inline(always)]
fn contains<R: GuestMemoryRegion>(region: &R, addr: GuestAddress) -> bool {
    addr.0
        .checked_sub(region.start_addr().0)
        .is_some_and(|offset| offset < region.len())
}

/// Returns the last address of the region, or its start if it is empty.
///
/// The method of the trait can be a third party's.
fn last_addr<R: GuestMemoryRegion>(region: &R) -> GuestAddress {
    let before_last = region.len().saturating_sub(1);
    GuestAddress(region.start_addr().0.saturating_add(before_last))
}

/// Returns the region that contains `addr`, and its number.
#[cold]
fn search<R: GuestMemoryRegion>(regions: &[Arc<R>], addr: GuestAddress) -> Option<(usize, &R)> {
    let number = rank(regions, addr).checked_sub(1)?;
    let region = regions.get(number)?;
    contains(&**region, addr).then_some((number, region))
}

/// Returns the number of regions that start at `addr` or below.
fn rank<R: GuestMemoryRegion>(regions: &[Arc<R>], addr: GuestAddress) -> usize {
    regions.partition_point(|region| region.start_addr() <= addr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_memory::GuestUsize;
    use crate::region::GuestMemoryRegionBytes;
    use proptest::prelude::*;

    /// A region that is not mapped: only its place matters.
    #[derive(Debug)]
    struct Place {
        start: u64,
        len: u64,
        number: usize,
    }

    impl GuestMemoryRegion for Place {
        type B = ();
        fn len(&self) -> GuestUsize {
            self.len
        }
        fn start_addr(&self) -> GuestAddress {
            GuestAddress(self.start)
        }
        fn bitmap(&self) {}
    }

    impl GuestMemoryRegionBytes for Place {}

    fn place(start: u64, len: u64, number: usize) -> Arc<Place> {
        Arc::new(Place { start, len, number })
    }

    fn index(places: impl IntoIterator<Item = (u64, u64)>) -> RegionIndex<Place> {
        let places = places.into_iter().zip(0..);
        let regions = places.map(|((start, len), number)| place(start, len, number));
        RegionIndex::from_sorted(regions.collect())
    }

    /// Returns the number of the region that contains `addr`.
    fn found(index: &RegionIndex<Place>, addr: u64) -> Option<usize> {
        index.find(GuestAddress(addr)).map(|place| place.number)
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
            assert_eq!(found(&index, start + 3), Some(number));
            assert_eq!(found(&index, start + 4), None);
        }
    }

    #[test]
    fn starting_at_empty_region_returns_it() {
        let index = index([(0, 8), (8, 0), (16, 8)]);
        let (number, region) = index.starting_at(GuestAddress(8)).unwrap();
        assert_eq!((number, region.len), (1, 0));
        assert!(index.starting_at(GuestAddress(4)).is_none());
    }

    #[test]
    fn find_in_region_that_claims_more_than_address_space_ends_at_its_end() {
        let index = index([(0x1000, 0x1000), (u64::MAX - 0xf, u64::MAX)]);
        assert_eq!(found(&index, u64::MAX), Some(1));
        assert_eq!(found(&index, 0), None);
        assert_eq!(index.find_run(GuestAddress(u64::MAX)).count(), 1);
    }

    #[test]
    fn removed_last_region_leaves_empty_index() {
        let index = index([(0, 1), (2, 1)]).removed(0).removed(0);
        assert_eq!(index.len(), 0);
        assert_eq!(found(&index, 0), None);
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
            let mut grown = RegionIndex::<Place>::default();
            for step in 0..400 {
                let start = (next() % 256) * 16 * spread;
                let new = place(start, 1 + next() % 16, step);
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
                    let removed = Arc::downgrade(&grown.list()[number]);
                    grown = grown.removed(number);
                    assert!(removed.upgrade().is_none(), "{spread} {step}: leaked");
                }
                assert_eq!(grown.len(), present.len());
                let regions = grown.regions();
                let places: Vec<_> = regions.map(|place| (place.start, place.len)).collect();
                assert_eq!(places, present);
                for &(start, len) in &present {
                    let last = found(&grown, start + len - 1);
                    assert!(last.is_some(), "{spread} {step}");
                    assert_eq!(found(&grown, start), last);
                    let past = present.iter().any(|&(other, _)| other == start + len);
                    assert_eq!(found(&grown, start + len).is_some(), past);
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
                let past = start.0.wrapping_add(len);
                [start.0.wrapping_sub(1), start.0, past.wrapping_sub(1), past]
            });
            for probe in around.chain(probes).chain([0, u64::MAX]) {
                let slow = regions.iter().position(|&(start, len)| {
                    u128::from(probe) >= u128::from(start.0)
                        && u128::from(probe) < u128::from(start.0) + u128::from(len)
                });
                prop_assert_eq!(found(&index, probe), slow, "address {:#x}", probe);
            }
        }
    }
}
