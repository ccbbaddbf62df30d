//! A region returns an error if its dirty bitmap exceeds the memory of the process. The test lowers
//! the limit of its process, so it is a program of its own.
#![cfg(all(
    feature = "backend-mmap",
    feature = "backend-bitmap",
    target_os = "linux",
    target_pointer_width = "64",
    not(any(miri, vm_memory_portable))
))]
#![expect(unsafe_code, reason = "calls setrlimit(2)")]

use std::io::ErrorKind;

use test_support::{emulator, page_size, skipped};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, MmapRegion};

/// The bitmap of this many bytes takes 256 MiB, in pages of 4 KiB. That is more than the allocator
/// has reserved.
const SIZE: usize = 8 << 40;

/// Limits the address space of the process to its current size and `more` bytes.
fn limit_addresses(more: usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let used: usize = statm.split(' ').next().unwrap().parse().unwrap();
    let limit = (used * page_size() + more) as libc::rlim_t;
    let limit = libc::rlimit {
        rlim_cur: limit,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is valid for reads.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

#[test]
fn region_whose_bitmap_exceeds_memory_returns_error() {
    let test = "region_whose_bitmap_exceeds_memory_returns_error";
    if let Some(emulator) = emulator() {
        return skipped(
            test,
            format!("{emulator:?} does not limit the address space"),
        );
    }
    if page_size() > 0x1000 {
        return skipped(test, "the bitmap is too small");
    }
    limit_addresses(SIZE + (1 << 24));
    // There are enough addresses for the mapping.
    if let Err(error) = MmapRegion::<()>::new(SIZE) {
        return skipped(test, format!("cannot map {SIZE:#x} bytes: {error}"));
    }
    let ranges = [(GuestAddress(0), SIZE)];
    match GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).map(drop) {
        Err(FromRangesError::MmapRegion(MmapRegionError::Mmap(error))) => {
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        }
        other => panic!("{other:?}"),
    }
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let builder = MmapRegionBuilder::<AtomicBitmap>::new(SIZE).with_mmap_flags(flags);
    match builder.build().map(drop) {
        Err(MmapRegionError::Mmap(error)) => assert_eq!(error.kind(), ErrorKind::InvalidInput),
        other => panic!("{other:?}"),
    }
    // Nothing stays mapped.
    drop(MmapRegion::<()>::new(SIZE).unwrap());
}
