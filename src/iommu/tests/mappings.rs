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

proptest! {
    /// The model is a list of mappings, each of which is compared with each range.
    #[test]
    fn map_range_and_unmap_of_random_ranges_agree_with_list(
        requests in prop::collection::vec((0u64..60, 0u64..6, 0usize..4, any::<bool>()), 0..100),
        at_top in any::<bool>(),
    ) {
        let base = if at_top { 0u64.wrapping_sub(64) } else { 0 };
        let (shared, mut plain) = (SharedIotlb::unmerged(), Iotlb::unmerged());
        let mut list: Vec<Mapping> = Vec::new();
        for (from, count, perm, maps) in requests {
            let first = GuestAddress(base + from);
            // Empty if `count` is 0, except at the start of the address space.
            let last = GuestAddress(base.wrapping_add(from + count).wrapping_sub(1));
            let (target, permissions) = (GuestAddress(from), [No, Read, Write, ReadWrite][perm]);
            let is_range = first <= last;
            let within = |it: &&Mapping| is_range && it.first <= last && first <= it.last;
            let expected = list.iter().find(within).copied();
            if maps {
                let results = [
                    shared.map_range(first..=last, target, permissions),
                    plain.map_range(first..=last, target, permissions),
                ];
                let expected = match expected {
                    _ if first > last => Err(MapError::Empty),
                    _ if last.0 - first.0 > u64::MAX - target.0 => {
                        Err(MapError::TargetPastTheEnd { target })
                    }
                    Some(mapping) => Err(MapError::Overlap { mapping }),
                    None => Ok(()),
                };
                prop_assert_eq!(results, [expected; 2]);
                if expected.is_ok() {
                    list.push(Mapping { first, last, target, permissions });
                    list.sort_by_key(|mapping| mapping.first);
                }
            } else {
                let contains = |it: &Mapping| first <= it.first && it.last <= last;
                let cut = list.iter().filter(within).find(|it| !contains(it)).copied();
                let cut = cut.map(|mapping| CutMapping { mapping });
                prop_assert_eq!(shared.unmap(first..=last).map(drop).err(), cut);
                prop_assert_eq!(plain.unmap(first..=last).err(), cut);
                if cut.is_none() {
                    list.retain(|it| !contains(it));
                }
            }
            prop_assert_eq!(shared.mappings(..).collect::<Vec<_>>(), list.clone());
            prop_assert_eq!(plain.mappings(..).collect::<Vec<_>>(), list.clone());
        }
    }
}

#[test]
fn map_range_of_all_addresses_succeeds_and_of_mapped_address_returns_its_mapping() {
    let iotlb = SharedIotlb::new();
    iotlb.map_range(.., GuestAddress(0), ReadWrite).unwrap();
    let version = iotlb.snapshot().version();
    let all = iotlb.mappings(..).next().unwrap();
    assert_eq!((all.first.0, all.last.0), (0, u64::MAX));
    for range in [0..=0, u64::MAX..=u64::MAX, 0..=u64::MAX] {
        let range = GuestAddress(*range.start())..=GuestAddress(*range.end());
        let error = iotlb.map_range(range, GuestAddress(0), Read).unwrap_err();
        assert_eq!(error, MapError::Overlap { mapping: all });
        let text = "the range has addresses of the mapping 0x0-0xffffffffffffffff; unmap that \
                    mapping first";
        assert_eq!(error.to_string(), text);
    }
    let target = GuestAddress(1);
    let error = iotlb.map_range(.., target, Read).unwrap_err();
    assert_eq!(error, MapError::TargetPastTheEnd { target });
    assert_eq!(
        iotlb.snapshot().version(),
        version,
        "a refused map is not a change"
    );
}

