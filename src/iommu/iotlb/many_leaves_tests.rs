//! Lookups over many leaves, which skip those that are entirely in their range.

use std::ops::Range;

use super::tests::map_page;
use super::*;
use Permissions::*;

/// Returns the number of mappings and leaves that lookups read while `act` runs.
fn steps_of(act: impl FnOnce()) -> usize {
    use crate::iommu::mapping_table::STEPS;
    let before = STEPS.get();
    act();
    STEPS.get() - before
}

/// A front end that maps one page of each miss, as QEMU does, and a guest that scatters its pages.
#[test]
fn lookup_after_each_page_that_arrives_does_not_read_all_mappings() {
    let pages: u64 = if cfg!(miri) { 600 } else { 6_000 };
    for (is_bounded, from_the_end) in [(false, false), (false, true), (true, true)] {
        let mut iotlb = Iotlb::new();
        if is_bounded {
            // A page of the range is evicted. So each lookup counts the mappings of the range.
            iotlb.set_bound(NonZeroUsize::new(pages as usize));
            map_page(&mut iotlb, 0);
            (pages..2 * pages).for_each(|page| map_page(&mut iotlb, page));
            assert_eq!(iotlb.evictions(), 1);
        }
        let mut rounds = 0;
        let steps = steps_of(|| loop {
            let size = pages as usize * 0x1000;
            let fails = match Iotlb::lookup(&iotlb, GuestAddress(0), size, Read) {
                Ok(_) => break,
                Err(fails) => fails,
            };
            rounds += 1;
            let miss = &fails.misses[0];
            let page = if from_the_end {
                (miss.base.0 + miss.length as u64) / 0x1000 - 1
            } else {
                miss.base.0 / 0x1000
            };
            map_page(&mut iotlb, page);
        });
        assert_eq!(rounds, pages as usize);
        // For each round: the mappings of the leaves that changed, and a few steps for each other
        // leaf.
        let most = rounds * (6 * 128 + 2 * rounds / 48);
        assert!(steps < most, "{steps} steps, {is_bounded} {from_the_end}");
    }
}

/// The guest physical page and the permissions of each page.
type Pages = Vec<Option<(u64, Permissions)>>;

/// Returns the address of a page.
fn at_page(page: usize) -> GuestAddress {
    GuestAddress(page as u64 * 0x1000)
}

/// Maps a page in a table and in its list.
fn map_both(iotlb: &mut Iotlb, pages: &mut Pages, page: usize, to: usize, perm: Permissions) {
    let (from, target) = (at_page(page), at_page(to));
    iotlb.set_mapping(from, target, 0x1000, perm).unwrap();
    pages[page] = Some((to as u64, perm));
}

/// Looks up a range of pages, and compares the outcome with the list.
fn lookup_agrees_with_list(iotlb: &Iotlb, pages: &Pages, range: Range<usize>, access: Permissions) {
    let wanted = &pages[range.clone()];
    let fails = match Iotlb::lookup(iotlb, at_page(range.start), range.len() * 0x1000, access) {
        Ok(found) => {
            let found = found.flat_map(|part| {
                let first = part.base.0 / 0x1000;
                first..first + part.length as u64 / 0x1000
            });
            assert!(found.eq(wanted.iter().flatten().map(|mapped| mapped.0)));
            let is_permitted = |mapped: &Option<(_, Permissions)>| mapped.unwrap().1.allow(access);
            assert!(wanted.iter().all(is_permitted));
            return;
        }
        Err(fails) => fails,
    };
    let parts_with = |parts: &[IovaRange], page: usize| {
        let byte = at_page(page).0;
        let has =
            |part: &&IovaRange| (0..part.length as u64).contains(&(byte.wrapping_sub(part.base.0)));
        parts.iter().filter(has).count()
    };
    let mut failed = 0;
    for (page, mapped) in range.zip(wanted) {
        let is_missing = usize::from(mapped.is_none());
        let is_refused = usize::from(mapped.is_some_and(|mapped| !mapped.1.allow(access)));
        let found = (
            parts_with(&fails.misses, page),
            parts_with(&fails.access_fails, page),
        );
        assert_eq!(found, (is_missing, is_refused), "page {page}");
        failed += is_missing + is_refused;
    }
    assert_ne!(failed, 0);
}

