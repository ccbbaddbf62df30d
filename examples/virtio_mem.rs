//! A virtio-mem device: the guest plugs and unplugs blocks of a region while it runs.
//!
//! `cargo run -p examples --example virtio_mem`

use std::num::NonZeroU64;

use examples::{Memory, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vm_memory_host::{plug, provisioned, unplug, MemoryBuilder, Region, Unplugged};

const BLOCK: u64 = 2 << 20;
const BLOCK_SIZE: NonZeroU64 = NonZeroU64::new(BLOCK).unwrap();

/// RAM that is present at boot.
const BOOT: GuestAddress = GuestAddress(0);
/// RAM that the guest plugs in blocks.
const DEVICE: GuestAddress = GuestAddress(4 << 30);

/// Returns the number of plugged bytes, which the device reports as `plugged_size`.
fn plugged_size(memory: &Memory) -> Result<usize> {
    let region = memory
        .find_region(DEVICE)
        .ok_or("no region of the device")?;
    let blocks = provisioned(region)?.plugged_blocks();
    Ok(blocks.ok_or("a region without blocks")?.plugged_bytes())
}

fn main() -> Result<()> {
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(BOOT, 16 << 20))
        .region(Region::new(DEVICE, 64 << 20).blocks(BLOCK_SIZE, Unplugged::Mapped))
        .build()?;

    // No block is plugged at first. Accesses fail, as in a hole.
    assert_eq!(plugged_size(&memory)?, 0);
    assert!(memory.write_obj(1u64, DEVICE).is_err());

    // The driver plugs three blocks.
    plug(&memory, DEVICE, 3 * BLOCK)?;
    memory.write_obj(1u64, DEVICE)?;
    println!("{} MiB are plugged", plugged_size(&memory)? >> 20);
    assert_eq!(plugged_size(&memory)? as u64, 3 * BLOCK);

    // It unplugs the middle one. A device that still uses this block gets an error.
    let middle = GuestAddress(DEVICE.0 + BLOCK);
    memory.write_obj(2u64, middle)?;
    unplug(&memory, middle, BLOCK)?;
    let error = memory.read_obj::<u64>(middle).unwrap_err();
    println!("access to an unplugged block: {error}");
    assert_eq!(plugged_size(&memory)? as u64, 2 * BLOCK);

    // A block that is plugged again contains zeroes.
    plug(&memory, middle, BLOCK)?;
    assert_eq!(memory.read_obj::<u64>(middle)?, 0);

    // A request that does not consist of whole blocks is an error of the guest.
    let error = plug(&memory, GuestAddress(DEVICE.0 + 0x1000), 0x1000).unwrap_err();
    println!("{error}");
    Ok(())
}
