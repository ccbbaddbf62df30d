//! Tests of the ranges that have content.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};

use super::common::*;
use rustix::fs::{fchmod, fchown, Mode, Uid};
use rustix::thread::{capabilities, set_capabilities, CapabilitySet};
use test_support::skipped;
use vm_memory::GuestAddress;
use vm_memory_host::{
    content, describe, discard, plug, residency, unplug, Backing, MemoryBuilder, Region, Unplugged,
};

const START: u64 = 1 << 32;
/// More than the iterator examines at a time.
const SIZE: u64 = 160 * MIB;

/// Returns the ranges that have content, as start and end relative to `START`.
fn ranges(memory: &Memory) -> Vec<(u64, u64)> {
    let spans = content(memory).unwrap().map(Result::unwrap);
    let ranges = spans.map(|span| (span.start - START, span.start + span.size - START));
    let ranges: Vec<_> = ranges.collect();
    assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0));
    ranges
}

/// Returns regions whose content is exactly the pages that were written.
fn exact_backings(sparse: impl Fn() -> File) -> Vec<(&'static str, Region)> {
    let region = |backing| Region::new(GuestAddress(START), SIZE).backing(backing);
    let shared = |file| region(Backing::shared_file(file, PAGE));
    vec![
        ("anonymous", region(Backing::Anonymous)),
        ("memfd", region(Backing::Memfd)),
        ("shared file", shared(sparse())),
        ("sparse file", shared(sparse()).sparse(true)),
        (
            "private file",
            region(Backing::private_file(sparse(), PAGE)),
        ),
    ]
}

#[test]
fn content_is_the_written_pages_of_each_backing() {
    let sparse = || test_support::temp_file_of_len(SIZE + PAGE);
    for (kind, region) in exact_backings(sparse) {
        let memory = build(region).unwrap();
        assert_eq!(ranges(&memory), [], "{kind}");
        let window = 64 * MIB;
        // The first and the last page, and pages on both sides of a window's end.
        for at in [0, 3 * PAGE, window - PAGE, window, SIZE - PAGE] {
            fill(&memory, START + at, PAGE, 1);
        }
        let mut expected = vec![
            (0, PAGE),
            (3 * PAGE, 4 * PAGE),
            (window - PAGE, window + PAGE),
            (SIZE - PAGE, SIZE),
        ];
        let check = |expected: &[(u64, u64)]| {
            let found = ranges(&memory);
            if kind != "shared file" {
                assert_eq!(found, expected, "{kind}");
            }
            // The kernel reads unwritten space of a disk ahead, and then counts it as data.
            for (start, end) in expected {
                let holds = |range: &&(u64, u64)| range.0 <= *start && *end <= range.1;
                assert!(found.iter().any(|range| holds(&range)), "{kind}: {found:?}");
            }
        };
        check(&expected);
        discard(&memory, GuestAddress(START + 2 * PAGE), 2 * PAGE).unwrap();
        expected.remove(1);
        check(&expected);
    }
}

#[test]
fn content_of_private_file_includes_its_data_unless_discarded() {
    let mut file = patterned_file(16);
    file.seek(SeekFrom::Start(5)).unwrap();
    let backing = Backing::private_file(file.try_clone().unwrap(), 4 * PAGE);
    let memory = build(Region::new(GuestAddress(START), 12 * PAGE).backing(backing)).unwrap();
    assert_eq!(ranges(&memory), [(0, 12 * PAGE)]);
    discard(&memory, GuestAddress(START + PAGE), 8 * PAGE).unwrap();
    assert_eq!(ranges(&memory), [(0, PAGE), (9 * PAGE, 12 * PAGE)]);
    fill(&memory, START + 4 * PAGE, PAGE, 1);
    let expected = [(0, PAGE), (4 * PAGE, 5 * PAGE), (9 * PAGE, 12 * PAGE)];
    assert_eq!(ranges(&memory), expected);
    assert_eq!(
        file.stream_position().unwrap(),
        5,
        "the position has changed"
    );
}

