//! [`DirtyMemory::take_zero_pages`]: finds the dirty pages that contain only zeroes.

use super::region::DirtyRegion;
use super::DirtyMemory;
use crate::convert::to_u64;
use crate::guest_memory::GuestMemoryBackend;

impl DirtyMemory {
    /// Removes the pages that contain only zeroes, and returns them as a set of their own.
    ///
    /// A migration sends the [`runs`](Self::runs) of the returned set as ranges without bytes. The
    /// destination zeroes them by `vm_memory_host::zero_range`, which discards whole pages. For
    /// memory of another builder, use [`get_slices`](crate::GuestMemory::get_slices) and
    /// [`fill_with_byte`](crate::VolatileSlice::fill_with_byte), as below. The ranges must not be
    /// left out: the destination may have older bytes. If sending fails, put both sets back.
    ///
    /// Call it after a harvest of `memory`, whose dirty pages are then read. A page that is written
    /// later is marked again, so the next harvest finds it. A page that cannot be read as a whole
    /// stays in this set. A page of a block that was plugged after the harvest can be read, so it
    /// can be in the `runs` of the returned set.
    ///
    /// The cost of a page without zeroes is the read of its first bytes. For the first copy, do not
    /// use it after [`insert_all`](Self::insert_all), because reading populates the pages: see
    /// [the rounds of a live migration](super#the-rounds-of-a-live-migration).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::DirtyMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// memory.write_slice(&[0; 0x4000], GuestAddress(0x1000))?;
    /// memory.write_obj(7u8, GuestAddress(0x2fff))?;
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest(&memory);
    ///
    /// let zero = dirty.take_zero_pages(&memory);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [(GuestAddress(0x2000), 0x1000)]);
    /// let zeroes: Vec<_> = zero.runs().map(|(start, len)| (start.0, len)).collect();
    /// assert_eq!(zeroes, [(0x1000, 0x1000), (0x3000, 0x2000)]);
    ///
    /// // The destination writes zeroes.
    /// let destination: GuestMemoryMmap =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    /// destination.write_obj(9u8, GuestAddress(0x3000))?;
    /// for (start, len) in zero.runs() {
    ///     for slice in destination.get_slices(start, len, Permissions::Write)? {
    ///         slice?.fill_with_byte(0)?;
    ///     }
    /// }
    /// assert_eq!(destination.read_obj::<u8>(GuestAddress(0x3000))?, 0);
    ///
    /// // Sending fails.
    /// dirty.put_back(&memory);
    /// zero.put_back(&memory);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "is_zero")]
    #[doc(alias = "buffer_is_zero")]
    #[must_use = "the destination must zero these pages, which this set no longer has"]
    pub fn take_zero_pages<M>(&mut self, memory: &M) -> DirtyMemory
    where
        M: GuestMemoryBackend + ?Sized,
    {
        let mut zero = self.clone();
        zero.clear();
        // Each page of the result will be read, even in a block plugged after the harvest.
        zero.regions
            .iter_mut()
            .for_each(DirtyRegion::record_all_readable);
        for (addr, len) in self.pages() {
            let page = memory.get_slice(addr, len);
            if page.is_ok_and(|page| page.is_zero().unwrap_or(false)) {
                zero.insert_range(addr, to_u64(len));
            }
        }
        self.difference_with(&zero);
        zero
    }
}
