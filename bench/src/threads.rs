//! Lookups in an IOTLB by one thread and by two, with and without another thread that changes it.
//! As a control, lookups by two threads with separate IOTLBs.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, Result};
use ours::iommu::SharedIotlb;

use crate::contest::{median, timed, Effort};
use crate::report::{digits, Build};
use crate::shapes::{Mappings, PAGE};

/// The number of mappings in the IOTLB.
const COUNT: u64 = 10_000;
/// The number of lookups of a thread in a round.
const LOOKUPS: u64 = 200_000;
/// The pause between changes: a guest maps a page for each of 20 000 requests per second.
const REST: Duration = Duration::from_micros(50);

/// An IOTLB that threads share.
trait Shared: Sync {
    fn lookup(&self, iova: u64) -> bool;
    fn remap(&self, iova: u64, to: u64) -> bool;
}

/// An IOTLB of 0.18.0 in a lock, as in back ends that use it.
impl Shared for std::sync::RwLock<reference::Iotlb> {
    fn lookup(&self, iova: u64) -> bool {
        let Ok(guard) = self.read() else { return false };
        let found = reference::Iotlb::lookup(
            guard,
            reference::GuestAddress(iova),
            8,
            reference::Permissions::Read,
        );
        found.is_ok_and(|segments| black_box(segments.count()) == 1)
    }

    fn remap(&self, iova: u64, to: u64) -> bool {
        let Ok(mut guard) = self.write() else {
            return false;
        };
        let (iova, to) = (reference::GuestAddress(iova), reference::GuestAddress(to));
        guard.invalidate_mapping(iova, PAGE);
        guard
            .set_mapping(iova, to, PAGE, reference::Permissions::ReadWrite)
            .is_ok()
    }
}

impl Shared for SharedIotlb {
    fn lookup(&self, iova: u64) -> bool {
        let found = self.lookup(ours::GuestAddress(iova), 8, ours::Permissions::Read);
        found.is_ok_and(|segments| black_box(segments.count()) == 1)
    }

    fn remap(&self, iova: u64, to: u64) -> bool {
        let (iova, to) = (ours::GuestAddress(iova), ours::GuestAddress(to));
        black_box(self.invalidate_mapping(iova, PAGE));
        self.set_mapping(iova, to, PAGE, ours::Permissions::ReadWrite)
            .is_ok()
    }
}

fn reference_iotlb(mappings: Mappings) -> Result<std::sync::RwLock<reference::Iotlb>> {
    let mut iotlb = reference::Iotlb::new();
    for (iova, to) in mappings.pages() {
        let (iova, to) = (reference::GuestAddress(iova), reference::GuestAddress(to));
        iotlb.set_mapping(iova, to, PAGE, reference::Permissions::ReadWrite)?;
    }
    Ok(std::sync::RwLock::new(iotlb))
}

fn shared_iotlb(mappings: Mappings) -> Result<SharedIotlb> {
    let iotlb = SharedIotlb::new();
    for (iova, to) in mappings.pages() {
        let (iova, to) = (ours::GuestAddress(iova), ours::GuestAddress(to));
        iotlb.set_mapping(iova, to, PAGE, ours::Permissions::ReadWrite)?;
    }
    Ok(iotlb)
}

/// Returns the nanoseconds per lookup of the slower thread. Each thread uses the IOTLB with its
/// number. A third thread may change the first IOTLB.
fn round(iotlbs: &[&dyn Shared], changes: bool) -> Result<f64> {
    let mappings = Mappings::fragmented(COUNT);
    let (start, stop) = (Barrier::new(iotlbs.len()), AtomicBool::new(false));
    let took: Result<Vec<Duration>> = thread::scope(|scope| {
        if let Some(first) = iotlbs.first().filter(|_| changes) {
            let stop = &stop;
            scope.spawn(move || {
                let pages: Vec<_> = mappings.pages().collect();
                for (iova, to) in pages.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    black_box(first.remap(*iova, *to));
                    thread::sleep(REST);
                }
            });
        }
        let readers: Vec<_> = iotlbs
            .iter()
            .map(|iotlb| {
                let start = &start;
                scope.spawn(move || {
                    let addresses = mappings.addresses(8);
                    start.wait();
                    timed(LOOKUPS, |number| {
                        // A lookup during a change may find the page unmapped.
                        black_box(iotlb.lookup(black_box(addresses.at(number))));
                    })
                })
            })
            .collect();
        let took = readers
            .into_iter()
            .map(|reader| reader.join().map_err(|_| anyhow!("a thread panicked")))
            .collect();
        stop.store(true, Ordering::Relaxed);
        took
    });
    let longest = took?.into_iter().max().unwrap_or_default();
    Ok(longest.as_secs_f64() * 1e9 / LOOKUPS as f64)
}

/// Measures the lookups and prints the table.
pub fn run(effort: Effort, build: Build) -> Result<()> {
    println!(
        "Build `{}`, lookups of 8 B in an IOTLB of {COUNT} fragmented pages, ns of\n\
         processor time, medians of {} rounds.\n",
        build.name(),
        effort.rounds
    );
    let mappings = Mappings::fragmented(COUNT);
    let (locked, other_locked) = (reference_iotlb(mappings)?, reference_iotlb(mappings)?);
    let (shared, other_shared) = (shared_iotlb(mappings)?, shared_iotlb(mappings)?);
    let cases: [(&str, usize, bool, bool); 5] = [
        ("one thread", 1, true, false),
        ("one thread, and another changes it", 1, true, true),
        (
            "two threads, each with its own (the control)",
            2,
            false,
            false,
        ),
        ("two threads", 2, true, false),
        ("two threads, and a third changes it", 2, true, true),
    ];
    println!("| lookups by | 0.18.0 in an RwLock | SharedIotlb |\n|---|---|---|");
    for (name, threads, same, changes) in cases {
        let of = |first: &dyn Shared, second: &dyn Shared| -> Result<f64> {
            let iotlbs = [first, if same { first } else { second }];
            let rounds: Result<Vec<f64>> = (0..effort.rounds)
                .map(|_| round(iotlbs.get(..threads).unwrap_or_default(), changes))
                .collect();
            median(rounds?).ok_or_else(|| anyhow!("no rounds"))
        };
        println!(
            "| {name} | {} | {} |",
            digits(of(&locked, &other_locked)?),
            digits(of(&shared, &other_shared)?)
        );
    }
    Ok(())
}
