//! Tests of each kind of backing: memfd, huge pages, files, devices.

use std::fs::{File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::process::Command;

use super::common::*;
use test_support::{error_chain, refuse_calls_with, skipped, temp_file_of_len};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vm_memory_host::{
    describe, discard, plug, provisioned, Backing, BackingKind, BuildError, Region, Unplugged,
};

const START: u64 = 64 * MIB;
const SIZE: u64 = 4 * MIB;

#[test]
fn build_of_each_backing_holds_bytes_and_marks_dirty() {
    let pages = HugePages::reserve(
        SIZE / HUGE,
        "build_of_each_backing_holds_bytes_and_marks_dirty (hugetlb)",
    );
    for (kind, region) in region_of_each_backing(START, SIZE, pages.is_some()) {
        let memory = build(region).unwrap();
        let at = GuestAddress(START + SIZE - 8);
        let before = if kind.contains("file") {
            pattern_of_page(SIZE / PAGE)
        } else {
            0
        };
        assert_eq!(byte_of_page(&memory, at.0 - 4088), Some(before), "{kind}");
        memory.write_obj(0x1122_3344_5566_7788u64, at).unwrap();
        assert_eq!(
            memory.read_obj::<u64>(at).unwrap(),
            0x1122_3344_5566_7788,
            "{kind}"
        );
        assert!(
            memory.write_obj(1u8, GuestAddress(START + SIZE)).is_err() && memory.check_range(at, 8)
        );
        let region = memory.iter().next().unwrap();
        assert!(
            region.bitmap().dirty_at(SIZE as usize - 1) && !region.bitmap().dirty_at(0),
            "{kind}"
        );
        assert_eq!(region.is_hugetlbfs(), Some(kind.ends_with("hugetlb")));
        assert!(has_flag(host_address(&memory), "wr"), "{kind}");
    }
}

#[test]
fn shared_file_receives_writes_and_private_file_does_not() {
    let file = patterned_file(4);
    let again = || file.try_clone().unwrap();
    let shared =
        build(Region::new(GuestAddress(0), 2 * PAGE).backing(Backing::shared_file(again(), PAGE)))
            .unwrap();
    let private =
        build(Region::new(GuestAddress(0), 2 * PAGE).backing(Backing::private_file(again(), PAGE)))
            .unwrap();
    fill(&private, 0, PAGE, 0xaa);
    assert_eq!(byte_of_page(&shared, 0), Some(pattern_of_page(1)));
    fill(&shared, PAGE, PAGE, 0xbb);
    assert_eq!(byte_of_page(&private, PAGE), Some(0xbb));
    let mut bytes = Vec::new();
    let mut from_start = again();
    from_start.rewind().unwrap();
    from_start.read_to_end(&mut bytes).unwrap();
    assert_eq!(
        (bytes[PAGE as usize], bytes[2 * PAGE as usize]),
        (pattern_of_page(1), 0xbb)
    );
    let mapping = provisioned(shared.iter().next().unwrap()).unwrap();
    assert_eq!(mapping.file().unwrap().1, PAGE);
    // Temporary files may be on a tmpfs.
    assert!(matches!(
        mapping.kind(),
        BackingKind::File | BackingKind::Memfd
    ));
}

#[test]
fn build_of_memfd_seals_its_length() {
    let pages = HugePages::reserve(1, "build_of_memfd_seals_its_length (hugetlb)");
    let mut backings = vec![Backing::Memfd];
    if pages.is_some() {
        backings.push(Backing::Hugetlb { page_size: HUGE });
    }
    for backing in backings {
        let memory = build(Region::new(GuestAddress(0), HUGE).backing(backing)).unwrap();
        let region = memory.iter().next().unwrap();
        let file = GuestMemoryRegion::file_offset(region).unwrap().file();
        for len in [0, 2 * HUGE] {
            let error = file.set_len(len).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "length {len:#x}");
        }
        assert_eq!(file.metadata().unwrap().len(), HUGE);
        assert!(describe(&memory).unwrap().0.regions[0].options.sealed);
    }
}

