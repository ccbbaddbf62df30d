//! Pages that are given back read as zeroes, and are not in memory any more.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use proptest::prelude::*;

use super::common::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{
    describe, discard, plug, prefault, provisioned, residency, Backing, BackingKind, BuildError,
    ChangeError, Lock, MemoryBuilder, Region, Sharing, TransparentHugePages, Unplugged,
};

const START: u64 = 64 * MIB;
const SIZE: u64 = 16 * MIB;

#[test]
fn each_backing_gives_its_pages_back_as_zeroes() {
    let pages = HugePages::reserve(SIZE / HUGE, "giving hugetlb back");
    for (kind, region) in of_each_kind(START, SIZE, pages.is_some()) {
        let memory = build(region).unwrap();
        fill(&memory, START, SIZE, 0x5a);
        let region = memory.iter().next().unwrap();
        region.get_mmap().bitmap().get_and_reset();
        let before = resident(&memory);
        assert_eq!(before, SIZE, "{kind}");
        let (from, len) = (START + HUGE, 6 * HUGE);
        // Huge pages that are not released stay, as zeroes.
        let others_can_have = if kind == "kept hugetlb" { 0 } else { len };
        assert_eq!(
            discard(&memory, GuestAddress(from), len).unwrap(),
            others_can_have,
            "{kind}"
        );
        let after = resident(&memory);
        assert!(
            after >= before - others_can_have
                && after <= before - others_can_have + kept_at_edges(kind),
            "{kind}: {after:#x}"
        );
        for page in (START..START + SIZE).step_by(PAGE as usize) {
            let gone = (from..from + len).contains(&page);
            assert_eq!(
                page_of(&memory, page),
                Some(if gone { 0 } else { 0x5a }),
                "{kind}, page {page:#x}"
            );
        }
        // Their bytes are others now.
        let dirty = region
            .get_mmap()
            .bitmap()
            .get_and_reset()
            .iter()
            .map(|word| word.count_ones())
            .sum::<u32>();
        assert_eq!(u64::from(dirty), len / PAGE, "{kind}");
        // And they can be used again.
        fill(&memory, from, len, 0x77);
        assert_eq!(page_of(&memory, from + len - PAGE), Some(0x77));
    }
}

/// Memory that is locked, named, never huge and not dumped is so again after pages of its file were replaced.
#[test]
fn what_was_replaced_is_as_it_was_asked_for() {
    if !can_lock("what_was_replaced_is_as_it_was_asked_for") {
        return;
    }
    let file = patterned_file(LOCKED / PAGE);
    let region = Region::new(GuestAddress(START), LOCKED)
        .backing(Backing::private_file(file, 0))
        .core_dump(false)
        .forked(false)
        .transparent_huge_pages(TransparentHugePages::Off)
        .lock(Lock::OnFault);
    let memory = build(region).unwrap();
    let (at, len) = (LOCKED / 4, LOCKED / 2);
    discard(&memory, GuestAddress(START + at), len).unwrap();
    for flag in ["dd", "dc", "nh", "lo"] {
        assert!(has_flag(host(&memory) + at as usize, flag), "{flag}");
    }
    // The second time there are pages of its own to give back, which are locked.
    fill(&memory, START + at, len, 3);
    assert_eq!(
        discard(&memory, GuestAddress(START + at), len).unwrap(),
        len
    );
    assert_eq!(page_of(&memory, START + at), Some(0));
}

#[test]
fn locked_memory_can_be_given_back() {
    if !can_lock("locked_memory_can_be_given_back") {
        return;
    }
    for region in [
        Region::new(GuestAddress(0), LOCKED).lock(Lock::Now),
        Region::new(GuestAddress(0), LOCKED)
            .lock(Lock::OnFault)
            .backing(Backing::Memfd),
    ] {
        let memory = build(region).unwrap();
        fill(&memory, 0, LOCKED, 1);
        assert_eq!(discard(&memory, GuestAddress(0), LOCKED).unwrap(), LOCKED);
        assert_eq!(resident(&memory), 0);
        assert_eq!(page_of(&memory, 0), Some(0));
    }
}

