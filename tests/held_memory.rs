//! `GuestMemory::held`: slices that stay valid until the view is dropped.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, Permissions,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: usize = 0x1000;

/// Two adjacent regions of a page.
fn memory() -> Memory {
    let ranges = [0, 0x1000].map(|start| (GuestAddress(start), PAGE));
    Memory::from_ranges(&ranges).unwrap()
}

#[test]
fn held_slices_over_regions_write_and_mark() {
    let memory = memory();
    let request = memory.held();
    let slices = GuestMemory::get_slices(&request, GuestAddress(0xff0), 0x20, Permissions::Write);
    let lengths: Vec<usize> = slices
        .unwrap()
        .map(|slice| {
            let slice = slice.unwrap();
            slice.write_obj(7u8, slice.len() - 1).unwrap();
            slice.len()
        })
        .collect();
    assert_eq!(lengths, [0x10, 0x10]);
    let dirty = |region: &vm_memory::GuestRegionMmap<AtomicBitmap>| region.bitmap().dirty_at(0);
    assert!(memory.iter().all(dirty));
    for addr in [0xfff, 0x100f] {
        assert_eq!(memory.read_obj::<u8>(GuestAddress(addr)).unwrap(), 7);
    }
}

#[test]
fn held_slices_end_with_first_error() {
    let memory = memory();
    let request = memory.held();
    let mut slices =
        GuestMemory::get_slices(&request, GuestAddress(0x1800), PAGE, Permissions::Read).unwrap();
    assert_eq!(slices.next().unwrap().unwrap().len(), 0x800);
    let error = slices.next().unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            GuestMemoryError::InvalidGuestAddress(GuestAddress(0x2000))
        ),
        "{error:?}"
    );
    assert!(slices.next().is_none());
}

#[test]
fn held_memory_is_the_memory_for_other_accesses() {
    let memory = memory();
    let request = memory.held();
    request
        .write_obj(0x1122_3344u32, GuestAddress(0xffe))
        .unwrap();
    assert_eq!(
        memory.read_obj::<u32>(GuestAddress(0xffe)).unwrap(),
        0x1122_3344
    );
    assert!(request.check_range(GuestAddress(0), 2 * PAGE, Permissions::Read));
    assert!(!request.check_range(GuestAddress(0), 2 * PAGE + 1, Permissions::Read));
    assert_eq!(request.physical_memory().unwrap().num_regions(), 2);
    assert!(request.hold_translation().is_some());
}

#[cfg(feature = "iommu")]
mod behind_iommu {
    use std::io::ErrorKind;
    use std::num::NonZeroUsize;
    use std::sync::RwLock;

    use super::*;
    use vm_memory::iommu::{IommuMemory, Iotlb, SharedIotlb};

    const IOVA: GuestAddress = GuestAddress(0x1_0000);

    /// Tracks the I/O virtual addresses below 0x20000.
    fn bitmap() -> AtomicBitmap {
        AtomicBitmap::new(0x2_0000, NonZeroUsize::new(PAGE).unwrap())
    }

    #[test]
    fn held_memory_behind_iommu_holds_translation_until_dropped() {
        let iotlb = SharedIotlb::new();
        for page in 0..2 {
            let (iova, addr) = (IOVA.0 + page * 0x1000, (1 - page) * 0x1000);
            iotlb
                .set_mapping(
                    GuestAddress(iova),
                    GuestAddress(addr),
                    PAGE,
                    Permissions::ReadWrite,
                )
                .unwrap();
        }
        let memory = IommuMemory::new(memory(), iotlb, true, bitmap());
        let request = memory.held();
        // An access by address holds nothing.
        request.write_obj(1u8, IOVA).unwrap();
        let (other, len) = (GuestAddress(IOVA.0 + 0x1000), PAGE);
        assert!(memory.iommu().invalidate_mapping(other, len).is_done());

        let mut slices = GuestMemory::get_slices(&request, IOVA, 8, Permissions::Write).unwrap();
        let slice = slices.next().unwrap().unwrap();
        assert!(slices.next().is_none());
        // The iterator, which holds its translation, is gone. The slice is not.
        drop(slices);
        let invalidation = memory.iommu().invalidate_mapping(IOVA, PAGE);
        assert!(!invalidation.is_done());
        slice.write_obj(0x55u8, 3).unwrap();
        let physical = memory.get_backend();
        assert_eq!(physical.read_obj::<u8>(GuestAddress(0x1003)).unwrap(), 0x55);
        // New slices have the new translation.
        assert!(GuestMemory::get_slices(&request, IOVA, 8, Permissions::Write).is_err());
        drop(request);
        assert!(invalidation.is_done());
    }

    #[test]
    fn held_memory_behind_iommu_without_holds_returns_unsupported() {
        let mut iotlb = Iotlb::new();
        iotlb
            .set_mapping(IOVA, GuestAddress(0), PAGE, Permissions::ReadWrite)
            .unwrap();
        let memory = IommuMemory::new(memory(), RwLock::new(iotlb), true, bitmap());
        let request = memory.held();
        let slices = GuestMemory::get_slices(&request, IOVA, 8, Permissions::Read).map(|_| ());
        match slices {
            Err(GuestMemoryError::IOError(error)) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
            }
            other => panic!("{other:?}"),
        }
    }
}
