//! Tests of host addresses, guards and the lifetime of mappings.

use super::common::*;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    Permissions,
};
use vm_memory_host::{provisioned, Backing, MemoryBuilder, Region, TransparentHugePages};

/// Returns the offset of the first region in its file.
fn file_offset(memory: &Memory) -> u64 {
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    mapping.file().unwrap().1
}

#[test]
fn file_offset_of_memfd_equals_guest_address_modulo_huge_page() {
    for start in [0, MIB, 0x1_0000_0000, 0x1_0010_0000] {
        let region = |size| Region::new(GuestAddress(start), size).backing(Backing::Memfd);
        let memory = build(region(2 * HUGE)).unwrap();
        assert_eq!(file_offset(&memory), start % HUGE, "{start:#x}");
        fill(&memory, start, 2 * HUGE, 7);
        // Another process maps the same bytes.
        let other = build_again(&memory);
        assert_eq!(byte_of_page(&other, start + 2 * HUGE - PAGE), Some(7));
        // A region without transparent huge pages begins at the start of its file.
        assert_eq!(file_offset(&build(region(MIB)).unwrap()), 0);
        let off = region(2 * HUGE).transparent_huge_pages(TransparentHugePages::Off);
        assert_eq!(file_offset(&build(off).unwrap()), 0);
    }
}

#[test]
fn host_address_equals_guest_address_modulo_huge_page() {
    for start in [0, MIB, 0x1_0000_0000, 0x1_0010_0000] {
        for size in [2 * HUGE, 2 * HUGE + 3 * PAGE] {
            let memory = build(Region::new(GuestAddress(start), size)).unwrap();
            assert_eq!(
                host_address(&memory) as u64 % HUGE,
                start % HUGE,
                "{size:#x} bytes at {start:#x}"
            );
        }
    }
    let pages = HugePages::reserve(
        2,
        "host_address_equals_guest_address_modulo_huge_page (hugetlb)",
    );
    if pages.is_some() {
        let region =
            Region::new(GuestAddress(HUGE), 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE });
        assert_eq!(host_address(&build(region).unwrap()) as u64 % HUGE, 0);
    }
}

#[test]
fn adjacent_regions_share_a_reservation_between_guards() {
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(GuestAddress(8 * MIB), 4 * MIB).backing(Backing::Memfd))
        .region(Region::new(GuestAddress(0), 8 * MIB))
        .region(Region::new(GuestAddress(12 * MIB), MIB))
        .region(Region::new(GuestAddress(64 * MIB), MIB).backing(Backing::Memfd))
        .build()
        .unwrap();
    let at = |addr: u64| memory.get_host_address(GuestAddress(addr)).unwrap() as usize;
    assert_eq!(
        (at(8 * MIB), at(12 * MIB)),
        (at(0) + 8 * MIB as usize, at(0) + 12 * MIB as usize)
    );
    let all = 13 * MIB as usize;
    let runs = memory.host_runs(GuestAddress(0), all, Permissions::ReadWrite);
    let runs: Vec<usize> = runs.unwrap().map(|run| run.unwrap().len).collect();
    assert_eq!(runs, [all]);
    for (first, len) in [(0, 13 * MIB), (64 * MIB, MIB)] {
        for guard in [at(first) - 1, at(first) + len as usize] {
            let (_, _, permissions) = vma(guard).expect("a guard");
            assert_eq!(permissions, "---p");
        }
    }
    assert!(has_flag(at(64 * MIB), "sh") && vma(at(12 * MIB)).unwrap().2 == "rw-p");
    // A removed region is unmapped without its neighbours.
    let (without, removed) = memory
        .remove_region(GuestAddress(8 * MIB), 4 * MIB)
        .unwrap();
    let middle = at(8 * MIB);
    drop((memory, removed));
    assert_eq!(vma(middle).unwrap().2, "---p");
    without.write_obj(1u8, GuestAddress(8 * MIB - 1)).unwrap();
    without.write_obj(1u8, GuestAddress(12 * MIB)).unwrap();
}

#[test]
fn drop_of_last_map_unmaps_region() {
    let boot = build(Region::new(GuestAddress(0), MIB)).unwrap();
    let memory = GuestMemoryAtomic::new(boot);
    let module = build(Region::new(GuestAddress(1 << 32), MIB).backing(Backing::Memfd)).unwrap();
    let (_, region) = module.remove_region(GuestAddress(1 << 32), MIB).unwrap();
    drop(module);
    let address = provisioned(&*region).unwrap().host_address();
    memory.update(|map| map.insert_region(region)).unwrap();
    let reader = memory.memory();
    reader.write_obj(1u8, GuestAddress(1 << 32)).unwrap();
    let before = GuestAddress(1 << 32);
    let old = memory
        .update(|map| map.remove_region(before, MIB).map(|(map, _)| map))
        .unwrap();
    drop(old);
    assert_eq!(vma(address).unwrap().2, "rw-s");
    reader.write_obj(2u8, GuestAddress(1 << 32)).unwrap();
    drop(reader);
    assert!(vma(address).is_none_or(|(_, _, permissions)| permissions != "rw-s"));
}
