//! Dirty tracking of a whole guest memory: its own bitmaps, and the logs of KVM, vhost and devices.
//!
//! [`DirtyMemory`] harvests the bitmaps of all regions, merges logs that other components keep
//! ([`LogWords`]), and returns the dirty pages as ranges of guest addresses.
//!
//! ```text
//!   bitmap of region 0 ──┐
//!   bitmap of region 1 ──┤ harvest
//!   KVM's log of slot 0 ─┤ add_log   ──► DirtyMemory ──► runs ──► send ──► clear
//!   a vhost back end's ──┘                    ▲                    │ failed
//!                                             └──── put_back ──────┘
//! ```
//!
//! # Sources
//!
//! | writer | its record of dirty pages | add it by |
//! |---|---|---|
//! | this process | the bitmaps of the regions | [`DirtyMemory::harvest`] |
//! | vCPUs | `KVM_GET_DIRTY_LOG` | [`LogWords::kvm`], or the crate `vm-memory-kvm` |
//! | vCPUs | KVM's dirty ring | [`DirtyMemory::insert_ring`], or the crate `vm-memory-kvm` |
//! | a vhost device in the kernel | `VHOST_SET_LOG_BASE` | [`LogWords`], [`DirtyMemory::harvest_with`] |
//! | a passed-through device | VFIO's and iommufd's logs, by IOVA | `DirtyMemory::insert_iova_log`, feature `iommu` |
//! | a vhost-user back end | a log in shared memory | `vm_memory_vhost::log::SharedLog`, [`DirtyMemory::harvest_with`] |
//! | any other | ranges of guest addresses | [`DirtyMemory::insert_range`] |
//!
//! # The rounds of a live migration
//!
//! 1. Start tracking: [`DirtyMemory::set_tracking`] for the threads of this process, and the log
//!    of KVM (`KVM_MEM_LOG_DIRTY_PAGES`) for the guest's CPUs.
//! 2. Copy all of memory. Memory that was never written need not be read, because the destination
//!    has zeroes there. `vm_memory_host::content` returns the other ranges: add them with
//!    [`DirtyMemory::insert_range`]. Without it, use [`DirtyMemory::insert_all`].
//! 3. Harvest the dirty pages and the logs ([`DirtyMemory::harvest_with`]), and send the pages. If
//!    sending fails, put them back. The destination zeroes the dirty pages that cannot be read
//!    (`vm_memory_host::zero_range`): those of unplugged blocks.
//!    [`DirtyMemory::take_zero_pages`] finds pages that need no bytes.
//!    Repeat this step until few bytes are left. [`DirtyMemory::total_bytes`] counts them after a
//!    harvest. [`DirtyMemory::estimate`] counts them between harvests, without the logs of KVM and
//!    of other components.
//! 4. Pause the guest and its devices, and wait for their I/O. Harvest once more, and send the
//!    rest.
//!
//! The program `examples/migration.rs` does this with a guest under KVM.
//!
//! # Regions that change between rounds
//!
//! A region that is added between rounds has no dirty pages yet: insert all its pages after the
//! next harvest. Do the same for a region that replaces another one at the same addresses. Send
//! its pages of zeroes as well, because the destination has the bytes of the old region there.
//! `vm_memory_host::content` leaves them out, so it is not enough.
//!
//! The source finds these regions by comparing its map with a clone of that of the last round. An
//! address range does not identify a region, but its address in this process does while both maps
//! exist. Do not keep a guard or an `Arc` of the last map instead: the removal of a region waits
//! for these readers. The clone only keeps the removed region mapped until it is dropped.
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use vm_memory::bitmap::AtomicBitmap;
//! use vm_memory::dirty::DirtyMemory;
//! use vm_memory::{
//!     GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
//! };
//!
//! type Memory = GuestMemoryMmap<AtomicBitmap>;
//!
//! /// Harvests, and adds all pages of the regions that are not in `before`.
//! fn harvest(dirty: &mut DirtyMemory, before: &Memory, now: &Memory) {
//!     dirty.harvest(now);
//!     for region in now.iter() {
//!         let old = before.find_region(region.start_addr());
//!         if !old.is_some_and(|old| std::ptr::eq(old, region)) {
//!             dirty.insert_range(region.start_addr(), region.len());
//!         }
//!     }
//! }
//!
//! let range = (GuestAddress(0x10_0000), 0x4000);
//! let before = Memory::from_ranges(&[(GuestAddress(0), 0x10_000), range])?;
//! // The second region is replaced by another one at the same addresses.
//! let (now, _) = before.remove_region(range.0, 0x4000)?;
//! let region = GuestRegionMmap::from_range(range.0, range.1, None)?;
//! let now = now.insert_region(region.into())?;
//!
//! let mut dirty = DirtyMemory::new();
//! harvest(&mut dirty, &before, &now);
//! assert_eq!(dirty.runs().collect::<Vec<_>>(), [range]);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The destination removes the regions that the source has removed, and adds new ones, before it
//! writes the pages: `vm_memory_host::Description::missing_from` shows how. If the guest plugs
//! blocks between rounds (virtio-mem), the destination must plug them before. The method
//! `vm_memory_host::Description::apply_blocks` does this, and describes the order of steps.
//!
//! Only the allocator makes system calls here, and [`DirtyMemory::take_zero_pages`] in memory that
//! is mapped for each access.

