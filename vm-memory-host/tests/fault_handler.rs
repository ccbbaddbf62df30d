//! Regions with blocks need the fault handler, if an access during an unplug could raise a signal.
//!
//! The handler cannot be removed, so the test is a separate program.
#![cfg(target_os = "linux")]

use std::num::NonZeroU64;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use test_support::HugePages;
use vm_memory::{fault, Bytes, GuestAddress, GuestMemoryMmap};
use vm_memory_host::{describe, plug, unplug, Backing, MemoryBuilder, Region, Unplugged};

const HUGE: u64 = 2 << 20;

fn build(backing: Backing, unplugged: Unplugged) -> Result<GuestMemoryMmap, String> {
    let region = Region::new(GuestAddress(0), 4 * HUGE).backing(backing);
    let region = region.blocks(NonZeroU64::new(HUGE).unwrap(), unplugged);
    let built = MemoryBuilder::new().region(region).build();
    built.map_err(|error| error.to_string())
}

fn received_memfd() -> Backing {
    let memfd = memfd_create("received", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memfd, 4 * HUGE).unwrap();
    Backing::shared_file(memfd, 0)
}

#[test]
fn build_of_blocks_that_can_raise_signals_without_handler_returns_error() {
    let pages = HugePages::reserve(1, "build_of_blocks_that_can_raise_signals (hugetlb)");
    let mut cases = vec![
        (Backing::Anonymous, Unplugged::Protected),
        (Backing::Memfd, Unplugged::Protected),
        (received_memfd(), Unplugged::Protected),
    ];
    if pages.is_some() {
        let hugetlb = Backing::Hugetlb { page_size: HUGE };
        cases.push((hugetlb.clone(), Unplugged::Protected));
        cases.push((hugetlb, Unplugged::Mapped));
    }
    assert!(!fault::is_installed());
    for (backing, unplugged) in &cases {
        let error = build(backing.clone(), *unplugged).unwrap_err();
        assert!(
            error.contains("call vm_memory::fault::install first"),
            "{error}"
        );
    }
    for backing in [Backing::Anonymous, Backing::Memfd, received_memfd()] {
        build(backing, Unplugged::Mapped).unwrap();
    }
    fault::install().unwrap();
    assert!(fault::is_installed());
    for (backing, unplugged) in cases {
        let memory = build(backing, unplugged).unwrap();
        plug(&memory, GuestAddress(0), HUGE).unwrap();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        unplug(&memory, GuestAddress(0), HUGE).unwrap();
        describe(&memory).unwrap();
    }
}