#[test]
fn a_hole_punched_in_shared_memory_is_one_for_all_who_map_it() {
    let file = Arc::new(patterned_file(16));
    let view = || {
        let backing = Backing::File {
            file: Arc::clone(&file),
            offset: 4 * PAGE,
            sharing: Sharing::Shared,
        };
        build(Region::new(GuestAddress(0), 8 * PAGE).backing(backing)).unwrap()
    };
    let (one, other) = (view(), view());
    discard(&one, GuestAddress(PAGE), PAGE).unwrap();
    assert_eq!(
        (page_of(&other, PAGE), page_of(&other, 0)),
        (Some(0), Some(page_byte(4)))
    );
    assert_eq!(file.metadata().unwrap().len(), 16 * PAGE);
}

#[test]
fn what_is_no_range_of_pages_changes_nothing() {
    let pages = HugePages::reserve(1, "a part of a huge page");
    let mut builder = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), MIB))
        .region(Region::new(GuestAddress(2 * MIB), MIB).backing(Backing::Memfd));
    if pages.is_some() {
        builder = builder.region(
            Region::new(GuestAddress(8 * MIB), HUGE).backing(Backing::Hugetlb { page_size: HUGE }),
        );
    }
    let memory: Memory = builder.build().unwrap();
    fill(&memory, 0, MIB, 1);
    let refused = |addr: u64, len: u64| discard(&memory, GuestAddress(addr), len).unwrap_err();
    assert!(matches!(refused(0, MIB + PAGE), ChangeError::Hole { addr } if addr == MIB));
    assert!(matches!(refused(0, u64::MAX), ChangeError::Hole { addr } if addr == MIB));
    assert!(matches!(refused(u64::MAX, 2), ChangeError::PastTop { .. }));
    assert!(
        matches!(refused(1, PAGE), ChangeError::Unaligned { granularity, .. } if granularity == PAGE)
    );
    assert!(matches!(
        refused(0, PAGE + 1),
        ChangeError::Unaligned { .. }
    ));
    if pages.is_some() {
        let error = refused(8 * MIB, PAGE);
        assert_eq!(
            error.to_string(),
            "region 00800000-009fffff: 0x1000 bytes at 0x800000 are not whole pages of 0x200000 bytes; align the range"
        );
    }
    assert_eq!(page_of(&memory, 0), Some(1));
    assert_eq!(discard(&memory, GuestAddress(5), 0).unwrap(), 0);

    let foreign = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let error = discard(&foreign, GuestAddress(0), 0x1000).unwrap_err();
    assert!(matches!(error, ChangeError::NotProvisioned(_)), "{error}");
    let error = prefault(&foreign, NonZeroUsize::MIN, |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "region 00000000-00000fff was not built by vm-memory-host; build it with MemoryBuilder"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Against the bytes that there must be: a discard is a write of zeroes, on every backing.
    #[test]
    fn discards_are_writes_of_zeroes(
        kind in 0usize..4,
        steps in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12, any::<u8>()), 1..40),
    ) {
        let pages = 48u64;
        let (name, region) = of_each_kind(0, pages * PAGE, false).swap_remove(kind);
        let memory = build(region).unwrap();
        let file = name.contains("file");
        let mut model: Vec<u8> = (0..pages).map(|page| if file { page_byte(page + 1) } else { 0 }).collect();
        for (give_back, first, count, byte) in steps {
            let count = count.min(pages - first);
            if give_back {
                prop_assert_eq!(discard(&memory, GuestAddress(first * PAGE), count * PAGE).unwrap(), count * PAGE);
            } else {
                fill(&memory, first * PAGE, count * PAGE, byte);
            }
            model[first as usize..(first + count) as usize].fill(if give_back { 0 } else { byte });
            for page in 0..pages {
                prop_assert_eq!(page_of(&memory, page * PAGE), Some(model[page as usize]), "{}, page {}", name, page);
            }
        }
    }
}

