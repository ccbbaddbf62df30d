//! The number of dirty bytes, without a harvest.

use super::region::existing_len;
use super::DirtyMemory;
use crate::bitmap::{DirtyLog, MS};
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::GuestMemoryBackend;
use crate::region::GuestMemoryRegion;

impl DirtyMemory {
    /// Returns about how many bytes of a memory are marked dirty. The marks stay.
    ///
    /// A migration can decide by it when to start the next round, or to pause the guest. It costs a
    /// load for each word of the bitmaps. Bitmaps of more than about 2^21 pages have a summary, by
    /// which it skips words without marks.
    ///
    /// It is an estimate:
    ///
    /// - Writes at the same time may be counted or not.
    /// - Logs that other components keep, such as KVM's, are not included. They are only known
    ///   after they were read.
    /// - Marks that regions [share](Self::harvest) are counted for each of them.
    /// - A log of another crate counts as dirty as a whole, unless it implements
    ///   [`DirtyLog::estimate`].
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let ranges = [(GuestAddress(0), 0x10_000), (GuestAddress(0x100_000), 0x10_000)];
    /// let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges)?;
    /// memory.write_slice(&[1; 0x1800], GuestAddress(0x2000))?;
    /// memory.write_obj(1u8, GuestAddress(0x10_f000))?;
    /// assert_eq!(DirtyMemory::estimate(&memory), 0x3000);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn estimate<M>(memory: &M) -> u64
    where
        M: GuestMemoryBackend + ?Sized,
        for<'a> MS<'a, M>: DirtyLog,
    {
        let marked = |region: &M::R| {
            let len = to_usize(existing_len(region));
            to_u64(region.bitmap().estimate(len))
        };
        memory.iter().map(marked).fold(0, u64::saturating_add)
    }
}
