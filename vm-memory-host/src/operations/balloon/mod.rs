//! [`Balloon`]: the pages that a guest has put into its balloon.
//!
//! ```text
//!   page of 2 MiB    ├──────────────────────────────┤
//!   in the balloon    1 1 1 1 1 1 1 0 1 1 1 1 1 1 1      one bit for each 4096 bytes
//!                                   ▲ inflate: all are set, so the page of 2 MiB is discarded
//! ```

mod large_pages;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use vm_memory::arithmetic::to_usize;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::discard::discard_whole;
use super::discard_pages::{
    discard_listed, for_each_part, pages_of, DiscardReport, ListedPart, NUMBERED,
};
use crate::mapping::{provisioned, HostMapped, HostMapping, MappingId};
use large_pages::LargePages;

/// The pages that a guest has put into its balloon, for a balloon device.
///
/// A balloon lists pages of 4096 bytes (virtio 1.2, section 5.5.6). Regions with larger pages, such
/// as huge pages, can only discard whole ones. This type collects the pages of a larger page, over
/// any number of requests, and discards it once all of them are in the balloon. Until then, they
/// keep their bytes and are not marked dirty. A page that the guest takes out again is no longer
/// collected. Pages of other regions are discarded at once, as by
/// [`discard_pages`](crate::discard_pages).
///
/// Use it only if the driver has accepted `VIRTIO_BALLOON_F_MUST_TELL_HOST`. It then uses no page
/// before the device has acknowledged its deflate request. A driver without this feature may
/// already write to a page when another one completes the larger page, and the discard would
/// destroy its bytes. Use [`discard_pages`](crate::discard_pages) for such a driver.
///
/// Build regions of huge pages with [`release_huge_pages`](crate::Region::release_huge_pages).
/// Otherwise the huge pages stay with the region, and the balloon does not change them: it could
/// only overwrite them with zeroes. A driver can repeat two small requests that each time complete
/// a huge page of 1 GiB.
///
/// The device calls [`clear`](Self::clear) when it is reset. The pages are not part of a saved
/// guest: a restored device begins with an empty balloon.
///
/// [`plug`](crate::plug()) of a block makes the balloon forget the collected pages of the region.
/// A driver that unplugs a block may never take its pages out of the balloon, and uses them after
/// it has plugged the block again. Other pages of the region that are in the balloon can no longer
/// complete a larger page, until the guest lists them again.
///
/// # Memory use
///
/// It is proportional to the collected pages. At most, it is one bit for each 4096 bytes of regions
/// with larger pages, and about 100 bytes for each larger page. Pages of a region that has left the
/// map are forgotten once the balloon collects pages of another region. They are never mistaken for
/// pages of a new region at the same addresses.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{Balloon, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(7u8, GuestAddress(0x3000))?;
///
/// let mut balloon = Balloon::new();
/// let report = balloon.inflate(&memory, [3u32, 4]);
/// assert_eq!((report.discarded, report.collected, report.refused), (2, 0, 0));
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000))?, 0);
/// // Acknowledge the deflate request after this call.
/// balloon.deflate(&memory, [3u32]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
#[doc(alias = "virtio-balloon")]
#[doc(alias = "PFN")]
pub struct Balloon {
    /// The collected pages of each region that has larger pages, and its
    /// [number of plugs](HostMapping::plugs) when the first of them was collected.
    regions: BTreeMap<MappingId, (u64, LargePages)>,
}

