//! Memory that is built again from its description and descriptors.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::common::*;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{
    describe, discard, plug, unplug, zero_range, Backing, BackingDescription, BlocksDescription,
    BuildError, Description, DescriptionError, Descriptors, Lock, MemoryBuilder, NumaPolicy,
    Region, Sharing, Span, Unplugged,
};

const START: u64 = 1 << 32;
const SIZE: u64 = 16 * MIB;

/// Returns the error of a build from a description.
fn build_error(description: &Description, received: Vec<OwnedFd>) -> String {
    let builder = description.builder(received.into()).unwrap();
    builder.build::<()>().unwrap_err().to_string()
}

/// Returns regions of a memfd, a private file and anonymous memory.
fn regions() -> [Region; 3] {
    let file = patterned_file(64);
    [
        Region::new(GuestAddress(0), 4 * MIB)
            .backing(Backing::Memfd)
            .name("low")
            .sealed(true),
        // The memory and its copy exist, and count against the limit, at the same time.
        Region::new(GuestAddress(8 * MIB), LOCKED / 2).backing(Backing::private_file(file, PAGE)),
        Region::new(GuestAddress(16 * MIB), MIB).core_dump(false),
    ]
}

/// Builds memory of [`regions`].
fn memory() -> Memory {
    let builder = regions()
        .into_iter()
        .fold(MemoryBuilder::new(), MemoryBuilder::region);
    builder.build().unwrap()
}

fn duplicates(files: &Descriptors) -> Vec<OwnedFd> {
    let files = files.iter();
    files.map(|file| file.try_clone().unwrap().into()).collect()
}

#[test]
fn description_builds_equal_memory() {
    let pages = HugePages::reserve(2, "description_builds_equal_memory (hugetlb)");
    let [memfd, mut private, anonymous] = regions();
    if can_lock("description_builds_equal_memory (locked)") {
        private = private.lock(Lock::OnFault);
    }
    let mut builder = MemoryBuilder::new()
        .region(memfd)
        .region(private)
        .region(anonymous);
    if pages.is_some() {
        let huge = Region::new(GuestAddress(32 * MIB), 2 * HUGE)
            .backing(Backing::Hugetlb { page_size: HUGE });
        builder = builder.region(huge);
    }
    let memory: Memory = builder.build().unwrap();
    fill(&memory, MIB, PAGE, 0x5a);
    let (description, files) = describe(&memory).unwrap();
    assert!(description.check().is_ok());
    let builder = description.builder(duplicates(&files).into()).unwrap();
    let again: Memory = builder.build().unwrap();
    assert_eq!(describe(&again).unwrap().0, description);
    assert_eq!(byte_of_page(&again, MIB), Some(0x5a));
    assert_eq!(byte_of_page(&again, 8 * MIB), Some(pattern_of_page(1)));
    assert_eq!(byte_of_page(&again, 16 * MIB), Some(0));
    if pages.is_some() {
        fill(&again, 32 * MIB, PAGE, 0x77);
        assert_eq!(byte_of_page(&memory, 32 * MIB), Some(0x77));
    }
}

#[test]
fn build_from_description_with_other_descriptors_returns_error() {
    let (description, files) = describe(&memory()).unwrap();

    let mut swapped = duplicates(&files);
    swapped.swap(0, 1);
    let error = build_error(&description, swapped);
    let is_detected = error.contains("is not sealed against shrinking")
        || error.contains("the description states");
    assert!(is_detected, "{error}");

    let mut fewer = duplicates(&files);
    fewer.pop();
    let error = description.builder(fewer.into()).unwrap_err().to_string();
    assert!(error.contains("is missing, only"), "{error}");
}