/// Tables of many leaves with few holes, against a list of pages.
#[test]
fn lookup_over_many_leaves_agrees_with_list_of_pages() {
    const PAGES: usize = 3_000;
    let mut generator = fastrand::Rng::with_seed(1);
    let mut random = |below: usize| generator.usize(..below);
    let mut pages: Pages = vec![None; PAGES];
    let (mut iotlb, mut kept) = (Iotlb::new(), Iotlb::new());
    let steps = if cfg!(miri) { 60 } else { 5_000 };
    for _ in 0..steps {
        let at = random(PAGES);
        let count = [1, random(20) + 1, random(PAGES) + 1][random(3)];
        let range = at..(at + count).min(PAGES);
        match random(20) {
            0..2 => {
                iotlb.invalidate_mapping(at_page(at), 0x2000);
                pages
                    .iter_mut()
                    .skip(at)
                    .take(2)
                    .for_each(|page| *page = None);
            }
            2 => {
                kept.clone_from(&iotlb);
                std::mem::swap(&mut kept, &mut iotlb);
            }
            3 => {
                // Runs of pages, with holes that runs of the same offset surround.
                for page in range.take(600).filter(|page| page % 4 != 0) {
                    map_both(&mut iotlb, &mut pages, page, page, ReadWrite);
                }
            }
            4..7 => {
                // Few pages have other permissions.
                let perm = [Read, ReadWrite, Write][random(3)];
                map_both(&mut iotlb, &mut pages, at, at, perm);
            }
            7..12 => {
                for page in range {
                    // Mappings of three pages.
                    let to = page / 3 * 7919 % 100_003 + page % 3;
                    map_both(&mut iotlb, &mut pages, page, to, ReadWrite);
                }
            }
            12..14 => {
                let hole = range.clone().find(|page| pages[*page].is_none());
                iotlb.evicted = hole.map(|page| {
                    let start = at_page(page).0;
                    // Its neighbours may continue it.
                    let offset = [0, start * 2][random(2)];
                    IovaMapping::new(start, start + 0xfff, offset, Read, 0)
                });
                let length = range.len() * 0x1000;
                needs_more_than_bound_agrees_with_count(&mut iotlb, at_page(at).0, length);
            }
            _ => {
                let access = [Read, Write, ReadWrite, No][random(4)];
                lookup_agrees_with_list(&iotlb, &pages, range, access);
            }
        }
    }
}

/// Compares `needs_more_than_bound` with a count of all mappings of a range.
fn needs_more_than_bound_agrees_with_count(iotlb: &mut Iotlb, first: u64, length: usize) {
    let range = Span {
        first,
        last: first + length as u64 - 1,
    };
    let mut mappings: Vec<_> = iotlb.mappings.iter().chain(&iotlb.evicted).collect();
    mappings.retain(|mapping| mapping.is_in(range));
    mappings.sort_by_key(|mapping| mapping.start);
    let others = mappings.windows(2).filter(|it| !it[0].continues(it[1]));
    let count = others.count() + usize::from(!mappings.is_empty());
    let starts_at = |mapping: &IovaMapping| mapping.last >= first;
    let position = match iotlb.mappings.last_at_or_before(first) {
        Some((position, mapping)) if starts_at(mapping) => position,
        Some((position, _)) => iotlb.mappings.next(position),
        None => Position::default(),
    };
    for bound in [count.saturating_sub(1), count] {
        iotlb.bound = NonZeroUsize::new(bound);
        let expected = iotlb.bound.is_some() && iotlb.evicted.is_some() && count > bound;
        let needs_more = iotlb.needs_more_than_bound(position, range.first, range.last);
        assert_eq!(needs_more, expected, "{count} mappings, bound {bound}");
    }
    iotlb.bound = None;
}

/// All mappings continue each other, except the evicted one.
#[test]
fn needs_more_than_bound_counts_pieces_across_leaves_once() {
    let mut iotlb = Iotlb::new();
    let mut pages: Pages = vec![None; 1_000];
    for page in (0..1_000).step_by(2) {
        map_both(&mut iotlb, &mut pages, page, page, Read);
    }
    for page in [1, 501, 999] {
        let start = at_page(page).0;
        iotlb.evicted = Some(IovaMapping::new(start, start + 0xfff, 7, Read, 0));
        needs_more_than_bound_agrees_with_count(&mut iotlb, 0, 1_000 * 0x1000);
    }
}

/// A range of several leaves that needs one mapping more than the bound, and one that does not.
#[test]
fn b14_bound_of_several_leaves_refuses_range_of_one_more() {
    for (pages, is_refused) in [(400u64, false), (401, true)] {
        let mut iotlb = Iotlb::new();
        iotlb.set_bound(NonZeroUsize::new(400));
        let size = pages as usize * 0x1000;
        let mut rounds = 0;
        let refused = loop {
            match Iotlb::lookup(&iotlb, GuestAddress(0), size, Read) {
                Ok(_) => break false,
                Err(fails) if fails.is_refused_by_bound() => break true,
                Err(fails) => map_page(&mut iotlb, fails.misses[0].base.0 / 0x1000),
            }
            rounds += 1;
        };
        assert_eq!((refused, rounds), (is_refused, pages), "{pages} pages");
    }
}
