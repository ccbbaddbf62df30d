//! The lines with which VMMs create regions keep their meaning on each platform.
//!
//! `verify/differential` compares the same values on 0.18.0.
#![cfg(all(unix, feature = "backend-mmap"))]
#![expect(unsafe_code, reason = "borrows mappings")]

use std::fs::File;

use test_support::{page_size, temp_file_of_len};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion, Permissions,
};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Checks that each byte of a region can be read and written, by guest address and by host address.
fn assert_accessible<B: vm_memory::bitmap::Bitmap>(region: MmapRegion<B>) {
    let (start, size, host) = (GuestAddress(0x10_0000), region.size(), region.as_ptr());
    let region = GuestRegionMmap::new(region, start).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let last = GuestAddress(start.0 + size as u64 - 8);
    for (at, value) in [(start, 0x0102_0304_0506_0708u64), (last, u64::MAX)] {
        memory.write_obj(value, at).unwrap();
        assert_eq!(memory.read_obj::<u64>(at).unwrap(), value);
    }
    assert!(GuestMemory::check_range(
        &memory,
        start,
        size,
        Permissions::ReadWrite
    ));
    assert_eq!(memory.get_host_address(start).unwrap(), host);
    let mut buf = vec![0; size];
    memory.read_slice(&mut buf, start).unwrap();
    assert_eq!(buf[..8], 0x0102_0304_0506_0708u64.to_ne_bytes());
}

#[test]
fn region_of_libkrun_without_protection_and_flags_is_accessible() {
    // The kernel is part of a shared library, and so are its pages.
    let kernel = MmapRegion::<()>::new(4 * page_size()).unwrap();
    // SAFETY: `kernel` is a mapping of this size, which outlives the region. No reference to it
    // exists.
    let region = unsafe { MmapRegion::build_raw(kernel.as_ptr(), kernel.size(), 0, 0) };
    let region: MmapRegion = region.unwrap();
    assert_eq!(
        (region.prot(), region.flags(), region.owned()),
        (0, 0, false)
    );
    assert_accessible(region);
}

#[test]
fn memory_of_libkrun_with_an_inserted_kernel_is_accessible() {
    let kernel = MmapRegion::<()>::new(page_size()).unwrap();
    let (ram, at) = (GuestAddress(0x8000_0000), GuestAddress(0x100_0000));
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000), (ram, 0x2_0000)]).unwrap();
    // SAFETY: `kernel` is a mapping of this size, which outlives the region. No reference to it
    // exists.
    let region = unsafe { MmapRegion::build_raw(kernel.as_ptr(), kernel.size(), 0, 0) };
    let region = GuestRegionMmap::new(region.unwrap(), at).unwrap();
    let memory = memory.insert_region(std::sync::Arc::new(region)).unwrap();
    memory.write_obj(0xfeed_u32, at).unwrap();
    assert_eq!(memory.read_obj::<u32>(at).unwrap(), 0xfeed);
    let host = memory.get_host_address(ram).unwrap();
    memory.write_slice(&[7; 32], ram).unwrap();
    assert_eq!(
        memory.get_host_address(GuestAddress(ram.0 + 31)).unwrap(),
        host.wrapping_add(31)
    );
}

#[test]
fn region_of_uhyve_with_bitmap_protection_and_flags_is_accessible() {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE;
    let region = MmapRegionBuilder::new_with_bitmap(4 * page_size(), ())
        .with_mmap_prot(READ_WRITE)
        .with_mmap_flags(flags)
        .build()
        .unwrap();
    assert_eq!(
        (region.prot(), region.flags(), region.owned()),
        (READ_WRITE, flags, true)
    );
    assert_eq!(region.is_hugetlbfs(), None);
    assert_accessible(region);
}

/// Flags whose values differ between the platforms, with which regions are created.
const FLAGS: &[i32] = &[
    libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
    libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    libc::MAP_ANONYMOUS | libc::MAP_SHARED,
    libc::MAP_ANONYMOUS | libc::MAP_SHARED | libc::MAP_NORESERVE,
    #[cfg(target_os = "linux")]
    {
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_POPULATE | libc::MAP_LOCKED
    },
    #[cfg(target_os = "linux")]
    {
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_STACK | libc::MAP_NONBLOCK
    },
    #[cfg(target_os = "linux")]
    {
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_GROWSDOWN
    },
];

#[test]
fn region_with_flags_of_any_value_keeps_and_ignores_them() {
    for &flags in FLAGS {
        let build = MmapRegion::<()>::build(None, page_size(), READ_WRITE, flags).unwrap();
        assert_eq!((build.flags(), build.owned()), (flags, true), "{flags:#x}");
        assert_accessible(build);
        let host = MmapRegion::<()>::new(page_size()).unwrap();
        // SAFETY: `host` is a mapping of this size and protection, which outlives the region. No
        // reference to it exists.
        let raw =
            unsafe { MmapRegion::<()>::build_raw(host.as_ptr(), host.size(), READ_WRITE, flags) };
        let raw = raw.unwrap();
        assert_eq!((raw.flags(), raw.owned()), (flags, false), "{flags:#x}");
        assert_accessible(raw);
    }
}

/// Creates a region of a file as Firecracker does, at an offset of one page.
fn of_file(file: &File, flags: i32) -> MmapRegion {
    MmapRegionBuilder::new_with_bitmap(2 * page_size(), ())
        .with_mmap_prot(READ_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE | flags)
        .with_file_offset(FileOffset::new(
            file.try_clone().unwrap(),
            page_size() as u64,
        ))
        .build()
        .unwrap()
}

#[test]
fn region_of_firecracker_of_file_is_shared_or_private_as_requested() {
    let file = temp_file_of_len(3 * page_size() as u64);
    assert_accessible(of_file(&file, libc::MAP_PRIVATE));
    let shared = of_file(&file, libc::MAP_SHARED);
    assert_eq!(shared.file_offset().unwrap().start(), page_size() as u64);
    assert_accessible(shared);
    // Only the second region has written to the file, whose first page it does not map.
    let again = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 3 * page_size()).unwrap();
    let again = GuestRegionMmap::new(again, GuestAddress(0)).unwrap();
    let read = |at: usize| again.read_obj::<u64>(MemoryRegionAddress(at as u64));
    assert_eq!(read(0).unwrap(), 0u64);
    assert_eq!(read(page_size()).unwrap(), 0x0102_0304_0506_0708u64);
    assert_eq!(read(3 * page_size() - 8).unwrap(), u64::MAX);
    assert_eq!(again.len(), 3 * page_size() as u64);
}

#[test]
fn region_of_file_with_anonymous_flags_has_zeroes() {
    // mmap(2) ignores the file, whose length no check needs.
    let file = temp_file_of_len(3 * page_size() as u64);
    let region = of_file(&file, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    assert_eq!(region.file_offset().unwrap().start(), page_size() as u64);
    assert_accessible(region);
}