#[test]
fn build_from_changed_description_returns_error() {
    let (description, files) = describe(&memory()).unwrap();

    let mut larger = description.clone();
    if let BackingDescription::Descriptor { page_size, .. } = &mut larger.regions[0].backing {
        *page_size = HUGE;
    }
    let error = build_error(&larger, duplicates(&files));
    assert!(
        error.contains("the description states memfd with pages of 0x200000 bytes"),
        "{error}"
    );

    let mut later = description;
    later.version += 1;
    assert!(later.builder(duplicates(&files).into()).is_err());
}

#[test]
fn description_display_lists_regions() {
    let shown = describe(&memory()).unwrap().0.to_string();
    assert!(
        shown.starts_with("0x0-0x3fffff : memfd \"low\", descriptor 0 at 0x0\n"),
        "{shown}"
    );
    assert!(
        shown.contains("0x800000-0x807fff : file, descriptor 1 at 0x1000, private copy\n")
            || shown.contains("0x800000-0x807fff : memfd, descriptor 1 at 0x1000, private copy\n"),
        "{shown}"
    );
    assert!(
        shown.contains("0x1000000-0x10fffff : anonymous\n"),
        "{shown}"
    );
}

#[test]
fn describe_lists_a_file_of_two_regions_once() {
    let file = Arc::new(patterned_file(16));
    let part = |start: u64, offset: u64| {
        Region::new(GuestAddress(start), 4 * PAGE).backing(Backing::File {
            file: Arc::clone(&file),
            offset,
            sharing: Sharing::Shared,
        })
    };
    let memory: Memory = MemoryBuilder::new()
        .region(part(0, 8 * PAGE))
        .region(part(MIB, 0))
        .build()
        .unwrap();
    let (_, files) = describe(&memory).unwrap();
    assert_eq!(files.len(), 1);
    let again = build_again(&memory);
    assert_eq!(
        (byte_of_page(&again, 0), byte_of_page(&again, MIB)),
        (Some(pattern_of_page(8)), Some(pattern_of_page(0)))
    );
}

#[test]
fn description_restores_plugged_blocks() {
    let region = Region::new(GuestAddress(START), SIZE)
        .backing(Backing::Memfd)
        .blocks(non_zero(HUGE), Unplugged::Protected);
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
    let again: Memory = description.builder(files.clone()).unwrap().build().unwrap();
    assert_eq!(byte_of_page(&again, START + HUGE), Some(0x21));
    assert!(!is_accessible(&again, START, 1));
    assert_eq!(describe(&again).unwrap().0, description);

    // Ranges that are not whole blocks inside the region.
    for (offset, len) in [(HUGE, u64::MAX), (1, HUGE), (0, 1), (3 * HUGE, 6 * HUGE)] {
        let mut wrong = description.clone();
        wrong.regions[0].blocks.as_mut().unwrap().plugged = vec![(offset, len)];
        let error = build_error(&wrong, duplicates(&files));
        let expected = format!(
            "cannot plug {len:#x} bytes at offset {offset:#x}; the range must be whole blocks"
        );
        assert!(error.contains(&expected), "{error}");
    }
    // No range.
    let mut empty = description;
    empty.regions[0].blocks.as_mut().unwrap().plugged = vec![(0, 0)];
    let error = build_error(&empty, duplicates(&files));
    assert!(error.contains("must be whole blocks"), "{error}");
}

#[test]
fn description_that_repeats_blocks_returns_error() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = Region::new(GuestAddress(START), SIZE).backing(backing);
        let memory = build(region.blocks(non_zero(HUGE), Unplugged::Protected)).unwrap();
        let (description, files) = describe(&memory).unwrap();
        let with = |plugged: &[(u64, u64)]| {
            let mut with = description.clone();
            with.regions[0].blocks.as_mut().unwrap().plugged = plugged.to_vec();
            let fds = files.iter().map(|file| file.try_clone().unwrap().into());
            let builder = with.builder(fds.collect()).unwrap();
            builder.build::<()>()
        };
        for wrong in [
            vec![(0, SIZE); 10_000],
            vec![(0, HUGE), (0, HUGE)],
            vec![(0, 2 * HUGE), (HUGE, HUGE)],
            vec![(HUGE, HUGE), (0, HUGE)],
        ] {
            let error = with(&wrong).map(drop).unwrap_err();
            assert!(matches!(error, BuildError::PluggedTwice { .. }), "{error}");
        }
        let adjacent = with(&[(0, HUGE), (HUGE, HUGE), (4 * HUGE, HUGE)]).unwrap();
        assert_eq!(
            describe(&adjacent).unwrap().0.regions[0]
                .blocks
                .as_ref()
                .unwrap()
                .plugged,
            [(0, 2 * HUGE), (4 * HUGE, HUGE)]
        );
    }
}

