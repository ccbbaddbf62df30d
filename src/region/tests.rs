//! Tests of regions of third parties, correct and not, and of collections.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::value::AtomicAccess;

/// The registers of a device: not RAM, so they implement [`Bytes`] themselves.
#[derive(Debug)]
struct Registers {
    start: u64,
    bytes: Mutex<Vec<u8>>,
}

fn registers(start: u64, len: usize) -> Registers {
    Registers {
        start,
        bytes: vec![0; len].into(),
    }
}

impl GuestMemoryRegion for Registers {
    type B = ();
    fn len(&self) -> GuestUsize {
        self.bytes.lock().unwrap().len() as u64
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }
    fn bitmap(&self) {}
}

impl Bytes<MemoryRegionAddress> for Registers {
    type E = Error;
    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        self.write_slice(buf, addr).map(|()| buf.len())
    }
    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        self.read_slice(buf, addr).map(|()| buf.len())
    }
    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        let at = addr.0 as usize;
        let mut bytes = self.bytes.lock().unwrap();
        let place = bytes
            .get_mut(at..at + buf.len())
            .ok_or(Error::InvalidBackendAddress)?;
        place.copy_from_slice(buf);
        Ok(())
    }
    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        let at = addr.0 as usize;
        let bytes = self.bytes.lock().unwrap();
        buf.copy_from_slice(
            bytes
                .get(at..at + buf.len())
                .ok_or(Error::InvalidBackendAddress)?,
        );
        Ok(())
    }
    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<()> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn write_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<()> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn store<T: AtomicAccess>(&self, val: T, addr: MemoryRegionAddress, _: Ordering) -> Result<()> {
        self.write_slice(crate::ByteValued::as_slice(&val), addr)
    }
    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, _: Ordering) -> Result<T> {
        self.read_obj(addr)
    }
}

type Collection = GuestRegionCollection<Registers>;

fn collection(
    places: &[(u64, usize)],
) -> std::result::Result<Collection, GuestRegionCollectionError> {
    Collection::from_regions(
        places
            .iter()
            .map(|&(start, len)| registers(start, len))
            .collect(),
    )
}

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
fn non_ram_region_is_accessible_only_through_its_own_bytes() {
    let memory = collection(&[(0x100, 0x10), (0x110, 0x10)]).unwrap();
    let (region, at) = memory.to_region_addr(GuestAddress(0x118)).unwrap();
    assert_eq!((region.start, at), (0x110, MemoryRegionAddress(8)));
    region.write_obj(0x1234u16, at).unwrap();
    assert_eq!(region.read_obj::<u16>(at).unwrap(), 0x1234);
    region.store(7u32, at, Ordering::SeqCst).unwrap();
    assert_eq!(region.load::<u32>(at, Ordering::SeqCst).unwrap(), 7);

    let no_host = |r: Result<()>| matches!(r, Err(Error::HostAddressNotAvailable));
    assert!(no_host(region.get_slice(at, 1).map(|_| ())));
    assert!(no_host(region.as_volatile_slice().map(|_| ())));
    assert!(no_host(region.get_host_address(at).map(|_| ())));
    assert!(no_host(
        memory.get_host_address(GuestAddress(0x118)).map(|_| ())
    ));
    assert!(no_host(
        memory.get_slice(GuestAddress(0x118), 1).map(|_| ())
    ));
    assert!(no_host(
        memory.read_obj::<u8>(GuestAddress(0x118)).map(|_| ())
    ));
    assert!(no_host(memory.write_obj(1u8, GuestAddress(0x118))));
    assert!(no_host(memory.store(
        1u8,
        GuestAddress(0x118),
        Ordering::SeqCst
    )));
    assert!(no_host(
        memory
            .read_volatile_from(GuestAddress(0x118), &mut [1u8].as_slice(), 1)
            .map(|_| ())
    ));
    assert!(!GuestMemory::check_range(
        &memory,
        GuestAddress(0x118),
        1,
        Permissions::No
    ));
    let mut slices = GuestMemoryBackend::get_slices(&memory, GuestAddress(0x118), 16);
    assert!(no_host(slices.next().unwrap().map(|_| ())));
    assert!(slices.next().is_none());
    assert_eq!(region.read_obj::<u32>(at).unwrap(), 7);

    // The provided methods.
    assert_eq!(region.allowed_access(), Permissions::ReadWrite);
    assert!(region.file_offset().is_none());
    #[cfg(target_os = "linux")]
    assert_eq!(region.is_hugetlbfs(), None);
}

