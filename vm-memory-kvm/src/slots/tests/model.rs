//! Random changes, writes and failures, and a slow model of the slots.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use vm_memory::{GuestAddress, Permissions};

use super::double::Double;
use super::{page_size, pages_of, slots_with, DirtyLog, KvmSlots, SlotError};

/// The number of pages of guest memory.
const PAGES: u64 = 200;

#[derive(Clone, Debug)]
enum Change {
    Add {
        first: u64,
        count: u64,
        host: u64,
        is_read_only: bool,
    },
    Remove {
        first: u64,
        count: u64,
    },
    Track(bool),
    Harvest,
}

#[derive(Clone, Debug)]
struct Step {
    /// The pages that the vCPU writes before the change.
    writes: Vec<u64>,
    /// The pages that the vCPU writes during the calls of the change.
    writes_in_calls: Vec<u64>,
    change: Change,
    /// The calls of the change that fail.
    failures: Option<(u32, u32)>,
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        // A few pages, at places that often touch.
        (0..PAGES / 8, 1..4u64).prop_map(|(first, count)| (first * 8, count * 8)),
        (0..PAGES, 1..PAGES),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (range(), 1..1000u64, prop::bool::weighted(0.1)).prop_map(|((first, count), host, ro)| {
            Change::Add {
                first,
                count,
                host,
                is_read_only: ro,
            }
        }),
        range().prop_map(|(first, count)| Change::Remove { first, count }),
        prop::bool::weighted(0.7).prop_map(Change::Track),
        Just(Change::Harvest),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0..PAGES, 0..6);
    let failures = prop::option::weighted(0.3, (0..6u32, 1..4u32));
    (pages(), pages(), change(), failures).prop_map(
        |(writes, writes_in_calls, change, failures)| Step {
            writes,
            writes_in_calls,
            change,
            failures,
        },
    )
}

/// The memory of the guest, page by page.
struct Model {
    slots: KvmSlots,
    double: Double,
    /// The host page of each page, and whether it is read-only.
    memory: BTreeMap<u64, (u64, bool)>,
    is_tracking: bool,
    /// The pages that the next harvest must return.
    dirty: BTreeSet<u64>,
    /// The pages of the last harvest. They are read after it, with all writes during it.
    harvested: BTreeSet<u64>,
    /// Whether slots have changed since the last harvest, so that it may return more pages.
    may_have_more: bool,
}

impl Model {
    fn new(log: DirtyLog, slot_pages: Option<u64>) -> Self {
        let (slots, double) = slots_with(log, slot_pages);
        Self {
            slots,
            double,
            memory: BTreeMap::new(),
            is_tracking: false,
            dirty: BTreeSet::new(),
            harvested: BTreeSet::new(),
            may_have_more: false,
        }
    }

    fn write(&mut self, page: u64) {
        let written = self.double.write(page).unwrap_or_else(|| {
            self.slots.drain_rings().unwrap();
            self.double.write(page).expect("the ring has room")
        });
        assert_eq!(
            written,
            self.memory
                .get(&page)
                .is_some_and(|(_, is_read_only)| !is_read_only)
        );
        if written && self.is_tracking {
            self.dirty.insert(page);
        }
    }

    fn run(&mut self, step: &Step) {
        for page in &step.writes {
            self.write(*page);
        }
        self.double.fail(step.failures);
        self.double.write_in_calls(&step.writes_in_calls);
        let was_tracking = self.is_tracking;
        self.harvested.clear();
        let result = self.make(&step.change);
        self.double.fail(None);
        let written = self.double.written_in_calls();
        match (&step.change, result) {
            (change, Ok(())) => self.succeed(change),
            (
                _,
                Err(SlotError::NotUndone {
                    lost, remaining, ..
                }),
            ) => {
                self.may_have_more = true;
                self.lose(&step.change, &lost, &remaining);
            }
            (_, Err(_)) => self.may_have_more = true,
        }
        self.may_have_more |= !written.is_empty();
        if was_tracking && self.is_tracking {
            let harvested = &self.harvested;
            self.dirty
                .extend(written.into_iter().filter(|page| !harvested.contains(page)));
        } else {
            // A write while tracking starts or stops may be in the log.
            self.may_have_more = true;
        }
        self.check();
    }