#[test]
fn description_with_repeated_nodes_or_too_many_regions_returns_error() {
    let memory = build(Region::new(GuestAddress(0), PAGE)).unwrap();
    let (mut description, _) = describe(&memory).unwrap();
    let mut nodes = description.clone();
    for policy in [NumaPolicy::Bind, NumaPolicy::Interleave] {
        nodes.regions[0].options.numa = policy(vec![0; 100_000]);
        let error = build_error(&nodes, vec![]);
        assert!(error.contains("lists node 0 twice"), "{error}");
    }
    let one = description.regions[0].clone();
    description.regions = (0..1 << 20)
        .map(|n| {
            let mut region = one.clone();
            region.span.start = n * 2 * PAGE;
            region
        })
        .collect();
    let error = build_error(&description, vec![]);
    assert!(
        error.starts_with("1048576 regions need 3145728 VMAs"),
        "{error}"
    );
}

#[test]
fn build_of_described_bound_region_keeps_released_huge_pages_free() {
    let test = "build_of_described_bound_region_keeps_released_huge_pages_free";
    let Some(_pages) = HugePages::reserve(4, test) else {
        return;
    };
    let region = Region::new(GuestAddress(0), 4 * HUGE)
        .backing(Backing::Hugetlb { page_size: HUGE })
        .release_huge_pages(true);
    let memory = build(region.numa(NumaPolicy::Bind(vec![0]))).unwrap();
    assert_eq!(
        discard(&memory, GuestAddress(0), 4 * HUGE).unwrap(),
        4 * HUGE
    );
    let free = pool();
    let _again = build_again(&memory);
    assert_eq!(pool(), free);
}

#[test]
fn build_of_described_private_huge_pages_reserves_them() {
    let test = "build_of_described_private_huge_pages_reserves_them";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("huge", flags).unwrap();
    rustix::fs::ftruncate(&file, 2 * HUGE).unwrap();
    let backing = Backing::private_file(file, 0);
    let region = Region::new(GuestAddress(START), 2 * HUGE).backing(backing);
    // Applies to the pages of a shared file only.
    let memory = build(region.release_huge_pages(true)).unwrap();
    let (description, files) = describe(&memory).unwrap();
    drop(memory);
    let memory: Memory = description.builder(files).unwrap().build().unwrap();
    assert_eq!(pool().unwrap().1, 0);
    fill(&memory, START, 2 * HUGE, 1);
}

#[test]
fn fresh_with_offset_that_check_refuses_returns_error() {
    let region = Region::new(GuestAddress(START), PAGE).backing(Backing::Memfd);
    let (mut description, _) = describe(&build(region).unwrap()).unwrap();
    match &mut description.regions[0].backing {
        BackingDescription::Descriptor { offset, .. } => *offset = u64::MAX,
        other => panic!("{other:?}"),
    }
    for result in [description.check(), description.fresh().map(drop)] {
        let refused = DescriptionError::Layout(BuildError::FileOffset {
            region: Span {
                start: START,
                size: PAGE,
            },
            offset: u64::MAX,
        });
        assert_eq!(result.unwrap_err().to_string(), refused.to_string());
    }
}

