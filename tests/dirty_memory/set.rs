//! A `DirtyMemory` as a set equals a `BTreeSet` of page addresses, for any two layouts of memory.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use test_support::{PAGE, PAGE_U64};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::iommu::Iotlb;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, Permissions};

/// All pages, regions and holes are multiples of a block of this many bytes.
const BLOCK: usize = 512;

/// Regions of (pages of the hole before it, pages, blocks in a page of the bitmap).
type Layout = Vec<(u64, usize, usize)>;

/// A set, and its model: the pages of the memory, and the addresses of those that are dirty.
struct Checked {
    set: DirtyMemory,
    pages: Vec<Range<u64>>,
    dirty: BTreeSet<u64>,
}

impl Checked {
    fn new(base: u64, layout: &Layout) -> Self {
        let (mut at, mut regions, mut pages) = (base, Vec::new(), Vec::new());
        for &(hole, len, blocks) in layout {
            let (start, size, len) = (at + hole * PAGE_U64, blocks * BLOCK, len * PAGE);
            let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(size).unwrap());
            let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap);
            let mapping = mapping.build().unwrap();
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap());
            at = start + len as u64;
            let starts = (start..at).step_by(size);
            pages.extend(starts.map(|page| page..at.min(page + size as u64)));
        }
        let mut set = DirtyMemory::new();
        set.harvest(&GuestMemoryMmap::from_regions(regions).unwrap());
        let dirty = BTreeSet::new();
        Self { set, pages, dirty }
    }

    fn dirty_pages(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let pages = self.pages.iter().cloned();
        pages.filter(|page| self.dirty.contains(&page.start))
    }

    /// Returns the addresses of the dirty blocks.
    fn blocks(&self) -> BTreeSet<u64> {
        self.dirty_pages()
            .flat_map(|page| page.step_by(BLOCK))
            .collect()
    }

    fn apply(&mut self, operation: &Operation, base: u64, other: &Self) {
        let range = |at: u64, len: u64| {
            let end = u128::from(base + at) + u128::from(len);
            (GuestAddress(base + at), u128::from(base + at)..end)
        };
        let blocks = other.blocks();
        let in_other = |page: &Range<u64>| {
            page.clone()
                .step_by(BLOCK)
                .map(|block| blocks.contains(&block))
                .collect::<Vec<_>>()
        };
        let (dirty, pages) = (&mut self.dirty, self.pages.iter());
        match *operation {
            Operation::InsertRange(at, len) => {
                let (addr, range) = range(at, len);
                self.set.insert_range(addr, len);
                let touched = pages.filter(|page| {
                    range.start.max(page.start.into()) < range.end.min(page.end.into())
                });
                dirty.extend(touched.map(|page| page.start));
            }
            Operation::RemoveRange(at, len) => {
                let (addr, range) = range(at, len);
                self.set.remove_range(addr, len);
                for page in pages {
                    if range.start <= page.start.into() && u128::from(page.end) <= range.end {
                        dirty.remove(&page.start);
                    }
                }
            }
            Operation::InsertAll => {
                self.set.insert_all();
                dirty.extend(pages.map(|page| page.start));
            }
            Operation::Clear => {
                self.set.clear();
                dirty.clear();
            }
            Operation::Union => {
                self.set.union_with(&other.set);
                let touched = pages.filter(|page| in_other(page).contains(&true));
                dirty.extend(touched.map(|page| page.start));
            }
            Operation::Difference => {
                self.set.difference_with(&other.set);
                for page in pages.filter(|page| !in_other(page).contains(&false)) {
                    dirty.remove(&page.start);
                }
            }
            Operation::InsertRing(ref entries) => {
                let entries = entries
                    .iter()
                    .map(|(slot, offset)| (base + slot * PAGE_U64, *offset));
                let outside = entries.clone().filter(|(slot, offset)| {
                    let first = u128::from(*slot) + u128::from(*offset) * PAGE as u128;
                    self.touch(first, first + PAGE as u128) == 0
                });
                let outside = outside.count() as u64;
                let entries = entries.map(|(slot, offset)| (GuestAddress(slot), offset));
                assert_eq!(self.set.insert_ring(entries), outside);
            }
            Operation::InsertIovaLog(ref log) => self.apply_iova_log(log, base),
        }
    }

    /// Adds the pages that have bytes of a range to the model, and returns their number.
    fn touch(&mut self, first: u128, end: u128) -> usize {
        let has_bytes =
            |page: &&Range<u64>| first.max(page.start.into()) < end.min(page.end.into());
        let touched = self.pages.iter().filter(has_bytes).map(|page| page.start);
        let touched: Vec<_> = touched.collect();
        self.dirty.extend(&touched);
        touched.len()
    }

    fn apply_iova_log(&mut self, log: &IovaLog, base: u64) {
        let block = BLOCK as u64;
        // The guest block of each mapped I/O virtual block.
        let (mut iotlb, mut mapped) = (Iotlb::new(), BTreeMap::new());
        for &(iova, target, blocks, permissions) in &log.mappings {
            let (iova, target) = (log.base + iova * block, base + target * block);
            let len = blocks as usize * BLOCK;
            let to = (GuestAddress(iova), GuestAddress(target));
            iotlb.set_mapping(to.0, to.1, len, permissions).unwrap();
            mapped.extend((0..blocks).map(|at| (iova + at * block, target + at * block)));
        }
        let start = log.base + log.start * block;
        let set_bits =
            (0..log.words.len() * 64).filter(|at| log.words[at / 64] >> (at % 64) & 1 != 0);
        let mut dirty = set_bits.flat_map(|bit| {
            let first = u128::from(start) + (bit * log.blocks * BLOCK) as u128;
            (0..log.blocks as u128).map(move |at| first + at * u128::from(block))
        });
        let (mut unmapped, mut outside) = (Vec::new(), 0);
        // The first block past the end of the address space ends the log.
        while let Some(Ok(iova)) = dirty.next().map(u64::try_from) {
            match mapped.get(&iova) {
                None => unmapped.push(iova),
                Some(&target) => {
                    let target = u128::from(target);
                    if self.touch(target, target + u128::from(block)) == 0 {
                        outside += block;
                    }
                }
            }
        }
        let words = LogWords::new(
            GuestAddress(start),
            &log.words,
            NonZeroUsize::new(log.blocks * BLOCK).unwrap(),
        );
        let mut missing = Vec::new();
        let found = self.set.insert_iova_log(&iotlb, &words, |range| {
            let end = range.base.0 + (range.length as u64 - block);
            missing.extend((range.base.0..=end).step_by(BLOCK));
        });
        assert_eq!((missing, found), (unmapped, outside));
    }

    fn check(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.set.total_pages(), self.dirty.len());
        let (mut blocks, mut end) = (Vec::new(), 0);
        for (start, len) in self.set.runs() {
            prop_assert!(
                start.0 >= end && len > 0,
                "{:?}, {} after {:#x}",
                start,
                len,
                end
            );
            end = start.0 + len as u64;
            blocks.extend((start.0..end).step_by(BLOCK));
        }
        prop_assert_eq!(blocks, self.blocks().into_iter().collect::<Vec<_>>());
        let pages = self.set.pages();
        let pages = pages.map(|(start, len)| start.0..start.0 + len as u64);
        prop_assert!(pages.eq(self.dirty_pages()));
        Ok(())
    }

    /// Checks that the chunks are the runs, and that no run has more chunks than it needs.
    fn check_chunks(&self, max: usize) -> Result<(), TestCaseError> {
        let mut chunks = self.set.chunks(NonZeroUsize::new(max).unwrap());
        for (start, len) in self.set.runs() {
            let mut at = start.0;
            for _ in 0..len.div_ceil(max) {
                let (start, len) = chunks.next().unwrap();
                prop_assert!(
                    start.0 == at && (1..=max).contains(&len),
                    "{:#x}, {}",
                    at,
                    len
                );
                at += len as u64;
            }
            prop_assert_eq!(at, start.0 + len as u64);
        }
        prop_assert!(chunks.next().is_none());
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Operation {
    InsertRange(u64, u64),
    RemoveRange(u64, u64),
    InsertAll,
    Clear,
    Union,
    Difference,
    /// Slots and offsets, in pages.
    InsertRing(Vec<(u64, u64)>),
    InsertIovaLog(IovaLog),
}

/// A log by IOVA, and the mappings to translate it by, in blocks.
#[derive(Clone, Debug)]
struct IovaLog {
    /// The lowest IOVA.
    base: u64,
    /// The IOVA, the guest address, the length and the permissions of each mapping.
    mappings: Vec<(u64, u64, u64, Permissions)>,
    start: u64,
    words: Vec<u64>,
    /// The number of blocks in a page of the log.
    blocks: usize,
}

fn ring() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let offset = prop_oneof![9 => 0..20u64, 1 => any::<u64>()];
    prop::collection::vec((0..40u64, offset), 0..8)
}

