//! Neither a guest nor a description can use up the VMAs of a process (`vm.max_map_count`).
//!
//! The tests count the VMAs of their process, so they are a separate program.
#![cfg(target_os = "linux")]

use std::fs;
use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};

use rustix::mm::{mlockall, MlockAllFlags};
use test_support::{in_own_process, skipped, temp_file, PAGE_U64 as PAGE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
use vm_memory_host::{
    discard, Arena, ArenaError, Backing, BuildError, MemoryBuilder, Region, Unplugged,
};

/// The tests take turns: all memory of a process counts.
static TURN: Mutex<()> = Mutex::new(());

fn build(region: Region) -> Result<GuestMemoryMmap, String> {
    let built = MemoryBuilder::new().region(region).build();
    built.map_err(|error| error.to_string())
}

/// Returns the number of VMAs that a process may have.
fn max_map_count() -> u64 {
    let text = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    text.trim().parse().unwrap()
}

fn vmas() -> u64 {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().count() as u64
}

#[test]
fn vma_budget_is_shared_by_all_regions_of_the_process() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    vm_memory::fault::install().unwrap();
    let most = max_map_count();

    // Each protected block could be a VMA.
    let blocks = |count: u64| {
        let size = NonZeroU64::new(PAGE).unwrap();
        Region::new(GuestAddress(0), count * PAGE).blocks(size, Unplugged::Protected)
    };
    let error = build(blocks(most)).unwrap_err();
    let expected = format!("its {most} protected blocks could need as many VMAs");
    assert!(error.contains(&expected), "{error}");
    // A separate region and its guards are three more.
    let half = build(blocks(most / 2 - 3)).unwrap();
    let error = build(Region::new(GuestAddress(0), PAGE)).unwrap_err();
    assert!(error.starts_with("1 regions need 3 VMAs"), "{error}");
    assert!(build(blocks(1)).is_err());
    drop(half);

    // Every second page of a private file is discarded: two VMAs each, more than the budget.
    let pages = most / 2 + 1000;
    let byte_of = |page: u64| (page % 255) as u8 + 1;
    let bytes: Vec<u8> = (0..pages)
        .flat_map(|page| [byte_of(page); PAGE as usize])
        .collect();
    let backing = Backing::private_file(temp_file(&bytes), 0);
    let memory = build(Region::new(GuestAddress(0), pages * PAGE).backing(backing)).unwrap();
    let before = vmas();
    let mut freed = 0;
    for page in (0..pages).step_by(2) {
        freed += discard(&memory, GuestAddress(page * PAGE), PAGE).unwrap();
    }
    assert!(freed > 0 && freed < pages / 2 * PAGE, "{freed:#x}");
    let more = vmas() - before;
    assert!(more < most / 2 + 100, "{more} VMAs more");
    // All discarded pages are zeroes, and no others.
    for page in 0..pages {
        let expected = if page % 2 == 0 { 0 } else { byte_of(page) };
        let mut seen = [0x55; PAGE as usize];
        memory
            .read_slice(&mut seen, GuestAddress(page * PAGE))
            .unwrap();
        assert!(seen.iter().all(|byte| *byte == expected), "page {page}");
    }
    // A discard that joins two ranges needs no more VMAs.
    assert_eq!(discard(&memory, GuestAddress(PAGE), PAGE).unwrap(), PAGE);
    // The guest leaves VMAs for a region that is plugged later, but not for all of the budget.
    drop(build(blocks(most / 8 - 100)).unwrap());
    // All of it is free again only when the memory is gone.
    assert!(build(blocks(most / 2 - 3)).is_err());
    drop(memory);
    build(blocks(most / 2 - 3)).unwrap();
}

