//! B14: loops of lookups and mappings of several ranges, whose mappings evict each other.

use proptest::prelude::*;

use super::*;

/// The reaction of an IOMMU to the failed lookups of several devices.
#[derive(Clone, Copy, Debug)]
enum Schedule {
    /// Maps the missing pages after each lookup.
    InTurn,
    /// Maps the missing pages of all ranges after a lookup of each.
    InBatches,
    /// Maps the missing pages after half of the other ranges have been looked up.
    Late,
}

/// Devices that look up ranges of pages with one mapping each, until each is found or refused.
struct Devices {
    iotlb: Iotlb,
    pages: u64,
    /// The ranges that have neither been found nor refused.
    open: Vec<u64>,
    found: usize,
}

impl Devices {
    fn new(bound: usize, ranges: u64, pages: u64) -> Self {
        let mut iotlb = Iotlb::new();
        iotlb.set_bound(NonZeroUsize::new(bound));
        Self {
            iotlb,
            pages,
            open: (0..ranges).collect(),
            found: 0,
        }
    }

    fn base(range: u64) -> GuestAddress {
        GuestAddress(range * 100 * PAGE)
    }

    /// Looks up a range. Returns the missing parts if its loop continues.
    fn lookup(&mut self, range: u64) -> Option<Vec<IovaRange>> {
        let length = (self.pages * PAGE) as usize;
        let outcome = Iotlb::lookup(&self.iotlb, Self::base(range), length, Read);
        match outcome.map(drop) {
            Ok(()) => self.found += 1,
            Err(fails) if fails.is_refused_by_bound() => {}
            Err(fails) => return Some(fails.misses),
        }
        self.open.retain(|open| *open != range);
        None
    }

    /// Maps all pages of the missing parts, one by one. No page continues another one.
    fn map(&mut self, missing: Vec<IovaRange>) {
        for part in missing {
            for page in 0..part.length as u64 / PAGE {
                let iova = GuestAddress(part.base.0 + page * PAGE);
                let to = GuestAddress(iova.0 * 3);
                self.iotlb.set_mapping(iova, to, 0x1000, Read).unwrap();
            }
        }
    }

    /// Runs all loops to their end, which takes `most` rounds at most. `between` runs after each.
    fn run(&mut self, schedule: Schedule, most: usize, between: impl Fn(&mut Iotlb)) {
        let mut rounds = 0;
        let mut asked = std::collections::VecDeque::new();
        while !self.open.is_empty() {
            rounds += 1;
            assert!(rounds <= most, "{} loops do not end", self.open.len());
            for range in self.open.clone() {
                asked.extend(self.lookup(range));
                let late = match schedule {
                    Schedule::InTurn => 0,
                    Schedule::InBatches => usize::MAX,
                    Schedule::Late => self.open.len() / 2,
                };
                while asked.len() > late {
                    let missing = asked.pop_front().unwrap();
                    self.map(missing);
                }
            }
            if let Schedule::InBatches = schedule {
                while let Some(missing) = asked.pop_front() {
                    self.map(missing);
                }
            }
            between(&mut self.iotlb);
        }
    }
}

#[test]
fn b14_lookups_of_more_ranges_than_fit_are_found() {
    for schedule in [Schedule::InTurn, Schedule::InBatches, Schedule::Late] {
        for (ranges, pages, bound) in [(2, 4, 6), (65, 3, 3), (65, 3, 100), (200, 2, 3)] {
            let mut devices = Devices::new(bound, ranges, pages);
            devices.run(schedule, 2 * ranges as usize + 20, |_| ());
            assert_eq!(devices.found, ranges as usize, "{schedule:?} {ranges}");
        }
    }
}

#[test]
fn b14_lookups_of_400_ranges_in_turn_are_found() {
    let mut devices = Devices::new(2, 400, 2);
    devices.run(Schedule::InTurn, 800, |_| ());
    assert_eq!(devices.found, 400);
}

#[test]
fn b14_lookups_of_ranges_that_never_fit_are_refused() {
    for schedule in [Schedule::InTurn, Schedule::InBatches, Schedule::Late] {
        let mut devices = Devices::new(3, 130, 4);
        devices.run(schedule, 300, |_| ());
        assert_eq!(devices.found, 0, "{schedule:?}");
    }
}

/// A guest that removes all mappings after each round.
#[test]
fn b14_lookups_whose_mappings_are_invalidated_each_round_are_refused() {
    for schedule in [Schedule::InBatches, Schedule::Late] {
        let mut devices = Devices::new(100, 65, 3);
        devices.run(schedule, 40 * 65, Iotlb::invalidate_all);
    }
}

/// Devices that gave up do not keep the priority.
#[test]
fn b14_lookups_after_others_gave_up_are_found() {
    let mut devices = Devices::new(6, 2, 4);
    for abandoned in 100..300 {
        let missing = devices.lookup(abandoned).unwrap();
        if abandoned % 2 == 0 {
            devices.map(missing);
        }
    }
    devices.run(Schedule::InTurn, 300, |_| ());
    assert_eq!(devices.found, 2);
}

proptest! {
    #[test]
    fn b14_competing_lookups_are_found_if_each_fits_bound(
        bound in 1usize..8,
        pages in prop::collection::vec(1u64..10, 1..8),
        steps in prop::collection::vec((any::<prop::sample::Index>(), 1usize..12), 4_000),
    ) {
        let mut devices = Devices::new(bound, pages.len() as u64, 0);
        for (which, limit) in steps {
            if devices.open.is_empty() {
                break;
            }
            let range = devices.open[which.index(devices.open.len())];
            devices.pages = pages[range as usize];
            let found = devices.found;
            match devices.lookup(range) {
                Some(missing) => devices.map(missing.into_iter().take(limit).collect()),
                None => prop_assert_eq!(
                    devices.found > found,
                    devices.pages <= bound as u64,
                    "{} pages", devices.pages
                ),
            }
        }
        prop_assert!(devices.open.is_empty());
    }
}
