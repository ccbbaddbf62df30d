//! B12: a region of huge pages is unmapped completely, by drop and by `unmap`, whatever its size.
#![cfg(all(target_os = "linux", feature = "backend-mmap"))]
#![expect(unsafe_code, reason = "calls memfd_create(2) and borrows mappings")]

use std::fs::File;
use std::os::fd::FromRawFd;

use test_support::{emulator, skipped, HugePages};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const HUGE: usize = 2 << 20;

/// Reserves four huge pages, or skips `test`.
fn reserve(test: &str) -> Option<HugePages> {
    if let Some(emulator) = emulator() {
        skipped(test, format!("{emulator:?} does not align huge pages"));
        return None;
    }
    HugePages::reserve(4, test)
}

/// Returns the number of bytes mapped in this process under a name.
fn mapped(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let size = |line: &str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        usize::from_str_radix(end, 16).unwrap() - usize::from_str_radix(start, 16).unwrap()
    };
    maps.lines()
        .filter(|line| line.contains(name))
        .map(size)
        .sum()
}

fn huge_memfd() -> File {
    // SAFETY: the name is a string that ends with a zero byte.
    let fd = unsafe { libc::memfd_create(c"b12".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, so nothing else owns it.
    unsafe { File::from_raw_fd(fd) }
}

/// Creates a region and removes it, by dropping it and by `unmap`.
fn assert_unmapped(name: &str, size: usize, make: impl Fn() -> MmapRegion) {
    for unmap in [false, true] {
        let region = make();
        assert_eq!(region.size(), size);
        assert_eq!(
            mapped(name),
            size.next_multiple_of(HUGE),
            "{name}: wrong length mapped for {size:#x} bytes"
        );
        let slice = region.as_volatile_slice();
        slice.write_obj(7u8, size - 1).unwrap();
        assert_eq!(slice.read_obj::<u8>(size - 1).unwrap(), 7);
        if unmap {
            region.unmap().unwrap();
        } else {
            drop(region);
        }
        assert_eq!(
            mapped(name),
            0,
            "{name}: {size:#x} bytes are still mapped (unmap: {unmap})"
        );
    }
}

const SIZES: [usize; 6] = [1, 0x1000, HUGE - 1, HUGE, HUGE + 1, HUGE + 0x3000];

#[test]
fn b12_drop_of_anonymous_huge_pages_unmaps_all() {
    let Some(pool) = reserve("b12_drop_of_anonymous_huge_pages_unmaps_all") else {
        return;
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    for size in SIZES {
        assert_unmapped("anon_hugepage", size, || {
            MmapRegionBuilder::new(size)
                .with_mmap_flags(flags)
                .with_hugetlbfs(true)
                .build()
                .unwrap()
        });
        let both = libc::PROT_READ | libc::PROT_WRITE;
        assert_unmapped("anon_hugepage", size, || {
            MmapRegion::build(None, size, both, flags).unwrap()
        });
    }
    assert!(pool.free() >= 4);
}

#[test]
fn b12_drop_of_hugetlbfs_file_unmaps_all() {
    let Some(_reserved) = reserve("b12_drop_of_hugetlbfs_file_unmaps_all") else {
        return;
    };
    for size in SIZES {
        assert_unmapped("memfd:b12", size, || {
            let file = huge_memfd();
            file.set_len(size.next_multiple_of(HUGE) as u64).unwrap();
            MmapRegion::from_file(FileOffset::new(file, 0), size).unwrap()
        });
        // Mapping an empty file of hugetlbfs extends it.
        assert_unmapped("memfd:b12", size, || {
            MmapRegion::from_file(FileOffset::new(huge_memfd(), 0), size).unwrap()
        });
    }
    assert_unmapped("memfd:b12", 0x1000, || {
        let file = huge_memfd();
        file.set_len(2 * HUGE as u64).unwrap();
        MmapRegion::from_file(FileOffset::new(file, HUGE as u64), 0x1000).unwrap()
    });
}

#[test]
fn b12_unmap_of_huge_pages_keeps_adjacent_region() {
    let Some(_reserved) = reserve("b12_unmap_of_huge_pages_keeps_adjacent_region") else {
        return;
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let make = || {
        MmapRegionBuilder::<()>::new(HUGE + 1)
            .with_mmap_flags(flags)
            .build()
            .unwrap()
    };
    let (first, second) = (make(), make());
    second.as_volatile_slice().write_obj(9u8, HUGE).unwrap();
    first.unmap().unwrap();
    assert_eq!(mapped("anon_hugepage"), 2 * HUGE);
    assert_eq!(second.as_volatile_slice().read_obj::<u8>(HUGE).unwrap(), 9);
}

#[test]
fn b12_unmap_of_ordinary_and_borrowed_mapping_succeeds() {
    let region = MmapRegion::<()>::new(0x1234).unwrap();
    region.unmap().unwrap();
    let outer = MmapRegion::<()>::new(0x3000).unwrap();
    // SAFETY: 1. `outer` is a mapping of at least one page, created with this protection and these
    // flags. 2. It outlives `borrowed`, which is unmapped below. 3. No reference to its bytes
    // exists.
    let borrowed =
        unsafe { MmapRegion::<()>::build_raw(outer.as_ptr(), 0x1000, outer.prot(), outer.flags()) }
            .unwrap();
    borrowed.unmap().unwrap();
    outer.as_volatile_slice().write_obj(1u8, 0).unwrap();
    assert_eq!(outer.as_volatile_slice().read_obj::<u8>(0).unwrap(), 1);
}
