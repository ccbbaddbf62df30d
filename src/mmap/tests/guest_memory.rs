//! Guest regions and guest memory made of mappings.

use super::*;

#[test]
fn guest_region_that_ends_at_2_64_is_refused() {
    let mapping = || MmapRegion::<()>::new(0x1000).unwrap();
    assert!(GuestRegionMmap::new(mapping(), GuestAddress(u64::MAX - 0xfff)).is_none());
    assert!(GuestRegionMmap::new(mapping(), GuestAddress(u64::MAX)).is_none());
    let shared = Arc::new(mapping());
    let region =
        GuestRegionMmap::with_arc(shared.clone(), GuestAddress(u64::MAX - 0x1000)).unwrap();
    assert_eq!(
        (region.start_addr().0, region.last_addr().0),
        (u64::MAX - 0x1000, u64::MAX - 1)
    );
    assert!(Arc::ptr_eq(&region.get_mmap(), &shared));
    assert_eq!(
        (GuestMemoryRegion::len(&region), region.size()),
        (0x1000, 0x1000)
    );
    assert_eq!(
        region.get_host_address(MemoryRegionAddress(0xfff)).unwrap(),
        shared.as_ptr().wrapping_add(0xfff)
    );
    for outside in [0x1000, u64::MAX] {
        assert!(matches!(
            region.get_host_address(MemoryRegionAddress(outside)),
            Err(Error::InvalidBackendAddress)
        ));
        assert!(matches!(
            GuestMemoryRegion::get_slice(&region, MemoryRegionAddress(outside), 1),
            Err(Error::InvalidBackendAddress)
        ));
    }
    assert!(matches!(
        GuestRegionMmap::<()>::from_range(GuestAddress(u64::MAX), 0x1000, None),
        Err(FromRangesError::InvalidGuestRegion)
    ));
    let backing = Some(FileOffset::new(file(0x1000), 0));
    let short = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1001, backing);
    assert!(is_past_eof(&short.unwrap_err()));
}

#[test]
fn from_ranges_returns_memory_or_error() {
    type Memory = GuestMemoryMmap<()>;
    use GuestRegionCollectionError::*;
    let at = GuestAddress;
    let refused = |r: &[(GuestAddress, usize)]| Memory::from_ranges(r).unwrap_err();
    assert!(matches!(
        refused(&[]),
        FromRangesError::Collection(NoMemoryRegion)
    ));
    assert!(matches!(
        refused(&[(at(0x1000), 1), (at(0), 1)]),
        FromRangesError::Collection(UnsortedMemoryRegions)
    ));
    assert!(matches!(
        refused(&[(at(0), 2), (at(1), 1)]),
        FromRangesError::Collection(MemoryRegionOverlap)
    ));
    assert!(matches!(
        refused(&[(at(0), 0)]),
        FromRangesError::MmapRegion(_)
    ));
    assert!(matches!(
        refused(&[(at(u64::MAX), 1)]),
        FromRangesError::InvalidGuestRegion
    ));

    let place = FileOffset::new(file(0x2000), 0x1000);
    write_at(place.file(), &[1, 2, 3, 4], 0x1ffe - 2);
    let ranges = [
        (at(0), 0x1000, Some(place.clone())),
        (at(0x1000), 0x1000, None),
    ];
    let memory = Memory::from_ranges_with_files(ranges.iter()).unwrap();
    memory.write_obj(0xffffu16, at(0xfff)).unwrap();
    assert_eq!(read_at(place.file(), 0x1ffc), [1, 2, 3, 0xff]);
    let region = memory.find_region(at(0)).unwrap();
    assert_eq!(
        GuestMemoryRegion::file_offset(region).unwrap().start(),
        0x1000
    );
    assert!(GuestMemoryRegion::file_offset(memory.find_region(at(0x1000)).unwrap()).is_none());
    assert_eq!(memory.last_addr(), at(0x1fff));
    let short = Memory::from_ranges_with_files([(at(0), 0x3000, Some(place))]).unwrap_err();
    assert!(is_past_eof(&short));
}

#[test]
fn allowed_access_follows_permissions_of_builder() {
    use Permissions::*;
    for (permissions, expected) in [
        (No, No),
        (Read, Read),
        (Write, ReadWrite),
        (ReadWrite, ReadWrite),
    ] {
        let builder = MmapRegionBuilder::<()>::new(0x1000).with_permissions(permissions);
        check_access(builder.build().unwrap(), expected);
    }
}

