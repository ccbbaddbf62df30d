//! Tests of the reported memory usage.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use super::common::*;
use vm_memory::GuestAddress;
use vm_memory_host::{residency, Backing, Lock, MemoryBuilder, Region};

#[test]
fn residency_of_file_with_non_utf8_name_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory
        .path()
        .join(std::ffi::OsStr::from_bytes(b"ram-\xff"));
    std::fs::write(&path, vec![1; MIB as usize]).unwrap();
    let memory = build(
        Region::new(GuestAddress(0), MIB)
            .backing(Backing::private_file(File::open(&path).unwrap(), 0)),
    );
    let memory = memory.unwrap();
    fill(&memory, 0, PAGE, 1);
    assert!(resident(&memory) >= PAGE);
}

#[test]
fn residency_includes_pages_of_other_mappings() {
    let pages = HugePages::reserve(2, "residency_includes_pages_of_other_mappings (hugetlb)");
    for (kind, region) in region_of_each_backing(0, 2 * HUGE, pages.is_some()) {
        if kind.ends_with("hugetlb") || kind == "memfd" {
            let memory = build(region).unwrap();
            let other = build_again(&memory);
            fill(&other, HUGE, HUGE, 1);
            assert_eq!(
                (resident(&memory), resident(&other)),
                (HUGE, HUGE),
                "{kind}"
            );
        }
    }
}

#[test]
fn residency_is_reported_per_region() {
    if !can_lock("residency_is_reported_per_region") {
        return;
    }
    let pages = HugePages::reserve(2, "residency_is_reported_per_region (hugetlb)");
    let mut builder = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), LOCKED).lock(Lock::Now))
        .region(Region::new(GuestAddress(MIB), MIB).backing(Backing::Memfd))
        .region(Region::new(GuestAddress(2 * MIB), 2 * MIB));
    if pages.is_some() {
        builder = builder.region(
            Region::new(GuestAddress(4 * MIB), 2 * HUGE)
                .backing(Backing::Hugetlb { page_size: HUGE }),
        );
    }
    let memory: Memory = builder.build().unwrap();
    fill(&memory, MIB + PAGE, 4 * PAGE, 1);
    if pages.is_some() {
        fill(&memory, 4 * MIB, HUGE, 1);
    }
    let usage = residency(&memory).unwrap();
    let numbers = |n: usize| (usage[n].1.resident, usage[n].1.mapped, usage[n].1.huge);
    assert_eq!(
        (numbers(0), usage[0].1.locked),
        ((LOCKED, LOCKED, 0), LOCKED)
    );
    assert_eq!(
        (numbers(1), usage[1].1.locked),
        ((4 * PAGE, 4 * PAGE, 0), 0)
    );
    assert_eq!(numbers(2), (0, 0, 0));
    if pages.is_some() {
        assert_eq!(numbers(3), (HUGE, HUGE, HUGE));
    }
}
