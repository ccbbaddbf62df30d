//! The pages that an access by IOVA marks, and the bitmap in which it marks them.

use std::sync::atomic::Ordering;
use std::sync::RwLock;

use super::*;
use crate::bitmap::Bitmap;
use crate::bytes::Bytes;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;

#[test]
fn granted_is_limited_by_iommu_region_and_bitmap() {
    let physical = physical(&[(0, 64, ReadWrite), (64, 64, Read)]);
    let mut memory = IommuMemory::new(
        physical.clone(),
        RwLock::<Iotlb>::default(),
        true,
        bytewise(0x40),
    );
    map(
        memory.iommu(),
        &[
            (0, 0, 8, ReadWrite),
            (8, 0, 8, Read),
            (16, 0, 8, Write),
            (24, 0, 8, No),
            // Read-only region, untracked, and outside of the physical memory.
            (32, 64, 8, ReadWrite),
            (0x40, 0, 8, ReadWrite),
            (0x48, 0x100, 8, ReadWrite),
        ],
    );
    let granted = |memory: &Memory, at, length| memory.granted(GuestAddress(at), length);
    let expected = [
        (0, 8, Some(ReadWrite)),
        (0, 9, Some(Read)),
        (8, 9, Some(No)),
        (16, 8, Some(Write)),
        (24, 1, Some(No)),
        (32, 8, Some(Read)),
        (0x40, 8, Some(Read)),
        (0x48, 8, None),
        (0x44, 8, None),
        (40, 1, None),
        (u64::MAX, 2, None),
    ];
    for (at, length, expected) in expected {
        assert_eq!(granted(&memory, at, length), expected, "{at:#x}, {length}");
        let marked = MarkedIommuMemory::by_both(
            physical.clone(),
            RwLock::<Iotlb>::default(),
            true,
            bytewise(0x40),
        );
        *marked.iommu().write().unwrap() = memory.iommu().read().unwrap().clone();
        assert_eq!(
            marked.granted(GuestAddress(at), length),
            expected,
            "{at:#x}"
        );
    }
    memory.set_iommu_enabled(false);
    assert_eq!(granted(&memory, 24, 8), Some(ReadWrite));
    assert_eq!(granted(&memory, 60, 8), Some(Read));
    assert_eq!(granted(&memory, 0x80, 8), None);
}

#[test]
fn write_obj_marks_at_iova_and_fails_past_bitmap() {
    let memory = memory(&[(0x1f0, 0x10, 0x20, ReadWrite)]);
    memory.write_obj(1u8, GuestAddress(0x1ff)).unwrap();
    assert!(memory.bitmap().dirty_at(0x1ff));
    let refused = memory.write_obj(1u8, GuestAddress(0x200)).unwrap_err();
    assert!(
        matches!(
            refused,
            MemoryError::IommuError(Error::IommuMisconfigured { .. })
        ),
        "{refused}"
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x200)).unwrap(), 0);
}

#[test]
fn marked_iommu_memory_marks_by_guest_address_and_iova() {
    let mappings = [(0x80, 0x100, 64, ReadWrite), (0xc0, 0, 64, ReadWrite)];
    let iommu = || {
        let iotlb = RwLock::default();
        map(&iotlb, &mappings);
        iotlb
    };
    let regions = [(0, 64, ReadWrite), (0x100, 64, ReadWrite)];
    let in_regions = |memory: &Physical| {
        let regions = memory.iter().map(|region| {
            let start = region.start_addr().0 as usize;
            let slice = region.bitmap();
            (0..64)
                .filter(|byte| slice.dirty_at(*byte))
                .map(|byte| start + byte)
                .collect::<Vec<_>>()
        });
        regions.flatten().collect::<Vec<_>>()
    };

    let (physical_one, physical_two) = (physical(&regions), physical(&regions));
    let mut by_guest = MarkedIommuMemory::by_guest_address(physical_one, iommu(), true);
    let by_both = MarkedIommuMemory::by_both(physical_two, iommu(), true, bytewise(0xc4));
    by_guest.write_slice(&[1; 6], GuestAddress(0xbd)).unwrap();
    by_both.write_slice(&[1; 6], GuestAddress(0xbd)).unwrap();
    let expected = [0, 1, 2, 0x13d, 0x13e, 0x13f];
    assert_eq!(in_regions(by_guest.get_backend()), expected);
    assert_eq!(in_regions(by_both.get_backend()), expected);
    assert_eq!(marked(by_both.bitmap()), (0xbd..0xc3).collect::<Vec<_>>());
    by_both.write_obj(7u8, GuestAddress(0x80)).unwrap();
    let slice = by_both
        .get_slices(GuestAddress(0x82), 2, Write)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    slice.store(7u16, 0, Ordering::SeqCst).unwrap();
    assert_eq!(marked(by_both.bitmap())[..3], [0x80, 0x82, 0x83]);
    assert_eq!(
        in_regions(by_both.get_backend())[3..6],
        [0x100, 0x102, 0x103]
    );

    // An untracked write fails before it happens; a read needs no mark.
    let refused = by_both.write_slice(&[2; 4], GuestAddress(0xc2));
    assert!(matches!(
        refused,
        Err(MemoryError::IommuError(Error::IommuMisconfigured { .. }))
    ));
    assert!(
        !by_both.check_range(GuestAddress(0xc2), 4, Write)
            && by_both.check_range(GuestAddress(0xc2), 4, Read)
    );
    assert_eq!(by_both.read_obj::<u8>(GuestAddress(0xc2)).unwrap(), 1);

    by_guest.set_iommu_enabled(false);
    assert!(by_guest.physical_memory().is_some() && !by_guest.get_iommu_enabled());
    by_guest.write_obj(1u8, GuestAddress(0x120)).unwrap();
    assert!(in_regions(by_guest.get_backend()).contains(&0x120));
    let copy = by_both.clone();
    copy.write_obj(1u8, GuestAddress(0x90)).unwrap();
    assert!(by_both.bitmap().is_bit_set(0x90));
    assert!(format!("{copy:?}").contains("IommuMemory"));
}