#[test]
fn regions_of_a_description_leave_half_of_the_vmas_to_the_process() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let most = max_map_count();
    // Regions that are not adjacent have three VMAs each.
    let build = |count: u64| {
        let region = |n| Region::new(GuestAddress(n * 2 * PAGE), PAGE);
        let builder = (0..count).fold(MemoryBuilder::new(), |all, n| all.region(region(n)));
        builder.build::<()>()
    };
    let before = vmas();
    let error = build(most / 6 + 1).map(drop).unwrap_err();
    assert!(
        matches!(error, BuildError::TooManyRegions { .. }),
        "{error}"
    );
    // All builds of the process count.
    let one = build(most / 12).unwrap();
    let other = build(most / 12).unwrap();
    assert!(build(most / 12).is_err());
    assert!(vmas() - before <= most / 2 + 100);
    drop((one, other));
    build(most / 6 - 1).unwrap();
}

/// The addresses of a dropped region stay reserved between those of its neighbours.
#[test]
fn dropped_regions_of_a_run_leave_half_of_the_vmas_to_the_process() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let most = max_map_count();
    // The kernel does not merge regions of different options.
    let build = |count: u64| {
        let region = |n| Region::new(GuestAddress(n * PAGE), PAGE).core_dump(n % 2 == 0);
        let builder = (0..count).fold(MemoryBuilder::new(), |all, n| all.region(region(n)));
        builder.build_regions::<()>()
    };
    let before = vmas();
    let mut kept = Vec::new();
    // Every second region of each run is dropped.
    for count in [most / 2 - 100, most / 4, most / 8] {
        if let Ok(regions) = build(count) {
            kept.extend(regions.into_iter().step_by(2));
        }
        let more = vmas() - before;
        assert!(more <= most / 2 + 100, "{more} VMAs more");
    }
    assert!(!kept.is_empty());
    drop(kept);
    build(most / 2 - 100).unwrap();
}

/// A guest that has used all VMAs of its DAX window can give them back, and map again.
#[test]
fn unmap_in_arena_without_free_vmas_makes_room_for_another_map() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let file = temp_file(&[0x55; PAGE as usize]);
    let arena = Arena::new(1 << 30).unwrap();
    let map = |page: u64| arena.map(page * 2 * PAGE, PAGE, &file, 0, Permissions::Read);
    let full = (0..).find(|page| map(*page).is_err()).unwrap();
    let is_full = |result| matches!(result, Err(ArenaError::TooManyPieces { .. }));
    assert!(is_full(map(full)), "{full}");

    arena.unmap(0, PAGE).unwrap();
    map(full).unwrap();
    assert!(is_full(map(0)));
    // A range that is mapped already can be replaced, and all of it unmapped.
    map(full).unwrap();
    arena.unmap(0, arena.size()).unwrap();
    assert_eq!(arena.mapped(), []);
    map(0).unwrap();
}

/// New mappings of a process that has called mlockall(2) are locked. The kernel does not merge them
/// with those of an older arena, and each unmapped range would stay a VMA of its own.
#[test]
fn unmap_in_arena_after_mlockall_leaves_one_vma_between_pieces() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let test = "unmap_in_arena_after_mlockall_leaves_one_vma_between_pieces";
    in_own_process(test, |test| {
        let file = temp_file(&[0x55; PAGE as usize]);
        let arena = Arena::new(1 << 20).unwrap();
        if let Err(error) = mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
            return skipped(test, error);
        }
        let access = Permissions::Read;
        let before = vmas();
        for page in 0..100 {
            let offset = page * 2 * PAGE;
            arena.map(offset, PAGE, &file, 0, access).unwrap();
            arena.unmap(offset, PAGE).unwrap();
        }
        assert!(vmas() <= before + 20, "{} after {before}", vmas());
        // The range between two pieces, and a part of a piece.
        arena.map(8 * PAGE, PAGE, &file, 0, access).unwrap();
        arena.map(0, 4 * PAGE, &file, 0, access).unwrap();
        arena.unmap(2 * PAGE, 4 * PAGE).unwrap();
        assert_eq!(arena.mapped(), [(0, 2 * PAGE), (8 * PAGE, PAGE)]);
    });
}
