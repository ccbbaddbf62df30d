//! Runs of host memory join regions that are adjacent in guest memory and in host memory.
#![cfg(feature = "backend-mmap")]
#![expect(unsafe_code, reason = "places regions in one mapping")]

use std::sync::Arc;

use test_support::PAGE;
use vm_memory::guest_memory::HostRun;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion, Permissions,
};

/// Creates a region of one page for each pair (page of guest memory, page of one mapping).
fn placed(pages: &[(u64, usize)], permissions: Permissions) -> GuestMemoryMmap {
    let mapping: Arc<MmapRegion> = Arc::new(MmapRegion::new(16 * PAGE).unwrap());
    let regions = pages.iter().map(|&(guest, host)| {
        let at = mapping.as_ptr().wrapping_add(host * PAGE);
        let builder = MmapRegionBuilder::<()>::new(PAGE)
            .with_owner(Arc::clone(&mapping))
            .with_permissions(permissions);
        // SAFETY: the page is in `mapping`, which the region owns, and which is readable and
        // writable. No Rust reference to it exists.
        let builder = unsafe { builder.with_raw_mmap_pointer(at) };
        GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(guest * 0x1000)).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.collect()).unwrap()
}

fn read_write(pages: &[(u64, usize)]) -> GuestMemoryMmap {
    placed(pages, Permissions::ReadWrite)
}

/// Returns the guest address and the length of each run, after checking its host addresses.
fn runs(memory: &GuestMemoryMmap, addr: u64, count: usize) -> Vec<(u64, usize)> {
    let runs = memory.host_runs(GuestAddress(addr), count, Permissions::ReadWrite);
    let runs: Vec<HostRun> = runs.unwrap().collect::<Result<_, _>>().unwrap();
    for run in &runs {
        for byte in [0, run.len / 2, run.len - 1] {
            let guest = GuestAddress(run.addr.0 + byte as u64);
            let host = memory.get_host_address(guest).unwrap();
            assert_eq!(host, run.host.wrapping_add(byte), "{run:?}, byte {byte}");
        }
    }
    runs.iter().map(|run| (run.addr.0, run.len)).collect()
}

#[test]
fn host_runs_join_regions_adjacent_in_guest_and_host() {
    let memory = read_write(&[(0, 0), (1, 1), (2, 2), (3, 5), (4, 6), (5, 4)]);
    assert_eq!(runs(&memory, 0, 3 * PAGE), [(0, 3 * PAGE)]);
    assert_eq!(runs(&memory, 0xff0, 0x20), [(0xff0, 0x20)]);
    assert_eq!(
        runs(&memory, 0x800, 5 * PAGE),
        [(0x800, 0x2800), (0x3000, 2 * PAGE), (0x5000, 0x800)]
    );
    assert_eq!(runs(&memory, 0x2fff, 1), [(0x2fff, 1)]);
    assert_eq!(runs(&memory, 0x1000, 0), []);
    assert_eq!(runs(&memory, 0x100_0000, 0), []);
}

#[test]
fn host_runs_across_hole_or_in_descending_order_do_not_join() {
    // Guest page 1 is a hole. Host pages 2 and 1 are in descending order.
    let memory = read_write(&[(0, 0), (2, 2), (3, 1)]);
    assert_eq!(
        runs(&memory, 0x2000, 2 * PAGE),
        [(0x2000, PAGE), (0x3000, PAGE)]
    );
    let mut across = memory
        .host_runs(GuestAddress(0x800), PAGE, Permissions::Read)
        .unwrap();
    assert_eq!(across.next().unwrap().unwrap().len, 0x800);
    assert!(matches!(
        across.next(),
        Some(Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(
            0x1000
        ))))
    ));
    assert!(across.next().is_none() && across.next().is_none());
    let mut outside = memory
        .host_runs(GuestAddress(u64::MAX), 2, Permissions::No)
        .unwrap();
    assert!(outside.next().unwrap().is_err() && outside.next().is_none());
}

#[test]
fn host_runs_without_permission_return_error() {
    let memory = placed(&[(0, 0), (1, 1)], Permissions::Read);
    let first = |access| {
        let mut runs = memory.host_runs(GuestAddress(0), 2 * PAGE, access).unwrap();
        runs.next().unwrap()
    };
    assert_eq!(first(Permissions::Read).unwrap().len, 2 * PAGE);
    for access in [Permissions::Write, Permissions::ReadWrite] {
        assert!(matches!(
            first(access),
            Err(GuestMemoryError::HostAddressNotAvailable)
        ));
    }
}

#[cfg(feature = "iommu")]
#[test]
fn host_runs_behind_iommu_join_mappings_and_have_iovas() {
    use vm_memory::iommu::SharedIotlb;
    use vm_memory::IommuMemory;
    let iotlb = SharedIotlb::new();
    // The pages 0 and 1 are adjacent by guest address and in this process, but not the mappings.
    for (iova, guest) in [(0x10, 0), (0x11, 1), (0x12, 3), (0x13, 0)] {
        let (iova, guest) = (GuestAddress(iova * 0x1000), GuestAddress(guest * 0x1000));
        let access = match guest.0 {
            0x1000 => Permissions::ReadWrite,
            _ => Permissions::Read,
        };
        iotlb.set_mapping(iova, guest, PAGE, access).unwrap();
    }
    let memory = read_write(&[(0, 0), (1, 1), (2, 2), (3, 3)]);
    let memory = IommuMemory::new(memory, iotlb.clone(), true, ());
    let start = GuestAddress(0x1_0800);
    let runs = memory
        .host_runs(start, 3 * PAGE, Permissions::Read)
        .unwrap();
    let removed = iotlb.invalidate_all();
    let places: Vec<_> = runs
        .map(|run| run.map(|run| (run.addr.0, run.len)))
        .collect();
    let expected = [(0x1_0800, 0x1800), (0x1_2000, PAGE), (0x1_3000, 0x800)];
    assert_eq!(places.len(), 3);
    for (place, expected) in places.into_iter().zip(expected) {
        assert_eq!(place.unwrap(), expected);
    }
    assert!(removed.is_done());
    assert!(memory.host_runs(start, 1, Permissions::Read).is_err());
}
