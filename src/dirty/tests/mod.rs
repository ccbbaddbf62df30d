//! Compares each structure of this module with a model that is a set of bytes.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::ops::Range;

use proptest::prelude::*;

use super::region::DirtyRegion;
use super::LogWords;
use crate::bitmap::{DirtyLog, DirtyPages};
use crate::guest_memory::{GuestAddress, GuestUsize, MemoryRegionAddress};
use crate::region::{GuestMemoryRegion, GuestMemoryRegionBytes};

mod log_words;
mod region;
mod shared;

/// The addresses of the bytes in some ranges.
type ByteSet = BTreeSet<u64>;

/// A region that is not mapped in this process, with the log that tracks it.
struct Device {
    start: u64,
    page_size: NonZeroUsize,
    marks: Option<(usize, usize)>,
    /// For each byte, whether it can be read.
    readable: Vec<bool>,
}

impl Device {
    /// Returns the first address after the region, which must not be the end of the address space.
    fn end(&self) -> u64 {
        self.start + self.readable.len() as u64
    }

    fn dirty_region(&self) -> DirtyRegion {
        DirtyRegion::try_new(self, self).unwrap()
    }

    /// Returns all bytes of the pages that have one of these bytes.
    fn whole_pages(&self, bytes: impl IntoIterator<Item = u64>) -> ByteSet {
        let size = self.page_size.get() as u64;
        let inside = bytes
            .into_iter()
            .filter(|byte| (self.start..self.end()).contains(byte));
        let pages: BTreeSet<u64> = inside.map(|byte| (byte - self.start) / size).collect();
        let start_of = |page: u64| self.start + page * size;
        pages
            .into_iter()
            .flat_map(|page| start_of(page)..start_of(page + 1).min(self.end()))
            .collect()
    }
}

impl GuestMemoryRegionBytes for Device {}

impl GuestMemoryRegion for Device {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.readable.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) {}

    fn reachable_range(&self, addr: MemoryRegionAddress, count: usize) -> Range<usize> {
        let bytes = &self.readable[addr.0 as usize..][..count];
        let start = bytes.iter().position(|readable| *readable);
        let start = start.unwrap_or(count);
        let len = bytes[start..].iter().take_while(|readable| **readable);
        start..start + len.count()
    }
}

impl DirtyLog for Device {
    fn page_size(&self) -> NonZeroUsize {
        self.page_size
    }

    fn bitmap_and_offset(&self) -> Option<(usize, usize)> {
        self.marks
    }

    fn harvest_into(&self, _: &mut DirtyPages) {
        unreachable!("a DirtyRegion does not harvest")
    }

    fn put_back(&self, _: &mut dyn Iterator<Item = Range<usize>>) {
        unreachable!("a DirtyRegion does not put back")
    }
}

fn page_size(bytes: usize) -> NonZeroUsize {
    NonZeroUsize::new(bytes).unwrap()
}

/// Returns the bytes of runs, which must ascend and not be empty.
fn bytes_of(runs: impl Iterator<Item = (GuestAddress, usize)>) -> ByteSet {
    let mut bytes = ByteSet::new();
    let mut end = 0;
    for (start, len) in runs {
        assert!(start.0 >= end && len > 0, "{start:?}, {len} after {end:#x}");
        end = start.0 + len as u64;
        bytes.extend(start.0..end);
    }
    bytes
}

/// Returns the guest addresses of the dirty pages of a log.
fn bytes_of_log(log: &LogWords<'_>) -> ByteSet {
    let size = log.page_size.get() as u64;
    let is_dirty = |bit: &u64| log.words[*bit as usize / 64] >> (bit % 64) & 1 != 0;
    let pages = (0..log.words.len() as u64 * 64).filter(is_dirty);
    pages
        .map(|page| log.start.0 + page * size)
        .flat_map(|start| start..start + size)
        .collect()
}

/// Generates the words of a log. Many of them are empty or full.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    prop::collection::vec(word, 0..4)
}

#[test]
#[cfg(feature = "backend-mmap")]
fn harvest_with_log_for_each_region_takes_linear_time() {
    use super::{region::LOGS_ADDED, DirtyMemory};
    let starts = || (0..100u64).map(|number| GuestAddress(number * 0x2000));
    let ranges: Vec<_> = starts().map(|start| (start, 0x1000)).collect();
    let memory: crate::GuestMemoryMmap<crate::bitmap::AtomicBitmap> =
        crate::GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let page_size = NonZeroUsize::new(0x80).unwrap();
    // Each log reaches only its region.
    let log = |start, words| LogWords::new(start, words, page_size);
    let logs: Vec<_> = starts().map(|start| log(start, &[0b1])).collect();
    let mut dirty = DirtyMemory::new();
    LOGS_ADDED.set(0);
    dirty.harvest_with(&memory, &logs);
    assert_eq!((dirty.total_pages(), LOGS_ADDED.get()), (100, 100));

    let all = [u64::MAX; 100];
    dirty.clear();
    LOGS_ADDED.set(0);
    dirty.harvest_with(&memory, &[log(GuestAddress(0x3000), &all)]);
    // The log reaches the 98 regions at 0x4000 and above.
    assert_eq!((dirty.total_pages(), LOGS_ADDED.get()), (98, 98));
}

#[test]
#[cfg(all(unix, feature = "backend-mmap"))]
fn harvest_with_log_for_each_region_of_one_mapping_takes_linear_time() {
    use super::{region::LOGS_ADDED, DirtyMemory};
    use crate::{GuestMemoryMmap, GuestRegionMmap, MmapRegion};
    let mapping = MmapRegion::<crate::bitmap::AtomicBitmap>::new(0x1000).unwrap();
    let mapping = std::sync::Arc::new(mapping);
    let starts = || (0..100u64).map(|number| GuestAddress(number * 0x2000));
    let regions = starts()
        .map(|start| GuestRegionMmap::with_arc(std::sync::Arc::clone(&mapping), start).unwrap());
    let memory = GuestMemoryMmap::from_regions(regions.collect()).unwrap();
    // Each log reaches only its region.
    let page_size = NonZeroUsize::new(0x40).unwrap();
    let log = |start| LogWords::new(start, &[0b1], page_size);
    let logs: Vec<_> = starts().map(log).collect();
    let mut dirty = DirtyMemory::new();
    LOGS_ADDED.set(0);
    dirty.harvest_with(&memory, &logs);
    // Each region shows the page.
    assert_eq!((dirty.total_pages(), LOGS_ADDED.get()), (100, 100));
}
