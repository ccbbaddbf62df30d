//! B7: a region of an existing mapping has the protection that the caller states, if any.
#![cfg(all(unix, feature = "backend-mmap"))]
#![expect(unsafe_code, reason = "borrows mappings")]

use std::fs::File;

use test_support::page_size;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion, Permissions,
};
use Permissions::{Read, ReadWrite};

/// Creates regions of the readable and writable page `host`: by `build_raw`, and by the builder.
///
/// `build_raw` needs a protection. Without one, the result has only the region of the builder.
fn existing(host: &MmapRegion, prot: Option<i32>, flags: i32) -> Vec<MmapRegion> {
    let mut builder = MmapRegionBuilder::new(host.size()).with_mmap_flags(flags);
    if let Some(prot) = prot {
        builder = builder.with_mmap_prot(prot);
    }
    // SAFETY: 1. `host` is a mapping of this size, readable and writable, which is more than any
    // protection that the tests state. 2. It outlives the regions. 3. No reference to it exists.
    let built = unsafe { builder.with_raw_mmap_pointer(host.as_ptr()) }.build();
    let raw = prot.map(|prot| {
        // SAFETY: 1. `host` is a mapping of this size, readable and writable, which is more than
        // any protection that the tests state. 2. It outlives the regions. 3. No reference to it
        // exists.
        unsafe { MmapRegion::build_raw(host.as_ptr(), host.size(), prot, flags) }
    });
    [Some(built), raw]
        .into_iter()
        .flatten()
        .map(Result::unwrap)
        .collect()
}

#[test]
fn b07_existing_mapping_without_stated_protection_refuses_nothing() {
    let host = MmapRegion::<()>::new(page_size()).unwrap();
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    // 0x8 is PROT_SEM of some architectures, and 0x100_0000 PROT_GROWSDOWN. None of these bits
    // permits a read or a write.
    let silent = [
        None,
        Some(0),
        Some(libc::PROT_EXEC),
        Some(0x8),
        Some(0x100_0000),
    ];
    for prot in silent
        .into_iter()
        .chain([Some(read_write), Some(libc::PROT_WRITE), Some(-1)])
    {
        for flags in [0, -1, libc::MAP_FIXED, libc::MAP_SHARED] {
            for mapping in existing(&host, prot, flags) {
                assert_eq!(
                    (mapping.prot(), mapping.flags()),
                    (prot.unwrap_or(0), flags)
                );
                assert_eq!((mapping.owned(), mapping.size()), (false, page_size()));
                let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
                assert_eq!(region.allowed_access(), ReadWrite, "{prot:?}");
                let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
                memory.write_obj(7u64, GuestAddress(8)).unwrap();
                assert_eq!(memory.read_obj::<u64>(GuestAddress(8)).unwrap(), 7);
                let end = GuestAddress(page_size() as u64 - 4);
                assert!(GuestMemory::check_range(&memory, end, 4, ReadWrite));
                assert!(!GuestMemory::check_range(&memory, end, 5, Read));
            }
        }
    }
}

#[test]
fn b07_existing_mapping_with_stated_protection_refuses_other_accesses() {
    let host = MmapRegion::<()>::new(page_size()).unwrap();
    for prot in [libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC] {
        for mapping in existing(&host, Some(prot), 0) {
            let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
            assert_eq!(region.prot(), prot);
            let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
            assert_eq!(memory.read_obj::<u64>(GuestAddress(8)).unwrap(), 0);
            assert!(matches!(
                memory.write_obj(7u64, GuestAddress(8)),
                Err(GuestMemoryError::HostAddressNotAvailable)
            ));
        }
    }
}

#[test]
fn existing_mapping_returns_file_flags_and_hugetlbfs_as_stated() {
    let host = MmapRegion::<()>::new(page_size()).unwrap();
    let file = File::open("/dev/null").unwrap();
    // The offset of an existing mapping is not checked: no call maps the file.
    for start in [0, 1, 1 << 63, u64::MAX] {
        let builder = MmapRegionBuilder::<()>::new(page_size())
            .with_file_offset(FileOffset::new(file.try_clone().unwrap(), start))
            .with_hugetlbfs(true);
        // SAFETY: 1. `host` is a mapping of this size; no protection is stated. 2. It outlives the
        // region. 3. No reference to it exists.
        let mapping = unsafe { builder.with_raw_mmap_pointer(host.as_ptr()) }
            .build()
            .unwrap();
        assert_eq!(mapping.file_offset().map(FileOffset::start), Some(start));
        assert_eq!(mapping.flags(), libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
        assert_eq!((mapping.prot(), mapping.is_hugetlbfs()), (0, Some(true)));
    }
}

#[test]
fn existing_mapping_of_any_size_needs_only_aligned_address() {
    let host = MmapRegion::<()>::new(2 * page_size()).unwrap();
    let make = |offset: usize, size: usize| {
        let addr = host.as_ptr().wrapping_add(offset);
        // SAFETY: 1. The range is in `host`; no protection is stated. 2. `host` outlives the
        // region. 3. No reference to it exists.
        unsafe { MmapRegion::<()>::build_raw(addr, size, 0, 0) }
    };
    for (offset, size) in [(0, 0), (0, 1), (page_size(), 0x123)] {
        let region = GuestRegionMmap::new(make(offset, size).unwrap(), GuestAddress(0)).unwrap();
        assert_eq!(region.size(), size);
        assert_eq!(
            region.write(&[1; 8], MemoryRegionAddress(0)).unwrap_or(0),
            size.min(8)
        );
        assert!(region
            .write_obj(1u8, MemoryRegionAddress(size as u64))
            .is_err());
    }
    for (offset, size) in [(1, 0), (8, 1), (page_size() - 1, 1)] {
        let error = make(offset, size).unwrap_err();
        #[cfg(feature = "xen")]
        assert!(
            matches!(error, MmapRegionError::Mmap(e) if e.raw_os_error() == Some(libc::EINVAL))
        );
        #[cfg(not(feature = "xen"))]
        assert!(matches!(error, MmapRegionError::InvalidPointer));
    }
}
