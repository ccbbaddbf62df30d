//! Evictions, and the cost of iterators and of evictions.

use super::*;
use proptest::prelude::*;
use Permissions::*;

/// The number of addresses of the model, at each end of the address space.
const WINDOW: u64 = 40;

fn addr() -> impl Strategy<Value = u64> {
    prop_oneof![0..WINDOW, (u64::MAX - WINDOW + 1)..=u64::MAX]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0usize..20, 1 => Just(usize::MAX), 1 => (usize::MAX - 20)..usize::MAX]
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::select(vec![No, Read, Write, ReadWrite])
}

#[derive(Clone, Debug)]
enum Step {
    Map {
        iova: u64,
        to: u64,
        length: usize,
        permissions: Permissions,
    },
    Invalidate {
        iova: u64,
        length: usize,
    },
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (addr(), addr(), 0usize..20, permissions())
            .prop_map(|(iova, to, length, permissions)| Step::Map { iova, to, length, permissions }),
        4 => (addr(), length()).prop_map(|(iova, length)| Step::Invalidate { iova, length }),
        1 => Just(Step::Clear),
    ]
}

fn check_evictions(bound: usize, first: Vec<Step>, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (mut bounded, mut unbounded) = (Iotlb::new(), Iotlb::new());
    for (number, step) in first.iter().chain(&steps).enumerate() {
        if number == first.len() {
            bounded.set_bound(NonZeroUsize::new(bound));
        }
        for iotlb in [&mut bounded, &mut unbounded] {
            match *step {
                Step::Map {
                    iova,
                    to,
                    length,
                    permissions,
                } => {
                    let _ = iotlb.set_mapping(
                        GuestAddress(iova),
                        GuestAddress(to),
                        length,
                        permissions,
                    );
                }
                Step::Invalidate { iova, length } => {
                    iotlb.invalidate_mapping(GuestAddress(iova), length)
                }
                Step::Clear => iotlb.invalidate_all(),
            }
        }
        // Mappings never overlap, and adjacent mappings do not continue each other.
        let mappings = &unbounded.mappings;
        for (a, b) in mappings.iter().zip(mappings.iter().skip(1)) {
            prop_assert!(a.last < b.start);
            prop_assert!(a.last + 1 != b.start || !a.continues(b));
        }
        for mapping in mappings.iter() {
            let target = mapping.start.wrapping_add(mapping.offset);
            prop_assert!(target.checked_add(mapping.last - mapping.start).is_some());
        }
        if bounded.bound().is_none() {
            continue;
        }
        prop_assert!(bounded.mappings.len() <= bound);
        if let Some(evicted) = bounded.evicted {
            let oldest = bounded.mappings.iter().map(|m| (m.age(), m.start)).min();
            prop_assert!(oldest.is_none_or(|oldest| (evicted.age(), evicted.start) < oldest));
        }
        for base in (0..WINDOW).chain(u64::MAX - WINDOW + 1..=u64::MAX) {
            let found = |iotlb| {
                Iotlb::lookup(iotlb, GuestAddress(base), 1, No)
                    .ok()
                    .and_then(|mut i| i.next())
            };
            if let Some(here) = found(&bounded) {
                prop_assert_eq!(Some(here), found(&unbounded));
            }
        }
        if let Step::Map {
            iova, to, length, ..
        } = *step
        {
            let refused = last_of(iova, length).is_none() || last_of(to, length).is_none();
            prop_assert!(
                refused || Iotlb::lookup(&bounded, GuestAddress(iova), length, No).is_ok()
            );
        }
    }
    bounded.set_bound(None);
    prop_assert!(bounded.bound().is_none());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

    #[test]
    fn b14_set_bound_evicts_oldest_and_keeps_newest(
        bound in 1usize..6,
        first in prop::collection::vec(step(), 0..8),
        steps in prop::collection::vec(step(), 0..24),
    ) {
        check_evictions(bound, first, steps)?;
    }
}

#[test]
fn iterator_over_many_mappings_makes_one_search() {
    use crate::iommu::mapping_table::SEARCHES;
    let mut iotlb = Iotlb::new();
    for page in 0..1000u64 {
        iotlb
            .set_mapping(
                GuestAddress(page * 0x1000),
                GuestAddress(page * 0x3000),
                0x1000,
                ReadWrite,
            )
            .unwrap();
    }
    for first in [0, 120, 500, 984] {
        let before = SEARCHES.get();
        let found = Iotlb::lookup(&iotlb, GuestAddress(first * 0x1000), 0x1_0000, Read).unwrap();
        assert_eq!(found.count(), 16);
        assert_eq!(SEARCHES.get() - before, 1, "starting at page {first}");
    }
}

