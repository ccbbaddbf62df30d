//! The regions of a collection, and finding the one that has an address.

use std::cmp::Ordering as CmpOrdering;
use std::sync::Arc;

use super::GuestMemoryRegion;
use crate::guest_memory::GuestAddress;

/// Regions, sorted by address, each beside where it begins and how long it is, so that a search touches no region.
///
/// ```text
///   entries   0x0, 0x8000_0000, region    0x1_0000_0000, 0x4000_0000, region    …       ascending
///   last_in   0  0  0  0                  1  1  1  1                            …       four to an entry, one for each bucket
/// ```
///
/// One region is one compare. For more, the span from the first start to the last is cut into buckets of a power of two bytes, of which
/// four times as many as regions suffice; a table has, for each, the number of the last region that begins in it or before. That is the region
/// of an address in the bucket unless another begins further up in the bucket: never, where regions begin at multiples of the bucket's
/// size, as most of a guest's do. Else the regions are searched by halves.
///
/// The table lies among the entries: a map is made and cloned with one allocation, which is half of what that costs where regions are few.
#[derive(Debug)]
pub(super) struct RegionIndex<R> {
    entries: Box<[Entry<R>]>,
    /// The size of a bucket, as a power of two. (A whole word: what moves an index with bytes between its fields moves it in pieces that overlap.)
    shift: u64,
}

/// A region's place, and a part of the table, which has to do with the place of the entry and not with its region.
#[derive(Debug)]
pub(super) struct Entry<R> {
    start: u64,
    len: u64,
    region: Arc<R>,
    last_in: Numbers,
}

/// So many buckets a region, so that most have the start of one region or none.
const BUCKETS: usize = 4;

/// The numbers of four buckets. They are read one by one and written as one integer, so that an entry is made in registers: put together from
/// smaller ones in memory, it would wait for each before it can be copied.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Numbers([u8; 8]);

impl Numbers {
    /// A one in each of the four.
    const ONES: u64 = 0x0001_0001_0001_0001;

    /// The four together, the first in the lowest 16 bits.
    #[inline(always)]
    fn all(self) -> u64 {
        u64::from_le_bytes(self.0)
    }

    /// The number of a bucket, counted from any first one of an entry.
    #[inline(always)]
    fn of(&self, bucket: usize) -> Option<u16> {
        let (numbers, _) = self.0.as_chunks();
        numbers
            .get(bucket % BUCKETS)
            .map(|number| u16::from_le_bytes(*number))
    }

    /// How many bits of [`all`](Self::all) are before those of a bucket.
    #[inline(always)]
    fn bits_before(bucket: usize) -> u32 {
        // No more than 48.
        u32::try_from(bucket % BUCKETS)
            .unwrap_or(0)
            .wrapping_mul(u16::BITS)
    }
}

impl From<u64> for Numbers {
    #[inline(always)]
    fn from(all: u64) -> Self {
        Self(all.to_le_bytes())
    }
}

impl<R> Entry<R> {
    /// The last address; that of the start if there is none.
    pub(super) fn last(&self) -> u64 {
        self.start.saturating_add(self.len.saturating_sub(1))
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn region(&self) -> &Arc<R> {
        &self.region
    }
}

impl<R: GuestMemoryRegion> Entry<R> {
    pub(super) fn new(region: Arc<R>) -> Self {
        let start = region.start_addr().0;
        // What a region claims to have past 2^64 does not count.
        let len = region
            .len()
            .min(u64::MAX.saturating_sub(start).saturating_add(1));
        Entry {
            start,
            len,
            region,
            last_in: Numbers::default(),
        }
    }
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
            shift: 0,
        }
    }
}

impl<R> Clone for RegionIndex<R> {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            ..*self
        }
    }
}

