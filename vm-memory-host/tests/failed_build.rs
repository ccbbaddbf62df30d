//! A build that fails leaves no mapping and no open descriptor.
//!
//! The test counts the VMAs and descriptors of its process, so it is a separate program.
#![cfg(target_os = "linux")]

use std::fs;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use test_support::{temp_file, MIB};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_memory_host::{Backing, MemoryBuilder, NumaPolicy, Region};

/// Returns the VMAs of guest memory, and the number of open descriptors.
///
/// Guest memory is in memfds or in VMAs of 4 MiB or more. Other VMAs belong to the
/// test program.
fn mapped_and_open() -> (Vec<String>, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let is_large = |line: &&str| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        line.contains("memfd") || number(end) - number(start) >= 4 * MIB
    };
    let vmas = maps.lines().filter(is_large).map(str::to_owned).collect();
    (vmas, fs::read_dir("/proc/self/fd").unwrap().count())
}

#[test]
fn failed_build_leaves_nothing_mapped_or_open() {
    let region = |n: u64| Region::new(GuestAddress(n * 64 * MIB), 8 * MIB);
    let good = || {
        MemoryBuilder::new()
            .region(region(0).backing(Backing::Memfd).name("one"))
            .region(region(1))
            .region(region(2).backing(Backing::Memfd).name("two"))
    };
    // The first build maps what the allocator and the test harness need.
    drop(good().build::<()>().unwrap());
    let before = mapped_and_open();

    let zero = || fs::File::open("/dev/zero").unwrap();
    let bad: [&dyn Fn() -> Region; 6] = [
        &|| region(3).backing(Backing::Hugetlb { page_size: 1 << 40 }),
        &|| region(3).backing(Backing::shared_file(temp_file(&[]), 0)),
        &|| region(3).numa(NumaPolicy::Bind(vec![1000])),
        &|| Region::new(GuestAddress(1 << 40), 1 << 56),
        &|| region(3).backing(Backing::shared_file(zero(), u64::MAX >> 1)),
        &|| region(2),
    ];
    for bad in bad {
        let bad = bad();
        let shown = format!("{bad:?}");
        assert!(good().region(bad).build::<()>().is_err(), "{shown}");
        assert_eq!(mapped_and_open(), before, "{shown}");
    }
    let cancelled = good().prefault(NonZeroUsize::MIN, |_| ControlFlow::Break(()));
    assert!(cancelled.build::<()>().is_err());
    assert_eq!(mapped_and_open().0, before.0);

    let memory: GuestMemoryMmap = good().build().unwrap();
    assert_ne!(mapped_and_open().0, before.0);
    drop(memory);
    assert_eq!(mapped_and_open(), before);
}