#[test]
fn iotlb_iterator_after_replacement_terminates() {
    use std::cell::Cell;
    let mut full = Iotlb::new();
    full.set_mapping(GuestAddress(0), GuestAddress(0x1000), 0x1000, Read)
        .unwrap();
    full.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Read)
        .unwrap();
    let empty = Iotlb::new();
    struct Switch<'a>(&'a Cell<bool>, &'a Iotlb, &'a Iotlb);
    impl Deref for Switch<'_> {
        type Target = Iotlb;
        fn deref(&self) -> &Iotlb {
            if self.0.get() {
                self.2
            } else {
                self.1
            }
        }
    }
    let switched = Cell::new(false);
    let mut ranges = Iotlb::lookup(
        Switch(&switched, &full, &empty),
        GuestAddress(0),
        0x2000,
        Read,
    )
    .unwrap();
    assert_eq!(ranges.next().map(|p| p.base), Some(GuestAddress(0x1000)));
    switched.set(true);
    assert_eq!(ranges.next(), None);
    switched.set(false);
    assert_eq!(ranges.next(), None);
}

/// Returns the number of ages that `act` reads.
fn ages_read(act: impl FnOnce()) -> usize {
    use crate::iommu::mapping_table::AGES_READ;
    let before = AGES_READ.get();
    act();
    AGES_READ.get() - before
}

/// Maps a page to a place that its neighbours do not continue.
pub(super) fn map_page(iotlb: &mut Iotlb, page: u64) {
    let (at, to) = (GuestAddress(page * 0x1000), GuestAddress(page * 0x3000));
    iotlb.set_mapping(at, to, 0x1000, Read).unwrap();
}

/// The order of the pages is that of their numbers, or spread by an odd factor.
#[test]
fn b14_eviction_reads_as_many_ages_with_many_mappings_as_with_few() {
    const MAPPED: u64 = 1_000;
    let many = if cfg!(miri) { 2_000 } else { 100_000 };
    let mut reads = Vec::new();
    for (factor, waiting) in [
        (1, false),
        (1, true),
        (0x9e37_79b9, false),
        (0x9e37_79b9, true),
    ] {
        for bound in [1_000u64, many] {
            let page = |number: u64| number * factor % (1 << 20);
            let mut iotlb = Iotlb::new();
            iotlb.set_bound(NonZeroUsize::new(bound as usize));
            (0..bound).for_each(|number| map_page(&mut iotlb, page(number)));
            assert_eq!((iotlb.entries() as u64, iotlb.evictions()), (bound, 0));
            if waiting {
                // Half of the pages, of which some are mapped.
                let found = Iotlb::lookup(&iotlb, GuestAddress(0x20_0000), 1 << 31, Read);
                assert!(found.is_err());
            }
            reads.push(ages_read(|| {
                (bound..bound + MAPPED).for_each(|number| map_page(&mut iotlb, page(number)));
            }));
            assert_eq!(iotlb.evictions(), MAPPED);
        }
    }
    for pair in reads.chunks(2) {
        // For each eviction: the mappings of three leaves, and a few ages of leaves.
        let most = (MAPPED as usize * 600).max(pair[0] * 3 / 2);
        assert!(
            pair[1] < most,
            "reads for few and for many mappings: {reads:?}"
        );
    }
}

#[test]
fn b14_set_bound_below_mappings_reads_each_age_twice() {
    let pages = if cfg!(miri) { 1_000 } else { 50_000 };
    for kept in [1, 100, 900] {
        let mut iotlb = Iotlb::new();
        (0..pages).for_each(|page| map_page(&mut iotlb, page));
        let reads = ages_read(|| iotlb.set_bound(NonZeroUsize::new(kept)));
        assert!(reads <= 3 * pages as usize, "{reads} reads of {pages} ages");
        assert_eq!(iotlb.evictions(), pages - kept as u64);
        // The newest ones stay.
        let starts: Vec<_> = iotlb.mappings.iter().map(|it| it.start / 0x1000).collect();
        assert_eq!(starts, (pages - kept as u64..pages).collect::<Vec<_>>());
    }
}
