//! A vhost-user back end: map the regions of a front end from a table of descriptors. Refuse
//! entries by which the front end could crash the back end.
//!
//! `cargo run -p examples --example vhost_user_backend`

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vm_memory_host::{describe, Backing, MemoryBuilder, Region};

type Memory = GuestMemoryMmap<()>;

/// One region in a message of the front end (`VHOST_USER_ADD_MEM_REG`).
struct Entry {
    guest_address: u64,
    size: u64,
    /// The address in the front end's process, by which it names rings.
    user_address: u64,
    file: Arc<File>,
}

struct BackEnd {
    memory: GuestMemoryAtomic<Memory>,
    /// For each region by user address: its size and its guest address.
    table: BTreeMap<u64, (u64, GuestAddress)>,
}

impl BackEnd {
    fn add(&mut self, entry: Entry) -> Result<(), Box<dyn Error>> {
        let (address, size) = (GuestAddress(entry.guest_address), entry.size);
        // A file that the front end could truncate later is refused. For files without seals, see
        // the example `truncated_file`.
        let backing = Backing::shared_file(entry.file.try_clone()?, 0);
        let region = Region::new(address, size).backing(backing).sealed(true);
        let built: Memory = MemoryBuilder::new().region(region).build()?;
        let (_, region) = built.remove_region(address, size)?;
        self.memory.update(|map| map.insert_region(region))?;
        self.table.insert(entry.user_address, (size, address));
        Ok(())
    }

    fn remove(&mut self, user_address: u64) -> Result<(), Box<dyn Error>> {
        let (size, address) = self.table.remove(&user_address).ok_or("no such region")?;
        let remove = |map: &Memory| map.remove_region(address, size).map(|(map, _)| map);
        let retired = self.memory.update(remove)?;
        // Reply to the front end when no device thread reads the old map any more.
        retired.wait(Instant::now() + Duration::from_secs(1))?;
        Ok(())
    }

    /// Translates an address of the front end's process, as in `VHOST_USER_SET_VRING_ADDR`.
    fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        let (start, (size, address)) = self.table.range(..=user_address).next_back()?;
        let offset = user_address - start;
        (offset < *size).then(|| GuestAddress(address.0 + offset))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The front end, here in the same process, has two sealed memfds.
    let front_end: Memory = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), 2 << 20).backing(Backing::Memfd))
        .region(Region::new(GuestAddress(1 << 32), 2 << 20).backing(Backing::Memfd))
        .build()?;
    let (_, files) = describe(&front_end)?;
    let entry = |file: usize, guest_address, size| Entry {
        guest_address,
        size,
        user_address: 0x7f00_0000_0000 + guest_address,
        file: Arc::clone(&files[file]),
    };
    let mut back_end = BackEnd {
        memory: GuestMemoryAtomic::new(Memory::new()),
        table: BTreeMap::new(),
    };
    back_end.add(entry(0, 0, 2 << 20))?;
    back_end.add(entry(1, 1 << 32, 2 << 20))?;

    // The back end writes to a ring; the front end sees it.
    let ring = back_end.guest_address(0x7f01_0000_1000).unwrap();
    back_end.memory.memory().write_obj(7u16, ring)?;
    assert_eq!(front_end.read_obj::<u16>(GuestAddress(0x1_0000_1000))?, 7);
    println!("the ring is at guest address {:#x}", ring.0);

    // A hostile table: a region longer than its file, one that overlaps, a file without seals.
    let (long, overlapping) = (entry(0, 2 << 32, 4 << 20), entry(0, 1 << 20, 2 << 20));
    let mut unsealed = entry(0, 2 << 32, 0x1000);
    unsealed.file = Arc::new(tempfile::tempfile()?);
    for hostile in [long, overlapping, unsealed] {
        println!("refused: {}", back_end.add(hostile).unwrap_err());
    }

    back_end.remove(0x7f01_0000_0000)?;
    assert!(back_end.memory.memory().read_obj::<u16>(ring).is_err());
    Ok(())
}
