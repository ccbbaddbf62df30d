//! B14: with a bound, each loop of lookups and mappings ends, however an IOMMU maps the missing
//! parts.

use std::cell::RefCell;

use proptest::prelude::*;

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::GuestMemory;

/// The way in which an IOMMU maps the missing parts of a range.
#[derive(Clone, Copy, Debug)]
struct Asks {
    /// Maps the whole run of a page, not only the page.
    whole: bool,
    /// Maps one page per round, not all missing ones.
    first_alone: bool,
    from_end: bool,
    /// Maps a page outside the range after each round.
    beside: bool,
}

/// Looks up a range, and maps its missing pages to those of `table`, until it is found or refused.
///
/// Returns the number of mappings that were found, and the number of rounds.
fn serve(
    lookup: impl Fn() -> Result<usize, IotlbFails>,
    mut map: impl FnMut(u64, u64, usize),
    (base, table): (u64, &[u64]),
    asks: Asks,
) -> (Option<usize>, u32) {
    for round in 1.. {
        let fails = match lookup() {
            Ok(found) => return (Some(found), round),
            Err(fails) => fails,
        };
        if !fails.access_fails.is_empty() {
            assert!(fails.is_refused_by_bound() && fails.misses.is_empty());
            return (None, round);
        }
        assert!(round < 1_000, "neither found nor refused: {fails:?}");
        let page_of = |iova: u64| (iova / PAGE - base) as usize;
        let mut missing: Vec<usize> = fails
            .misses
            .iter()
            .flat_map(|miss| page_of(miss.base.0)..page_of(miss.base.0 + miss.length as u64))
            .collect();
        if asks.from_end {
            missing.reverse();
        }
        missing.truncate(if asks.first_alone { 1 } else { usize::MAX });
        let continues = |page: usize| table.get(page + 1) == Some(&(table[page] + 1));
        for page in missing {
            let (mut start, mut end) = (page, page + 1);
            while asks.whole && start > 0 && continues(start - 1) {
                start -= 1;
            }
            while asks.whole && continues(end - 1) {
                end += 1;
            }
            map(base + start as u64, table[start], end - start);
        }
        if asks.beside {
            map(base + 1_000 + u64::from(round), 5_000 - u64::from(round), 1);
        }
    }
    unreachable!()
}

fn ways() -> impl Strategy<Value = Asks> {
    (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(whole, first_alone, from_end, beside)| Asks {
            whole,
            first_alone,
            from_end,
            beside,
        },
    )
}

/// Serves a range of pages from an `Iotlb` with a bound, after other mappings were made.
fn serve_bounded(
    bound: usize,
    before: &[(u64, u64)],
    range: (u64, &[u64]),
    asks: Asks,
) -> (Option<usize>, u32) {
    let iotlb = std::cell::RefCell::new(Iotlb::new());
    iotlb.borrow_mut().set_bound(NonZeroUsize::new(bound));
    let map = |page: u64, to: u64, pages: usize| {
        let (iova, to) = (GuestAddress(page * PAGE), GuestAddress(to * PAGE));
        iotlb
            .borrow_mut()
            .set_mapping(iova, to, pages * 0x1000, Read)
            .unwrap();
        assert!(iotlb.borrow().entries() <= bound);
    };
    before.iter().for_each(|&(page, to)| map(page, to, 1));
    let (base, table) = range;
    let lookup = || {
        let iova = GuestAddress(base * PAGE);
        Iotlb::lookup(iotlb.borrow(), iova, table.len() * 0x1000, Read).map(Iterator::count)
    };
    serve(lookup, map, range, asks)
}

/// Returns a table of pages with runs of these lengths, and the number of runs.
fn runs(lengths: &[u64]) -> (Vec<u64>, usize) {
    let runs = lengths.iter().zip(0u64..);
    let pages =
        runs.flat_map(|(length, run)| (0..*length).map(move |page| 1_000 + run * 100 + page));
    (pages.collect(), lengths.len())
}

const ALL_IN_TURN: Asks = Asks {
    whole: false,
    first_alone: false,
    from_end: false,
    beside: false,
};

