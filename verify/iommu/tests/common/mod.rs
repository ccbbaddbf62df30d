//! A device, its back end, and a front end that shares the guest's memory with it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use compat_iommu::{FrontEnd, FrontEndRegion, RegionTable, VhostIommu};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, IommuMemory};

pub const PAGE: u64 = 0x1000;

/// Guest memory: two regions that are far apart in the guest, and neighbours in the front end.
pub const LOW: u64 = 0;
pub const HIGH: u64 = 0x100_0000;
pub const REGION: u64 = 64 * PAGE;
pub const USER: u64 = 0x7f00_0000_0000;

/// The I/O virtual addresses that writes are marked for.
pub const IOVA_SPACE: usize = 0x20_0000;

pub type Physical = GuestMemoryMmap<AtomicBitmap>;
pub type Memory = IommuMemory<Physical, VhostIommu>;

/// The front end's address of a guest physical one.
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
    /// What the device sees.
    pub memory: Memory,
    /// What the guest and the front end see.
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

/// Ends the connection. A receiver thread that panicked fails the test.
pub fn end(memory: &Memory) {
    memory.iommu().disconnect().unwrap().unwrap().unwrap();
}
