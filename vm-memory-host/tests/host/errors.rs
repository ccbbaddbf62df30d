//! Errors of requests that are invalid or that the host cannot satisfy.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::common::*;
use test_support::{error_chain, skipped};
use vm_memory::mmap::PluggedBlocksError;
use vm_memory::GuestAddress;
use vm_memory_host::{
    Backing, BuildError, Lock, MemoryBuilder, NumaPolicy, PrefaultError, Region, Sharing,
    TransparentHugePages, Unplugged,
};

fn message(region: Region) -> String {
    match build(region) {
        Ok(_) => "no error".to_owned(),
        Err(error) => error_chain(&error),
    }
}

fn region(start: u64, size: u64) -> Region {
    Region::new(GuestAddress(start), size)
}

/// Builds each region. The message of the error must contain the text.
fn assert_messages(cases: impl IntoIterator<Item = (Region, &'static str)>) {
    for (region, part) in cases {
        let shown = format!("{region:?}");
        let message = message(region);
        assert!(message.contains(part), "{shown}:\n{message}\nlacks\n{part}");
    }
}

fn hugetlb(start: u64, size: u64, page_size: u64) -> Region {
    region(start, size).backing(Backing::Hugetlb { page_size })
}

#[test]
fn build_without_region_returns_error() {
    let none = MemoryBuilder::new().build::<()>().unwrap_err();
    assert!(matches!(none, BuildError::NoRegion));
}

#[test]
fn build_with_invalid_size_or_address_names_the_value() {
    assert_messages([
        (region(MIB, 0), "region at 0x100000 has size 0"),
        (
            region(u64::MAX - 0xfff, 0x1000),
            "region at 0xfffffffffffff000: size 0x1000 reaches past",
        ),
        (
            region(0, 0x1001),
            "region 0x0-0x1000: size 0x1001 is not a multiple of the page size, \
            0x1000",
        ),
        (region(0x10, 0x1000), "guest address 0x10 is not"),
        (
            hugetlb(0, 3 * MIB, HUGE),
            "size 0x300000 is not a multiple of the page size, 0x200000",
        ),
        (
            hugetlb(MIB, HUGE, HUGE),
            "guest address 0x100000 is not a multiple of the page size, 0x200000",
        ),
        (
            hugetlb(0, 3 * MIB, 3 * MIB),
            "the host has no huge pages of 0x300000 bytes; ",
        ),
        (region(0, 1 << 56), "cannot reserve host addresses; "),
    ]);
}

#[test]
fn build_with_unusable_file_names_the_cause() {
    let file = |offset| Backing::shared_file(patterned_file(4), offset);
    assert_messages([
        (
            region(0, 4 * PAGE).backing(file(PAGE)),
            "region 0x0-0x3fff: needs a file of 0x5000 bytes, but the file ends at 0x4000; \
            extend it (truncate --size=20480)",
        ),
        (region(0, PAGE).backing(file(5)), "file offset 0x5 is not"),
        (
            region(0, PAGE).backing(file(u64::MAX - 0xfff)),
            "file offset 0xfffffffffffff000 plus the region's size exceeds the largest file length",
        ),
        (
            region(0, PAGE).backing(Backing::shared_file(File::open("/").unwrap(), 0)),
            "cannot examine its file; pass a regular file",
        ),
        (
            region(0, 1 << 63).backing(Backing::Memfd),
            "file offset 0x0 plus the region's size exceeds the largest",
        ),
    ]);
}

#[test]
fn build_with_name_that_cannot_be_shown_names_it() {
    assert_messages([
        (region(0, PAGE).name("a$b"), "name \"a$b\" cannot be shown"),
        (
            region(0, PAGE).name("x".repeat(80)),
            "cannot be shown in /proc/self/maps",
        ),
        (
            region(0, PAGE)
                .name("x".repeat(300))
                .backing(Backing::Memfd),
            "cannot be shown in /proc/self/maps",
        ),
        (
            region(0, PAGE).name("a\0b").backing(Backing::Memfd),
            "name \"a\\0b\" cannot be shown",
        ),
        (
            region(0, PAGE)
                .name("n")
                .backing(Backing::shared_file(patterned_file(4), 0)),
            "/proc/self/maps shows a file by its path",
        ),
    ]);
}

#[test]
fn build_with_unusable_option_names_the_cause() {
    assert_messages([
        (
            region(0, PAGE).numa(NumaPolicy::Bind(vec![77])),
            "NUMA node 77 has no memory on this host; use one of the nodes [0",
        ),
        (
            region(0, PAGE).numa(NumaPolicy::Interleave(vec![])),
            "the NUMA policy lists no nodes",
        ),
        (
            region(0, 1 << 44).lock(Lock::Now),
            "0x100000000000 bytes must be resident at startup, but only ",
        ),
        (
            region(0, PAGE).mergeable(true).backing(Backing::Memfd),
            "only private pages can be merged",
        ),
        (
            region(0, HUGE)
                .transparent_huge_pages(TransparentHugePages::On)
                .backing(Backing::private_file(patterned_file(512), 0)),
            "TransparentHugePages::Leave",
        ),
        (
            region(0, 4 * MIB)
                .blocks(non_zero(MIB), Unplugged::Mapped)
                .lock(Lock::Now),
            "unplugged blocks cannot be locked",
        ),
        (
            region(0, 3 * MIB).blocks(non_zero(2 * MIB), Unplugged::Mapped),
            "size 0x300000 is not a multiple of the block size, 0x200000",
        ),
        (
            region(0, 4 * PAGE).blocks(non_zero(0x800), Unplugged::Mapped),
            "block size 0x800",
        ),
    ]);
}

#[test]
fn build_with_invalid_block_size_shows_the_error_of_vm_memory() {
    for (size, block_size) in [(4 * MIB, 3 * MIB), (0x3000, 0x3000)] {
        let region = region(0, size).blocks(non_zero(block_size), Unplugged::Mapped);
        let error = build(region).map(|_| ()).unwrap_err();
        let message = error_chain(&error);
        let BuildError::Blocks { region, source } = error else {
            panic!("{message}");
        };
        let block_size = block_size as usize;
        assert_eq!(source, PluggedBlocksError::BlockSize { block_size });
        assert_eq!(
            message,
            format!(
                "region {region}: cannot divide it into blocks; use larger blocks, whose size is \
                a power of two: {source}"
            )
        );
    }
}

#[test]
fn build_of_overlapping_regions_returns_error() {
    for (one, other) in [
        ((0, 2 * MIB), (MIB, MIB)),
        ((MIB, MIB), (0, 2 * MIB)),
        ((0, MIB), (0, PAGE)),
    ] {
        let error = MemoryBuilder::new()
            .region(region(one.0, one.1))
            .region(region(other.0, other.1))
            .build::<()>()
            .unwrap_err();
        assert!(matches!(error, BuildError::Overlap { .. }), "{error}");
    }
    let error = MemoryBuilder::new()
        .region(region(0, MIB))
        .region(region(u64::MAX - 0xffff, 0x10000))
        .build::<()>()
        .unwrap_err();
    assert!(matches!(error, BuildError::PastTop { .. }), "{error}");
}

/// Builds two regions of `SIZE` bytes from two backings.
fn build_both(one: Backing, other: Backing, allow: bool) -> Result<Memory, BuildError> {
    let builder = MemoryBuilder::new()
        .region(region(0, 2 * HUGE).backing(one))
        .region(region(1 << 32, 2 * HUGE).backing(other));
    builder.allow_shared_bytes(allow).build()
}

#[test]
fn build_of_two_regions_on_the_same_bytes_names_both() {
    let test = "build_of_two_regions_on_the_same_bytes_names_both";
    let pages = HugePages::reserve(6, test);
    let disk = tempfile::tempdir().unwrap();
    let mounts = [
        Mounted::tmpfs("size=64m", test),
        pages
            .as_ref()
            .and_then(|_| Mounted::new("hugetlbfs", "pagesize=2m", test)),
    ];
    let mounts = mounts.iter().flatten().map(|mounted| &mounted.directory);
    for directory in mounts.chain([&disk]) {
        let path = directory.path().join("ram");
        open(&path).set_len(6 * HUGE).unwrap();
        // The same descriptor, a copy of it, and another descriptor of the same file.
        let file = Arc::new(open(&path));
        let again = |offset, sharing| Backing::File {
            file: Arc::clone(&file),
            offset,
            sharing,
        };
        let (shared, private) = (Sharing::Shared, Sharing::Private);
        let copy = file.try_clone().unwrap();
        for (one, other) in [
            (again(0, shared), again(0, shared)),
            (again(HUGE, shared), Backing::shared_file(copy, 0)),
            (again(0, shared), Backing::shared_file(open(&path), HUGE)),
            (again(0, private), again(HUGE, shared)),
            (again(0, shared), again(HUGE, private)),
        ] {
            let error = build_both(one.clone(), other.clone(), false).unwrap_err();
            assert!(matches!(error, BuildError::SharedBytes { .. }), "{error}");
            let error = error.to_string();
            assert!(
                error.contains("region 0x0-0x3fffff")
                    && error.contains("region 0x100000000-0x1003fffff"),
                "{error}"
            );
            build_both(one, other, true).unwrap();
        }
        for (one, other) in [
            (again(0, shared), again(2 * HUGE, shared)),
            (again(2 * HUGE, private), again(0, shared)),
        ] {
            build_both(one, other, false).unwrap();
        }
        if disk.path() == directory.path() {
            build_both(again(0, private), again(HUGE, private), false).unwrap();
        }
    }
}

#[test]
fn description_that_names_a_file_twice_returns_error() {
    let memory = build(region(0, 2 * HUGE).backing(Backing::Memfd)).unwrap();
    let (mut description, files) = vm_memory_host::describe(&memory).unwrap();
    let mut again = description.regions[0].clone();
    again.span.start = 1 << 32;
    description.regions.push(again);
    let fd = |_| OwnedFd::from(files.get(0).unwrap().try_clone().unwrap());
    let build = |description: &vm_memory_host::Description, fds| {
        description.builder(fds).unwrap().build::<()>().unwrap_err()
    };
    let error = build(&description, files.clone());
    assert!(matches!(error, BuildError::SharedBytes { .. }), "{error}");
    // The descriptor is in the list twice.
    if let vm_memory_host::BackingDescription::Descriptor { index, .. } =
        &mut description.regions[1].backing
    {
        *index = 1;
    }
    let error = build(&description, (0..2).map(fd).collect());
    assert!(matches!(error, BuildError::SharedBytes { .. }), "{error}");
    let zero = || Backing::shared_file(open("/dev/zero"), 0);
    build_both(zero(), zero(), false).unwrap();
}

#[test]
fn build_beyond_the_pool_reports_missing_pages() {
    let Some(_pages) = HugePages::reserve(2, "build_beyond_the_pool_reports_missing_pages") else {
        return;
    };
    let huge = region(0, 3 * HUGE).backing(Backing::Hugetlb { page_size: HUGE });
    let message = message(huge.clone());
    assert_eq!(
        message,
        "region 0x0-0x5fffff: 3 huge pages of 0x200000 bytes are required, \
        but only 2 are free; add 1 to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    );
    wait_for_free_pages(2);
    // Two regions that together exceed the pool return one error.
    let both = MemoryBuilder::new()
        .region(region(0, 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE }))
        .region(region(8 * MIB, 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE }));
    let error = both.build::<()>().unwrap_err();
    assert!(
        error
            .to_string()
            .contains(": together with the other regions, 4 huge pages"),
        "{error}"
    );
    assert!(
        matches!(
            error,
            BuildError::HugePages {
                wanted: 4,
                free: 2,
                ..
            }
        ),
        "{error}"
    );
    // A build reserves its pages before they are used.
    let two = build(region(0, 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE })).unwrap();
    assert_eq!(pool().unwrap().1, 0);
    assert!(build(region(0, HUGE).backing(Backing::Hugetlb { page_size: HUGE })).is_err());
    fill(&two, 0, 2 * HUGE, 1);
    drop(two);
    wait_for_free_pages(2);
    let bound = region(0, 2 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .numa(NumaPolicy::Bind(vec![0]));
    match build(bound) {
        Ok(bound) => assert_eq!(resident(&bound), 2 * HUGE),
        Err(error) => skipped("build_beyond_the_pool_reports_missing_pages (NUMA)", error),
    }
}

