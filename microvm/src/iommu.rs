//! What devices see of guest memory: all of it, or with `--iommu` what the driver has mapped for them.
//!
//! The driver gives the device I/O virtual addresses. It maps the buffers of a request before it sends it, maps them again
//! while the device is at work, and unmaps them when it is done; no address is used twice. Writes are marked by guest
//! address, so that everything that is compared at the end is what it is without an IOMMU.

use std::time::{Duration, Instant};

use vm_memory::iommu::{Invalidation, MarkedIommuMemory, SharedIotlb};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryAtomic, Permissions};

use crate::memory::{GuestRam, PAGE};

/// Guest memory as devices see it.
pub type DeviceRam = MarkedIommuMemory<GuestRam, SharedIotlb>;

/// Where I/O virtual addresses begin: no guest memory lies there.
const FIRST: u64 = 1 << 40;
/// How long the driver waits for an invalidation.
const PATIENCE: Duration = Duration::from_secs(30);

/// Guest memory for devices, behind an IOMMU if there is an IOTLB. Regions may come and go.
pub fn for_devices(ram: &GuestRam, iotlb: Option<SharedIotlb>) -> GuestMemoryAtomic<DeviceRam> {
    let on = iotlb.is_some();
    GuestMemoryAtomic::new(DeviceRam::by_guest_address(
        ram.clone(),
        iotlb.unwrap_or_default(),
        on,
    ))
}

/// Memory whose pages a device can name by their guest addresses.
pub trait DeviceMemory: GuestMemory {
    /// The guest addresses and lengths of what lies at `addr`; nothing where nothing is mapped.
    fn guest_ranges(&self, addr: u64, len: u64) -> Vec<(u64, u64)>;
}

impl DeviceMemory for GuestRam {
    fn guest_ranges(&self, addr: u64, len: u64) -> Vec<(u64, u64)> {
        vec![(addr, len)]
    }
}

impl DeviceMemory for DeviceRam {
    fn guest_ranges(&self, addr: u64, len: u64) -> Vec<(u64, u64)> {
        if !self.get_iommu_enabled() {
            return vec![(addr, len)];
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // Not counted: this is the book-keeping's, and no device's.
        let snapshot = self.iommu().snapshot();
        let found = vm_memory::Iotlb::lookup(&*snapshot, GuestAddress(addr), len, Permissions::No);
        found.map_or_else(
            |_| Vec::new(),
            |found| {
                found
                    .map(|piece| (piece.base.0, piece.length as u64))
                    .collect()
            },
        )
    }
}

/// What a driver did with the IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages mapped for requests.
    pub mapped: u64,
    /// Of those, pages mapped again while the device was at work.
    pub in_flight: u64,
    /// Pages unmapped when their request was done.
    pub unmapped: u64,
    /// Invalidations that were not done when the driver's patience was.
    pub pending: u64,
    /// Mappings that were refused.
    pub refused: u64,
}

/// A page that is mapped for a request.
#[derive(Clone, Copy, Debug)]
struct Page {
    iova: u64,
    at: u64,
    access: Permissions,
}

/// The driver's side of the IOMMU.
#[derive(Debug)]
pub struct Mapper {
    iotlb: SharedIotlb,
    next: u64,
    /// Pages of the requests under way.
    live: Vec<Page>,
    /// Pages of the rings and headers.
    pub kept: u64,
    /// What it did so far.
    pub counts: Counts,
}

impl Mapper {
    /// A driver that changes `iotlb`.
    pub fn new(iotlb: SharedIotlb) -> Self {
        Self {
            iotlb,
            next: FIRST,
            live: Vec::new(),
            kept: 0,
            counts: Counts::default(),
        }
    }

    /// Maps `len` bytes at guest address `at` for good, and returns where the device finds them.
    pub fn keep(&mut self, at: u64, len: u64) -> u64 {
        let (iova, pages) = self.place(at, len, Permissions::ReadWrite);
        self.kept += pages.len() as u64;
        iova
    }

