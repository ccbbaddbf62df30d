//! A device, its back end, and a front end that shares guest memory with it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use verify_iommu::{FrontEnd, FrontEndRegion, RegionTable, VhostIommu};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, IommuMemory};

pub const PAGE: u64 = 0x1000;

/// Guest memory: two regions that are far apart in the guest, and adjacent in the front end.
pub const LOW: u64 = 0;
pub const HIGH: u64 = 0x100_0000;
pub const REGION: u64 = 64 * PAGE;
pub const USER: u64 = 0x7f00_0000_0000;

/// The size of the dirty bitmap by I/O virtual address.
pub const IOVA_SPACE: usize = 0x20_0000;

pub type Physical = GuestMemoryMmap<AtomicBitmap>;
pub type Memory = IommuMemory<Physical, VhostIommu>;

/// Returns the front end's address of a guest physical address.
pub fn user(guest: u64) -> u64 {
    match guest.checked_sub(HIGH) {
        Some(offset) => USER + REGION + offset,
        None => USER + guest,
    }
}

pub fn table() -> RegionTable {
    let region = |guest| FrontEndRegion {
        guest: GuestAddress(guest),
        len: REGION,
        user: user(guest),
    };
    RegionTable::new(vec![region(LOW), region(HIGH)]).unwrap()
}

pub struct Setup {
    /// The memory that the device uses.
    pub memory: Memory,
    /// The memory that the guest and the front end use.
    pub physical: Physical,
    pub front_end: Arc<FrontEnd>,
}

pub fn setup(deadline: Duration) -> Setup {
    let size = usize::try_from(REGION).unwrap();
    let physical =
        Physical::from_ranges(&[(GuestAddress(LOW), size), (GuestAddress(HIGH), size)]).unwrap();
    let (front_end, main, requests) = FrontEnd::pair().unwrap();
    let iommu = VhostIommu::start(main, requests, table(), deadline).unwrap();
    let bitmap = AtomicBitmap::new(IOVA_SPACE, NonZeroUsize::new(0x1000).unwrap());
    Setup {
        memory: IommuMemory::new(physical.clone(), iommu, true, bitmap),
        physical,
        front_end: Arc::new(front_end),
    }
}

/// Ends the connection, and checks that the receiver thread has not panicked.
pub fn end(memory: &Memory) {
    memory.iommu().disconnect().unwrap().unwrap().unwrap();
}
