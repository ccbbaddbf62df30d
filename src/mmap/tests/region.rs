//! One mapping: its options, accessors and errors.

use std::os::fd::AsRawFd;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::*;

/// Returns whether the file is mapped in this process.
///
/// An address would not prove that, because another thread may reuse it.
fn is_mapped(file: &NamedTempFile) -> bool {
    let path = file.path().to_str().unwrap();
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains(path)
}

#[test]
fn mmap_region_accessors_return_arguments_of_constructor() {
    let region = MmapRegion::<()>::new(0x2345).unwrap();
    assert_eq!(
        (region.size(), region.len(), region.prot()),
        (0x2345, 0x2345, BOTH)
    );
    assert_eq!(
        region.flags(),
        libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE
    );
    assert!(region.owned() && region.file_offset().is_none() && region.is_hugetlbfs().is_none());
    assert_eq!(region.as_ptr() as usize % page(), 0);
    assert_eq!(region.as_volatile_slice().len(), 0x2345);
    assert_eq!(
        region.as_volatile_slice().ptr_guard().as_ptr(),
        region.as_ptr().cast_const()
    );
    assert!(matches!(
        VolatileMemory::get_slice(&region, 0x2000, 0x346),
        Err(crate::VolatileMemoryError::OutOfBounds { addr: 0x2346 })
    ));
    assert!(matches!(
        VolatileMemory::get_slice(&region, usize::MAX, 2),
        Err(crate::VolatileMemoryError::Overflow {
            base: usize::MAX,
            offset: 2
        })
    ));

    let flags = libc::MAP_ANONYMOUS | libc::MAP_SHARED;
    let built = MmapRegion::<()>::build(None, 0x1000, libc::PROT_READ, flags).unwrap();
    assert_eq!(
        (built.prot(), built.flags(), built.size()),
        (libc::PROT_READ, flags, 0x1000)
    );

    let (place, len) = (FileOffset::new(file(0x3000), 0x1000), 0x2000);
    place.file().write_all_at(b"in the file", 0x1010).unwrap();
    let mapped = MmapRegion::<()>::from_file(place.clone(), len).unwrap();
    assert_eq!(mapped.flags(), libc::MAP_NORESERVE | libc::MAP_SHARED);
    assert_eq!(mapped.file_offset().unwrap().start(), 0x1000);
    assert!(Arc::ptr_eq(
        mapped.file_offset().unwrap().arc(),
        place.arc()
    ));
    let mut text = [0; 11];
    mapped
        .as_volatile_slice()
        .read_slice(&mut text, 0x10)
        .unwrap();
    assert_eq!(&text, b"in the file");
    mapped.as_volatile_slice().write_slice(b"IN", 0x10).unwrap();
    place.file().read_exact_at(&mut text, 0x1010).unwrap();
    assert_eq!(&text, b"IN the file");
}

