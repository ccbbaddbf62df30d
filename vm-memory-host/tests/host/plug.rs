//! Blocks that a guest plugs and unplugs.
#![expect(unsafe_code, reason = "writes to memory as a vCPU does")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use super::common::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vm_memory_host::{
    discard, plug, plug_state, provisioned, unplug, unplug_all, Backing, ChangeError,
    MemoryBuilder, PlugState, Region, Unplugged,
};

const START: u64 = 1 << 32;
const SIZE: u64 = 16 * MIB;

/// Blocks of one huge page each, of which none is plugged.
struct Blocks {
    memory: Memory,
    unplugged: Unplugged,
    /// The backing, for messages.
    what: String,
}

impl Blocks {
    /// Builds memory of each backing, with both kinds of unplugged blocks.
    ///
    /// Requires an error for a file.
    fn of_each_backing(huge: bool) -> Vec<Self> {
        let mut all = Vec::new();
        for unplugged in [Unplugged::Mapped, Unplugged::Protected] {
            for (kind, region) in region_of_each_backing(START, SIZE, huge) {
                let built = build(region.blocks(non_zero(HUGE), unplugged));
                if kind.contains("file") {
                    let error = built.map(drop).unwrap_err().to_string();
                    let needs = "blocks need anonymous memory, a shared memfd or shared huge pages";
                    assert!(error.contains(needs), "{error}");
                    continue;
                }
                all.push(Self {
                    memory: built.unwrap(),
                    unplugged,
                    what: format!("{kind}, {unplugged:?}"),
                });
            }
        }
        all
    }

    /// Checks that no access reaches the block at `offset`, and how it is mapped.
    fn assert_closed(&self, offset: u64) {
        let Self { memory, what, .. } = self;
        assert!(!is_accessible(memory, START + offset, 1), "{what}");
        let addr = GuestAddress(START + offset);
        assert!(memory.write_obj(1u8, addr).is_err(), "{what}");
        assert!(memory.read_obj::<u8>(addr).is_err(), "{what}");
        let protected = self.unplugged == Unplugged::Protected;
        assert_eq!(self.is_protected(offset), protected, "{what}");
    }

    fn is_protected(&self, offset: u64) -> bool {
        let vma = vma(host_address(&self.memory) + offset as usize);
        vma.unwrap().2.starts_with("---")
    }
}

