//! Marks, logs of other parties with pages of any size at any address, and operations on two sets.
//! The dirty pages must match a set of pages after each step.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, Iotlb, Permissions,
};

use crate::model::{joined, last_of, Mappings, PAGE};

const MOST_STEPS: usize = 32;
const MOST_WORDS: usize = 16;

/// Two regions with a hole between them, and one near the end of the address space.
const REGIONS: [(u64, u64); 3] = [
    (2 * PAGE, 70 * PAGE),
    (100 * PAGE, 3 * PAGE),
    (u64::MAX - 5 * PAGE + 1, 4 * PAGE),
];

#[derive(Arbitrary, Clone, Copy, Debug)]
enum At {
    Page(u8),
    Byte(u32),
    Top(u16),
    Anywhere(u64),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Mark {
        at: At,
        len: u32,
    },
    Log {
        at: At,
        words: Vec<u64>,
        page_size: u64,
    },
    Harvest,
    PutBack,
    Switch {
        on: bool,
    },
    Set(SetStep),
}

/// A step that does not use the memory.
#[derive(Arbitrary, Debug)]
enum SetStep {
    Insert {
        at: At,
        len: u32,
    },
    Remove {
        at: At,
        len: u32,
    },
    InsertAll,
    Clear,
    /// Continues with the other set.
    Exchange,
    Union,
    Difference,
    Ring {
        slot: At,
        offset: u64,
    },
    IovaLog {
        mappings: Vec<(At, At, u32)>,
        at: At,
        words: Vec<u64>,
        page_size: u64,
    },
}

/// A log with pages of any size but 0.
struct Log {
    start: u64,
    words: Vec<u64>,
    page_size: NonZeroUsize,
}

impl Log {
    fn new(at: At, words: Vec<u64>, page_size: u64) -> Self {
        let page_size = usize::try_from(page_size).ok().and_then(NonZeroUsize::new);
        Self {
            start: addr(at),
            words: words.into_iter().take(MOST_WORDS).collect(),
            page_size: page_size.unwrap_or(NonZeroUsize::MIN),
        }
    }

    fn words(&self) -> LogWords<'_> {
        LogWords::new(GuestAddress(self.start), &self.words, self.page_size)
    }

    /// Returns the first address of each dirty page, and the one after it.
    fn pages(&self) -> impl Iterator<Item = (u128, u128)> + '_ {
        let bits = 0..self.words.len() * 64;
        let dirty = bits.filter(|bit| self.words[bit / 64] >> (bit % 64) & 1 != 0);
        let size = self.page_size.get() as u128;
        dirty.map(move |bit| {
            let first = u128::from(self.start) + bit as u128 * size;
            (first, first + size)
        })
    }
}

fn addr(at: At) -> u64 {
    match at {
        At::Page(page) => u64::from(page) * PAGE,
        At::Byte(byte) => u64::from(byte),
        At::Top(by) => u64::MAX - u64::from(by),
        At::Anywhere(at) => at,
    }
}

/// Returns the addresses of the pages that contain bytes of `first..end`.
fn pages(first: u128, end: u128) -> impl Iterator<Item = u64> {
    REGIONS.into_iter().flat_map(move |(start, len)| {
        let of_region = (0..len / PAGE).map(move |page| start + page * PAGE);
        of_region.filter(move |page| {
            u128::from(*page) < end && first < u128::from(*page) + u128::from(PAGE)
        })
    })
}

/// Runs an input.
pub fn run(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(steps) = Vec::<Step>::arbitrary(&mut bytes) else {
        return;
    };
    let ranges = REGIONS.map(|(at, len)| (GuestAddress(at), len as usize));
    let memory: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let (mut marked, mut found) = (BTreeSet::new(), BTreeSet::new());
    let (mut dirty, mut on) = (DirtyMemory::new(), true);
    dirty.harvest(&memory);
    let mut other = (dirty.clone(), BTreeSet::new());
    for step in steps.into_iter().take(MOST_STEPS) {
        match step {
            Step::Mark { at, len } => {
                let (at, len) = (addr(at), len as usize & 0xf_ffff);
                for region in memory.iter() {
                    // Clipped to the region.
                    let start = region.start_addr().0;
                    let first = at.max(start);
                    let end = u128::from(at) + len as u128;
                    let inside = end
                        .min(u128::from(start) + u128::from(region.len()))
                        .saturating_sub(u128::from(first));
                    region
                        .bitmap()
                        .mark_dirty((first - start) as usize, inside as usize);
                }
                if on {
                    marked.extend(pages(u128::from(at), u128::from(at) + len as u128));
                }
            }
            Step::Log {
                at,
                words,
                page_size,
            } => {
                let log = Log::new(at, words, page_size);
                dirty.add_log(&memory, &log.words());
                found.extend(log.pages().flat_map(|(first, end)| pages(first, end)));
            }
            Step::Harvest => {
                dirty.harvest(&memory);
                found.append(&mut marked);
            }
            Step::PutBack => {
                dirty.put_back(&memory);
                dirty.clear();
                marked.append(&mut found);
            }
            Step::Switch { on: to } => {
                DirtyMemory::set_tracking(&memory, to);
                on = to;
            }
            Step::Set(step) => apply(step, (&mut dirty, &mut found), (&mut other.0, &mut other.1)),
        }
        let seen: BTreeSet<u64> = dirty
            .runs()
            .flat_map(|(start, len)| (0..len as u64 / PAGE).map(move |page| start.0 + page * PAGE))
            .collect();
        assert_eq!(seen, found);
        assert_eq!(dirty.total_bytes(), found.len() as u64 * PAGE);
        assert_eq!(dirty == other.0, found == other.1);
        let estimate = DirtyMemory::estimate(&memory);
        assert_eq!(estimate, marked.len() as u64 * PAGE);
    }
}