#[test]
fn fresh_memory_has_the_same_layout_and_no_bytes() {
    let test = "fresh_memory_has_the_same_layout_and_no_bytes";
    let pages = HugePages::reserve(4, test);
    let region = |start, backing| Region::new(GuestAddress(start), 4 * MIB).backing(backing);
    let file = || patterned_file(4 * MIB / PAGE);
    let blocks = region(START, Backing::Memfd).blocks(non_zero(HUGE), Unplugged::Mapped);
    let mut builder = MemoryBuilder::new()
        .region(region(0, Backing::Anonymous).mergeable(true))
        .region(region(MIB << 10, Backing::private_file(file(), 0)).mergeable(true))
        .region(region(MIB << 11, Backing::shared_file(file(), 0)).read_only(true))
        .region(blocks);
    if pages.is_some() {
        let huge = region(2 * START, Backing::Hugetlb { page_size: HUGE });
        builder = builder.region(huge.release_huge_pages(true));
    }
    let memory: Memory = builder.build().unwrap();
    plug(&memory, GuestAddress(START), HUGE).unwrap();
    fill(&memory, START, PAGE, 9);
    let (description, _) = describe(&memory).unwrap();
    let fresh: Memory = description.fresh().unwrap().build().unwrap();
    let (found, descriptors) = describe(&fresh).unwrap();
    let layout = |description: &Description| {
        let regions = description.regions.iter();
        let regions = regions.map(|region| (region.span, region.blocks.clone()));
        regions.collect::<Vec<_>>()
    };
    assert_eq!(layout(&found), layout(&description));
    assert_eq!(descriptors.len(), 2 + usize::from(pages.is_some()));
    for start in [0, MIB << 10, MIB << 11, START] {
        assert_eq!(byte_of_page(&fresh, start), Some(0), "{start:#x}");
        fill(&fresh, start, PAGE, 7);
    }
    assert!(!is_accessible(&fresh, START + HUGE, 1));
    assert_eq!(byte_of_page(&memory, START), Some(9));
    let options: Vec<_> = found.regions.iter().map(|region| &region.options).collect();
    assert!(options[0].mergeable && options[1].mergeable && !options[2].read_only);
    if pages.is_some() {
        assert!(options[4].release_huge_pages);
        assert_eq!(
            found.regions[4].to_string().split(' ').nth(2),
            Some("hugetlb")
        );
    }
    let mut newer = description;
    newer.version += 1;
    assert!(newer.fresh().is_err());
}

/// Returns the described blocks of each region.
fn blocks_of(memory: &Memory) -> Vec<Option<BlocksDescription>> {
    let (description, _) = describe(memory).unwrap();
    let regions = description.regions.into_iter();
    regions.map(|region| region.blocks).collect()
}

/// Builds a memory of RAM at 0, and of eight blocks at [`START`] and at `2 * START`.
fn memory_of_blocks() -> Memory {
    // Protected blocks require it.
    vm_memory::fault::install().unwrap();
    let region = |start| Region::new(GuestAddress(start), 8 * HUGE);
    let blocks = |start, unplugged| region(start).blocks(non_zero(HUGE), unplugged);
    MemoryBuilder::new()
        .region(region(0))
        .region(blocks(START, Unplugged::Mapped))
        .region(blocks(2 * START, Unplugged::Protected).backing(Backing::Memfd))
        .build()
        .unwrap()
}