impl<R> RegionIndex<R> {
    /// Makes the index of regions that are sorted and do not overlap.
    pub(super) fn of(mut entries: Vec<Entry<R>>) -> Self {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Self::default();
        };
        let (first, span) = (first.start, last.start.wrapping_sub(first.start));
        let shift = u64::from(shift(span, entries.len()));
        number_buckets(&mut entries, first, shift);
        Self {
            entries: entries.into(),
            shift,
        }
    }

    /// The index with one more region: so many that are here come before it.
    pub(super) fn with(&self, place: usize, entry: Entry<R>) -> Self {
        let (before, after) = self
            .entries
            .split_at_checked(place)
            .unwrap_or((&self.entries, &[]));
        let last = after.last().unwrap_or(&entry).start;
        let regions = self.entries.len().saturating_add(1);
        let table = self.table_from(entry.start, last, regions, Change::More);
        self.put_together(before, Some(entry), after, table)
    }

    /// The index without the region of that number.
    pub(super) fn without(&self, number: usize) -> Self {
        let (before, after) = self
            .entries
            .split_at_checked(number)
            .unwrap_or((&self.entries, &[]));
        let Some((removed, after)) = after.split_first() else {
            return self.clone();
        };
        let Some(last) = after.last().or(before.last()) else {
            return Self::default();
        };
        let regions = self.entries.len().saturating_sub(1);
        let table = self.table_from(removed.start, last.start, regions, Change::Less);
        self.put_together(before, None, after, table)
    }

    /// The index of the regions `before`, of a new one if there is one, and of those `after`, with the table of this index as it is changed, or with
    /// another one.
    #[inline(always)]
    fn put_together(
        &self,
        before: &[Entry<R>],
        new: Option<Entry<R>>,
        after: &[Entry<R>],
        table: Option<ChangedTable<'_, R>>,
    ) -> Self {
        let regions = before.len().saturating_add(after.len());
        let mut entries = Vec::with_capacity(regions.saturating_add(usize::from(new.is_some())));
        let Some(table) = table else {
            entries.extend(before.iter().cloned());
            entries.extend(new);
            entries.extend(after.iter().cloned());
            return Self::of(entries);
        };
        entries.extend(
            before
                .iter()
                .enumerate()
                .map(|(at, before)| before.with_part(table.part(at))),
        );
        if let Some(mut new) = new {
            new.last_in = table.part(before.len());
            entries.push(new);
        }
        let behind = entries.len()..;
        entries.extend(
            after
                .iter()
                .zip(behind)
                .map(|(after, at)| after.with_part(table.part(at))),
        );
        Self {
            entries: entries.into(),
            shift: self.shift,
        }
    }

    /// The table of this index, for one that has a region more or less at `start`, `regions` of which the last begins at `last`: as it is up to
    /// the bucket of `start`, and one more or less from there on.
    ///
    /// `None` if a table of other buckets is better, or is needed: where the first region is another one, or buckets would be too few or too many.
    fn table_from(
        &self,
        start: u64,
        last: u64,
        regions: usize,
        change: Change,
    ) -> Option<ChangedTable<'_, R>> {
        let first = self.entries.first()?.start;
        if start <= first || self.entries.len() >= usize::from(NUMBERS_END) {
            return None;
        }
        let buckets = last.wrapping_sub(first) >> self.shift;
        let room = room(regions);
        if buckets > room || buckets < room / 4 {
            return None;
        }
        Some(ChangedTable {
            old: &self.entries,
            from: usize::try_from(start.wrapping_sub(first) >> self.shift).unwrap_or(usize::MAX),
            change,
        })
    }
}

/// The last bucket that the last of so many regions may begin in: the first one of the last entry, so that all of that entry have its number.
fn room(regions: usize) -> u64 {
    let last = regions.saturating_sub(1).saturating_mul(BUCKETS);
    u64::try_from(last).unwrap_or(u64::MAX)
}

/// The size of a bucket, as a power of two: the smallest with which the last region, `span` behind the first one, begins in the first three quarters
/// of the room. What is left lets regions be removed without another table.
fn shift(span: u64, regions: usize) -> u32 {
    let room = room(regions);
    let last = room.saturating_sub(room / 4);
    // As many bits as that number has: one more shift makes it less for sure.
    let shift = last.leading_zeros().saturating_sub(span.leading_zeros());
    shift.saturating_add(u32::from(span.checked_shr(shift).unwrap_or(0) > last))
}

/// The table of an index that differs by one region from an old one.
struct ChangedTable<'a, R> {
    old: &'a [Entry<R>],
    /// The first bucket whose number changes.
    from: usize,
    /// One more, or one less.
    change: Change,
}

#[derive(Clone, Copy)]
enum Change {
    More,
    Less,
}

impl<R> ChangedTable<'_, R> {
    /// The part that lies in the entry at `place`.
    #[inline(always)]
    fn part(&self, place: usize) -> Numbers {
        // Buckets that the old table has no entry for are behind the start of the last region, as those of its last entry.
        let Some(old) = self.old.get(place).or(self.old.last()) else {
            return Numbers::default();
        };
        let changed = match place.cmp(&(self.from / BUCKETS)) {
            CmpOrdering::Less => 0,
            CmpOrdering::Equal => Numbers::ONES << Numbers::bits_before(self.from),
            CmpOrdering::Greater => Numbers::ONES,
        };
        // No number runs over into the next one: there are fewer than `NUMBERS_END` regions, and what becomes one less was that of a region behind
        // the first.
        Numbers::from(match self.change {
            Change::More => old.last_in.all().wrapping_add(changed),
            Change::Less => old.last_in.all().wrapping_sub(changed),
        })
    }
}

