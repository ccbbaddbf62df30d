//! Marks, and logs of other parties with pages of any size at any address. The dirty pages must
//! match a set of pages after each step.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::dirty::{DirtyMemory, LogWords};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::model::PAGE;

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
                let words: Vec<u64> = words.into_iter().take(MOST_WORDS).collect();
                let page_size = usize::try_from(page_size)
                    .ok()
                    .and_then(NonZeroUsize::new)
                    .unwrap_or(NonZeroUsize::MIN);
                let start = addr(at);
                let log = LogWords {
                    start: GuestAddress(start),
                    words: &words,
                    page_size,
                };
                dirty.add_log(&memory, &log);
                for bit in
                    (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 != 0)
                {
                    let first = u128::from(start) + bit as u128 * page_size.get() as u128;
                    found.extend(pages(first, first + page_size.get() as u128));
                }
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
        }
        let seen: BTreeSet<u64> = dirty
            .runs()
            .flat_map(|(start, len)| (0..len as u64 / PAGE).map(move |page| start.0 + page * PAGE))
            .collect();
        assert_eq!(seen, found);
        assert_eq!(dirty.total_bytes(), found.len() as u64 * PAGE);
    }
}
