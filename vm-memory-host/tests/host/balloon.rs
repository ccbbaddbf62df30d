//! Lists of page numbers: `discard_pages` and `Balloon`.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};

use super::common::*;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};
use vm_memory_host::{
    discard_pages, plug, unplug, Backing, Balloon, ChangeError, DiscardReport, HostMapped,
    HostMapping, MemoryBuilder, Region, Unplugged,
};

/// The number of 4096-byte pages in a huge page.
const SMALL: u64 = HUGE / PAGE;

/// The page numbers of the regions that [`mixed_memory`] builds.
const RAM: [std::ops::Range<u64>; 2] = [0..128, 200..264];
const ROM: std::ops::Range<u64> = 160..164;
const FOREIGN: std::ops::Range<u64> = 170..180;

/// Builds RAM of three backings, a ROM, and a region that another crate has built.
fn mixed_memory(backing: Backing) -> Memory {
    let region = |pages: std::ops::Range<u64>, backing| {
        let start = GuestAddress(pages.start * PAGE);
        Region::new(start, (pages.end - pages.start) * PAGE).backing(backing)
    };
    let memory: Memory = MemoryBuilder::new()
        .region(region(0..64, Backing::Anonymous))
        .region(region(64..128, Backing::Memfd))
        .region(region(RAM[1].clone(), backing))
        .region(region(ROM, Backing::shared_file(patterned_file(4), 0)).read_only(true))
        .build()
        .unwrap();
    let size = ((FOREIGN.end - FOREIGN.start) * PAGE) as usize;
    let start = GuestAddress(FOREIGN.start * PAGE);
    let foreign = GuestRegionMmap::from_range(start, size, None).unwrap();
    memory.insert_region(Arc::new(foreign)).unwrap()
}

fn is_ram(page: u64) -> bool {
    RAM.iter().any(|pages| pages.contains(&page))
}

/// Returns whether an error is the reason to refuse a page of [`mixed_memory`].
fn is_reason(page: u64, error: &ChangeError) -> bool {
    match error {
        ChangeError::PageNumber { page: refused } => page >= 1 << 52 && *refused == page,
        ChangeError::ReadOnly { region } => ROM.contains(&page) && region.start == ROM.start * PAGE,
        ChangeError::NotProvisioned(_) => FOREIGN.contains(&page),
        ChangeError::Hole { addr } => {
            let is_mapped = ROM.contains(&page) || FOREIGN.contains(&page) || page >= 1 << 52;
            *addr == page.wrapping_mul(PAGE) && !is_mapped
        }
        _ => false,
    }
}

/// Returns the dirty pages since the last call.
fn take_dirty(memory: &Memory) -> BTreeSet<u64> {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(memory);
    let runs = dirty.runs();
    let pages = runs.flat_map(|(start, len)| start.0 / PAGE..(start.0 + len as u64) / PAGE);
    pages.collect()
}

fn page_number() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0u64..280,
        1 => (1u64 << 52) - 2..(1 << 52) + 2,
        1 => u64::MAX - 1..=u64::MAX,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Compares with a set of pages, for each backing and hostile lists.
    #[test]
    fn discard_pages_discards_the_pages_of_the_list_that_are_ram(
        kind in 0usize..3,
        use_balloon in any::<bool>(),
        list in prop::collection::vec(page_number(), 0..300),
    ) {
        let backing = [
            Backing::Anonymous,
            Backing::Memfd,
            Backing::private_file(patterned_file(64), 0),
        ][kind].clone();
        let memory = mixed_memory(backing);
        for pages in RAM {
            fill(&memory, pages.start * PAGE, (pages.end - pages.start) * PAGE, 7);
        }
        take_dirty(&memory);
        let report = if use_balloon {
            Balloon::new().inflate(&memory, list.iter().copied())
        } else {
            discard_pages(&memory, list.iter().copied())
        };
        let listed: BTreeSet<u64> = list.into_iter().collect();
        let (ram, others): (BTreeSet<_>, BTreeSet<_>) = listed.iter().partition(|page| is_ram(**page));
        let counts = (report.discarded, report.refused, report.collected, report.freed);
        let expected = (ram.len() as u64, others.len() as u64, 0, ram.len() as u64 * PAGE);
        prop_assert_eq!(counts, expected);
        match (report.first_refused, others.first()) {
            (None, None) => {}
            (Some(refused), Some(first)) => {
                prop_assert_eq!(refused.page, *first);
                prop_assert!(is_reason(*first, &refused.source), "{}", refused);
            }
            (refused, first) => prop_assert!(false, "{:?}, {:?}", refused, first),
        }
        prop_assert_eq!(take_dirty(&memory), ram.clone());
        for page in RAM.into_iter().flatten() {
            let expected = if ram.contains(&page) { 0 } else { 7 };
            prop_assert_eq!(byte_of_page(&memory, page * PAGE), Some(expected), "{}", page);
        }
    }
}

