//! Tests of the reported memory usage.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use super::common::*;
use vm_memory::GuestAddress;
use vm_memory_host::{discard, residency, Backing, Lock, MemoryBuilder, Region};

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

#[test]
fn residency_of_private_file_reports_copies_and_pages_of_the_file() {
    let test = "residency_of_private_file_reports_copies_and_pages_of_the_file";
    let pages = HugePages::reserve(2 * 4, test);
    let memfd = |flags| {
        let memfd = rustix::fs::memfd_create("private", flags).unwrap();
        let memfd = File::from(memfd);
        memfd.set_len(4 * HUGE).unwrap();
        memfd
    };
    let mut files = vec![
        ("disk", patterned_file(4 * HUGE / PAGE), true),
        ("memfd", memfd(rustix::fs::MemfdFlags::CLOEXEC), true),
    ];
    if pages.is_some() {
        files.push(("hugetlb", memfd(rustix::fs::MemfdFlags::HUGETLB), false));
    }
    for (kind, file, is_freed) in files {
        // The first half of the file is in memory.
        let region = Region::new(GuestAddress(0), 4 * HUGE);
        let shared = Backing::shared_file(file.try_clone().unwrap(), 0);
        let shared = build(region.clone().backing(shared)).unwrap();
        discard(&shared, GuestAddress(2 * HUGE), 2 * HUGE).unwrap();
        fill(&shared, 0, 2 * HUGE, 1);
        let usage = |memory: &Memory| {
            let usage = residency(memory).unwrap()[0].1;
            (usage.private, usage.file)
        };
        let (private, in_file) = usage(&shared);
        assert_eq!(private, 0, "{kind}");
        assert!(in_file >= 2 * HUGE && in_file <= 2 * HUGE + may_stay_resident("shared file"));
        drop(shared);
        let memory = build(region.backing(Backing::private_file(file, 0))).unwrap();
        assert_eq!(usage(&memory).0, 0, "{kind}");
        fill(&memory, HUGE, HUGE, 2);
        let (private, in_file) = usage(&memory);
        assert_eq!(private, HUGE, "{kind}");
        assert!(in_file >= 2 * HUGE, "{kind}: {in_file:#x}");
        discard(&memory, GuestAddress(HUGE), HUGE).unwrap();
        let kept = if is_freed { 0 } else { HUGE };
        assert_eq!(usage(&memory).0, kept, "{kind}");
        assert!(usage(&memory).1 >= 2 * HUGE, "{kind}");
    }
}

#[test]
fn residency_of_anonymous_memory_is_private() {
    let memory = build(Region::new(GuestAddress(0), MIB)).unwrap();
    fill(&memory, 0, 4 * PAGE, 1);
    let usage = residency(&memory).unwrap()[0].1;
    assert_eq!((usage.private, usage.file), (4 * PAGE, 0));
}
