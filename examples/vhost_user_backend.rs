//! A vhost-user back end: map the regions of a front end from a table of descriptors. Refuse
//! entries with which the front end could crash the back end.
//!
//! `cargo run -p examples --example vhost_user_backend`

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use examples::Result;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{describe, Backing, MemoryBuilder, Region};

type Memory = GuestMemoryMmap<()>;

/// One region in a message of the front end (`VHOST_USER_ADD_MEM_REG`).
struct Entry {
    guest_address: GuestAddress,
    size: u64,
    /// The address in the front end's process, by which it names rings.
    user_address: u64,
    file: Arc<File>,
}

/// Hotplug of regions: the example `hotplug` removes one while device threads run.
struct BackEnd {
    memory: GuestMemoryAtomic<Memory>,
    /// For each region by user address: its size and its guest address.
    table: BTreeMap<u64, (u64, GuestAddress)>,
}

impl BackEnd {
    fn add(&mut self, entry: Entry) -> Result<()> {
        // A file that the front end could truncate later is refused. For files without seals, see
        // the example `truncated_file`.
        let backing = Backing::shared_file(entry.file.try_clone()?, 0);
        let region = Region::new(entry.guest_address, entry.size)
            .backing(backing)
            .sealed(true);
        let region = Arc::new(region.build()?);
        self.memory.update(|map| map.insert_region(region))?;
        let translation = (entry.size, entry.guest_address);
        self.table.insert(entry.user_address, translation);
        Ok(())
    }

    /// Translates an address of the front end's process, as in `VHOST_USER_SET_VRING_ADDR`.
    fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        let (start, (size, address)) = self.table.range(..=user_address).next_back()?;
        let offset = user_address - start;
        (offset < *size).then(|| GuestAddress(address.0 + offset))
    }
}

fn main() -> Result<()> {
    // The front end, here in the same process, has a sealed memfd.
    let region = Region::new(GuestAddress(1 << 32), 2 << 20).backing(Backing::Memfd);
    let front_end: Memory = MemoryBuilder::new().region(region).build()?;
    let (_, files) = describe(&front_end)?;
    let file = files.get(0).ok_or("the memory has no descriptor")?;
    let file = Arc::new(file.try_clone()?);
    let entry = |guest_address, size| Entry {
        guest_address: GuestAddress(guest_address),
        size,
        user_address: 0x7f00_0000_0000 + guest_address,
        file: Arc::clone(&file),
    };
    let mut back_end = BackEnd {
        memory: GuestMemoryAtomic::new(Memory::new()),
        table: BTreeMap::new(),
    };
    back_end.add(entry(1 << 32, 2 << 20))?;

    // The back end writes to a ring, and the front end sees it.
    let ring = back_end.guest_address(0x7f01_0000_1000);
    let ring = ring.ok_or("the ring is in no region")?;
    println!("the ring is at guest address {:#x}", ring.0);
    back_end.memory.memory().write_obj(7u16, ring)?;
    assert_eq!(front_end.read_obj::<u16>(ring)?, 7);

    // A hostile front end sends a region that is longer than its file, one that overlaps another,
    // and one whose file has no seals. Each is refused, and the regions stay as they were.
    let unsealed = Entry {
        file: Arc::new(tempfile::tempfile()?),
        ..entry(2 << 32, 0x1000)
    };
    for hostile in [
        entry(2 << 32, 4 << 20),
        entry((1 << 32) + 0x1000, 2 << 20),
        unsealed,
    ] {
        println!("refused: {}", back_end.add(hostile).unwrap_err());
    }
    assert_eq!(back_end.memory.memory().num_regions(), 1);
    Ok(())
}
