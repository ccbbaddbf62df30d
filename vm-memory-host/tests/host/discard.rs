//! Tests of discards: pages read as zeroes and are not resident.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use proptest::prelude::*;

use super::common::*;
use rustix::fs::{fallocate, FallocateFlags};
use test_support::{in_own_process, refuse_calls, skipped, temp_file};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory_host::{
    describe, discard, discard_pages, plug, prefault, provisioned, unplug, unplug_all, zero_range,
    Backing, Balloon, ChangeError, Lock, MemoryBuilder, NumaPolicy, Region, Sharing,
    TransparentHugePages, Unplugged,
};

const START: u64 = 64 * MIB;
const SIZE: u64 = 16 * MIB;

#[test]
fn discard_of_each_backing_frees_pages_that_read_as_zeroes() {
    let pages = HugePages::reserve(
        SIZE / HUGE,
        "discard_of_each_backing_frees_pages_that_read_as_zeroes (hugetlb)",
    );
    for (kind, region) in region_of_each_backing(START, SIZE, pages.is_some()) {
        let memory = build(region).unwrap();
        fill(&memory, START, SIZE, 0x5a);
        let region = memory.iter().next().unwrap();
        region.get_mmap().bitmap().get_and_reset();
        let before = resident(&memory);
        assert_eq!(before, SIZE, "{kind}");
        let (from, len) = (START + HUGE, 6 * HUGE);
        let freed = if kind == "kept hugetlb" { 0 } else { len };
        assert_eq!(
            discard(&memory, GuestAddress(from), len).unwrap(),
            freed,
            "{kind}"
        );
        let after = resident(&memory);
        assert!(
            after >= before - freed && after <= before - freed + may_stay_resident(kind),
            "{kind}: {after:#x}"
        );
        for page in (START..START + SIZE).step_by(PAGE as usize) {
            let gone = (from..from + len).contains(&page);
            assert_eq!(
                byte_of_page(&memory, page),
                Some(if gone { 0 } else { 0x5a }),
                "{kind}, page {page:#x}"
            );
        }
        let dirty = region
            .get_mmap()
            .bitmap()
            .get_and_reset()
            .iter()
            .map(|word| word.count_ones())
            .sum::<u32>();
        assert_eq!(u64::from(dirty), len / PAGE, "{kind}");
        // The pages can be used again.
        fill(&memory, from, len, 0x77);
        assert_eq!(byte_of_page(&memory, from + len - PAGE), Some(0x77));
    }
}

#[test]
fn zero_range_of_each_backing_zeroes_only_its_bytes() {
    let test = "zero_range_of_each_backing_zeroes_only_its_bytes (hugetlb)";
    let pages = HugePages::reserve(SIZE / HUGE, test);
    for (kind, region) in region_of_each_backing(START, SIZE, pages.is_some()) {
        let memory = build(region).unwrap();
        let page = memory.iter().next().unwrap();
        let page = provisioned(page).unwrap().page_size();
        // Within a page, up to its end, and from the middle of one page to that of another.
        for (from, len) in [
            (HUGE + PAGE + 1, 2),
            (HUGE + PAGE, HUGE - PAGE),
            (HUGE + 5, 2 * HUGE),
        ] {
            fill(&memory, START, 4 * HUGE, 0x5a);
            let region = memory.iter().next().unwrap();
            region.get_mmap().bitmap().get_and_reset();
            let freed = zero_range(&memory, GuestAddress(START + from), len).unwrap();
            let end = from + len;
            let whole = (end / page * page).saturating_sub(from.next_multiple_of(page));
            let expected = if kind == "kept hugetlb" { 0 } else { whole };
            assert_eq!(freed, expected, "{kind}");
            let mut found = vec![0; 4 * HUGE as usize];
            memory.read_slice(&mut found, GuestAddress(START)).unwrap();
            let (from, end) = (from as usize, end as usize);
            assert!(found[from..end].iter().all(|byte| *byte == 0), "{kind}");
            let mut others = found[..from].iter().chain(&found[end..]);
            assert!(others.all(|byte| *byte == 0x5a), "{kind}");
            let dirty = region.get_mmap().bitmap().get_and_reset();
            let dirty: u32 = dirty.iter().map(|word| word.count_ones()).sum();
            let touched = (end as u64).div_ceil(PAGE) - from as u64 / PAGE;
            assert_eq!(u64::from(dirty), touched, "{kind}");
        }
    }
}