#[test]
fn apply_blocks_makes_blocks_of_destination_equal_and_keeps_their_bytes() {
    let source = memory_of_blocks();
    let block = |start, number| GuestAddress(start + number * HUGE);
    plug(&source, block(START, 1), 3 * HUGE).unwrap();
    plug(&source, block(2 * START, 0), HUGE).unwrap();
    let (first, _) = describe(&source).unwrap();
    let destination: Memory = first.fresh().unwrap().build().unwrap();
    for number in 1..4 {
        fill(&destination, block(START, number).0, PAGE, 7);
    }

    let mut dirty = DirtyMemory::new();
    // Every kind of overlap between the old and the new plugged ranges.
    let changes = [
        (vec![(START, 2, 1)], vec![(START, 0, 1), (START, 6, 2)]),
        (vec![(START, 0, 8), (2 * START, 0, 1)], vec![]),
        (vec![], vec![(START, 3, 1), (2 * START, 5, 3)]),
        (vec![(START, 3, 1)], vec![(START, 2, 1), (START, 4, 1)]),
        (
            vec![(2 * START, 5, 1), (2 * START, 7, 1)],
            vec![(START, 0, 8)],
        ),
        (vec![(START, 0, 2), (START, 5, 3)], vec![]),
    ];
    for (round, (unplugged, plugged)) in changes.into_iter().enumerate() {
        for (start, number, count) in unplugged {
            unplug(&source, block(start, number), count * HUGE).unwrap();
        }
        for (start, number, count) in plugged {
            plug(&source, block(start, number), count * HUGE).unwrap();
        }
        let (description, _) = describe(&source).unwrap();
        assert_ne!(blocks_of(&destination), blocks_of(&source), "{round}");
        description.apply_blocks(&destination).unwrap();
        assert_eq!(blocks_of(&destination), blocks_of(&source), "{round}");
        if round == 0 {
            for (number, byte) in [(0, 0), (1, 7), (3, 7), (6, 0), (7, 0)] {
                let found = byte_of_page(&destination, block(START, number).0);
                assert_eq!(found, Some(byte), "block {number}");
            }
            assert!(!is_accessible(&destination, block(START, 2).0, 1));
            fill(&destination, block(START, 0).0, PAGE, 9);
        }
        // Applied again, it changes nothing.
        dirty.harvest(&destination);
        dirty.clear();
        description.apply_blocks(&destination).unwrap();
        dirty.harvest(&destination);
        assert_eq!(dirty.total_pages(), 0, "{round}");
    }
}

#[test]
fn surplus_in_memory_of_other_bounds_returns_each_region_once() {
    let region = |start: u64, size| Region::new(GuestAddress(start * MIB), size * MIB);
    let regions = [region(0, 1), region(2, 2), region(6, 1), region(8, 1)];
    let builder = regions
        .into_iter()
        .fold(MemoryBuilder::new(), MemoryBuilder::region);
    let memory: Memory = builder.build().unwrap();
    let (mut described, _) = describe(&memory).unwrap();
    assert_eq!(described.surplus_in(&memory), []);
    // One is gone, one is shorter, and one has moved. The order does not matter.
    described.regions[1].span.size = MIB;
    described.regions[2].span.start += MIB / 2;
    described.regions.remove(0);
    described.regions.reverse();
    let surplus = described.surplus_in(&memory);
    let surplus: Vec<_> = surplus
        .iter()
        .map(|span| (span.start / MIB, span.size / MIB))
        .collect();
    assert_eq!(surplus, [(0, 1), (2, 2), (6, 1)]);
    let missing = described.missing_from(&memory).regions.len();
    assert_eq!(missing, 2);
}

/// Sends dirty pages as the documentation of `apply_blocks` says.
fn send(source: &Memory, dirty: &mut DirtyMemory, destination: &Memory) {
    for (addr, len) in dirty.unreadable_runs() {
        zero_range(destination, addr, len as u64).unwrap();
    }
    let mut buffer = vec![0; 4 * HUGE as usize];
    let mut unsent = Vec::new();
    for (addr, len) in dirty.runs() {
        match source.read_slice(&mut buffer[..len], addr) {
            Ok(()) => destination.write_slice(&buffer[..len], addr).unwrap(),
            Err(_) => unsent.push((addr, len)),
        }
    }
    dirty.clear();
    for (addr, len) in unsent {
        dirty.insert_range(addr, len as u64);
    }
}