#[cfg(unix)]
#[test]
fn allowed_access_follows_protection() {
    use Permissions::*;
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    for (prot, expected) in [
        (libc::PROT_NONE, No),
        (libc::PROT_READ, Read),
        (BOTH, ReadWrite),
        (libc::PROT_WRITE, ReadWrite),
        (libc::PROT_READ | libc::PROT_EXEC, Read),
    ] {
        let mapping = MmapRegion::<()>::build(None, 0x1000, prot, flags).unwrap();
        check_access(mapping, expected);
    }
}

/// Checks that guest memory that consists of a mapping permits these accesses and no others.
fn check_access(mapping: MmapRegion, expected: Permissions) {
    use Permissions::*;
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    assert_eq!(region.allowed_access(), expected);
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    for access in [No, Read, Write, ReadWrite] {
        let granted = expected.allow(access);
        assert_eq!(
            GuestMemory::check_range(&memory, GuestAddress(0), 1, access),
            granted
        );
    }
    assert_eq!(
        memory.write_obj(1u8, GuestAddress(0)).is_ok(),
        expected.has_write()
    );
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(0)).is_ok(),
        expected.allow(Read)
    );
}

/// A user's backend that implements only the required methods, with its regions out of order.
struct Bare(Vec<GuestRegionMmap>);

impl GuestMemoryBackend for Bare {
    type R = GuestRegionMmap;
    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.0.iter()
    }
}

#[test]
fn backend_that_implements_only_iter_works() {
    let region = |start| GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).unwrap();
    let memory = Bare(vec![region(0x3000), region(0x1000), region(0x2000)]);
    assert_eq!(
        (memory.num_regions(), memory.last_addr()),
        (3, GuestAddress(0x3fff))
    );
    assert!(
        memory.address_in_range(GuestAddress(0x1000))
            && !memory.address_in_range(GuestAddress(0xfff))
    );
    assert_eq!(memory.check_address(GuestAddress(0x4000)), None);
    assert_eq!(
        memory.checked_offset(GuestAddress(0x1000), 0x2fff),
        Some(GuestAddress(0x3fff))
    );
    assert_eq!(memory.checked_offset(GuestAddress(0x1000), 0x3000), None);
    memory
        .write_slice(&[7; 0x3000], GuestAddress(0x1000))
        .unwrap();
    assert_eq!(
        memory.read_obj::<u64>(GuestAddress(0x1ffc)).unwrap(),
        u64::from_ne_bytes([7; 8])
    );
    assert!(GuestMemory::check_range(
        &memory,
        GuestAddress(0x1000),
        0x3000,
        Permissions::Write
    ));
    assert!(!GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0x1000),
        0x3001
    ));
    let lens: Vec<_> = GuestMemoryBackend::get_slices(&memory, GuestAddress(0x1800), 0x2000)
        .stop_on_error()
        .unwrap()
        .map(|s| s.len())
        .collect();
    assert_eq!(lens, [0x800, 0x1000, 0x800]);
    let host = memory.get_host_address(GuestAddress(0x2005)).unwrap();
    assert_eq!(host, memory.0[2].as_ptr().wrapping_add(5));
    assert!(matches!(
        memory.get_host_address(GuestAddress(0x4000)),
        Err(Error::InvalidGuestAddress(GuestAddress(0x4000)))
    ));
    // `get_slice` ends with the region.
    assert_eq!(
        memory.get_slice(GuestAddress(0x2ff0), 0x10).unwrap().len(),
        0x10
    );
    assert!(matches!(
        memory.get_slice(GuestAddress(0x2ff0), 0x11),
        Err(Error::InvalidBackendAddress)
    ));
    assert!(Bare(vec![])
        .physical_memory()
        .is_some_and(|m| m.last_addr() == GuestAddress(0)));
}

#[test]
fn address_spaces_and_file_offsets_share_their_target() {
    use std::rc::Rc;
    fn reads<S: GuestAddressSpace>(space: S) -> u8 {
        let one = space.clone().memory();
        one.clone().read_obj(GuestAddress(3)).unwrap()
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8)]).unwrap();
    memory.write_obj(5u8, GuestAddress(3)).unwrap();
    assert_eq!(reads(&memory), 5);
    let memory = Arc::new(memory);
    assert_eq!(reads(memory.clone()), 5);
    assert_eq!(reads(Rc::new(Arc::into_inner(memory).unwrap())), 5);

    let place = FileOffset::new(file(8), 7);
    let other = FileOffset::from_arc(Arc::clone(place.arc()), 9);
    assert_eq!((place.start(), other.start()), (7, 9));
    assert!(std::ptr::eq(place.file(), other.file()));
}