/// Applies a step to a set and its model.
fn apply(
    step: SetStep,
    (dirty, found): (&mut DirtyMemory, &mut BTreeSet<u64>),
    (other, other_found): (&mut DirtyMemory, &mut BTreeSet<u64>),
) {
    match step {
        SetStep::Insert { at, len } => {
            let at = addr(at);
            dirty.insert_range(GuestAddress(at), len.into());
            found.extend(pages(at.into(), u128::from(at) + u128::from(len)));
        }
        SetStep::Remove { at, len } => {
            let at = addr(at);
            dirty.remove_range(GuestAddress(at), len.into());
            let end = u128::from(at) + u128::from(len);
            found.retain(|page| *page < at || end < u128::from(*page) + u128::from(PAGE));
        }
        SetStep::InsertAll => {
            dirty.insert_all();
            found.extend(pages(0, 1 << 64));
        }
        SetStep::Clear => {
            dirty.clear();
            found.clear();
        }
        SetStep::Exchange => {
            core::mem::swap(dirty, other);
            core::mem::swap(found, other_found);
        }
        SetStep::Union => {
            dirty.union_with(other);
            found.extend(&*other_found);
        }
        SetStep::Difference => {
            dirty.difference_with(other);
            found.retain(|page| !other_found.contains(page));
        }
        SetStep::Ring { slot, offset } => {
            let slot = addr(slot);
            let outside = dirty.insert_ring([(GuestAddress(slot), offset)]);
            let first = u128::from(slot) + u128::from(offset) * u128::from(PAGE);
            let before = pages(first, first + u128::from(PAGE)).count();
            assert_eq!(outside == 0, before != 0);
            found.extend(pages(first, first + u128::from(PAGE)));
        }
        SetStep::IovaLog {
            mappings,
            at,
            words,
            page_size,
        } => {
            let log = Log::new(at, words, page_size);
            insert_iova_log(&mappings, &log, dirty, found);
        }
    }
}

/// Adds a log by IOVA to the set and to the model.
fn insert_iova_log(
    mappings: &[(At, At, u32)],
    log: &Log,
    dirty: &mut DirtyMemory,
    found: &mut BTreeSet<u64>,
) {
    let (mut iotlb, mut model) = (Iotlb::new(), Mappings::default());
    for (iova, target, len) in mappings.iter().take(MOST_STEPS) {
        let (iova, target, len) = (addr(*iova), addr(*target), *len as usize);
        let (from, to) = (GuestAddress(iova), GuestAddress(target));
        if iotlb.set_mapping(from, to, len, Permissions::Write).is_ok() {
            if let Some(last) = last_of(iova, len) {
                model.set(iova, last, Some((target, Permissions::Write)));
            }
        }
    }
    let mut unmapped = Vec::new();
    for (first, end) in log.pages() {
        let Ok(first) = u64::try_from(first) else {
            break;
        };
        let last = u64::try_from(end - 1).unwrap_or(u64::MAX);
        for (first, last, mapped) in model.parts(first, last) {
            let len = u128::from(last - first) + 1;
            match mapped {
                Some((target, _)) => found.extend(pages(target.into(), u128::from(target) + len)),
                None => unmapped.push((first, len)),
            }
        }
    }
    let mut missing = Vec::new();
    dirty.insert_iova_log(&iotlb, &log.words(), |range| {
        missing.push((range.base.0, range.length as u128));
    });
    assert_eq!(joined(missing), joined(unmapped));
}
