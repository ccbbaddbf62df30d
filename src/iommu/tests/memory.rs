//! [`IommuMemory`]: permissions, scattered ranges, errors, and its parts.

use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend, GuestMemorySliceIterator};

#[test]
fn iommu_memory_switched_off_uses_guest_addresses() {
    let mut memory = memory(&[(0x80, 0x100, 8, ReadWrite)]);
    assert!(memory.get_iommu_enabled() && memory.physical_memory().is_none());
    memory.write_obj(0x11u8, GuestAddress(0x82)).unwrap();
    assert_eq!(marked(memory.bitmap()), [0x82]);
    let backend = memory.get_backend();
    assert_eq!(backend.read_obj::<u8>(GuestAddress(0x102)).unwrap(), 0x11);
    assert!(backend.iter().all(|r| marked((**r).bitmap()).is_empty()));

    memory.set_iommu_enabled(false);
    assert!(!memory.get_iommu_enabled());
    assert!(std::ptr::eq(
        memory.physical_memory().unwrap(),
        memory.get_backend()
    ));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x102)).unwrap(), 0x11);
    memory.write_obj(0x22u8, GuestAddress(0x103)).unwrap();
    assert_eq!(marked(memory.bitmap()), [0x82]);
    assert_eq!(
        marked((**memory.get_backend().iter().last().unwrap()).bitmap()),
        [3]
    );
    assert!(matches!(
        memory.read_obj::<u8>(GuestAddress(0x82)),
        Err(MemoryError::InvalidGuestAddress(GuestAddress(0x82)))
    ));
    let slices = memory
        .get_slices(GuestAddress(0x104), 2, Write)
        .unwrap()
        .stop_on_error()
        .unwrap();
    slices.for_each(|slice| slice.copy_from(&[1u8, 1]));
    assert_eq!(
        marked((**memory.get_backend().iter().last().unwrap()).bitmap()),
        [3, 4, 5]
    );
    assert_eq!(
        memory
            .contiguous_slice(GuestAddress(0x100), 64, Write)
            .unwrap()
            .len(),
        64
    );
    assert!(memory
        .contiguous_slice(GuestAddress(0x100), 65, Write)
        .is_none());
    assert!(
        memory.check_range(GuestAddress(0), 64, ReadWrite)
            && !memory.check_range(GuestAddress(0), 65, Read)
    );
}

#[test]
fn iommu_memory_with_each_permission_allows_only_that() {
    for granted in [No, Read, Write, ReadWrite] {
        let memory = memory(&[(0, 0, 16, granted)]);
        for wanted in [No, Read, Write, ReadWrite] {
            let allowed = granted.allow(wanted);
            assert_eq!(memory.check_range(GuestAddress(4), 8, wanted), allowed);
            assert!(memory
                .contiguous_slice(GuestAddress(4), 8, wanted)
                .is_none());
            assert_eq!(
                memory.get_slices(GuestAddress(4), 8, wanted).is_ok(),
                allowed
            );
        }
        let at = GuestAddress(8);
        let (reads, writes) = (granted.allow(Read), granted.has_write());
        assert_eq!(!unresolved(memory.read_obj::<u32>(at)), reads);
        assert_eq!(!unresolved(memory.load::<u32>(at, Ordering::SeqCst)), reads);
        assert_eq!(
            !unresolved(memory.write_volatile_to(at, &mut vec![], 4)),
            reads
        );
        assert_eq!(!unresolved(memory.write_obj(1u32, at)), writes);
        assert_eq!(
            !unresolved(memory.store(1u32, at, Ordering::SeqCst)),
            writes
        );
        assert_eq!(
            !unresolved(memory.read_volatile_from(at, &mut [1u8; 4].as_slice(), 4)),
            writes
        );
        assert_eq!(
            marked(memory.bitmap()),
            if writes { vec![8, 9, 10, 11] } else { vec![] }
        );
    }
}

