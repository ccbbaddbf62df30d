//! Collections of regions: their construction, their changes, and lookups in them.

use std::sync::Arc;

use super::*;

#[test]
fn regions_from_stops_before_removed_region() {
    let regions = [0, 2, 4].map(|start| registers(start, 2));
    let memory = GuestRegionCollection::from_regions(regions.into()).unwrap();
    assert_eq!(memory.regions_from(GuestAddress(1)).count(), 3);
    let (memory, _) = memory.remove_region(GuestAddress(2), 2).unwrap();
    let starts = memory
        .regions_from(GuestAddress(1))
        .map(|region| region.start);
    assert_eq!(starts.collect::<Vec<_>>(), [0]);
    assert_eq!(memory.regions_from(GuestAddress(2)).count(), 0);
    assert_eq!(memory.regions_from(GuestAddress(5)).count(), 1);
}

#[test]
fn find_region_of_region_past_end_of_address_space_does_not_wrap() {
    for others in [&[][..], &[(0x1000, 0x10)]] {
        let places: Vec<_> = others
            .iter()
            .copied()
            .chain([(u64::MAX - 0xf, 0x20)])
            .collect();
        // Returning an error is also correct.
        let Ok(memory) = collection(&places) else {
            continue;
        };
        for addr in [0, 1, 0xf] {
            assert!(
                !memory.address_in_range(GuestAddress(addr)),
                "{addr:#x} {places:x?}"
            );
            assert!(memory.find_region(GuestAddress(addr)).is_none());
            assert!(memory.check_address(GuestAddress(addr)).is_none());
            assert!(memory.to_region_addr(GuestAddress(addr)).is_none());
        }
        let last = GuestAddress(u64::MAX - 0xf);
        assert!(memory.address_in_range(last));
        assert!(
            !GuestMemoryBackend::check_range(&memory, last, 0x11),
            "{places:x?}"
        );
        assert!(!GuestMemory::check_range(
            &memory,
            last,
            0x20,
            Permissions::Read
        ));
    }
}

#[test]
fn from_regions_empty_unsorted_or_overlapping_returns_error() {
    use GuestRegionCollectionError::*;
    assert!(matches!(collection(&[]), Err(NoMemoryRegion)));
    assert!(matches!(
        collection(&[(0x10, 1), (0, 1)]),
        Err(UnsortedMemoryRegions)
    ));
    assert!(matches!(
        collection(&[(0, 0x11), (0x10, 1)]),
        Err(MemoryRegionOverlap)
    ));
    assert!(matches!(
        collection(&[(0x10, 1), (0x10, 1)]),
        Err(MemoryRegionOverlap)
    ));
    assert_eq!(
        collection(&[(0, 0x10), (0x10, 1)]).unwrap().num_regions(),
        2
    );
    assert!(matches!(
        Collection::from_arc_regions(vec![]),
        Err(NoMemoryRegion)
    ));
    let shared = Arc::new(registers(0, 1));
    assert!(matches!(
        Collection::from_arc_regions(vec![shared.clone(), shared]),
        Err(MemoryRegionOverlap)
    ));
    assert_eq!(
        UnsortedMemoryRegions.to_string(),
        "memory regions are not sorted by address; sort them by start address"
    );
}

#[test]
fn insert_region_refuses_overlap_and_keeps_the_order() {
    for count in [0u64, 1, 2, 16, 17, 40] {
        // Regions of 0x10 bytes, with holes of 0x10 bytes.
        let starts: Vec<_> = (0..count).map(|number| 0x100 + number * 0x20).collect();
        let places: Vec<_> = starts.iter().map(|start| (*start, 0x10)).collect();
        let memory = collection(&places).unwrap_or_else(|_| Collection::new());
        let insert = |start, len| memory.insert_region(Arc::new(registers(start, len)));
        let refused = |start, len| {
            let result = insert(start, len).map(drop);
            assert!(
                matches!(result, Err(GuestRegionCollectionError::MemoryRegionOverlap)),
                "{count} {start:#x}"
            );
        };
        for (number, &start) in starts.iter().enumerate() {
            refused(start, 0x10);
            refused(start + 4, 4);
            // By one byte, on either side, and on both.
            refused(start - 1, 2);
            refused(start + 0xf, 2);
            refused(start - 8, 0x20);
            // The hole is free.
            let grown = insert(start + 0x10, 0x10).unwrap();
            let mut expected = starts.clone();
            expected.insert(number + 1, start + 0x10);
            let found: Vec<_> = grown.iter().map(|region| region.start).collect();
            assert_eq!(found, expected);
        }
        let top = insert(u64::MAX, 1).unwrap();
        let result = top.insert_region(Arc::new(registers(u64::MAX - 1, 2)));
        assert!(
            matches!(result, Err(GuestRegionCollectionError::MemoryRegionOverlap)),
            "{count}"
        );
        assert_eq!(top.last_addr(), GuestAddress(u64::MAX));
    }
}

#[test]
fn new_collection_is_empty() {
    let memory = Collection::new();
    assert_eq!(
        (memory.num_regions(), memory.last_addr()),
        (0, GuestAddress(0))
    );
    assert!(memory.iter().next().is_none() && memory.find_region(GuestAddress(0)).is_none());
    assert!(matches!(
        memory.remove_region(GuestAddress(0), 0),
        Err(GuestRegionCollectionError::NoMemoryRegion)
    ));
    assert_eq!(
        memory
            .insert_region(Arc::new(registers(1, 1)))
            .unwrap()
            .num_regions(),
        1
    );
}

#[test]
#[expect(
    deprecated,
    reason = "deprecated items are tested until they are removed"
)]
fn try_access_over_regions_calls_back_per_segment() {
    let memory = collection(&[(0, 8), (8, 8), (0x20, 8)]).unwrap();
    let mut seen = vec![];
    let total = memory
        .try_access(0x18, GuestAddress(4), |done, wanted, at, region| {
            seen.push((done, wanted, at.0, region.start));
            Ok(wanted.min(5))
        })
        .unwrap();
    assert_eq!(
        (total, seen),
        (12, vec![(0, 4, 4, 0), (4, 8, 0, 8), (9, 3, 5, 8)])
    );
    let stop = memory.try_access(8, GuestAddress(4), |done, _, _, _| {
        Ok(if done == 0 { 3 } else { 0 })
    });
    assert_eq!(stop.unwrap(), 3);
    let hole = memory.try_access(1, GuestAddress(0x10), |_, n, _, _| Ok(n));
    assert!(matches!(
        hole,
        Err(Error::InvalidGuestAddress(GuestAddress(0x10)))
    ));
    let excessive = memory.try_access(1, GuestAddress(0), |_, n, _, _| Ok(n + 1));
    assert!(matches!(excessive, Err(Error::CallbackOutOfRange)));
    let fails = memory.try_access(8, GuestAddress(4), |_, _, _, _| {
        Err(Error::HostAddressNotAvailable)
    });
    assert!(matches!(fails, Err(Error::HostAddressNotAvailable)));
    assert_eq!(
        memory
            .try_access(0, GuestAddress(0), |_, n, _, _| Ok(n))
            .unwrap(),
        0
    );
}
