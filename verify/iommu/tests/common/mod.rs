//! A device, its back end, and a front end that shares guest memory with it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use verify_iommu::{BackEnd, FrontEnd, VhostIommu};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap, IommuMemory};
use vm_memory_vhost::{MemoryRegion, RegionTable};

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
    let region = |guest| MemoryRegion {
        guest_address: GuestAddress(guest),
        size: REGION,
        user_address: user(guest),
        mmap_offset: 0,
    };
    RegionTable::new([region(LOW), region(HIGH)]).unwrap()
}

pub struct Setup {
    /// The memory that the device uses.
    pub memory: Memory,
    /// The memory that the guest and the front end use.
    pub physical: Physical,
    pub front_end: Arc<FrontEnd>,
    pub back_end: BackEnd,
}

pub fn setup(timeout: Duration) -> Setup {
    let size = usize::try_from(REGION).unwrap();
    let physical =
        Physical::from_ranges(&[(GuestAddress(LOW), size), (GuestAddress(HIGH), size)]).unwrap();
    let (front_end, main, requests) = FrontEnd::pair().unwrap();
    let back_end = BackEnd::start(main, requests, table(), timeout).unwrap();
    let iommu = back_end.iommu().clone();
    let bitmap = AtomicBitmap::new(IOVA_SPACE, NonZeroUsize::new(0x1000).unwrap());
    Setup {
        memory: IommuMemory::new(physical.clone(), iommu, true, bitmap),
        physical,
        front_end: Arc::new(front_end),
        back_end,
    }
}

/// Ends the connection, and checks that the receiver thread has not panicked.
pub fn end(back_end: &BackEnd) {
    back_end.disconnect().unwrap().unwrap().unwrap();
}

/// The payload of an IOTLB message with any values.
pub fn payload(iova: u64, size: u64, uaddr: u64, perm: u8, kind: u8) -> Vec<u8> {
    let numbers = [iova, size, uaddr].map(u64::to_ne_bytes).concat();
    [&numbers[..], &[perm, kind], &[0; 6]].concat()
}