#[test]
fn write_slice_to_scattered_range_keeps_order_of_iovas() {
    let memory = memory(&[
        (0x40, 0x110, 4, ReadWrite),
        (0x44, 8, 4, ReadWrite),
        (0x48, 0x100, 8, ReadWrite),
    ]);
    let data: Vec<u8> = (1..=16).collect();
    memory.write_slice(&data, GuestAddress(0x40)).unwrap();
    assert_eq!(marked(memory.bitmap()), (0x40..0x50).collect::<Vec<_>>());
    let at = |addr| {
        memory
            .get_backend()
            .read_obj::<[u8; 4]>(GuestAddress(addr))
            .unwrap()
    };
    assert_eq!([at(0x110), at(8), at(0x100), at(0x104)].concat(), data);
    assert_eq!(
        memory.read_obj::<[u8; 16]>(GuestAddress(0x40)).unwrap(),
        *data
    );

    // A contiguous value is loaded atomically; a scattered one cannot be.
    assert_eq!(
        memory
            .load::<u32>(GuestAddress(0x44), Ordering::SeqCst)
            .unwrap()
            .to_ne_bytes(),
        [5, 6, 7, 8]
    );
    for iova in [0x40, 0x42] {
        let result = memory.store(1u64, GuestAddress(iova), Ordering::SeqCst);
        assert!(
            matches!(result, Err(MemoryError::InvalidBackendAddress)),
            "{result:?}"
        );
        let result = memory.load::<u64>(GuestAddress(iova), Ordering::SeqCst);
        assert!(
            matches!(result, Err(MemoryError::InvalidBackendAddress)),
            "{result:?}"
        );
    }
    assert!(matches!(
        memory.store(1u32, GuestAddress(0x49), Ordering::SeqCst),
        Err(MemoryError::InvalidBackendAddress)
    ));
    assert!(unresolved(
        memory.load::<u64>(GuestAddress(0x4c), Ordering::SeqCst)
    ));
    assert_eq!(
        memory.read_obj::<[u8; 16]>(GuestAddress(0x40)).unwrap(),
        *data
    );
}

#[test]
fn write_outside_physical_memory_reports_bytes_before() {
    let memory = memory(&[
        (0, 0x130, 0x20, ReadWrite),
        (0x40, 0x1000, 8, ReadWrite),
        (0x80, u64::MAX - 7, 8, Read),
    ]);
    assert!(memory.check_range(GuestAddress(0), 0x10, Write));
    assert!(!memory.check_range(GuestAddress(0), 0x11, Write));
    assert_eq!(memory.write(&[1; 0x20], GuestAddress(0)).unwrap(), 0x10);
    assert_eq!(marked(memory.bitmap()), (0..0x10).collect::<Vec<_>>());
    assert!(matches!(
        memory.write_slice(&[1; 0x20], GuestAddress(0)),
        Err(MemoryError::PartialBuffer {
            expected: 0x20,
            completed: 0x10
        })
    ));
    assert!(matches!(
        memory.read_obj::<u8>(GuestAddress(0x10)),
        Err(MemoryError::InvalidGuestAddress(GuestAddress(0x140)))
    ));
    assert!(matches!(
        memory.load::<u64>(GuestAddress(0x40), Ordering::SeqCst),
        Err(MemoryError::InvalidGuestAddress(GuestAddress(0x1000)))
    ));
    let mut slices = memory.get_slices(GuestAddress(8), 0x10, Write).unwrap();
    assert_eq!(slices.next().unwrap().unwrap().len(), 8);
    assert!(slices.next().unwrap().is_err());
    assert!(slices.next().is_none() && slices.next().is_none());
    assert!(!memory.check_range(GuestAddress(0x80), 8, Read));
    assert!(memory.read(&mut [0; 8], GuestAddress(0x80)).is_err());
}

#[test]
fn write_obj_to_read_only_region_returns_error() {
    let physical = physical(&[(0, 64, ReadWrite), (64, 64, Read)]);
    let memory = IommuMemory::new(physical, RwLock::<Iotlb>::default(), true, bytewise(0x100));
    map(memory.iommu(), &[(0, 0, 128, ReadWrite)]);
    assert!(
        memory.check_range(GuestAddress(0), 128, Read)
            && memory.check_range(GuestAddress(0), 64, Write)
    );
    assert!(
        !memory.check_range(GuestAddress(0), 65, Write)
            && !memory.check_range(GuestAddress(64), 1, Write)
    );
    assert!(matches!(
        memory.write_obj(1u8, GuestAddress(64)),
        Err(MemoryError::HostAddressNotAvailable)
    ));
    assert_eq!(memory.write(&[1; 8], GuestAddress(60)).unwrap(), 4);
    assert_eq!(marked(memory.bitmap()), [60, 61, 62, 63]);
}