#[test]
fn zero_range_over_unplugged_blocks_zeroes_the_others() {
    for unplugged in [Unplugged::Mapped, Unplugged::Protected] {
        let region = Region::new(GuestAddress(START), 4 * HUGE);
        let memory = build(region.blocks(non_zero(HUGE), unplugged)).unwrap();
        plug(&memory, GuestAddress(START), HUGE).unwrap();
        plug(&memory, GuestAddress(START + 2 * HUGE), HUGE).unwrap();
        fill(&memory, START, HUGE, 1);
        fill(&memory, START + 2 * HUGE, HUGE, 1);
        // Both ends of each range are parts of pages.
        for (from, to) in [
            (1, HUGE + 1),
            (HUGE + 1, 2 * HUGE + 1),
            (3 * HUGE + 1, 4 * HUGE - 1),
        ] {
            zero_range(&memory, GuestAddress(START + from), to - from).unwrap();
        }
        assert_eq!(memory.read_obj::<u16>(GuestAddress(START)).unwrap(), 1);
        assert_eq!(byte_of_page(&memory, START + PAGE), Some(0));
        let third = GuestAddress(START + 2 * HUGE);
        assert_eq!(memory.read_obj::<u16>(third).unwrap(), 0x100);
    }
}

#[test]
fn zero_range_of_truncated_file_returns_number_of_fault() {
    vm_memory::fault::install().unwrap();
    let file = test_support::temp_file_of_len(HUGE);
    let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
    let memory = build(Region::new(GuestAddress(START), HUGE).backing(backing)).unwrap();
    file.set_len(PAGE).unwrap();
    let error = zero_range(&memory, GuestAddress(START + PAGE + 1), 1).unwrap_err();
    // Huge pages would not help.
    assert!(!error.to_string().contains("huge pages"), "{error}");
    let ChangeError::System { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn zero_range_with_hole_or_past_top_changes_nothing() {
    let memory = build(Region::new(GuestAddress(START), HUGE)).unwrap();
    fill(&memory, START, HUGE, 1);
    let error = zero_range(&memory, GuestAddress(START + 1), HUGE).unwrap_err();
    assert!(matches!(error, ChangeError::Hole { .. }), "{error}");
    let error = zero_range(&memory, GuestAddress(START + 1), u64::MAX).unwrap_err();
    assert!(matches!(error, ChangeError::PastTop { .. }), "{error}");
    assert_eq!(zero_range(&memory, GuestAddress(START + 1), 0).unwrap(), 0);
    for page in (START..START + HUGE).step_by(PAGE as usize) {
        assert_eq!(byte_of_page(&memory, page), Some(1));
    }
}

#[test]
fn discard_of_private_file_keeps_options() {
    if !can_lock("discard_of_private_file_keeps_options") {
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
        assert!(
            has_flag(host_address(&memory) + at as usize, flag),
            "{flag}"
        );
    }
    // The second discard finds locked private pages.
    fill(&memory, START + at, len, 3);
    assert_eq!(
        discard(&memory, GuestAddress(START + at), len).unwrap(),
        len
    );
    assert_eq!(byte_of_page(&memory, START + at), Some(0));
}

#[test]
fn discard_of_locked_memory_frees_pages() {
    if !can_lock("discard_of_locked_memory_frees_pages") {
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
        assert_eq!(byte_of_page(&memory, 0), Some(0));
    }
}

#[test]
fn discard_of_shared_file_reaches_other_mappings() {
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
        (byte_of_page(&other, PAGE), byte_of_page(&other, 0)),
        (Some(0), Some(pattern_of_page(4)))
    );
    assert_eq!(file.metadata().unwrap().len(), 16 * PAGE);
}

#[test]
fn discard_of_invalid_range_changes_nothing() {
    let pages = HugePages::reserve(1, "discard_of_invalid_range_changes_nothing (hugetlb)");
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
            "region 0x800000-0x9fffff: 0x1000 bytes at 0x800000 are not whole pages of 0x200000 \
            bytes; align the range"
        );
    }
    assert_eq!(byte_of_page(&memory, 0), Some(1));
    assert_eq!(discard(&memory, GuestAddress(5), 0).unwrap(), 0);

    let foreign = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let error = discard(&foreign, GuestAddress(0), 0x1000).unwrap_err();
    assert!(matches!(error, ChangeError::NotProvisioned(_)), "{error}");
    let error = prefault(&foreign, NonZeroUsize::MIN, |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "region 0x0-0xfff was not built by vm-memory-host; build it with MemoryBuilder"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Compares each backing with a model in which a discard writes zeroes.
    #[test]
    fn discard_equals_a_write_of_zeroes(
        kind in 0usize..4,
        steps in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12, any::<u8>()), 1..40),
    ) {
        let pages = 48u64;
        let (name, region) = region_of_each_backing(0, pages * PAGE, false).swap_remove(kind);
        let memory = build(region).unwrap();
        let file = name.contains("file");
        let initial = |page| if file { pattern_of_page(page + 1) } else { 0 };
        let mut model: Vec<u8> = (0..pages).map(initial).collect();
        for (is_discard, first, count, byte) in steps {
            let count = count.min(pages - first);
            let (addr, len) = (first * PAGE, count * PAGE);
            if is_discard {
                prop_assert_eq!(discard(&memory, GuestAddress(addr), len).unwrap(), len);
            } else {
                fill(&memory, addr, len, byte);
            }
            model[first as usize..(first + count) as usize].fill(if is_discard { 0 } else { byte });
            for page in 0..pages {
                let expected = Some(model[page as usize]);
                let found = byte_of_page(&memory, page * PAGE);
                prop_assert_eq!(found, expected, "{}, page {}", name, page);
            }
        }
    }
}

