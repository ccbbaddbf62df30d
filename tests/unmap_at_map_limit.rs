//! `unmap` at `vm.max_map_count` returns an error, and the pages are freed. The test is a program
//! of its own, because no other test could map memory while it runs.
#![cfg(all(feature = "backend-mmap", target_os = "linux", not(miri)))]
#![expect(unsafe_code, reason = "calls mmap(2), mprotect(2) and mincore(2)")]

use test_support::{emulator, page_size, skipped};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Splits a mapping until the kernel refuses to. Returns the number of splits.
fn use_up_maps() -> usize {
    let (most, page) = (1 << 18, page_size());
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: without MAP_FIXED, no other mapping changes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), 2 * most * page, 0, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    let split = |number: usize| {
        let addr = start.wrapping_byte_add((2 * number + 1) * page);
        // SAFETY: the page belongs to the mapping above, which nothing accesses.
        unsafe { libc::mprotect(addr, page, libc::PROT_READ) == 0 }
    };
    (0..most).take_while(|number| split(*number)).count()
}

#[test]
fn unmap_at_map_limit_returns_error_and_frees_pages() {
    let test = "unmap_at_map_limit_returns_error_and_frees_pages";
    if let Some(emulator) = emulator() {
        let reason = format!("{emulator:?} takes minutes to split a mapping that often");
        return skipped(test, reason);
    }
    let len = 64 * page_size();
    // The kernel merges regions that are adjacent.
    let mut regions: Vec<MmapRegion> = (0..5).map(|_| MmapRegion::new(len).unwrap()).collect();
    regions.sort_by_key(|region| region.as_ptr());
    let adjacent = |pair: &[MmapRegion]| pair[0].as_ptr().wrapping_add(len) == pair[1].as_ptr();
    let Some(at) = regions
        .windows(3)
        .position(|three| three.windows(2).all(adjacent))
    else {
        return skipped(test, "the kernel did not place three regions side by side");
    };
    let [middle, dropped] = [at + 1, at].map(|number| regions.remove(number));
    let addr = middle.as_ptr();
    for region in [&middle, &dropped] {
        region
            .as_volatile_slice()
            .write_slice(&vec![1; len], 0)
            .unwrap();
    }
    if use_up_maps() == 1 << 18 {
        return skipped(test, "vm.max_map_count is too high");
    }
    let error = middle.unmap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    let mut resident = vec![1u8; 64];
    // SAFETY: the addresses are still mapped, and `resident` has a byte for each page.
    let asked = unsafe { libc::mincore(addr.cast(), len, resident.as_mut_ptr()) };
    assert_eq!(asked, 0);
    assert!(resident.iter().all(|page| page & 1 == 0), "{resident:?}");
}
