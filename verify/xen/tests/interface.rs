//! Each item that 0.18.0 has with the feature `xen` only still compiles, as users name and call it.
//!
//! `verify/xen-reference` compiles this file with 0.18.0.

use std::fs::File;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, MmapRange, MmapRegion, MmapXenFlags, VolatileArrayRef, VolatileRef,
    VolatileSlice,
};

/// Names each variant once. An additional or a missing variant does not compile.
fn kind(error: &MmapRegionError) -> &'static str {
    match error {
        MmapRegionError::InvalidOffsetLength => "InvalidOffsetLength",
        MmapRegionError::MapFixed => "MapFixed",
        MmapRegionError::MappingPastEof => "MappingPastEof",
        MmapRegionError::Mmap(_) => "Mmap",
        MmapRegionError::InvalidFileOffset => "InvalidFileOffset",
        MmapRegionError::MappedInAdvance => "MappedInAdvance",
        MmapRegionError::MmapFlags(_) => "MmapFlags",
        MmapRegionError::Fam(_) => "Fam",
        MmapRegionError::UnexpectedError => "UnexpectedError",
    }
}

#[test]
fn errors_have_the_published_variants_and_texts() {
    let memory = vmm_sys_util::fam::Error::SizeLimitExceeded;
    let errors = [
        (MmapRegionError::InvalidFileOffset, "InvalidFileOffset"),
        (MmapRegionError::MappedInAdvance, "MappedInAdvance"),
        (MmapRegionError::MmapFlags(0xb), "MmapFlags"),
        (MmapRegionError::Fam(memory), "Fam"),
        (MmapRegionError::UnexpectedError, "UnexpectedError"),
    ];
    for (error, name) in errors {
        assert_eq!(kind(&error), name);
        assert!(!error.to_string().is_empty());
    }
    let flags = MmapRegionError::MmapFlags(0xb).to_string();
    assert!(flags.contains('b'), "{flags}");
}

#[test]
fn flags_have_the_methods_of_bitflags() {
    let mut flags = MmapXenFlags::empty();
    assert!(flags.is_empty() && flags.is_unix() && flags.is_valid());
    flags.insert(MmapXenFlags::GRANT);
    flags.set(MmapXenFlags::NO_ADVANCE_MAP, true);
    assert!(flags.is_grant() && !flags.is_foreign() && !flags.mmap_in_advance());
    assert_eq!(flags, MmapXenFlags::GRANT | MmapXenFlags::NO_ADVANCE_MAP);
    assert_eq!(MmapXenFlags::from_bits(10), Some(flags));
    assert_eq!(MmapXenFlags::from_bits_truncate(0x1a), flags);
    assert_eq!(MmapXenFlags::from_bits_retain(0x4).bits(), 0x4);
    assert_eq!(MmapXenFlags::from_name("GRANT"), Some(MmapXenFlags::GRANT));
    assert_eq!(MmapXenFlags::all().bits(), 0xb);
    assert!(MmapXenFlags::all().is_all() && MmapXenFlags::all().contains(flags));
    assert!(flags.intersects(MmapXenFlags::ALL));
    assert_eq!(flags - MmapXenFlags::GRANT, MmapXenFlags::NO_ADVANCE_MAP);
    assert_eq!(flags & MmapXenFlags::GRANT, MmapXenFlags::GRANT);
    assert_eq!(flags ^ flags, MmapXenFlags::UNIX);
    assert_eq!(!flags, MmapXenFlags::FOREIGN);
    assert_eq!(flags.iter().count(), 2);
    assert_eq!(flags.iter_names().count(), 2);
    assert_eq!(flags.into_iter().collect::<MmapXenFlags>(), flags);
    assert_eq!(
        format!("{flags:x} {flags:b} {flags:o} {flags:X}"),
        "a 1010 12 A"
    );
    assert_eq!(
        format!("{:?}", MmapXenFlags::ALL),
        "MmapXenFlags(FOREIGN | GRANT)"
    );
    flags.toggle(MmapXenFlags::GRANT);
    flags.remove(MmapXenFlags::NO_ADVANCE_MAP);
    assert!(flags.is_empty());
}

#[test]
fn from_range_with_setters_builds_region_or_returns_error() {
    let start = GuestAddress(0x1000);
    let mut range = MmapRange::new_unix(0x1000, None, start);
    range.set_hugetlbfs(false);
    range.set_prot(libc::PROT_READ);
    range.set_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
    let region = MmapRegion::<AtomicBitmap>::from_range(range.clone()).unwrap();
    assert_eq!((region.xen_mmap_flags(), region.xen_mmap_data()), (0, 0));
    assert_eq!((region.size(), region.prot()), (0x1000, libc::PROT_READ));
    assert_eq!(region.is_hugetlbfs(), Some(false));
    assert!(format!("{range:?}").starts_with("MmapRange"));
    let null = File::open("/dev/null").unwrap();
    let file = Some(FileOffset::new(null, 0));
    let foreign = MmapRange::new(0x1000, file, start, MmapXenFlags::FOREIGN.bits(), 1);
    let error = MmapRegion::<()>::from_range(foreign).unwrap_err();
    assert_eq!(kind(&error), "Mmap");
}

#[test]
#[expect(unsafe_code, reason = "the functions are unsafe")]
fn with_bitmap_without_mapping_accesses_bytes() {
    let mut bytes = [0u8; 16];
    let pointer = bytes.as_mut_ptr();
    // SAFETY: the bytes are mapped, and nothing else accesses them.
    let slice = unsafe { VolatileSlice::with_bitmap(pointer, 16, (), None) };
    // SAFETY: the bytes are mapped, and nothing else accesses them.
    let value = unsafe { VolatileRef::<u32, ()>::with_bitmap(pointer, (), None) };
    // SAFETY: the bytes are mapped, and nothing else accesses them.
    let array = unsafe { VolatileArrayRef::<u32, ()>::with_bitmap(pointer, 4, (), None) };
    slice.copy_from(&[1u8; 16]);
    assert_eq!((value.load(), array.load(3)), (0x0101_0101, 0x0101_0101));
}