#[test]
fn region_address_methods_end_with_region() {
    let region = registers(u64::MAX - 0xf, 0x10);
    assert_eq!(region.last_addr(), GuestAddress(u64::MAX));
    let at = |offset| Some(MemoryRegionAddress(offset));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX)), at(0xf));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX - 0xf)), at(0));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX - 0x10)), None);
    assert_eq!(region.to_region_addr(GuestAddress(0)), None);
    assert_eq!(region.check_address(MemoryRegionAddress(0xf)), at(0xf));
    assert_eq!(region.check_address(MemoryRegionAddress(0x10)), None);
    assert!(region.address_in_range(MemoryRegionAddress(0xf)));
    assert!(!region.address_in_range(MemoryRegionAddress(u64::MAX)));
    assert_eq!(region.checked_offset(MemoryRegionAddress(8), 7), at(0xf));
    assert_eq!(region.checked_offset(MemoryRegionAddress(8), 8), None);
    assert_eq!(
        region.checked_offset(MemoryRegionAddress(8), usize::MAX),
        None
    );

    let memory = Collection::from_regions(vec![region]).unwrap();
    assert_eq!(memory.last_addr(), GuestAddress(u64::MAX));
    assert!(memory.address_in_range(GuestAddress(u64::MAX)));
    assert!(memory.find_region(GuestAddress(0)).is_none());
    assert_eq!(memory.checked_offset(GuestAddress(u64::MAX), 1), None);
    assert_eq!(
        memory.checked_offset(GuestAddress(u64::MAX - 0xf), 0xf),
        Some(GuestAddress(u64::MAX))
    );
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
fn empty_region_contains_no_address() {
    let region = registers(0x1000, 0);
    assert_eq!(region.to_region_addr(GuestAddress(0x1000)), None);
    assert_eq!(region.to_region_addr(GuestAddress(0)), None);
    assert_eq!(region.last_addr(), GuestAddress(0x1000));
    assert_eq!(region.check_address(MemoryRegionAddress(0)), None);
    assert_eq!(region.checked_offset(MemoryRegionAddress(0), 0), None);
    let memory = collection(&[(0xff0, 0x10), (0x1000, 0), (0x1001, 0x10)]).unwrap();
    assert!(memory.find_region(GuestAddress(0x1000)).is_none());
    assert_eq!(
        memory.find_region(GuestAddress(0xfff)).unwrap().start,
        0xff0
    );
    assert_eq!(
        memory.find_region(GuestAddress(0x1001)).unwrap().start,
        0x1001
    );
    assert!(!GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0xff0),
        0x11
    ));
    assert!(GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0x1000),
        0
    ));
    assert!(memory.read_obj::<u8>(GuestAddress(0x1000)).is_err());
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
        "memory regions are not sorted by address"
    );
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