#[test]
fn builder_options_reach_the_region() {
    let default = MmapRegionBuilder::<()>::new(0x1000).build().unwrap();
    assert_eq!(
        (default.prot(), default.flags()),
        (BOTH, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
    );
    assert_eq!(
        (default.owned(), default.is_hugetlbfs(), default.size()),
        (true, None, 0x1000)
    );

    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let told = MmapRegionBuilder::new_with_bitmap(0x1000, ())
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(flags)
        .with_hugetlbfs(false)
        .with_file_offset(FileOffset::new(file(0x2000), 0x1000))
        .build()
        .unwrap();
    assert_eq!(
        (told.prot(), told.flags(), told.is_hugetlbfs()),
        (libc::PROT_READ, flags, Some(false))
    );
    assert_eq!(told.file_offset().unwrap().start(), 0x1000);

    let shared = MmapRegionBuilder::<()>::new(0x1000)
        .with_file_offset(FileOffset::new(file(0x1000), 0))
        .build();
    assert_eq!(
        shared.unwrap().flags(),
        libc::MAP_NORESERVE | libc::MAP_SHARED
    );

    let mut noted = default;
    noted.set_hugetlbfs(true);
    assert_eq!(noted.is_hugetlbfs(), Some(true));
    // Only Linux has the method of the trait. Elsewhere, this is the method of `MmapRegion`.
    let region = GuestRegionMmap::new(noted, GuestAddress(0)).unwrap();
    assert_eq!(region.is_hugetlbfs(), Some(true));
}

#[test]
fn drop_unmaps_owned_mapping_and_keeps_borrowed_one() {
    // One page before and one after, so that no other thread's mapping takes the place.
    let outer = MmapRegion::<()>::new(3 * page()).unwrap();
    let inner = outer.as_ptr().wrapping_add(page());
    // SAFETY: 1. `inner` is the start of a readable and writable page of `outer`. 2. `outer`
    // outlives `raw`, which is unmapped below. 3. No reference to a byte of `outer` exists.
    let raw = unsafe { MmapRegion::<()>::build_raw(inner, page(), BOTH, 77) }.unwrap();
    // SAFETY: 1. `inner` is the start of a readable and writable page of `outer`. 2. `outer`
    // outlives `built`, which is dropped below. 3. No reference to a byte of `outer` exists.
    let built = unsafe { MmapRegionBuilder::<()>::new(page()).with_raw_mmap_pointer(inner) }
        .build()
        .unwrap();
    assert_eq!((raw.owned(), raw.flags(), raw.as_ptr()), (false, 77, inner));
    assert_eq!((built.owned(), built.as_ptr()), (false, inner));
    raw.as_volatile_slice().write_obj(5u8, 3).unwrap();
    assert_eq!(built.as_volatile_slice().read_obj::<u8>(3).unwrap(), 5);
    drop(built);
    raw.unmap().unwrap();
    assert_eq!(
        outer
            .as_volatile_slice()
            .read_obj::<u8>(page() + 3)
            .unwrap(),
        5
    );

    // SAFETY: the pointer is not aligned to a page, so no region is made that could break a clause.
    let refused = unsafe { MmapRegion::<()>::build_raw(inner.wrapping_add(1), 1, BOTH, 0) };
    assert!(is_invalid_pointer(&refused.unwrap_err()));
    // SAFETY: the pointer is not aligned to a page, so no region is made that could break a clause.
    let refused =
        unsafe { MmapRegionBuilder::<()>::new(1).with_raw_mmap_pointer(inner.wrapping_add(8)) }
            .build();
    assert!(is_invalid_pointer(&refused.unwrap_err()));

    for unmap in [false, true] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(0x1000).unwrap();
        let place = FileOffset::new(file.as_file().try_clone().unwrap(), 0);
        let region = MmapRegion::<()>::from_file(place, 0x1000).unwrap();
        assert!(is_mapped(&file));
        if unmap {
            region.unmap().unwrap();
        } else {
            drop(region);
        }
        assert!(!is_mapped(&file));
    }
}

