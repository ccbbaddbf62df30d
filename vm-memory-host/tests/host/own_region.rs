//! All functions accept a region type of a VMM.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use super::common::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BS};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};
use vm_memory_host::{
    content, describe, discard, discard_pages, plug, plug_state, prefault, provisioned, residency,
    unplug, unplug_all, Backing, Balloon, ChangeError, HostMapped, HostMapping, MemoryBuilder,
    PlugState, Region, Span, Unplugged,
};

/// A region like Firecracker's: a mapping that is divided into KVM slots.
#[derive(Debug)]
struct SlotRegion {
    inner: GuestRegionMmap<Option<AtomicBitmap>>,
    slots: Vec<u32>,
    /// Another region. If present, `host_mapping` returns its mapping.
    other: Option<GuestRegionMmap>,
}

impl HostMapped for SlotRegion {
    fn host_mapping(&self) -> Option<&HostMapping> {
        match &self.other {
            None => self.inner.host_mapping(),
            Some(other) => other.host_mapping(),
        }
    }
}

impl GuestMemoryRegion for SlotRegion {
    type B = Option<AtomicBitmap>;

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.inner.bitmap()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for SlotRegion {}

type Slots = GuestRegionCollection<SlotRegion>;

const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).unwrap();

fn build_slots(builder: MemoryBuilder) -> Slots {
    let regions =
        builder.build_regions_with_bitmaps(|_, size| Some(AtomicBitmap::new(size, PAGE_SIZE)));
    let regions = regions.unwrap().into_iter().zip(0..);
    let regions = regions.map(|(inner, number)| SlotRegion {
        inner,
        slots: vec![number],
        other: None,
    });
    Slots::from_regions(regions.collect()).unwrap()
}

#[test]
fn functions_accept_regions_of_a_vmm() {
    let region = |start, backing| Region::new(GuestAddress(start), 4 * MIB).backing(backing);
    let blocks = region(1 << 32, Backing::Anonymous).blocks(non_zero(MIB), Unplugged::Mapped);
    // Added in another order than that of their addresses.
    let builder = MemoryBuilder::new().region(blocks);
    let memory = build_slots(builder.region(region(0, Backing::Memfd)));
    assert_eq!(
        memory.find_region(GuestAddress(1 << 32)).unwrap().slots,
        [1]
    );

    let go_on = |_| ControlFlow::Continue(());
    prefault(&memory, NonZeroUsize::MIN, go_on).unwrap();
    let resident = |memory: &Slots| {
        let usages = residency(memory).unwrap();
        usages.iter().map(|(_, usage)| usage.resident).collect()
    };
    let counts: Vec<_> = resident(&memory);
    assert_eq!(counts, [4 * MIB, 0]);
    let ram = GuestAddress(0);
    memory.write_obj(7u8, ram).unwrap();
    let bitmap = |memory: &Slots| {
        let region = memory.find_region(ram).unwrap();
        (
            region.bitmap().dirty_at(0),
            region.bitmap().dirty_at(MIB as usize),
        )
    };
    assert_eq!(bitmap(&memory), (true, false));
    assert_eq!(discard(&memory, GuestAddress(MIB), MIB).unwrap(), MIB);
    assert_eq!(bitmap(&memory), (true, true));
    let counts: Vec<_> = resident(&memory);
    assert_eq!(counts, [3 * MIB, 0]);
    let ranges: Vec<_> = content(&memory).unwrap().map(Result::unwrap).collect();
    let span = |start, size| Span { start, size };
    assert_eq!(ranges, [span(0, MIB), span(2 * MIB, 2 * MIB)]);

    let block = GuestAddress((1 << 32) + MIB);
    assert!(memory.write_obj(7u8, block).is_err());
    plug(&memory, block, MIB).unwrap();
    memory.write_obj(7u8, block).unwrap();
    let (description, files) = describe(&memory).unwrap();
    let plugged = &description.regions[1].blocks.as_ref().unwrap().plugged;
    assert_eq!((plugged.as_slice(), files.len()), (&[(MIB, MIB)][..], 1));
    assert_eq!(plug_state(&memory, block, MIB).unwrap(), PlugState::Plugged);
    unplug(&memory, block, MIB).unwrap();
    assert!(memory.write_obj(7u8, block).is_err());
    plug(&memory, block, MIB).unwrap();
    assert_eq!(unplug_all(&memory, block).unwrap(), MIB);

    memory.write_obj(7u8, ram).unwrap();
    let report = discard_pages(&memory, [3u32, 0, 0x5000]);
    assert_eq!((report.discarded, report.refused), (2, 1));
    assert_eq!(memory.read_obj::<u8>(ram).unwrap(), 0);
    let mut balloon = Balloon::new();
    assert_eq!(balloon.inflate(&memory, [1u32, 2]).discarded, 2);
    balloon.deflate(&memory, [1u32]);
}

#[test]
fn mapping_of_another_length_is_not_that_of_the_region() {
    let region = |size| Region::new(GuestAddress(0), size);
    let bitmap = |_, size| Some(AtomicBitmap::new(size, PAGE_SIZE));
    let builder = MemoryBuilder::new().region(region(2 * MIB));
    let inner = builder.build_regions_with_bitmaps(bitmap).unwrap();
    let slot = SlotRegion {
        inner: inner.into_iter().next().unwrap(),
        slots: Vec::new(),
        other: Some(region(MIB).build().unwrap()),
    };
    assert!(provisioned(&slot).is_err());
    let memory = Slots::from_regions(vec![slot]).unwrap();
    let error = discard(&memory, GuestAddress(MIB), MIB).unwrap_err();
    assert!(matches!(error, ChangeError::NotProvisioned(_)), "{error}");
}
