//! What was half built when something could not be had is gone. A program of its own: it counts what this process has mapped and open.
#![cfg(target_os = "linux")]

use std::fs;
use std::ops::ControlFlow;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_memory_host::{Backing, MemoryBuilder, NumaPolicy, Region};

const MIB: u64 = 1 << 20;

/// The areas of this process that a guest could have: anything of 4 MiB or more, and all memfds; and the number of its descriptors. What is smaller is the
/// test program's own.
fn mapped_and_open() -> (Vec<String>, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let large = maps.lines().filter(|line| {
        let (start, end) = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'))
            .unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        line.contains("memfd") || number(end) >= number(start).saturating_add(4 * MIB)
    });
    let areas = large.map(str::to_owned).collect();
    (areas, fs::read_dir("/proc/self/fd").unwrap().count())
}

#[test]
fn nothing_half_built_stays() {
    let region = |n: u64| Region::new(GuestAddress(n.checked_mul(64 * MIB).unwrap()), 8 * MIB);
    let good = || {
        MemoryBuilder::new()
            .region(region(0).backing(Backing::Memfd).name("one"))
            .region(region(1))
            .region(region(2).backing(Backing::Memfd).name("two"))
    };
    // What the allocator and the test harness map is there before it is counted.
    drop(good().build::<()>().unwrap());
    let before = mapped_and_open();

    let short = || tempfile::tempfile().unwrap();
    let zero = || fs::File::open("/dev/zero").unwrap();
    let bad: [&dyn Fn() -> Region; 6] = [
        &|| region(3).backing(Backing::Hugetlb { page_size: 1 << 40 }),
        &|| region(3).backing(Backing::shared_file(short(), 0)),
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
    let cancelled = good().prefault(std::num::NonZeroUsize::MIN, |_| ControlFlow::Break(()));
    assert!(cancelled.build::<()>().is_err());
    assert_eq!(mapped_and_open().0, before.0);

    let memory: GuestMemoryMmap = good().build().unwrap();
    assert_ne!(mapped_and_open().0, before.0);
    drop(memory);
    assert_eq!(mapped_and_open(), before);
}
