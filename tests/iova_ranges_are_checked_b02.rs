//! B2: a range of I/O virtual addresses may end at 2^64, but never wraps around.
#![cfg(all(feature = "iommu", feature = "backend-mmap"))]

use std::sync::atomic::Ordering;
use std::sync::RwLock;

use vm_memory::iommu::{Error, IommuMemory, Iotlb, IovaRange, MappedRange, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};
use Permissions::{Read, ReadWrite, Write};

const LAST_PAGE: GuestAddress = GuestAddress(0xffff_ffff_ffff_f000);

fn memory() -> IommuMemory<GuestMemoryMmap, RwLock<Iotlb>> {
    let physical = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    IommuMemory::new(physical, RwLock::default(), true, ())
}

fn lookup(iotlb: &Iotlb, base: GuestAddress, length: usize) -> Option<Vec<MappedRange>> {
    Iotlb::lookup(iotlb, base, length, ReadWrite)
        .ok()
        .map(Iterator::collect)
}

#[test]
fn b02_access_past_end_of_address_space_returns_error() {
    let memory = memory();
    for mapped in [false, true] {
        if mapped {
            let mut iotlb = memory.iommu().write().unwrap();
            iotlb
                .set_mapping(LAST_PAGE, GuestAddress(0x1000), 0x1000, ReadWrite)
                .unwrap();
            iotlb
                .set_mapping(GuestAddress(0), GuestAddress(0x2000), 0x1000, ReadWrite)
                .unwrap();
        }
        for (base, length) in [
            (LAST_PAGE, 0x2000),
            (LAST_PAGE, 0x1001),
            (LAST_PAGE, usize::MAX),
            (GuestAddress(u64::MAX), 2),
            (GuestAddress(1), usize::MAX),
            (GuestAddress(u64::MAX), usize::MAX),
        ] {
            for access in [Permissions::No, Read, Write, ReadWrite] {
                assert!(
                    !memory.check_range(base, length, access),
                    "{base:?} {length:#x} {access:?}"
                );
                assert!(memory.contiguous_slice(base, length, access).is_none());
                if base == GuestAddress(1) {
                    continue; // unmapped, but does not pass the end
                }
                match memory.get_slices(base, length, access).map(|_| ()) {
                    Err(GuestMemoryError::IommuError(Error::CannotResolve {
                        iova_range,
                        reason,
                    })) => {
                        assert_eq!(iova_range, IovaRange { base, length });
                        assert!(reason.contains("end of the address space"), "{reason}");
                    }
                    other => panic!("{other:?}"),
                }
                let iotlb = memory.iommu().read().unwrap();
                let fails = Iotlb::lookup(&*iotlb, base, length, access).unwrap_err();
                assert!(fails.misses.is_empty());
                assert_eq!(fails.access_fails, [IovaRange { base, length }]);
            }
        }
    }
    for at in [u64::MAX - 6, u64::MAX] {
        assert!(memory
            .store(1u64, GuestAddress(at), Ordering::SeqCst)
            .is_err());
        assert!(memory
            .load::<u64>(GuestAddress(at), Ordering::SeqCst)
            .is_err());
        assert!(memory.write_obj(1u64, GuestAddress(at)).is_err());
        assert!(memory.read_obj::<u64>(GuestAddress(at)).is_err());
        assert!(memory
            .read_volatile_from(GuestAddress(at), &mut [1u8; 8].as_slice(), 8)
            .is_err());
    }
    let mut all = [0; 0x4000];
    memory
        .get_backend()
        .read_slice(&mut all, GuestAddress(0))
        .unwrap();
    assert!(all.iter().all(|&b| b == 0));
}