#[test]
fn apply_blocks_with_block_unplugged_before_the_send_loses_no_page_of_others() {
    let source = memory_of_blocks();
    let block = |number| GuestAddress(START + number * HUGE);
    plug(&source, block(0), 4 * HUGE).unwrap();
    let destination: Memory = describe(&source)
        .unwrap()
        .0
        .fresh()
        .unwrap()
        .build()
        .unwrap();
    fill(&source, START, 4 * HUGE, 1);
    let mut dirty = DirtyMemory::new();
    let mut round = |unplugged: Option<u64>, plugged: Option<u64>, written: &[u64]| {
        for page in written {
            fill(&source, *page, PAGE, 2);
        }
        dirty.harvest(&source);
        describe(&source)
            .unwrap()
            .0
            .apply_blocks(&destination)
            .unwrap();
        if let Some(number) = unplugged {
            unplug(&source, block(number), HUGE).unwrap();
        }
        if let Some(number) = plugged {
            plug(&source, block(number), HUGE).unwrap();
        }
        send(&source, &mut dirty, &destination);
        dirty.total_pages()
    };
    // One run over four blocks, and then one over the border of two.
    assert_ne!(round(Some(2), None, &[]), 0);
    assert_eq!(round(None, Some(2), &[]), 0);
    let border = [block(1).0 - PAGE, block(1).0];
    assert_eq!(round(Some(1), None, &border), 2);
    assert_eq!(round(None, None, &[]), 0);
    assert_eq!(blocks_of(&destination), blocks_of(&source));
    let plugged = [block(0), block(2), block(3)].map(|start| start.0);
    let pages = plugged.map(|start| (start..start + HUGE).step_by(PAGE as usize));
    for page in pages.into_iter().flatten() {
        assert_eq!(
            byte_of_page(&destination, page),
            byte_of_page(&source, page),
            "{page:#x}"
        );
    }
    assert_eq!(byte_of_page(&destination, border[0]), Some(2));
}

#[test]
fn apply_blocks_to_other_memory_returns_error_and_changes_nothing() {
    let memory = memory_of_blocks();
    plug(&memory, GuestAddress(START), 2 * HUGE).unwrap();
    let before = blocks_of(&memory);
    let (description, _) = describe(&memory).unwrap();
    let changed = |change: fn(&mut Description)| {
        let mut changed = description.clone();
        // The first region of blocks could be applied.
        changed.regions[1].blocks.as_mut().unwrap().plugged = vec![(4 * HUGE, HUGE)];
        change(&mut changed);
        changed.apply_blocks(&memory).unwrap_err()
    };
    let others = [
        changed(|other| other.regions[2].span.start += 16 * HUGE),
        changed(|other| other.regions[2].span.size += HUGE),
        changed(|other| other.regions[0].blocks = other.regions[1].blocks.clone()),
        changed(|other| {
            let blocks = other.regions[2].blocks.as_mut().unwrap();
            blocks.blocks.size = non_zero(2 * HUGE);
        }),
    ];
    for error in others {
        assert!(
            matches!(error, DescriptionError::OtherBlocks { .. }),
            "{error}"
        );
    }
    let invalid = [
        changed(|other| {
            other.regions[2].blocks.as_mut().unwrap().plugged = vec![(7 * HUGE, 2 * HUGE)];
        }),
        changed(|other| {
            let plugged = vec![(2 * HUGE, HUGE), (0, HUGE)];
            other.regions[2].blocks.as_mut().unwrap().plugged = plugged;
        }),
        changed(|other| {
            other.regions[2].blocks.as_mut().unwrap().plugged = vec![(u64::MAX - 1, 2)];
        }),
    ];
    for error in invalid {
        assert!(matches!(error, DescriptionError::Layout(_)), "{error}");
    }
    let version = changed(|other| other.version += 1);
    assert!(matches!(version, DescriptionError::Version { .. }));
    assert_eq!(blocks_of(&memory), before);
}
