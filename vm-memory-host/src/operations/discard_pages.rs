//! [`discard_pages`]: returns pages to the system that a guest lists by number.
//!
//! The guest chooses the list: pages repeat, are unordered, or are not in memory. It is read once,
//! into a bounded number of ranges. These are sorted and joined, and each becomes one call for each
//! region:
//!
//! ```text
//!   list      7 3 4 5 5 4 9 8       page numbers
//!   ranges    7-7 3-5 8-9           numbers that follow each other, at most MAX_RANGES
//!   joined    3-5 7-9               sorted; no two touch
//!   parts     3-5 7-8 9-9           at the boundaries of regions
//! ```

use std::error::Error;
use std::fmt;
use std::ops::RangeInclusive;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::discard::{discard_whole, refuse_read_only};
use crate::error::{ChangeError, RefusedPage};
use crate::mapping::{to_u64, usable, HostMapped, HostMapping, Part};

/// The size of the pages that are numbered, whatever the page size of guest and host.
pub(super) const NUMBERED: u64 = 1 << NUMBERED_SHIFT;
const NUMBERED_SHIFT: u32 = 12;

/// The maximum number of ranges that are held at a time. They take 64 KiB.
const MAX_RANGES: usize = 4096;

/// The result of [`discard_pages`] or [`Balloon::inflate`](crate::Balloon::inflate).
///
/// `Display` prints the counts, and the first refused page with its reason.
///
/// All counts except `freed` are numbers of 4096-byte pages. A list is processed in batches of at
/// most 4096 ranges of consecutive numbers. A page that is listed more than once counts once for
/// each batch.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{discard_pages, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let report = discard_pages(&memory, [3u32, 4, 0x100]);
/// assert_eq!(
///     report.to_string(),
///     "2 pages discarded, 0x2000 bytes freed, 1 page refused; page 0x100 was refused: no region \
///     contains guest address 0x100000; pass a range without holes"
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
#[must_use = "it says which pages were refused"]
#[non_exhaustive]
pub struct DiscardReport {
    /// The number of pages that were discarded. It includes pages that were collected before.
    pub discarded: u64,
    /// The number of pages that were collected, and did not complete a larger page.
    ///
    /// It is 0 unless [`Balloon::inflate`](crate::Balloon::inflate) returns it. A page that is in
    /// the balloon already counts again.
    pub collected: u64,
    /// The number of pages of huge pages that stay with their region, which were not changed.
    ///
    /// It is 0 unless [`Balloon::inflate`](crate::Balloon::inflate) returns it.
    pub kept: u64,
    /// The number of pages that were refused.
    pub refused: u64,
    /// The number of bytes freed, as [`discard`](crate::discard()) counts them.
    pub freed: u64,
    /// The refused page that was found first, and the reason. Each batch is processed in ascending
    /// order.
    pub first_refused: Option<RefusedPage>,
}

impl DiscardReport {
    /// Records that `count` pages, of which `page` is the first, were refused.
    pub(super) fn refuse(&mut self, page: u64, count: u64, source: ChangeError) {
        self.refused = self.refused.saturating_add(count);
        self.first_refused
            .get_or_insert(RefusedPage { page, source });
    }

    /// Records the result of discarding `count` pages, of which `page` is the first.
    pub(super) fn record(&mut self, page: u64, count: u64, freed: Result<u64, ChangeError>) {
        match freed {
            Ok(freed) => {
                self.discarded = self.discarded.saturating_add(count);
                self.freed = self.freed.saturating_add(freed);
            }
            Err(source) => self.refuse(page, count, source),
        }
    }
}

impl fmt::Display for DiscardReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = |count| if count == 1 { "page" } else { "pages" };
        let Self {
            discarded,
            collected,
            kept,
            refused,
            freed,
            first_refused,
        } = self;
        let what = pages(*discarded);
        write!(f, "{discarded} {what} discarded, {freed:#x} bytes freed")?;
        for (count, what) in [(*collected, "collected"), (*kept, "kept")] {
            if count != 0 {
                write!(f, ", {count} {} {what}", pages(count))?;
            }
        }
        let Some(first) = first_refused else {
            return Ok(());
        };
        write!(f, ", {refused} {} refused; {first}", pages(*refused))?;
        let mut cause = first.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Returns the listed pages of guest memory to the system, like [`discard`](crate::discard()).
