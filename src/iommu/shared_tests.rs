//! [`SharedIotlb`] against an [`Iotlb`], and its readers.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::GuestMemory;
use crate::GuestMemoryMmap;
use Permissions::*;

const PAGE: u64 = 0x1000;

fn found(iotlb: &SharedIotlb, page: u64, pages: usize) -> Option<Vec<MappedRange>> {
    let found = iotlb.lookup(GuestAddress(page * PAGE), pages * 0x1000, Read);
    found.ok().map(|found| found.collect())
}

proptest! {
    /// Whatever readers keep, changes do the same as on an IOTLB, and every snapshot stays as it was.
    #[test]
    fn changes_do_what_they_do_on_an_iotlb(
        steps in prop::collection::vec((0u8..10, 0u64..40, 0u64..40, 1usize..5, 0usize..6), 0..120),
    ) {
        let shared = SharedIotlb::new();
        let mut plain = Iotlb::new();
        let mut kept: Vec<(IotlbSnapshot, Iotlb)> = Vec::new();
        for (what, page, to, pages, place) in steps {
            let (iova, length) = (GuestAddress(page * PAGE), pages * 0x1000);
            match what {
                0..=4 => {
                    shared.set_mapping(iova, GuestAddress(to * PAGE), length, ReadWrite).unwrap();
                    plain.set_mapping(iova, GuestAddress(to * PAGE), length, ReadWrite).unwrap();
                }
                5 | 6 => {
                    let gone = shared.invalidate_mapping(iova, length);
                    plain.invalidate_mapping(iova, length);
                    prop_assert_eq!(gone.readers(), kept.len());
                }
                7 => {
                    let bound = NonZeroUsize::new(pages * 4);
                    shared.set_bound(bound);
                    plain.set_bound(bound);
                }
                8 => kept.insert(place.min(kept.len()), (shared.snapshot(), plain.clone())),
                _ if place == 0 => {
                    shared.invalidate_all().readers();
                    plain.invalidate_all();
                }
                _ => kept.truncate(place),
            }
            // One that is refused changes nothing, and breaks nothing.
            prop_assert!(shared.set_mapping(GuestAddress(u64::MAX), iova, 2, Read).is_err());
            let same = |one: &Iotlb, other: &Iotlb| (0..45u64).all(|page| {
                let at = GuestAddress(page * PAGE);
                let look = |iotlb| Iotlb::lookup(iotlb, at, 0x1000, Read).ok().map(|found| found.collect::<Vec<_>>());
                look(one) == look(other)
            });
            prop_assert!(same(&shared.snapshot(), &plain));
            prop_assert_eq!(shared.counters().entries, plain.entries());
            for (snapshot, then) in &kept {
                prop_assert!(same(snapshot, then), "a snapshot has changed");
            }
        }
    }
}

#[test]
fn an_invalidation_is_done_when_what_was_made_before_is_gone() {
    let iotlb = SharedIotlb::new();
    iotlb
        .set_mapping(GuestAddress(0), GuestAddress(0x7000), 0x1000, ReadWrite)
        .unwrap();
    let before = iotlb.lookup(GuestAddress(0), 8, Read).unwrap();
    let gone = iotlb.invalidate_mapping(GuestAddress(0), 0x1000);
    let after = iotlb.snapshot();
    assert_eq!((gone.readers(), found(&iotlb, 0, 1)), (1, None));
    let soon = Instant::now() + Duration::from_millis(10);
    assert_eq!(gone.wait(soon), Err(StillRead { readers: 1 }));
    // Many changes later, it is known still.
    for page in 0..2000 {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        assert_eq!(gone.readers(), 1);
    }
    let later = iotlb.invalidate_all();
    assert_eq!(later.readers(), 2);
    assert_eq!(
        before.collect::<Vec<_>>(),
        [MappedRange {
            base: GuestAddress(0x7000),
            length: 8
        }]
    );
    gone.wait(Instant::now()).unwrap();
    assert_eq!((gone.is_done(), later.readers()), (true, 1));
    drop(after);
    assert!(later.is_done());
}