#[test]
fn discard_over_several_regions_succeeds() {
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
            byte_of_page(&memory, page),
            Some(if gone { 0 } else { 8 }),
            "page {page:#x}"
        );
    }
    assert!(memory.read_obj::<u8>(GuestAddress(3 * MIB)).is_err());
}

fn huge_page() -> Region {
    Region::new(GuestAddress(0), HUGE).backing(Backing::Hugetlb { page_size: HUGE })
}

#[test]
fn discard_keeps_huge_pages_unless_released() {
    let Some(_pages) = HugePages::reserve(2, "discard_keeps_huge_pages_unless_released") else {
        return;
    };
    let kept = build(huge_page()).unwrap();
    // An unused page is not populated.
    assert_eq!(discard(&kept, GuestAddress(0), HUGE).unwrap(), 0);
    assert_eq!((resident(&kept), pool().unwrap().1), (0, 1));
    fill(&kept, 0, HUGE, 1);
    assert_eq!(discard(&kept, GuestAddress(0), HUGE).unwrap(), 0);
    assert_eq!((byte_of_page(&kept, 0), pool().unwrap().1), (Some(0), 1));
    let released = build(huge_page().release_huge_pages(true)).unwrap();
    fill(&released, 0, HUGE, 1);
    assert_eq!(pool().unwrap().1, 0);
    assert_eq!(discard(&released, GuestAddress(0), HUGE).unwrap(), HUGE);
    assert_eq!(pool().unwrap().1, 1);
    fill(&kept, 0, HUGE, 2);
    assert_eq!(byte_of_page(&kept, 0), Some(2));
}