///
/// A page number is a guest physical address divided by 4096, whatever the page size of the guest.
/// The inflate queue of a balloon has such numbers (virtio 1.2, section 5.5.6). Pages may repeat
/// and be in any order. Adjacent pages become one system call for each region. A page that cannot
/// be discarded does not affect the others, since a guest may list any number. The memory use is
/// bounded, however long the list is. The time grows with its length, which the caller limits.
///
/// On regions with larger pages, such as huge pages, the list must contain all pages of a larger
/// page. Otherwise these are refused with [`ChangeError::Unaligned`]. A
/// [`Balloon`](crate::Balloon) collects them instead.
///
/// The pages are discarded before the call returns, so acknowledge the request of the guest
/// afterwards.
///
/// A request may have several descriptors.
/// [`IoBuffer::copy_to`](vm_memory::vectored::IoBuffer::copy_to) reads a list from any number of
/// them. The second example does so without an allocation for the list.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Le32};
/// use vm_memory_host::{discard_pages, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(7u8, GuestAddress(0x3000))?;
///
/// // The buffer of an inflate request.
/// let request = [Le32::from(4), Le32::from(3), Le32::from(4), Le32::from(u32::MAX)];
/// let report = discard_pages(&memory, request.map(u32::from));
/// assert_eq!((report.discarded, report.refused), (2, 1));
/// if report.refused != 0 {
///     eprintln!("the driver listed pages that are not memory: {report}");
/// }
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000))?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A request whose first descriptor ends inside a page number:
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::vectored::IoBuffer;
/// use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, Le32, Permissions};
/// use vm_memory_host::{discard_pages, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: Arc<GuestMemoryMmap> = Arc::new(MemoryBuilder::new().region(region).build()?);
/// memory.write_obj([3u32, 4, 5].map(Le32::from), GuestAddress(0x1000))?;
///
/// let descriptors = [(GuestAddress(0x1000), 6), (GuestAddress(0x1006), 6)];
/// let request = IoBuffer::from_ranges(&memory, descriptors, Permissions::Read)?;
/// // A request of more pages than this is read in parts.
/// let mut pages = [Le32::default(); 256];
/// let (mut offset, mut discarded) = (0, 0);
/// while offset < request.len() {
///     let bytes = request.copy_to(offset, ByteValued::as_mut_slice(&mut pages))?;
///     let listed = &pages[..bytes / 4];
///     let report = discard_pages(&*memory, listed.iter().map(|page| page.to_native()));
///     discarded += report.discarded;
///     offset += bytes;
/// }
/// assert_eq!(discarded, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "balloon")]
#[doc(alias = "free page reporting")]
#[doc(alias = "PFN")]
#[doc(alias = "inflate")]
pub fn discard_pages<M, I>(memory: &M, pages: I) -> DiscardReport
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
    I: IntoIterator,
    I::Item: Into<u64>,
{
    let mut report = DiscardReport::default();
    for_each_part(memory, pages, &mut report, discard_listed);
    report
}

/// Discards the pages of a part that are whole, and refuses the others.
pub(super) fn discard_listed<R: HostMapped>(part: &ListedPart<'_, R>, report: &mut DiscardReport) {
    let page_size = part.page_size();
    let (start, end) = (part.offset, part.offset.saturating_add(part.len));
    let whole_from = start.next_multiple_of(page_size).min(end);
    let whole_to = end
        .saturating_sub(end.checked_rem(page_size).unwrap_or(0))
        .max(whole_from);
    for (from, to, is_whole) in [
        (start, whole_from, false),
        (whole_from, whole_to, true),
        (whole_to, end, false),
    ] {
        let (page, count) = (part.number_of(from), pages_of(to.saturating_sub(from)));
        let here = part.part(from, to);
        match count {
            0 => {}
            _ if is_whole => report.record(page, count, discard_whole(&here)),
            _ => report.refuse(page, count, here.not_whole("pages", to_u64(page_size))),
        }
    }
}