#[test]
fn discard_pages_of_more_ranges_than_a_batch_discards_all() {
    const PAGES: u64 = 20_000;
    let memory = build(Region::new(GuestAddress(0), PAGES * PAGE)).unwrap();
    for page in 0..PAGES {
        memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
    }
    let even = || (0..PAGES as u32).step_by(2);
    let odd = (0..PAGES as u32 / 2).rev().map(|page| 2 * page + 1);
    let report = discard_pages(&memory, even().chain(odd));
    assert_eq!((report.discarded, report.refused), (PAGES, 0));
    assert_eq!((report.freed, resident(&memory)), (PAGES * PAGE, 0));
    // A page counts once in each batch.
    let report = discard_pages(&memory, even().chain(even()));
    assert_eq!(report.discarded, PAGES);
    // A long list is one range.
    let report = discard_pages(
        &memory,
        std::iter::repeat_n(0..PAGES, 3).flatten().chain(0..2),
    );
    assert_eq!(report.discarded, PAGES);
}

#[test]
fn discard_pages_of_refused_list_reports_counts_and_one_reason() {
    let memory = build(Region::new(GuestAddress(1 << 40), PAGE)).unwrap();
    // No two numbers are adjacent.
    let list = (0..300_000u64).map(|n| (n.wrapping_mul(0x9e37_79b9) & 0xffff_ffff) << 1);
    let report = discard_pages(&memory, list);
    assert_eq!((report.discarded, report.refused), (0, 300_000));
    let text = report.to_string();
    let expected = "0 pages discarded, 0x0 bytes freed, 300000 pages refused; page 0x0 was \
        refused: no region contains guest address 0x0; pass a range without holes";
    assert_eq!(text, expected);
}

/// Builds a memfd whose pages the system refuses to free, and returns its region.
fn unfreeable(flags: MemfdFlags, start: u64, size: u64) -> (OwnedFd, Region) {
    let file = memfd_create("sealed later", MemfdFlags::ALLOW_SEALING | flags).unwrap();
    ftruncate(&file, size).unwrap();
    let backing = Backing::shared_file(file.try_clone().unwrap(), 0);
    let region = Region::new(GuestAddress(start), size).backing(backing);
    (file, region.release_huge_pages(true))
}

#[test]
fn discard_pages_that_system_refuses_discards_the_others() {
    let (file, sealed) = unfreeable(MemfdFlags::empty(), 4 * PAGE, 4 * PAGE);
    let memory: Memory = MemoryBuilder::new()
        .region(Region::new(GuestAddress(0), 4 * PAGE))
        .region(sealed)
        .region(Region::new(GuestAddress(8 * PAGE), 4 * PAGE))
        .build()
        .unwrap();
    fill(&memory, 0, 12 * PAGE, 7);
    fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
    let report = discard_pages(&memory, 0..12u32);
    assert_eq!((report.discarded, report.refused), (8, 4));
    let refused = report.first_refused.unwrap();
    assert_eq!(refused.page, 4);
    assert!(matches!(refused.source, ChangeError::System { .. }));
    assert_eq!(
        refused.source.to_string(),
        "region 0x4000-0x7fff: cannot discard 0x4000 bytes at 0x4000; 0x0 bytes were changed before"
    );
    let bytes: Vec<_> = (0..12)
        .map(|page| byte_of_page(&memory, page * PAGE))
        .collect();
    let expected = [0, 7, 0].map(|byte| [Some(byte); 4]);
    assert_eq!(bytes, expected.concat());
}