/// Returns the number of the error of a system call.
fn os_error(result: std::result::Result<MmapRegion<()>, MmapRegionError>) -> Option<i32> {
    match result {
        Err(MmapRegionError::Mmap(error)) => error.raw_os_error(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn mmap_region_new_with_invalid_size_returns_os_error() {
    assert_eq!(os_error(MmapRegion::new(0)), Some(libc::EINVAL));
    assert_eq!(
        os_error(MmapRegionBuilder::new(0).build()),
        Some(libc::EINVAL)
    );
    assert_eq!(os_error(MmapRegion::new(usize::MAX)), Some(libc::ENOMEM));
}

#[test]
fn from_file_with_invalid_offset_or_read_only_file_returns_os_error() {
    let place = |start| FileOffset::new(file(0x4000), start);
    assert_eq!(
        os_error(MmapRegion::from_file(place(1), 0x1000)),
        Some(libc::EINVAL)
    );
    assert!(matches!(
        MmapRegion::<()>::from_file(place(u64::MAX - 0xfff), 0x2000),
        Err(MmapRegionError::Mmap(_) | MmapRegionError::InvalidOffsetLength)
    ));
    let read_only = FileOffset::new(
        File::open("/etc/hostname")
            .or_else(|_| File::open("/proc/self/exe"))
            .unwrap(),
        0,
    );
    assert_eq!(
        os_error(MmapRegion::from_file(read_only, 1)),
        Some(libc::EACCES)
    );
}

#[test]
fn build_with_map_fixed_returns_error() {
    let fixed = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    assert!(matches!(
        MmapRegion::<()>::build(None, 1, BOTH, fixed),
        Err(MmapRegionError::MapFixed)
    ));
    assert!(matches!(
        MmapRegionBuilder::<()>::new(1)
            .with_mmap_flags(fixed)
            .build(),
        Err(MmapRegionError::MapFixed)
    ));
}

#[test]
fn mapping_past_end_of_file_returns_error_unless_anonymous() {
    let place = |start| FileOffset::new(file(0x4000), start);
    assert!(matches!(
        MmapRegion::<()>::from_file(place(0x1000), 0x4000),
        Err(MmapRegionError::MappingPastEof)
    ));
    assert!(matches!(
        MmapRegionBuilder::<()>::new(0x4001)
            .with_file_offset(place(0))
            .build(),
        Err(MmapRegionError::MappingPastEof)
    ));
    // The flag MAP_ANONYMOUS makes mmap(2) ignore the file.
    let beside = MmapRegion::<()>::build(
        Some(place(0)),
        0x8000,
        BOTH,
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
    );
    assert_eq!(beside.unwrap().size(), 0x8000);
}

/// As documented, and as in 0.18.0: the flags decide whether the file has the bytes.
#[test]
fn file_offset_of_private_or_anonymous_mapping_is_the_stated_one() {
    use std::os::unix::fs::FileExt;
    let place = FileOffset::new(file(0x1000), 0);
    let build = |flags| MmapRegion::<()>::build(Some(place.clone()), 0x1000, BOTH, flags).unwrap();
    let shared = build(libc::MAP_SHARED);
    shared.as_volatile_slice().write_obj(7u8, 0).unwrap();
    for (flags, seen) in [
        (libc::MAP_PRIVATE, 7u8),
        (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0),
        (libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0),
    ] {
        let region = build(flags);
        let slice = region.as_volatile_slice();
        assert_eq!(slice.read_obj::<u8>(0).unwrap(), seen);
        slice.write_obj(9u8, 0).unwrap();
        let mut byte = [0];
        place.file().read_exact_at(&mut byte, 0).unwrap();
        assert_eq!((byte[0], region.flags()), (7, flags));
        assert!(region.file_offset().is_some() && region.fds_overlap(&shared));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn build_at_address_0_is_refused() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let region = MmapRegion::<()>::build(None, 0x1000, libc::PROT_READ | libc::PROT_WRITE, flags);
    match region {
        // qemu-user ignores the flag.
        Ok(region) => assert!(!region.as_ptr().is_null()),
        // EPERM: the process may not map page 0.
        Err(MmapRegionError::Mmap(error)) => {
            assert!(
                matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)),
                "{error}"
            );
        }
        Err(error) => panic!("{error}"),
    }
}

/// Creates a region that claims a range of a file, and borrows another mapping.
fn placed(file: &Arc<File>, start: u64, size: usize, host: &MmapRegion) -> MmapRegion {
    let builder =
        MmapRegionBuilder::new(size).with_file_offset(FileOffset::from_arc(file.clone(), start));
    // SAFETY: clause 1 does not hold if `size` is larger than `host`. But no slice of the region is
    // made, so no byte of it is accessed.
    unsafe { builder.with_raw_mmap_pointer(host.as_ptr()) }
        .build()
        .unwrap()
}

fn check_overlap(
    a: u64,
    b: u64,
    (a_len, b_len): (usize, usize),
    same: bool,
) -> Result<(), TestCaseError> {
    let host = MmapRegion::new(0x1000).unwrap();
    let one = Arc::new(File::open("/dev/zero").unwrap());
    let other = if same {
        one.clone()
    } else {
        Arc::new(File::open("/dev/zero").unwrap())
    };
    prop_assert_eq!(one.as_raw_fd() == other.as_raw_fd(), same);
    let wide = |start: u64, len: usize| {
        (
            u128::from(start << 12),
            u128::from(start << 12) + len as u128,
        )
    };
    let ((a0, a1), (b0, b1)) = (wide(a, a_len), wide(b, b_len));
    let (left, right) = (
        placed(&one, a << 12, a_len, &host),
        placed(&other, b << 12, b_len, &host),
    );
    prop_assert_eq!(left.fds_overlap(&right), same && a0 < b1 && b0 < a1);
    prop_assert_eq!(right.fds_overlap(&left), same && a0 < b1 && b0 < a1);
    prop_assert!(!left.fds_overlap(&host) && !host.fds_overlap(&left));
    Ok(())
}

proptest! {
    #[test]
    fn fds_overlap_agrees_with_wide_arithmetic(
        a in prop_oneof![0u64..6, (u64::MAX >> 12) - 5..=u64::MAX >> 12],
        b in prop_oneof![0u64..6, (u64::MAX >> 12) - 5..=u64::MAX >> 12],
        (a_len, b_len) in (1usize..0x4000, 1usize..0x4000),
        same in any::<bool>(),
    ) {
        check_overlap(a, b, (a_len, b_len), same)?;
    }
}

/// Returns whether the error is that of an existing mapping that does not start at a page boundary.
fn is_invalid_pointer(error: &MmapRegionError) -> bool {
    #[cfg(feature = "xen")]
    return matches!(error, MmapRegionError::Mmap(e) if e.raw_os_error() == Some(libc::EINVAL));
    #[cfg(not(feature = "xen"))]
    matches!(error, MmapRegionError::InvalidPointer)
}