impl<R> Entry<R> {
    /// The same region, in an entry with another part of the table.
    #[inline(always)]
    fn with_part(&self, last_in: Numbers) -> Self {
        Self {
            region: Arc::clone(&self.region),
            last_in,
            ..*self
        }
    }
}

/// Fills the table: for each bucket, the number of the last region that begins in it or before.
fn number_buckets<R>(entries: &mut [Entry<R>], first: u64, shift: u64) {
    let mut last_number = 0u16;
    let mut next = 1usize;
    let mut next_bucket = bucket_of(entries.get(next), first, shift);
    let mut bucket = 0u64;
    for place in 0..entries.len() {
        let mut part = 0u64;
        for in_part in 0..BUCKETS {
            while next_bucket <= bucket {
                // Of more regions than there are numbers the last one stands for all behind it: see `find`.
                last_number = u16::try_from(next).unwrap_or(NUMBERS_END);
                next = next.saturating_add(1);
                next_bucket = bucket_of(entries.get(next), first, shift);
            }
            part |= u64::from(last_number) << Numbers::bits_before(in_part);
            bucket = bucket.saturating_add(1);
        }
        if let Some(entry) = entries.get_mut(place) {
            entry.last_in = part.into();
        }
    }
}

/// The number that stands for all from there on.
const NUMBERS_END: u16 = u16::MAX;

