//! A device behind an IOMMU: the IOTLB starts empty. Each miss is sent to the front end once, with
//! a timeout for the reply. Hits take no lock. An invalidation is acknowledged when it is complete.
//!
//! `cargo run -p examples --example iommu_device`

use std::time::{Duration, Instant};

use examples::front_end::{FrontEnd, PAGE};
use examples::Result;
use vm_memory::iommu::{AskingIommu, IommuMemory, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    // The guest maps two adjacent IOVA pages to guest pages that are not adjacent.
    let mappings = vec![
        (GuestAddress(0x9000_0000), GuestAddress(0x5000)),
        (GuestAddress(0x9000_1000), GuestAddress(0x2000)),
    ];
    let iotlb = SharedIotlb::new();
    let front_end = FrontEnd::start(iotlb.clone(), mappings);
    let iommu = AskingIommu::new(iotlb.clone(), TIMEOUT, front_end);
    let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x8000)])?;
    let memory = IommuMemory::new(physical, iommu, true, ());

    // One access to both pages misses twice. The next access hits.
    memory.write_slice(&[7; 0x20], GuestAddress(0x9000_0ff0))?;
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x9000_1000))?, 7);
    let physical = memory.get_backend();
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x5fff))?, 7);
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x2000))?, 7);
    for mapping in iotlb.mappings(..) {
        println!(
            "{:#x} is mapped to {:#x}",
            mapping.first.0, mapping.target.0
        );
    }

    // The guest unmaps a page while a request uses it. The device acknowledges this after the wait.
    let page = GuestAddress(0x9000_0000);
    let request = memory.get_slices(page, 0x10, Permissions::Write)?;
    let invalidation = iotlb.invalidate_mapping(page, PAGE);
    assert!(!invalidation.is_done());
    drop(request);
    invalidation.wait(Instant::now() + TIMEOUT)?;

    // A device that emulates the IOMMU of the guest refuses to map addresses that are mapped.
    let domain = SharedIotlb::unmerged();
    let addresses = page..=GuestAddress(0x9000_1fff);
    domain.map_range(addresses.clone(), GuestAddress(0), Permissions::Read)?;
    let refused = domain.map_range(page..=page, GuestAddress(0), Permissions::Read);
    println!("{}", refused.err().ok_or("the page is mapped twice")?);
    domain.unmap(addresses)?.wait(Instant::now() + TIMEOUT)?;

    // An explanation does not ask the front end.
    let refusal = memory.explain(page, 0x10, Permissions::Read);
    println!("{}", refusal.ok_or("the page is mapped")?);
    Ok(())
}
