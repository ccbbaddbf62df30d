//! A lookup in an IOTLB allocates nothing, and a mapping takes the documented memory.

use std::collections::VecDeque;

use test_support::PAGE_U64 as PAGE;
use vm_memory::iommu::SharedIotlb;
use vm_memory::{GuestAddress, Iotlb, Permissions};

use crate::counting_allocator::{bytes_out, taken_by};

/// Runs `of`, and returns the number of its allocations, and its result.
fn allocations<T>(of: impl FnOnce() -> T) -> (usize, T) {
    let (taken, outcome) = taken_by(of);
    (taken.allocations, outcome)
}

/// Returns mappings of every other page, to addresses that are not adjacent.
fn pages(count: u64) -> impl Iterator<Item = (GuestAddress, GuestAddress)> {
    (0..count).map(|number| {
        (
            GuestAddress(number * 2 * PAGE),
            GuestAddress(number * 3 * PAGE),
        )
    })
}

fn fragmented(count: u64) -> Iotlb {
    let mut iotlb = Iotlb::new();
    for (iova, to) in pages(count) {
        iotlb
            .set_mapping(iova, to, 0x1000, Permissions::Read)
            .unwrap();
    }
    iotlb
}

#[test]
fn lookup_hit_allocates_nothing_and_miss_allocates_its_error() {
    let mut iotlb = fragmented(1000);
    // Sixteen adjacent mappings.
    for number in 0..16 {
        let iova = GuestAddress((1 << 32) + number * PAGE);
        iotlb
            .set_mapping(
                iova,
                GuestAddress(number * 5 * PAGE),
                0x1000,
                Permissions::Read,
            )
            .unwrap();
    }
    let shared = SharedIotlb::new();
    let (iova, to) = (GuestAddress(0), GuestAddress(0x5000));
    shared
        .set_mapping(iova, to, 0x1000, Permissions::Read)
        .unwrap();
    // The first access of a thread makes arc-swap allocate its slots.
    drop(shared.snapshot());

    let hit = |iova, length| {
        let found = Iotlb::lookup(&iotlb, GuestAddress(iova), length, Permissions::Read);
        found.map(Iterator::count).map_err(drop)
    };
    assert_eq!(allocations(|| hit(0x1f_4000, 8)), (0, Ok(1)));
    assert_eq!(allocations(|| hit(1 << 32, 0x1_0000)), (0, Ok(16)));
    let shared_hit = || {
        let found = shared.lookup(iova, 8, Permissions::Read);
        found.map(Iterator::count).map_err(drop)
    };
    assert_eq!(allocations(shared_hit), (0, Ok(1)));

    for (iova, length, access) in [
        // In a hole.
        (0x1f_5000, 8, Permissions::Read),
        // Ends in a hole.
        (0x1f_4800, 0x1000, Permissions::Read),
        // Begins in a hole.
        (0x1f_5800, 0x1000, Permissions::Read),
        // After all mappings.
        (1 << 40, 8, Permissions::Read),
        // Without permission.
        (0x1f_4000, 8, Permissions::Write),
        // Past the end of the address space.
        (u64::MAX, 8, Permissions::Read),
    ] {
        let miss = || Iotlb::lookup(&iotlb, GuestAddress(iova), length, access).map(drop);
        let (count, outcome) = allocations(miss);
        let fails = outcome.unwrap_err();
        assert_eq!(fails.misses.len() + fails.access_fails.len(), 1);
        assert_eq!(count, 1, "{iova:#x}");
    }
}

/// The documentation of `SharedIotlb` states these bytes per mapping.
#[test]
fn iotlb_takes_32_to_90_bytes_per_mapping_after_any_removal() {
    let each = |before: isize, iotlb: &Iotlb| (bytes_out() - before) as usize / iotlb.entries();
    let before = bytes_out();
    let full = fragmented(100_000);
    assert!(
        (32..40).contains(&each(before, &full)),
        "{}",
        each(before, &full)
    );
    drop(full);

    // The first `some` mappings of every other leaf stay, and the first `others` of the leaves
    // between. The table joins adjacent leaves with at most 96 mappings, as in the first case only.
    for (some, others) in [(64, 1), (96, 1), (96, 32), (48, 49), (33, 64), (128, 1)] {
        let before = bytes_out();
        let mut iotlb = fragmented(100_000);
        for (number, (iova, _)) in pages(100_000).enumerate() {
            let stays = if number / 128 % 2 == 0 { some } else { others };
            if number % 128 >= stays {
                iotlb.invalidate_mapping(iova, 0x1000);
            }
        }
        let each = each(before, &iotlb);
        assert!((32..=90).contains(&each), "{some} and {others}: {each}");
    }
}

#[test]
fn kept_iotlb_snapshot_takes_memory_of_changes_only() {
    let shared = SharedIotlb::new();
    for (iova, to) in pages(10_000) {
        shared
            .set_mapping(iova, to, 0x1000, Permissions::Read)
            .unwrap();
    }
    let mut kept = VecDeque::new();
    let before = bytes_out();
    for (iova, to) in pages(320) {
        let to = GuestAddress(to.0 + (1 << 40));
        shared
            .set_mapping(iova, to, 0x1000, Permissions::Read)
            .unwrap();
        kept.push_back(shared.snapshot());
        if kept.len() > 32 {
            kept.pop_front();
        }
    }
    let each = (bytes_out() - before) / 32;
    // One leaf of 4 KiB, and at most 64 bytes for each of 79 leaves. A whole table takes 320 KB.
    assert!((4096..12_000).contains(&each), "{each} bytes each");
    // The next change frees snapshots that have no reader.
    kept.clear();
    shared.invalidate_mapping(GuestAddress(0), 0x1000).readers();
    let rest = bytes_out() - before;
    assert!(rest < 100_000, "{rest} bytes");
}