    /// Maps `len` bytes at guest address `at` for a request, and returns where the device finds them.
    pub fn for_request(&mut self, at: u64, len: u64, access: Permissions) -> u64 {
        let (iova, pages) = self.place(at, len, access);
        self.counts.mapped += pages.len() as u64;
        self.live.extend(pages);
        iova
    }

    fn place(&mut self, at: u64, len: u64, access: Permissions) -> (u64, Vec<Page>) {
        let (first, end) = (at & !(PAGE - 1), (at + len).div_ceil(PAGE) * PAGE);
        let iova = self.next;
        // A page stays free, so that no two buffers are neighbours.
        self.next += end - first + PAGE;
        let page = |at: u64| Page {
            iova: iova + (at - first),
            at,
            access,
        };
        let pages: Vec<_> = (first..end).step_by(PAGE as usize).map(page).collect();
        for page in &pages {
            self.map(*page);
        }
        (iova + (at - first), pages)
    }

    fn map(&mut self, page: Page) -> Option<Invalidation> {
        let (iova, at) = (GuestAddress(page.iova), GuestAddress(page.at));
        let mapped = self.iotlb.set_mapping(iova, at, PAGE as usize, page.access);
        self.counts.refused += u64::from(mapped.is_err());
        mapped.ok()
    }

    /// Maps the pages of requests under way once more, each by itself and to where it is mapped: a device that is in the middle of one goes on.
    pub fn change_in_flight(&mut self) {
        for page in self.live.clone() {
            self.map(page);
            self.counts.in_flight += 1;
        }
    }

    /// Unmaps the pages of requests that are done, and waits until no device can use them: only then are they the driver's again.
    pub fn requests_are_done(&mut self) {
        let mut gone = Vec::new();
        for page in std::mem::take(&mut self.live) {
            gone.push(
                self.iotlb
                    .invalidate_mapping(GuestAddress(page.iova), PAGE as usize),
            );
            self.counts.unmapped += 1;
        }
        let deadline = Instant::now() + PATIENCE;
        let pending = gone
            .iter()
            .filter(|gone| gone.wait(deadline).is_err())
            .count();
        self.counts.pending += pending as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{harvest, map, Backing, HIGH_START, MIN_MEM};
    use vm_memory::{Bytes, GuestAddressSpace};

    #[test]
    fn a_device_reaches_what_is_mapped_and_marks_it_where_it_is() {
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let iotlb = SharedIotlb::new();
        let device = for_devices(&ram, Some(iotlb.clone())).memory();
        let mut mapper = Mapper::new(iotlb);
        let at = HIGH_START + PAGE - 4;
        let iova = mapper.for_request(at, 8, Permissions::Write);
        assert_eq!(device.guest_ranges(iova, 8), [(at, 8)]);
        device.write_obj(7_u64, GuestAddress(iova)).unwrap();
        assert!(device.read_obj::<u64>(GuestAddress(iova)).is_err());
        assert_eq!(ram.read_obj::<u64>(GuestAddress(at)).unwrap(), 7);
        let dirty = harvest(&ram);
        assert_eq!((dirty.count(), dirty.first()), (2, Some(HIGH_START)));

        mapper.change_in_flight();
        assert_eq!(device.guest_ranges(iova, 8).len(), 1);
        mapper.requests_are_done();
        assert!(device.write_obj(7_u64, GuestAddress(iova)).is_err());
        assert!(device.guest_ranges(iova, 8).is_empty());
        let counts = Counts {
            mapped: 2,
            in_flight: 2,
            unmapped: 2,
            ..Counts::default()
        };
        assert_eq!(mapper.counts, counts);
    }

    #[test]
    fn without_an_iommu_addresses_are_guest_addresses() {
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let device = for_devices(&ram, None).memory();
        device.write_obj(7_u8, GuestAddress(5)).unwrap();
        assert_eq!(device.guest_ranges(5, 1), ram.guest_ranges(5, 1));
        assert_eq!(harvest(&ram).count(), 1);
    }
}
