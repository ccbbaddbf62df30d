//! Regions of [`MmapRange`]s that are not Xen memory.

use crate::bytes::Bytes;
use crate::mmap::{MmapRange, MmapRegion, MmapRegionError, MmapXenFlags};
use crate::volatile_memory::VolatileMemory;
use crate::{FileOffset, GuestAddress};
use test_support::temp_file_of_len;

const START: GuestAddress = GuestAddress(0x1000);

#[test]
fn from_range_of_unix_memory_has_flags_and_data_of_range() {
    let region = MmapRegion::<()>::from_range(MmapRange::new_unix(0x1000, None, START)).unwrap();
    assert_eq!((region.xen_mmap_flags(), region.xen_mmap_data()), (0, 0));
    assert_eq!(region.flags(), libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
    region.as_volatile_slice().write_obj(7u8, 0xfff).unwrap();

    let file = FileOffset::new(temp_file_of_len(0x1000), 0);
    let mut range = MmapRange::new(0x1000, Some(file), START, 0, 5);
    range.set_prot(libc::PROT_READ);
    range.set_hugetlbfs(false);
    let region = MmapRegion::<()>::from_range(range).unwrap();
    assert_eq!((region.xen_mmap_flags(), region.xen_mmap_data()), (0, 5));
    assert_eq!(region.flags(), libc::MAP_NORESERVE | libc::MAP_SHARED);
    assert_eq!(region.is_hugetlbfs(), Some(false));
    assert_eq!(region.prot(), libc::PROT_READ);
}

#[test]
fn from_range_with_invalid_flags_returns_error() {
    for flags in [3, 4, 8, 9, 11, 16, 0x100, u32::MAX] {
        let range = MmapRange::new(0x1000, None, START, flags, 0);
        let error = MmapRegion::<()>::from_range(range).unwrap_err();
        assert!(matches!(error, MmapRegionError::MmapFlags(bits) if bits == flags));
    }
}

#[test]
fn from_range_with_file_that_is_too_short_returns_error() {
    let file = FileOffset::new(temp_file_of_len(0x1000), 0);
    let range = MmapRange::new(0x2001, Some(file), START, MmapXenFlags::UNIX.bits(), 0);
    let error = MmapRegion::<()>::from_range(range).unwrap_err();
    assert!(matches!(error, MmapRegionError::MappingPastEof));

    let mut range = MmapRange::new_unix(0x1000, None, START);
    range.set_flags(libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
    let error = MmapRegion::<()>::from_range(range).unwrap_err();
    assert!(matches!(error, MmapRegionError::MapFixed));
    // Shared, without a file: the error of mmap(2).
    let range = MmapRange::new(0x1000, None, START, 0, 0);
    let error = MmapRegion::<()>::from_range(range).unwrap_err();
    assert!(matches!(error, MmapRegionError::Mmap(e) if e.raw_os_error() == Some(libc::EBADF)));
}
