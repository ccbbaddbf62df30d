//! Finding the region of an address.

use crate::guest_memory::{GuestAddress, GuestUsize};

/// Where regions begin and how long they are, side by side, so that a search touches nothing else.
///
/// ```text
///   starts   0x0          0x1_0000_0000   …      ascending
///   lens     0x8000_0000  0x4000_0000     …
/// ```
///
/// One region is one compare. Of a few, those that begin at or below the address are counted. For many, the span from the first
/// start to the last is cut into equal buckets, a power of two bytes each and at least as many as there are regions; a table has how many regions
/// begin before each. The search is then between two neighbours in the table, which for regions of about one size is a step or none, and a
/// binary search where they are crowded.
#[derive(Clone, Debug, Default)]
pub(super) struct RegionIndex {
    /// The first region once more: it is the only one of many guests, and the one that most accesses of many others go to.
    first_start: u64,
    first_len: u64,
    starts: Box<[u64]>,
    lens: Box<[u64]>,
    /// For each bucket, and one behind the last: the number of regions that begin before it. Empty for a few regions.
    begun: Box<[u32]>,
    /// The size of a bucket, as a power of two.
    shift: u32,
}

/// Up to so many regions are looked at one by one.
const FEW: usize = 8;

impl RegionIndex {
    /// Makes the index of regions that are sorted and do not overlap.
    pub(super) fn new(regions: impl Iterator<Item = (GuestAddress, GuestUsize)>) -> Self {
        let (starts, lens): (Vec<u64>, Vec<u64>) = regions
            // What a region claims to have past 2^64 does not count.
            .map(|(start, len)| {
                (
                    start.0,
                    len.min(u64::MAX.saturating_sub(start.0).saturating_add(1)),
                )
            })
            .unzip();
        let mut index = Self {
            first_start: starts.first().copied().unwrap_or_default(),
            first_len: lens.first().copied().unwrap_or_default(),
            starts: starts.into(),
            lens: lens.into(),
            begun: Box::default(),
            shift: 0,
        };
        let (Some(&first), Some(&last)) = (index.starts.first(), index.starts.last()) else {
            return index;
        };
        if index.starts.len() <= FEW || u32::try_from(index.starts.len()).is_err() {
            return index;
        }
        let span = last.wrapping_sub(first);
        // Between two and four buckets a region, so that most have one or none.
        let buckets = u64::try_from(index.starts.len())
            .unwrap_or(u64::MAX)
            .saturating_mul(4);
        index.shift = (0..u64::BITS)
            .find(|shift| span >> *shift < buckets)
            .unwrap_or(u64::BITS - 1);
        let bucket_of = |start: &u64| start.wrapping_sub(first) >> index.shift;
        let last_bucket = span >> index.shift;
        let begun = (0..=last_bucket.saturating_add(1))
            .map(|bucket| index.starts.partition_point(|start| bucket_of(start) < bucket));
        // Counts of regions, which are few enough for the type (checked above).
        index.begun = begun
            .map(|count| u32::try_from(count).unwrap_or(u32::MAX))
            .collect();
        index
    }

    /// The number of the region that has the address.
    #[inline]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<usize> {
        // Below the start, the difference wraps to more than any length.
        if addr.0.wrapping_sub(self.first_start) < self.first_len {
            return Some(0);
        }
        if self.starts.len() < 2 {
            return None;
        }
        self.find_beyond_first(addr)
    }

    /// The number of the region that has the address, which is not the first.
    #[inline]
    fn find_beyond_first(&self, addr: GuestAddress) -> Option<usize> {
        let number = self.last_begun(addr.0)?;
        let offset = addr.0.wrapping_sub(*self.starts.get(number)?);
        (offset < *self.lens.get(number)?).then_some(number)
    }

    /// The number of the last region that begins at or below the address.
    #[inline]
    fn last_begun(&self, addr: u64) -> Option<usize> {
        if self.begun.is_empty() {
            let begun: usize = self.starts.iter().map(|start| usize::from(*start <= addr)).sum();
            return begun.checked_sub(1);
        }
        let distance = addr.checked_sub(*self.starts.first()?)?;
        // The table ends with the bucket behind that of the last start; addresses further up are as that one.
        let last_bucket = self.begun.len().saturating_sub(2);
        let bucket =
            usize::try_from(distance >> self.shift).map_or(last_bucket, |bucket| bucket.min(last_bucket));
        let before = usize::try_from(*self.begun.get(bucket)?).ok()?;
        let after = usize::try_from(*self.begun.get(bucket.saturating_add(1))?).ok()?;
        let candidates = self.starts.get(before..after)?;
        let within = match candidates {
            [] => 0,
            [one] => usize::from(*one <= addr),
            crowd => crowd.partition_point(|start| *start <= addr),
        };
        before.saturating_add(within).checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Regions close together, and now and then far apart: crowded buckets and empty ones.
    fn gap() -> impl Strategy<Value = u64> {
        prop_oneof![20 => 0u64..3, 1 => 0u64..1 << 20, 1 => 0u64..1 << 56]
    }

    proptest! {
        /// Against a look at every region, for 0 to 64 of them with and without holes between, up to the end of the address space.
        #[test]
        fn finds_what_a_look_at_every_region_finds(
            gaps in prop::collection::vec((gap(), 0u64..4), 0..64),
            from_top in any::<bool>(),
            probes in prop::collection::vec(any::<u64>(), 20),
        ) {
            let total: u64 = gaps.iter().map(|(gap, len)| gap + len).sum();
            let mut next = if from_top { 0u64.wrapping_sub(total) } else { 0 };
            let mut regions = Vec::new();
            for (gap, len) in gaps {
                next = next.wrapping_add(gap);
                // A region without bytes has no address of its own; collections refuse two with one start.
                if len != 0 {
                    regions.push((GuestAddress(next), len));
                }
                next = next.wrapping_add(len);
            }
            let index = RegionIndex::new(regions.iter().copied());
            let around = regions.iter().flat_map(|&(start, len)| {
                [start.0.wrapping_sub(1), start.0, start.0.wrapping_add(len - 1), start.0.wrapping_add(len)]
            });
            for probe in around.chain(probes).chain([0, u64::MAX]) {
                let slow = regions.iter().position(|&(start, len)| {
                    u128::from(probe) >= u128::from(start.0)
                        && u128::from(probe) < u128::from(start.0) + u128::from(len)
                });
                prop_assert_eq!(index.find(GuestAddress(probe)), slow, "address {:#x}", probe);
            }
        }
    }
}