/// Without a second one in the hand, nothing is copied: there are never more than two.
#[test]
fn two_snapshots_are_exchanged() {
    let iotlb = SharedIotlb::new();
    let mut places = std::collections::BTreeSet::new();
    for page in 0..500u64 {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        places.insert(std::ptr::from_ref::<Iotlb>(&iotlb.snapshot()).addr());
    }
    assert_eq!(places.len(), 2);
}

#[test]
fn lookups_are_counted_over_all_snapshots_and_evictions_once() {
    let iotlb = SharedIotlb::new();
    iotlb.count_lookups();
    iotlb.set_bound(NonZeroUsize::new(2));
    for page in 0..5 {
        iotlb
            .set_mapping(GuestAddress(page * 2 * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
        assert!(found(&iotlb, page * 2, 1).is_some());
    }
    assert!(found(&iotlb, 0, 1).is_none());
    let expected = IotlbCounters {
        hits: 5,
        misses: 1,
        evictions: 3,
        entries: 2,
    };
    assert_eq!(iotlb.counters(), expected);
    assert!(format!("{iotlb:?}").contains("evictions: 3"));

    // To be told once more changes nothing; snapshots count when they are told to, and translations do.
    iotlb.count_lookups();
    let snapshot = iotlb.snapshot();
    let at = GuestAddress(8 * PAGE);
    assert!(Iotlb::lookup(&*snapshot, at, 8, Read).is_ok());
    assert!(Iotlb::counted_lookup(&*snapshot, at, 8, Read).is_ok());
    assert!(Iotlb::counted_lookup(&*snapshot, at, 8, Write).is_err());
    assert!(Iotlb::counted_lookup(snapshot, at, 0, Write).is_ok());
    assert!(iotlb.translate(at, 8, Read).is_ok());
    assert!(iotlb.translate(at, 8, Write).is_err());
    assert!(iotlb.translate(GuestAddress(u64::MAX), 8, Read).is_err());
    assert_eq!((iotlb.counters().hits, iotlb.counters().misses), (8, 4));
}

#[test]
fn a_plain_iotlb_counts_when_it_is_told_to() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(1));
    for page in [0, 2] {
        iotlb
            .set_mapping(GuestAddress(page * PAGE), GuestAddress(0), 0x1000, Read)
            .unwrap();
    }
    let look = |iotlb: &Iotlb, page: u64| {
        Iotlb::counted_lookup(iotlb, GuestAddress(page * PAGE), 8, Read).is_ok()
    };
    assert!(look(&iotlb, 2));
    let before = IotlbCounters {
        evictions: 1,
        entries: 1,
        ..IotlbCounters::default()
    };
    assert_eq!(iotlb.counters(), before);
    iotlb.count_lookups();
    let copy = iotlb.clone();
    assert!(look(&iotlb, 2) && look(&copy, 2) && !look(&iotlb, 0));
    assert!(Iotlb::lookup(&iotlb, GuestAddress(2 * PAGE), 8, Read).is_ok());
    let after = IotlbCounters {
        hits: 2,
        misses: 1,
        ..before
    };
    assert_eq!((iotlb.counters(), copy.counters()), (after, after));
}

/// Asked for again and again, a range of more mappings than the bound would have them push each other out for ever.
#[test]
fn b14_a_range_that_needs_more_than_the_bound_is_refused() {
    let iotlb = SharedIotlb::new();
    iotlb.set_bound(NonZeroUsize::new(3));
    let mut rounds = 0;
    let refused = loop {
        rounds += 1;
        assert!(rounds < 10, "still asking");
        match iotlb.lookup(GuestAddress(0), 5 * 0x1000, Read) {
            Ok(_) => unreachable!("five mappings in a table of three"),
            Err(fails) if !fails.access_fails.is_empty() => break fails,
            Err(fails) => {
                for missing in fails.misses {
                    for page in 0..missing.length as u64 / PAGE {
                        let iova = missing.base.0 + page * PAGE;
                        // Every other page, so that none is continued by the next.
                        iotlb
                            .set_mapping(GuestAddress(iova), GuestAddress(iova * 2), 0x1000, Read)
                            .unwrap();
                    }
                }
            }
        }
    };
    assert!(refused.misses.is_empty());
    // One that fits is a plain miss.
    let fails = iotlb
        .lookup(GuestAddress(0x10_0000), 0x1000, Read)
        .unwrap_err();
    assert!(fails.access_fails.is_empty() && fails.misses.len() == 1);
    // And so is the range once it has become two mappings.
    iotlb.invalidate_all().readers();
    let fails = iotlb.lookup(GuestAddress(0), 5 * 0x1000, Read).unwrap_err();
    assert!(fails.access_fails.is_empty());
}

