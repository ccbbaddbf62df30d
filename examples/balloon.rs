//! A balloon: return unneeded guest pages to the host while the guest runs.
//!
//! `cargo run -p examples --example balloon`

use examples::{take_dirty, Memory, Result};
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{discard, residency, MemoryBuilder, Region};

const PAGE: u64 = 0x1000;

/// Returns the number of bytes of `memory` that are resident.
fn resident(memory: &Memory) -> Result<u64> {
    let regions = residency(memory)?;
    Ok(regions.iter().map(|(_, region)| region.resident).sum())
}

/// Discards the pages that the guest lists, and returns the number of bytes freed.
fn inflate(memory: &Memory, pages: &[u32]) -> u64 {
    let mut returned = 0;
    for page in pages {
        match discard(memory, GuestAddress(u64::from(*page) * PAGE), PAGE) {
            Ok(bytes) => returned += bytes,
            // A page outside RAM is a guest error. Report it, and continue.
            Err(error) => println!("page {page:#x}: {error}"),
        }
    }
    returned
}

fn main() -> Result<()> {
    let ram = Region::new(GuestAddress(0), 16 << 20);
    let memory: Memory = MemoryBuilder::new().region(ram).build()?;

    // The guest uses 8 MiB.
    memory.write_slice(&vec![1; 8 << 20], GuestAddress(0))?;
    let before = resident(&memory)?;
    take_dirty(&memory);

    // The guest returns 4 MiB, and one page outside its RAM.
    let mut pages: Vec<u32> = (0x400..0x800).collect();
    pages.push(0xf_0000);
    let returned = inflate(&memory, &pages);
    let after = resident(&memory)?;
    println!("{returned} bytes returned, resident: {before} before, {after} after");
    assert_eq!(returned, 4 << 20);
    assert_eq!(before - after, returned);

    // The pages read as zeroes. A migration must send them again, so they are dirty.
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x40_0000))?, 0);
    assert_eq!(take_dirty(&memory), [(0x40_0000, 4 << 20)]);

    // Deflating needs no call: the next access populates the page.
    memory.write_obj(1u64, GuestAddress(0x40_0000))?;
    assert_eq!(resident(&memory)?, after + PAGE);
    Ok(())
}