#[test]
fn failed_build_reserves_no_huge_pages() {
    let Some(_pages) = HugePages::reserve(2, "failed_build_reserves_no_huge_pages") else {
        return;
    };
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("huge", flags).unwrap();
    rustix::fs::ftruncate(&file, 2 * HUGE).unwrap();
    let error = MemoryBuilder::new()
        .region(region(0, 2 * HUGE).backing(Backing::shared_file(file.try_clone().unwrap(), 0)))
        .region(region(8 * MIB, PAGE).numa(NumaPolicy::Bind(vec![77])))
        .build::<()>()
        .unwrap_err();
    assert!(matches!(error, BuildError::NoSuchNode { .. }), "{error}");
    wait_for_free_pages(2);
}

#[test]
fn build_and_prefault_beyond_available_memory_return_error() {
    let much = || region(0, 1 << 44);
    let threads = std::num::NonZeroUsize::MIN;
    let proceed = |_| std::ops::ControlFlow::Continue(());
    let error = MemoryBuilder::new()
        .region(much())
        .prefault(threads, proceed)
        .build::<()>()
        .unwrap_err();
    assert!(
        matches!(
            error,
            BuildError::Memory {
                wanted: 0x1000_0000_0000,
                ..
            }
        ),
        "{error}"
    );
    // A description requests more together with another region.
    let (now, on_fault) = if can_lock_all_of(
        1 << 45,
        "build_and_prefault_beyond_available_memory_return_error (locked)",
    ) {
        (Lock::Now, Lock::OnFault)
    } else {
        (Lock::No, Lock::No)
    };
    let both = MemoryBuilder::new()
        .region(region(1 << 45, MIB).lock(now))
        .region(much().lock(on_fault));
    let (description, _) = vm_memory_host::describe(&both.build::<()>().unwrap()).unwrap();
    let mut hostile = description.clone();
    hostile.regions[0].options.lock = Lock::Now;
    let error = hostile
        .builder(vec![].into())
        .unwrap()
        .build::<()>()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("bytes must be resident at startup, but only"),
        "{error}"
    );
    // A mapping may be larger than memory; a prefault of it fails.
    let memory = MemoryBuilder::new().region(much()).build::<()>().unwrap();
    let error = vm_memory_host::prefault(&memory, threads, proceed)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("prefault needs 0x100000000000 bytes, but only "),
        "{error}"
    );
    // Resident pages do not count.
    let all = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = all
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .unwrap();
    let kib: u64 = total.split_whitespace().next().unwrap().parse().unwrap();
    let size = (kib << 10).next_multiple_of(HUGE);
    let memory = MemoryBuilder::new()
        .region(region(0, size))
        .build::<()>()
        .unwrap();
    vm_memory::Bytes::write_slice(&memory, &[1; 1 << 20], GuestAddress(0)).unwrap();
    match vm_memory_host::prefault(&memory, threads, |_| std::ops::ControlFlow::Break(())) {
        Err(PrefaultError::Memory { wanted, .. }) => assert!(wanted <= size - MIB, "{wanted:#x}"),
        // The host may have enough swap.
        other => assert!(
            matches!(other, Err(PrefaultError::Cancelled { .. })),
            "{other:?}"
        ),
    }
}

