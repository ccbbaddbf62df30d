//! A region type of your own: RAM and ROM with the number of their KVM slot, in one collection.
//!
//! Devices need no change, because the traits provide `Bytes`, slices and I/O.
//!
//! `cargo run -p examples --example own_region`

use examples::Result;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

const RAM: GuestAddress = GuestAddress(0);
const ROM: GuestAddress = GuestAddress(0xffff_0000);

/// A mapping with the number of its KVM slot and its use by the guest.
#[derive(Debug)]
struct Slot {
    mapping: GuestRegionMmap<AtomicBitmap>,
    number: u32,
    is_rom: bool,
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
    ) -> std::result::Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, GuestMemoryError> {
        self.mapping.get_slice(offset, count)
    }

    // Devices cannot write to a ROM, whatever the protection of its mapping.
    fn allowed_access(&self) -> Permissions {
        if self.is_rom {
            Permissions::Read
        } else {
            Permissions::ReadWrite
        }
    }
}

/// `Bytes` by address in the region: derived from `get_slice`.
impl GuestMemoryRegionBytes for Slot {}

fn main() -> Result<()> {
    let ram = Slot {
        mapping: GuestRegionMmap::from_range(RAM, 1 << 20, None)?,
        number: 0,
        is_rom: false,
    };
    let rom = Slot {
        mapping: GuestRegionMmap::from_range(ROM, 0x1_0000, None)?,
        number: 1,
        is_rom: true,
    };
    // The VMM writes the firmware to the mapping, which permits it.
    rom.mapping
        .write_slice(b"firmware", MemoryRegionAddress(0))?;
    let memory = GuestRegionCollection::from_regions(vec![ram, rom])?;

    // Devices access both regions by guest address.
    memory.write_obj(1u32, RAM)?;
    assert_eq!(&memory.read_obj::<[u8; 8]>(ROM)?, b"firmware");
    println!("write to ROM: {}", memory.write_obj(1u32, ROM).unwrap_err());

    // A lookup returns the region as its own type.
    let region = memory.find_region(ROM).ok_or("no region at the address")?;
    println!("the firmware is in slot {}", region.number);
    assert_eq!(region.number, 1);
    Ok(())
}
