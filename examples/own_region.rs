//! A region type of your own: RAM and ROM with the number of their KVM slot, in one collection.
//!
//! Devices need no change, because the traits provide `Bytes`, slices and I/O.
//!
//! `cargo run -p examples --example own_region`

use std::error::Error;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Ram,
    Rom,
}

/// A mapping with the number of its KVM slot and its use by the guest.
#[derive(Debug)]
struct Slot {
    mapping: GuestRegionMmap<AtomicBitmap>,
    number: u32,
    kind: Kind,
}

impl GuestMemoryRegion for Slot {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        self.mapping.bitmap()
    }

    // With this method, the region is ordinary memory.
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, GuestMemoryError> {
        self.mapping.get_slice(offset, count)
    }

    // Devices cannot write to a ROM, whatever the protection of its mapping.
    fn allowed_access(&self) -> Permissions {
        match self.kind {
            Kind::Ram => Permissions::ReadWrite,
            Kind::Rom => Permissions::Read,
        }
    }
}

/// `Bytes` by address in the region: derived from `get_slice`.
impl GuestMemoryRegionBytes for Slot {}

fn main() -> Result<(), Box<dyn Error>> {
    let slot = |number, kind, start, size| -> Result<Slot, Box<dyn Error>> {
        Ok(Slot {
            mapping: GuestRegionMmap::from_range(GuestAddress(start), size, None)?,
            number,
            kind,
        })
    };
    let rom = slot(1, Kind::Rom, 0xffff_0000, 0x1_0000)?;
    let inside = MemoryRegionAddress(0);
    rom.mapping.write_slice(b"firmware", inside)?; // by the VMM itself
    let regions = vec![slot(0, Kind::Ram, 0, 1 << 20)?, rom];
    let memory = GuestRegionCollection::from_regions(regions)?;

    memory.write_obj(1u32, GuestAddress(0x1000))?;
    let mut firmware = [0; 8];
    memory.read_slice(&mut firmware, GuestAddress(0xffff_0000))?;
    assert_eq!(&firmware, b"firmware");

    // Each way to write respects the kind.
    let written = memory.write_obj(1u32, GuestAddress(0xffff_0000));
    println!("write to ROM: {}", written.unwrap_err());
    let check = |access| GuestMemory::check_range(&memory, GuestAddress(0xffff_0000), 8, access);
    assert!(check(Permissions::Read) && !check(Permissions::Write));

    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    for (start, len) in dirty.runs() {
        let region = memory.find_region(start).ok_or("not in a region")?;
        println!("slot {}: {len:#x} bytes at {start:x?}", region.number);
    }
    assert_eq!(dirty.total_bytes(), 0x2000);
    Ok(())
}