/// Each range is mapped by the thread whose request comes first, and by no other one.
#[test]
fn map_range_by_several_threads_maps_each_range_once() {
    const RANGES: u64 = 200;
    let iotlb = SharedIotlb::unmerged();
    let mapped: u64 = std::thread::scope(|scope| {
        let map_all = |thread: u64| {
            let map = |number: &u64| {
                // Overlaps the ranges before and after it.
                let first = GuestAddress(number * 10);
                let range = first..=GuestAddress(first.0 + 9 + thread % 2);
                iotlb
                    .map_range(range, GuestAddress(thread << 32), Read)
                    .is_ok()
            };
            (0..RANGES).filter(map).count() as u64
        };
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || map_all(n))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    let mappings: Vec<_> = iotlb.mappings(..).collect();
    assert_eq!(mappings.len() as u64, mapped);
    for pair in mappings.windows(2) {
        assert!(pair[0].last < pair[1].first);
    }
    // Each mapping is whole: no other one has replaced a part of it.
    let whole = |it: &Mapping| it.last.0 - it.first.0 == 9 + (it.target.0 >> 32) % 2;
    assert!(mappings.iter().all(whole));
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

/// The cases of the virtio specification, section "UNMAP request", and ends of the address space.
#[test]
fn unmap_that_cuts_a_mapping_returns_it_and_removes_nothing() {
    type Range = (u64, u64);
    const TOP: u64 = u64::MAX;
    /// The mappings, the range, the mapping that it cuts, and the number that are left.
    type Case = (&'static [Range], Range, Option<Range>, usize);
    let cases: [Case; 14] = [
        (&[], (0, 4), None, 0),
        (&[(0, 9)], (0, 9), None, 0),
        (&[(0, 4), (5, 9)], (0, 9), None, 0),
        (&[(0, 9)], (0, 4), Some((0, 9)), 1),
        (&[(0, 4), (5, 9)], (0, 4), None, 1),
        (&[(0, 4)], (0, 9), None, 0),
        (&[(0, 4), (10, 14)], (0, 14), None, 0),
        (&[(0, 9)], (5, 9), Some((0, 9)), 1),
        (&[(0, 9)], (4, 5), Some((0, 9)), 1),
        (&[(0, 1), (4, 9)], (0, 7), Some((4, 9)), 2),
        (&[(0, 4), (TOP - 4, TOP)], (0, TOP), None, 0),
        (&[(0, 4), (TOP - 4, TOP)], (5, TOP), None, 1),
        (&[(TOP - 4, TOP)], (TOP, TOP), Some((TOP - 4, TOP)), 1),
        // A hostile guest exchanges the ends.
        (&[(0, 4), (TOP - 4, TOP)], (TOP, 0), None, 2),
    ];
    for (maps, (first, last), cut, left) in cases {
        let (shared, mut plain) = (SharedIotlb::unmerged(), Iotlb::unmerged());
        for (first, last) in maps {
            let at = GuestAddress(*first);
            let length = (last - first + 1) as usize;
            shared.set_mapping(at, at, length, ReadWrite).unwrap();
            plain.set_mapping(at, at, length, ReadWrite).unwrap();
        }
        let range = GuestAddress(first)..=GuestAddress(last);
        let kept = shared.snapshot();
        for result in [shared.unmap(range.clone()).map(drop), plain.unmap(range)] {
            let found = result.err().map(|error| error.mapping);
            let found = found.map(|mapping| (mapping.first.0, mapping.last.0));
            assert_eq!(found, cut, "{maps:?} {first:#x}-{last:#x}");
        }
        assert_eq!(shared.counters().entries, left, "{maps:?}");
        assert_eq!(plain.entries(), left, "{maps:?}");
        // An unmap that was refused is not a change.
        assert_eq!(kept.version() == shared.snapshot().version(), cut.is_some());
        // The other table catches up.
        for _ in 0..2 {
            let _ = shared.invalidate_range(GuestAddress(1)..GuestAddress(1));
            assert_eq!(shared.counters().entries, left, "{maps:?}");
        }
    }
}

#[test]
fn invalidate_range_removes_the_addresses_of_the_range_only() {
    const TOP: u64 = u64::MAX;
    // The first and the last address that are invalidated, and the mappings that are left.
    type Case = ((u64, u64), &'static [(u64, u64)]);
    let cases: [Case; 5] = [
        ((0, TOP), &[]),
        ((0, 4), &[(5, 9), (TOP - 9, TOP)]),
        ((1, TOP - 1), &[(0, 0), (TOP, TOP)]),
        ((4, 5), &[(0, 3), (6, 9), (TOP - 9, TOP)]),
        ((TOP, 0), &[(0, 9), (TOP - 9, TOP)]),
    ];
    for ((first, last), left) in cases {
        let (shared, mut plain) = (SharedIotlb::new(), Iotlb::new());
        for first in [0, TOP - 9] {
            let at = GuestAddress(first);
            shared.set_mapping(at, at, 10, ReadWrite).unwrap();
            plain.set_mapping(at, at, 10, ReadWrite).unwrap();
        }
        let range = GuestAddress(first)..=GuestAddress(last);
        plain.invalidate_range(range.clone());
        assert!(shared.invalidate_range(range).is_done());
        let ends = |mapping: Mapping| (mapping.first.0, mapping.last.0);
        assert_eq!(plain.mappings(..).map(ends).collect::<Vec<_>>(), left);
        assert_eq!(shared.mappings(..).map(ends).collect::<Vec<_>>(), left);
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
