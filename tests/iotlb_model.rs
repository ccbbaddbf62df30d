//! IOTLBs with thousands of mappings agree with a map of pages, after random operations at dense
//! and sparse addresses.
//!
//! The tests use an `Iotlb`, an `Iotlb` with a bound, and a `SharedIotlb` whose readers keep
//! snapshots.
#![cfg(feature = "iommu")]

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;

use fastrand::Rng;
use test_support::PAGE_U64 as PAGE;
use vm_memory::iommu::{IotlbSnapshot, IovaRange, SharedIotlb};
use vm_memory::{GuestAddress, Iotlb, Permissions};

/// The number of pages of the model.
const PAGES: u64 = 1 << 15;

/// Returns the I/O virtual address of a page of the model. Three quarters of the pages are
/// adjacent. The others are in clusters all over the address space, up to its last page.
fn iova(page: u64) -> u64 {
    let dense = PAGES / 4 * 3;
    if page < dense {
        0x10_0000 + page * PAGE
    } else {
        let (cluster, within) = ((page - dense) / 64, (page - dense) % 64);
        let clusters = PAGES / 4 / 64;
        u64::MAX - (clusters - 1 - cluster) * ((1 << 56) | 0x1234_5000) - (64 - within) * PAGE + 1
    }
}

/// Returns the number of adjacent pages that start at `page`, up to `most`.
fn run(page: u64, most: u64) -> u64 {
    (1..most)
        .find(|n| page + n >= PAGES || iova(page + n) != iova(page).wrapping_add(n * PAGE))
        .unwrap_or(most)
}

const PERMISSIONS: [Permissions; 4] = [
    Permissions::No,
    Permissions::Read,
    Permissions::Write,
    Permissions::ReadWrite,
];

type Model = BTreeMap<u64, (u64, Permissions)>;

/// Compares one random lookup, which may begin and end within a page, with the model.
fn compare(iotlb: &Iotlb, model: &Model, random: &mut Rng) {
    let first = random.u64(..PAGES);
    let (most, skip, access) = (
        1 + random.u64(..24),
        random.u64(..PAGE),
        PERMISSIONS[random.u64(..4) as usize],
    );
    let pages = run(first, most);
    let length = 1 + random.u64(..pages * PAGE - skip);
    let base = iova(first) + skip;
    let last_page = first + (skip + length - 1) / PAGE;
    let mapped =
        (first..=last_page).all(|page| model.get(&page).is_some_and(|(_, p)| p.allow(access)));
    match Iotlb::lookup(iotlb, GuestAddress(base), length as usize, access) {
        Ok(ranges) => {
            assert!(mapped, "found {length:#x} at {base:#x}");
            let mut at = base;
            for range in ranges {
                // Checks the first and the last byte of each page of the range.
                let last = at + (range.length as u64 - 1);
                let page_of = |addr: u64| first + (addr - iova(first)) / PAGE;
                for page in page_of(at)..=page_of(last) {
                    for addr in [at.max(iova(page)), last.min(iova(page) + (PAGE - 1))] {
                        let to = model[&page].0.wrapping_add(addr - iova(page));
                        assert_eq!(range.base.0.wrapping_add(addr - at), to, "{addr:#x}");
                    }
                }
                at = last.wrapping_add(1);
            }
            assert_eq!(at, base.wrapping_add(length));
        }
        Err(fails) => {
            assert!(!mapped, "missed {length:#x} at {base:#x}: {fails:?}");
            let (mut misses, mut refused) = (0, 0);
            for page in first..=last_page {
                let end = (iova(page) + (PAGE - 1)).min(base + (length - 1));
                let bytes = end - iova(page).max(base) + 1;
                match model.get(&page) {
                    None => misses += bytes,
                    Some((_, permissions)) if !permissions.allow(access) => refused += bytes,
                    Some(_) => {}
                }
            }
            let sum =
                |ranges: &[IovaRange]| ranges.iter().map(|range| range.length as u64).sum::<u64>();
            assert_eq!(
                (sum(&fails.misses), sum(&fails.access_fails)),
                (misses, refused)
            );
        }
    }
}

/// An IOTLB under test.
trait Subject {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions);
    fn invalidate(&mut self, iova: u64, length: u64);
    fn clear(&mut self);
    /// Checks the IOTLB against the current model, after each operation.
    fn check(&mut self, model: &Model, random: &mut Rng);
}

impl Subject for Iotlb {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions) {
        let (iova, to) = (GuestAddress(iova), GuestAddress(to));
        self.set_mapping(iova, to, length as usize, permissions)
            .unwrap();
    }

    fn invalidate(&mut self, iova: u64, length: u64) {
        self.invalidate_mapping(GuestAddress(iova), length as usize);
    }

    fn clear(&mut self) {
        self.invalidate_all();
    }

    fn check(&mut self, model: &Model, random: &mut Rng) {
        compare(self, model, random);
    }
}

/// An IOTLB with a bound: it has the last mapping, and its other mappings agree with the model.
struct Bounded {
    iotlb: Iotlb,
    bound: usize,
    last: Option<u64>,
}