mod bitmaps;
mod estimate;
mod log_words;
mod region;
mod set;
mod shared;
mod sources;
mod zero_pages;

#[cfg(test)]
mod tests;

pub use log_words::LogWords;

use std::alloc::{handle_alloc_error, Layout};
use std::collections::TryReserveError;

use crate::bitmap::{DirtyLog, DirtyPages, MS};
use crate::convert::to_u64;
use crate::guest_memory::{GuestAddress, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;
use region::DirtyRegion;
use shared::{Distribution, SharedMarks};

/// The dirty pages of a whole guest memory.
///
/// Keep one value for all rounds of a migration, so that its buffers are reused. A harvest adds to
/// the set; [`clear`](Self::clear) it after the destination has acknowledged its pages.
///
/// The set has the regions that the memory had at the last [harvest](Self::harvest),
/// [`add_log`](Self::add_log) or [`try_reserve`](Self::try_reserve). It stores no page outside
/// them.
///
/// Two sets are equal if the same guest addresses are dirty, whatever their regions and page sizes.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::{DirtyMemory, LogWords};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0), 0x10_000), (GuestAddress(0x100_000), 0x10_000)];
/// let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges)?;
/// memory.write_slice(&[1; 0x1800], GuestAddress(0x2000))?;
/// memory.write_obj(1u8, GuestAddress(0x10_f000))?;
///
/// // KVM's log of the second slot: the pages that the guest's CPUs wrote.
/// let kvm = LogWords::kvm(GuestAddress(0x100_000), &[0b1]);
/// let mut dirty = DirtyMemory::new();
/// dirty.harvest_with(&memory, &[kvm]);
/// let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
/// assert_eq!(runs, [(0x2000, 0x2000), (0x100_000, 0x1000), (0x10_f000, 0x1000)]);
///
/// // The transfer failed: the pages are marked again.
/// dirty.put_back(&memory);
/// dirty.clear();
/// dirty.harvest(&memory);
/// assert_eq!(dirty.total_pages(), 4);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "migrate")]
#[doc(alias = "live migration")]
#[doc(alias = "pre-copy")]
#[doc(alias = "KVM_GET_DIRTY_LOG")]
#[doc(alias = "snapshot")]
#[derive(Clone, Debug, Default)]
pub struct DirtyMemory {
    /// Ascending by address.
    regions: Vec<DirtyRegion>,
    /// The ranges of bitmaps that some of these regions share.
    shared: Vec<SharedMarks>,
}

impl DirtyMemory {
    /// Creates an empty set.
    pub fn new() -> Self {
        Default::default()
    }

    /// Harvests the bitmaps of all regions: adds their marks, and clears them there.
    ///
    /// Read the dirty pages after this returns, not during the call. Only then does a read see the
    /// writes whose marks were cleared.
    ///
    /// A region that is not RAM, and whose bitmap tracks nothing, has no dirty pages.
    ///
    /// The memory may have changed since the last harvest. Dirty pages at addresses without a
    /// region are dropped. All others stay, in the page size of the region that now contains them.
    ///
    /// Regions may share a bitmap: two regions of one [`MmapRegion`](crate::MmapRegion), or
    /// [slices](crate::bitmap::ArcSlice) of one bitmap that overlap, or that share a page of it. A
    /// mark in the shared part is then a dirty page of each of them.
    ///
    /// A page of a bitmap may also stand for tracked bytes that are in none of the regions. It then
    /// stays marked, and each harvest finds it. To avoid that, begin and end slices at page
    /// boundaries of the bitmap.
    ///
    /// If a region or a log of another crate panics, no page is lost: this set has it, or the next
    /// harvest finds it.
    ///
    /// If the regions have changed and memory runs out, the process ends, as it does for a `Vec`.
    /// Call [`try_reserve`](Self::try_reserve) first to get an error for large allocations.
    pub fn harvest<M>(&mut self, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        self.harvest_with(memory, &[]);
    }

    /// Harvests as [`harvest`](Self::harvest) does, and adds logs that other components keep.
    ///
    /// Bits of a log that are outside the regions are ignored.
    pub fn harvest_with<M>(&mut self, memory: &M, logs: &[LogWords<'_>])
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        self.collect(memory, logs, true);
    }

    /// Adds a log that another component keeps. Bits outside the regions are ignored.
    ///
    /// The bitmaps of the memory do not change; [`mark`](Self::mark) marks a log in them. A page of
    /// a bitmap that regions [share](Self::harvest) is added to each of them.
    pub fn add_log<M>(&mut self, memory: &M, log: &LogWords<'_>)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        self.collect(memory, core::slice::from_ref(log), false);
    }

    /// Allocates the sets of pages for the regions of a memory.
    ///
    /// The next harvest of the same memory then allocates no such set. Pages that are in the set
    /// stay, as in a [harvest](Self::harvest). Does nothing if the regions have not changed.
    ///
    /// A new set then has the regions of the memory and no pages, and the bitmaps keep their marks.
    /// Only a harvest or [`add_log`](Self::add_log) finds the bytes that cannot be read.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.try_reserve(&memory)?; // a migration that fails here has changed nothing
    /// dirty.insert_range(GuestAddress(0x1000), 0x1000);
    /// assert_eq!(dirty.total_pages(), 1);
    /// dirty.harvest(&memory);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns an error if the sets of pages cannot be allocated. No page is lost then: this set
    /// keeps its pages, and the bitmaps keep their marks. Smaller allocations, of some words for
    /// each region, end the process if they fail, as for a `Vec`. The same applies to the list of
    /// unplugged ranges in each harvest.
    pub fn try_reserve<M>(&mut self, memory: &M) -> Result<(), TryReserveError>
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let mut known = self.regions.iter();
        let is_known = |region: &M::R| {
            known
                .next()
                .is_some_and(|known| known.is_for(region, &region.bitmap()))
        };
        if memory.iter().all(is_known) && known.next().is_none() {
            return Ok(());
        }
        self.adopt_regions(memory)
    }

    /// Adopts the regions of the memory, and adds the pages of logs.
    ///
    /// Harvests the bitmaps if `harvests` is true.
    fn collect<M>(&mut self, memory: &M, logs: &[LogWords<'_>], harvests: bool)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        if self.try_reserve(memory).is_err() {
            // `Vec` does the same. The layout is only for the message.
            handle_alloc_error(Layout::new::<DirtyRegion>());
        }
        self.collect_shared(memory, logs, harvests);
        for log in logs {
            let reached = reached(&mut self.regions, log.start.0, log.last());
            for region in reached.filter(|region| region.shared.is_none()) {
                region.add_log(log);
            }
        }
        for region in memory.iter() {
            let log = region.bitmap();
            if let Some(known) = find(&mut self.regions, region, &log) {
                if known.shared.is_none() && harvests {
                    log.harvest_into(&mut known.pages);
                }
                // After the harvest: a block that was unplugged meanwhile is marked again.
                known.record_access(region);
            }
        }
    }

    /// Does the part of [`collect`](Self::collect) for bitmaps that regions share.
    fn collect_shared<M>(&mut self, memory: &M, logs: &[LogWords<'_>], harvests: bool)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        if self.shared.is_empty() {
            return;
        }
        // On drop, also after a panic of a user's log, it moves the marks found so far to the
        // regions, because no bitmap has them.
        let found = Distribution {
            regions: &mut self.regions,
            shared: &mut self.shared,
        };
        for region in memory.iter().filter(|_| harvests) {
            let log = region.bitmap();
            let Some(known) = find(found.regions, region, &log) else {
                continue;
            };
            let shared = known.shared.and_then(|number| found.shared.get_mut(number));
            // The log of the first region reaches all marks of the range.
            if let Some(shared) = shared.filter(|shared| shared.offset_of(known) == 0) {
                log.harvest_into(&mut shared.pages);
            }
        }
        for log in logs {
            for region in reached(found.regions, log.start.0, log.last()) {
                let shared = region.shared;
                if let Some(shared) = shared.and_then(|number| found.shared.get_mut(number)) {
                    shared.add_log(region, log);
                }
            }
        }
    }

    /// Replaces the regions by those of the memory.
    ///
    /// Dirty pages move to the regions that now have their addresses.
    ///
    /// # Errors
    ///
    /// Returns an error if memory runs out. The next call tries it again.
    #[cold]
    fn adopt_regions<M>(&mut self, memory: &M) -> Result<(), TryReserveError>
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let mut before = self.regions.iter().enumerate().peekable();
        // The number of a region that stays, or a new one. Nothing changes yet: a region or a log
        // of a user may panic.
        let mut adopted = Vec::new();
        for region in memory.iter() {
            let (start, log) = (region.start_addr(), region.bitmap());
            // Regions of a memory usually ascend. If they do not, an unchanged region may be
            // treated as changed, which loses nothing.
            while before.next_if(|(_, known)| known.start < start).is_some() {}
            let known = before.next_if(|(_, known)| known.is_for(region, &log));
            adopted.push(match known {
                Some((number, _)) => Ok(number),
                None => Err(DirtyRegion::try_new(region, &log)?),
            });
        }
        let regions = core::mem::take(&mut self.regions).into_iter();
        let mut old: Vec<_> = regions.map(Some).collect();
        self.regions = adopted
            .into_iter()
            .filter_map(|region| match region {
                Ok(number) => old.get_mut(number)?.take(),
                Err(new) => Some(new),
            })
            .collect();
        let changed: Vec<_> = old.into_iter().flatten().collect();
        self.regions.sort_by_key(|region| region.start);
        for (start, len) in changed.iter().flat_map(DirtyRegion::runs) {
            let last = start.0.saturating_add(to_u64(len.saturating_sub(1)));
            for region in reached(&mut self.regions, start.0, last) {
                region.add(start.0, last);
            }
        }
        self.shared = Vec::new();
        self.shared = SharedMarks::try_find(&mut self.regions).inspect_err(|_| {
            // A harvest must not take the regions for ones that share nothing.
            self.regions.iter_mut().for_each(DirtyRegion::forget_marks);
        })?;
        Ok(())
    }

    /// Returns the dirty pages that can be read, as guest addresses and lengths in bytes.
    ///
    /// The ranges ascend. Adjacent pages of one region are one range, which ends where a byte could
    /// not be read at the last harvest or [`add_log`](Self::add_log). So each range can be read as
    /// a whole from the memory that was harvested.
    ///
    /// Ranges of a region that is not mapped in this process are included, if its log has dirty
    /// pages. Read them where the region is mapped.
    ///
    /// A block that is unplugged later makes the read of its range fail.
    /// `vm_memory_host::unplug` marks this block, but not the other pages of the range. So keep the
    /// whole range: [insert](Self::insert_range) it after [`clear`](Self::clear), or do not clear
    /// the set. The runs after the next harvest have the pages that can be read.
    pub fn runs(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let regions = self.regions.iter();
        regions.flat_map(|region| region.runs_by_access(true))
    }

    /// Returns the dirty pages that cannot be read, as ranges like those of [`runs`](Self::runs).
    ///
    /// They are in [unplugged blocks](crate::mmap::PluggedBlocks), or in regions that do not
    /// [permit](GuestMemoryRegion::allowed_access) reads. A block that is plugged again reads as
    /// zeroes until it is written. So tell the destination to zero these ranges
    /// (`vm_memory_host::zero_range`): it must not keep the old bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(all(unix, feature = "backend-mmap"))] {
    /// use std::num::NonZeroUsize;
    /// use std::sync::Arc;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
    ///
    /// let blocks = Arc::new(PluggedBlocks::new(0x8000, NonZeroUsize::new(0x4000).unwrap())?);
    /// blocks.plug(0, 0x8000)?;
    /// let mapping = MmapRegionBuilder::<AtomicBitmap>::new(0x8000)
    ///     .with_plugged_blocks(Arc::clone(&blocks))
    ///     .build()?;
    /// let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    /// let memory = GuestMemoryMmap::from_regions(vec![region])?;
    ///
    /// memory.write_slice(&[1; 0x2000], GuestAddress(0x3000))?;
    /// blocks.unplug(0x4000, 0x4000)?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x3000), 0x1000)]);
    /// let discard: Vec<_> = dirty.unreadable_runs().collect();
    /// assert_eq!(discard, [(GuestAddress(0x4000), 0x1000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "unplug")]
    #[doc(alias = "virtio-mem")]
    pub fn unreadable_runs(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let regions = self.regions.iter();
        regions.flat_map(|region| region.runs_by_access(false))
    }

    /// Returns the regions, each with its first guest address and its dirty pages.
    ///
    /// The regions are those that the memory had at the last harvest, [`add_log`](Self::add_log) or
    /// [`try_reserve`](Self::try_reserve).
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, &DirtyPages)> {
        self.regions
            .iter()
            .map(|region| (region.start, &region.pages))
    }

    /// Returns the number of dirty pages, each in the page size of its region.
    ///
    /// The number includes pages that cannot be read.
    pub fn total_pages(&self) -> usize {
        let pages = self.regions.iter().map(|region| region.pages.total_pages());
        pages.fold(0, usize::saturating_add)
    }

    /// Returns the number of bytes in [`runs`](Self::runs): those that a transfer sends.
    ///
    /// After [`harvest_with`](Self::harvest_with), it includes the pages of the logs.
    pub fn total_bytes(&self) -> u64 {
        self.runs()
            .map(|(_, len)| to_u64(len))
            .fold(0, u64::saturating_add)
    }

    /// Removes all pages. The buffers stay allocated.
    pub fn clear(&mut self) {
        for region in &mut self.regions {
            region.pages.clear();
        }
    }
}

/// Returns the regions that the guest addresses `first..=last` reach.
///
/// Each log searches its regions. If each region tried each log, a harvest with one log for each of
/// many slots would take quadratic time.
fn reached(
    regions: &mut [DirtyRegion],
    first: u64,
    last: u64,
) -> impl Iterator<Item = &mut DirtyRegion> {
    let start = regions.partition_point(|region| region.last() < first);
    let regions = regions.get_mut(start..).unwrap_or_default().iter_mut();
    regions.take_while(move |region| region.start.0 <= last)
}

/// Finds the entry of a region.
fn find<'a, R: GuestMemoryRegion>(
    regions: &'a mut [DirtyRegion],
    region: &R,
    log: &dyn DirtyLog,
) -> Option<&'a mut DirtyRegion> {
    let start = region.start_addr();
    let number = regions.partition_point(|known| known.start < start);
    // A region without bytes may begin at the same address.
    let mut here = regions.iter_mut().skip(number);
    here.find(|known| known.is_for(region, log))
}
