//! The regions of a collection, and finding the one that has an address.

use std::sync::Arc;

use super::GuestMemoryRegion;
use crate::guest_memory::GuestAddress;

/// Regions, sorted by address, each beside where it begins and how long it is, so that a search touches no region.
///
/// ```text
///   entries   0x0, 0x8000_0000, region    0x1_0000_0000, 0x4000_0000, region    …       ascending
///   last_in   0    0    1    1    1                                                     one for each bucket
/// ```
///
/// One region is one compare. For more, the span from the first start to the last is cut into buckets of a power of two bytes; a table has, for
/// each, the number of the last region that begins in it or before. That is the region of an address in the bucket unless another begins
/// further up in the bucket: never, where regions begin at multiples of the bucket's size, as those of guests do. Else the regions before it are
/// searched by halves.
#[derive(Debug)]
pub(super) struct RegionIndex<R> {
    entries: Box<[Entry<R>]>,
    /// Empty for one region.
    last_in: Box<[u32]>,
    /// Where the first region begins.
    first: u64,
    /// The length of the only region; 0 if there are more.
    only_len: u64,
    /// The size of a bucket, as a power of two.
    shift: u32,
}

#[derive(Debug)]
struct Entry<R> {
    start: u64,
    len: u64,
    region: Arc<R>,
}

/// The same region.
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
        Self {
            entries: Box::default(),
            last_in: Box::default(),
            first: 0,
            only_len: 0,
            shift: 0,
        }
    }
}

impl<R> Clone for RegionIndex<R> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            last_in: self.last_in.clone(),
            ..*self
        }
    }
}

/// So many buckets a region are spent for buckets that no region begins in the middle of.
const BUCKETS_ALIGNED: u64 = 16;
/// So many buckets a region are spent in any case, so that most have the start of one region or none.
const BUCKETS: u64 = 4;

impl<R: GuestMemoryRegion> RegionIndex<R> {
    /// Makes the index of regions that are sorted and do not overlap.
    pub(super) fn new(regions: impl Iterator<Item = Arc<R>>) -> Self {
        let entry = |region: Arc<R>| {
            let start = region.start_addr().0;
            // What a region claims to have past 2^64 does not count.
            let len = region.len().min(u64::MAX.saturating_sub(start).saturating_add(1));
            Entry { start, len, region }
        };
        Self::of(regions.map(entry).collect())
    }
}

impl<R> RegionIndex<R> {
    fn of(entries: Box<[Entry<R>]>) -> Self {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Self::default();
        };
        let (first, span, only_len) = (first.start, last.start.wrapping_sub(first.start), first.len);
        if entries.len() == 1 {
            return Self {
                entries,
                last_in: Box::default(),
                first,
                only_len,
                shift: 0,
            };
        }
        let (shift, last_in) = buckets(&entries, first, span);
        Self {
            entries,
            last_in,
            first,
            only_len: 0,
            shift,
        }
    }
}

/// The size of a bucket, as a power of two, and the number of the last region in each or before. The first region begins at `first`, and the last
/// `span` behind that.
fn buckets<R>(entries: &[Entry<R>], first: u64, span: u64) -> (u32, Box<[u32]>) {
    let count = u64::try_from(entries.len()).unwrap_or(u64::MAX);
    let distance = |entry: &Entry<R>| entry.start.wrapping_sub(first);
    // The bits that no distance has: buckets of that size begin where regions do.
    let all = entries.iter().fold(0, |bits, entry| bits | distance(entry));
    let aligned = all.trailing_zeros().min(u64::BITS - 1);
    let affordable = |buckets: u64| {
        (0..u64::BITS)
            .find(|shift| span >> *shift < count.saturating_mul(buckets))
            .unwrap_or(u64::BITS - 1)
    };
    let shift = if aligned >= affordable(BUCKETS_ALIGNED) {
        aligned
    } else {
        affordable(BUCKETS)
    };
    let mut last_in = Vec::new();
    let mut rest = entries.iter().zip(0..=u32::MAX).peekable();
    for bucket in 0..=span >> shift {
        let mut last = last_in.last().copied().unwrap_or(0);
        while let Some((_, number)) = rest.next_if(|(entry, _)| distance(entry) >> shift <= bucket) {
            last = number;
        }
        last_in.push(last);
    }
    (shift, last_in.into())
}

