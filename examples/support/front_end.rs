//! The front end of a vhost-user back end, which knows the mappings of the guest's IOMMU.

use std::io;
use std::sync::mpsc::{channel, Sender};
use std::thread;

use vm_memory::iommu::{IovaRange, MappingSource, SharedIotlb};
use vm_memory::{GuestAddress, Permissions};

/// The size of a page of the IOMMU.
pub const PAGE: usize = 0x1000;

/// A page of I/O virtual addresses, and the page of guest memory that it is mapped to.
pub type Mapping = (GuestAddress, GuestAddress);

/// A connection to the front end, which runs on a separate thread.
#[derive(Debug)]
pub struct FrontEnd {
    misses: Sender<GuestAddress>,
}

impl FrontEnd {
    /// Starts a front end with `mappings`. It does not reply to misses of other pages.
    pub fn start(iotlb: SharedIotlb, mappings: Vec<Mapping>) -> Self {
        let (misses, received) = channel::<GuestAddress>();
        thread::spawn(move || {
            for miss in received {
                println!("front end: the device misses {:#x}", miss.0);
                let page = miss.0 & !(PAGE as u64 - 1);
                if let Some((iova, target)) = mappings.iter().find(|(iova, _)| iova.0 == page) {
                    // Fails only for a range that passes the end of the address space.
                    let _ = iotlb.set_mapping(*iova, *target, PAGE, Permissions::ReadWrite);
                }
            }
        });
        Self { misses }
    }
}

impl MappingSource for FrontEnd {
    fn request_mapping(&self, range: &IovaRange, _: Permissions) -> io::Result<()> {
        self.misses.send(range.base).map_err(io::Error::other)
    }
}
