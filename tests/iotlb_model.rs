//! An `Iotlb` with thousands of mappings against a map of pages: many operations, any order, dense and sparse addresses. Beside it one with a bound, and a
//! `SharedIotlb` whose snapshots are kept now and then.
#![cfg(feature = "iommu")]

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;

use vm_memory::iommu::{IotlbSnapshot, IovaRange, SharedIotlb};
use vm_memory::{GuestAddress, Iotlb, Permissions};

/// Pages of the model.
const PAGES: u64 = 1 << 15;
const PAGE: u64 = 0x1000;

/// The I/O address of a page of the model: three quarters lie side by side, the others in clusters all over the address space, the very last
/// page among them.
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

/// How many pages from one on lie side by side.
fn run(page: u64, most: u64) -> u64 {
    (1..most)
        .find(|n| page + n >= PAGES || iova(page + n) != iova(page).wrapping_add(n * PAGE))
        .unwrap_or(most)
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((u128::from(self.0) * u128::from(end)) >> 64) as u64
    }
}

const PERMISSIONS: [Permissions; 4] = [
    Permissions::No,
    Permissions::Read,
    Permissions::Write,
    Permissions::ReadWrite,
];

type Model = BTreeMap<u64, (u64, Permissions)>;

/// One lookup that may begin and end within a page.
fn compare(iotlb: &Iotlb, model: &Model, random: &mut Random) {
    let first = random.below(PAGES);
    let (most, skip, access) = (
        1 + random.below(24),
        random.below(PAGE),
        PERMISSIONS[random.below(4) as usize],
    );
    let pages = run(first, most);
    let length = 1 + random.below(pages * PAGE - skip);
    let base = iova(first) + skip;
    let last_page = first + (skip + length - 1) / PAGE;
    let mapped =
        (first..=last_page).all(|page| model.get(&page).is_some_and(|(_, p)| p.allow(access)));
    match Iotlb::lookup(iotlb, GuestAddress(base), length as usize, access) {
        Ok(pieces) => {
            assert!(mapped, "found {length:#x} at {base:#x}");
            let mut at = base;
            for piece in pieces {
                // A mapping goes on for pages: the first and the last byte of each page.
                let last = at + (piece.length as u64 - 1);
                let page_of = |addr: u64| first + (addr - iova(first)) / PAGE;
                for page in page_of(at)..=page_of(last) {
                    for addr in [at.max(iova(page)), last.min(iova(page) + (PAGE - 1))] {
                        let to = model[&page].0.wrapping_add(addr - iova(page));
                        assert_eq!(piece.base.0.wrapping_add(addr - at), to, "{addr:#x}");
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

/// An IOTLB that is changed and looked into.
trait Subject {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions);
    fn forget(&mut self, iova: u64, length: u64);
    fn forget_all(&mut self);
    /// After each operation, with the model as it is now.
    fn check(&mut self, model: &Model, random: &mut Random);
}

impl Subject for Iotlb {
    fn map(&mut self, iova: u64, to: u64, length: u64, permissions: Permissions) {
        let (iova, to) = (GuestAddress(iova), GuestAddress(to));
        self.set_mapping(iova, to, length as usize, permissions)
            .unwrap();
    }

    fn forget(&mut self, iova: u64, length: u64) {
        self.invalidate_mapping(GuestAddress(iova), length as usize);
    }

    fn forget_all(&mut self) {
        self.invalidate_all();
    }

    fn check(&mut self, model: &Model, random: &mut Random) {
        compare(self, model, random);
    }
}

/// One with a bound: it has no more mappings than that, all of what was mapped last, and of all others what it has is right.
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

    fn forget(&mut self, iova: u64, length: u64) {
        self.iotlb.forget(iova, length);
        self.last = None;
    }

    fn forget_all(&mut self) {
        self.iotlb.forget_all();
        self.last = None;
    }

    fn check(&mut self, model: &Model, random: &mut Random) {
        if random.below(10_000) == 0 {
            self.bound = 1 + random.below(3000) as usize;
            self.iotlb.set_bound(NonZeroUsize::new(self.bound));
        }
        assert!(self.iotlb.entries() <= self.bound);
        let page = random.below(PAGES);
        let at = [Some(iova(page)), self.last].into_iter().flatten();
        for at in at {
            let found = Iotlb::lookup(&self.iotlb, GuestAddress(at), 8, Permissions::No);
            let to = found.ok().and_then(|mut pieces| pieces.next());
            if let Some(to) = to.as_ref().map(|piece| piece.base.0) {
                let page = if at == iova(page) { page } else { page_at(at) };
                assert_eq!(model.get(&page).map(|(to, _)| *to), Some(to), "{at:#x}");
            }
            assert!(
                to.is_some() || self.last != Some(at),
                "{at:#x} was mapped last"
            );
        }
    }
}

/// The page at an address.
fn page_at(at: u64) -> u64 {
    // Addresses ascend with the pages.
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

/// One whose snapshots are kept for a while, each with the model as it was then.
#[derive(Default)]
struct Shared {
    iotlb: SharedIotlb,
    kept: Vec<(IotlbSnapshot, Model)>,
    /// Requests in flight: each operation finds the last few snapshots in use, more or less of them from time to time.
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

    fn forget(&mut self, iova: u64, length: u64) {
        let gone = self
            .iotlb
            .invalidate_mapping(GuestAddress(iova), length as usize);
        assert_eq!(gone.readers(), self.readers());
    }

    fn forget_all(&mut self) {
        assert_eq!(self.iotlb.invalidate_all().readers(), self.readers());
    }

    fn check(&mut self, model: &Model, random: &mut Random) {
        // Rarely, as the model is copied.
        if random.below(2000) == 0 {
            let place = random.below(self.kept.len() as u64 + 1) as usize;
            self.kept
                .insert(place, (self.iotlb.snapshot(), model.clone()));
            if self.kept.len() > 6 {
                self.kept.truncate(random.below(6) as usize);
            }
        }
        if random.below(1000) == 0 {
            self.depth = random.below(12) as usize;
        }
        self.in_flight.push_back(self.iotlb.snapshot());
        while self.in_flight.len() > self.depth {
            self.in_flight.pop_front();
        }
        compare(&self.iotlb.snapshot(), model, random);
        if let Some((snapshot, then)) = self.kept.get(random.below(8) as usize) {
            compare(snapshot, then, random);
        }
    }
}

#[test]
fn lookups_agree_with_a_map_of_pages() {
    operate(&mut Iotlb::new(), operations());
}

#[test]
fn with_a_bound_what_is_found_is_right_and_what_was_mapped_last_is_found() {
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
fn snapshots_of_a_shared_one_agree_with_the_map_of_their_time() {
    operate(&mut Shared::default(), operations() / 10 + 2);
}

/// `VM_MEMORY_IOTLB_OPERATIONS=10000000` for the long run, which takes half a minute in release; `.ci/run` makes it.
fn operations() -> u64 {
    std::env::var("VM_MEMORY_IOTLB_OPERATIONS").map_or(100_000, |n| n.parse().unwrap())
}

/// Does so many operations at random, others for each number, and checks after each.
fn operate(iotlb: &mut impl Subject, operations: u64) {
    let mut random = Random(operations);
    let mut model = Model::new();
    let mut most = 0;
    for number in 0..operations {
        let page = random.below(PAGES);
        match random.below(100) {
            0..=59 => {
                let pages = run(page, 1 + random.below(4));
                // Some continue their neighbours, and become one mapping with them.
                let to = match random.below(3) {
                    0 => page * PAGE,
                    _ => random.below(PAGES) * PAGE,
                };
                let permissions = PERMISSIONS[random.below(4) as usize];
                iotlb.map(iova(page), to, pages * PAGE, permissions);
                model.extend((0..pages).map(|n| (page + n, (to + n * PAGE, permissions))));
            }
            60..=69 => {
                let pages = run(page, 1 + random.below(8));
                iotlb.forget(iova(page), pages * PAGE);
                // Not `retain`, which goes over all of them.
                for other in page..page + pages {
                    model.remove(&other);
                }
            }
            70 if number % 64 == 0 => {
                // A large part, holes between clusters included.
                let end = (page + random.below(PAGES / 2)).min(PAGES - 1);
                let length = iova(end) - iova(page);
                iotlb.forget(iova(page), length);
                model.retain(|other, _| *other < page || *other >= end);
            }
            71 if number % 65_536 == 0 => {
                iotlb.forget_all();
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
