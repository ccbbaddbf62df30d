//! Discarded pages of memory that a userfaultfd fills from a snapshot.
#![expect(unsafe_code, reason = "registers guest memory with userfaultfd(2)")]

use std::ops::ControlFlow;

use super::common::*;
use test_support::{poison, LazyPages};
use vm_memory::{Bytes, GuestAddress};
use vm_memory_host::{
    describe, discard, discard_pages, plug, unplug, unplug_all, zero_range, Backing, Balloon, Lock,
    Region, Unplugged,
};

/// The size of the regions.
const SIZE: u64 = 8 * HUGE;
/// The byte that fills the snapshot.
const OLD: u8 = 0x6f;

/// Registers the first region of `memory` with a handler that fills its missing pages.
fn lazy(memory: &Memory, page: u64, test: &str) -> Option<LazyPages> {
    // SAFETY: the region is mapped while the test uses it, and the test has no references to it.
    unsafe {
        LazyPages::register(
            host_address(memory),
            SIZE as usize,
            page as usize,
            OLD,
            test,
        )
    }
}

/// Returns the backings that userfaultfd(2) supports, and the size of their pages.
fn lazy_backings(huge: bool, test: &str) -> (Vec<(&'static str, Region, u64)>, Option<Mounted>) {
    let all = region_of_each_backing(0, SIZE, huge).into_iter();
    let page = |kind: &str| {
        if kind.ends_with("hugetlb") {
            HUGE
        } else {
            PAGE
        }
    };
    let mut all: Vec<_> = all
        .filter(|(kind, _)| !kind.ends_with("file"))
        .map(|(kind, region)| (kind, region, page(kind)))
        .collect();
    let memfd = || {
        let memfd = rustix::fs::memfd_create("lazy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, SIZE).unwrap();
        memfd
    };
    let region = |backing| Region::new(GuestAddress(0), SIZE).backing(backing);
    all.push((
        "private memfd",
        region(Backing::private_file(memfd(), 0)),
        PAGE,
    ));
    if can_lock_all_of(2 * SIZE, test) {
        let locked = region(Backing::Memfd).lock(Lock::OnFault);
        all.push(("locked memfd", locked, PAGE));
        all.push((
            "locked anonymous",
            region(Backing::Anonymous).lock(Lock::OnFault),
            PAGE,
        ));
    }
    let tmpfs = Mounted::tmpfs("size=40m", test);
    if let Some(tmpfs) = &tmpfs {
        let file = |name: &str| {
            let file = open(tmpfs.directory.path().join(name));
            file.set_len(SIZE).unwrap();
            region(Backing::shared_file(file, 0))
        };
        all.push(("sparse tmpfs", file("sparse").sparse(true), PAGE));
        all.push(("tmpfs", file("full"), PAGE));
    }
    (all, tmpfs)
}

#[test]
fn discard_of_lazy_pages_reads_as_zeroes() {
    let test = "discard_of_lazy_pages_reads_as_zeroes";
    let pages = HugePages::reserve(2 * SIZE / HUGE, test);
    let (backings, _tmpfs) = lazy_backings(pages.is_some(), test);
    for (kind, region, page) in backings {
        let memory = build(region).unwrap();
        let Some(lazy) = lazy(&memory, page, test) else {
            return;
        };
        // The first huge page is not used before the discard, and the second is.
        let expected = if kind == "tmpfs" { 0 } else { OLD };
        assert_eq!(byte_of_page(&memory, HUGE), Some(expected), "{kind}");
        fill(&memory, HUGE + PAGE, PAGE, 0x11);
        discard(&memory, GuestAddress(0), 2 * HUGE).unwrap();
        if kind != "private memfd" && kind != "tmpfs" {
            assert!(lazy.is_removed(host_address(&memory)), "{kind}");
        }
        for at in [0, PAGE, HUGE, HUGE + PAGE, 2 * HUGE - PAGE] {
            assert_eq!(byte_of_page(&memory, at), Some(0), "{kind}, {at:#x}");
        }
        // The other pages keep the bytes of the snapshot.
        assert_eq!(byte_of_page(&memory, 2 * HUGE), Some(expected), "{kind}");
    }
}

#[test]
fn poisoned_pages_are_accessible_after_each_kind_of_discard() {
    let test = "poisoned_pages_are_accessible_after_each_kind_of_discard";
    vm_memory::fault::install().unwrap();
    let (mut backings, _tmpfs) = lazy_backings(false, test);
    let blocks = std::num::NonZeroU64::new(PAGE).unwrap();
    let region = Region::new(GuestAddress(0), SIZE).backing(Backing::Memfd);
    backings.push(("blocks", region.blocks(blocks, Unplugged::Mapped), PAGE));
    type Change = fn(&Memory, GuestAddress);
    let discards: &[Change] = &[
        |memory, at| assert_eq!(discard(memory, at, PAGE).unwrap(), PAGE),
        |memory, at| assert_eq!(zero_range(memory, at, PAGE).unwrap(), PAGE),
        |memory, at| {
            let pages = [(at.0 / PAGE) as u32];
            assert_eq!(discard_pages(memory, pages).discarded, 1);
        },
    ];
    let replug: &[Change] = &[|memory, at| {
        unplug(memory, at, PAGE).unwrap();
        plug(memory, at, PAGE).unwrap();
    }];
    for (kind, region, _) in backings {
        let memory = build(region).unwrap();
        let changes = match kind {
            "blocks" => {
                plug(&memory, GuestAddress(0), PAGE).unwrap();
                replug
            }
            // Its pages are overwritten, which does not mend them.
            "tmpfs" => continue,
            _ => discards,
        };
        for (number, change) in changes.iter().enumerate() {
            let at = number as u64 * HUGE;
            // SAFETY: the page is of the region, to which the test has no references.
            if !unsafe { poison(host_address(&memory) + at as usize, PAGE as usize, test) } {
                return;
            }
            let at = GuestAddress(at);
            assert!(memory.read_obj::<u8>(at).is_err(), "{kind}");
            change(&memory, at);
            assert_eq!(memory.read_obj::<u8>(at).unwrap(), 0, "{kind} {number}");
        }
    }
}

#[test]
fn zero_range_and_balloon_of_lazy_pages_read_as_zeroes() {
    let test = "zero_range_and_balloon_of_lazy_pages_read_as_zeroes";
    let pages = HugePages::reserve(2 * SIZE / HUGE, test);
    let hugetlb = || Backing::Hugetlb { page_size: HUGE };
    let region = |backing| Region::new(GuestAddress(0), SIZE).backing(backing);
    let mut all = vec![
        ("anonymous", region(Backing::Anonymous), PAGE),
        ("memfd", region(Backing::Memfd), PAGE),
    ];
    if pages.is_some() {
        let released = region(hugetlb()).release_huge_pages(true);
        all.push(("hugetlb", released, HUGE));
        all.push(("kept hugetlb", region(hugetlb()), HUGE));
    }
    for (kind, region, page) in all {
        let memory = build(region).unwrap();
        let Some(lazy) = lazy(&memory, page, test) else {
            return;
        };
        // A handler first fills the pages of which a part is zeroed.
        let (from, len) = (HUGE - 1, HUGE + 2);
        zero_range(&memory, GuestAddress(from), len).unwrap();
        let bytes = |at: u64| memory.read_obj::<[u8; 2]>(GuestAddress(at)).unwrap();
        assert_eq!(bytes(from - 1), [OLD, 0], "{kind}");
        assert_eq!(bytes(from + len - 1), [0, OLD], "{kind}");
        assert_eq!(byte_of_page(&memory, HUGE), Some(0), "{kind}");
        assert_eq!(byte_of_page(&memory, 2 * HUGE - PAGE), Some(0), "{kind}");
        let of_block = |block: u64| block * HUGE / PAGE..(block + 1) * HUGE / PAGE;
        fill(&memory, 3 * HUGE, PAGE, 0x11);
        assert_eq!(discard_pages(&memory, of_block(3)).refused, 0, "{kind}");
        let report = Balloon::new().inflate(&memory, of_block(4));
        assert_eq!(report.refused, 0, "{kind}");
        // A balloon leaves out the huge pages that the region keeps.
        let inflated = if report.kept == 0 { 0 } else { OLD };
        for (block, byte) in [(3, 0), (4, inflated), (5, OLD)] {
            for at in [block * HUGE, (block + 1) * HUGE - PAGE] {
                assert_eq!(byte_of_page(&memory, at), Some(byte), "{kind}, {at:#x}");
            }
        }
        // Pages that are overwritten stay in place, except for unused ones.
        let removed = if report.kept == 0 {
            &[1, 3, 4][..]
        } else {
            &[1]
        };
        for block in removed {
            let removed = lazy.is_removed(host_address(&memory) + (block * HUGE) as usize);
            assert!(removed, "{kind}, {block}");
        }
    }
}

#[test]
fn plug_and_unplug_of_lazy_pages_read_as_zeroes() {
    let test = "plug_and_unplug_of_lazy_pages_read_as_zeroes";
    let pages = HugePages::reserve(SIZE / HUGE, test);
    for unplugged in [Unplugged::Mapped, Unplugged::Protected] {
        let (backings, _tmpfs) = lazy_backings(pages.is_some(), test);
        for (kind, region, page) in backings {
            if kind.starts_with("private") {
                continue;
            }
            let memory = build(region.blocks(non_zero(HUGE), unplugged)).unwrap();
            let Some(_lazy) = lazy(&memory, page, test) else {
                return;
            };
            let what = format!("{kind}, {unplugged:?}");
            let (nothing_plugged, _) = describe(&memory).unwrap();
            plug(&memory, GuestAddress(0), 2 * HUGE).unwrap();
            assert_eq!(byte_of_page(&memory, 0), Some(0), "{what}");
            fill(&memory, 0, HUGE, 0x22);
            unplug(&memory, GuestAddress(0), HUGE).unwrap();
            plug(&memory, GuestAddress(0), HUGE).unwrap();
            assert_eq!(byte_of_page(&memory, PAGE), Some(0), "{what}");
            let (both_plugged, _) = describe(&memory).unwrap();
            fill(&memory, HUGE, PAGE, 0x33);
            unplug_all(&memory, GuestAddress(0)).unwrap();
            both_plugged.apply_blocks(&memory).unwrap();
            assert_eq!(byte_of_page(&memory, HUGE), Some(0), "{what}");
            fill(&memory, HUGE, PAGE, 0x44);
            nothing_plugged.apply_blocks(&memory).unwrap();
            both_plugged.apply_blocks(&memory).unwrap();
            assert_eq!(byte_of_page(&memory, HUGE), Some(0), "{what}");
        }
    }
}

#[test]
fn prefault_of_lazy_pages_fills_them_from_the_snapshot() {
    let test = "prefault_of_lazy_pages_fills_them_from_the_snapshot";
    let memory = build(Region::new(GuestAddress(0), SIZE).backing(Backing::Memfd)).unwrap();
    let Some(_lazy) = lazy(&memory, PAGE, test) else {
        return;
    };
    discard(&memory, GuestAddress(0), HUGE).unwrap();
    let thread = std::num::NonZeroUsize::MIN;
    vm_memory_host::prefault(&memory, thread, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(byte_of_page(&memory, 0), Some(0));
    assert_eq!(byte_of_page(&memory, SIZE - PAGE), Some(OLD));
}