#[test]
fn a_range_over_several_regions_is_one_call() {
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), MIB))
        .region(Region::new(GuestAddress(MIB), MIB).backing(Backing::Memfd))
        .region(
            Region::new(GuestAddress(2 * MIB), MIB)
                .backing(Backing::private_file(patterned_file(256), 0)),
        )
        .build()
        .unwrap();
    fill(&memory, 0, 3 * MIB, 8);
    let middle = GuestAddress(MIB / 2);
    assert_eq!(discard(&memory, middle, 2 * MIB).unwrap(), 2 * MIB);
    for page in (0..3 * MIB).step_by(PAGE as usize) {
        let gone = (MIB / 2..MIB / 2 + 2 * MIB).contains(&page);
        assert_eq!(
            page_of(&memory, page),
            Some(if gone { 0 } else { 8 }),
            "page {page:#x}"
        );
    }
    assert!(memory.read_obj::<u8>(GuestAddress(3 * MIB)).is_err());
}

/// A region of one huge page.
fn huge_page() -> Region {
    Region::new(GuestAddress(0), HUGE).backing(Backing::Hugetlb { page_size: HUGE })
}

/// A huge page that is given back stays with its region, unless the region lets others have it.
#[test]
fn huge_pages_stay_unless_they_are_released() {
    let Some(_pages) = HugePages::reserve(2, "huge pages that stay") else {
        return;
    };
    let kept = build(huge_page()).unwrap();
    // One that nobody has used is not brought in for it.
    assert_eq!(discard(&kept, GuestAddress(0), HUGE).unwrap(), 0);
    assert_eq!((resident(&kept), pool().unwrap().1), (0, 1));
    fill(&kept, 0, HUGE, 1);
    assert_eq!(discard(&kept, GuestAddress(0), HUGE).unwrap(), 0);
    assert_eq!((page_of(&kept, 0), pool().unwrap().1), (Some(0), 1));
    let released = build(huge_page().release_huge_pages(true)).unwrap();
    fill(&released, 0, HUGE, 1);
    assert_eq!(pool().unwrap().1, 0);
    assert_eq!(discard(&released, GuestAddress(0), HUGE).unwrap(), HUGE);
    assert_eq!(pool().unwrap().1, 1);
    // What is the region's is there.
    fill(&kept, 0, HUGE, 2);
    assert_eq!(page_of(&kept, 0), Some(2));
}

/// While a huge page is given back that the region keeps, nobody else can take it.
#[test]
fn a_kept_huge_page_is_never_anybody_elses() {
    let Some(_pages) = HugePages::reserve(1, "a huge page that others want") else {
        return;
    };
    let memory = build(huge_page()).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(build(huge_page()).is_err(), "another region has the page");
            }
        });
        for round in 1..300u16 {
            fill(&memory, 0, PAGE, round.to_le_bytes()[0] | 1);
            discard(&memory, GuestAddress(0), HUGE).unwrap();
            assert_eq!(page_of(&memory, 0), Some(0));
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// What another process wrote to a page that this one has never touched is gone, too.
#[test]
fn a_kept_huge_page_is_zeroes_for_all_who_map_it() {
    let Some(_pages) = HugePages::reserve(2, "huge pages of two mappings") else {
        return;
    };
    let region =
        Region::new(GuestAddress(0), 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE });
    let memory = build(region).unwrap();
    let (description, files) = describe(&memory).unwrap();
    let received = vec![files[0].try_clone().unwrap().into()];
    let other: Memory = description.builder(received).unwrap().build().unwrap();
    fill(&other, HUGE, HUGE, 7);
    assert_eq!(discard(&memory, GuestAddress(0), 2 * HUGE).unwrap(), 0);
    assert_eq!(
        (page_of(&other, HUGE), page_of(&memory, HUGE)),
        (Some(0), Some(0))
    );
}

