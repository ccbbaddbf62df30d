//! [`BucketTable`]: guesses in constant time which region contains an address.

use std::sync::Arc;

use crate::convert::{to_u64, to_usize};

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
const FEW_LAST: u64 = 15;
const FEW_BITS: u64 = 4;

/// The number of buckets per region in a new table: most buckets contain the start of one region or
/// of none.
const BUCKETS_PER_REGION: usize = 4;

/// The minimum number of buckets per region in a table that is reused.
const FEWEST_BUCKETS_PER_REGION: usize = 2;

impl Default for BucketTable {
    fn default() -> Self {
        Self {
            first: 0,
            shift: 0,
            numbers: Numbers::Few(0),
        }
    }
}

impl BucketTable {
    /// Creates the table of regions that start at these addresses, in ascending order.
    pub(super) fn new(starts: impl ExactSizeIterator<Item = u64> + Clone) -> Self {
        let (Some(first), Some(last)) = (starts.clone().next(), starts.clone().last()) else {
            return Self::default();
        };
        let regions = starts.len();
        let buckets = match regions {
            0..=FEW => FEW_BUCKETS,
            _ => regions
                .next_power_of_two()
                .saturating_mul(BUCKETS_PER_REGION),
        };
        let shift = u64::from(bucket_shift(last.wrapping_sub(first), buckets));
        let bucket_of = |start: u64| to_usize(start.wrapping_sub(first) >> shift);
        let numbers = match regions {
            0..=FEW => Numbers::Few(few_numbers(starts.map(bucket_of))),
            _ => Numbers::Many(many_numbers(starts.map(bucket_of), buckets)),
        };
        Self {
            first,
            shift,
            numbers,
        }
    }

    /// Returns the table with another region that starts at `start`.
    ///
    /// `last` is the start of the last region, and `regions` the number of regions, both with the
    /// new one. Returns `None` if a new table is required: the region is the first one, or the
    /// buckets end before `last` or are too few.
    pub(super) fn inserted(&self, start: u64, last: u64, regions: usize) -> Option<Self> {
        let Numbers::Many(numbers) = &self.numbers else {
            return None;
        };
        let fewest = regions.checked_mul(FEWEST_BUCKETS_PER_REGION)?;
        let last_bucket = last.wrapping_sub(self.first) >> self.shift;
        if start <= self.first || last_bucket >= to_u64(numbers.len()) || numbers.len() < fewest {
            return None;
        }
        let numbers = self.changed(numbers, start, |number| number.saturating_add(1));
        Some(Self {
            numbers: Numbers::Many(numbers),
            ..*self
        })
    }

    /// Returns the table without the region of that number, which starts at `start`.
    ///
    /// `regions` is the number of regions that remain. Returns `None` if a new table is required:
    /// the region is the first one, or few regions remain.
    #[inline(always)]
    pub(super) fn removed(&self, number: usize, start: u64, regions: usize) -> Option<Self> {
        let bucket = start.wrapping_sub(self.first) >> self.shift;
        let numbers = match &self.numbers {
            _ if number == 0 => return None,
            Numbers::Few(numbers) if regions > 1 => {
                Numbers::Few(numbers.wrapping_sub(few_ones(bucket)))
            }
            Numbers::Many(numbers) if regions > FEW => {
                Numbers::Many(self.changed(numbers, start, |number| number.saturating_sub(1)))
            }
            _ => return None,
        };
        Some(Self { numbers, ..*self })
    }

    /// Returns the numbers with a change of those for the bucket of `start` and for later ones.
    fn changed(&self, numbers: &[u16], start: u64, change: impl Fn(u16) -> u16) -> Arc<[u16]> {
        let from = to_usize(start.wrapping_sub(self.first) >> self.shift);
        let mut changed: Arc<[u16]> = Arc::from(numbers);
        let later = Arc::get_mut(&mut changed).and_then(|numbers| numbers.get_mut(from..));
        for number in later.unwrap_or_default() {
            *number = change(*number);
        }
        changed
    }

