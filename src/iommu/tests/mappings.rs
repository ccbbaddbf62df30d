//! [`Iotlb::mappings`] against a list of the mappings that were set.

use std::ops::Bound;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn mappings_of_random_range_are_those_that_were_set(
        random in prop::collection::vec((0u64..200, 1u64..5, 0usize..4), 0..300),
        ranges in prop::collection::vec((0u64..210, 0u64..210), 1..20),
        at_top in any::<bool>(),
    ) {
        // The last page is the last of the address space.
        let base = if at_top { 0u64.wrapping_sub(204 * PAGE) } else { 0 };
        let (shared, mut merged) = (SharedIotlb::unmerged(), Iotlb::new());
        let mut list: Vec<Mapping> = Vec::new();
        for (page, pages, perm) in random {
            let first = GuestAddress(base + page * PAGE);
            let mapping = Mapping {
                first,
                last: GuestAddress(first.0 + (pages * PAGE - 1)),
                // Adjacent mappings continue each other.
                target: GuestAddress(page * PAGE),
                permissions: [No, Read, Write, ReadWrite][perm],
            };
            if list.iter().any(|it| it.first <= mapping.last && first <= it.last) {
                continue;
            }
            let (target, permissions) = (mapping.target, mapping.permissions);
            let length = pages as usize * 0x1000;
            shared.set_mapping(first, target, length, permissions).unwrap();
            merged.set_mapping(first, target, length, permissions).unwrap();
            list.push(mapping);
        }
        list.sort_by_key(|mapping| mapping.first);
        prop_assert_eq!(shared.mappings(..).collect::<Vec<_>>(), list.clone());
        for (one, other) in ranges {
            let (first, last) = (one.min(other), one.max(other));
            let first = GuestAddress(base.saturating_add(first * PAGE));
            let last = GuestAddress(base.saturating_add(last * PAGE + 7));
            let within = |mapping: &&Mapping| mapping.first <= last && first <= mapping.last;
            let expected: Vec<_> = list.iter().filter(within).copied().collect();
            prop_assert_eq!(shared.mappings(first..=last).collect::<Vec<_>>(), expected);
            // Joined mappings have the same addresses.
            let bytes = |mappings: &mut dyn Iterator<Item = Mapping>| -> u64 {
                mappings.map(|it| it.last.0.min(last.0) - it.first.0.max(first.0) + 1).sum()
            };
            let all = bytes(&mut shared.mappings(first..=last));
            prop_assert_eq!(bytes(&mut merged.mappings(first..=last)), all);
        }
    }
}

#[test]
fn mappings_of_each_kind_of_range_are_those_within() {
    let mut iotlb = Iotlb::unmerged();
    let top = u64::MAX;
    for first in [0, 1, top - 1, top] {
        let at = GuestAddress(first);
        iotlb.set_mapping(at, at, 1, Read).unwrap();
    }
    let starts = |range: (Bound<u64>, Bound<u64>)| -> Vec<u64> {
        let at = (range.0.map(GuestAddress), range.1.map(GuestAddress));
        iotlb.mappings(at).map(|mapping| mapping.first.0).collect()
    };
    use Bound::*;
    assert_eq!(starts((Unbounded, Unbounded)), [0, 1, top - 1, top]);
    assert_eq!(starts((Excluded(0), Excluded(top))), [1, top - 1]);
    assert!(starts((Included(2), Included(top - 2))).is_empty());
    assert_eq!(starts((Included(top), Unbounded)), [top]);
    assert!(starts((Excluded(top), Unbounded)).is_empty());
    assert!(starts((Unbounded, Excluded(0))).is_empty());
    assert!(starts((Included(1), Included(0))).is_empty());
    assert_eq!(Iotlb::new().mappings(..).next(), None);
}

/// The cases of the virtio specification, section "UNMAP request".
#[test]
fn mappings_show_the_unmap_requests_that_cut_one() {
    type Range = (u64, u64);
    let cases: [(&[Range], Range, bool, usize); 7] = [
        (&[], (0, 4), false, 0),
        (&[(0, 9)], (0, 9), false, 0),
        (&[(0, 4), (5, 9)], (0, 9), false, 0),
        (&[(0, 9)], (0, 4), true, 1),
        (&[(0, 4), (5, 9)], (0, 4), false, 1),
        (&[(0, 4)], (0, 9), false, 0),
        (&[(0, 4), (10, 14)], (0, 14), false, 0),
    ];
    for (maps, (first, last), is_cut, left) in cases {
        let iotlb = SharedIotlb::unmerged();
        for (first, last) in maps {
            let at = GuestAddress(*first);
            let length = (last - first + 1) as usize;
            iotlb.set_mapping(at, at, length, ReadWrite).unwrap();
        }
        let (first, last) = (GuestAddress(first), GuestAddress(last));
        let cuts = |it: Mapping| it.first < first || it.last > last;
        assert_eq!(iotlb.mappings(first..=last).any(cuts), is_cut, "{maps:?}");
        if !is_cut {
            let _ = iotlb.invalidate_mapping(first, (last.0 - first.0 + 1) as usize);
        }
        assert_eq!(iotlb.counters().entries, left, "{maps:?}");
    }
}

/// The flag is part of copies and of every version.
#[test]
fn unmerged_iotlb_stays_unmerged_after_changes() {
    let iotlb = SharedIotlb::unmerged();
    let map_two = || {
        for page in [0, PAGE] {
            let at = GuestAddress(page);
            iotlb.set_mapping(at, at, 0x1000, Read).unwrap();
        }
    };
    let mut kept = Vec::new();
    for _ in 0..4 {
        map_two();
        // The middle one, too.
        iotlb
            .set_mapping(GuestAddress(0), GuestAddress(0), 0x1000, Read)
            .unwrap();
        assert_eq!(iotlb.counters().entries, 2);
        assert_eq!(iotlb.snapshot().clone().entries(), 2);
        kept.push(iotlb.snapshot());
        let _ = iotlb.invalidate_all();
    }
    let mut copy = Iotlb::new();
    copy.clone_from(&kept[0]);
    copy.set_mapping(GuestAddress(2 * PAGE), GuestAddress(2 * PAGE), 1, Read)
        .unwrap();
    assert_eq!(copy.entries(), 3);
}