/// Pages that were promised and never used go to the pool with the others, and are not taken back by a process that maps the file, too.
#[test]
fn released_huge_pages_are_in_the_pool() {
    let Some(_pages) = HugePages::reserve(3, "huge pages that are released") else {
        return;
    };
    let huge = Backing::Hugetlb { page_size: HUGE };
    let memory = build(
        Region::new(GuestAddress(0), 3 * HUGE)
            .backing(huge)
            .release_huge_pages(true),
    )
    .unwrap();
    fill(&memory, HUGE, HUGE, 1);
    assert_eq!(pool().unwrap().1, 0);
    for _ in 0..2 {
        assert_eq!(
            discard(&memory, GuestAddress(0), 2 * HUGE).unwrap(),
            2 * HUGE
        );
        assert_eq!(pool().unwrap().1, 2);
    }
    let (description, files) = describe(&memory).unwrap();
    let received = vec![files[0].try_clone().unwrap().into()];
    let other: Memory = description.builder(received).unwrap().build().unwrap();
    assert_eq!(pool().unwrap().1, 2);
    drop(other);
    assert_eq!(pool().unwrap().1, 2);
    fill(&memory, 2 * HUGE, HUGE, 1);
    assert_eq!(pool().unwrap().1, 2);
}

/// Whose name /dev has is a tmpfs, as memfds are, and no memfd.
#[test]
fn a_device_is_no_memfd() {
    let zero = || {
        Backing::shared_file(
            File::options()
                .read(true)
                .write(true)
                .open("/dev/zero")
                .unwrap(),
            0,
        )
    };
    let memory = build(Region::new(GuestAddress(0), 4 * MIB).backing(zero())).unwrap();
    assert_eq!(
        provisioned(memory.iter().next().unwrap()).unwrap().kind(),
        BackingKind::File
    );
    fill(&memory, 0, MIB, 7);
    // There is nothing that a hole could be punched in.
    assert_eq!(discard(&memory, GuestAddress(0), MIB).unwrap(), 0);
    assert_eq!(page_of(&memory, MIB - PAGE), Some(0));
    let blocks = Region::new(GuestAddress(0), 4 * MIB)
        .backing(zero())
        .blocks(blocks(MIB), Unplugged::Mapped);
    assert!(matches!(build(blocks), Err(BuildError::Conflict { .. })));
}

/// A block device gives zeroes, whatever it can do with holes, and has an end.
#[test]
fn a_block_device_has_zeroes_where_pages_were_given_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0xab; 8 << 20]).unwrap();
    let Some(device) = LoopDevice::of(file.path(), "a block device") else {
        return;
    };
    let shared = |size| {
        let device = File::options()
            .read(true)
            .write(true)
            .open(&device.path)
            .unwrap();
        Region::new(GuestAddress(0), size).backing(Backing::shared_file(device, 0))
    };
    let memory = build(shared(8 * MIB)).unwrap();
    assert_eq!(page_of(&memory, 0), Some(0xab));
    fill(&memory, 0, 2 * MIB, 7);
    discard(&memory, GuestAddress(0), MIB).unwrap();
    for (page, byte) in [(0, 0), (MIB - PAGE, 0), (MIB, 7), (4 * MIB, 0xab)] {
        assert_eq!(page_of(&memory, page), Some(byte), "{page:#x}");
    }
    let error = build(shared(8 * MIB + PAGE)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("needs a file of 0x801000 bytes, but the file ends at 0x800000"),
        "{error}"
    );
    let blocks = shared(4 * MIB).blocks(blocks(MIB), Unplugged::Mapped);
    assert!(matches!(build(blocks), Err(BuildError::Conflict { .. })));
}