#[test]
fn b14_lookup_that_had_parts_mapped_before_is_found_or_refused() {
    let table = [90, 70, 10, 11, 12, 13, 14];
    let (found, rounds) = serve_bounded(2, &[(4, 12), (6, 14)], (0, &table), ALL_IN_TURN);
    assert!(found.is_none() && rounds < 5, "{rounds}");

    let table = [1000, 1100, 1101, 1102, 1103, 1104];
    let before = [(0, 1000), (1, 1100), (4, 1103)];
    let (found, rounds) = serve_bounded(2, &before, (0, &table), ALL_IN_TURN);
    assert!(found == Some(2) && rounds < 5, "{found:?} after {rounds}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]
    #[test]
    fn b14_lookup_with_retries_fails_only_if_bound_is_too_low(
        (others, bound) in (prop::collection::vec((0u64..80, 3_000u64..3_100), 0..12), 1usize..7),
        lengths in prop::collection::vec(1u64..6, 1..8),
        cached in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        asks in ways(),
    ) {
        let (table, needed) = runs(&lengths);
        let base = 20;
        let outside = |page: &u64| !(base..base + table.len() as u64).contains(page);
        let mut before = others;
        before.retain(|(page, _)| outside(page));
        // Parts of the range, in any order.
        for index in cached {
            let page = index.index(table.len());
            before.push((base + page as u64, table[page]));
        }
        let (found, _) = serve_bounded(bound, &before, (base, &table), asks);
        prop_assert_eq!(found, (needed <= bound).then_some(needed));
    }
}

/// Serves a range from a shared IOTLB, whose two tables must evict the same mappings.
fn serve_shared(
    bound: usize,
    before: &[(u64, u64)],
    range: (u64, &[u64]),
    asks: Asks,
) -> (Option<usize>, u32) {
    let iotlb = SharedIotlb::new();
    iotlb.set_bound(NonZeroUsize::new(bound));
    let map = |page: u64, to: u64, pages: usize| {
        let (iova, to) = (GuestAddress(page * PAGE), GuestAddress(to * PAGE));
        iotlb.set_mapping(iova, to, pages * 0x1000, Read).unwrap();
    };
    before.iter().for_each(|&(page, to)| map(page, to, 1));
    let iova = GuestAddress(range.0 * PAGE);
    let lookup = || {
        iotlb
            .lookup(iova, range.1.len() * 0x1000, Read)
            .map(Iterator::count)
    };
    serve(lookup, map, range, asks)
}

proptest! {
    #[test]
    fn shared_iotlb_with_retries_agrees_with_iotlb(
        bound in 1usize..7,
        lengths in prop::collection::vec(1u64..6, 1..8),
        cached in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        asks in ways(),
    ) {
        let (table, _) = runs(&lengths);
        let cached = cached.iter().map(|index| index.index(table.len()));
        let before: Vec<(u64, u64)> = cached.map(|page| (page as u64, table[page])).collect();
        let outcome = serve_shared(bound, &before, (0, &table), asks);
        prop_assert_eq!(outcome, serve_bounded(bound, &before, (0, &table), asks));
    }
}

/// An IOMMU that maps the pages of a range that are missing, one by one, and translates again.
#[derive(Debug)]
struct Asking {
    iotlb: RwLock<Iotlb>,
    table: Vec<u64>,
    rounds: AtomicUsize,
}

impl Iommu for Asking {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        loop {
            assert!(
                self.rounds.fetch_add(1, Ordering::Relaxed) < 1_000,
                "endless"
            );
            match self.iotlb.translate(iova, length, access) {
                Err(Error::CannotResolve { reason, .. }) if reason.contains("is not mapped") => {}
                other => return other,
            }
            for page in iova.0 / PAGE..(iova.0 + length as u64).div_ceil(PAGE) {
                let at = GuestAddress(page * PAGE);
                let probe = Iotlb::lookup(&*self.iotlb.read().unwrap(), at, 0x1000, No).is_err();
                let to = GuestAddress(self.table[page as usize] * PAGE);
                if probe {
                    let mut iotlb = self.iotlb.write().unwrap();
                    iotlb.set_mapping(at, to, 0x1000, ReadWrite).unwrap();
                }
            }
        }
    }
}

#[test]
fn b14_iommu_memory_with_bound_serves_or_refuses_each_access() {
    let far: Vec<u64> = (0..200).map(|page| (page * 7) % 200).collect();
    let split = [1u64, 11, 12, 13, 14, 15];
    // The range of 200 pages has more pages than the number of failed lookups that are recorded.
    for (table, bound, before, served) in [
        (&split[..], 2, &[0, 1, 4][..], true),
        (&[9, 7, 1, 2, 3, 4, 5], 2, &[4, 6], false),
        (&far, 100, &[3, 50, 120], false),
        (&far, 200, &[3, 50, 120], true),
    ] {
        let iotlb = RwLock::new(Iotlb::new());
        iotlb.write().unwrap().set_bound(NonZeroUsize::new(bound));
        for &page in before {
            map(
                &iotlb,
                &[(page * PAGE, table[page as usize] * PAGE, 0x1000, ReadWrite)],
            );
        }
        let physical = Physical::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let iommu = Asking {
            iotlb,
            table: table.to_vec(),
            rounds: AtomicUsize::new(0),
        };
        let memory = IommuMemory::new(physical, iommu, true, bytewise(0x20_0000));
        let length = table.len() * 0x1000;
        assert_eq!(
            memory.check_range(GuestAddress(0), length, Write),
            served,
            "{bound}"
        );
        let (mut bytes, at) = (vec![1; length], GuestAddress(0));
        assert_eq!(memory.write_slice(&bytes, at).is_ok(), served);
        assert_eq!(memory.read_slice(&mut bytes, at).is_ok(), served);
        assert_eq!(memory.get_slices(at, length, Read).is_ok(), served);
        assert_eq!(memory.granted(at, length).is_some(), served);
    }
}

