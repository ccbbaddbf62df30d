//! A vhost-user back end: map the regions of a front end from a table of descriptors. Refuse
//! entries with which the front end could crash the back end.
//!
//! `cargo run -p examples --example vhost_user_backend`

use std::fs::File;
use std::sync::Arc;

use examples::Result;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{describe, Backing, MemoryBuilder, Region};
use vm_memory_vhost::{MemoryRegion, RegionTable};

type Memory = GuestMemoryMmap<()>;

/// The memory and the region table of a back end. The example `hotplug` shows how to remove a
/// region while device threads run.
struct BackEnd {
    memory: GuestMemoryAtomic<Memory>,
    table: RegionTable,
}

impl BackEnd {
    /// Adds the region of a message `VHOST_USER_ADD_MEM_REG`.
    fn add(&mut self, entry: &MemoryRegion, file: File) -> Result<()> {
        let mut table = self.table.clone();
        table.insert(*entry)?;
        // A file that the front end could truncate later is refused. For files without seals, see
        // the example `truncated_file`.
        let region = Region::new(entry.guest_address, entry.size)
            .backing(Backing::shared_file(file, entry.mmap_offset))
            .sealed(true);
        let region = Arc::new(region.build()?);
        self.memory.update(|map| map.insert_region(region))?;
        self.table = table;
        Ok(())
    }
}

fn main() -> Result<()> {
    // The front end, here in the same process, has a sealed memfd.
    let region = Region::new(GuestAddress(1 << 32), 2 << 20).backing(Backing::Memfd);
    let front_end: Memory = MemoryBuilder::new().region(region).build()?;
    let (_, files) = describe(&front_end)?;
    let file = files.get(0).ok_or("the memory has no descriptor")?;
    let entry = |guest_address, size| MemoryRegion {
        guest_address: GuestAddress(guest_address),
        size,
        user_address: 0x7f00_0000_0000 + guest_address,
        mmap_offset: 0,
    };
    let mut back_end = BackEnd {
        memory: GuestMemoryAtomic::new(Memory::new()),
        table: RegionTable::default(),
    };
    back_end.add(&entry(1 << 32, 2 << 20), file.try_clone()?)?;

    // `VHOST_USER_SET_VRING_ADDR` names a ring by an address of the front end. The back end writes
    // to the ring, and the front end sees it.
    let ring = back_end.table.guest_address(0x7f01_0000_1000);
    let ring = ring.ok_or("the ring is in no region")?;
    println!("the ring is at guest address {:#x}", ring.0);
    back_end.memory.memory().write_obj(7u16, ring)?;
    assert_eq!(front_end.read_obj::<u16>(ring)?, 7);

    // A hostile front end sends a region that is longer than its file, one that overlaps another,
    // and one whose file has no seals. Each is refused, and the regions stay as they were.
    for (hostile, file) in [
        (entry(2 << 32, 4 << 20), file.try_clone()?),
        (entry((1 << 32) + 0x1000, 2 << 20), file.try_clone()?),
        (entry(2 << 32, 0x1000), tempfile::tempfile()?),
    ] {
        println!("refused: {}", back_end.add(&hostile, file).unwrap_err());
    }
    assert_eq!(back_end.memory.memory().num_regions(), 1);
    assert_eq!(back_end.table.regions().len(), 1);
    Ok(())
}
