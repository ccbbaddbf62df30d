//! A device behind an IOMMU: the IOTLB starts empty, and each miss is sent to the front end, with a
//! deadline for its reply. Hits take no lock. An invalidation is acknowledged when it is complete.
//!
//! `cargo run -p examples --example iommu_device`

use std::error::Error;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::guest_memory::TranslationHold;
use vm_memory::iommu::{self, Iommu, IommuMemory, IotlbIterator, IotlbSnapshot, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const TIMEOUT: Duration = Duration::from_secs(1);

/// A page of I/O virtual addresses, and the page of guest memory that it is mapped to.
type Mapping = (GuestAddress, GuestAddress);

/// An IOMMU whose mappings are kept by the front end.
#[derive(Debug)]
struct AskingIommu {
    iotlb: SharedIotlb,
    /// The channels to and from the front end. One thread at a time waits for a reply.
    front_end: Mutex<(Sender<GuestAddress>, Receiver<Mapping>)>,
}

impl Iommu for AskingIommu {
    type IotlbGuard<'a> = IotlbSnapshot;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, iommu::Error> {
        let deadline = Instant::now() + TIMEOUT;
        let mut channels = None;
        loop {
            let fails = match self.iotlb.lookup(iova, length, access) {
                Ok(found) => return Ok(found),
                Err(fails) => fails,
            };
            let (None, Some(miss)) = (fails.access_fails.first(), fails.misses.first()) else {
                return Err(fails.into_error(iova, length, access));
            };
            let Some((misses, replies)) = channels.as_deref() else {
                // Look again under the lock: another thread may have asked for the same page.
                let lock = self.front_end.lock();
                channels = Some(lock.unwrap_or_else(PoisonError::into_inner));
                continue;
            };
            let _ = misses.send(miss.base); // without a front end, there is no reply
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((page, target)) = replies.recv_timeout(left) else {
                return Err(fails.into_error(iova, length, access));
            };
            let (iotlb, permissions) = (&self.iotlb, Permissions::ReadWrite);
            iotlb.set_mapping(page, target, 0x1000, permissions)?;
        }
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.iotlb.hold_translation()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    let ((ask, misses), (reply, replies)) = (channel::<GuestAddress>(), channel());
    let (iotlb, front_end) = (SharedIotlb::new(), Mutex::new((ask, replies)));
    let memory = IommuMemory::new(physical, AskingIommu { iotlb, front_end }, true, ());

    // The front end knows two pages, which are not adjacent in guest memory.
    let pages = [(0x9000_0000, 0x5000), (0x9000_1000, 0x2000)];
    let pages = pages.map(|(iova, target)| (GuestAddress(iova), GuestAddress(target)));
    let _front_end = thread::spawn(move || {
        for miss in misses {
            println!("front end: the device misses {:#x}", miss.0);
            let found = pages.iter().find(|(page, _)| page.0 == miss.0 & !0xfff);
            found.map(|mapping| reply.send(*mapping));
        }
    });

    // One access to both pages: two misses, then hits.
    memory.write_slice(&[7; 0x20], GuestAddress(0x9000_0ff0))?;
    let byte = |addr| memory.get_backend().read_obj::<u8>(GuestAddress(addr));
    assert_eq!((byte(0x5fff)?, byte(0x2000)?), (7, 7));
    println!("{}", memory.read_obj::<u8>(GuestAddress(0)).unwrap_err());

    // The guest unmaps a page while a request uses it.
    let page = GuestAddress(0x9000_0000);
    let request = memory.get_slices(page, 0x10, Permissions::Write)?;
    let invalidation = memory.iommu().iotlb.invalidate_mapping(page, 0x1000);
    assert!(!invalidation.is_done());
    drop(request);
    invalidation.wait(Instant::now() + TIMEOUT)?; // then acknowledge it
    Ok(())
}