#[test]
fn build_of_memfd_cannot_be_executed() {
    let pages = HugePages::reserve(1, "build_of_memfd_cannot_be_executed (hugetlb)");
    let mut backings = vec![Backing::Memfd];
    if pages.is_some() {
        backings.push(Backing::Hugetlb { page_size: HUGE });
    }
    for backing in backings.clone() {
        let memory = build(Region::new(GuestAddress(0), HUGE).backing(backing)).unwrap();
        memory
            .write_slice(b"#!/bin/sh\nexit 0\n#", GuestAddress(0))
            .unwrap();
        let (description, files) = describe(&memory).unwrap();
        let path = format!("/proc/self/fd/{}", files.get(0).unwrap().as_raw_fd());
        let error = Command::new(&path).status().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        let executable = Permissions::from_mode(0o777);
        let error = files.get(0).unwrap().set_permissions(executable).err();
        let seals = rustix::fs::fcntl_get_seals(files.get(0).unwrap())
            .unwrap()
            .bits();
        const F_SEAL_EXEC: u32 = 0x20;
        if seals & F_SEAL_EXEC == 0 {
            skipped("build_of_memfd_cannot_be_executed (seal)", "no F_SEAL_EXEC");
        } else if description.regions[0].to_string().contains(": memfd") {
            // hugetlbfs ignores the seal.
            assert_eq!(error.and_then(|e| e.raw_os_error()), Some(libc::EPERM));
        }
    }

    // A kernel before 6.3 refuses the flag `MFD_NOEXEC_SEAL`, and makes the memfd executable.
    for backing in backings {
        let build = || build(Region::new(GuestAddress(0), HUGE).backing(backing));
        let (number, flag) = (libc::SYS_memfd_create, (1, 8));
        let memory = match refuse_calls_with(number, flag, libc::EINVAL, build) {
            Ok(memory) => memory.unwrap(),
            Err(error) => {
                let name = "build_of_memfd_cannot_be_executed (before Linux 6.3)";
                return skipped(name, format!("no seccomp filters: {error}"));
            }
        };
        let region = memory.iter().next().unwrap();
        let file = GuestMemoryRegion::file_offset(region).unwrap().file();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o666);
    }
}

#[test]
fn build_of_shared_file_allocates_space_unless_sparse() {
    for sparse in [false, true] {
        let file = temp_file_of_len(4 * MIB);
        let shared = Backing::shared_file(file.try_clone().unwrap(), MIB);
        let memory = build(
            Region::new(GuestAddress(0), 2 * MIB)
                .backing(shared)
                .sparse(sparse),
        )
        .unwrap();
        let allocated = file.metadata().unwrap().blocks() * 512;
        let kind = provisioned(memory.iter().next().unwrap()).unwrap().kind();
        let wanted = if sparse { 0 } else { 2 * MIB };
        assert!(
            allocated >= wanted && (allocated == 0) == sparse,
            "{allocated:#x} on {kind}"
        );
        assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    }
}

