//! A balloon and virtio-mem: return pages to the system, and plug and unplug blocks of a region,
//! while the guest runs.
//!
//! `cargo run -p examples --example balloon`

use std::error::Error;
use std::num::NonZeroU64;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_memory_host::{discard, plug, provisioned, residency, unplug};
use vm_memory_host::{MemoryBuilder, Region, Unplugged};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const BLOCK: NonZeroU64 = NonZeroU64::new(2 << 20).unwrap();
/// RAM that is present at boot.
const BOOT: GuestAddress = GuestAddress(0);
/// RAM that the guest plugs in blocks.
const DEVICE: GuestAddress = GuestAddress(4 << 30);

/// Returns the number of bytes of `memory` that are resident.
fn resident(memory: &Memory) -> Result<u64, Box<dyn Error>> {
    Ok(residency(memory)?
        .iter()
        .map(|(_, region)| region.resident)
        .sum())
}

/// The balloon device: returns the pages that the guest lists to the system.
fn inflate(memory: &Memory, pages: &[u32]) -> Result<u64, Box<dyn Error>> {
    let mut returned = 0;
    for page in pages {
        let address = GuestAddress(u64::from(*page) << 12);
        // A page that is not RAM is the guest's error: report it, and do not stop.
        match discard(memory, address, 0x1000) {
            Ok(bytes) => returned += bytes,
            Err(error) => println!("page {page:#x}: {error}"),
        }
    }
    Ok(returned)
}

/// The virtio-mem device: the bytes that are plugged in the region at `DEVICE`.
fn plugged(memory: &Memory) -> Result<usize, Box<dyn Error>> {
    let region = memory.find_region(DEVICE).ok_or("no such region")?;
    let blocks = provisioned(region)?
        .plugged_blocks()
        .ok_or("a region without blocks")?;
    Ok(blocks.plugged_bytes())
}

fn main() -> Result<(), Box<dyn Error>> {
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(BOOT, 16 << 20))
        .region(Region::new(DEVICE, 64 << 20).blocks(BLOCK, Unplugged::Mapped))
        .build()?;

    // The guest uses 8 MiB, and inflates its balloon by 4 MiB of them.
    memory.write_slice(&vec![1; 8 << 20], BOOT)?;
    let before = resident(&memory)?;
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    dirty.clear();
    let pages: Vec<u32> = (0x400..0x800).chain([0xf_0000]).collect();
    let returned = inflate(&memory, &pages)?;
    let after = resident(&memory)?;
    println!("balloon: {returned} bytes returned, resident {before} -> {after}");
    assert_eq!(returned, 4 << 20);
    assert_eq!(before - after, returned);

    // The pages read as zeroes, so a migration must send them again: they are dirty.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x40_0000))?, 0);
    dirty.harvest(&memory);
    assert_eq!(dirty.total_bytes(), 4 << 20);

    // No block is plugged at first: accesses fail, as in a hole.
    assert!(memory.write_obj(1u64, DEVICE).is_err());
    plug(&memory, DEVICE, 3 * BLOCK.get())?;
    memory.write_obj(1u64, DEVICE)?;
    println!("virtio-mem: {} MiB are plugged", plugged(&memory)? >> 20);

    // The driver unplugs the middle block; a device that still uses it gets an error.
    let middle = GuestAddress(DEVICE.0 + BLOCK.get());
    unplug(&memory, middle, BLOCK.get())?;
    assert_eq!(plugged(&memory)?, 4 << 20);
    let error = memory.read_obj::<u64>(middle).unwrap_err();
    println!("virtio-mem: access to an unplugged block: {error}");
    let error = plug(&memory, GuestAddress(DEVICE.0 + 0x1000), 0x1000).unwrap_err();
    println!("virtio-mem: {error}");
    let last = memory
        .find_region(DEVICE)
        .map(|region| region.last_addr().0);
    assert_eq!(last, Some(DEVICE.0 + (64 << 20) - 1));
    Ok(())
}