proptest! {
    /// Compares each step with a map, and checks that the previous collection does not change.
    #[test]
    fn insert_region_and_remove_region_agree_with_map(
        steps in prop::collection::vec((any::<bool>(), 0u64..40, 1usize..8, any::<bool>()), 0..40),
        at_top in any::<bool>(),
    ) {
        let mut memory = Collection::new();
        let mut model: BTreeMap<u64, usize> = BTreeMap::new();
        for (insert, place, len, exact) in steps {
            let start = if at_top { u64::MAX - 46 + place } else { place };
            let before: Vec<u64> = memory.iter().map(|r| r.start).collect();
            let list = |m: &Collection| m.iter().map(|r| (r.start, r.len() as usize)).collect::<Vec<_>>();
            let next = if insert {
                let clash = model.iter().any(|(&s, &l)| {
                    (0..l as u64).any(|i| (0..len as u64).any(|j| s + i == start + j))
                });
                let result = memory.insert_region(Arc::new(registers(start, len)));
                prop_assert_eq!(clash, matches!(result, Err(GuestRegionCollectionError::MemoryRegionOverlap)));
                if !clash {
                    model.insert(start, len);
                }
                result.ok()
            } else {
                // Uses the correct length in half of the cases.
                let len = model.get(&start).filter(|_| exact).copied().unwrap_or(len);
                let there = model.get(&start) == Some(&len);
                match memory.remove_region(GuestAddress(start), len as u64) {
                    Ok((rest, removed)) => {
                        prop_assert!(there);
                        prop_assert_eq!((removed.start, removed.len() as usize), (start, len));
                        model.remove(&start);
                        Some(rest)
                    }
                    Err(error) => {
                        prop_assert!(!there && matches!(error, GuestRegionCollectionError::NoMemoryRegion));
                        None
                    }
                }
            };
            prop_assert_eq!(memory.iter().map(|r| r.start).collect::<Vec<_>>(), before);
            memory = next.unwrap_or(memory);
            let expected: Vec<(u64, usize)> = model.iter().map(|(&s, &l)| (s, l)).collect();
            prop_assert_eq!(list(&memory), &*expected);
            prop_assert_eq!(list(&memory.clone()), &*expected);
            prop_assert_eq!(memory.num_regions(), expected.len());
            let last = expected.last().map_or(0, |&(s, l)| s + (l as u64 - 1));
            prop_assert_eq!(memory.last_addr(), GuestAddress(last));
            for probe in (0..50).map(|i| if at_top { u64::MAX - i } else { i }) {
                let found = expected.iter().find(|&&(s, l)| probe >= s && probe - s < l as u64);
                prop_assert_eq!(memory.find_region(GuestAddress(probe)).map(|r| r.start), found.map(|r| r.0));
                prop_assert_eq!(
                    memory.to_region_addr(GuestAddress(probe)).map(|(_, at)| at.0),
                    found.map(|r| probe - r.0)
                );
            }
        }
    }
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

/// Regions that get their slices from a mapping.
#[cfg(feature = "backend-mmap")]
mod of_mappings {
    use super::*;
    use crate::mmap::MmapRegion;
    use crate::volatile_memory::VolatileMemory;

    /// RAM that returns slices of `given` bytes, or of the requested length if that is `None`.
    #[derive(Debug)]
    struct Ram {
        start: u64,
        len: u64,
        given: Option<usize>,
        allowed: Permissions,
        mapping: MmapRegion,
    }

    fn ram(start: u64, len: u64, given: Option<usize>) -> Ram {
        Ram {
            start,
            len,
            given,
            allowed: Permissions::ReadWrite,
            mapping: MmapRegion::new(0x1000).unwrap(),
        }
    }

    impl GuestMemoryRegion for Ram {
        type B = ();
        fn len(&self) -> GuestUsize {
            self.len
        }
        fn start_addr(&self) -> GuestAddress {
            GuestAddress(self.start)
        }
        fn bitmap(&self) {}
        fn get_slice(
            &self,
            offset: MemoryRegionAddress,
            count: usize,
        ) -> Result<VolatileSlice<'_>> {
            if offset
                .0
                .checked_add(count as u64)
                .is_none_or(|end| end > self.len)
            {
                return Err(Error::InvalidBackendAddress);
            }
            Ok(VolatileMemory::get_slice(
                &self.mapping,
                offset.0 as usize,
                self.given.unwrap_or(count),
            )?)
        }
        fn allowed_access(&self) -> Permissions {
            self.allowed
        }
    }
    impl GuestMemoryRegionBytes for Ram {}

    fn whole(region: &Ram) -> Vec<u8> {
        let mut bytes = vec![0; region.len as usize];
        VolatileMemory::as_volatile_slice(&region.mapping)
            .read_slice(&mut bytes, 0)
            .unwrap();
        bytes
    }

    /// An access must not loop, must not shift the bytes that follow, and must count correctly.
    #[test]
    fn access_to_region_with_slices_of_wrong_length_returns_error() {
        for given in [0, 1, 7, 9, 0x100] {
            let memory = GuestRegionCollection::from_regions(vec![
                ram(0, 8, None),
                ram(8, 8, Some(given)),
                ram(16, 8, None),
            ])
            .unwrap();
            let lengths: Vec<_> = GuestMemoryBackend::get_slices(&memory, GuestAddress(4), 20)
                .map(|s| s.map(|s| s.len()).ok())
                .collect();
            assert_eq!(lengths, [Some(4), None]);
            assert_eq!(memory.write(&[1; 20], GuestAddress(4)).unwrap(), 4);
            assert_eq!(memory.read(&mut [0; 20], GuestAddress(4)).unwrap(), 4);
            assert_eq!(
                memory
                    .read_volatile_from(GuestAddress(4), &mut [2u8; 20].as_slice(), 20)
                    .unwrap(),
                4
            );
            let results = [
                memory.write_slice(&[3; 8], GuestAddress(8)),
                memory.read_slice(&mut [0; 8], GuestAddress(8)),
                memory.read_obj::<u64>(GuestAddress(8)).map(|_| ()),
                memory.write_obj(1u64, GuestAddress(8)),
                memory.store(1u64, GuestAddress(8), Ordering::SeqCst),
                memory.read_exact_volatile_from(GuestAddress(8), &mut [3u8; 8].as_slice(), 8),
                memory.write_all_volatile_to(GuestAddress(8), &mut vec![], 8),
            ];
            assert!(
                !GuestMemory::check_range(&memory, GuestAddress(8), 8, Permissions::Read),
                "{given}"
            );
            let regions: Vec<_> = memory.iter().collect();
            assert_eq!(whole(regions[0]), [0, 0, 0, 0, 2, 2, 2, 2]);
            assert_eq!(whole(regions[1]), [0; 8]);
            assert_eq!(whole(regions[2]), [0; 8]);
            for (i, result) in results.into_iter().enumerate() {
                let error = result.unwrap_err();
                let counts = matches!(error, Error::PartialBuffer { completed: 1.., .. });
                assert!(
                    !counts,
                    "result {i} for slices of {given} bytes counts bytes that were not moved: {error:?}"
                );
            }
        }
    }

    #[test]
    fn allowed_access_of_region_is_enforced() {
        for allowed in [
            Permissions::No,
            Permissions::Read,
            Permissions::Write,
            Permissions::ReadWrite,
        ] {
            let region = Ram {
                allowed,
                ..ram(0x10, 0x10, None)
            };
            let at = MemoryRegionAddress(0);
            assert_eq!(region.write_obj(1u8, at).is_ok(), allowed.has_write());
            assert_eq!(
                region.read_obj::<u8>(at).is_ok(),
                allowed.allow(Permissions::Read)
            );
            let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
            for access in [
                Permissions::No,
                Permissions::Read,
                Permissions::Write,
                Permissions::ReadWrite,
            ] {
                let granted = allowed.allow(access);
                let at = GuestAddress(0x18);
                assert_eq!(GuestMemory::check_range(&memory, at, 8, access), granted);
                assert_eq!(memory.contiguous_slice(at, 8, access).is_some(), granted);
                let first = GuestMemory::get_slices(&memory, at, 8, access)
                    .unwrap()
                    .next()
                    .unwrap();
                assert_eq!(first.is_ok(), granted);
            }
            // These methods do not check permissions.
            assert!(GuestMemoryBackend::check_range(
                &memory,
                GuestAddress(0x18),
                8
            ));
            assert!(memory.get_slice(GuestAddress(0x18), 8).is_ok());
        }
    }

    #[test]
    fn bytes_of_region_end_with_region() {
        let region = ram(0x1000, 0x10, None);
        assert_eq!(region.write(&[1; 8], MemoryRegionAddress(0xc)).unwrap(), 4);
        assert_eq!(
            region.read(&mut [0; 8], MemoryRegionAddress(0xc)).unwrap(),
            4
        );
        let past_end = |r: Result<()>| matches!(r, Err(Error::InvalidBackendAddress));
        assert!(past_end(
            region.write(&[1], MemoryRegionAddress(0x10)).map(|_| ())
        ));
        assert!(past_end(
            region
                .read_obj::<u8>(MemoryRegionAddress(u64::MAX))
                .map(|_| ())
        ));
        assert!(past_end(
            region
                .load::<u32>(MemoryRegionAddress(2), Ordering::SeqCst)
                .map(|_| ())
        ));
        let partial = region
            .write_obj(1u64, MemoryRegionAddress(0xc))
            .unwrap_err();
        assert!(matches!(
            partial,
            Error::PartialBuffer {
                expected: 8,
                completed: 4
            }
        ));
        let mut source: &[u8] = &[7; 3];
        assert_eq!(
            region
                .read_volatile_from(MemoryRegionAddress(0), &mut source, 9)
                .unwrap(),
            3
        );
        let mut target = vec![];
        region
            .write_all_volatile_to(MemoryRegionAddress(1), &mut target, 4)
            .unwrap();
        assert_eq!(target, [7, 7, 0, 0]);
    }
}

/// A region that is not mapped in this process.
#[derive(Debug)]
struct Unmapped;

impl GuestMemoryRegion for Unmapped {
    type B = ();
    fn len(&self) -> GuestUsize {
        0x1000
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }
    fn bitmap(&self) {}
}
impl GuestMemoryRegionBytes for Unmapped {}

#[test]
fn access_to_unmapped_region_reports_missing_host_address_before_bounds() {
    let mut bytes = [0; 4];
    for addr in [0, 0xffe, 0x1000, u64::MAX] {
        let error = Unmapped
            .read(&mut bytes, MemoryRegionAddress(addr))
            .unwrap_err();
        assert!(
            matches!(error, Error::HostAddressNotAvailable),
            "{addr:#x}: {error}"
        );
        let error = Unmapped
            .write_obj(1u8, MemoryRegionAddress(addr))
            .unwrap_err();
        assert!(
            matches!(error, Error::HostAddressNotAvailable),
            "{addr:#x}: {error}"
        );
    }
}
