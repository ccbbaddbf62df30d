//! Blocks that a guest plugs and unplugs: reached while they are there, gone and for nothing while they are not.

use std::sync::atomic::{AtomicBool, Ordering};

use super::common::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions};
use vm_memory_host::{
    describe, plug, prefault, provisioned, unplug, Backing, ChangeError, Region, Unplugged,
};

const START: u64 = 1 << 32;
const SIZE: u64 = 16 * MIB;

fn reachable(memory: &Memory, addr: u64, len: u64) -> bool {
    GuestMemory::check_range(memory, GuestAddress(addr), len as usize, Permissions::ReadWrite)
}

#[test]
fn blocks_of_each_backing_come_and_go() {
    let pages = HugePages::reserve(4, "blocks of hugetlb");
    for unplugged in [Unplugged::Mapped, Unplugged::Protected] {
        for (kind, region) in of_each_kind(START, SIZE, pages.is_some()) {
            let memory = build(region.blocks(blocks(HUGE), unplugged)).unwrap();
            let what = format!("{kind}, {unplugged:?}");
            assert!(!reachable(&memory, START, 1), "{what}");
            assert!(
                memory.write_obj(1u8, GuestAddress(START + HUGE)).is_err(),
                "{what}"
            );
            if !kind.contains("file") {
                assert_eq!(
                    resident(&memory),
                    0,
                    "{what}: nothing is taken for what is not there"
                );
            }

            plug(&memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
            assert!(reachable(&memory, START + HUGE, 2 * HUGE) && !reachable(&memory, START + HUGE - 1, 2));
            assert!(!reachable(&memory, START + 3 * HUGE - 1, 2), "{what}");
            fill(&memory, START + HUGE, 2 * HUGE, 0x33);
            let before = resident(&memory);
            let region = memory.iter().next().unwrap();
            region.get_mmap().bitmap().get_and_reset();

            unplug(&memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
            let after = resident(&memory);
            assert!(
                after >= before - HUGE && after <= before - HUGE + kept_at_edges(kind),
                "{what}: {after:#x}"
            );
            assert!(
                memory.read_obj::<u8>(GuestAddress(START + 2 * HUGE)).is_err(),
                "{what}"
            );
            assert_eq!(page_of(&memory, START + 2 * HUGE - PAGE), Some(0x33), "{what}");
            assert!(
                region.bitmap().dirty_at(2 * HUGE as usize) && !region.bitmap().dirty_at(0),
                "{what}"
            );

            // What comes again is zeroes.
            plug(&memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
            assert_eq!(page_of(&memory, START + 2 * HUGE), Some(0), "{what}");
            unplug(&memory, GuestAddress(START), SIZE).unwrap();
            assert!(!reachable(&memory, START + HUGE, 1), "{what}");
        }
    }
}

#[test]
fn blocks_of_huge_pages_are_taken_when_they_are_plugged() {
    let Some(_pages) = HugePages::reserve(3, "blocks and an empty pool") else {
        return;
    };
    // Four are there to be plugged, and three pages.
    let region = Region::new(GuestAddress(START), 4 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .blocks(blocks(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    assert_eq!(pool().unwrap().1, 3);
    plug(&memory, GuestAddress(START), HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 2);
    let error = plug(&memory, GuestAddress(START), 4 * HUGE).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no pages for 0x800000 bytes at 0x100000000, 2 huge pages of 0x200000 bytes are free"),
        "{error}"
    );
    // It changed nothing: what it took in vain is back, and what was there before is there.
    assert_eq!(pool().unwrap().1, 2);
    assert!(reachable(&memory, START, HUGE) && !reachable(&memory, START + HUGE, 1));
    plug(&memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
    fill(&memory, START, 3 * HUGE, 7);
    unplug(&memory, GuestAddress(START), 4 * HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 3);
}

#[test]
fn what_is_no_range_of_blocks_changes_nothing() {
    let region = |start| Region::new(GuestAddress(start), 8 * MIB);
    let memory: Memory = vm_memory_host::MemoryBuilder::new()
        .region(region(0))
        .region(region(8 * MIB).blocks(blocks(HUGE), Unplugged::Mapped))
        .build()
        .unwrap();
    let refused = |addr: u64, len: u64| plug(&memory, GuestAddress(addr), len).unwrap_err();
    assert!(matches!(refused(0, HUGE), ChangeError::NoBlocks { .. }));
    assert!(
        matches!(refused(8 * MIB, MIB), ChangeError::Unaligned { what: "blocks", granularity, .. } if granularity == HUGE)
    );
    assert!(matches!(refused(8 * MIB, 10 * MIB), ChangeError::Hole { addr } if addr == 16 * MIB));
    assert!(matches!(
        refused(u64::MAX - MIB, HUGE),
        ChangeError::PastTop { .. }
    ));
    assert!(matches!(
        unplug(&memory, GuestAddress(9 * MIB), HUGE).unwrap_err(),
        ChangeError::Unaligned { .. }
    ));
    assert!(!reachable(&memory, 8 * MIB, 1));
    let mapping = provisioned(memory.find_region(GuestAddress(8 * MIB)).unwrap()).unwrap();
    assert_eq!(mapping.plugged_blocks().unwrap().plugged_bytes(), 0);
}

#[test]
fn a_description_knows_what_is_plugged() {
    let region = Region::new(GuestAddress(START), SIZE)
        .backing(Backing::Memfd)
        .blocks(blocks(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(START + HUGE), 3 * HUGE).unwrap();
    fill(&memory, START + HUGE, PAGE, 0x21);
    let (description, files) = describe(&memory).unwrap();
    assert_eq!(
        description.regions[0].blocks.as_ref().unwrap().plugged,
        [(HUGE, 3 * HUGE)]
    );
    assert!(
        description
            .to_string()
            .contains("blocks of 0x200000, 0x600000 bytes plugged"),
        "{description}"
    );
    let fds = || vec![files[0].try_clone().unwrap().into()];
    let again: Memory = description.builder(fds()).unwrap().build().unwrap();
    assert_eq!(page_of(&again, START + HUGE), Some(0x21));
    assert!(!reachable(&again, START, 1));
    assert_eq!(describe(&again).unwrap().0, description);

    // One that lies about its blocks is refused.
    let mut wrong = description.clone();
    wrong.regions[0].blocks.as_mut().unwrap().plugged = vec![(HUGE, u64::MAX)];
    let error = wrong
        .builder(fds())
        .unwrap()
        .build::<()>()
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot have its first blocks plugged"), "{error}");
}

#[test]
fn a_prefault_leaves_out_what_is_not_plugged() {
    let region = Region::new(GuestAddress(START), SIZE).blocks(blocks(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(START + HUGE), HUGE).unwrap();
    let mut total = 0;
    prefault(&memory, std::num::NonZeroUsize::MIN, |progress| {
        total = progress.total;
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((total, resident(&memory)), (HUGE, HUGE));
}

/// A device that is at work on a block that is unplugged gets errors, and nobody dies.
#[test]
fn a_device_at_work_meets_an_error() {
    if let Err(error) = vm_memory::fault::install() {
        println!("SKIPPED: a device at work on a protected block: {error}");
        return;
    }
    let region = Region::new(GuestAddress(START), SIZE).blocks(blocks(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    let over = AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let (mut bytes, mut refused) = (vec![5u8; HUGE as usize], 0);
            while !over.load(Ordering::Relaxed) {
                refused += u64::from(memory.write_slice(&bytes, GuestAddress(START)).is_err());
                refused += u64::from(memory.read_slice(&mut bytes, GuestAddress(START)).is_err());
            }
            refused
        });
        for _ in 0..500 {
            plug(&memory, GuestAddress(START), HUGE).unwrap();
            std::thread::yield_now();
            unplug(&memory, GuestAddress(START), HUGE).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        device.join().unwrap()
    });
    assert!(refused > 0);
    assert_eq!(resident(&memory), 0);
}