#[test]
fn with_replaced_backend_shares_iommu_and_bitmap() {
    let mut first = memory(&[(0, 0, 16, ReadWrite)]);
    let second = first.with_replaced_backend(physical(&[(0, 8, ReadWrite)]));
    let copy = first.clone();
    assert!(Arc::ptr_eq(first.iommu(), second.iommu()) && Arc::ptr_eq(first.iommu(), copy.iommu()));
    assert!(
        Arc::ptr_eq(first.bitmap(), second.bitmap()) && Arc::ptr_eq(first.bitmap(), copy.bitmap())
    );
    first.set_iommu_enabled(false);
    assert!(second.get_iommu_enabled() && copy.get_iommu_enabled());
    assert!(!first
        .with_replaced_backend(Physical::new())
        .get_iommu_enabled());
    let mut by_both = MarkedIommuMemory::by_both(
        physical(&[(0, 8, ReadWrite)]),
        RwLock::<Iotlb>::default(),
        false,
        bytewise(8),
    );
    let other = by_both.with_replaced_backend(Physical::new());
    assert!(
        Arc::ptr_eq(by_both.iommu(), other.iommu())
            && Arc::ptr_eq(by_both.bitmap(), other.bitmap())
    );
    assert!(!other.get_iommu_enabled() && other.get_backend().num_regions() == 0);
    by_both.set_iommu_enabled(true);
    assert!(!other.get_iommu_enabled());
    second.write_obj(7u8, GuestAddress(3)).unwrap();
    assert_eq!(copy.read_obj::<u8>(GuestAddress(3)).unwrap(), 0);
    copy.write_obj(8u8, GuestAddress(4)).unwrap();
    assert_eq!(first.read_obj::<u8>(GuestAddress(4)).unwrap(), 8);
    assert_eq!(marked(first.bitmap()), [3, 4]);
    assert!(
        second.check_range(GuestAddress(0), 8, Read)
            && !second.check_range(GuestAddress(0), 9, Read)
    );

    let default = Memory::default();
    assert!(!default.get_iommu_enabled() && default.get_backend().num_regions() == 0);
    let text = format!("{copy:?}");
    for part in [
        "IommuMemory",
        "backend",
        "iommu",
        "use_iommu: true",
        "bitmap",
    ] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
}

#[test]
fn with_contiguous_slice_holds_iotlb_and_marks_by_iova() {
    let memory = memory(&[(0x80, 0x100, 64, ReadWrite), (0xc0, 0, 64, Read)]);
    let lent = memory.with_contiguous_slice(GuestAddress(0x90), 8, ReadWrite, |slice| {
        let locked = memory.iommu().try_write().is_err();
        (slice.len(), locked, slice.write_obj(7u16, 2).is_ok())
    });
    assert_eq!(lent.unwrap(), Some((8, true, true)));
    assert!(memory.iommu().try_write().is_ok());
    assert_eq!(marked(memory.bitmap()), [0x92, 0x93]);
    assert_eq!(
        memory
            .get_backend()
            .read_obj::<u16>(GuestAddress(0x112))
            .unwrap(),
        7
    );

    let scattered = memory.with_contiguous_slice(GuestAddress(0xb8), 16, Read, |_| ());
    assert!(scattered.unwrap().is_none());
    assert!(unresolved(memory.with_contiguous_slice(
        GuestAddress(0x1),
        8,
        Read,
        |_| ()
    )));
}

#[test]
fn rw_lock_of_iotlb_after_panic_still_translates() {
    let memory = memory(&[(0x80, 0x100, 8, ReadWrite)]);
    let iommu = Arc::clone(memory.iommu());
    std::thread::spawn(move || {
        let _guard = iommu.write().unwrap();
        panic!("expected by the test");
    })
    .join()
    .unwrap_err();
    assert!(memory.iommu().is_poisoned());
    memory.write_obj(1u8, GuestAddress(0x80)).unwrap();
}

#[test]
fn rw_lock_of_iotlb_counts_translations() {
    let memory = memory(&[(0x80, 0x100, 8, ReadWrite)]);
    memory.iommu().write().unwrap().count_lookups();
    memory.read_obj::<u8>(GuestAddress(0x80)).unwrap();
    assert!(unresolved(memory.read_obj::<u8>(GuestAddress(0))));
    let counters = memory.iommu().read().unwrap().counters();
    assert_eq!((counters.hits, counters.misses), (1, 1));
}