#[test]
fn b02_access_to_last_page_succeeds() {
    let memory = memory();
    memory
        .iommu()
        .write()
        .unwrap()
        .set_mapping(LAST_PAGE, GuestAddress(0x1000), 0x1000, ReadWrite)
        .unwrap();
    assert!(memory.check_range(LAST_PAGE, 0x1000, ReadWrite));
    assert!(memory.check_range(GuestAddress(u64::MAX), 1, ReadWrite));
    let last_value = GuestAddress(u64::MAX - 7);
    memory
        .store(0x1122_3344_5566_7788u64, last_value, Ordering::SeqCst)
        .unwrap();
    assert_eq!(
        memory.load::<u64>(last_value, Ordering::SeqCst).unwrap(),
        0x1122_3344_5566_7788
    );
    assert_eq!(
        memory
            .get_backend()
            .read_obj::<u64>(GuestAddress(0x1ff8))
            .unwrap(),
        0x1122_3344_5566_7788
    );
    memory.write_slice(&[7; 0x1000], LAST_PAGE).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::MAX)).unwrap(), 7);
    let slices = memory.get_slices(LAST_PAGE, 0x1000, Write).unwrap();
    assert_eq!(slices.map(|s| s.unwrap().len()).sum::<usize>(), 0x1000);

    let mut iotlb = memory.iommu().write().unwrap();
    iotlb
        .set_mapping(GuestAddress(u64::MAX), GuestAddress(0x2000), 1, Read)
        .unwrap();
    iotlb.invalidate_mapping(LAST_PAGE, 0x1000);
    assert!(
        lookup(&iotlb, LAST_PAGE, 1).is_none()
            && lookup(&iotlb, GuestAddress(u64::MAX), 1).is_none()
    );
}

#[test]
fn b02_set_mapping_past_end_fails_without_effect() {
    let mut iotlb = Iotlb::new();
    iotlb
        .set_mapping(LAST_PAGE, GuestAddress(0x1000), 0x1000, ReadWrite)
        .unwrap();
    for (base, length) in [
        (LAST_PAGE, 0x1001),
        (LAST_PAGE, usize::MAX),
        (GuestAddress(u64::MAX), 2),
    ] {
        let error = iotlb
            .set_mapping(base, GuestAddress(0), length, Read)
            .unwrap_err();
        assert!(
            matches!(&error, Error::CannotResolve { iova_range, .. } if *iova_range == IovaRange { base, length }),
            "{error}"
        );
        let end = u128::from(base.0) + length as u128 - 1;
        assert!(
            error
                .to_string()
                .contains(&format!("{:#x}-{end:#x}", base.0)),
            "{error}"
        );
    }
    let whole = MappedRange {
        base: GuestAddress(0x1000),
        length: 0x1000,
    };
    assert_eq!(lookup(&iotlb, LAST_PAGE, 0x1000), Some(vec![whole]));
}

#[test]
fn b02_invalidate_mapping_past_end_stops_at_end() {
    let half = GuestAddress(LAST_PAGE.0 + 0x800);
    for length in [0x800, 0x801, usize::MAX] {
        let mut iotlb = Iotlb::new();
        iotlb
            .set_mapping(LAST_PAGE, GuestAddress(0x1000), 0x1000, ReadWrite)
            .unwrap();
        iotlb
            .set_mapping(GuestAddress(0), GuestAddress(0), 0x1000, ReadWrite)
            .unwrap();
        iotlb.invalidate_mapping(half, length);
        assert!(lookup(&iotlb, LAST_PAGE, 0x800).is_some());
        assert!(
            lookup(&iotlb, half, 1).is_none()
                && lookup(&iotlb, GuestAddress(u64::MAX), 1).is_none()
        );
        // The invalidation does not wrap to address 0.
        assert!(lookup(&iotlb, GuestAddress(0), 0x1000).is_some());
    }
    let mut iotlb = Iotlb::new();
    iotlb
        .set_mapping(LAST_PAGE, GuestAddress(0), 0x1000, ReadWrite)
        .unwrap();
    iotlb.invalidate_mapping(GuestAddress(0), usize::MAX);
    // The address space has one address more than the longest range.
    assert!(
        lookup(&iotlb, LAST_PAGE, 1).is_none()
            && lookup(&iotlb, GuestAddress(u64::MAX), 1).is_some()
    );
}