#[test]
fn build_of_read_only_file_maps_private_but_not_shared() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(4 * PAGE).unwrap();
    let open = || File::open(path.path()).unwrap();
    let shared = || region(0, 4 * PAGE).backing(Backing::shared_file(open(), 0));
    for region in [shared(), shared().sparse(true)] {
        let message = message(region);
        assert!(
            message.contains(
                "a shared file must be open for writing; open it for reading and writing"
            ),
            "{message}"
        );
    }
    let memory = build(region(0, 4 * PAGE).backing(Backing::private_file(open(), 0))).unwrap();
    fill(&memory, 0, PAGE, 9);
    assert_eq!(byte_of_page(&memory, 0), Some(9));
}

#[test]
fn lock_that_no_limit_refuses_names_no_limit() {
    let test = "lock_that_no_limit_refuses_names_no_limit";
    if !can_lock_all_of(8 * MIB, test) {
        return;
    }
    let Some(tmpfs) = Mounted::tmpfs("size=1m", test) else {
        return;
    };
    let file = open(tmpfs.directory.path().join("ram"));
    file.set_len(4 * MIB).unwrap();
    let region = region(0, 4 * MIB).backing(Backing::shared_file(file, 0));
    let message = message(region.sparse(true).lock(Lock::Now));
    assert!(message.contains("cannot lock it in memory"), "{message}");
    assert!(!message.contains("ulimit"), "{message}");
    assert!(message.contains("no space for holes"), "{message}");
}
