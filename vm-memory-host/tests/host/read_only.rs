//! Read-only regions.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use super::common::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion,
};
use vm_memory_host::{
    content, discard, prefault, residency, Backing, BuildError, ChangeError, Lock, MemoryBuilder,
    Region, Sharing, Unplugged,
};

const ROM: u64 = 0xfff0_0000;

/// Creates a file of four patterned pages, open for reading only.
fn firmware() -> (tempfile::NamedTempFile, File) {
    let bytes: Vec<u8> = (0..4 * PAGE).map(|at| pattern_of_page(at / PAGE)).collect();
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), bytes).unwrap();
    let file = File::open(path.path()).unwrap();
    (path, file)
}

fn rom(file: &File, sharing: Sharing) -> Region {
    let backing = match sharing {
        Sharing::Shared => Backing::shared_file(file.try_clone().unwrap(), 0),
        Sharing::Private => Backing::private_file(file.try_clone().unwrap(), 0),
    };
    let region = Region::new(GuestAddress(ROM), 4 * PAGE).backing(backing);
    region.read_only(true)
}

#[test]
fn read_only_region_can_only_be_read() {
    let (_path, file) = firmware();
    for (sharing, protection) in [(Sharing::Shared, "r--s"), (Sharing::Private, "r--p")] {
        let memory = build(rom(&file, sharing)).unwrap();
        let (_, _, found) = vma(host_address(&memory)).unwrap();
        assert_eq!(found, protection);
        let go_on = |_| ControlFlow::Continue(());
        prefault(&memory, NonZeroUsize::MIN, go_on).unwrap();
        for memory in [&memory, &build_again(&memory)] {
            assert!(memory.write_obj(0u8, GuestAddress(ROM)).is_err());
            let error = discard(memory, GuestAddress(ROM), PAGE).unwrap_err();
            assert!(matches!(error, ChangeError::ReadOnly { .. }), "{error}");
            for page in 0..4 {
                let found = byte_of_page(memory, ROM + page * PAGE);
                assert_eq!(found, Some(pattern_of_page(page)));
            }
            let ranges: Vec<_> = content(memory).unwrap().map(Result::unwrap).collect();
            assert_eq!(ranges.iter().map(|range| range.size).sum::<u64>(), 4 * PAGE);
            assert_eq!(residency(memory).unwrap()[0].1.private, 0);
        }
        // A map with the region is replaced.
        let memory = GuestMemoryAtomic::new(memory);
        assert_eq!(
            memory.memory().read_obj::<u8>(GuestAddress(ROM)).unwrap(),
            1
        );
    }
    if can_lock("read_only_region_can_only_be_read (locked)") {
        let locked = build(rom(&file, Sharing::Private).lock(Lock::Now)).unwrap();
        assert!(has_flag(host_address(&locked), "lo"));
    }
}

#[test]
fn read_only_region_without_file_or_with_blocks_returns_error() {
    let (_path, file) = firmware();
    let anonymous = Region::new(GuestAddress(0), MIB).read_only(true);
    let blocks = rom(&file, Sharing::Shared).blocks(non_zero(PAGE), Unplugged::Mapped);
    for (region, part) in [
        (anonymous.clone(), "needs a file that has its bytes"),
        (
            anonymous.backing(Backing::Memfd),
            "needs a file that has its bytes",
        ),
        (blocks, "blocks"),
        (
            rom(&file, Sharing::Shared).read_only(false),
            "Region::read_only",
        ),
    ] {
        let error = build(region).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn read_only_regions_may_have_bytes_in_common() {
    let (path, file) = firmware();
    let alias = |start, read_only| {
        let file = if read_only {
            file.try_clone().unwrap()
        } else {
            open(path.path())
        };
        let region = Region::new(GuestAddress(start), 4 * PAGE);
        region
            .backing(Backing::shared_file(file, 0))
            .read_only(read_only)
    };
    let build = |other| {
        let builder = MemoryBuilder::new().region(alias(0, true));
        builder.region(other).build::<()>().map(drop)
    };
    build(alias(MIB, true)).unwrap();
    let error = build(alias(MIB, false)).unwrap_err();
    assert!(matches!(error, BuildError::SharedBytes { .. }), "{error}");
}

#[test]
fn each_region_changes_the_regions_before_it() {
    let region = |start| Region::new(GuestAddress(start), MIB);
    let memory: Memory = MemoryBuilder::new()
        .region(region(0))
        .region(region(4 * MIB))
        .each_region(|region| region.core_dump(false))
        .region(region(8 * MIB))
        .build()
        .unwrap();
    let dumped = |region| {
        vm_memory_host::provisioned(region)
            .unwrap()
            .options()
            .core_dump
    };
    let dumped: Vec<bool> = vm_memory::GuestMemoryBackend::iter(&memory)
        .map(dumped)
        .collect();
    assert_eq!(dumped, [false, false, true]);
}

#[test]
fn read_only_region_has_the_bytes_that_a_device_writes_to_its_file() {
    let file = patterned_file(4);
    let memory = build(rom(&file, Sharing::Shared)).unwrap();
    assert!(memory.write_obj(0x55u8, GuestAddress(ROM + 8)).is_err());
    file.write_all_at(&[0x55], 8).unwrap();
    let byte: u8 = memory.read_obj(GuestAddress(ROM + 8)).unwrap();
    assert_eq!(byte, 0x55);
    let region = memory.find_region(GuestAddress(ROM)).unwrap();
    assert!(!region.bitmap().dirty_at(8));
    region.bitmap().mark_dirty(8, 1);
    assert!(region.bitmap().dirty_at(8));
}
