//! B12: a region on huge pages is unmapped whole, whatever its size; and `unmap` reports what dropping cannot.
#![cfg(all(target_os = "linux", feature = "backend-mmap"))]
#![expect(
    unsafe_code,
    reason = "calls memfd_create(2) and wraps foreign mappings"
)]

use std::fs::File;
use std::os::fd::FromRawFd;

use test_support::{emulator, skipped, HugePages};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const HUGE: usize = 2 << 20;

/// Makes four huge pages available, and skips `test` where that is not possible.
fn reserve(test: &str) -> Option<HugePages> {
    if let Some(emulator) = emulator() {
        skipped(
            test,
            format!("{emulator:?} maps huge pages at addresses that are not aligned for them"),
        );
        return None;
    }
    HugePages::reserve(4, test)
}

/// How many bytes of huge pages are mapped in this process under a name.
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
    // SAFETY: a valid name.
    let fd = unsafe { libc::memfd_create(c"b12".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made, and belongs to nobody else.
    unsafe { File::from_raw_fd(fd) }
}

/// Makes a region and lets it go, both ways.
fn goes_away(name: &str, size: usize, make: impl Fn() -> MmapRegion) {
    for unmap in [false, true] {
        let region = make();
        assert_eq!(region.size(), size);
        assert_eq!(
            mapped(name),
            size.next_multiple_of(HUGE),
            "{name}: {size:#x} bytes are mapped as they should be"
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
            "{name}: {size:#x} bytes stayed mapped (unmap: {unmap})"
        );
    }
}

const SIZES: [usize; 6] = [1, 0x1000, HUGE - 1, HUGE, HUGE + 1, HUGE + 0x3000];

#[test]
fn b12_anonymous_huge_pages_are_unmapped_whole() {
    let Some(pool) = reserve("b12_anonymous_huge_pages_are_unmapped_whole") else {
        return;
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    for size in SIZES {
        goes_away("anon_hugepage", size, || {
            MmapRegionBuilder::new(size)
                .with_mmap_flags(flags)
                .with_hugetlbfs(true)
                .build()
                .unwrap()
        });
        let both = libc::PROT_READ | libc::PROT_WRITE;
        goes_away("anon_hugepage", size, || {
            MmapRegion::build(None, size, both, flags).unwrap()
        });
    }
    // All pages are back.
    assert!(pool.free() >= 4);
}

#[test]
fn b12_files_of_huge_pages_are_unmapped_whole() {
    let Some(_reserved) = reserve("b12_files_of_huge_pages_are_unmapped_whole") else {
        return;
    };
    for size in SIZES {
        goes_away("memfd:b12", size, || {
            let file = huge_memfd();
            file.set_len(size.next_multiple_of(HUGE) as u64).unwrap();
            MmapRegion::from_file(FileOffset::new(file, 0), size).unwrap()
        });
        // A file of no length: mapping it makes it as long as that takes.
        goes_away("memfd:b12", size, || {
            MmapRegion::from_file(FileOffset::new(huge_memfd(), 0), size).unwrap()
        });
    }
    goes_away("memfd:b12", 0x1000, || {
        let file = huge_memfd();
        file.set_len(2 * HUGE as u64).unwrap();
        MmapRegion::from_file(FileOffset::new(file, HUGE as u64), 0x1000).unwrap()
    });
}

#[test]
fn b12_a_second_region_stays_when_the_first_goes() {
    let Some(_reserved) = reserve("b12_a_second_region_stays_when_the_first_goes") else {
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

/// What was unmapped behind the region's back is nobody's, and what is not the region's stays.
#[test]
fn b12_unmap_answers_for_ordinary_and_foreign_mappings() {
    let region = MmapRegion::<()>::new(0x1234).unwrap();
    region.unmap().unwrap();
    let outer = MmapRegion::<()>::new(0x3000).unwrap();
    // SAFETY: the mapping outlives the region.
    let foreign =
        unsafe { MmapRegion::<()>::build_raw(outer.as_ptr(), 0x1000, outer.prot(), outer.flags()) }
            .unwrap();
    foreign.unmap().unwrap();
    outer.as_volatile_slice().write_obj(1u8, 0).unwrap();
    assert_eq!(outer.as_volatile_slice().read_obj::<u8>(0).unwrap(), 1);
}