impl Subject for Bounded {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions) {
        self.iotlb.map(iova, to, length, permissions);
        self.last = Some(iova);
    }

    fn invalidate(&mut self, iova: u64, length: u64) {
        self.iotlb.invalidate(iova, length);
        self.last = None;
    }

    fn clear(&mut self) {
        self.iotlb.clear();
        self.last = None;
    }

    fn check(&mut self, model: &Model, random: &mut Rng) {
        if random.u64(..10_000) == 0 {
            self.bound = 1 + random.u64(..3000) as usize;
            self.iotlb.set_bound(NonZeroUsize::new(self.bound));
        }
        assert!(self.iotlb.entries() <= self.bound);
        let page = random.u64(..PAGES);
        let at = [Some(iova(page)), self.last].into_iter().flatten();
        for at in at {
            let found = Iotlb::lookup(&self.iotlb, GuestAddress(at), 8, Permissions::No);
            let to = found.ok().and_then(|mut ranges| ranges.next());
            if let Some(to) = to.as_ref().map(|range| range.base.0) {
                let page = if at == iova(page) { page } else { page_at(at) };
                assert_eq!(model.get(&page).map(|(to, _)| *to), Some(to), "{at:#x}");
            }
            assert!(
                to.is_some() || self.last != Some(at),
                "{at:#x} was mapped last and is missing"
            );
        }
    }
}

/// Returns the page of an address.
fn page_at(at: u64) -> u64 {
    // The addresses of pages ascend.
    let (mut low, mut high) = (0, PAGES);
    while high - low > 1 {
        let middle = (low + high) / 2;
        if iova(middle) <= at {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// An IOTLB whose snapshots are kept, each with the model at the time of the snapshot.
#[derive(Default)]
struct Shared {
    iotlb: SharedIotlb,
    kept: Vec<(IotlbSnapshot, Model)>,
    /// The snapshots of requests in flight: the last `depth` ones.
    in_flight: VecDeque<IotlbSnapshot>,
    depth: usize,
}

impl Shared {
    fn readers(&self) -> usize {
        self.kept.len() + self.in_flight.len()
    }
}

impl Subject for Shared {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions) {
        let (iova, to) = (GuestAddress(iova), GuestAddress(to));
        self.iotlb
            .set_mapping(iova, to, length as usize, permissions)
            .unwrap();
    }

    fn invalidate(&mut self, iova: u64, length: u64) {
        let gone = self
            .iotlb
            .invalidate_mapping(GuestAddress(iova), length as usize);
        assert_eq!(gone.readers(), self.readers());
    }

    fn clear(&mut self) {
        assert_eq!(self.iotlb.invalidate_all().readers(), self.readers());
    }

    fn check(&mut self, model: &Model, random: &mut Rng) {
        // Do this rarely, because it copies the model.
        if random.u64(..2000) == 0 {
            let place = random.u64(..self.kept.len() as u64 + 1) as usize;
            self.kept
                .insert(place, (self.iotlb.snapshot(), model.clone()));
            if self.kept.len() > 6 {
                self.kept.truncate(random.u64(..6) as usize);
            }
        }
        if random.u64(..1000) == 0 {
            self.depth = random.u64(..12) as usize;
        }
        self.in_flight.push_back(self.iotlb.snapshot());
        while self.in_flight.len() > self.depth {
            self.in_flight.pop_front();
        }
        compare(&self.iotlb.snapshot(), model, random);
        if let Some((snapshot, then)) = self.kept.get(random.u64(..8) as usize) {
            compare(snapshot, then, random);
        }
    }
}

#[test]
fn iotlb_after_random_operations_agrees_with_model() {
    operate(&mut Iotlb::new(), operations());
}

#[test]
fn iotlb_with_bound_agrees_with_model_and_has_last_mapping() {
    let mut iotlb = Iotlb::new();
    iotlb.set_bound(NonZeroUsize::new(500));
    let mut bounded = Bounded {
        iotlb,
        bound: 500,
        last: None,
    };
    operate(&mut bounded, operations() / 10 + 1);
    assert!(
        bounded.iotlb.evictions() > 100,
        "{}",
        bounded.iotlb.evictions()
    );
}

#[test]
fn snapshots_of_shared_iotlb_agree_with_model_of_their_time() {
    operate(&mut Shared::default(), operations() / 10 + 2);
}

/// Returns the number of operations. CI sets `VM_MEMORY_IOTLB_OPERATIONS=10000000` for a long run.
fn operations() -> u64 {
    std::env::var("VM_MEMORY_IOTLB_OPERATIONS").map_or(100_000, |n| n.parse().unwrap())
}

/// Performs random operations, seeded by their number, and checks after each one.
fn operate(iotlb: &mut impl Subject, operations: u64) {
    let mut random = Rng::with_seed(operations);
    let mut model = Model::new();
    let mut most = 0;
    for number in 0..operations {
        let page = random.u64(..PAGES);
        match random.u64(..100) {
            0..=59 => {
                let pages = run(page, 1 + random.u64(..4));
                // Some mappings continue their neighbours, and become one mapping with them.
                let to = match random.u64(..3) {
                    0 => page * PAGE,
                    _ => random.u64(..PAGES) * PAGE,
                };
                let permissions = PERMISSIONS[random.u64(..4) as usize];
                iotlb.map(iova(page), to, pages * PAGE, permissions);
                model.extend((0..pages).map(|n| (page + n, (to + n * PAGE, permissions))));
            }
            60..=69 => {
                let pages = run(page, 1 + random.u64(..8));
                iotlb.invalidate(iova(page), pages * PAGE);
                // `retain` would visit all pages.
                for other in page..page + pages {
                    model.remove(&other);
                }
            }
            70 if number % 64 == 0 => {
                // A large range, with holes between clusters.
                let end = (page + random.u64(..PAGES / 2)).min(PAGES - 1);
                let length = iova(end) - iova(page);
                iotlb.invalidate(iova(page), length);
                model.retain(|other, _| *other < page || *other >= end);
            }
            71 if number % 65_536 == 0 => {
                iotlb.clear();
                model.clear();
            }
            _ => {}
        }
        most = most.max(model.len());
        iotlb.check(&model, &mut random);
    }
    assert!(most > 500, "only {most} pages were ever mapped");
    println!("{operations} operations, at most {most} pages mapped");
}