    /// Returns the number of the last region that starts in the bucket of `addr` or before it.
    ///
    /// The number may be wrong for addresses below the first region or above the last bucket, and
    /// for regions that a `u16` cannot number.
    #[inline(always)]
    pub(super) fn guess(&self, addr: u64) -> usize {
        let bucket = addr.wrapping_sub(self.first) >> self.shift;
        match &self.numbers {
            Numbers::Few(numbers) => few_number(*numbers, bucket),
            Numbers::Many(numbers) => {
                let bucket = to_usize(bucket).min(numbers.len().wrapping_sub(1));
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

/// Returns the numbers for regions that start in these buckets, as [`Numbers::Few`] stores them.
fn few_numbers(buckets: impl Iterator<Item = usize>) -> u64 {
    // Each region but the first adds one to the number of its bucket and of all buckets after it.
    buckets.skip(1).fold(0, |numbers, bucket| {
        numbers.wrapping_add(few_ones(to_u64(bucket)))
    })
}

/// Returns a one for the bucket and for all buckets after it.
fn few_ones(bucket: u64) -> u64 {
    0x1111_1111_1111_1111 << few_shift(bucket)
}

/// Returns the number of a bucket, or of the last one if there are fewer buckets.
#[inline(always)]
fn few_number(numbers: u64, bucket: u64) -> usize {
    to_usize((numbers >> few_shift(bucket)) & 0xf)
}

/// Returns the number of bits before the number of a bucket, or of the last bucket.
#[inline(always)]
fn few_shift(bucket: u64) -> u64 {
    bucket.min(FEW_LAST).wrapping_mul(FEW_BITS)
}

/// Returns the numbers of `count` buckets for regions that start in `buckets`.
fn many_numbers(buckets: impl Iterator<Item = usize>, count: usize) -> Arc<[u16]> {
    let mut numbers: Arc<[u16]> = core::iter::repeat_n(0, count).collect();
    let mut rest = Arc::get_mut(&mut numbers).unwrap_or_default();
    let mut filled = 0usize;
    let mut last = 0u16;
    for bucket in buckets.skip(1) {
        let (before, after) = core::mem::take(&mut rest)
            .split_at_mut_checked(bucket.saturating_sub(filled))
            .unwrap_or_default();
        before.fill(last);
        rest = after;
        filled = bucket;
        last = last.saturating_add(1);
    }
    rest.fill(last);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(table: &BucketTable) -> Vec<usize> {
        match &table.numbers {
            Numbers::Few(numbers) => (0..16).map(|bucket| few_number(*numbers, bucket)).collect(),
            Numbers::Many(numbers) => {
                let buckets = 0..numbers.len() as u64;
                let starts = buckets.map(|bucket| table.first + (bucket << table.shift));
                starts.map(|start| table.guess(start)).collect()
            }
        }
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
    fn inserted_below_first_region_returns_none() {
        let table = twenty_regions();
        assert!(table.inserted(0x800, 0x14000, 21).is_none());
    }

    #[test]
    fn inserted_past_last_bucket_returns_none() {
        let table = twenty_regions();
        assert!(table.inserted(u64::MAX, u64::MAX, 21).is_none());
    }

    #[test]
    fn inserted_into_crowded_table_returns_none() {
        let table = twenty_regions();
        assert!(table.inserted(0x1800, 0x14000, 64).is_some());
        assert!(table.inserted(0x1800, 0x14000, 65).is_none());
    }

    #[test]
    fn removed_first_or_one_of_nine_regions_returns_none() {
        let table = twenty_regions();
        assert!(table.removed(0, 0x1000, 19).is_none());
        assert!(table.removed(1, 0x2000, 8).is_none());
        assert!(table.removed(1, 0x2000, 9).is_some());
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
            let number = at.index(starts.len());
            let inserted = starts.remove(number);
            if starts.is_empty() {
                return Ok(());
            }
            if let Some(shrunk) = table.removed(number, inserted, starts.len()) {
                check(&shrunk, &starts);
            }
            let table = BucketTable::new(starts.iter().copied());
            let last = starts[starts.len() - 1].max(inserted);
            let grown = table.inserted(inserted, last, starts.len() + 1);
            starts.push(inserted);
            starts.sort_unstable();
            if let Some(grown) = grown {
                check(&grown, &starts);
            }
        }
    }
}