#[test]
fn discard_of_kept_huge_page_never_frees_it() {
    let Some(_pages) = HugePages::reserve(1, "discard_of_kept_huge_page_never_frees_it") else {
        return;
    };
    let memory = build(huge_page()).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(build(huge_page()).is_err(), "another region got the page");
            }
        });
        for round in 1..300u16 {
            fill(&memory, 0, PAGE, round.to_le_bytes()[0] | 1);
            discard(&memory, GuestAddress(0), HUGE).unwrap();
            assert_eq!(byte_of_page(&memory, 0), Some(0));
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn discard_of_kept_huge_page_reaches_other_mappings() {
    let Some(_pages) = HugePages::reserve(2, "discard_of_kept_huge_page_reaches_other_mappings")
    else {
        return;
    };
    let region =
        Region::new(GuestAddress(0), 2 * HUGE).backing(Backing::Hugetlb { page_size: HUGE });
    let memory = build(region).unwrap();
    let other = build_again(&memory);
    fill(&other, HUGE, HUGE, 7);
    assert_eq!(discard(&memory, GuestAddress(0), 2 * HUGE).unwrap(), 0);
    assert_eq!(
        (byte_of_page(&other, HUGE), byte_of_page(&memory, HUGE)),
        (Some(0), Some(0))
    );
}

#[test]
fn discard_of_released_huge_pages_fills_the_pool() {
    let Some(_pages) = HugePages::reserve(3, "discard_of_released_huge_pages_fills_the_pool")
    else {
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
    let other = build_again(&memory);
    assert_eq!(pool().unwrap().1, 2);
    drop(other);
    assert_eq!(pool().unwrap().1, 2);
    fill(&memory, 2 * HUGE, HUGE, 1);
    assert_eq!(pool().unwrap().1, 2);
}

/// Discards the first MiB of a memory, and returns the number of bytes freed.
type DiscardMib = fn(&Memory) -> u64;

/// The functions that discard pages.
const DISCARDS: [(&str, DiscardMib); 4] = [
    ("discard", |memory| {
        discard(memory, GuestAddress(0), MIB).unwrap()
    }),
    ("zero_range", |memory| {
        zero_range(memory, GuestAddress(0), MIB).unwrap()
    }),
    ("discard_pages", |memory| {
        discard_pages(memory, 0..MIB / PAGE).freed
    }),
    ("Balloon", |memory| {
        Balloon::new().inflate(memory, 0..MIB / PAGE).freed
    }),
];

#[test]
fn discard_keeps_the_space_of_a_full_tmpfs() {
    let test = "discard_keeps_the_space_of_a_full_tmpfs";
    let all = DISCARDS.iter().flat_map(|(name, discard_mib)| {
        let kinds = [(false, false), (false, true), (true, false)];
        kinds.map(|(sparse, blocks)| {
            (
                format!("{name}, {sparse}, {blocks}"),
                discard_mib,
                sparse,
                blocks,
            )
        })
    });
    for (what, discard_mib, sparse, blocks) in all {
        let Some(tmpfs) = Mounted::tmpfs("size=2m", test) else {
            return;
        };
        let file = open(tmpfs.directory.path().join("ram"));
        file.set_len(MIB).unwrap();
        let region = Region::new(GuestAddress(0), MIB).sparse(sparse);
        let region = region.backing(Backing::shared_file(file, 0));
        let memory = if blocks {
            build(region.blocks(non_zero(MIB / 2), Unplugged::Mapped)).unwrap()
        } else {
            build(region).unwrap()
        };
        let (nothing_plugged, _) = describe(&memory).unwrap();
        let claimed = if blocks { MIB / 2 } else { MIB };
        if blocks {
            plug(&memory, GuestAddress(0), claimed).unwrap();
        }
        fill(&memory, 0, claimed, 1);
        // Unplugged blocks have no space to keep.
        let freed = if sparse { MIB } else { MIB - claimed };
        assert_eq!(discard_mib(&memory), freed, "{what}");
        let other = take_the_rest(&tmpfs);
        let taken = other.metadata().unwrap().len();
        assert_eq!(taken, 2 * MIB - (MIB - freed), "{what}");
        for page in (0..claimed).step_by(PAGE as usize).filter(|_| !sparse) {
            assert_eq!(byte_of_page(&memory, page), Some(0), "{what}");
            fill(&memory, page, PAGE, 2);
        }
        if blocks {
            match what.as_bytes()[0] {
                b'd' => assert_eq!(unplug(&memory, GuestAddress(0), MIB).unwrap(), claimed),
                b'z' => assert_eq!(unplug_all(&memory, GuestAddress(0)).unwrap(), claimed),
                _ => nothing_plugged.apply_blocks(&memory).unwrap(),
            }
            drop(other);
            let now = take_the_rest(&tmpfs).metadata().unwrap().len();
            assert!(now > taken, "{what}");
        }
    }
}

/// Another process can punch holes in an unsealed file.
#[test]
fn discard_of_hole_on_full_tmpfs_returns_error() {
    let test = "discard_of_hole_on_full_tmpfs_returns_error";
    // Without the fault handler, which the other tests of this program install.
    in_own_process(&format!("discard::{test}"), |_| {
        let Some(tmpfs) = Mounted::tmpfs("size=2m", test) else {
            return;
        };
        let file = open(tmpfs.directory.path().join("ram"));
        file.set_len(MIB).unwrap();
        let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
        let region = Region::new(GuestAddress(0), MIB).backing(backing);
        let memory: Memory = MemoryBuilder::new().region(region).build().unwrap();
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, hole, 0, MIB / 2).unwrap();
        let _other = take_the_rest(&tmpfs);
        let (first, last) = (GuestAddress(0), GuestAddress(MIB - PAGE));
        let refused = [
            discard(&memory, first, MIB),
            zero_range(&memory, first, MIB),
            zero_range(&memory, GuestAddress(1), 1),
        ];
        for refused in refused {
            let Err(ChangeError::System { source, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
        }
        for report in [
            discard_pages(&memory, 0..2u32),
            Balloon::new().inflate(&memory, 0..2u32),
        ] {
            assert_eq!((report.discarded, report.refused), (0, 2));
        }
        // A page that the file still has.
        assert_eq!(discard(&memory, last, PAGE).unwrap(), 0);
    });
}

#[test]
fn discard_keeps_the_space_of_a_file_unless_sparse() {
    for sparse in [false, true] {
        let file = Arc::new(patterned_file(SIZE / PAGE));
        let backing = Backing::File {
            file: Arc::clone(&file),
            offset: 0,
            sharing: Sharing::Shared,
        };
        let region = Region::new(GuestAddress(START), SIZE).backing(backing);
        let memory = build(region.sparse(sparse)).unwrap();
        file.sync_all().unwrap();
        let blocks = || file.metadata().unwrap().blocks() * 512;
        let before = blocks();
        discard(&memory, GuestAddress(START), SIZE / 2).unwrap();
        assert_eq!(byte_of_page(&memory, START), Some(0), "{sparse}");
        let claimed = if sparse { before - SIZE / 2 } else { before };
        assert!(
            blocks() <= claimed && blocks() + HUGE > claimed,
            "{sparse}: {:#x}",
            blocks()
        );
    }
}

#[test]
fn discard_of_unused_huge_page_examines_its_range_only() {
    let test = "discard_of_unused_huge_page_examines_its_range_only";
    let Some(_pages) = HugePages::reserve(4, test) else {
        return;
    };
    let region = Region::new(GuestAddress(0), 4 * HUGE);
    let memory = build(region.backing(Backing::Hugetlb { page_size: HUGE })).unwrap();
    let other = build_again(&memory);
    let used = || {
        provisioned(memory.iter().next().unwrap())
            .unwrap()
            .file()
            .unwrap()
            .0
    };
    let used = || used().metadata().unwrap().blocks() * 512;
    // Pages that only another mapping uses, outside of the range and inside.
    fill(&other, 3 * HUGE, PAGE, 7);
    assert_eq!(discard(&memory, GuestAddress(0), 2 * HUGE).unwrap(), 0);
    assert_eq!(used(), HUGE, "unused pages were populated");
    fill(&other, HUGE + PAGE, PAGE, 8);
    discard(&memory, GuestAddress(0), 2 * HUGE).unwrap();
    assert_eq!(used(), 2 * HUGE, "an unused page was populated");
    assert_eq!(byte_of_page(&other, HUGE + PAGE), Some(0));
    assert_eq!(byte_of_page(&memory, 3 * HUGE), Some(7));
}

#[test]
fn discard_of_released_huge_pages_takes_one_page_of_the_pool_at_most() {
    let test = "discard_of_released_huge_pages_takes_one_page_of_the_pool_at_most";
    let Some(_pages) = HugePages::reserve(8, test) else {
        return;
    };
    let region = Region::new(GuestAddress(0), 8 * HUGE).release_huge_pages(true);
    let memory = build(region.backing(Backing::Hugetlb { page_size: HUGE })).unwrap();
    let discard_all = || discard(&memory, GuestAddress(0), 8 * HUGE).unwrap();
    discard_all();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                discard_all();
            }
            is_over.store(true, Ordering::Relaxed);
        });
        while !is_over.load(Ordering::Relaxed) {
            let (_, free) = pool().unwrap();
            assert!(free >= 7, "only {free} of 8 pages are free");
        }
    });
}

