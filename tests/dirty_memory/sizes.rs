//! A `DirtyMemory` accepts regions that are not RAM, and regions of any length.

use std::num::NonZeroUsize;

use test_support::PAGE;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BS};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileMemory,
    VolatileSlice,
};

use super::runs;

const LONG: u64 = 1 << 56;

struct Region<B> {
    start: u64,
    len: u64,
    backing: Backing<B>,
}

enum Backing<B> {
    Ram(MmapRegion<B>),
    /// Not mapped in this process.
    Device(B),
}

impl<B: Bitmap> GuestMemoryRegionBytes for Region<B> {}

impl<B: Bitmap> GuestMemoryRegion for Region<B> {
    type B = B;

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, B> {
        match &self.backing {
            Backing::Ram(mapping) => mapping.bitmap().slice_at(0),
            Backing::Device(bitmap) => bitmap.slice_at(0),
        }
    }

    fn get_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, B>>, GuestMemoryError> {
        match &self.backing {
            Backing::Ram(mapping) => Ok(mapping.get_slice(addr.0 as usize, count)?),
            Backing::Device(_) => Err(GuestMemoryError::HostAddressNotAvailable),
        }
    }
}

fn ram<B: Bitmap>(start: u64, len: usize, bitmap: B) -> Region<B> {
    let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap).build();
    Region {
        start,
        len: len as u64,
        backing: Backing::Ram(mapping.unwrap()),
    }
}

fn device<B>(start: u64, len: u64, bitmap: B) -> Region<B> {
    Region {
        start,
        len,
        backing: Backing::Device(bitmap),
    }
}

fn pages(len: usize) -> AtomicBitmap {
    AtomicBitmap::new(len, NonZeroUsize::new(PAGE).unwrap())
}

#[test]
fn harvest_of_long_region_that_is_not_ram_allocates_nothing_for_it() {
    let regions = vec![
        ram(0, 0x4000, None),
        device(LONG, LONG, None::<AtomicBitmap>),
        ram(3 * LONG, 0x4000, Some(pages(0x4000))),
    ];
    let memory = GuestRegionCollection::from_regions(regions).unwrap();
    // A log of all addresses, and one of the long region.
    let log =
        |start, words| LogWords::new(GuestAddress(start), words, NonZeroUsize::new(PAGE).unwrap());
    let mut dirty = DirtyMemory::new();
    memory
        .find_region(GuestAddress(3 * LONG))
        .unwrap()
        .bitmap()
        .mark_dirty(0x2000, 1);
    dirty.harvest_with(&memory, &[log(0, &[0b11]), log(LONG, &[u64::MAX; 4])]);
    assert_eq!(runs(&dirty), [(0, 0x2000), (3 * LONG + 0x2000, 0x1000)]);
    let sizes: Vec<_> = dirty
        .regions()
        .map(|(_, pages)| pages.byte_size())
        .collect();
    assert_eq!(sizes, [0x4000, 0, 0x4000]);
    // The regions are known: nothing is allocated again, and nothing is dropped.
    dirty.harvest(&memory);
    dirty.put_back(&memory);
    DirtyMemory::mark(&memory, &log(LONG, &[u64::MAX]));
    dirty.clear();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), [(3 * LONG + 0x2000, 0x1000)]);
}

#[test]
fn harvest_of_region_that_is_not_ram_follows_its_bitmap() {
    // The bitmap tracks less than the region.
    let regions = vec![device(0x8000, LONG, pages(0x3000))];
    let memory = GuestRegionCollection::from_regions(regions).unwrap();
    let region = memory.iter().next().unwrap();
    region.bitmap().mark_dirty(0x1000, 0x8000);
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    assert_eq!(runs(&dirty), [(0x9000, 0x2000)]);
    dirty.put_back(&memory);
    let mut again = DirtyMemory::new();
    again.harvest(&memory);
    assert_eq!(runs(&again), [(0x9000, 0x2000)]);
}

#[test]
fn harvest_with_empty_region_at_same_start_keeps_marks() {
    for order in [[0, 0x4000], [0x4000, 0]] {
        let regions = order.map(|len| device(0x8000, len, pages(len as usize)));
        let memory = Unchecked(regions.into());
        for region in memory.iter() {
            region.bitmap().mark_dirty(0x1000, 1);
        }
        let mut dirty = DirtyMemory::new();
        dirty.harvest(&memory);
        assert_eq!(runs(&dirty), [(0x9000, 0x1000)], "{order:?}");
        dirty.put_back(&memory);
        dirty.clear();
        dirty.harvest(&memory);
        assert_eq!(runs(&dirty), [(0x9000, 0x1000)], "{order:?}");
    }
}

/// Regions in any order, one of which may be empty.
struct Unchecked(Vec<Region<AtomicBitmap>>);

impl GuestMemoryBackend for Unchecked {
    type R = Region<AtomicBitmap>;

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.0
            .iter()
            .find(|region| region.to_region_addr(addr).is_some())
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.0.iter()
    }
}
