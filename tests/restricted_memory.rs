//! A view of some ranges of a memory agrees with a model that decides about each byte.
#![cfg(feature = "backend-mmap")]

use std::io::ErrorKind;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::guest_memory::{
    GuestMemorySliceIterator, Refusal, RefusalReason, RestrictedMemory, RestrictedMemoryError,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

const ALL: [Permissions; 4] = [
    Permissions::No,
    Permissions::Read,
    Permissions::Write,
    Permissions::ReadWrite,
];

/// The regions of the memory: start and length. Two are adjacent.
const REGIONS: [(u64, u64); 3] = [(0x10, 0x40), (0x50, 0x30), (0xa0, 0x40)];
/// No region and no view of the test has this address, or a higher one.
const END: u64 = 0x100;

type Ranges = Vec<(GuestAddress, u64, Permissions)>;

fn memory() -> GuestMemoryMmap {
    let regions = REGIONS.map(|(start, len)| (GuestAddress(start), len as usize));
    let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
    for (start, len) in REGIONS {
        for addr in start..start + len {
            memory.write_obj(addr as u8, GuestAddress(addr)).unwrap();
        }
    }
    memory
}

/// Returns the reason why a byte is not accessible.
fn refusal_of_byte(ranges: &Ranges, addr: u64, access: Permissions) -> Option<RefusalReason> {
    let range = ranges
        .iter()
        .find(|(start, len, _)| (start.0..start.0 + len).contains(&addr));
    match range {
        None | Some((_, _, Permissions::No)) => return Some(RefusalReason::NotInView),
        Some((_, _, granted)) if !granted.allow(access) => {
            return Some(RefusalReason::ViewPermits(*granted))
        }
        Some(_) => {}
    }
    let in_memory = |(start, len): &(u64, u64)| (*start..start + len).contains(&addr);
    (!REGIONS.iter().any(in_memory)).then_some(RefusalReason::Hole)
}

/// Makes ranges of a view: gaps and lengths, in ascending order.
fn ranges() -> impl Strategy<Value = Ranges> {
    let range = (0u64..0x30, 1u64..0x40, 0..4usize);
    prop::collection::vec(range, 0..6).prop_map(|parts| {
        let mut at = 0;
        let mut ranges = Vec::new();
        for (gap, len, access) in parts {
            // Every third range is adjacent to the one before.
            let start = at + if gap % 3 == 0 { 0 } else { gap };
            if start + len <= END {
                ranges.push((GuestAddress(start), len, ALL[access]));
                at = start + len;
            }
        }
        ranges
    })
}

/// Compares all ways to access a range with the model.
fn compare(ranges: &Ranges, addr: u64, len: usize, access: Permissions) -> TestCaseResult {
    let memory = memory();
    let view = RestrictedMemory::new(memory.clone(), ranges.iter().rev().copied()).unwrap();
    let start = GuestAddress(addr);
    let refused_for = |access| {
        (0..len).find_map(|offset| {
            let reason = refusal_of_byte(ranges, addr + offset as u64, access)?;
            Some((offset, reason))
        })
    };
    let reached_for = |access| refused_for(access).map_or(len, |(offset, _)| offset);
    let refused = refused_for(access);

    prop_assert_eq!(view.check_range(start, len, access), refused.is_none());
    let explained = view.explain(start, len, access);
    let found = explained.map(|refusal| (refusal.offset, refusal.reason));
    prop_assert_eq!(found, refused);

    if let Some(slice) = view.contiguous_slice(start, len, access) {
        prop_assert!(refused.is_none() && slice.len() == len);
    }
    check_slices(&view, start, (len, reached_for(access)), access)?;
    let expected = (
        reached_for(Permissions::Read),
        reached_for(Permissions::Write),
    );
    check_accesses(&view, &memory, (start, len), expected)
}

/// Checks that the slices are those of the first `reached` bytes, and then an error if there are
/// more.
fn check_slices(
    view: &RestrictedMemory<GuestMemoryMmap>,
    start: GuestAddress,
    (len, reached): (usize, usize),
    access: Permissions,
) -> TestCaseResult {
    let (mut total, mut error) = (0, None);
    match view.get_slices(start, len, access) {
        Ok(slices) => {
            for slice in slices {
                prop_assert!(error.is_none(), "nothing follows an error");
                match slice {
                    Ok(slice) => total += slice.len(),
                    Err(refused) => error = Some(refused),
                }
            }
        }
        Err(refused) => error = Some(refused),
    }
    prop_assert_eq!((total, error.is_some()), (reached, reached != len));
    // The walk that accesses use agrees with the iterator.
    let mut walked = 0;
    let result = view.get_slices(start, len, access).and_then(|mut slices| {
        slices.try_for_each_slice(|slice| {
            walked += slice.len();
            Ok(())
        })
    });
    prop_assert_eq!((walked, result.is_err()), (reached, reached != len));
    Ok(())
}

/// Checks a read and a write, and the numbers of bytes that they move.
fn check_accesses(
    view: &RestrictedMemory<GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    (start, len): (GuestAddress, usize),
    (readable, writable): (usize, usize),
) -> TestCaseResult {
    let mut buf = vec![0xff; len];
    let read = view.read(&mut buf, start);
    prop_assert_eq!(read.as_ref().ok().copied().unwrap_or(0), readable);
    prop_assert_eq!(read.is_err(), readable == 0 && len != 0);
    for (offset, byte) in buf[..readable].iter().enumerate() {
        prop_assert_eq!(*byte, (start.0 + offset as u64) as u8);
    }
    prop_assert_eq!(view.read_slice(&mut buf, start).is_ok(), readable == len);

    let written = view.write(&vec![0xee; len], start);
    prop_assert_eq!(written.as_ref().ok().copied().unwrap_or(0), writable);
    prop_assert_eq!(written.is_err(), writable == 0 && len != 0);
    for (first, len) in REGIONS {
        for addr in first..first + len {
            let is_written = (start.0..start.0 + writable as u64).contains(&addr);
            let expected = if is_written { 0xee } else { addr as u8 };
            prop_assert_eq!(memory.read_obj::<u8>(GuestAddress(addr)).unwrap(), expected);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn access_to_random_view_agrees_with_model(
        ranges in ranges(),
        addr in 0..END,
        len in 0..0x90usize,
        access in prop::sample::select(&ALL[..]),
    ) {
        compare(&ranges, addr, len, access)?;
    }
}

#[test]
fn access_outside_view_returns_refusal_as_source() {
    let view = RestrictedMemory::new(memory(), [(GuestAddress(0x20), 8, Permissions::Read)]);
    let view = view.unwrap();
    for (addr, is_write, reason) in [
        (0x28, false, RefusalReason::NotInView),
        (0x1f, false, RefusalReason::NotInView),
        (0x20, true, RefusalReason::ViewPermits(Permissions::Read)),
    ] {
        let at = GuestAddress(addr);
        let result = if is_write {
            view.write_obj(1u8, at)
        } else {
            view.read_obj::<u8>(at).map(drop)
        };
        let Err(GuestMemoryError::IOError(error)) = result else {
            panic!("{result:?}");
        };
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let refusal = error
            .get_ref()
            .and_then(|cause| cause.downcast_ref::<Refusal>());
        let refusal = refusal.unwrap();
        assert_eq!(
            (refusal.addr, refusal.offset, refusal.reason),
            (at, 0, reason)
        );
    }
    assert!(view.physical_memory().is_none());
    assert!(view
        .window(GuestAddress(0x20), 9, Permissions::Read)
        .is_err());
    let window = view
        .window(GuestAddress(0x20), 8, Permissions::Read)
        .unwrap();
    assert_eq!(window.read_obj::<u8>(7).unwrap(), 0x27);
    let error = view
        .read_slice(&mut [0; 9], GuestAddress(0x20))
        .unwrap_err();
    assert!(matches!(
        error,
        GuestMemoryError::PartialBuffer {
            expected: 9,
            completed: 8
        }
    ));
}

#[test]
fn new_with_range_that_is_empty_or_overlaps_or_wraps_returns_error() {
    let new = |ranges: &[(u64, u64)]| {
        let ranges = ranges
            .iter()
            .map(|(start, len)| (GuestAddress(*start), *len, Permissions::Read));
        RestrictedMemory::new(memory(), ranges).map(drop)
    };
    let start = GuestAddress(0x30);
    assert_eq!(
        new(&[(0x30, 0)]),
        Err(RestrictedMemoryError::Empty { start })
    );
    for ranges in [[(0x30, 8), (0x20, 0x11)], [(0x20, 0x100), (0x30, 8)]] {
        assert_eq!(new(&ranges), Err(RestrictedMemoryError::Overlap { start }));
    }
    assert_eq!(new(&[(0x20, 0x10), (0x30, 8)]), Ok(()));
    let (start, len) = (GuestAddress(u64::MAX), 2);
    let error = RestrictedMemoryError::PastTheEnd { start, len };
    assert_eq!(new(&[(start.0, len)]), Err(error));
    assert_eq!(new(&[(start.0, 1), (0, u64::MAX)]), Ok(()));
}

#[test]
fn view_up_to_end_of_address_space_refuses_bytes_past_it() {
    let last = (GuestAddress(u64::MAX - 7), 8, Permissions::ReadWrite);
    let view = RestrictedMemory::new(memory(), [last]).unwrap();
    let reason = |addr, len| {
        let refusal = view.explain(GuestAddress(addr), len, Permissions::Read);
        refusal.map(|refusal| (refusal.offset, refusal.reason))
    };
    // The memory has no region there.
    assert_eq!(reason(u64::MAX - 7, 8), Some((0, RefusalReason::Hole)));
    assert_eq!(reason(u64::MAX, usize::MAX), Some((0, RefusalReason::Hole)));
    assert_eq!(reason(u64::MAX - 8, 1), Some((0, RefusalReason::NotInView)));
    for len in [1, 9, usize::MAX] {
        let at = GuestAddress(u64::MAX - 3);
        assert!(!view.check_range(at, len, Permissions::Read));
        assert!(view
            .get_slices(at, len, Permissions::Read)
            .unwrap()
            .stop_on_error()
            .is_err());
    }
}

/// An IOMMU is not asked for an address outside of the view.
#[cfg(feature = "iommu")]
#[test]
fn view_of_memory_behind_iommu_restricts_io_virtual_addresses() {
    use vm_memory::iommu::{IommuMemory, SharedIotlb};

    let iotlb = SharedIotlb::new();
    let iova = GuestAddress(0x8000);
    iotlb
        .set_mapping(iova, GuestAddress(0x10), 0x20, Permissions::ReadWrite)
        .unwrap();
    iotlb.count_lookups();
    let behind = IommuMemory::new(memory(), iotlb.clone(), true, ());
    let ranges = [(GuestAddress(0x8010), 0x100, Permissions::ReadWrite)];
    let view = RestrictedMemory::new(behind, ranges).unwrap();
    assert!(view.read_obj::<u8>(iova).is_err());
    assert!(view.read_obj::<u8>(GuestAddress(0x9000)).is_err());
    assert_eq!(iotlb.counters().misses + iotlb.counters().hits, 0);
    assert_eq!(view.read_obj::<u8>(GuestAddress(0x8010)).unwrap(), 0x20);
    let window = view.window(GuestAddress(0x8010), 0x10, Permissions::Read);
    assert_eq!(window.unwrap().read_obj::<u8>(0xf).unwrap(), 0x2f);
    // Both permit it, and the IOMMU does not map it.
    let refusal = view.explain(GuestAddress(0x8010), 0x20, Permissions::Read);
    let refusal = refusal.unwrap();
    assert_eq!(
        (refusal.offset, refusal.reason),
        (0x10, RefusalReason::NotMapped)
    );
}

#[test]
fn range_without_permissions_lends_no_slice() {
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let ranges = [(GuestAddress(0), 0x1000, Permissions::No)];
    let view = RestrictedMemory::new(memory, ranges).unwrap();
    assert!(!view.check_range(GuestAddress(0), 1, Permissions::No));
    assert!(view
        .get_slices(GuestAddress(0), 1, Permissions::No)
        .is_err());
}