fn iova_log() -> impl Strategy<Value = IovaLog> {
    let permissions = prop_oneof![Just(Permissions::Read), Just(Permissions::ReadWrite)];
    let mapping = (0..300u64, 0..600u64, 1..80u64, permissions);
    let word = prop_oneof![
        Just(0),
        Just(u64::MAX),
        any::<u64>(),
        (0..64u32).prop_map(|bit| 1 << bit)
    ];
    (
        prop_oneof![Just(0), Just(1 << 40), Just(u64::MAX - 0x3_ffff)],
        prop::collection::vec(mapping, 0..6),
        0..300u64,
        prop::collection::vec(word, 0..5),
        prop_oneof![Just(1usize), Just(3), Just(8), Just(16)],
    )
        .prop_map(|(base, mappings, start, words, blocks)| IovaLog {
            base,
            mappings,
            start,
            words,
            blocks,
        })
}

fn layout() -> impl Strategy<Value = Layout> {
    let blocks = prop_oneof![Just(1usize), Just(2), Just(8), Just(16), Just(24)];
    prop::collection::vec((0u64..3, 1usize..24, blocks), 1..4)
}

fn operation() -> impl Strategy<Value = Operation> {
    // Most ranges are as small as a few pages, and begin and end with blocks.
    let at = || {
        let block = (0..40 * 8u64).prop_map(|block| block * BLOCK as u64);
        prop_oneof![1 => 0..80 * PAGE_U64, 4 => block]
    };
    let len = || {
        let blocks = |most: u64| (0..most).prop_map(|block| block * BLOCK as u64);
        prop_oneof![
            2 => 0..20 * PAGE_U64,
            6 => blocks(50),
            2 => blocks(300),
            1 => Just(u64::MAX),
        ]
    };
    prop_oneof![
        12 => (at(), len()).prop_map(|(at, len)| Operation::InsertRange(at, len)),
        8 => (at(), len()).prop_map(|(at, len)| Operation::RemoveRange(at, len)),
        2 => Just(Operation::InsertAll),
        1 => Just(Operation::Clear),
        4 => Just(Operation::Union),
        4 => Just(Operation::Difference),
        4 => ring().prop_map(Operation::InsertRing),
        8 => iova_log().prop_map(Operation::InsertIovaLog),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn set_operations_equal_those_of_page_addresses(
        base in prop_oneof![Just(0), Just(1 << 40), Just(u64::MAX - 0xff_ffff)],
        first in layout(),
        second in prop_oneof![layout().prop_map(Some), Just(None)],
        operations in prop::collection::vec((any::<bool>(), operation()), 1..32),
        max in prop_oneof![1000..5 * PAGE, Just(2 * PAGE), Just(usize::MAX)],
    ) {
        let mut one = Checked::new(base, &first);
        // Half of the sets have equal layouts.
        let mut other = Checked::new(base, &second.unwrap_or_else(|| first.clone()));
        for (swapped, operation) in operations {
            let (target, source) = if swapped { (&mut other, &one) } else { (&mut one, &other) };
            target.apply(&operation, base, source);
            target.check()?;
            target.check_chunks(max)?;
            prop_assert_eq!(one.set == other.set, one.blocks() == other.blocks());
        }
    }
}

fn set(layout: &[(u64, usize, usize)]) -> DirtyMemory {
    Checked::new(0, &layout.to_vec()).set
}

#[test]
fn eq_of_same_addresses_in_other_regions_and_page_sizes_is_true() {
    let (mut one, mut other) = (set(&[(0, 4, 8), (0, 4, 8)]), set(&[(0, 9, 16)]));
    assert_eq!(one, DirtyMemory::new());
    one.insert_range(GuestAddress(0x2000), 0x4000);
    assert_ne!(one, other);
    other.insert_range(GuestAddress(0x2000), 0x4000);
    assert_eq!(one, other);
    one.insert_range(GuestAddress(0x6000), 0x1000);
    assert_ne!(one, other);
}

#[test]
fn difference_with_page_covered_by_two_regions_removes_it() {
    let (mut large, mut small) = (set(&[(0, 2, 16)]), set(&[(0, 1, 8), (0, 1, 8)]));
    large.insert_all();
    small.insert_range(GuestAddress(0), PAGE_U64);
    large.difference_with(&small);
    assert_eq!(large.total_pages(), 1);
    small.insert_range(GuestAddress(PAGE_U64), PAGE_U64);
    large.difference_with(&small);
    assert_eq!(large.total_pages(), 0);
}

#[test]
fn operations_on_set_without_regions_add_nothing() {
    let (mut none, mut one) = (DirtyMemory::new(), set(&[(0, 4, 8)]));
    one.insert_all();
    none.insert_all();
    none.insert_range(GuestAddress(0), PAGE_U64);
    none.union_with(&one);
    assert_eq!(none, DirtyMemory::new());
    one.difference_with(&none);
    assert_eq!(one.total_pages(), 4);
}

#[test]
fn chunks_with_unplugged_block_omit_it_and_pages_have_it() {
    let block = NonZeroUsize::new(2 * PAGE).unwrap();
    let blocks = Arc::new(PluggedBlocks::new(6 * PAGE, block).unwrap());
    blocks.plug(0, 6 * PAGE).unwrap();
    let mapping = MmapRegionBuilder::<AtomicBitmap>::new(6 * PAGE)
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    blocks.unplug(2 * PAGE, 2 * PAGE).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    dirty.insert_all();
    assert_eq!(dirty.pages().count(), 6);
    let chunks = dirty.chunks(NonZeroUsize::new(3 * PAGE).unwrap());
    let chunks: Vec<_> = chunks.map(|(start, len)| (start.0, len)).collect();
    assert_eq!(chunks, [(0, 2 * PAGE), (4 * PAGE_U64, 2 * PAGE)]);
}