impl<R> RegionIndex<R> {
    /// The regions, in the order of their addresses.
    #[inline]
    pub(super) fn regions(&self) -> impl ExactSizeIterator<Item = &Arc<R>> {
        self.entries.iter().map(|entry| &entry.region)
    }

    /// The number of regions.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many regions begin at the address or below.
    pub(super) fn begun(&self, addr: GuestAddress) -> usize {
        self.entries.partition_point(|entry| entry.start <= addr.0)
    }

    /// The region that has the address.
    #[inline(always)]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<&R> {
        let distance = addr.0.wrapping_sub(self.first);
        if self.only_len != 0 {
            // Below the start, the distance wraps to more than any length.
            return match &*self.entries {
                [only] if distance < self.only_len => Some(&only.region),
                _ => None,
            };
        }
        // Addresses behind the last bucket are the last region's, or nobody's; so are those below the first region, whose distance wraps.
        let bucket = usize::try_from(distance >> self.shift).unwrap_or(usize::MAX);
        let bucket = bucket.min(self.last_in.len().wrapping_sub(1));
        let number = usize::try_from(*self.last_in.get(bucket)?).ok()?;
        let entry = self.entries.get(number)?;
        if addr.0.wrapping_sub(entry.start) < entry.len {
            return Some(&entry.region);
        }
        if addr.0 >= entry.start {
            return None;
        }
        self.find_before(number, addr)
    }

    /// The region that has the address, of those before a number.
    #[cold]
    fn find_before(&self, number: usize, addr: GuestAddress) -> Option<&R> {
        let before = self.entries.get(..number)?;
        let begun = before.partition_point(|entry| entry.start <= addr.0);
        let entry = before.get(begun.checked_sub(1)?)?;
        (addr.0.wrapping_sub(entry.start) < entry.len).then_some(&*entry.region)
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

    /// A guest of the usual shape needs no search: its buckets begin where its regions do.
    #[test]
    fn regions_at_multiples_of_a_bucket_are_found_at_once() {
        let starts = [0, 0x4000_0000, 0xfec0_0000, 0x1_0000_0000, 0x1_4000_0000];
        let entries = |shift: u32| -> Box<[Entry<usize>]> {
            let entries = starts.iter().zip(0..);
            entries
                .map(|(start, number)| Entry {
                    start: (start >> shift << shift) + 0x10_0000,
                    len: 0x1000,
                    region: Arc::new(number),
                })
                .collect()
        };
        let index = RegionIndex::of(entries(28));
        assert_eq!((index.shift, index.last_in.len()), (28, 0x15));
        assert_eq!(index.last_in[..6], [0, 0, 0, 0, 1, 1]);
        // Too many buckets of that size: fewer, in which regions begin where they like.
        let index = RegionIndex::of(entries(0));
        assert_eq!((index.shift, index.last_in.len()), (29, 0xb));
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
            let entries = regions.iter().zip(0usize..);
            let index = RegionIndex::of(
                entries.map(|(&(start, len), number)| Entry { start: start.0, len, region: Arc::new(number) }).collect(),
            );
            let around = regions.iter().flat_map(|&(start, len)| {
                [start.0.wrapping_sub(1), start.0, start.0.wrapping_add(len - 1), start.0.wrapping_add(len)]
            });
            for probe in around.chain(probes).chain([0, u64::MAX]) {
                let slow = regions.iter().position(|&(start, len)| {
                    u128::from(probe) >= u128::from(start.0)
                        && u128::from(probe) < u128::from(start.0) + u128::from(len)
                });
                prop_assert_eq!(index.find(GuestAddress(probe)).copied(), slow, "address {:#x}", probe);
            }
        }
    }
}