/// What is one mapping where it is asked for is found, whatever a piece of it was before.
#[test]
fn b14_a_range_that_has_become_one_mapping_is_a_miss_and_then_found() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    let page = |number: u64| GuestAddress(number * PAGE);
    iotlb
        .set_mapping(page(1), page(0x50), 0x1000, Read)
        .unwrap();
    iotlb
        .set_mapping(page(9), page(0x70), 0x1000, Read)
        .unwrap();
    // Page 1 has to go.
    iotlb
        .set_mapping(page(0), page(0x10), 0x1000, Read)
        .unwrap();
    iotlb.invalidate_mapping(page(9), 0x1000);
    iotlb
        .set_mapping(page(2), page(0x12), 0x1000, Read)
        .unwrap();
    let fails = Iotlb::lookup(&iotlb, page(0), 0x3000, Read).unwrap_err();
    assert!(fails.access_fails.is_empty(), "{fails:?}");
    iotlb
        .set_mapping(page(1), page(0x11), 0x1000, Read)
        .unwrap();
    assert_eq!(iotlb.entries(), 1);
    assert!(Iotlb::lookup(&iotlb, page(0), 0x3000, Read).is_ok());
}

/// Pages 0, 2 and 4 are more mappings than the bound, as long as pages 1 and 3 are missing.
#[test]
fn b14_what_is_missing_may_join_what_there_is() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(2));
    for page in [4, 0, 2] {
        let at = GuestAddress(page * PAGE);
        iotlb.set_mapping(at, at, 0x1000, Read).unwrap();
    }
    let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 5 * 0x1000, Read).unwrap_err();
    assert!(
        fails.access_fails.is_empty() && fails.misses.len() == 2,
        "{fails:?}"
    );
    for page in [1, 3, 4] {
        let at = GuestAddress(page * PAGE);
        iotlb.set_mapping(at, at, 0x1000, Read).unwrap();
    }
    assert!(Iotlb::lookup(&iotlb, GuestAddress(0), 5 * 0x1000, Read).is_ok());
}

#[test]
fn b14_a_range_that_the_bound_refuses_says_so() {
    let mut iotlb = Iotlb::new();
    let fill = |iotlb: &mut Iotlb| {
        for page in [0, 1] {
            iotlb
                .set_mapping(
                    GuestAddress(page * PAGE),
                    GuestAddress(0),
                    0x1000,
                    ReadWrite,
                )
                .unwrap();
        }
        Iotlb::lookup(&*iotlb, GuestAddress(0), 0x2000, Read).unwrap_err()
    };
    iotlb.set_bound(NonZeroUsize::new(1));
    let fails = fill(&mut iotlb);
    assert!(fails.is_refused_by_bound() && fails.misses.is_empty());
    assert_eq!(
        fails.into_error(GuestAddress(0), 0x2000, Read).to_string(),
        "cannot translate I/O address range 0x0-0x1fff: \
         the range needs more mappings than the bound of the IOTLB permits at a time"
    );
    // What had to go is forgotten by whatever may have changed it.
    type Change = fn(&mut Iotlb);
    let changes: [Change; 4] = [
        |iotlb| iotlb.set_bound(NonZeroUsize::new(1)),
        |iotlb| iotlb.invalidate_mapping(GuestAddress(0x10_0000), 0x1000),
        // Page 1 is another one now, and page 0 may be.
        |iotlb| {
            iotlb
                .set_mapping(GuestAddress(PAGE), GuestAddress(0x8000), 0x1000, ReadWrite)
                .unwrap();
        },
        |iotlb| {
            iotlb.invalidate_all();
            iotlb
                .set_mapping(GuestAddress(PAGE), GuestAddress(0), 0x1000, ReadWrite)
                .unwrap();
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        assert!(fill(&mut iotlb).is_refused_by_bound());
        change(&mut iotlb);
        let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 0x2000, Read).unwrap_err();
        assert!(
            !fails.is_refused_by_bound() && !fails.misses.is_empty(),
            "change {number}: {fails:?}"
        );
    }
    // A refusal for its permissions is none for the bound.
    iotlb
        .set_mapping(GuestAddress(0), GuestAddress(0), 0x1000, Read)
        .unwrap();
    let fails = Iotlb::lookup(&iotlb, GuestAddress(0), 0x1000, Write).unwrap_err();
    assert!(!fails.is_refused_by_bound() && fails.access_fails.len() == 1);
}