/// Looks up pages 0 to 3 until they are found or refused. `answer` runs between two lookups.
fn rounds(iotlb: &RefCell<Iotlb>, answer: impl Fn(&IotlbFails)) -> (bool, u32) {
    for round in 1..1_000 {
        let found = Iotlb::lookup(iotlb.borrow(), GuestAddress(0), 4 * 0x1000, Read).map(|_| ());
        match found {
            Ok(()) => return (true, round),
            Err(fails) if fails.is_refused_by_bound() => {
                let error = fails.into_error(GuestAddress(0), 4 * 0x1000, Read);
                assert!(
                    error.to_string().contains("lost its mappings in 32 tries"),
                    "{error}"
                );
                return (false, round);
            }
            Err(fails) => answer(&fails),
        }
    }
    panic!("endless");
}

fn bounded(bound: usize) -> RefCell<Iotlb> {
    let iotlb = RefCell::new(Iotlb::new());
    iotlb.borrow_mut().set_bound(NonZeroUsize::new(bound));
    iotlb
}

fn map_page(iotlb: &RefCell<Iotlb>, page: u64) {
    let at = GuestAddress(page * PAGE);
    let to = GuestAddress(page * 3 * PAGE);
    iotlb
        .borrow_mut()
        .set_mapping(at, to, 0x1000, Read)
        .unwrap();
}

#[test]
fn b14_lookup_that_loses_mappings_each_round_is_refused() {
    // The guest invalidates a page of the range each time.
    let iotlb = bounded(8);
    let (found, count) = rounds(&iotlb, |_| {
        (0..4).for_each(|page| map_page(&iotlb, page));
        iotlb
            .borrow_mut()
            .invalidate_mapping(GuestAddress(PAGE), 0x1000);
    });
    assert!(!found && count <= 34, "{count}");

    // The front end sends mappings without addresses.
    let iotlb = bounded(8);
    let (found, count) = rounds(&iotlb, |fails| {
        iotlb
            .borrow_mut()
            .set_mapping(fails.misses[0].base, GuestAddress(0), 0, Read)
            .unwrap();
    });
    assert!(!found && count <= 34, "{count}");

    // The front end clears the IOTLB.
    let iotlb = bounded(2);
    let (found, count) = rounds(&iotlb, |_| {
        (0..4).for_each(|page| map_page(&iotlb, page));
        iotlb.borrow_mut().invalidate_all();
    });
    assert!(!found && count <= 34, "{count}");
}

#[test]
fn b14_lookups_that_evict_each_other_end() {
    // Two devices in lockstep: four mappings each, and six fit.
    let iotlb = bounded(6);
    let other = || Iotlb::lookup(iotlb.borrow(), GuestAddress(10 * PAGE), 0x4000, Read).map(|_| ());
    let (_, count) = rounds(&iotlb, |_| {
        (0..4).for_each(|page| map_page(&iotlb, page));
        if other().is_err() {
            (10..14).for_each(|page| map_page(&iotlb, page));
        }
    });
    assert!(count <= 34);
    // The other one continues alone.
    let _ = other();
    (10..14).for_each(|page| map_page(&iotlb, page));
    other().unwrap();
}

/// Only mappings of the range count: a device that waits may look up as often as it likes.
#[test]
fn b14_lookup_without_answer_is_a_miss_forever() {
    let iotlb = bounded(2);
    for round in 0..1_000 {
        map_page(&iotlb, 100 + round);
        let fails = Iotlb::lookup(iotlb.borrow(), GuestAddress(0), 0x4000, Read).unwrap_err();
        assert!(fails.access_fails.is_empty() && fails.misses.len() == 1);
    }
}

/// A range that is found again starts over.
#[test]
fn b14_lookup_that_is_found_in_between_is_not_refused() {
    let iotlb = bounded(4);
    for _ in 0..1_000 {
        let (found, count) = rounds(&iotlb, |_| (0..4).for_each(|page| map_page(&iotlb, page)));
        assert!(found && count <= 2);
        (10..14).for_each(|page| map_page(&iotlb, page));
    }
}