/// A miss may be a message to another process.
#[test]
fn access_to_missing_mapping_translates_once() {
    let physical = physical(&[(0, 64, ReadWrite)]);
    let memory = IommuMemory::new(physical, Partial::new(usize::MAX), true, bytewise(64));
    let (addr, order) = (GuestAddress(8), Ordering::SeqCst);
    let accesses: [&dyn Fn() -> bool; 8] = [
        &|| memory.read_obj::<u64>(addr).is_err(),
        &|| memory.write_obj(1u64, addr).is_err(),
        &|| memory.write_slice(&[1; 8], addr).is_err(),
        &|| memory.read(&mut [1; 8], addr).is_err(),
        &|| memory.load::<u64>(addr, order).is_err(),
        &|| memory.store(1u64, addr, order).is_err(),
        &|| memory.write_volatile_to(addr, &mut vec![], 8).is_err(),
        &|| memory.get_slices(addr, 8, Read).is_err(),
    ];
    for (number, access) in (1..).zip(accesses) {
        assert!(access(), "access {number}");
        let translations = memory.iommu().translations.load(Ordering::Relaxed);
        assert_eq!(translations, number);
    }
}

#[test]
fn access_with_short_translation_returns_error() {
    let physical = physical(&[(0, 64, ReadWrite)]);
    let memory = IommuMemory::new(physical, Partial::new(6), true, bytewise(64));
    map(&memory.iommu().iotlb, &[(0, 8, 16, ReadWrite)]);
    assert_eq!(memory.write(&[1; 8], GuestAddress(0)).unwrap(), 6);
    let mut slices = memory.get_slices(GuestAddress(0), 8, Read).unwrap();
    assert_eq!(slices.next().unwrap().unwrap().len(), 6);
    assert!(unresolved(slices.next().unwrap().map(|s| s.len())));
    assert!(slices.next().is_none());
    assert!(memory.contiguous_slice(GuestAddress(0), 8, Read).is_none());
    assert!(memory
        .load::<u64>(GuestAddress(0), Ordering::SeqCst)
        .is_err());
    assert!(memory.check_range(GuestAddress(0), 6, Read));
    assert!(
        !memory.check_range(GuestAddress(0), 8, Read),
        "get_slices has 6 of 8 bytes"
    );
}

/// An IOMMU that translates 8 more bytes than requested.
#[derive(Debug, Default)]
struct Generous(RwLock<Iotlb>);

impl Iommu for Generous {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        self.0.translate(iova, length + 8, access)
    }
}

#[test]
fn access_with_long_translation_uses_only_its_range() {
    let physical = physical(&[(0, 64, ReadWrite)]);
    let memory = IommuMemory::new(physical, Generous::default(), true, bytewise(64));
    map(&memory.iommu().0, &[(0, 56, 16, ReadWrite)]);
    let at = GuestAddress(0);
    // The bytes after the access are not in the physical memory.
    assert!(memory.check_range(at, 8, ReadWrite) && memory.check_range(at, 0, Read));
    memory.write_obj(7u64, at).unwrap();
    assert_eq!(memory.load::<u64>(at, Ordering::SeqCst).unwrap(), 7);
    let lens: Vec<_> = memory
        .get_slices(at, 8, Read)
        .unwrap()
        .map(|s| s.unwrap().len())
        .collect();
    assert_eq!(lens, [8]);
}

/// Returns the range of `length` bytes at `base`.
fn iova_range(base: u64, length: usize) -> IovaRange {
    let base = GuestAddress(base);
    IovaRange { base, length }
}

#[test]
fn iova_range_of_addresses_has_their_start_and_length() {
    for (addresses, range) in [
        (0x10..0x18, iova_range(0x10, 8)),
        (0x18..0x18, iova_range(0x18, 0)),
    ] {
        assert_eq!(IovaRange::try_from(addresses).unwrap(), range);
    }
}

#[test]
fn iova_range_display_shows_first_and_last_address() {
    for (range, shown) in [
        (iova_range(0x10, 8), "0x10-0x17"),
        (iova_range(0x10, 0), "0x10 (empty)"),
        (
            iova_range(u64::MAX, 2),
            "0xffffffffffffffff-0x10000000000000000",
        ),
    ] {
        assert_eq!(range.to_string(), shown);
    }
}

#[test]
fn fragmented_error_names_range_and_contiguous_length() {
    let error = Error::Fragmented {
        iova_range: iova_range(0, 8),
        continuous_length: 4,
    };
    let message = error.to_string();
    assert!(
        message.contains("0x0-0x7") && message.contains("first 4 bytes"),
        "{message}"
    );
}
