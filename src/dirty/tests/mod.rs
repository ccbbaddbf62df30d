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
        DirtyRegion::new(self, self)
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

/// Words of a log, of which many are empty or full.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    prop::collection::vec(word, 0..4)
}
