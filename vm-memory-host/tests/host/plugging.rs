//! Blocks that a guest plugs and unplugs: reached while they are there, gone and for nothing while they are not.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::common::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions,
};
use vm_memory_host::{
    describe, discard, plug, prefault, provisioned, unplug, Backing, ChangeError, MemoryBuilder,
    Region, Unplugged,
};

const START: u64 = 1 << 32;
const SIZE: u64 = 16 * MIB;

fn reachable(memory: &Memory, addr: u64, len: u64) -> bool {
    GuestMemory::check_range(
        memory,
        GuestAddress(addr),
        len as usize,
        Permissions::ReadWrite,
    )
}

#[test]
fn blocks_of_each_backing_come_and_go() {
    let pages = HugePages::reserve(4, "blocks of hugetlb");
    for unplugged in [Unplugged::Mapped, Unplugged::Protected] {
        for (kind, region) in of_each_kind(START, SIZE, pages.is_some()) {
            let region = region.blocks(blocks(HUGE), unplugged);
            if kind.contains("file") {
                let error = build(region).map(|_| ()).unwrap_err().to_string();
                assert!(
                    error.contains(
                        "blocks need anonymous memory, a shared memfd or shared huge pages"
                    ),
                    "{error}"
                );
                continue;
            }
            let memory = build(region).unwrap();
            let protected = |offset: u64| {
                area(host(&memory) + offset as usize)
                    .unwrap()
                    .2
                    .starts_with("---")
            };
            assert_eq!(protected(HUGE), unplugged == Unplugged::Protected);
            let what = format!("{kind}, {unplugged:?}");
            assert!(!reachable(&memory, START, 1), "{what}");
            assert!(
                memory.write_obj(1u8, GuestAddress(START + HUGE)).is_err(),
                "{what}"
            );
            assert_eq!(
                resident(&memory),
                0,
                "{what}: nothing is taken for what is not there"
            );

            plug(&memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
            assert!(
                reachable(&memory, START + HUGE, 2 * HUGE)
                    && !reachable(&memory, START + HUGE - 1, 2)
            );
            assert!(!reachable(&memory, START + 3 * HUGE - 1, 2), "{what}");
            fill(&memory, START + HUGE, 2 * HUGE, 0x33);
            let before = resident(&memory);
            let region = memory.iter().next().unwrap();
            region.get_mmap().bitmap().get_and_reset();

            unplug(&memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
            assert_eq!(resident(&memory), before - HUGE, "{what}");
            assert_eq!(
                protected(2 * HUGE),
                unplugged == Unplugged::Protected,
                "{what}"
            );
            assert!(!protected(HUGE), "{what}");
            // A discard of what is not there leaves it so.
            discard(&memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
            assert_eq!(
                protected(2 * HUGE),
                unplugged == Unplugged::Protected,
                "{what}"
            );
            assert!(
                memory
                    .read_obj::<u8>(GuestAddress(START + 2 * HUGE))
                    .is_err(),
                "{what}"
            );
            assert_eq!(
                page_of(&memory, START + 2 * HUGE - PAGE),
                Some(0x33),
                "{what}"
            );
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
            .contains("cannot plug 0x800000 bytes at 0x100000000: 3 huge pages of 0x200000 bytes are required, but only 2 are free; add 1 to "),
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
    for (offset, len) in [(HUGE, u64::MAX), (1, HUGE), (0, 1), (3 * HUGE, 6 * HUGE)] {
        let mut wrong = description.clone();
        wrong.regions[0].blocks.as_mut().unwrap().plugged = vec![(offset, len)];
        let error = wrong
            .builder(fds())
            .unwrap()
            .build::<()>()
            .unwrap_err()
            .to_string();
        let told = format!(
            "cannot plug {len:#x} bytes at offset {offset:#x}; the range must be whole blocks"
        );
        assert!(error.contains(&told), "{error}");
    }
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
        skipped::<()>("a device at work on a protected block", error.to_string());
        return;
    }
    let region = Region::new(GuestAddress(START), SIZE).blocks(blocks(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    let over = AtomicBool::new(false);
    let (done, meant) = (AtomicU64::new(0), AtomicU64::new(0));
    let refused = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut bytes = vec![5u8; HUGE as usize];
            while !over.load(Ordering::Relaxed) {
                let written = memory.write_slice(&bytes, GuestAddress(START)).is_ok();
                let read = memory.read_slice(&mut bytes, GuestAddress(START)).is_ok();
                done.fetch_add(u64::from(written) + u64::from(read), Ordering::Relaxed);
                meant.fetch_add(2, Ordering::Relaxed);
            }
        });
        // Until there was an access that was let through and one that was not, and then some.
        let refused = || {
            meant
                .load(Ordering::Relaxed)
                .saturating_sub(done.load(Ordering::Relaxed))
        };
        let mut rounds = 0;
        while rounds < 500 || done.load(Ordering::Relaxed) == 0 || refused() == 0 {
            plug(&memory, GuestAddress(START), HUGE).unwrap();
            std::thread::yield_now();
            unplug(&memory, GuestAddress(START), HUGE).unwrap();
            rounds += 1;
        }
        over.store(true, Ordering::Relaxed);
        device.join().unwrap();
        refused()
    });
    assert!(refused > 0);
    unplug(&memory, GuestAddress(START), HUGE).unwrap();
    assert_eq!(resident(&memory), 0);
}

/// A block that is plugged again while it is being unplugged keeps what is written to it from then on.
#[test]
fn what_is_plugged_keeps_its_bytes_whoever_unplugs_at_the_same_time() {
    // So many that taking back their pages lasts a while; the last block's are the last to go.
    let size = 64 * MIB;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = Region::new(GuestAddress(START), size).backing(backing);
        let memory = build(region.blocks(blocks(HUGE), Unplugged::Mapped)).unwrap();
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let bits = mapping.plugged_blocks().unwrap();
        let last = START + size - HUGE;
        for round in 1..20u64 {
            plug(&memory, GuestAddress(START), size).unwrap();
            fill(&memory, START, size, 1);
            std::thread::scope(|scope| {
                let unplugging =
                    scope.spawn(|| unplug(&memory, GuestAddress(START), size).unwrap());
                while bits.is_plugged((last - START) as usize, 1) {
                    std::hint::spin_loop();
                }
                plug(&memory, GuestAddress(last), HUGE).unwrap();
                memory
                    .write_obj(round, GuestAddress(last + HUGE - 8))
                    .unwrap();
                unplugging.join().unwrap();
            });
            assert_eq!(
                memory
                    .read_obj::<u64>(GuestAddress(last + HUGE - 8))
                    .unwrap(),
                round
            );
        }
    }
}

/// Of what is plugged and discarded, the pages are still the block's; of what is unplugged they are not.
#[test]
fn huge_pages_are_those_of_blocks_that_are_there() {
    let Some(_pages) = HugePages::reserve(2, "huge pages of blocks") else {
        return;
    };
    let region = Region::new(GuestAddress(START), 4 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .blocks(blocks(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(START), 2 * HUGE).unwrap();
    fill(&memory, START, 2 * HUGE, 9);
    assert_eq!(
        discard(&memory, GuestAddress(START), 4 * HUGE).unwrap(),
        2 * HUGE
    );
    assert_eq!((resident(&memory), pool().unwrap().1), (2 * HUGE, 0));
    assert_eq!(page_of(&memory, START), Some(0));
    unplug(&memory, GuestAddress(START), HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 1);
    fill(&memory, START + HUGE, HUGE, 3);
    unplug(&memory, GuestAddress(START), 4 * HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 2);
}

/// Where the system refuses to take pages back, the blocks are gone all the same: those of all regions.
#[test]
fn blocks_are_unplugged_whatever_becomes_of_their_pages() {
    let file =
        rustix::fs::memfd_create("sealed later", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, HUGE).unwrap();
    let memory: Memory = MemoryBuilder::new()
        .region(
            Region::new(GuestAddress(0), HUGE)
                .backing(Backing::shared_file(file.try_clone().unwrap(), 0))
                .blocks(blocks(HUGE), Unplugged::Mapped),
        )
        .region(Region::new(GuestAddress(HUGE), HUGE).blocks(blocks(HUGE), Unplugged::Mapped))
        .build()
        .unwrap();
    plug(&memory, GuestAddress(0), 2 * HUGE).unwrap();
    // No hole can be punched from now on.
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let error = unplug(&memory, GuestAddress(0), 2 * HUGE)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("region 00000000-001fffff: cannot discard the pages of"),
        "{error}"
    );
    assert!(!reachable(&memory, 0, 1) && !reachable(&memory, HUGE, 1));
}

/// What a vCPU has left in a block that was not there is gone when the block comes.
#[test]
fn blocks_are_zeroes_when_they_come() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = Region::new(GuestAddress(0), 2 * HUGE).backing(backing);
        let memory = build(region.blocks(blocks(HUGE), Unplugged::Mapped)).unwrap();
        // As a vCPU would: past the bits.
        let region = memory.iter().next().unwrap();
        let bits = provisioned(region).unwrap().plugged_blocks().unwrap();
        bits.plug(0, HUGE as usize).unwrap();
        fill(&memory, 0, HUGE, 7);
        bits.unplug(0, HUGE as usize).unwrap();
        plug(&memory, GuestAddress(0), HUGE).unwrap();
        assert_eq!(page_of(&memory, PAGE), Some(0));
        // What is there stays as it is.
        fill(&memory, 0, PAGE, 8);
        plug(&memory, GuestAddress(0), 2 * HUGE).unwrap();
        assert_eq!(page_of(&memory, 0), Some(8));
    }
}

/// Pages that are brought in while blocks go do not stay behind.
#[test]
fn a_prefault_leaves_nothing_in_blocks_that_go() {
    let region = Region::new(GuestAddress(0), 64 * MIB).blocks(blocks(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    for _ in 0..20 {
        plug(&memory, GuestAddress(0), 64 * MIB).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                prefault(&memory, std::num::NonZeroUsize::MIN, |_| {
                    std::ops::ControlFlow::Continue(())
                })
                .unwrap();
            });
            for block in (0..64 * MIB).step_by(HUGE as usize) {
                unplug(&memory, GuestAddress(block), HUGE).unwrap();
            }
        });
        assert_eq!(resident(&memory), 0);
    }
}
