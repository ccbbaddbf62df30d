//! Tests that build, populate, discard and plug memory on Windows.
#![cfg(windows)]

use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::thread;

use test_support::{skipped, MIB, PAGE_U64 as PAGE};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    fault, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, Permissions,
};
use vm_memory_host::{
    discard, discard_pages, plug, plug_state, prefault, provisioned, residency, still_mapped,
    unplug, unplug_all, zero_range, Backing, BackingKind, BuildError, Lock, MemoryBuilder,
    NumaPolicy, PlugState, Region, Residency, TransparentHugePages, Unplugged,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const BLOCK: u64 = MIB;

fn build(region: Region) -> Result<Memory, BuildError> {
    fault::install().unwrap();
    MemoryBuilder::new().region(region).build()
}

/// Returns a request for a region of `blocks` blocks at guest address 0.
fn blocks(blocks: u64) -> Region {
    let size = NonZeroU64::new(BLOCK).unwrap();
    Region::new(GuestAddress(0), blocks * BLOCK).blocks(size, Unplugged::Protected)
}

fn is_accessible(memory: &Memory, addr: u64, len: u64) -> bool {
    let len = usize::try_from(len).unwrap();
    GuestMemory::check_range(memory, GuestAddress(addr), len, Permissions::ReadWrite)
}

fn usage(memory: &Memory) -> Residency {
    residency(memory)
        .unwrap()
        .into_iter()
        .map(|(_, usage)| usage)
        .sum()
}

fn is_dirty(memory: &Memory, addr: u64) -> bool {
    let region = memory.iter().next().unwrap();
    region.bitmap().dirty_at(usize::try_from(addr).unwrap())
}

fn harvest(memory: &Memory) {
    let region = memory.iter().next().unwrap();
    region.get_mmap().bitmap().reset();
}

/// Returns whether all bytes of a range are `byte`.
fn reads_as(memory: &Memory, addr: u64, len: u64, byte: u8) -> bool {
    let mut bytes = vec![!byte; usize::try_from(len).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes.iter().all(|found| *found == byte)
}

fn fill(memory: &Memory, addr: u64, len: u64, byte: u8) {
    let bytes = vec![byte; usize::try_from(len).unwrap()];
    memory.write_slice(&bytes, GuestAddress(addr)).unwrap();
}

#[test]
fn build_of_several_regions_returns_aligned_zeroed_memory() {
    // Adjacent regions, and one that is not a multiple of a large page.
    let sizes = [
        (0, 4 * MIB),
        (4 * MIB, 2 * MIB + PAGE),
        (1 << 32, PAGE),
        (3 << 32, 64 * MIB),
    ];
    let mut builder = MemoryBuilder::new();
    for (start, size) in sizes {
        builder = builder.region(Region::new(GuestAddress(start), size));
    }
    let memory: Memory = builder.build().unwrap();
    for (region, (start, size)) in memory.iter().zip(sizes) {
        let mapping = provisioned(region).unwrap();
        assert_eq!((mapping.span().start, mapping.span().size), (start, size));
        assert_eq!(mapping.kind(), BackingKind::Anonymous);
        assert_eq!(mapping.page_size(), PAGE);
        assert!(mapping.file().is_none());
        let align = if size >= 2 * MIB { 2 * MIB } else { PAGE };
        let host = u64::try_from(mapping.host_address()).unwrap();
        assert_eq!(host % align, start % align, "{start:#x}");
        assert!(reads_as(&memory, start, size, 0));
        memory
            .write_obj(7u8, GuestAddress(start + size - 1))
            .unwrap();
    }
    drop(memory);
    assert_eq!(still_mapped(), 0);
}

#[test]
fn build_of_region_larger_than_the_address_space_returns_error() {
    let size = 1 << 47;
    let error = build(Region::new(GuestAddress(0), size)).unwrap_err();
    let BuildError::System { region, source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(region.size, size);
    assert!(source.raw_os_error().is_some());
}

#[test]
fn error_of_build_is_shortage_only_if_memory_is_short() {
    let error = |number| BuildError::System {
        region: (0..1).into(),
        what: "map it",
        source: std::io::Error::from_raw_os_error(number),
        advice: String::new(),
    };
    // ERROR_COMMITMENT_LIMIT, ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY.
    for number in [1455, 8, 14] {
        assert!(error(number).is_shortage(), "{number}");
    }
    // ERROR_ACCESS_DENIED, ERROR_PRIVILEGE_NOT_HELD.
    for number in [5, 1314] {
        assert!(!error(number).is_shortage(), "{number}");
    }
}

#[test]
fn build_of_region_with_blocks_commits_none_of_them() {
    // More than most machines can commit.
    let size = NonZeroU64::new(1 << 30).unwrap();
    let region = Region::new(GuestAddress(0), 1 << 40).blocks(size, Unplugged::Protected);
    fault::install().unwrap();
    let region = region.build::<()>().unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    assert!(memory.read_obj::<u8>(GuestAddress(0)).is_err());
    let addr = GuestAddress(1023 << 30);
    assert_eq!(plug(&memory, addr, size.get()).unwrap(), size.get());
    memory.write_obj(7u8, addr).unwrap();
    assert_eq!(memory.read_obj::<u8>(addr).unwrap(), 7);
}

#[test]
fn plug_of_blocks_gives_zeroes_and_unplug_makes_them_inaccessible() {
    let memory = build(blocks(8)).unwrap();
    assert!(!is_accessible(&memory, 0, 1));
    let addr = GuestAddress(2 * BLOCK);
    assert_eq!(plug(&memory, addr, 2 * BLOCK).unwrap(), 2 * BLOCK);
    assert_eq!(
        plug(&memory, GuestAddress(BLOCK), 2 * BLOCK).unwrap(),
        BLOCK
    );
    assert_eq!(
        plug_state(&memory, addr, 2 * BLOCK).unwrap(),
        PlugState::Plugged
    );
    assert_eq!(
        plug_state(&memory, addr, 3 * BLOCK).unwrap(),
        PlugState::Mixed
    );
    assert!(reads_as(&memory, BLOCK, 3 * BLOCK, 0));
    fill(&memory, BLOCK, 3 * BLOCK, 7);
    harvest(&memory);

    // A plug of a plugged block keeps its bytes.
    assert_eq!(plug(&memory, addr, BLOCK).unwrap(), 0);
    assert!(reads_as(&memory, BLOCK, 3 * BLOCK, 7));
    assert!(!is_dirty(&memory, 2 * BLOCK));

    assert_eq!(unplug(&memory, addr, BLOCK).unwrap(), BLOCK);
    assert!(!is_accessible(&memory, 2 * BLOCK, 1));
    assert!(is_dirty(&memory, 2 * BLOCK) && !is_dirty(&memory, BLOCK));
    assert!(memory.read_obj::<u8>(addr).is_err());
    // Blocks beside it keep their bytes, and the block is empty when it is plugged again.
    assert!(reads_as(&memory, BLOCK, BLOCK, 7) && reads_as(&memory, 3 * BLOCK, BLOCK, 7));
    assert_eq!(plug(&memory, addr, BLOCK).unwrap(), BLOCK);
    assert!(reads_as(&memory, 2 * BLOCK, BLOCK, 0));

    assert_eq!(unplug_all(&memory, GuestAddress(0)).unwrap(), 3 * BLOCK);
    assert_eq!(usage(&memory), Residency::default());
}

#[test]
fn access_past_the_record_to_unplugged_block_returns_error_with_fault_handler() {
    let memory = build(blocks(2)).unwrap();
    plug(&memory, GuestAddress(0), BLOCK).unwrap();
    // The slice was made while the block was plugged.
    let region = memory.iter().next().unwrap();
    let slice = region.get_slice(Default::default(), 4096).unwrap();
    unplug(&memory, GuestAddress(0), BLOCK).unwrap();
    assert!(slice.read_obj::<u64>(0).is_err());
    assert!(slice.write_obj(1u64, 8).is_err());
}

#[test]
fn discard_of_written_pages_reads_as_zeroes_and_marks_them() {
    let memory = build(Region::new(GuestAddress(0), 4 * MIB)).unwrap();
    fill(&memory, 0, 4 * MIB, 7);
    harvest(&memory);
    assert_eq!(
        discard(&memory, GuestAddress(MIB), 2 * MIB).unwrap(),
        2 * MIB
    );
    assert!(reads_as(&memory, 0, MIB, 7) && reads_as(&memory, 3 * MIB, MIB, 7));
    for addr in [0, MIB - PAGE, MIB, 3 * MIB - PAGE, 3 * MIB] {
        let is_discarded = (MIB..3 * MIB).contains(&addr);
        assert_eq!(is_dirty(&memory, addr), is_discarded, "{addr:#x}");
    }
    assert!(usage(&memory).resident <= 2 * MIB + 16 * PAGE);
    assert!(reads_as(&memory, MIB, 2 * MIB, 0));
    fill(&memory, MIB, 2 * MIB, 8);
    assert!(reads_as(&memory, MIB, 2 * MIB, 8));

    let report = discard_pages(&memory, [3u32, 4, 3, 0x1_0000]);
    assert_eq!(
        (report.discarded, report.freed, report.refused),
        (2, 2 * PAGE, 1)
    );
    assert!(reads_as(&memory, 3 * PAGE, 2 * PAGE, 0) && reads_as(&memory, 5 * PAGE, PAGE, 7));

    let freed = zero_range(&memory, GuestAddress(PAGE / 2), 2 * PAGE).unwrap();
    assert_eq!(freed, PAGE);
    assert!(reads_as(&memory, 0, PAGE / 2, 7) && reads_as(&memory, PAGE / 2, 2 * PAGE, 0));
}

#[test]
fn discard_in_region_with_blocks_leaves_unplugged_blocks_inaccessible() {
    let memory = build(blocks(3)).unwrap();
    plug(&memory, GuestAddress(BLOCK), BLOCK).unwrap();
    fill(&memory, BLOCK, BLOCK, 7);
    assert_eq!(
        discard(&memory, GuestAddress(0), 3 * BLOCK).unwrap(),
        3 * BLOCK
    );
    assert!(reads_as(&memory, BLOCK, BLOCK, 0));
    assert!(!is_accessible(&memory, 0, BLOCK) && !is_accessible(&memory, 2 * BLOCK, BLOCK));
    assert_eq!(usage(&memory).resident, usage(&memory).mapped);
}

#[test]
fn prefault_of_all_pages_makes_them_resident() {
    let memory = build(Region::new(GuestAddress(0), 80 * MIB)).unwrap();
    fill(&memory, 0, PAGE, 7);
    let before = usage(&memory).resident;
    assert!(before < 80 * MIB, "{before:#x}");
    harvest(&memory);
    let mut last = None;
    prefault(&memory, NonZeroUsize::new(3).unwrap(), |progress| {
        last = Some((progress.done, progress.total));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(last, Some((80 * MIB, 80 * MIB)));
    let usage = usage(&memory);
    assert_eq!((usage.resident, usage.mapped), (80 * MIB, 80 * MIB));
    assert!(reads_as(&memory, 0, PAGE, 7) && !is_dirty(&memory, 0));

    let builder = MemoryBuilder::new().region(Region::new(GuestAddress(0), 4 * MIB));
    let populated = builder.prefault(NonZeroUsize::MIN, |_| ControlFlow::Continue(()));
    assert_eq!(self::usage(&populated.build().unwrap()).resident, 4 * MIB);
}

#[test]
fn prefault_beside_discard_returns_no_error() {
    const SIZE: u64 = 32 * MIB;
    let memory = build(Region::new(GuestAddress(0), SIZE)).unwrap();
    let (is_started, is_done) = (Barrier::new(2), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            is_started.wait();
            while !is_done.load(Ordering::Relaxed) {
                discard(&memory, GuestAddress(0), SIZE).unwrap();
                thread::yield_now();
            }
        });
        is_started.wait();
        let results: Vec<_> = (0..100)
            .map(|_| prefault(&memory, NonZeroUsize::MIN, |_| ControlFlow::Continue(())))
            .collect();
        is_done.store(true, Ordering::Relaxed);
        for result in results {
            result.unwrap();
        }
    });
}

#[test]
fn residency_counts_pages_that_were_written() {
    let memory = build(Region::new(GuestAddress(0), 8 * MIB)).unwrap();
    assert_eq!(usage(&memory).resident, 0);
    fill(&memory, 0, 16 * PAGE, 7);
    let usage = usage(&memory);
    assert!((16 * PAGE..8 * MIB).contains(&usage.resident), "{usage:?}");
    assert_eq!((usage.file, usage.swapped, usage.is_partial), (0, 0, false));
}

#[test]
fn build_of_shared_file_maps_its_bytes_at_the_offset() {
    let file = test_support::temp_file_of_len(3 * PAGE);
    let backing = Backing::shared_file(file.try_clone().unwrap(), PAGE);
    let memory = build(Region::new(GuestAddress(0), 2 * PAGE).backing(backing)).unwrap();
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    assert_eq!(mapping.kind(), BackingKind::File);
    assert_eq!(mapping.file().map(|(_, offset)| offset), Some(PAGE));
    fill(&memory, PAGE, PAGE, 7);

    let other = Backing::shared_file(file.try_clone().unwrap(), 0);
    let other = build(Region::new(GuestAddress(0), 3 * PAGE).backing(other)).unwrap();
    assert!(reads_as(&other, PAGE, PAGE, 0) && reads_as(&other, 2 * PAGE, PAGE, 7));
    // The pages are overwritten, which frees nothing.
    assert_eq!(discard(&memory, GuestAddress(PAGE), PAGE).unwrap(), 0);
    assert!(reads_as(&other, 2 * PAGE, PAGE, 0));

    let backing = Backing::shared_file(file, 0);
    let read_only = Region::new(GuestAddress(0), PAGE)
        .backing(backing)
        .read_only(true);
    let read_only = build(read_only).unwrap();
    assert!(read_only.read_obj::<u8>(GuestAddress(0)).is_ok());
    assert!(read_only.write_obj(1u8, GuestAddress(0)).is_err());
    assert!(discard(&read_only, GuestAddress(0), PAGE).is_err());
}

#[test]
fn build_of_file_that_does_not_fit_returns_error() {
    let file = test_support::temp_file_of_len(2 * PAGE);
    let of = |offset, size| {
        let backing = Backing::shared_file(file.try_clone().unwrap(), offset);
        build(Region::new(GuestAddress(0), size).backing(backing)).unwrap_err()
    };
    assert!(matches!(
        of(PAGE, 2 * PAGE),
        BuildError::FileTooShort { .. }
    ));
    assert!(matches!(of(PAGE / 2, PAGE), BuildError::Misaligned { .. }));
    assert!(matches!(of(1 << 63, PAGE), BuildError::FileOffset { .. }));
    assert_eq!(file.metadata().unwrap().len(), 2 * PAGE);
    let region = |start| {
        let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
        Region::new(GuestAddress(start), PAGE).backing(backing)
    };
    let twice = || {
        MemoryBuilder::new()
            .region(region(0))
            .region(region(1 << 32))
    };
    let error = twice().build::<()>().unwrap_err();
    assert!(matches!(error, BuildError::SharedBytes { .. }), "{error}");
    assert!(twice().allow_shared_bytes(true).build::<()>().is_ok());
}

#[test]
fn build_of_unsupported_option_returns_conflict_with_remedy() {
    let region = || Region::new(GuestAddress(0), 4 * MIB);
    let block = NonZeroU64::new(BLOCK).unwrap();
    let private = Backing::private_file(test_support::temp_file_of_len(4 * MIB), 0);
    for (region, problem) in [
        (region().backing(Backing::Memfd), "Windows has no memfd"),
        (region().backing(private), "private mappings of files"),
        (
            region().transparent_huge_pages(TransparentHugePages::On),
            "no transparent huge pages",
        ),
        (
            region().numa(NumaPolicy::Bind(vec![0])),
            "NumaPolicy::Preferred",
        ),
        (
            region().numa(NumaPolicy::Interleave(vec![0])),
            "NumaPolicy::Preferred",
        ),
        (region().lock(Lock::OnFault), "Lock::Now"),
        (region().mergeable(true), "does not merge"),
        (region().core_dump(false), "cannot be excluded from dumps"),
        (
            region().name("ram").require_name(true),
            "no names of regions",
        ),
        (region().sealed(true), "has no seals"),
        (region().release_huge_pages(true), "release_huge_pages"),
        (region().read_only(true), "Backing::shared_file"),
        (
            region().blocks(block, Unplugged::Mapped),
            "Unplugged::Protected",
        ),
        (
            region().blocks(block, Unplugged::Protected).reserve(true),
            "without blocks",
        ),
    ] {
        let error = build(region).unwrap_err();
        assert!(matches!(error, BuildError::Conflict { .. }), "{error}");
        assert!(error.to_string().contains(problem), "{error}");
    }
    // Windows does these by itself.
    let region = region().reserve(true).forked(false).name("ram");
    build(region.transparent_huge_pages(TransparentHugePages::Off)).unwrap();
}

#[test]
fn build_on_preferred_node_succeeds_only_if_the_node_exists() {
    let region = |node| Region::new(GuestAddress(0), MIB).numa(NumaPolicy::Preferred(node));
    let memory = build(region(0)).unwrap();
    fill(&memory, 0, MIB, 7);
    match build(region(u32::MAX)).unwrap_err() {
        BuildError::NoSuchNode { available, .. } => assert_eq!(available.first(), Some(&0)),
        error => panic!("{error}"),
    }
}

#[test]
fn build_of_large_pages_succeeds_or_names_the_reason() {
    let region = |page_size| {
        let backing = Backing::Hugetlb { page_size };
        Region::new(GuestAddress(0), 4 * MIB).backing(backing)
    };
    let error = build(region(3 * MIB)).unwrap_err();
    assert!(
        matches!(error, BuildError::NoSuchHugePage { .. }),
        "{error}"
    );
    match build(region(2 * MIB)) {
        Ok(memory) => {
            fill(&memory, 0, 4 * MIB, 7);
            assert_eq!(discard(&memory, GuestAddress(0), 2 * MIB).unwrap(), 0);
            assert!(reads_as(&memory, 0, 2 * MIB, 0));
        }
        Err(BuildError::System { advice, source, .. }) => {
            let test = "build_of_large_pages_succeeds_or_names_the_reason";
            skipped(test, format!("no large pages: {source}; {advice}"));
            assert!(
                advice.contains("SeLockMemoryPrivilege") || advice.contains("does not support"),
                "{advice}"
            );
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn lock_of_region_keeps_its_pages_after_a_discard() {
    let region = Region::new(GuestAddress(0), 16 * PAGE).lock(Lock::Now);
    let memory = build(region).unwrap();
    fill(&memory, 0, 16 * PAGE, 7);
    // Locked pages are overwritten.
    assert_eq!(discard(&memory, GuestAddress(0), 8 * PAGE).unwrap(), 0);
    assert!(reads_as(&memory, 0, 8 * PAGE, 0) && reads_as(&memory, 8 * PAGE, 8 * PAGE, 7));
    assert_eq!(usage(&memory).resident, 16 * PAGE);
}
