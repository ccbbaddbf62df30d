//! [`DirtyMemory`]: the dirty pages of a whole guest memory, from its bitmaps and from the logs of others.

use core::num::NonZeroUsize;
use core::ops::Deref;

use super::atomic::AtomicBitmap;
use super::dirty_pages::DirtyPages;
use super::slice::BaseSlice;
use super::{Bitmap, DEFAULT_PAGE_SIZE, MS};
use crate::address::Address;
use crate::guest_memory::{GuestAddress, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;

/// A bitmap, or a part of one, whose marks can be harvested.
///
/// Implement it for the slices of a bitmap of your own, and [`DirtyMemory`] works with it. The unit type has no marks; `Option` has those of what
/// it has.
pub trait DirtyLog {
    /// Returns the size of a page in bytes.
    fn page_size(&self) -> NonZeroUsize;

    /// Adds the marks of its first bytes to `dirty`, as many as that is for, and clears them.
    fn harvest_into(&self, dirty: &mut DirtyPages);

    /// Switches on or off that writes mark; where there is nothing to switch, that does nothing.
    ///
    /// See [`AtomicBitmap::start_tracking`] for what to do before the first copy.
    fn set_tracking(&self, on: bool) {
        let _ = on;
    }
}

/// Has no marks.
impl DirtyLog for () {
    fn page_size(&self) -> NonZeroUsize {
        DEFAULT_PAGE_SIZE
    }

    fn harvest_into(&self, _dirty: &mut DirtyPages) {}
}

/// Has marks when it is `Some`.
impl<S: DirtyLog> DirtyLog for Option<S> {
    fn page_size(&self) -> NonZeroUsize {
        self.as_ref().map_or(DEFAULT_PAGE_SIZE, S::page_size)
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        if let Some(log) = self {
            log.harvest_into(dirty);
        }
    }

    fn set_tracking(&self, on: bool) {
        if let Some(log) = self {
            log.set_tracking(on);
        }
    }
}

/// The marks from its offset on. Switches the whole bitmap.
impl<B: Deref<Target = AtomicBitmap>> DirtyLog for BaseSlice<B> {
    fn page_size(&self) -> NonZeroUsize {
        self.bitmap().page_size()
    }

    fn harvest_into(&self, dirty: &mut DirtyPages) {
        self.bitmap().harvest_from(self.base_offset(), dirty);
    }

    fn set_tracking(&self, on: bool) {
        match on {
            true => self.bitmap().start_tracking(),
            false => self.bitmap().stop_tracking(),
        }
    }
}

/// The words of a log that somebody else keeps: KVM for a slot, or a vhost back end for all of memory.
///
/// Bit `i` of word `w` stands for page `64 * w + i`. A log of bytes, such as that of vhost-user (vhost-user specification, "Migration"), is one of words in
/// little-endian order.
#[derive(Clone, Copy, Debug)]
pub struct LogWords<'a> {
    /// Where its first page is.
    pub start: GuestAddress,
    /// Its words.
    pub words: &'a [u64],
    /// The size of its pages in bytes.
    pub page_size: NonZeroUsize,
}

/// The dirty pages of a whole memory.
///
/// Keep one for all rounds of a migration: its buffers stay. A harvest adds to what is in there; between rounds, [`clear`](Self::clear) it.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::num::NonZeroUsize;
/// use vm_memory::bitmap::{AtomicBitmap, DirtyMemory, LogWords};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap<AtomicBitmap> =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000), (GuestAddress(0x100_000), 0x10_000)])?;
/// memory.write_slice(&[1; 0x1800], GuestAddress(0x2000))?;
/// memory.write_obj(1u8, GuestAddress(0x10_f000))?;
///
/// // What the guest's processors wrote, KVM logged for its second slot.
/// let kvm = LogWords {
///     start: GuestAddress(0x100_000),
///     words: &[0b1],
///     page_size: NonZeroUsize::new(0x1000).unwrap(),
/// };
/// let mut dirty = DirtyMemory::new();
/// dirty.harvest_with(&memory, &[kvm]);
/// let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
/// assert_eq!(runs, [(0x2000, 0x2000), (0x100_000, 0x1000), (0x10_f000, 0x1000)]);
///
/// // The transfer failed: they are marked again.
/// dirty.put_back(&memory);
/// dirty.clear();
/// dirty.harvest(&memory);
/// assert_eq!(dirty.total_pages(), 4);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct DirtyMemory {
    regions: Vec<DirtyRegion>,
}

#[derive(Clone, Debug)]
struct DirtyRegion {
    start: GuestAddress,
    pages: DirtyPages,
}