/// On a tmpfs with an end, what was built can be used: shared, copied, or in blocks that are plugged.
#[test]
fn a_tmpfs_that_is_full_is_no_end_of_the_process() {
    let Some(tmpfs) = Mounted::tmpfs("size=8m", "a tmpfs with an end") else {
        return;
    };
    let file = |name: &str, len| {
        let path = tmpfs.directory.path().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap();
        file.set_len(len).unwrap();
        file
    };
    let size = 16 * MIB;
    for backing in [
        Backing::shared_file(file("a", size), 0),
        Backing::private_file(file("a", size), 0),
    ] {
        let region = Region::new(GuestAddress(0), size).backing(backing);
        let error = build(region).unwrap_err().to_string();
        assert!(
            error.contains("cannot allocate space for its file: No space"),
            "{error}"
        );
    }
    drop(std::fs::remove_file(tmpfs.directory.path().join("a")));
    // One that can only be read needs no room if it has no holes.
    let whole = file("b", MIB);
    (&whole).write_all(&vec![3; 1 << 20]).unwrap();
    let reading =
        |name| Backing::private_file(File::open(tmpfs.directory.path().join(name)).unwrap(), 0);
    let memory = build(Region::new(GuestAddress(0), MIB).backing(reading("b"))).unwrap();
    assert_eq!(page_of(&memory, 0), Some(3));
    drop(file("holes", MIB));
    let error = build(Region::new(GuestAddress(0), MIB).backing(reading("holes")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("open it for writing or allow holes"),
        "{error}"
    );
    // Blocks take their room when they are plugged, and give it back.
    let region =
        Region::new(GuestAddress(0), 4 * MIB).backing(Backing::shared_file(file("c", 4 * MIB), 0));
    let memory = build(region.blocks(blocks(HUGE), Unplugged::Mapped)).unwrap();
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let filled = std::fs::write(tmpfs.directory.path().join("d"), vec![1; 16 << 20]);
    assert!(filled.is_err(), "the tmpfs has no end");
    fill(&memory, 0, HUGE, 7);
    let error = plug(&memory, GuestAddress(HUGE), HUGE)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot plug"), "{error}");
    assert!(memory.read_obj::<u8>(GuestAddress(HUGE)).is_err());
}

/// A limit of the file system is told as one, and not as a pool that is too small.
#[test]
fn a_hugetlbfs_that_is_full_is_not_an_empty_pool() {
    let Some(_pages) = HugePages::reserve(4, "a hugetlbfs with an end") else {
        return;
    };
    let Some(mounted) = Mounted::new(
        "hugetlbfs",
        "size=2m,pagesize=2m",
        "a hugetlbfs with an end",
    ) else {
        return;
    };
    let path = mounted.directory.path().join("a");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    file.set_len(2 * HUGE).unwrap();
    let error =
        build(Region::new(GuestAddress(0), 2 * HUGE).backing(Backing::shared_file(file, 0)));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("mount the file's hugetlbfs with more space"),
        "{error}"
    );
}

/// A name that is no text does not keep anybody from being told.
#[test]
fn residency_is_told_whatever_files_are_called() {
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

/// What another mapping of the file brought in is in memory, too.
#[test]
fn what_is_in_memory_is_so_for_all_who_map_it() {
    let pages = HugePages::reserve(2, "huge pages that another mapping brought in");
    for (kind, region) in of_each_kind(0, 2 * HUGE, pages.is_some()) {
        if kind.ends_with("hugetlb") || kind == "memfd" {
            let memory = build(region).unwrap();
            let (description, files) = describe(&memory).unwrap();
            let received = vec![files[0].try_clone().unwrap().into()];
            let other: Memory = description.builder(received).unwrap().build().unwrap();
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
fn what_a_region_takes_is_its_own() {
    if !can_lock("what_a_region_takes_is_its_own") {
        return;
    }
    let pages = HugePages::reserve(2, "what huge pages take");
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
    let takes = residency(&memory).unwrap();
    let numbers = |n: usize| (takes[n].1.resident, takes[n].1.mapped, takes[n].1.huge);
    assert_eq!(
        (numbers(0), takes[0].1.locked),
        ((LOCKED, LOCKED, 0), LOCKED)
    );
    assert_eq!(
        (numbers(1), takes[1].1.locked),
        ((4 * PAGE, 4 * PAGE, 0), 0)
    );
    assert_eq!(numbers(2), (0, 0, 0));
    if pages.is_some() {
        assert_eq!(numbers(3), (HUGE, HUGE, HUGE));
    }
}