impl Balloon {
    /// Creates an empty balloon.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts the listed pages into the balloon, and discards those that can be.
    ///
    /// The list is that of [`discard_pages`](crate::discard_pages). A larger page is discarded when
    /// a page completes it. It is not discarded again before the guest has taken out a page of it.
    /// If the system refuses to discard it, its listed pages are refused, and no longer collected.
    ///
    /// # Examples
    ///
    /// Huge pages that return to the pool:
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, Balloon, MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(0), 2 << 20)
    ///     .backing(Backing::Hugetlb { page_size: 2 << 20 })
    ///     .release_huge_pages(true);
    /// // The host may have no free huge page.
    /// if let Ok(memory) = MemoryBuilder::new().region(region).build::<()>() {
    ///     let mut balloon = Balloon::new();
    ///     let report = balloon.inflate(&memory, 0..511u32);
    ///     assert_eq!((report.collected, report.freed), (511, 0));
    ///     let report = balloon.inflate(&memory, [511u32]);
    ///     assert_eq!((report.discarded, report.freed), (512, 2 << 20));
    /// }
    /// ```
    #[doc(alias = "VIRTIO_BALLOON_F_MUST_TELL_HOST")]
    pub fn inflate<M, I>(&mut self, memory: &M, pages: I) -> DiscardReport
    where
        M: GuestMemoryBackend,
        M::R: HostMapped,
        I: IntoIterator,
        I::Item: Into<u64>,
    {
        let mut report = DiscardReport::default();
        for_each_part(memory, pages, &mut report, |part, report| {
            if part.mapping.keeps_huge_pages() {
                report.kept = report.kept.saturating_add(pages_of(part.len));
            } else if pages_of(part.page_size()) <= 1 {
                discard_listed(part, report);
            } else {
                collect(self.large_pages(memory, part), part, report);
            }
        });
        report
    }

    /// Takes the listed pages out of the balloon.
    ///
    /// The list is that of [`discard_pages`](crate::discard_pages). Pages that are not in the
    /// balloon, or not in memory, are ignored. Acknowledge the request of the guest afterwards: it
    /// then uses the pages. The next access to a discarded page populates it. Makes no system call.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{Backing, Balloon, MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(0), 2 << 20)
    ///     .backing(Backing::Hugetlb { page_size: 2 << 20 })
    ///     .release_huge_pages(true);
    /// // The host may have no free huge page.
    /// if let Ok(memory) = MemoryBuilder::new().region(region).build::<()>() {
    ///     let mut balloon = Balloon::new();
    ///     assert_eq!(balloon.inflate(&memory, 0..511u32).collected, 511);
    ///     balloon.deflate(&memory, [7u32]);
    ///     // Page 7 is in use, so the huge page is not discarded.
    ///     let report = balloon.inflate(&memory, [511u32]);
    ///     assert_eq!((report.collected, report.discarded), (1, 0));
    /// }
    /// ```
    pub fn deflate<M, I>(&mut self, memory: &M, pages: I)
    where
        M: GuestMemoryBackend,
        M::R: HostMapped,
        I: IntoIterator,
        I::Item: Into<u64>,
    {
        for page in pages {
            let addr = page.into().checked_mul(NUMBERED);
            let found = addr.and_then(|addr| memory.to_region_addr(GuestAddress(addr)));
            let Some((region, offset)) = found else {
                continue;
            };
            let Ok(mapping) = provisioned(region) else {
                continue;
            };
            let large = self.regions.get_mut(&mapping.id());
            if let (Some((_, large)), Ok(offset)) = (large, usize::try_from(offset.0)) {
                large.remove(number_in_region(offset), 1);
            }
        }
    }

    /// Empties the balloon without discarding a page, for a device that is reset.
    ///
    /// # Examples
    ///
    /// ```
    /// let mut balloon = vm_memory_host::Balloon::new();
    /// balloon.clear();
    /// ```
    pub fn clear(&mut self) {
        self.regions.clear();
    }

    /// Returns the collected pages of the region of `part`, which is in `memory`.
    ///
    /// Forgets those that were collected before a block of the region was plugged.
    fn large_pages<M>(&mut self, memory: &M, part: &ListedPart<'_, M::R>) -> &mut LargePages
    where
        M: GuestMemoryBackend,
        M::R: HostMapped,
    {
        let id = part.mapping.id();
        if !self.regions.contains_key(&id) {
            let mappings = memory.iter().filter_map(HostMapped::host_mapping);
            let present: BTreeSet<_> = mappings.map(HostMapping::id).collect();
            self.regions.retain(|id, _| present.contains(id));
        }
        let plugs = part.mapping.plugs();
        let new = || (plugs, LargePages::new(number_in_region(part.page_size())));
        let entry = self.regions.entry(id).or_insert_with(new);
        if entry.0 != plugs {
            *entry = new();
        }
        &mut entry.1
    }
}

/// Returns the number of a page in its region, given its offset in bytes.
fn number_in_region(offset: usize) -> usize {
    to_usize(pages_of(offset))
}

/// Collects the pages of a part, and discards the larger pages that they complete.
fn collect<R: HostMapped>(
    collected: &mut LargePages,
    part: &ListedPart<'_, R>,
    report: &mut DiscardReport,
) {
    let page_size = part.page_size();
    let end = part.offset.saturating_add(part.len);
    let mut at = part.offset;
    // Larger pages that are complete. They follow each other.
    let mut complete: Option<Range<usize>> = None;
    while at < end {
        let start = at.saturating_sub(at.checked_rem(page_size).unwrap_or(0));
        let large_end = start.saturating_add(page_size);
        let next = large_end.min(end);
        let listed = next.saturating_sub(at);
        if collected.add(number_in_region(at), number_in_region(listed)) {
            complete.get_or_insert(start..start).end = large_end;
        } else {
            discard_complete(collected, part, complete.take(), report);
            report.collected = report.collected.saturating_add(pages_of(listed));
        }
        at = next;
    }
    discard_complete(collected, part, complete, report);
}

/// Discards larger pages that are complete.
///
/// If this fails, the pages of `part` are no longer collected. The guest may try again.
fn discard_complete<R: HostMapped>(
    collected: &mut LargePages,
    part: &ListedPart<'_, R>,
    complete: Option<Range<usize>>,
    report: &mut DiscardReport,
) {
    let Some(Range { start, end }) = complete else {
        return;
    };
    let from = start.max(part.offset);
    let to = end.min(part.offset.saturating_add(part.len));
    let listed = to.saturating_sub(from);
    let result = discard_whole(&part.part(start, end));
    let count = match result {
        Ok(_) => pages_of(end.saturating_sub(start)),
        Err(_) => {
            collected.remove(number_in_region(from), number_in_region(listed));
            pages_of(listed)
        }
    };
    report.record(part.number_of(from), count, result);
}