impl DirtyMemory {
    /// Makes an empty one.
    pub fn new() -> Self {
        Default::default()
    }

    /// Harvests the bitmaps of all regions: adds their marks, and clears them there.
    ///
    /// Regions that the memory does not have any more are forgotten.
    pub fn harvest<M>(&mut self, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        self.harvest_with(memory, &[]);
    }

    /// [`harvest`](Self::harvest), together with logs that others keep. Their bits past the regions are passed over.
    pub fn harvest_with<M>(&mut self, memory: &M, logs: &[LogWords<'_>])
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let mut before = core::mem::take(&mut self.regions).into_iter().peekable();
        for region in memory.iter() {
            let Ok(len) = usize::try_from(region.len()) else {
                continue;
            };
            let (start, log) = (region.start_addr(), region.bitmap());
            // Both are in the order of their addresses.
            while before.next_if(|known| known.start < start).is_some() {}
            let known = before.next_if(|known| {
                known.start == start
                    && known.pages.byte_size() == len
                    && known.pages.page_size() == log.page_size()
            });
            let mut known = known.unwrap_or_else(|| DirtyRegion {
                start,
                pages: DirtyPages::new(len, log.page_size()),
            });
            log.harvest_into(&mut known.pages);
            self.regions.push(known);
        }
        for log in logs {
            self.add_log(log);
        }
    }

    /// Adds what somebody else logged, to the regions of the last harvest. Bits past them are passed over.
    pub fn add_log(&mut self, log: &LogWords<'_>) {
        for region in &mut self.regions {
            // The log may begin before the region, or within it; pages of either may be the larger ones.
            match region.start.checked_offset_from(log.start) {
                Some(ahead) => {
                    if let Ok(ahead) = usize::try_from(ahead) {
                        region.pages.add_words_before(ahead, log.words, log.page_size);
                    }
                }
                None => {
                    let behind = log.start.unchecked_offset_from(region.start);
                    if let Ok(behind) = usize::try_from(behind) {
                        region.pages.add_words(behind, log.words, log.page_size);
                    }
                }
            }
        }
    }

    /// Returns the dirty pages as ranges: the first guest address, and the length in bytes. Ascending; within a region, neighbours are one range.
    pub fn runs(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.regions.iter().flat_map(|region| {
            region.pages.runs().map(|run| {
                let offset = u64::try_from(run.start).unwrap_or(u64::MAX);
                // Within the region: no overflow.
                (GuestAddress(region.start.0.wrapping_add(offset)), run.len())
            })
        })
    }

    /// Returns the regions of the last harvest: the first guest address of each, and its dirty pages.
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, &DirtyPages)> {
        self.regions.iter().map(|region| (region.start, &region.pages))
    }

    /// Returns how many pages are dirty, each counted in the size of its region's pages.
    pub fn total_pages(&self) -> usize {
        let pages = self.regions.iter().map(|region| region.pages.total_pages());
        pages.fold(0, usize::saturating_add)
    }

    /// Returns how many bytes are dirty.
    pub fn total_bytes(&self) -> u64 {
        self.runs()
            .map(|(_, len)| u64::try_from(len).unwrap_or(u64::MAX))
            .fold(0, u64::saturating_add)
    }

    /// Forgets all dirty pages, and keeps the buffers.
    pub fn clear(&mut self) {
        for region in &mut self.regions {
            region.pages.clear();
        }
    }

    /// Marks all of them in the memory again, where it still has them: undoes a harvest whose transfer failed.
    ///
    /// What others had logged is in the memory's own bitmaps then. Memory that tracks nothing, or not now, cannot be told: keep what is in here instead, and
    /// have the next harvest add to it.
    pub fn put_back<M: GuestMemoryBackend + ?Sized>(&self, memory: &M) {
        for (start, mut len) in self.runs() {
            let mut addr = Some(start);
            while let (Some(at), 1..) = (addr, len) {
                let Some((region, within)) = memory.to_region_addr(at) else {
                    break;
                };
                let Ok(offset) = usize::try_from(within.0) else {
                    break;
                };
                let left = region.len().saturating_sub(within.0);
                let here = len.min(usize::try_from(left).unwrap_or(usize::MAX));
                region.bitmap().mark_dirty(offset, here);
                len = len.saturating_sub(here);
                addr = at.checked_add(u64::try_from(here).unwrap_or(u64::MAX));
            }
        }
    }

    /// Switches on or off that writes to a memory mark, in all of its regions.
    ///
    /// See [`AtomicBitmap::start_tracking`] for what to do before the first copy.
    pub fn set_tracking<M>(memory: &M, on: bool)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        for region in memory.iter() {
            region.bitmap().set_tracking(on);
        }
    }
}
