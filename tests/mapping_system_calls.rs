//! A mapping makes only the calls `mmap(2)` and `munmap(2)`, and `fstat(2)` for a file. The seccomp
//! filters of VMMs list them.
//!
//! The allocator of this program makes no system calls, so it is a program of its own.
#![cfg(all(target_os = "linux", not(miri), feature = "backend-mmap"))]

use std::collections::BTreeSet;

use test_support::{record_calls, skipped, temp_file_of_len, StaticAllocator};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

const LEN: usize = 0x1_0000;
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Records the calls of a function. Some versions of the C library make `newfstatat` for `fstat`.
fn calls(function: impl FnOnce() + Send) -> std::io::Result<BTreeSet<i64>> {
    let ((), calls) = record_calls(function)?;
    let usual = |number| match number {
        libc::SYS_newfstatat => libc::SYS_fstat,
        number => number,
    };
    Ok(calls.into_iter().map(usual).collect())
}

/// Checks the calls of each constructor, of an access, and of the drop. `place` outlives all of
/// them, so that no file is closed.
fn assert_calls(test: &str, place: Option<&FileOffset>, expected: &[i64]) {
    let copy = || place.cloned();
    let access = |region: &MmapRegion| {
        let slice = region.as_volatile_slice();
        slice.write_obj(7u64, 8).unwrap();
        assert_eq!(slice.read_obj::<u64>(8).unwrap(), 7);
    };
    let flags = match place {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let new = || match copy() {
        Some(place) => access(&MmapRegion::from_file(place, LEN).unwrap()),
        None => access(&MmapRegion::new(LEN).unwrap()),
    };
    let build = || access(&MmapRegion::build(copy(), LEN, BOTH, flags).unwrap());
    let builder = || {
        let builder = MmapRegionBuilder::new(LEN);
        let builder = match copy() {
            Some(place) => builder.with_file_offset(place),
            None => builder,
        };
        access(&builder.build().unwrap());
    };
    let region = || drop(GuestRegionMmap::<()>::from_range(GuestAddress(0), LEN, copy()).unwrap());
    let memory = || {
        let ranges = [(GuestAddress(0), LEN, copy())];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        memory.write_obj(7u64, GuestAddress(0x1000)).unwrap();
    };
    let constructors: [(&str, &(dyn Fn() + Sync)); 5] = [
        ("new or from_file", &new),
        ("build", &build),
        ("MmapRegionBuilder", &builder),
        ("from_range", &region),
        ("from_ranges_with_files", &memory),
    ];
    let expected: BTreeSet<i64> = expected.iter().copied().collect();
    for (name, constructor) in constructors {
        match calls(constructor) {
            Ok(made) => assert_eq!(made, expected, "{name}"),
            Err(error) => return skipped(test, format!("seccomp notifications: {error}")),
        }
    }
}

#[test]
fn mapping_of_file_calls_mmap_fstat_and_munmap_only() {
    let place = FileOffset::new(temp_file_of_len(LEN as u64), 0);
    assert_calls(
        "mapping_of_file_calls_mmap_fstat_and_munmap_only",
        Some(&place),
        &[libc::SYS_mmap, libc::SYS_fstat, libc::SYS_munmap],
    );
}

#[test]
fn mapping_of_anonymous_memory_calls_mmap_and_munmap_only() {
    assert_calls(
        "mapping_of_anonymous_memory_calls_mmap_and_munmap_only",
        None,
        &[libc::SYS_mmap, libc::SYS_munmap],
    );
}
