//! A device behind an IOMMU: the IOTLB starts empty. Each miss is sent to the front end, with a
//! deadline for the reply. Hits take no lock. An invalidation is acknowledged when it is complete.
//!
//! `cargo run -p examples --example iommu_device`

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use examples::front_end::{FrontEnd, PAGE};
use examples::Result;
use vm_memory::guest_memory::TranslationHold;
use vm_memory::iommu::{self, Iommu, IommuMemory, IotlbIterator, IotlbSnapshot, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const TIMEOUT: Duration = Duration::from_secs(1);

/// An IOMMU whose mappings the front end keeps.
#[derive(Debug)]
struct AskingIommu {
    iotlb: SharedIotlb,
    /// Locked while a thread waits for a reply.
    front_end: Mutex<FrontEnd>,
}

impl Iommu for AskingIommu {
    type IotlbGuard<'a> = IotlbSnapshot;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> std::result::Result<IotlbIterator<IotlbSnapshot>, iommu::Error> {
        if let Ok(found) = self.iotlb.lookup(iova, length, access) {
            return Ok(found);
        }
        let deadline = Instant::now() + TIMEOUT;
        let front_end = self.front_end.lock();
        let front_end = front_end.unwrap_or_else(PoisonError::into_inner);
        loop {
            // Look again: another thread may have asked for the same page.
            let fails = match self.iotlb.lookup(iova, length, access) {
                Ok(found) => return Ok(found),
                Err(fails) => fails,
            };
            // The front end cannot help if the device may not access a part of the range.
            let reply = match fails.misses.first() {
                Some(miss) if fails.access_fails.is_empty() => front_end.ask(miss.base, deadline),
                _ => None,
            };
            let Some((page, target)) = reply else {
                return Err(fails.into_error(iova, length, access));
            };
            self.iotlb
                .set_mapping(page, target, PAGE as usize, Permissions::ReadWrite)?;
        }
    }

    fn current_iotlb(&self) -> Option<IotlbSnapshot> {
        Some(self.iotlb.snapshot())
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.iotlb.hold_translation()
    }
}

fn main() -> Result<()> {
    // The guest maps two adjacent IOVA pages to guest pages that are not adjacent.
    let front_end = FrontEnd::start(vec![
        (GuestAddress(0x9000_0000), GuestAddress(0x5000)),
        (GuestAddress(0x9000_1000), GuestAddress(0x2000)),
    ]);
    let iommu = AskingIommu {
        iotlb: SharedIotlb::new(),
        front_end: Mutex::new(front_end),
    };
    let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    let memory = IommuMemory::new(physical, iommu, true, ());

    // One access to both pages misses twice. The next access hits.
    memory.write_slice(&[7; 0x20], GuestAddress(0x9000_0ff0))?;
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x9000_1000))?, 7);
    let physical = memory.get_backend();
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x5fff))?, 7);
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x2000))?, 7);

    // The guest unmaps a page while a request uses it. The device acknowledges this after the wait.
    let page = GuestAddress(0x9000_0000);
    let request = memory.get_slices(page, 0x10, Permissions::Write)?;
    let invalidation = memory.iommu().iotlb.invalidate_mapping(page, 0x1000);
    assert!(!invalidation.is_done());
    drop(request);
    invalidation.wait(Instant::now() + TIMEOUT)?;

    // An explanation does not ask the front end.
    let refusal = memory.explain(page, 0x10, Permissions::Read);
    println!("{}", refusal.ok_or("the page is mapped")?);
    Ok(())
}