/// The part of a range of listed pages that is in one region, which may discard them.
pub(super) struct ListedPart<'a, R> {
    pub(super) region: &'a R,
    pub(super) mapping: &'a HostMapping,
    /// The offset of the part in the region, in bytes: a multiple of [`NUMBERED`].
    pub(super) offset: usize,
    /// The length of the part in bytes: a multiple of [`NUMBERED`], and not 0.
    pub(super) len: usize,
    /// The number of the first page.
    page: u64,
}

impl<'a, R: HostMapped> ListedPart<'a, R> {
    /// Returns the size of the region's pages in bytes, a multiple of [`NUMBERED`].
    pub(super) fn page_size(&self) -> usize {
        let size = usize::try_from(self.mapping.page_size());
        size.unwrap_or(usize::MAX)
    }

    /// Returns the number of the page at an offset in the region, which is not before the part.
    pub(super) fn number_of(&self, offset: usize) -> u64 {
        let further = pages_of(offset.saturating_sub(self.offset));
        self.page.saturating_add(further)
    }

    /// Returns a range of the region as a part of a change.
    pub(super) fn part(&self, from: usize, to: usize) -> Part<'a, R> {
        Part {
            region: self.region,
            mapping: self.mapping,
            offset: from,
            len: to.saturating_sub(from),
            before: 0,
        }
    }
}

/// Returns the number of pages in a number of bytes.
pub(super) fn pages_of(len: usize) -> u64 {
    to_u64(len) >> NUMBERED_SHIFT
}

/// Calls `use_part` for the listed pages that are in memory, and refuses the others.
///
/// The parts of a batch ascend, and do not overlap.
pub(super) fn for_each_part<'a, M, I>(
    memory: &'a M,
    pages: I,
    report: &mut DiscardReport,
    mut use_part: impl FnMut(&ListedPart<'a, M::R>, &mut DiscardReport),
) where
    M: GuestMemoryBackend,
    M::R: HostMapped,
    I: IntoIterator,
    I::Item: Into<u64>,
{
    let pages = pages.into_iter().map(Into::into);
    for_each_range(pages, MAX_RANGES, |range| {
        let (mut page, last) = range.into_inner();
        loop {
            let done = match listed_part(memory, page, last) {
                Ok(part) => {
                    use_part(&part, report);
                    pages_of(part.len)
                }
                Err(source) => {
                    report.refuse(page, 1, source);
                    1
                }
            };
            match page.checked_add(done) {
                Some(next) if next <= last => page = next,
                _ => break,
            }
        }
    });
}

/// Returns the longest part that begins at `page` and ends at `last` or before.
fn listed_part<M>(memory: &M, page: u64, last: u64) -> Result<ListedPart<'_, M::R>, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let addr = page.checked_mul(NUMBERED);
    let addr = addr.ok_or(ChangeError::PageNumber { page })?;
    let hole = || ChangeError::Hole { addr };
    let found = memory.to_region_addr(GuestAddress(addr));
    let (region, offset) = found.ok_or_else(hole)?;
    let mapping = usable::<_, ChangeError>(region)?;
    refuse_read_only(region, mapping)?;
    let in_region = to_u64(mapping.mapped().len()).saturating_sub(offset.0);
    let listed = last.saturating_sub(page).saturating_add(1);
    let count = listed.min(in_region >> NUMBERED_SHIFT);
    let len = count.saturating_mul(NUMBERED);
    // Offset and length fit a `usize`, since the region is mapped.
    let size = |n: u64| usize::try_from(n).map_err(|_| hole());
    let part = ListedPart {
        region,
        mapping,
        offset: size(offset.0)?,
        len: size(len)?,
        page,
    };
    // A map can have the region at an address that is not a multiple of its pages.
    if !offset.0.is_multiple_of(NUMBERED) || count == 0 {
        let end = part.offset.saturating_add(size(NUMBERED)?);
        return Err(part
            .part(part.offset, end)
            .not_whole("pages", mapping.page_size()));
    }
    Ok(part)
}