    fn make(&mut self, change: &Change) -> Result<(), SlotError> {
        match *change {
            Change::Add {
                first,
                count,
                host,
                is_read_only,
            } => {
                let access = [Permissions::ReadWrite, Permissions::Read][usize::from(is_read_only)];
                self.slots.add_pages_with(first, count, host, access)
            }
            Change::Remove { first, count } => self.slots.remove_pages(first, count),
            Change::Track(is_tracking) => self.slots.set_tracking(is_tracking),
            Change::Harvest => {
                let pages = pages_of(&self.slots.take_log()?);
                assert!(
                    pages.is_superset(&self.dirty),
                    "{pages:?} lacks some of {:?}",
                    self.dirty
                );
                let may_have_more = self.may_have_more || self.double.has_written_in_calls();
                assert!(
                    may_have_more || pages == self.dirty,
                    "{pages:?} {:?}",
                    self.dirty
                );
                self.dirty.clear();
                self.harvested = pages;
                self.may_have_more = false;
                Ok(())
            }
        }
    }

    fn succeed(&mut self, change: &Change) {
        match *change {
            Change::Add {
                first,
                count,
                host,
                is_read_only,
            } => {
                for page in 0..count {
                    let old = self
                        .memory
                        .insert(first + page, (host + page, is_read_only));
                    assert_eq!(old, None, "an overlap was accepted");
                }
                return;
            }
            Change::Remove { first, count } => {
                self.memory
                    .retain(|page, _| !(first..first + count).contains(page));
            }
            Change::Track(is_tracking) => self.is_tracking = is_tracking,
            Change::Harvest => return,
        }
        self.may_have_more = true;
    }

    /// Makes the model like the slots after a change that was not undone.
    fn lose(
        &mut self,
        change: &Change,
        lost: &[(GuestAddress, u64)],
        more: &[(GuestAddress, u64)],
    ) {
        let pages = |(start, len): &(GuestAddress, u64)| {
            let first = start.0 / page_size();
            first..first + len / page_size()
        };
        for page in lost.iter().flat_map(pages) {
            self.memory.remove(&page).expect("memory that was lost");
        }
        for page in more.iter().flat_map(pages) {
            let Change::Add {
                first,
                host,
                is_read_only,
                ..
            } = *change
            else {
                panic!("{change:?} adds no memory");
            };
            self.memory
                .insert(page, (host + page - first, is_read_only));
        }
        // Slots whose tracking is not as the others'.
        self.slots.set_tracking(self.is_tracking).unwrap();
    }

    /// Compares the slots with the model.
    fn check(&self) {
        let mut memory = BTreeMap::new();
        for (range, is_tracked) in self.double.slots() {
            assert_eq!(is_tracked, self.is_tracking);
            let (first, host) = (range.start / page_size(), range.host / page_size());
            for page in 0..range.len / page_size() {
                memory.insert(first + page, (host + page, range.is_read_only));
            }
        }
        assert_eq!(memory, self.memory);
        let listed: u64 = self.slots.slots().iter().map(|slot| slot.len).sum();
        assert_eq!(listed, memory.len() as u64 * page_size());
    }
}

fn run(log: DirtyLog, slot_pages: Option<u64>, steps: &[Step]) {
    let mut model = Model::new(log, slot_pages);
    for step in steps {
        model.run(step);
    }
    // All pages are returned once no call fails.
    model.make(&Change::Harvest).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_changes_with_bitmaps_lose_no_memory_and_no_page(
        steps in prop::collection::vec(step(), 1..40),
        slot_pages in prop::option::of(prop::sample::select(vec![16u64, 64])),
    ) {
        run(DirtyLog::Bitmap, slot_pages, &steps);
    }

    #[test]
    fn random_changes_with_logs_cleared_in_pieces_lose_no_page(
        steps in prop::collection::vec(step(), 1..40),
        max_pages in 0..130u32,
    ) {
        run(DirtyLog::Manual { max_pages }, None, &steps);
    }

    #[test]
    fn random_changes_with_rings_lose_no_memory_and_no_page(
        steps in prop::collection::vec(step(), 1..40),
        slot_pages in prop::option::of(prop::sample::select(vec![16u64, 64])),
    ) {
        run(DirtyLog::Ring { entries: 4 }, slot_pages, &steps);
    }
}