#[test]
fn build_with_page_of_1_gib_takes_one_page() {
    const GIB: u64 = 1 << 30;
    let test = "build_with_page_of_1_gib_takes_one_page";
    // The turn at the pool of 2 MiB pages covers all pools.
    let Some(_turn) = HugePages::reserve(0, test) else {
        return;
    };
    let nr_hugepages = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    let free = || {
        let pools = vm_memory_host::huge_page_pools();
        pools
            .iter()
            .find(|pool| pool.page_size == GIB)
            .map_or(0, |pool| pool.free)
    };
    let before = std::fs::read_to_string(nr_hugepages).unwrap_or_default();
    let more = before.trim().parse::<u64>().map(|number| number + 1);
    let more = more.map_or(Err("no pool of 1 GiB pages".to_owned()), |more| {
        std::fs::write(nr_hugepages, more.to_string()).map_err(|error| error.to_string())
    });
    if more.is_err() || free() == 0 {
        skipped(test, format!("no free page: {more:?}, {} free", free()));
    } else {
        let region =
            Region::new(GuestAddress(4 * GIB), GIB).backing(Backing::Hugetlb { page_size: GIB });
        // The pool may have had free pages before.
        let free_before = free();
        let memory = build(region).unwrap();
        assert_eq!(
            (host_address(&memory) as u64 % GIB, free()),
            (0, free_before - 1)
        );
        memory
            .write_obj(0x1234_5678u32, GuestAddress(5 * GIB - 4))
            .unwrap();
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(5 * GIB - 4)).unwrap(),
            0x1234_5678
        );
        assert_eq!(resident(&memory), GIB);
        let half =
            Region::new(GuestAddress(0), GIB / 2).backing(Backing::Hugetlb { page_size: GIB });
        let error = build(half).map(|_| ()).unwrap_err().to_string();
        assert!(
            error.contains("not a multiple of the page size, 0x40000000"),
            "{error}"
        );
    }
    let _ = std::fs::write(nr_hugepages, before.trim());
}

#[test]
fn discard_of_character_device_writes_zeroes() {
    let zero = || Backing::shared_file(open("/dev/zero"), 0);
    let memory = build(Region::new(GuestAddress(0), 4 * MIB).backing(zero())).unwrap();
    assert_eq!(
        provisioned(memory.iter().next().unwrap()).unwrap().kind(),
        BackingKind::File
    );
    fill(&memory, 0, MIB, 7);
    assert_eq!(discard(&memory, GuestAddress(0), MIB).unwrap(), 0);
    assert_eq!(byte_of_page(&memory, MIB - PAGE), Some(0));
    let blocks = Region::new(GuestAddress(0), 4 * MIB)
        .backing(zero())
        .blocks(non_zero(MIB), Unplugged::Mapped);
    assert!(matches!(build(blocks), Err(BuildError::Conflict { .. })));
}

#[test]
fn discard_of_block_device_reads_as_zeroes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xab; 8 << 20]).unwrap();
    let Some(device) = LoopDevice::of(file.path(), "discard_of_block_device_reads_as_zeroes")
    else {
        return;
    };
    let shared = |size| {
        Region::new(GuestAddress(0), size).backing(Backing::shared_file(open(&device.path), 0))
    };
    let memory = build(shared(8 * MIB)).unwrap();
    assert_eq!(byte_of_page(&memory, 0), Some(0xab));
    fill(&memory, 0, 2 * MIB, 7);
    discard(&memory, GuestAddress(0), MIB).unwrap();
    for (page, byte) in [(0, 0), (MIB - PAGE, 0), (MIB, 7), (4 * MIB, 0xab)] {
        assert_eq!(byte_of_page(&memory, page), Some(byte), "{page:#x}");
    }
    let blocks = shared(4 * MIB).blocks(non_zero(MIB), Unplugged::Mapped);
    assert!(matches!(build(blocks), Err(BuildError::Conflict { .. })));
}

#[test]
fn build_of_block_device_that_is_too_short_returns_error() {
    let test = "build_of_block_device_that_is_too_short_returns_error";
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let Some(device) = LoopDevice::of(file.path(), test) else {
        return;
    };
    let device = || open(&device.path);
    for (backing, size) in [
        (Backing::shared_file(device(), 0), MIB + PAGE),
        (Backing::shared_file(device(), PAGE), MIB),
        (Backing::private_file(device(), 0), MIB + PAGE),
        (Backing::private_file(device(), MIB), PAGE),
    ] {
        let error = build(Region::new(GuestAddress(0), size).backing(backing)).unwrap_err();
        let expected = "needs a file of 0x101000 bytes, but the file ends at 0x100000";
        assert!(error.to_string().contains(expected), "{error}");
    }
    let last = Backing::shared_file(device(), MIB - PAGE);
    let memory = build(Region::new(GuestAddress(0), PAGE).backing(last)).unwrap();
    assert_eq!(byte_of_page(&memory, 0), Some(0));
}