proptest! {
    /// Whoever asks for what is missing gets an answer: the range, if its mappings fit the bound, and else that they do not.
    #[test]
    fn b14_a_range_is_refused_exactly_if_it_takes_more_than_the_bound(
        (others, bound) in (prop::collection::vec((0u64..80, 0u64..80), 0..12), 1usize..7),
        offsets in prop::collection::vec(0u64..3, 1..16),
        (whole, first_alone, from_behind) in (any::<bool>(), any::<bool>(), any::<bool>()),
    ) {
        let mut iotlb = Iotlb::new();
        iotlb.set_bound(NonZeroUsize::new(bound));
        let base = 20;
        // What is there from before lies anywhere but in the range.
        for (page, to) in others {
            if !(base..base + 16).contains(&page) {
                iotlb.set_mapping(GuestAddress(page * PAGE), GuestAddress(to * PAGE), 0x1000, Read).unwrap();
            }
        }
        let pieces = 1 + offsets.windows(2).filter(|pair| pair[0] != pair[1]).count();
        let mut rounds = 0;
        let found = loop {
            rounds += 1;
            prop_assert!(rounds < 100, "still asking");
            let fails = match Iotlb::lookup(&iotlb, GuestAddress(base * PAGE), offsets.len() * 0x1000, Read) {
                Ok(found) => break Some(found.count()),
                Err(fails) => fails,
            };
            if !fails.access_fails.is_empty() {
                prop_assert!(fails.is_refused_by_bound());
                break None;
            }
            let mut missing: Vec<u64> = fails.misses.iter()
                .flat_map(|miss| (0..miss.length as u64 / PAGE).map(|page| miss.base.0 / PAGE + page - base))
                .collect();
            if from_behind {
                missing.reverse();
            }
            missing.truncate(if first_alone { 1 } else { usize::MAX });
            for page in missing {
                let offset = offsets[page as usize];
                let (mut start, mut end) = (page as usize, page as usize + 1);
                while whole && start > 0 && offsets[start - 1] == offset {
                    start -= 1;
                }
                while whole && offsets.get(end) == Some(&offset) {
                    end += 1;
                }
                let iova = (base + start as u64) * PAGE;
                let length = (end - start) * 0x1000;
                iotlb.set_mapping(GuestAddress(iova), GuestAddress(iova + (offset << 32)), length, Read).unwrap();
            }
        };
        prop_assert_eq!(found, (pieces <= bound).then_some(pieces));
    }
}

/// A page is mapped to one of two, and the other one is given another owner when nobody uses it: a reader never finds its bytes changed under it.
#[test]
fn b9_no_access_outlives_its_invalidation_and_none_waits() {
    let rounds = 400u64;
    let physical: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    let iotlb = SharedIotlb::new();
    let memory = IommuMemory::new(physical.clone(), iotlb.clone(), true, ());
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let iova = GuestAddress(0x10_0000);
    iotlb
        .set_mapping(iova, GuestAddress(0), 0x1000, ReadWrite)
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut slices) = memory.get_slices(iova, 8, Read) else {
                        continue;
                    };
                    let slice = slices.next().unwrap().unwrap();
                    let first: u64 = slice.read_obj(0).unwrap();
                    std::hint::spin_loop();
                    // The iterator is still there, and with it the page.
                    assert_eq!(slice.read_obj::<u64>(0).unwrap(), first);
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..rounds {
            // All of them read from the other page, or from none, before this one is written.
            let (now, next) = (round % 2 * PAGE, (round + 1) % 2 * PAGE);
            let gone = iotlb
                .set_mapping(iova, GuestAddress(next), 0x1000, ReadWrite)
                .unwrap();
            gone.wait(Instant::now() + Duration::from_secs(20)).unwrap();
            physical.write_obj(round, GuestAddress(now)).unwrap();
        }
        while read.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
}
