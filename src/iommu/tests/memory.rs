//! [`IommuMemory`] against a map of single I/O virtual addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

use proptest::prelude::*;

use super::*;
use crate::bitmap::Bitmap;
use crate::bytes::Bytes;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend, GuestMemorySliceIterator};
use crate::region::GuestMemoryRegion;
use crate::VolatileMemory;

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
        (0x80, u64::MAX - 7, 16, Read),
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
    assert!(!memory.check_range(GuestAddress(0x80), 16, Read));
    assert!(memory.read(&mut [0; 16], GuestAddress(0x80)).is_err());
}

#[test]
fn write_obj_to_read_only_region_returns_error() {
    let physical = physical(&[(0, 64, BOTH), (64, 64, libc::PROT_READ)]);
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
fn granted_is_limited_by_iommu_region_and_bitmap() {
    let physical = physical(&[(0, 64, BOTH), (64, 64, libc::PROT_READ)]);
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
fn with_replaced_backend_shares_iommu_and_bitmap() {
    let mut first = memory(&[(0, 0, 16, ReadWrite)]);
    let second = first.with_replaced_backend(physical(&[(0, 8, BOTH)]));
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
        physical(&[(0, 8, BOTH)]),
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
    let physical = physical(&[(0, 64, BOTH)]);
    let memory = IommuMemory::new(physical, Partial::new(usize::MAX), true, bytewise(64));
    let asked = |access: &dyn Fn()| {
        let before = memory.iommu().translations.load(Ordering::Relaxed);
        access();
        memory.iommu().translations.load(Ordering::Relaxed) - before
    };
    let addr = GuestAddress(8);
    assert_eq!(asked(&|| assert!(memory.read_obj::<u64>(addr).is_err())), 1);
    assert_eq!(asked(&|| assert!(memory.write_obj(1u64, addr).is_err())), 1);
    assert_eq!(
        asked(&|| assert!(memory.write_slice(&[1; 8], addr).is_err())),
        1
    );
    assert_eq!(
        asked(&|| assert!(memory.read(&mut [1; 8], addr).is_err())),
        1
    );
    assert_eq!(
        asked(&|| assert!(memory.load::<u64>(addr, Ordering::SeqCst).is_err())),
        1
    );
}

#[test]
fn access_with_short_translation_returns_error() {
    let physical = physical(&[(0, 64, BOTH)]);
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

#[test]
fn iova_range_display_shows_first_and_last_address() {
    let range = |base, length| IovaRange {
        base: GuestAddress(base),
        length,
    };
    assert_eq!(IovaRange::try_from(0x10..0x18).unwrap(), range(0x10, 8));
    assert_eq!(IovaRange::try_from(0x18..0x18).unwrap(), range(0x18, 0));
    assert_eq!(range(0x10, 8).to_string(), "0x10-0x17");
    assert_eq!(range(0x10, 0).to_string(), "0x10 (empty)");
    assert_eq!(
        range(u64::MAX, 2).to_string(),
        "0xffffffffffffffff-0x10000000000000000"
    );
    let error = Error::Fragmented {
        iova_range: range(0, 8),
        continuous_length: 4,
    };
    assert_eq!(
        error.to_string(),
        "I/O address range 0x0-0x7 is scattered: only the first 4 bytes are contiguous"
    );
}

/// The method that writes.
#[derive(Clone, Copy, Debug)]
enum WriteMethod {
    Write,
    WriteSlice,
    ReadExactVolatileFrom,
    Store,
}

fn write_method() -> impl Strategy<Value = WriteMethod> {
    prop::sample::select(vec![
        WriteMethod::Write,
        WriteMethod::WriteSlice,
        WriteMethod::ReadExactVolatileFrom,
        WriteMethod::Store,
    ])
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::select(vec![No, Read, Write, ReadWrite, ReadWrite, ReadWrite])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn accesses_to_random_mappings_agree_with_model(
        mappings in prop::collection::vec((0u64..80, 0u64..70, 1usize..24, permissions()), 0..8),
        tracked in 40usize..100,
        read_only in any::<bool>(),
        accesses in prop::collection::vec((0u64..100, 0usize..30, permissions(), write_method(), 3u8..7), 1..20),
    ) {
        // Two adjacent regions, a hole, and a region that may be read-only.
        let prot = if read_only { libc::PROT_READ } else { BOTH };
        let regions = [(0, 20, BOTH), (20, 10, BOTH), (36, 24, prot)];
        let physical = physical(&regions);
        let memory = IommuMemory::new(physical, RwLock::<Iotlb>::default(), true, bytewise(tracked));
        let mut table = BTreeMap::new();
        for (iova, to, length, permissions) in mappings {
            map(memory.iommu(), &[(iova, to, length, permissions)]);
            table.extend((0..length as u64).map(|i| (iova + i, (to + i, permissions))));
        }
        let mut bytes = [0u8; 64];
        for (iova, count, access, method, factor) in accesses {
            let addr = GuestAddress(iova);
            // The region and the guest address of an I/O virtual address.
            let region_at = |iova: u64, access: Permissions| {
                let gpa = table.get(&iova)?.0;
                let &(start, _, prot) = regions.iter().find(|&&(s, l, _)| (s..s + l as u64).contains(&gpa))?;
                (prot == BOTH || !access.has_write()).then_some((start, gpa))
            };
            let range = || (0..count as u64).map(|i| iova + i);
            // A range is translated and tracked as a whole; then accessed as far as memory reaches.
            let translated = |access: Permissions| {
                range().all(|a| table.get(&a).is_some_and(|m| m.1.allow(access)))
                    && (!access.has_write() || count == 0 || iova as usize + count <= tracked)
            };
            let reach = |access| if translated(access) { range().map_while(|a| region_at(a, access)).count() } else { 0 };
            let whole = |access: Permissions| translated(access) && reach(access) == count;

            prop_assert_eq!(memory.check_range(addr, count, access), whole(access));
            match memory.get_slices(addr, count, access) {
                Ok(mut slices) => {
                    prop_assert!(translated(access));
                    let good: usize = slices.by_ref().map_while(|s| s.ok().map(|s| s.len())).sum();
                    prop_assert_eq!(good, reach(access));
                    prop_assert!(slices.next().is_none());
                }
                Err(error) => prop_assert!(!translated(access), "{}", error),
            }
            if let Some(slice) = memory.contiguous_slice(addr, count, access) {
                prop_assert!(whole(access) && slice.len() == count);
            }

            let data: Vec<u8> = range().map(|a| (a as u8).wrapping_mul(factor)).collect();
            let mut buf = vec![0; count];
            let n = reach(Read);
            prop_assert_eq!(memory.read(&mut buf, addr).ok(), (n != 0 || count == 0).then_some(n));
            let expected: Vec<u8> = range().take(n).map(|a| bytes[table[&a].0 as usize]).collect();
            prop_assert_eq!(&buf[..n], &*expected);

            let mut n = reach(Write);
            match method {
                WriteMethod::Write => prop_assert_eq!(memory.write(&data, addr).ok(), (n != 0 || count == 0).then_some(n)),
                WriteMethod::WriteSlice => prop_assert_eq!(memory.write_slice(&data, addr).is_ok(), whole(Write)),
                WriteMethod::ReadExactVolatileFrom => prop_assert_eq!(
                    memory.read_exact_volatile_from(addr, &mut data.as_slice(), count).is_ok(),
                    whole(Write)
                ),
                WriteMethod::Store => {
                    // Contiguous (one mapping, one region, consecutive addresses) and aligned.
                    let at: Vec<_> = range().take(2).filter_map(|a| region_at(a, Write)).collect();
                    let fits = count >= 2
                        && [0, 1].iter().all(|i| table.get(&(iova + i)).is_some_and(|m| m.1.has_write()))
                        && iova as usize + 2 <= tracked
                        // Adjacent mappings with different permissions are two segments.
                        && table.get(&iova).map(|m| m.1) == table.get(&(iova + 1)).map(|m| m.1)
                        && matches!(at[..], [(r, a), (s, b)] if r == s && b == a + 1 && (a - r) % 2 == 0);
                    let value = u16::from_ne_bytes([data.first().copied().unwrap_or(0), data.get(1).copied().unwrap_or(0)]);
                    if count >= 2 {
                        prop_assert_eq!(memory.store(value, addr, Ordering::SeqCst).is_ok(), fits);
                    }
                    n = if fits { 2 } else { 0 };
                }
            }
            let mut marks = BTreeSet::new();
            for (a, byte) in range().zip(&data).take(n) {
                bytes[table[&a].0 as usize] = *byte;
                marks.insert(a as usize);
            }
            prop_assert_eq!(marked(memory.bitmap()), marks.into_iter().collect::<Vec<_>>());
            memory.bitmap().reset();
            for region in memory.get_backend().iter() {
                let start = region.start_addr().0 as usize;
                let mut now = vec![0; region.size()];
                VolatileMemory::as_volatile_slice(&**region).read_slice(&mut now, 0).unwrap();
                prop_assert_eq!(&*now, &bytes[start..start + region.size()]);
                prop_assert!(marked((**region).bitmap()).is_empty());
            }
        }
    }
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
    let regions = [(0, 64, BOTH), (0x100, 64, BOTH)];
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

    // An untracked write fails before it happens (B8); a read needs no mark.
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