/// Discards every second page of a full region of a file, and checks all pages.
fn check_discards_of(memory: &Memory, pages: u64) {
    fill(memory, 0, pages * PAGE, 7);
    for page in (0..pages).step_by(2) {
        discard(memory, GuestAddress(page * PAGE), PAGE).unwrap();
    }
    for page in 0..pages {
        let expected = if page % 2 == 0 { 0 } else { 7 };
        assert_eq!(byte_of_page(memory, page * PAGE), Some(expected), "{page}");
    }
}

#[test]
fn discard_on_full_file_system_reads_as_zeroes() {
    let test = "discard_on_full_file_system_reads_as_zeroes";
    // Each discard splits an extent, and the file system needs blocks to record that.
    let arguments = ["-q", "-F", "-b", "1024"];
    let Some(disk) = Mounted::disk("ext4", &arguments, 32 * MIB, test) else {
        return;
    };
    let file = open(disk.directory.path().join("ram"));
    file.set_len(8 * MIB).unwrap();
    let region = Region::new(GuestAddress(0), 8 * MIB).backing(Backing::shared_file(file, 0));
    let memory = build(region).unwrap();
    fill(&memory, 0, 8 * MIB, 7);
    let _other = take_the_rest(&disk);
    check_discards_of(&memory, 8 * MIB / PAGE);
}