#[test]
fn build_of_file_on_full_tmpfs_returns_error() {
    let Some(tmpfs) = Mounted::tmpfs("size=8m", "build_of_file_on_full_tmpfs_returns_error") else {
        return;
    };
    let file = |name: &str, len| {
        let file = open(tmpfs.directory.path().join(name));
        file.set_len(len).unwrap();
        file
    };
    let size = 16 * MIB;
    for backing in [
        Backing::shared_file(file("a", size), 0),
        Backing::private_file(file("a", size), 0),
    ] {
        let region = Region::new(GuestAddress(0), size).backing(backing);
        let error = error_chain(&build(region).unwrap_err());
        assert!(
            error.contains("cannot allocate space for its file; ") && error.contains(": No space"),
            "{error}"
        );
    }
    drop(std::fs::remove_file(tmpfs.directory.path().join("a")));
    // A file without holes needs no space and therefore no write access.
    let whole = file("b", MIB);
    (&whole).write_all(&vec![3; 1 << 20]).unwrap();
    let reading =
        |name| Backing::private_file(File::open(tmpfs.directory.path().join(name)).unwrap(), 0);
    let memory = build(Region::new(GuestAddress(0), MIB).backing(reading("b"))).unwrap();
    assert_eq!(byte_of_page(&memory, 0), Some(3));
    drop(file("holes", MIB));
    let error = build(Region::new(GuestAddress(0), MIB).backing(reading("holes")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("open it for writing or allow holes"),
        "{error}"
    );
    // Blocks take their space when they are plugged.
    let region =
        Region::new(GuestAddress(0), 4 * MIB).backing(Backing::shared_file(file("c", 4 * MIB), 0));
    let memory = build(region.blocks(non_zero(HUGE), Unplugged::Mapped)).unwrap();
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let filled = std::fs::write(tmpfs.directory.path().join("d"), vec![1; 16 << 20]);
    assert!(filled.is_err(), "the tmpfs is not limited");
    fill(&memory, 0, HUGE, 7);
    let error = plug(&memory, GuestAddress(HUGE), HUGE)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot plug"), "{error}");
    assert!(memory.read_obj::<u8>(GuestAddress(HUGE)).is_err());
}

#[test]
fn build_of_file_on_full_hugetlbfs_names_its_size_limit() {
    let Some(_pages) =
        HugePages::reserve(4, "build_of_file_on_full_hugetlbfs_names_its_size_limit")
    else {
        return;
    };
    let Some(mounted) = Mounted::new(
        "hugetlbfs",
        "size=2m,pagesize=2m",
        "build_of_file_on_full_hugetlbfs_names_its_size_limit",
    ) else {
        return;
    };
    let file = open(mounted.directory.path().join("a"));
    file.set_len(2 * HUGE).unwrap();
    let error =
        build(Region::new(GuestAddress(0), 2 * HUGE).backing(Backing::shared_file(file, 0)));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("mount the file's hugetlbfs with more space"),
        "{error}"
    );
}

#[test]
fn build_of_file_with_shared_blocks_has_space_for_each_write() {
    let test = "build_of_file_with_shared_blocks_has_space_for_each_write";
    let Some(disk) = Mounted::disk("xfs", &["-q"], 320 * MIB, test) else {
        return;
    };
    let file = open(disk.directory.path().join("ram"));
    file.write_all_at(&vec![1; 2 * MIB as usize], 0).unwrap();
    let copy = open(disk.directory.path().join("copy"));
    if let Err(error) = rustix::fs::ioctl_ficlone(&copy, &file) {
        return skipped(test, format!("no shared blocks: {error}"));
    }
    let region = Region::new(GuestAddress(0), 2 * MIB).backing(Backing::shared_file(file, 0));
    let memory = build(region).unwrap();
    let _other = take_the_rest(&disk);
    fill(&memory, 0, 2 * MIB, 2);
    let mut first = [0];
    copy.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1]);
}
