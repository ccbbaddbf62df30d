//! Operations on memory of the parent process, in a child of fork(2).

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use test_support::{temp_file, temp_file_of_len, HugePages};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::mapping::provisioned;
use crate::{
    content, discard, discard_pages, plug, plug_state, prefault, residency, unplug, unplug_all,
    Backing, Balloon, ChangeError, DiscardReport, MemoryBuilder, PrefaultError, Region,
    ResidencyError, Unplugged,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const HUGE: u64 = 2 << 20;
const SIZE: u64 = 2 * HUGE;

fn build(region: Region) -> Memory {
    MemoryBuilder::new().region(region).build().unwrap()
}

/// Returns a region of each backing whose discards differ.
fn regions(has_huge_pages: bool) -> Vec<(&'static str, Region)> {
    let region = |backing| Region::new(GuestAddress(0), SIZE).backing(backing);
    let shared = || region(Backing::shared_file(temp_file_of_len(SIZE), 0));
    let block = HUGE.try_into().unwrap();
    let private = temp_file(&vec![1; usize::try_from(SIZE).unwrap()]);
    let mut regions = vec![
        ("anonymous", region(Backing::Anonymous)),
        ("memfd", region(Backing::Memfd)),
        ("shared file", shared()),
        ("sparse file", shared().sparse(true)),
        ("private file", region(Backing::private_file(private, 0))),
        (
            "blocks",
            region(Backing::Memfd).blocks(block, Unplugged::Mapped),
        ),
    ];
    let hugetlb = || region(Backing::Hugetlb { page_size: HUGE });
    if has_huge_pages {
        regions.push(("hugetlb", hugetlb()));
        regions.push(("released pages", hugetlb().release_huge_pages(true)));
        regions.push((
            "hugetlb blocks",
            hugetlb().blocks(block, Unplugged::Protected),
        ));
    }
    regions
}

/// Returns the names of the operations that do not refuse the memory.
fn accepted(memory: &Memory) -> Vec<&'static str> {
    let refuses =
        |result: Result<u64, ChangeError>| matches!(result, Err(ChangeError::OtherProcess(_)));
    let refuses_page = |report: DiscardReport| {
        let reason = report.first_refused.map(|refused| refused.source);
        report.discarded + report.collected == 0
            && matches!(reason, Some(ChangeError::OtherProcess(_)))
    };
    let all = GuestAddress(0);
    let prefaulted = prefault(memory, NonZeroUsize::MIN, |_| ControlFlow::Continue(()));
    let mut items = content(memory).unwrap();
    let results = [
        ("discard", refuses(discard(memory, all, SIZE))),
        ("discard_pages", refuses_page(discard_pages(memory, [0u32]))),
        (
            "inflate",
            refuses_page(Balloon::new().inflate(memory, [0u32])),
        ),
        ("plug", refuses(plug(memory, all, SIZE))),
        ("unplug", refuses(unplug(memory, all, SIZE))),
        ("unplug_all", refuses(unplug_all(memory, all))),
        (
            "plug_state",
            refuses(plug_state(memory, all, SIZE).map(|_| 0)),
        ),
        (
            "prefault",
            matches!(prefaulted, Err(PrefaultError::OtherProcess(_))),
        ),
        (
            "residency",
            matches!(residency(memory), Err(ResidencyError::OtherProcess(_))),
        ),
        (
            "content",
            matches!(items.next(), Some(Err(ResidencyError::OtherProcess(_)))),
        ),
    ];
    let accepted = results.into_iter().filter(|(_, refused)| !refused);
    accepted.map(|(name, _)| name).collect()
}

#[test]
fn change_in_child_of_each_backing_returns_error_and_changes_nothing() {
    vm_memory::fault::install().unwrap();
    let test = "change_in_child_of_each_backing_returns_error_and_changes_nothing (hugetlb)";
    let pages = HugePages::reserve(2, test);
    for (kind, region) in regions(pages.is_some()) {
        let has_blocks = region.blocks.is_some();
        let memory = build(region);
        if has_blocks {
            // The second block stays unplugged.
            plug(&memory, GuestAddress(0), HUGE).unwrap();
        }
        memory
            .write_slice(b"precious", GuestAddress(0x3000))
            .unwrap();
        if kind == "released pages" {
            discard(&memory, GuestAddress(HUGE), HUGE).unwrap();
        }
        let used = residency(&memory).unwrap();
        let free = pages.as_ref().map(HugePages::free);
        let in_child = || {
            let accepted = accepted(&memory);
            if !accepted.is_empty() {
                eprintln!("{kind}: {accepted:?}");
            }
            accepted.is_empty()
        };
        assert!(crate::sys::in_child(in_child), "{kind}");
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!(&bytes, b"precious", "{kind}");
        assert_eq!(pages.as_ref().map(HugePages::free), free, "{kind}");
        assert_eq!(
            residency(&memory).unwrap()[0].1.resident,
            used[0].1.resident
        );
    }
}

#[test]
fn residency_and_content_without_main_thread_know_pages() {
    assert!(crate::sys::in_child_without_main_thread(|| {
        let memory = build(Region::new(GuestAddress(0), SIZE));
        memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();
        let usage = residency(&memory).unwrap()[0].1;
        let content: Vec<_> = content(&memory).unwrap().map(Result::unwrap).collect();
        usage.private > 0 && usage.mapped > 0 && content[0].size < SIZE
    }));
}

#[test]
fn change_in_child_of_locked_mapping_returns_error() {
    let block = HUGE.try_into().unwrap();
    let region = Region::new(GuestAddress(0), SIZE).blocks(block, Unplugged::Mapped);
    let memory = build(region.backing(Backing::Memfd));
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
    // Another thread of the parent changes the mapping while the parent forks.
    let _changes = mapping.lock_changes();
    assert!(crate::sys::in_child(|| accepted(&memory).is_empty()));
    // Only these two methods lock the mapping.
    assert!(crate::sys::in_child(|| {
        mapping.lock_changes().is_err() && mapping.hold_blocks().is_err()
    }));
}
