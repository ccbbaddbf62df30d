//! The two types of regions that accesses go to.

use vm_memory::bitmap::{AtomicBitmap, Bitmap, BS};
use vm_memory::guest_memory::Result;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

/// A region with one dirty bit per page.
pub(super) trait Region: GuestMemoryRegion<B = AtomicBitmap> {
    fn new(start: u64, len: usize) -> Self;

    /// Reads and clears the dirty bits. `GuestMemoryRegion::bitmap` returns only slices of them.
    fn harvest(&self) -> Vec<u64>;
}

impl Region for GuestRegionMmap<AtomicBitmap> {
    fn new(start: u64, len: usize) -> Self {
        Self::from_range(GuestAddress(start), len, None).expect("the region can be mapped")
    }

    fn harvest(&self) -> Vec<u64> {
        MmapRegion::bitmap(self).get_and_reset()
    }
}

/// A region that may end at 2^64. A [`GuestRegionMmap`] must end below it.
pub(super) struct TopRegion {
    start: u64,
    mapping: MmapRegion<AtomicBitmap>,
}

impl Region for TopRegion {
    fn new(start: u64, len: usize) -> Self {
        let mapping = MmapRegion::new(len).expect("the region can be mapped");
        TopRegion { start, mapping }
    }

    fn harvest(&self) -> Vec<u64> {
        self.mapping.bitmap().get_and_reset()
    }
}

impl GuestMemoryRegion for TopRegion {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.mapping.size() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        self.mapping.bitmap().slice_at(0)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        Ok(VolatileMemory::get_slice(
            &self.mapping,
            offset.0 as usize,
            count,
        )?)
    }
}

impl GuestMemoryRegionBytes for TopRegion {}