/// Calls `each` with the numbers of a list, as ranges.
///
/// Holds at most `max` ranges of consecutive numbers: a batch of the list. The ranges of a batch
/// are passed in ascending order, and neither touch nor overlap.
fn for_each_range(
    numbers: impl Iterator<Item = u64>,
    max: usize,
    mut each: impl FnMut(RangeInclusive<u64>),
) {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        if let Some((first, last)) = ranges.last_mut() {
            if (*first..=*last).contains(&number) {
                continue;
            }
            if last.checked_add(1) == Some(number) {
                *last = number;
                continue;
            }
            if number.checked_add(1) == Some(*first) {
                *first = number;
                continue;
            }
        }
        if ranges.len() >= max {
            take_joined(&mut ranges, &mut each);
        }
        ranges.push((number, number));
    }
    take_joined(&mut ranges, &mut each);
}

/// Removes all ranges, joins those that touch or overlap, and passes the results in order.
fn take_joined(ranges: &mut Vec<(u64, u64)>, each: &mut impl FnMut(RangeInclusive<u64>)) {
    ranges.sort_unstable();
    let mut sorted = ranges.drain(..);
    let Some((mut first, mut last)) = sorted.next() else {
        return;
    };
    for (next, end) in sorted {
        if next <= last.saturating_add(1) {
            last = last.max(end);
        } else {
            each(first..=last);
            (first, last) = (next, end);
        }
    }
    each(first..=last);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ranges_of(numbers: &[u64], max: usize) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        for_each_range(numbers.iter().copied(), max, |range| {
            ranges.push(range.into_inner());
        });
        ranges
    }

    #[test]
    fn for_each_range_of_batch_joins_its_numbers() {
        let ranges = ranges_of(&[7, 3, 4, 5, 5, 4, 9, 8], MAX_RANGES);
        assert_eq!(ranges, [(3, 5), (7, 9)]);
        assert_eq!(ranges_of(&[], MAX_RANGES), []);
        let ends = [u64::MAX, 0, u64::MAX - 1, 1, u64::MAX, 0];
        assert_eq!(
            ranges_of(&ends, MAX_RANGES),
            [(0, 1), (u64::MAX - 1, u64::MAX)]
        );
    }

    #[test]
    fn for_each_range_of_more_ranges_than_a_batch_begins_a_new_one() {
        let ascending: Vec<u64> = (10..20).collect();
        let descending: Vec<u64> = (10..20).rev().collect();
        for numbers in [ascending, descending] {
            assert_eq!(ranges_of(&numbers, 1), [(10, 19)]);
        }
        // The third range begins a new batch.
        let ranges = ranges_of(&[1, 3, 5, 4, 2], 2);
        assert_eq!(ranges, [(1, 1), (3, 3), (2, 2), (4, 5)]);
    }

    proptest! {
        #[test]
        fn for_each_range_covers_each_number(
            numbers in prop::collection::vec(0u64..40, 0..80),
            max in 1usize..6,
        ) {
            // The batches, in a slow way.
            let mut batches = vec![Vec::new()];
            let (mut count, mut first, mut last) = (0, 0, 0);
            for number in &numbers {
                if count > 0 && first <= number + 1 && *number <= last + 1 {
                    (first, last) = (first.min(*number), last.max(*number));
                } else {
                    if count == max {
                        batches.push(Vec::new());
                        count = 0;
                    }
                    count += 1;
                    (first, last) = (*number, *number);
                }
                batches.last_mut().unwrap().push(*number);
            }
            let mut expected = Vec::new();
            for batch in batches {
                let set: BTreeSet<u64> = batch.into_iter().collect();
                let starts = set.iter().filter(|n| **n == 0 || !set.contains(&(**n - 1)));
                for start in starts {
                    let end = (*start..).take_while(|n| set.contains(n)).last().unwrap();
                    expected.push((*start, end));
                }
            }
            prop_assert_eq!(ranges_of(&numbers, max), expected);
        }
    }
}