#[test]
fn b02_range_of_length_zero_is_empty() {
    let memory = memory();
    let mut iotlb = Iotlb::new();
    for at in [0, 0x1000, LAST_PAGE.0, u64::MAX].map(GuestAddress) {
        iotlb
            .set_mapping(at, GuestAddress(0), 0, ReadWrite)
            .unwrap();
        assert_eq!(iotlb.entries(), 0);
        assert!(lookup(&iotlb, at, 1).is_none());
        assert_eq!(lookup(&iotlb, at, 0), Some(vec![]));
        iotlb
            .set_mapping(at, GuestAddress(0), 1, ReadWrite)
            .unwrap();
        iotlb.invalidate_mapping(at, 0);
        assert!(lookup(&iotlb, at, 1).is_some());
        assert!(memory.check_range(at, 0, ReadWrite));
        assert_eq!(memory.get_slices(at, 0, Write).unwrap().count(), 0);
        assert_eq!(memory.write(&[], at).unwrap(), 0);
        iotlb.invalidate_all();
    }
}

/// Checks that both kinds of IOTLB refuse a mapping and stay empty. Returns the error.
fn refused_mapping(iova: u64, to: u64, length: usize) -> String {
    let (mut iotlb, shared) = (Iotlb::new(), SharedIotlb::new());
    let (iova, to) = (GuestAddress(iova), GuestAddress(to));
    let error = iotlb.set_mapping(iova, to, length, Read).unwrap_err();
    let of_shared = shared.set_mapping(iova, to, length, Read).unwrap_err();
    assert_eq!((iotlb.entries(), shared.counters().entries), (0, 0));
    assert_eq!(error.to_string(), of_shared.to_string());
    error.to_string()
}

#[test]
fn b02_mapping_whose_target_passes_end_of_address_space_is_refused() {
    for (to, length) in [
        (LAST_PAGE.0, 0x1001),
        (LAST_PAGE.0, 0x2000),
        (u64::MAX, 2),
        (2, usize::MAX),
        (u64::MAX, usize::MAX),
    ] {
        // With IOVA 1, the longest range ends at 2^64.
        for iova in [0x1000u64, 0, 1] {
            let refused = iova.checked_add(length as u64 - 1).is_none();
            let error = refused_mapping(iova, to, length);
            assert!(
                refused || error.contains("its target at guest address"),
                "{error}"
            );
        }
    }
    // A target that ends exactly at 2^64 is accepted.
    Iotlb::new()
        .set_mapping(GuestAddress(0), GuestAddress(1), usize::MAX, Read)
        .unwrap();
    let memory = memory();
    memory
        .iommu()
        .write()
        .unwrap()
        .set_mapping(GuestAddress(0x1000), LAST_PAGE, 0x1000, ReadWrite)
        .unwrap();
    let wrapped = memory.iommu().write().unwrap().set_mapping(
        GuestAddress(0x2000),
        LAST_PAGE,
        0x2000,
        ReadWrite,
    );
    assert!(wrapped.is_err());
    assert!(memory
        .write_slice(&[7; 0x2000], GuestAddress(0x2000))
        .is_err());
    assert_eq!(
        memory
            .get_backend()
            .read_obj::<u64>(GuestAddress(0))
            .unwrap(),
        0
    );
}

/// Two mappings that continue each other across guest address 2^64 stay two.
#[test]
fn b02_mappings_whose_targets_meet_at_2_64_stay_apart() {
    for order in [[0, 1], [1, 0]] {
        let mut iotlb = Iotlb::new();
        for page in order {
            let to = GuestAddress(LAST_PAGE.0.wrapping_add(page * 0x1000));
            iotlb
                .set_mapping(GuestAddress(page * 0x1000), to, 0x1000, ReadWrite)
                .unwrap();
        }
        assert_eq!(iotlb.entries(), 2);
        let range = |base, length| MappedRange { base, length };
        assert_eq!(
            lookup(&iotlb, GuestAddress(0), 0x2000).unwrap(),
            [range(LAST_PAGE, 0x1000), range(GuestAddress(0), 0x1000)]
        );
        iotlb.invalidate_mapping(GuestAddress(0x800), 0x1000);
        assert_eq!(
            lookup(&iotlb, GuestAddress(0x1800), 0x800).unwrap(),
            [range(GuestAddress(0x800), 0x800)]
        );
    }
}
