//! An `Iotlb` with thousands of mappings against a map of pages: many operations, any order, dense and sparse addresses.
#![cfg(feature = "iommu")]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test that goes wrong may panic, and says what it does in fewer words"
)]

use std::collections::BTreeMap;

use vm_memory::iommu::IovaRange;
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
    let mapped = (first..=last_page).all(|page| model.get(&page).is_some_and(|(_, p)| p.allow(access)));
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
            let sum = |ranges: &[IovaRange]| ranges.iter().map(|range| range.length as u64).sum::<u64>();
            assert_eq!((sum(&fails.misses), sum(&fails.access_fails)), (misses, refused));
        }
    }
}

/// `VM_MEMORY_IOTLB_OPERATIONS=10000000` for the long run, which takes half a minute in release.
#[test]
fn lookups_agree_with_a_map_of_pages() {
    let operations = std::env::var("VM_MEMORY_IOTLB_OPERATIONS").map_or(100_000, |n| n.parse().unwrap());
    let mut random = Random(operations);
    let (mut iotlb, mut model) = (Iotlb::new(), Model::new());
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
                iotlb
                    .set_mapping(
                        GuestAddress(iova(page)),
                        GuestAddress(to),
                        (pages * PAGE) as usize,
                        permissions,
                    )
                    .unwrap();
                model.extend((0..pages).map(|n| (page + n, (to + n * PAGE, permissions))));
            }
            60..=69 => {
                let pages = run(page, 1 + random.below(8));
                iotlb.invalidate_mapping(GuestAddress(iova(page)), (pages * PAGE) as usize);
                model.retain(|other, _| !(page..page + pages).contains(other));
            }
            70 if number % 64 == 0 => {
                // A large part, holes between clusters included.
                let end = (page + random.below(PAGES / 2)).min(PAGES - 1);
                let length = iova(end) - iova(page);
                iotlb.invalidate_mapping(GuestAddress(iova(page)), length as usize);
                model.retain(|other, _| *other < page || *other >= end);
            }
            71 if number % 65_536 == 0 => {
                iotlb.invalidate_all();
                model.clear();
            }
            _ => {}
        }
        most = most.max(model.len());
        compare(&iotlb, &model, &mut random);
    }
    assert!(most > 2000, "only {most} pages were ever mapped");
    println!("{operations} operations, at most {most} pages mapped");
}