#[test]
fn plug_of_each_backing_opens_blocks() {
    let pages = HugePages::reserve(4, "plug_of_each_backing_opens_blocks (hugetlb)");
    for blocks in Blocks::of_each_backing(pages.is_some()) {
        let Blocks { memory, what, .. } = &blocks;
        blocks.assert_closed(0);
        blocks.assert_closed(HUGE);
        assert_eq!(resident(memory), 0, "{what}: unplugged blocks use memory");

        plug(memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
        assert!(is_accessible(memory, START + HUGE, 2 * HUGE), "{what}");
        assert!(!is_accessible(memory, START + HUGE - 1, 2), "{what}");
        assert!(!is_accessible(memory, START + 3 * HUGE - 1, 2), "{what}");
        fill(memory, START + HUGE, 2 * HUGE, 0x33);
    }
}

#[test]
fn unplug_of_each_backing_closes_blocks_and_frees_their_pages() {
    let pages = HugePages::reserve(
        4,
        "unplug_of_each_backing_closes_blocks_and_frees_their_pages (hugetlb)",
    );
    for blocks in Blocks::of_each_backing(pages.is_some()) {
        let Blocks { memory, what, .. } = &blocks;
        plug(memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
        fill(memory, START + HUGE, 2 * HUGE, 0x33);
        let before = resident(memory);
        let region = memory.iter().next().unwrap();
        region.get_mmap().bitmap().get_and_reset();

        unplug(memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
        assert_eq!(resident(memory), before - HUGE, "{what}");
        blocks.assert_closed(2 * HUGE);
        assert!(!blocks.is_protected(HUGE), "{what}");
        // A discard does not open an unplugged block.
        discard(memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
        blocks.assert_closed(2 * HUGE);
        let last = START + 2 * HUGE - PAGE;
        assert_eq!(byte_of_page(memory, last), Some(0x33), "{what}");
        let dirty = |offset: u64| region.bitmap().dirty_at(offset as usize);
        assert!(dirty(2 * HUGE) && !dirty(0), "{what}");

        plug(memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
        assert_eq!(byte_of_page(memory, START + 2 * HUGE), Some(0), "{what}");
        unplug(memory, GuestAddress(START), SIZE).unwrap();
        blocks.assert_closed(HUGE);
    }
}

#[test]
fn plug_beyond_the_pool_returns_error_and_changes_nothing() {
    let Some(_pages) =
        HugePages::reserve(3, "plug_beyond_the_pool_returns_error_and_changes_nothing")
    else {
        return;
    };
    // Four blocks, three pages.
    let region = Region::new(GuestAddress(START), 4 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .blocks(non_zero(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    assert_eq!(pool().unwrap().1, 3);
    plug(&memory, GuestAddress(START), HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 2);
    let error = plug(&memory, GuestAddress(START), 4 * HUGE).unwrap_err();
    let expected = "cannot plug 0x800000 bytes at 0x100000000: 3 huge pages of 0x200000 bytes are \
        required, but only 2 are free; add 1 to ";
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(pool().unwrap().1, 2);
    assert!(is_accessible(&memory, START, HUGE) && !is_accessible(&memory, START + HUGE, 1));
    plug(&memory, GuestAddress(START + HUGE), 2 * HUGE).unwrap();
    fill(&memory, START, 3 * HUGE, 7);
    unplug(&memory, GuestAddress(START), 4 * HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 3);
}

#[test]
fn plug_of_invalid_range_changes_nothing() {
    let region = |start| Region::new(GuestAddress(start), 8 * MIB);
    let memory: Memory = MemoryBuilder::new()
        .region(region(0))
        .region(region(8 * MIB).blocks(non_zero(HUGE), Unplugged::Mapped))
        .build()
        .unwrap();
    let refused = |addr: u64, len: u64| plug(&memory, GuestAddress(addr), len).unwrap_err();
    assert!(matches!(refused(0, HUGE), ChangeError::NoBlocks { .. }));
    assert!(matches!(
        refused(8 * MIB, MIB),
        ChangeError::Unaligned {
            what: "blocks",
            granularity: HUGE,
            ..
        }
    ));
    assert!(matches!(refused(8 * MIB, 10 * MIB), ChangeError::Hole { addr } if addr == 16 * MIB));
    assert!(matches!(
        refused(u64::MAX - MIB, HUGE),
        ChangeError::PastTop { .. }
    ));
    assert!(matches!(
        unplug(&memory, GuestAddress(9 * MIB), HUGE).unwrap_err(),
        ChangeError::Unaligned { .. }
    ));
    assert!(!is_accessible(&memory, 8 * MIB, 1));
    let mapping = provisioned(memory.find_region(GuestAddress(8 * MIB)).unwrap()).unwrap();
    assert_eq!(mapping.plugged_blocks().unwrap().plugged_bytes(), 0);
}

#[test]
fn access_during_unplug_returns_error() {
    let region =
        Region::new(GuestAddress(START), SIZE).blocks(non_zero(HUGE), Unplugged::Protected);
    let memory = build(region).unwrap();
    let over = AtomicBool::new(false);
    let (succeeded, attempted) = (AtomicU64::new(0), AtomicU64::new(0));
    let refused = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut bytes = vec![5u8; HUGE as usize];
            while !over.load(Ordering::Relaxed) {
                let written = memory.write_slice(&bytes, GuestAddress(START)).is_ok();
                let read = memory.read_slice(&mut bytes, GuestAddress(START)).is_ok();
                succeeded.fetch_add(u64::from(written) + u64::from(read), Ordering::Relaxed);
                attempted.fetch_add(2, Ordering::Relaxed);
            }
        });
        // At least one access must succeed and one must fail.
        let refused = || {
            attempted
                .load(Ordering::Relaxed)
                .saturating_sub(succeeded.load(Ordering::Relaxed))
        };
        let mut rounds = 0;
        while rounds < 500 || succeeded.load(Ordering::Relaxed) == 0 || refused() == 0 {
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

#[test]
fn plug_during_unplug_keeps_later_writes() {
    // Freeing this many pages takes long. Those of the last block are freed last.
    let size = 64 * MIB;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = Region::new(GuestAddress(START), size).backing(backing);
        let memory = build(region.blocks(non_zero(HUGE), Unplugged::Mapped)).unwrap();
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let record = mapping.plugged_blocks().unwrap();
        let last = START + size - HUGE;
        for round in 1..20u64 {
            plug(&memory, GuestAddress(START), size).unwrap();
            fill(&memory, START, size, 1);
            std::thread::scope(|scope| {
                let unplugging =
                    scope.spawn(|| unplug(&memory, GuestAddress(START), size).unwrap());
                while record.is_plugged((last - START) as usize, 1) {
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

#[test]
fn discard_of_unplugged_blocks_frees_huge_pages() {
    let Some(_pages) = HugePages::reserve(2, "discard_of_unplugged_blocks_frees_huge_pages") else {
        return;
    };
    let region = Region::new(GuestAddress(START), 4 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .blocks(non_zero(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(START), 2 * HUGE).unwrap();
    fill(&memory, START, 2 * HUGE, 9);
    assert_eq!(
        discard(&memory, GuestAddress(START), 4 * HUGE).unwrap(),
        2 * HUGE
    );
    assert_eq!((resident(&memory), pool().unwrap().1), (2 * HUGE, 0));
    assert_eq!(byte_of_page(&memory, START), Some(0));
    unplug(&memory, GuestAddress(START), HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 1);
    fill(&memory, START + HUGE, HUGE, 3);
    unplug(&memory, GuestAddress(START), 4 * HUGE).unwrap();
    assert_eq!(pool().unwrap().1, 2);
}

#[test]
fn unplug_whose_discard_fails_unplugs_all_blocks() {
    let file =
        rustix::fs::memfd_create("sealed later", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, HUGE).unwrap();
    let memory: Memory = MemoryBuilder::new()
        .region(
            Region::new(GuestAddress(0), HUGE)
                .backing(Backing::shared_file(file.try_clone().unwrap(), 0))
                .blocks(non_zero(HUGE), Unplugged::Mapped),
        )
        .region(Region::new(GuestAddress(HUGE), HUGE).blocks(non_zero(HUGE), Unplugged::Mapped))
        .build()
        .unwrap();
    plug(&memory, GuestAddress(0), 2 * HUGE).unwrap();
    // The seal forbids punching holes.
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let error = unplug(&memory, GuestAddress(0), 2 * HUGE)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("region 0x0-0x1fffff: cannot discard 0x200000 bytes at 0x0; "),
        "{error}"
    );
    assert!(!is_accessible(&memory, 0, 1) && !is_accessible(&memory, HUGE, 1));
}

#[test]
fn plug_of_block_written_by_vcpu_reads_as_zeroes() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = Region::new(GuestAddress(0), 2 * HUGE).backing(backing);
        let memory = build(region.blocks(non_zero(HUGE), Unplugged::Mapped)).unwrap();
        // A vCPU writes to the block without consulting the record of plugged blocks.
        let host = std::ptr::with_exposed_provenance_mut::<u8>(host_address(&memory));
        // SAFETY: the block is mapped, readable and writable (`Unplugged::Mapped`), and no access
        // of this crate reaches it.
        #[expect(clippy::disallowed_methods, reason = "stands for a vCPU")]
        unsafe {
            host.write_bytes(7, HUGE as usize)
        };
        plug(&memory, GuestAddress(0), HUGE).unwrap();
        assert_eq!(byte_of_page(&memory, PAGE), Some(0));
        // Plugging again keeps the bytes.
        fill(&memory, 0, PAGE, 8);
        plug(&memory, GuestAddress(0), 2 * HUGE).unwrap();
        assert_eq!(byte_of_page(&memory, 0), Some(8));
    }
}

#[test]
fn plug_on_tmpfs_beyond_available_memory_returns_error() {
    let test = "plug_on_tmpfs_beyond_available_memory_returns_error";
    // No machine has so much memory, and the file system does not allocate it.
    const HUGE_BLOCK: u64 = 1 << 43;
    let Some(tmpfs) = Mounted::tmpfs("size=1m", test) else {
        return;
    };
    let file = open(tmpfs.directory.path().join("ram"));
    file.set_len(HUGE_BLOCK).unwrap();
    let region = Region::new(GuestAddress(0), HUGE_BLOCK).backing(Backing::shared_file(file, 0));
    let region = region.blocks(non_zero(HUGE_BLOCK), Unplugged::Mapped);
    vm_memory::fault::install().unwrap();
    let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
    let error = plug(&memory, GuestAddress(0), HUGE_BLOCK).unwrap_err();
    assert!(
        matches!(
            error,
            ChangeError::Memory {
                wanted: HUGE_BLOCK,
                ..
            }
        ),
        "{error}"
    );
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Plug(u64, u64),
    Unplug(u64, u64),
    UnplugAll(u64),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Compares the results and states with a flag for each block, over two regions.
    #[test]
    fn plug_and_unplug_return_the_bytes_that_changed(
        steps in prop::collection::vec((0u8..5, 0u64..16, 1u64..9, 0u64..16, 1u64..9), 1..30),
    ) {
        const BLOCKS: u64 = 16;
        const BLOCK: u64 = 4 * PAGE;
        let region = |start| {
            let region = Region::new(GuestAddress(start * BLOCK), BLOCKS / 2 * BLOCK);
            region.blocks(non_zero(BLOCK), Unplugged::Mapped)
        };
        let memory: Memory = MemoryBuilder::new()
            .region(region(0))
            .region(region(BLOCKS / 2).backing(Backing::Memfd))
            .build()
            .unwrap();
        let mut plugged = [false; BLOCKS as usize];
        for (kind, first, count, asked, asked_count) in steps {
            let count = count.min(BLOCKS - first);
            let step = match kind {
                0 | 1 => Step::Plug(first, count),
                2 | 3 => Step::Unplug(first, count),
                _ => Step::UnplugAll(first),
            };
            let at = |block: u64| GuestAddress(block * BLOCK);
            let (blocks, to, changed) = match step {
                Step::Plug(first, count) => {
                    let changed = plug(&memory, at(first), count * BLOCK);
                    (first..first + count, true, changed)
                }
                Step::Unplug(first, count) => {
                    let changed = unplug(&memory, at(first), count * BLOCK);
                    (first..first + count, false, changed)
                }
                Step::UnplugAll(block) => {
                    let first = block / (BLOCKS / 2) * (BLOCKS / 2);
                    let changed = unplug_all(&memory, GuestAddress(block * BLOCK + 5));
                    (first..first + BLOCKS / 2, false, changed)
                }
            };
            let mut expected = 0;
            for block in blocks {
                let state = &mut plugged[block as usize];
                expected += u64::from(*state != to) * BLOCK;
                if *state != to && to {
                    let byte: u8 = memory.read_obj(at(block)).unwrap();
                    prop_assert_eq!(byte, 0);
                    memory.write_obj(block as u8 + 1, at(block)).unwrap();
                }
                *state = to;
            }
            prop_assert_eq!(changed.unwrap(), expected, "{:?}", step);
            for block in 0..BLOCKS {
                let found = memory.read_obj::<u8>(at(block)).ok();
                let expected = plugged[block as usize].then_some(block as u8 + 1);
                prop_assert_eq!(found, expected);
            }
            let asked_count = asked_count.min(BLOCKS - asked);
            let range = &plugged[asked as usize..(asked + asked_count) as usize];
            let expected = match range.iter().filter(|state| **state).count() as u64 {
                0 => PlugState::Unplugged,
                count if count == asked_count => PlugState::Plugged,
                _ => PlugState::Mixed,
            };
            let found = plug_state(&memory, at(asked), asked_count * BLOCK);
            prop_assert_eq!(found.unwrap(), expected);
        }
    }
}

#[test]
fn plug_state_of_invalid_range_returns_error() {
    let region = |start| Region::new(GuestAddress(start), 8 * MIB);
    let memory: Memory = MemoryBuilder::new()
        .region(region(0))
        .region(region(8 * MIB).blocks(non_zero(HUGE), Unplugged::Mapped))
        .build()
        .unwrap();
    let error = |addr: u64, len: u64| plug_state(&memory, GuestAddress(addr), len).unwrap_err();
    assert_eq!(
        error(8 * MIB, 0).to_string(),
        "no bytes at guest address 0x800000 were requested; pass at least one block"
    );
    assert!(matches!(error(0, HUGE), ChangeError::NoBlocks { .. }));
    assert!(matches!(
        error(9 * MIB, HUGE),
        ChangeError::Unaligned { .. }
    ));
    assert!(matches!(error(8 * MIB, 10 * MIB), ChangeError::Hole { addr } if addr == 16 * MIB));
    assert!(matches!(error(u64::MAX, HUGE), ChangeError::PastTop { .. }));
    let error = |addr: u64| unplug_all(&memory, GuestAddress(addr)).unwrap_err();
    assert!(matches!(error(16 * MIB), ChangeError::Hole { addr } if addr == 16 * MIB));
    assert!(matches!(error(MIB), ChangeError::NoBlocks { .. }));
}
