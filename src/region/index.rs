//! Finding the region of an address.

use crate::guest_memory::{GuestAddress, GuestUsize};

/// Where regions begin and how long they are, side by side, so that a search touches nothing else.
///
/// ```text
///   starts   0x0        0x1_0000_0000   …      ascending
///   lens     0x8000_0000   0x4000_0000  …
/// ```
#[derive(Clone, Debug, Default)]
pub(super) struct RegionIndex {
    starts: Box<[u64]>,
    lens: Box<[u64]>,
}

impl RegionIndex {
    /// Makes the index of regions that are sorted and do not overlap.
    pub(super) fn new(regions: impl Iterator<Item = (GuestAddress, GuestUsize)>) -> Self {
        let (starts, lens): (Vec<u64>, Vec<u64>) = regions.map(|(start, len)| (start.0, len)).unzip();
        Self {
            starts: starts.into(),
            lens: lens.into(),
        }
    }

    /// The number of the region that has the address.
    #[inline]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<usize> {
        if let ([start], [len]) = (&*self.starts, &*self.lens) {
            // One compare: below the start, the difference wraps to more than any length.
            return (addr.0.wrapping_sub(*start) < *len).then_some(0);
        }
        let after = self.starts.partition_point(|start| *start <= addr.0);
        let number = after.checked_sub(1)?;
        let offset = addr.0.wrapping_sub(*self.starts.get(number)?);
        (offset < *self.lens.get(number)?).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a look at every region, for 0 to 64 of them with and without holes between, up to the end of the address space.
        #[test]
        fn finds_what_a_look_at_every_region_finds(
            gaps in prop::collection::vec((0u64..3, 0u64..4), 0..64),
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
