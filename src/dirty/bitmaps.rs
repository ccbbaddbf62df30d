//! Changes of the bitmaps of a memory: marks that are put back or added, and tracking.

use super::region::existing_len;
use super::{DirtyMemory, LogWords};
use crate::bitmap::{DirtyLog, MS};
use crate::convert::to_usize;
use crate::guest_memory::GuestMemoryBackend;
use crate::region::GuestMemoryRegion;

impl DirtyMemory {
    /// Marks all pages of the set in the bitmaps of the memory again, after their transfer failed.
    ///
    /// Pages at addresses that the memory does not have any more are ignored. Tracking may be on or
    /// off. Pages from merged logs are marked in the bitmaps as well. A memory without bitmaps
    /// cannot store the marks: keep this set instead, and let the next harvest add to it.
    pub fn put_back<M>(&self, memory: &M)
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        for region in memory.iter() {
            let len = to_usize(existing_len(region));
            let (start, log) = (region.start_addr(), region.bitmap());
            log.put_back(&mut self.ranges_in(start, len));
        }
    }

    /// Marks a log that another component keeps in the bitmaps of a memory.
    ///
    /// Tracking may be on or off. Bits outside the regions are ignored.
    ///
    /// This is for a log that is handed over once: the log of a removed device, or the unsent pages
    /// of an aborted migration. A log that is read in each round is better merged by
    /// [`harvest_with`](Self::harvest_with), which does not go through the bitmaps.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::{DirtyMemory, LogWords};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)];
    /// let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let words = [0b1001]; // 0x2000 to 0x4000, and 0x8000 to 0xa000
    /// let page_size = NonZeroUsize::new(0x2000).unwrap();
    /// let log = LogWords::new(GuestAddress(0x2000), &words, page_size);
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
            let len = to_usize(existing_len(region));
            region
                .bitmap()
                .put_back(&mut log.ranges_in(region.start_addr(), len));
        }
    }

    /// Switches marking on or off in all regions of a memory.
    ///
    /// After it has switched marking on, the first copy may begin. All unmarked writes of other
    /// threads of this process are visible to this thread, and all later writes are marked. Other
    /// *processes* that write, and the guest's CPUs, need logs of their own.
    ///
    /// Other threads may write at the same time, unless a bitmap is
    /// [switched while they are paused](crate::bitmap::AtomicBitmap::switched_while_paused).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
    /// DirtyMemory::set_tracking(&memory, false);
    /// memory.write_obj(1u8, GuestAddress(0))?; // not marked
    ///
    /// // A migration begins.
    /// DirtyMemory::set_tracking(&memory, true);
    /// // … copy all of memory …
    /// memory.write_obj(1u8, GuestAddress(0x2000))?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    /// assert_eq!(dirty.total_bytes(), 0x1000);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "KVM_MEM_LOG_DIRTY_PAGES")]
    #[doc(alias = "start_tracking")]
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