#[test]
fn discard_of_claimed_block_device_reads_as_zeroes() {
    let test = "discard_of_claimed_block_device_reads_as_zeroes";
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(MIB).unwrap();
    let Some(device) = LoopDevice::of(image.path(), test) else {
        return;
    };
    let backing = Backing::shared_file(open(&device.path), 0);
    let memory = build(Region::new(GuestAddress(0), MIB).backing(backing)).unwrap();
    let mut claim = std::fs::File::options();
    claim.read(true).write(true).custom_flags(libc::O_EXCL);
    let _claimed = claim.open(&device.path).unwrap();
    check_discards_of(&memory, MIB / PAGE);
}

#[test]
fn discard_of_private_file_whose_nodes_are_gone_frees_its_pages() {
    const TEST: &str = "discard_of_private_file_whose_nodes_are_gone_frees_its_pages";
    let file = temp_file(&[7; 4 * PAGE as usize]);
    let region = Region::new(GuestAddress(0), 4 * PAGE)
        .backing(Backing::private_file(file, 0))
        .numa(NumaPolicy::Bind(vec![0]));
    let memory = match build(region) {
        Ok(memory) => memory,
        Err(error) => return skipped(TEST, format!("no mbind(2) or seccomp filters: {error}")),
    };
    // The error of mbind(2) if the cpuset has none of the nodes.
    let discarded = refuse_calls(libc::SYS_mbind, libc::EINVAL, || {
        discard(&memory, GuestAddress(PAGE), PAGE)
    });
    match discarded {
        Ok(freed) => assert_eq!(freed.unwrap(), PAGE),
        Err(error) => return skipped(TEST, format!("no seccomp filters: {error}")),
    }
    let byte = |page| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
    assert_eq!([0, 1, 2].map(byte), [7, 0, 7]);
    // Other errors are reported.
    let refused = refuse_calls(libc::SYS_mbind, libc::ENOSYS, || {
        discard(&memory, GuestAddress(3 * PAGE), PAGE)
    });
    assert!(matches!(refused, Ok(Err(ChangeError::System { .. }))));
}
