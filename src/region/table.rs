//! [`BucketTable`]: guesses in constant time which region contains an address.

use std::sync::Arc;

use crate::convert::to_usize;

/// A table from ranges of addresses, the buckets, to numbers of regions.
///
/// The buckets have the same size, a power of two, and the first one begins with the first region.
/// For each bucket, the table has the number of the last region that starts in it or before it:
///
/// ```text
///   regions        0                1        2
///                  ├───────┤        ├────┤   ├──┤
///   buckets        │0  │0  │0  │0  │1  │1  │2  │2  │2  │ ... and so on to the end of the table
/// ```
///
/// The guess is too high if a region starts in the bucket, but above the address. The caller then
/// has to search. Most regions start at multiples of the bucket size, and need no search.
#[derive(Clone, Debug)]
pub(super) struct BucketTable {
    /// The address of the first bucket.
    first: u64,
    /// The bucket size, as a power of two. A `u64`, because moves of a table with a smaller field
    /// overlap and stall.
    shift: u64,
    numbers: Numbers,
}

/// The region number of each bucket. The last one is also valid for all higher addresses.
#[derive(Clone, Debug)]
enum Numbers {
    /// For up to [`FEW`] regions: 16 numbers of 4 bits, the first in the lowest bits. They need no
    /// allocation.
    Few(u64),
    /// For more regions.
    Many(Arc<[u16]>),
}

/// The number of regions up to which the table is stored in place.
const FEW: usize = 8;
const FEW_BUCKETS: usize = 16;

/// The number of buckets per region in a new table: most buckets contain the start of one region or
/// of none.
const BUCKETS_PER_REGION: usize = 4;

/// The limits of the number of buckets per region in a table that is reused. A change copies it.
const FEWEST_BUCKETS_PER_REGION: usize = 2;
const MOST_BUCKETS_PER_REGION: usize = 32;

impl BucketTable {
    /// Creates the table of regions that start at these addresses, in ascending order.
    pub(super) fn new(starts: impl ExactSizeIterator<Item = u64> + Clone) -> Self {
        let first = starts.clone().next().unwrap_or(0);
        let last = starts.clone().last().unwrap_or(first);
        let regions = starts.len();
        let buckets = match regions {
            0..=FEW => FEW_BUCKETS,
            _ => regions
                .next_power_of_two()
                .saturating_mul(BUCKETS_PER_REGION),
        };
        let shift = u64::from(bucket_shift(last.wrapping_sub(first), buckets));
        // Each region but the first adds one to the numbers of its bucket and of all later ones.
        let mut starts = starts
            .skip(1)
            .map(|start| to_usize(start.wrapping_sub(first) >> shift))
            .peekable();
        let mut number = 0u16;
        let number_of = |bucket| {
            while starts.next_if(|start| *start <= bucket).is_some() {
                number = number.wrapping_add(1);
            }
            number
        };
        let numbers = match regions {
            0..=FEW => Numbers::Few(starts.map(few_ones).fold(0, u64::wrapping_add)),
            _ => Numbers::Many((0..buckets).map(number_of).collect()),
        };
        Self {
            first,
            shift,
            numbers,
        }
    }

    /// Returns the table after the insertion or the removal of a region that starts at `start`.
    ///
    /// `change` is 1 for an insertion, and -1 for a removal. `last` is the start of the last
    /// region, and `count` the number of regions, both after the change.
    ///
    /// Returns `None` if a new table is required. The region is or was the first one, the buckets
    /// end before `last`, or they are too few or too many. The same applies to a few
    /// regions, if the last one is removed: the buckets could be too large for the others.
    #[inline(always)]
    pub(super) fn changed(&self, start: u64, change: i16, last: u64, count: usize) -> Option<Self> {
        let bucket_of = |start: u64| to_usize(start.wrapping_sub(self.first) >> self.shift);
        let fewest = count.saturating_mul(FEWEST_BUCKETS_PER_REGION);
        let needed = bucket_of(last).saturating_add(1).max(fewest);
        let numbers = match &self.numbers {
            _ if start <= self.first => return None,
            Numbers::Few(numbers) if needed <= FEW_BUCKETS && start <= last => {
                let ones = few_ones(bucket_of(start));
                let change = i64::from(change).cast_unsigned();
                Numbers::Few(numbers.wrapping_add(ones.wrapping_mul(change)))
            }
            Numbers::Many(numbers)
                if count > FEW
                    && needed <= numbers.len()
                    && numbers.len() <= count.saturating_mul(MOST_BUCKETS_PER_REGION) =>
            {
                let mut numbers: Arc<[u16]> = Arc::from(&**numbers);
                let later = Arc::make_mut(&mut numbers).get_mut(bucket_of(start)..);
                for number in later.unwrap_or_default() {
                    *number = number.wrapping_add_signed(change);
                }
                Numbers::Many(numbers)
            }
            _ => return None,
        };
        Some(Self { numbers, ..*self })
    }

    /// Returns the number of the last region that starts in the bucket of `addr` or before it.
    ///
    /// The number may be wrong for addresses below the first region or above the last bucket, and
    /// for regions that a `u16` cannot number.
    #[inline(always)]
    pub(super) fn guess(&self, addr: u64) -> usize {
        let bucket = to_usize(addr.wrapping_sub(self.first) >> self.shift);
        match &self.numbers {
            Numbers::Few(numbers) => to_usize((numbers >> few_shift(bucket)) & 0xf),
            Numbers::Many(numbers) => {
                let bucket = bucket.min(numbers.len().wrapping_sub(1));
                numbers.get(bucket).map_or(0, |number| usize::from(*number))
            }
        }
    }
}