/// The bucket that a region begins in; if there is no such region, one that never comes.
fn bucket_of<R>(entry: Option<&Entry<R>>, first: u64, shift: u64) -> u64 {
    entry.map_or(u64::MAX, |entry| entry.start.wrapping_sub(first) >> shift)
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

    /// The entry of the region with that number.
    pub(super) fn entry(&self, number: usize) -> Option<&Entry<R>> {
        self.entries.get(number)
    }

    /// The region that has the address.
    #[inline(always)]
    pub(super) fn find(&self, addr: GuestAddress) -> Option<&R> {
        self.find_numbered(addr).map(|(_, entry)| &*entry.region)
    }

    /// The region that has the address, and those that follow it without a hole.
    #[inline(always)]
    pub(super) fn find_run(&self, addr: GuestAddress) -> impl Iterator<Item = &R> {
        let (from, mut next) = self
            .find_numbered(addr)
            .map_or((usize::MAX, 0), |(number, entry)| (number, entry.start));
        self.entries
            .get(from..)
            .unwrap_or_default()
            .iter()
            .map_while(move |entry| {
                if entry.start != next {
                    return None;
                }
                // Nothing begins at 2^64, to which this wraps: a region that begins at 0 is the first one.
                next = entry.start.wrapping_add(entry.len);
                Some(&*entry.region)
            })
    }

    /// The region that has the address, and its number.
    #[inline(always)]
    fn find_numbered(&self, addr: GuestAddress) -> Option<(usize, &Entry<R>)> {
        let first = self.entries.first()?;
        // Below the first start, the distance wraps to more than any length.
        let distance = addr.0.wrapping_sub(first.start);
        if self.entries.len() == 1 {
            return (distance < first.len).then_some((0, first));
        }
        // Addresses behind the last bucket are the last region's, or nobody's; so are those below the first region, whose distance wraps. All
        // buckets of the last entry are as good for them.
        let bucket = usize::try_from(distance >> self.shift).unwrap_or(usize::MAX);
        let part = (bucket / BUCKETS).min(self.entries.len().wrapping_sub(1));
        let number = self.entries.get(part)?.last_in.of(bucket)?;
        let number = usize::from(number);
        let entry = self.entries.get(number)?;
        if addr.0.wrapping_sub(entry.start) < entry.len {
            return Some((number, entry));
        }
        if addr.0 >= entry.start && number != usize::from(NUMBERS_END) {
            return None;
        }
        self.search(addr)
    }

    /// The region that has the address, by halves.
    #[cold]
    fn search(&self, addr: GuestAddress) -> Option<(usize, &Entry<R>)> {
        let number = self.begun(addr).checked_sub(1)?;
        let entry = self.entries.get(number)?;
        (addr.0.wrapping_sub(entry.start) < entry.len).then_some((number, entry))
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

    fn index(places: impl IntoIterator<Item = (u64, u64)>) -> RegionIndex<usize> {
        let entry = |((start, len), number)| Entry {
            start,
            len,
            region: Arc::new(number),
            last_in: Numbers::default(),
        };
        RegionIndex::of(places.into_iter().zip(0..).map(entry).collect())
    }

    fn table<R>(index: &RegionIndex<R>) -> Vec<u16> {
        let numbers = |entry: &Entry<R>| {
            (0..BUCKETS)
                .map(|bucket| entry.last_in.of(bucket).unwrap())
                .collect::<Vec<_>>()
        };
        index.entries.iter().flat_map(numbers).collect()
    }

    #[test]
    fn buckets_are_as_small_as_the_table_has_room_for() {
        for regions in [1usize, 2, 3, 5, 64, 1000] {
            let last = (regions as u64 - 1) * 3;
            let spans = [
                1,
                3,
                4,
                7,
                8,
                15,
                16,
                last,
                last + 1,
                0x1_4000_0000,
                1 << 63,
                u64::MAX,
            ];
            for span in spans.into_iter().filter(|_| regions > 1).chain([0]) {
                let shift = shift(span, regions);
                assert!(span >> shift <= last, "{span} and {regions}");
                assert!(
                    shift == 0 || span >> (shift - 1) > last,
                    "{span} and {regions}"
                );
            }
        }
    }

    /// A guest of the usual shape needs no search: its buckets begin where its regions do.
    #[test]
    fn regions_at_multiples_of_a_bucket_are_found_at_once() {
        let starts = [0, 0x4000_0000, 0xe000_0000, 0x1_0000_0000, 0x1_4000_0000];
        let index = index(starts.map(|start| (start + 0x10_0000, 0x1000)));
        assert_eq!(index.shift, 29);
        let numbers = [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4];
        assert_eq!(table(&index), numbers);
    }

    /// More regions than the table has numbers for: those behind are found by halves, and nothing is found where nothing is.
    #[test]
    #[cfg_attr(
        miri,
        ignore = "takes minutes there, and shows nothing that fewer regions do not"
    )]
    fn regions_without_a_number_are_found() {
        let many = usize::from(NUMBERS_END) + 10;
        let index = index((0..many as u64).map(|number| (number * 8, 4)));
        for number in (0..many).step_by(97).chain(many - 30..many) {
            let start = number as u64 * 8;
            assert_eq!(index.find(GuestAddress(start + 3)), Some(&number));
            assert_eq!(index.find(GuestAddress(start + 4)), None);
        }
    }

    /// One by one, in any order, and out again: everything is found as in a table of its own, and tables are kept only while they fit.
    #[test]
    fn insertion_and_removal_keep_the_table_right() {
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
            let mut kept = 0;
            for step in 0..400 {
                let before = grown.shift;
                // More and more, then fewer and fewer; now and then the first and the last.
                let start = (next() % 256) * 16 * spread;
                let place = grown.begun(GuestAddress(start));
                let is_there = place > 0 && present[place - 1].0 == start;
                if step < 200 && !is_there {
                    let entry = Entry {
                        start,
                        len: 1 + next() % 16,
                        region: Arc::new(0),
                        last_in: 9.into(),
                    };
                    present.insert(place, (start, entry.len));
                    grown = grown.with(place, entry);
                } else if !present.is_empty() {
                    let number = next() as usize % present.len();
                    present.remove(number);
                    grown = grown.without(number);
                }
                kept += usize::from(before == grown.shift);
                let places: Vec<_> = grown
                    .entries
                    .iter()
                    .map(|entry| (entry.start, entry.len))
                    .collect();
                assert_eq!(places, present);
                let mut fresh = RegionIndex {
                    entries: grown.entries.clone(),
                    ..grown
                };
                if let Some(first) = present.first() {
                    number_buckets(&mut fresh.entries, first.0, grown.shift);
                }
                assert_eq!(table(&grown), table(&fresh), "{spread} {step}");
                if let (Some(first), Some(last)) = (present.first(), present.last()) {
                    let buckets = (last.0 - first.0) >> grown.shift;
                    let room = room(present.len());
                    assert!(buckets <= room, "{spread} {step}");
                    assert!(grown.shift == 0 || buckets >= room / 4, "{spread} {step}");
                }
            }
            assert!(kept > 300, "{kept}");
        }
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
            let index = index(regions.iter().map(|&(start, len)| (start.0, len)));
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