#[test]
fn content_of_huge_pages_includes_those_of_other_mappings() {
    let test = "content_of_huge_pages_includes_those_of_other_mappings";
    let Some(_pages) = HugePages::reserve(4, test) else {
        return;
    };
    let region = Region::new(GuestAddress(START), 4 * HUGE);
    let memory = build(region.backing(Backing::Hugetlb { page_size: HUGE })).unwrap();
    assert_eq!(ranges(&memory), []);
    fill(&memory, START + HUGE, PAGE, 1);
    assert_eq!(ranges(&memory), [(HUGE, 2 * HUGE)]);
    let other = build_again(&memory);
    // The last page of the last huge page. Only the other mapping has mapped it.
    fill(&other, START + 4 * HUGE - PAGE, PAGE, 1);
    let (_, before) = residency(&memory).unwrap()[0];
    assert_eq!(ranges(&memory), [(HUGE, 2 * HUGE), (3 * HUGE, 4 * HUGE)]);
    let (_, after) = residency(&memory).unwrap()[0];
    assert_eq!(before, after, "a page was populated");
}

/// Drops the capabilities by which root may access the files of other users, in this thread only.
fn drop_file_capabilities() -> Result<(), rustix::io::Errno> {
    let mut sets = capabilities(None)?;
    let of_files = CapabilitySet::FOWNER | CapabilitySet::DAC_OVERRIDE;
    sets.effective -= of_files;
    set_capabilities(None, sets)
}

#[test]
fn content_of_huge_pages_of_another_user_includes_them() {
    let test = "content_of_huge_pages_of_another_user_includes_them";
    let Some(_pages) = HugePages::reserve(4, test) else {
        return;
    };
    let region = Region::new(GuestAddress(START), 4 * HUGE);
    let memory = build(region.backing(Backing::Hugetlb { page_size: HUGE })).unwrap();
    fill(&memory, START, 4 * HUGE, 1);
    let (_, files) = describe(&memory).unwrap();
    // mincore(2) then reports all pages as resident.
    fchmod(files.get(0).unwrap(), Mode::RUSR | Mode::WUSR).unwrap();
    fchown(files.get(0).unwrap(), Some(Uid::from_raw(65534)), None).unwrap();
    let other = build_again(&memory);
    let found = std::thread::scope(|scope| {
        let run = || drop_file_capabilities().map(|()| ranges(&other));
        scope.spawn(run).join().unwrap()
    });
    match found {
        Ok(found) => assert_eq!(found, [(0, 4 * HUGE)]),
        Err(error) => skipped(test, error),
    }
}

#[test]
fn content_of_file_on_overlayfs_after_copy_up_includes_its_data() {
    let test = "content_of_file_on_overlayfs_after_copy_up_includes_its_data";
    let Some(below) = Mounted::tmpfs("size=1m", test) else {
        return;
    };
    let path = |name: &str| below.directory.path().join(name).display().to_string();
    for name in ["lower", "upper", "work"] {
        fs::create_dir(path(name)).unwrap();
    }
    fs::write(path("lower/file"), [7; 16 * PAGE as usize]).unwrap();
    let (lower, upper, work) = (path("lower"), path("upper"), path("work"));
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let Some(overlay) = Mounted::new("overlay", &options, test) else {
        return;
    };
    let file = overlay.directory.path().join("file");
    let backing = Backing::private_file(File::open(&file).unwrap(), 0);
    let memory = build(Region::new(GuestAddress(START), 16 * PAGE).backing(backing)).unwrap();
    // The copy is empty. The mapping still has the bytes of the original file.
    let copy = File::options().write(true).open(&file).unwrap();
    copy.set_len(0).unwrap();
    copy.set_len(16 * PAGE).unwrap();
    assert_eq!(byte_of_page(&memory, START), Some(7));
    assert_eq!(ranges(&memory), [(0, 16 * PAGE)]);
}

#[test]
fn content_leaves_out_unplugged_blocks_and_follows_regions() {
    let region = |n: u64| Region::new(GuestAddress(START + n * 4 * HUGE), 4 * HUGE);
    let memory: Memory = MemoryBuilder::new()
        .region(region(0).blocks(non_zero(HUGE), Unplugged::Mapped))
        .region(region(1).backing(Backing::Memfd))
        .build()
        .unwrap();
    plug(&memory, GuestAddress(START), 4 * HUGE).unwrap();
    fill(&memory, START + HUGE - PAGE, 2 * PAGE, 1);
    fill(&memory, START + 4 * HUGE - PAGE, 2 * PAGE, 1);
    unplug(&memory, GuestAddress(START), HUGE).unwrap();
    let end = 4 * HUGE;
    let expected = [(HUGE, HUGE + PAGE), (end - PAGE, end), (end, end + PAGE)];
    let spans = content(&memory).unwrap().map(Result::unwrap);
    let found: Vec<_> = spans.map(|one| (one.start - START, one.size)).collect();
    let expected = expected.map(|(start, end)| (start, end - start));
    assert_eq!(found, expected);
}