#[test]
fn discard_pages_of_unplugged_block_frees_them() {
    let region = Region::new(GuestAddress(0), 2 * HUGE).blocks(non_zero(HUGE), Unplugged::Mapped);
    let memory = build(region).unwrap();
    plug(&memory, GuestAddress(0), HUGE).unwrap();
    fill(&memory, 0, HUGE, 7);
    let report = discard_pages(&memory, 0..2 * SMALL);
    assert_eq!((report.discarded, report.freed), (2 * SMALL, 2 * HUGE));
    unplug(&memory, GuestAddress(0), HUGE).unwrap();
}

/// A region of a VMM that is at another guest address than it was built for.
#[derive(Debug)]
struct Moved {
    inner: GuestRegionMmap<AtomicBitmap>,
    start: u64,
}

impl HostMapped for Moved {
    fn host_mapping(&self) -> Option<&HostMapping> {
        self.inner.host_mapping()
    }
}

impl GuestMemoryRegion for Moved {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.inner.bitmap()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Moved {}

#[test]
fn discard_pages_of_moved_region_discards_aligned_pages() {
    let region = || Region::new(GuestAddress(0), 4 * PAGE);
    for (start, discarded) in [(16 * PAGE, 3), (16 * PAGE + 0x800, 0)] {
        let regions = MemoryBuilder::new().region(region()).build_regions();
        let inner = regions.unwrap().pop().unwrap();
        let memory = GuestRegionCollection::from_regions(vec![Moved { inner, start }]).unwrap();
        memory
            .write_slice(&[7; 4 * PAGE as usize], GuestAddress(start))
            .unwrap();
        let report = discard_pages(&memory, 17..20u32);
        assert_eq!(
            (report.discarded, report.refused),
            (discarded, 3 - discarded)
        );
        if let Some(refused) = report.first_refused {
            // Each listed page has bytes of two pages of the region.
            let error = refused.source;
            assert!(
                matches!(error, ChangeError::Unaligned { start: 0x11000, .. }),
                "{error}"
            );
        }
        let byte: u8 = memory.read_obj(GuestAddress(start + 3 * PAGE)).unwrap();
        assert_eq!(byte, if discarded == 0 { 7 } else { 0 });
    }
}

fn huge_region(start: u64, pages: u64) -> Region {
    Region::new(GuestAddress(start), pages * HUGE).backing(Backing::Hugetlb { page_size: HUGE })
}

fn counts(report: &DiscardReport) -> (u64, u64, u64) {
    (report.discarded, report.collected, report.refused)
}

#[test]
fn discard_pages_of_huge_page_needs_all_pages() {
    let test = "discard_pages_of_huge_page_needs_all_pages";
    let Some(_pages) = HugePages::reserve(3, test) else {
        return;
    };
    let memory = build(huge_region(0, 3).release_huge_pages(true)).unwrap();
    fill(&memory, 0, 3 * HUGE, 7);
    let list = SMALL - 1..3 * SMALL - 1;
    let report = discard_pages(&memory, list.clone().rev());
    assert_eq!(counts(&report), (SMALL, 0, SMALL));
    assert_eq!(report.freed, HUGE);
    let refused = report.first_refused.unwrap();
    assert_eq!(
        (refused.page, refused.source.to_string().as_str()),
        (
            0x1ff,
            "region 0x0-0x5fffff: 0x1000 bytes at 0x1ff000 are not whole pages of 0x200000 bytes; \
            align the range"
        )
    );
    wait_for_free_pages(1);
    let bytes = [0, 1, 2].map(|page| byte_of_page(&memory, page * HUGE));
    assert_eq!(bytes, [Some(7), Some(0), Some(7)]);
}

#[test]
fn balloon_collects_huge_pages_like_a_set_of_pages() {
    const HUGE_PAGES: u64 = 3;
    let test = "balloon_collects_huge_pages_like_a_set_of_pages";
    let Some(_pages) = HugePages::reserve(HUGE_PAGES, test) else {
        return;
    };
    let ends = prop::sample::select(vec![0, 1, 100, 256, 511, 512, 600, 1023, 1024, 1536, 1544]);
    let ranges = prop::collection::vec((ends.clone(), ends), 1..4);
    let steps = prop::collection::vec((0u8..3, ranges), 1..12);
    let small = Region::new(GuestAddress(HUGE_PAGES * HUGE), 8 * PAGE);
    let huge = huge_region(0, HUGE_PAGES).release_huge_pages(true);
    let run = |steps: Vec<(u8, Vec<(u64, u64)>)>| {
        wait_for_free_pages(HUGE_PAGES);
        let builder = MemoryBuilder::new().region(huge.clone());
        let memory: Memory = builder.region(small.clone()).build().unwrap();
        let mut balloon = Balloon::new();
        let (mut inside, mut zeroes) = (BTreeSet::new(), BTreeSet::new());
        for (kind, ranges) in steps {
            let list: Vec<u64> = ranges.iter().flat_map(|(from, to)| *from..*to).collect();
            if kind == 0 {
                balloon.deflate(&memory, list.iter().copied());
                list.iter().for_each(|page| {
                    inside.remove(page);
                });
                continue;
            }
            for page in 0..HUGE_PAGES * SMALL + 8 {
                memory.write_obj(7u8, GuestAddress(page * PAGE)).unwrap();
            }
            zeroes.clear();
            let report = balloon.inflate(&memory, list.iter().copied());
            let listed: BTreeSet<u64> = list.into_iter().collect();
            let (mut discarded, mut collected, mut freed) = (0, 0, 0);
            for start in (0..HUGE_PAGES).map(|page| page * SMALL) {
                let all = || start..start + SMALL;
                let mut pages: Vec<u64> = listed.range(all()).copied().collect();
                // Consecutive pages are added together.
                while let Some(first) = pages.first().copied() {
                    let is_next = |(n, page): (u64, &u64)| *page == first + n;
                    let run = (0..).zip(&pages).take_while(|at| is_next(*at)).count();
                    let before = inside.range(all()).count() as u64;
                    inside.extend(pages.drain(..run));
                    if inside.range(all()).count() as u64 == SMALL && before < SMALL {
                        zeroes.extend(all());
                        (discarded, freed) = (discarded + SMALL, freed + 1);
                    } else {
                        collected += run as u64;
                    }
                }
            }
            let small: Vec<u64> = listed.range(HUGE_PAGES * SMALL..).copied().collect();
            prop_assert_eq!(
                counts(&report),
                (discarded + small.len() as u64, collected, 0)
            );
            prop_assert_eq!(report.freed, freed * HUGE + small.len() as u64 * PAGE);
            zeroes.extend(small);
            wait_for_free_pages(freed);
            for page in 0..HUGE_PAGES * SMALL + 8 {
                let byte: u8 = memory.read_obj(GuestAddress(page * PAGE)).unwrap();
                prop_assert_eq!(byte == 0, zeroes.contains(&page), "{}", page);
            }
        }
        Ok(())
    };
    TestRunner::new(ProptestConfig::with_cases(48))
        .run(&steps, run)
        .unwrap();
}

#[test]
fn balloon_keeps_pages_of_replaced_region_apart() {
    let test = "balloon_keeps_pages_of_replaced_region_apart";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let region = || huge_region(0, 1).release_huge_pages(true);
    let memory = build(region()).unwrap();
    let mut balloon = Balloon::new();
    let report = balloon.inflate(&memory, 0..SMALL - 1);
    assert_eq!(counts(&report), (0, SMALL - 1, 0));
    // The guest's bytes in a new region at the same addresses.
    let replaced = build(region()).unwrap();
    fill(&replaced, 0, HUGE, 7);
    let report = balloon.inflate(&replaced, [SMALL - 1]);
    assert_eq!(counts(&report), (0, 1, 0));
    assert_eq!(byte_of_page(&replaced, 0), Some(7));
    // The pages of the old region are forgotten.
    let report = balloon.inflate(&memory, [SMALL - 1]);
    assert_eq!(counts(&report), (0, 1, 0));
    balloon.clear();
    let report = balloon.inflate(&memory, 0..SMALL - 1);
    assert_eq!(counts(&report), (0, SMALL - 1, 0));
}

#[test]
fn balloon_forgets_pages_of_block_that_is_plugged_again() {
    let test = "balloon_forgets_pages_of_block_that_is_plugged_again";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let region = huge_region(0, 2).release_huge_pages(true);
    let memory = build(region.blocks(non_zero(HUGE), Unplugged::Mapped)).unwrap();
    let block = GuestAddress(HUGE);
    plug(&memory, block, HUGE).unwrap();
    let mut balloon = Balloon::new();
    let all_but_last = || SMALL..2 * SMALL - 1;
    let last = [2 * SMALL - 1];
    for lists_while_unplugged in [false, true] {
        if !lists_while_unplugged {
            let report = balloon.inflate(&memory, all_but_last());
            assert_eq!(counts(&report), (0, SMALL - 1, 0));
        }
        unplug(&memory, block, HUGE).unwrap();
        if lists_while_unplugged {
            let report = balloon.inflate(&memory, all_but_last());
            assert_eq!(counts(&report), (0, SMALL - 1, 0));
        }
        plug(&memory, block, HUGE).unwrap();
        fill(&memory, HUGE, HUGE, 7);
        let report = balloon.inflate(&memory, last);
        assert_eq!(counts(&report), (0, 1, 0));
        assert_eq!(byte_of_page(&memory, HUGE), Some(7));
        balloon.deflate(&memory, last);
    }
    // A block that is plugged already keeps its bytes and its pages in the balloon.
    let report = balloon.inflate(&memory, all_but_last());
    assert_eq!(counts(&report), (0, SMALL - 1, 0));
    assert_eq!(plug(&memory, block, HUGE).unwrap(), 0);
    let report = balloon.inflate(&memory, last);
    assert_eq!(counts(&report), (SMALL, 0, 0));
    assert_eq!(byte_of_page(&memory, HUGE), Some(0));
}

/// A driver could have a huge page overwritten by two requests of one page each.
#[test]
fn balloon_of_kept_huge_pages_changes_nothing() {
    let test = "balloon_of_kept_huge_pages_changes_nothing";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let file = memfd_create("private", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    ftruncate(&file, HUGE).unwrap();
    let private = Region::new(GuestAddress(0), HUGE).backing(Backing::private_file(file, 0));
    for region in [huge_region(0, 1), private] {
        let memory = build(region).unwrap();
        fill(&memory, 0, HUGE, 7);
        take_dirty(&memory);
        let mut balloon = Balloon::new();
        for list in [0..SMALL, 0..SMALL, 3..4] {
            let report = balloon.inflate(&memory, list.clone());
            assert_eq!((counts(&report), report.freed), ((0, 0, 0), 0));
            assert_eq!(report.kept, list.end - list.start);
            let count = report.kept;
            let what = if count == 1 { "page" } else { "pages" };
            let text = format!("0 pages discarded, 0x0 bytes freed, {count} {what} kept");
            assert_eq!(report.to_string(), text);
            balloon.deflate(&memory, [3u32]);
        }
        assert_eq!(take_dirty(&memory), BTreeSet::new());
        for page in 0..SMALL {
            assert_eq!(byte_of_page(&memory, page * PAGE), Some(7));
        }
    }
}

#[test]
fn balloon_whose_discard_fails_tries_again() {
    let test = "balloon_whose_discard_fails_tries_again";
    let Some(_pages) = HugePages::reserve(2, test) else {
        return;
    };
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let (file, region) = unfreeable(flags, 0, 2 * HUGE);
    let memory = build(region).unwrap();
    fill(&memory, 0, 2 * HUGE, 7);
    fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
    let mut balloon = Balloon::new();
    let report = balloon.inflate(&memory, 0..SMALL - 1);
    assert_eq!(counts(&report), (0, SMALL - 1, 0));
    // One call for two huge pages, of which the list has a part.
    for _ in 0..2 {
        let report = balloon.inflate(&memory, SMALL - 1..2 * SMALL);
        assert_eq!(counts(&report), (0, 0, SMALL + 1));
        let refused = report.first_refused.unwrap();
        assert_eq!(refused.page, SMALL - 1);
        assert!(
            matches!(refused.source, ChangeError::System { .. }),
            "{refused}"
        );
    }
    assert_eq!(byte_of_page(&memory, 0), Some(7));
}
