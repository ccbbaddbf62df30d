//! The driver's side of the IOMMU.
//!
//! The driver maps the buffers of a request before it sends the request, maps them again while the
//! device performs it, and unmaps them afterwards. It uses no I/O virtual address twice. The
//! memory of the devices marks pages by guest address, so the expected dirty pages do not depend on
//! the IOMMU.

use std::time::{Duration, Instant};

use microvm::memory::PAGE;
use vm_memory::iommu::{Invalidation, SharedIotlb};
use vm_memory::{GuestAddress, Permissions};

/// The first I/O virtual address. No guest memory has it.
const FIRST: u64 = 1 << 40;
/// The time within which an invalidation must complete.
const INVALIDATION_TIMEOUT: Duration = Duration::from_secs(30);

/// The number of mapped pages by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that were mapped for the whole run.
    pub permanent: u64,
    /// Pages that were mapped for requests.
    pub mapped: u64,
    /// Pages that were mapped again while the device used them.
    pub remapped: u64,
    /// Pages that were unmapped after their request.
    pub unmapped: u64,
    /// Invalidations that did not complete in time.
    pub pending: u64,
    /// Mappings that the IOTLB refused.
    pub refused: u64,
}

/// A page that is mapped for a request.
#[derive(Clone, Copy, Debug)]
struct Page {
    iova: u64,
    addr: u64,
    access: Permissions,
}

/// Maps the driver's buffers for the device.
#[derive(Debug)]
pub struct Mapper {
    iotlb: SharedIotlb,
    next: u64,
    in_flight: Vec<Page>,
    /// The counts so far.
    pub counts: Counts,
}

impl Mapper {
    /// Creates a mapper that changes `iotlb`.
    pub fn new(iotlb: SharedIotlb) -> Self {
        Self {
            iotlb,
            next: FIRST,
            in_flight: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Maps `len` bytes at guest address `addr` for the whole run. Returns their I/O virtual
    /// address.
    pub fn map_permanently(&mut self, addr: u64, len: u64) -> u64 {
        let (iova, pages) = self.map(addr, len, Permissions::ReadWrite);
        self.counts.permanent += pages.len() as u64;
        iova
    }

    /// Maps `len` bytes at guest address `addr` for a request. Returns their I/O virtual address.
    pub fn map_for_request(&mut self, addr: u64, len: u64, access: Permissions) -> u64 {
        let (iova, pages) = self.map(addr, len, access);
        self.counts.mapped += pages.len() as u64;
        self.in_flight.extend(pages);
        iova
    }

    fn map(&mut self, addr: u64, len: u64, access: Permissions) -> (u64, Vec<Page>) {
        let (first, end) = (addr & !(PAGE - 1), (addr + len).div_ceil(PAGE) * PAGE);
        let iova = self.next;
        // One page stays unmapped, so that no two buffers are adjacent.
        self.next += end - first + PAGE;
        let page = |addr: u64| Page {
            iova: iova + (addr - first),
            addr,
            access,
        };
        let pages: Vec<_> = (first..end).step_by(PAGE as usize).map(page).collect();
        for page in &pages {
            self.map_page(*page);
        }
        (iova + (addr - first), pages)
    }

    fn map_page(&mut self, page: Page) -> Option<Invalidation> {
        let (iova, addr) = (GuestAddress(page.iova), GuestAddress(page.addr));
        let mapped = self
            .iotlb
            .set_mapping(iova, addr, PAGE as usize, page.access);
        self.counts.refused += u64::from(mapped.is_err());
        mapped.ok()
    }

    /// Maps every page in flight again, to the same address. The device must not notice.
    pub fn remap_in_flight(&mut self) {
        for page in self.in_flight.clone() {
            self.map_page(page);
            self.counts.remapped += 1;
        }
    }

    /// Unmaps the pages of completed requests, and waits until no device can use them.
    pub fn unmap_completed(&mut self) {
        let pages = std::mem::take(&mut self.in_flight);
        let unmap = |page: &Page| {
            self.iotlb
                .invalidate_mapping(GuestAddress(page.iova), PAGE as usize)
        };
        let invalidations: Vec<Invalidation> = pages.iter().map(unmap).collect();
        self.counts.unmapped += pages.len() as u64;
        let deadline = Instant::now() + INVALIDATION_TIMEOUT;
        let pending = invalidations
            .iter()
            .filter(|one| one.wait(deadline).is_err());
        self.counts.pending += pending.count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use microvm::memory::{build, harvest, pages, Backing, HIGH_START};
    use vm_memory::{Bytes, GuestAddressSpace};

    use super::*;
    use crate::memory::for_devices;

    #[test]
    fn device_access_after_map_marks_guest_pages_until_unmap() {
        let ram = build(16 << 20, &Backing::Anonymous).unwrap();
        let iotlb = SharedIotlb::new();
        let device = for_devices(&ram, Some(iotlb.clone())).memory();
        let mut mapper = Mapper::new(iotlb);
        let addr = HIGH_START + PAGE - 4;
        let iova = mapper.map_for_request(addr, 8, Permissions::Write);
        device.write_obj(7_u64, GuestAddress(iova)).unwrap();
        assert!(device.read_obj::<u64>(GuestAddress(iova)).is_err());
        assert_eq!(ram.read_obj::<u64>(GuestAddress(addr)).unwrap(), 7);
        assert_eq!(
            pages(&harvest(&ram)),
            [HIGH_START, HIGH_START + PAGE].into()
        );

        mapper.remap_in_flight();
        device.write_obj(8_u64, GuestAddress(iova)).unwrap();
        mapper.unmap_completed();
        assert!(device.write_obj(9_u64, GuestAddress(iova)).is_err());
        let counts = Counts {
            mapped: 2,
            remapped: 2,
            unmapped: 2,
            ..Counts::default()
        };
        assert_eq!(mapper.counts, counts);
    }

    #[test]
    fn device_access_without_iommu_uses_guest_addresses() {
        let ram = build(16 << 20, &Backing::Anonymous).unwrap();
        let device = for_devices(&ram, None).memory();
        device.write_obj(7_u8, GuestAddress(5)).unwrap();
        assert_eq!(pages(&harvest(&ram)), [0].into());
    }
}
