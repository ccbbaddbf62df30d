//! [`DirtyMemory`]: the dirty pages of a whole guest memory, from its bitmaps and from the logs of others.

mod log_words;
#[cfg(all(test, feature = "backend-mmap"))]
mod tests;

use core::ops::Range;
use std::io;

pub use log_words::LogWords;

use crate::bitmap::{process_wide_barrier, DirtyLog, DirtyPages, MS};
use crate::guest_memory::{GuestAddress, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;

/// The dirty pages of a whole memory.
///
/// Keep one for all rounds of a migration: its buffers stay. A harvest adds to what is in there; between rounds, [`clear`](Self::clear) it.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::num::NonZeroUsize;
/// use vm_memory::bitmap::AtomicBitmap;
/// use vm_memory::dirty::{DirtyMemory, LogWords};
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

impl DirtyRegion {
    /// Its last address.
    fn last(&self) -> u64 {
        let last = self.pages.byte_size().saturating_sub(1);
        self.start
            .0
            .saturating_add(u64::try_from(last).unwrap_or(u64::MAX))
    }

    /// Whether it has the bounds and the pages of a region, as they are now.
    fn is_for(&self, start: GuestAddress, len: u64, log: &dyn DirtyLog) -> bool {
        self.start == start
            && u64::try_from(self.pages.byte_size()) == Ok(len)
            && self.pages.page_size() == log.page_size()
    }

    /// Adds what of this range of guest addresses lies in it.
    fn add(&mut self, first: u64, last: u64) {
        let from = first.max(self.start.0);
        let more = last.min(self.last()).checked_sub(from);
        // No more than it is long.
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        if let Some(more) = more {
            let offset = size(from.saturating_sub(self.start.0));
            self.pages
                .insert_range(offset, size(more).saturating_add(1));
        }
    }

    /// What is dirty of `len` bytes at another address, as bytes of those.
    fn ranges_in(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let skipped = size(start.0.saturating_sub(self.start.0));
        let offset = size(self.start.0.saturating_sub(start.0));
        let within = move |byte: usize| {
            let byte = byte.saturating_sub(skipped);
            offset.saturating_add(byte).min(len)
        };
        let runs = self.pages.runs_around(skipped);
        let ranges = runs.map(move |run| within(run.start)..within(run.end));
        // The runs ascend: none behind the end comes back.
        let inside = ranges.take_while(move |range| range.start < len);
        inside.filter(|range| !range.is_empty())
    }
}

impl DirtyMemory {
    /// Makes an empty one.
    pub fn new() -> Self {
        Default::default()
    }

    /// Harvests the bitmaps of all regions: adds their marks, and clears them there.
    ///
    /// What it had before of addresses that the memory does not have any more is forgotten. Where regions have come, gone, grown or moved, the
    /// rest stays, in the pages of the regions that have those addresses now.
    ///
    /// System calls: none; one `membarrier(2)` for all regions together if the bitmap of one [looks before it marks](crate::bitmap::AtomicBitmap::test_before_marking).
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
        let mut barrier = false;
        self.lay_out(memory, |log, pages| {
            barrier |= log.harvest_before_barrier(pages);
        });
        if barrier && process_wide_barrier().is_err() {
            // All that is in here is marked as well then: more than was taken, where there was something from before.
            self.put_back(memory);
        }
        for log in logs {
            self.add_words(log);
        }
    }

    /// Adds what somebody else logged of this memory. Bits past its regions are passed over.
    ///
    /// The bitmaps of the memory stay as they are; [`mark`](Self::mark) marks in them.
    pub fn add_log<M>(&mut self, memory: &M, log: &LogWords<'_>)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        self.lay_out(memory, |_, _| {});
        self.add_words(log);
    }

    fn add_words(&mut self, log: &LogWords<'_>) {
        for region in &mut self.regions {
            // The log may begin before the region, or within it; pages of either may be the larger ones.
            match log.start.0.checked_sub(region.start.0) {
                Some(behind) => {
                    if let Ok(behind) = usize::try_from(behind) {
                        region.pages.add_words(behind, log.words, log.page_size);
                    }
                }
                None => {
                    let ahead = region.start.0.saturating_sub(log.start.0);
                    region
                        .pages
                        .add_words_before(ahead, log.words, log.page_size);
                }
            }
        }
    }

    /// Has the regions that the memory has, in the order of their addresses, and calls `each` with the log of each and its pages.
    fn lay_out<M>(&mut self, memory: &M, mut each: impl FnMut(&dyn DirtyLog, &mut DirtyPages))
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let mut known = self.regions.iter();
        let as_known = |region: &M::R| {
            known.next().is_some_and(|known| {
                known.is_for(region.start_addr(), region.len(), &region.bitmap())
            })
        };
        if !memory.iter().all(as_known) || known.next().is_some() {
            self.lay_out_anew(memory);
        }
        for region in memory.iter() {
            let number = self
                .regions
                .partition_point(|known| known.start < region.start_addr());
            if let Some(known) = self.regions.get_mut(number) {
                each(&region.bitmap(), &mut known.pages);
            }
        }
    }

    #[cold]
    fn lay_out_anew<M>(&mut self, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let mut before = core::mem::take(&mut self.regions).into_iter().peekable();
        let mut gone = Vec::new();
        for region in memory.iter() {
            let (start, log) = (region.start_addr(), region.bitmap());
            // Both are in the order of their addresses, as a rule; nothing is lost where they are not.
            while let Some(known) = before.next_if(|known| known.start < start) {
                gone.push(known);
            }
            let known = before.next_if(|known| known.is_for(start, region.len(), &log));
            self.regions.push(known.unwrap_or_else(|| DirtyRegion {
                start,
                // A region that is longer than that has no mapping in this process.
                pages: DirtyPages::new(usize::try_from(region.len()).unwrap_or(0), log.page_size()),
            }));
        }
        self.regions.sort_by_key(|region| region.start);
        gone.extend(before);
        // What they had is not sent yet: a region that has grown, say, has it still.
        for (start, len) in gone.iter().flat_map(runs_of) {
            let last = u64::try_from(len.saturating_sub(1)).unwrap_or(u64::MAX);
            let last = start.0.saturating_add(last);
            let first_region = self
                .regions
                .partition_point(|region| region.last() < start.0);
            let regions = self.regions.get_mut(first_region..).unwrap_or_default();
            for region in regions
                .iter_mut()
                .take_while(|region| region.start.0 <= last)
            {
                region.add(start.0, last);
            }
        }
    }

    /// Returns the dirty pages as ranges: the first guest address, and the length in bytes. Ascending; within a region, neighbours are one range.
    pub fn runs(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        self.regions.iter().flat_map(runs_of)
    }

    /// Returns the regions that the memory had at the last harvest, or when the last log was added: the first guest address of each, and its dirty pages.
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, &DirtyPages)> {
        self.regions
            .iter()
            .map(|region| (region.start, &region.pages))
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

    /// Marks all of them in the memory again, as far as it still has those addresses: undoes a harvest whose transfer failed.
    ///
    /// That is done whether tracking is on or off. What others had logged is in the memory's own bitmaps then. Memory without bitmaps cannot be told: keep
    /// what is in here instead, and have the next harvest add to it.
    pub fn put_back<M>(&self, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        for region in memory.iter() {
            let Ok(len) = usize::try_from(region.len()) else {
                continue;
            };
            let (start, log) = (region.start_addr(), region.bitmap());
            let first = self.regions.partition_point(|known| known.last() < start.0);
            for known in self.regions.get(first..).unwrap_or_default() {
                let behind = usize::try_from(known.start.0.saturating_sub(start.0));
                if !behind.is_ok_and(|behind| behind < len) {
                    break;
                }
                log.put_back(&mut known.ranges_in(start, len));
            }
        }
    }

    /// Marks in the bitmaps of a memory what somebody else logged, whether tracking is on or off. Bits past its regions are passed over.
    ///
    /// For a log that is handed over once: the one of a device that goes, or what a migration that was broken off still had to send. A log that is read
    /// each round is better [harvested with](Self::harvest_with) the memory, without a way through its bitmaps.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::{DirtyMemory, LogWords};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)])?;
    /// let log = LogWords {
    ///     start: GuestAddress(0x2000),
    ///     words: &[0b1001], // 0x2000 to 0x4000, and 0x8000 to 0xa000
    ///     page_size: NonZeroUsize::new(0x2000).unwrap(),
    /// };
    /// DirtyMemory::mark(&memory, &log);
    ///
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
    /// assert_eq!(runs, [(0x2000, 0x2000), (0x8000, 0x2000)]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mark<M>(memory: &M, log: &LogWords<'_>)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        for region in memory.iter() {
            if let Ok(len) = usize::try_from(region.len()) {
                region
                    .bitmap()
                    .put_back(&mut log.ranges_in(region.start_addr(), len));
            }
        }
    }

    /// Switches on or off that writes to a memory mark, in all of its regions. It makes no system call.
    ///
    /// When it is switched on, writes that other threads have under way may be neither marked nor visible yet. Before the first copy there has to be a
    /// barrier in all threads: [`start_tracking`](Self::start_tracking) has it, and [`AtomicBitmap::start_tracking`](crate::bitmap::AtomicBitmap::start_tracking) says what else will do.
    pub fn set_tracking<M>(memory: &M, on: bool)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        for region in memory.iter() {
            region.bitmap().set_tracking(on);
        }
    }

    /// Switches on that writes to a memory mark, and waits until they do: the first copy may begin when this has returned.
    ///
    /// What other threads of this process wrote without a mark is visible to this one then, and what they write from then on is marked. Have other *processes*
    /// that write, and the guest's processors, log by themselves.
    ///
    /// System calls: one `membarrier(2)`, as [`process_wide_barrier`] makes it.
    ///
    /// # Errors
    ///
    /// What the kernel answers, if it cannot have that barrier. Tracking is on then; have the threads that write pass a lock, or stop, before the first copy.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
    /// DirtyMemory::set_tracking(&memory, false);
    /// memory.write_obj(1u8, GuestAddress(0))?; // costs no mark
    ///
    /// // A migration begins.
    /// if let Err(error) = DirtyMemory::start_tracking(&memory) {
    ///     println!("the devices have to be stopped for a moment: {error}");
    /// }
    /// // … copy all of it …
    /// memory.write_obj(1u8, GuestAddress(0x2000))?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// assert_eq!(dirty.total_bytes(), 0x1000);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn start_tracking<M>(memory: &M) -> io::Result<()>
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        Self::set_tracking(memory, true);
        // A write is `D`, its bytes, and then a look at the mode. A look that comes before the barrier of its thread, and may find tracking off, comes
        // behind its `D`, which that barrier makes visible; a look behind it finds tracking on, which was stored before.
        process_wide_barrier()
    }
}

/// The dirty pages of a region as ranges of guest addresses.
fn runs_of(region: &DirtyRegion) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
    region.pages.runs().map(|run| {
        let offset = u64::try_from(run.start).unwrap_or(u64::MAX);
        // Within the region: no overflow.
        (GuestAddress(region.start.0.wrapping_add(offset)), run.len())
    })
}
