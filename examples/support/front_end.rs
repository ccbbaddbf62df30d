//! The front end of a vhost-user back end, which knows the mappings of the guest's IOMMU.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;
use std::time::Instant;

use vm_memory::GuestAddress;

/// The size of a page of the IOMMU.
pub const PAGE: u64 = 0x1000;

/// A page of I/O virtual addresses, and the page of guest memory that it is mapped to.
pub type Mapping = (GuestAddress, GuestAddress);

/// A connection to the front end, which runs on a separate thread.
#[derive(Debug)]
pub struct FrontEnd {
    misses: Sender<GuestAddress>,
    replies: Receiver<Mapping>,
}

impl FrontEnd {
    /// Starts a front end with `mappings`. It does not reply to misses of other pages.
    pub fn start(mappings: Vec<Mapping>) -> Self {
        let (misses, received) = channel::<GuestAddress>();
        let (sender, replies) = channel();
        thread::spawn(move || {
            for miss in received {
                println!("front end: the device misses {:#x}", miss.0);
                let page = miss.0 & !(PAGE - 1);
                if let Some(mapping) = mappings.iter().find(|(iova, _)| iova.0 == page) {
                    // Sending fails only if the device no longer exists.
                    let _ = sender.send(*mapping);
                }
            }
        });
        Self { misses, replies }
    }

    /// Asks for the mapping of `iova`. Returns `None` if there is no reply before `deadline`.
    pub fn ask(&self, iova: GuestAddress, deadline: Instant) -> Option<Mapping> {
        self.misses.send(iova).ok()?;
        let left = deadline.saturating_duration_since(Instant::now());
        self.replies.recv_timeout(left).ok()
    }
}