/// Returns the smallest bucket size with which the last of `buckets` (a power of two) begins at or
/// after `span`, as a power of two.
fn bucket_shift(span: u64, buckets: usize) -> u32 {
    let span_bits = u64::BITS.wrapping_sub(span.leading_zeros());
    span_bits.saturating_sub(buckets.trailing_zeros())
}

/// Returns a one for the bucket and for all buckets after it, as [`Numbers::Few`] stores them.
fn few_ones(bucket: usize) -> u64 {
    0x1111_1111_1111_1111 << few_shift(bucket)
}

/// Returns the number of bits before the number of a bucket, or of the last bucket.
#[inline(always)]
fn few_shift(bucket: usize) -> usize {
    bucket.min(FEW_BUCKETS - 1).wrapping_mul(4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(table: &BucketTable) -> Vec<usize> {
        let buckets = match &table.numbers {
            Numbers::Few(_) => FEW_BUCKETS,
            Numbers::Many(numbers) => numbers.len(),
        };
        let starts = (0..buckets as u64).map(|bucket| bucket << table.shift);
        starts
            .map(|start| table.guess(table.first.wrapping_add(start)))
            .collect()
    }

    fn twenty_regions() -> BucketTable {
        BucketTable::new((1..21u32).map(|start| u64::from(start) * 0x1000))
    }

    #[test]
    fn bucket_shift_of_any_span_is_smallest_that_fits() {
        for buckets in [16usize, 64, 4096] {
            let len = buckets as u64;
            let spans = [
                0,
                1,
                7,
                len - 1,
                len,
                len + 1,
                0x1_4000_0000,
                1 << 63,
                u64::MAX,
            ];
            for span in spans {
                let shift = bucket_shift(span, buckets);
                assert!(span >> shift < len, "{span} in {buckets}");
                assert!(
                    shift == 0 || span >> (shift - 1) >= len,
                    "{span} in {buckets}"
                );
            }
        }
    }

    #[test]
    fn new_with_aligned_regions_gives_each_bucket_its_region() {
        let starts = [0, 0x4000_0000, 0xe000_0000, 0x1_0000_0000, 0x1_4000_0000];
        let table = BucketTable::new(starts.map(|start| start + 0x10_0000).into_iter());
        assert_eq!(table.shift, 29);
        let expected = [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 4];
        assert_eq!(numbers(&table), expected);
    }

    #[test]
    fn changed_by_insertion_below_first_region_returns_none() {
        let table = twenty_regions();
        assert!(table.changed(0x800, 1, 0x14000, 21).is_none());
    }

    #[test]
    fn changed_by_insertion_past_last_bucket_returns_none() {
        let table = twenty_regions();
        assert!(table.changed(u64::MAX, 1, u64::MAX, 21).is_none());
    }

    #[test]
    fn changed_by_insertion_into_crowded_table_returns_none() {
        let table = twenty_regions();
        assert!(table.changed(0x1800, 1, 0x14000, 64).is_some());
        assert!(table.changed(0x1800, 1, 0x14000, 65).is_none());
    }

    #[test]
    fn changed_with_buckets_for_many_more_regions_returns_none() {
        let table = BucketTable::new((0..1024u32).map(|start| u64::from(start) * 0x1000));
        assert!(table.changed(0x2000, -1, 0x14000, 128).is_some());
        assert!(table.changed(0x2000, -1, 0x14000, 127).is_none());
    }

    #[test]
    fn changed_by_removal_of_last_of_few_regions_returns_none() {
        let table = BucketTable::new([0, 1 << 32, 1 << 36].into_iter());
        assert!(table.changed(1 << 36, -1, 1 << 32, 2).is_none());
        assert!(table.changed(1 << 32, -1, 1 << 36, 2).is_some());
        assert!(table.changed(1 << 35, 1, 1 << 36, 4).is_some());
    }

    #[test]
    fn changed_by_removal_of_first_or_of_one_of_nine_regions_returns_none() {
        let table = twenty_regions();
        assert!(table.changed(0x1000, -1, 0x14000, 19).is_none());
        assert!(table.changed(0x2000, -1, 0x14000, 8).is_none());
        assert!(table.changed(0x2000, -1, 0x14000, 9).is_some());
    }

    proptest! {
        /// Compares each number with a count of the starts in the bucket and before it.
        #[test]
        fn numbers_agree_with_count_of_starts(
            gaps in prop::collection::vec(prop_oneof![20 => 1u64..16, 1 => 1u64..1 << 50], 1..40),
            first in any::<u32>(),
            at in any::<prop::sample::Index>(),
        ) {
            let mut next = u64::from(first);
            let mut starts = vec![next];
            for gap in gaps {
                next += gap;
                starts.push(next);
            }
            let check = |table: &BucketTable, starts: &[u64]| {
                for (bucket, number) in numbers(table).into_iter().enumerate() {
                    let started = starts
                        .iter()
                        .filter(|start| (**start - starts[0]) >> table.shift <= bucket as u64);
                    assert_eq!(started.count() - 1, number, "bucket {bucket} of {starts:?}");
                }
            };
            let table = BucketTable::new(starts.iter().copied());
            check(&table, &starts);
            let inserted = starts.remove(at.index(starts.len()));
            if starts.is_empty() {
                return Ok(());
            }
            let last = starts[starts.len() - 1];
            if let Some(shrunk) = table.changed(inserted, -1, last, starts.len()) {
                check(&shrunk, &starts);
            }
            let table = BucketTable::new(starts.iter().copied());
            let grown = table.changed(inserted, 1, last.max(inserted), starts.len() + 1);
            starts.push(inserted);
            starts.sort_unstable();
            if let Some(grown) = grown {
                check(&grown, &starts);
            }
        }
    }
}
