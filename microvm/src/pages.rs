//! Sets of guest pages: what was dirtied, and what must have been.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestRam, PAGE};

/// Pages of the regions of one guest memory, a bit for each, in the order of KVM's log and of
/// `AtomicBitmap`: bit `n % 64` of word `n / 64` is page `n` of the region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    regions: Vec<Region>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    pages: u64,
    words: Vec<u64>,
}

impl PageMap {
    /// No page of `ram`.
    pub fn new(ram: &GuestRam) -> Self {
        let layout: Vec<_> = ram.iter().map(|r| (r.start_addr().0, r.len())).collect();
        Self::with_layout(&layout)
    }

    /// No page of regions given as (guest address, length in bytes).
    pub fn with_layout(layout: &[(u64, u64)]) -> Self {
        let region = |&(start, len): &(u64, u64)| {
            let pages = len.div_ceil(PAGE);
            Region {
                start,
                pages,
                words: vec![0; pages.div_ceil(64) as usize],
            }
        };
        Self {
            regions: layout.iter().map(region).collect(),
        }
    }

    /// Adds every page that `len` bytes at guest address `addr` touch. Bytes that no region holds
    /// have no page and are left out.
    pub fn add(&mut self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|n| addr.saturating_add(n)) else {
            return;
        };
        for region in &mut self.regions {
            let end = region.start.saturating_add(region.pages * PAGE);
            if last < region.start || addr >= end {
                continue;
            }
            let first = (addr.max(region.start) - region.start) / PAGE;
            for page in first..=(last.min(end - 1) - region.start) / PAGE {
                if let Some(word) = region.words.get_mut((page / 64) as usize) {
                    *word |= 1 << (page % 64);
                }
            }
        }
    }

    /// Adds the pages of one region, given as the words of a dirty log. Bits past the region's last
    /// page are no pages.
    pub fn set_words(&mut self, region: usize, words: &[u64]) {
        let Some(region) = self.regions.get_mut(region) else {
            return;
        };
        for (mine, theirs) in region.words.iter_mut().zip(words) {
            *mine |= theirs;
        }
        if let (Some(last), tail @ 1..) = (region.words.last_mut(), region.pages % 64) {
            *last &= (1 << tail) - 1;
        }
    }

    /// How many pages there are.
    pub fn count(&self) -> u64 {
        self.words().map(|w| u64::from(w.count_ones())).sum()
    }

    /// For each region its guest address, and how many of its pages are in the set.
    pub fn counts(&self) -> Vec<(u64, u64)> {
        let count = |r: &Region| r.words.iter().map(|w| u64::from(w.count_ones())).sum();
        self.regions.iter().map(|r| (r.start, count(r))).collect()
    }

    /// Pages of all regions, in the set or not.
    pub fn all(&self) -> u64 {
        self.regions.iter().map(|r| r.pages).sum()
    }

    /// The guest address of the first page.
    pub fn first(&self) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let (index, word) = r.words.iter().enumerate().find(|(_, w)| **w != 0)?;
            Some(r.start + (index as u64 * 64 + u64::from(word.trailing_zeros())) * PAGE)
        })
    }

    /// The pages that are here and not in `other`, a set over the same memory.
    pub fn minus(&self, other: &Self) -> Self {
        self.combine(other, |mine, theirs| mine & !theirs)
    }

    /// The pages that are here, in `other`, or in both.
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, |mine, theirs| mine | theirs)
    }

    /// The pages that are both here and in `other`.
    pub fn both(&self, other: &Self) -> Self {
        self.combine(other, |mine, theirs| mine & theirs)
    }

    /// For each region its guest address, and `cells` flags: whether the set has a page
    /// in that part of it. A region of fewer pages than that has a flag a page.
    pub fn strips(&self, cells: u64) -> Vec<(u64, Vec<bool>)> {
        let strip = |r: &Region| {
            let cells = cells.min(r.pages);
            let flags = (0..cells).map(|cell| {
                let (from, to) = (cell * r.pages / cells, (cell + 1) * r.pages / cells);
                r.any(from, to)
            });
            (r.start, flags.collect())
        };
        self.regions.iter().map(strip).collect()
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions.iter().flat_map(|r| r.words.iter().copied())
    }

    fn combine(&self, other: &Self, op: impl Fn(u64, u64) -> u64) -> Self {
        let mut result = self.clone();
        for (mine, theirs) in result.regions.iter_mut().zip(&other.regions) {
            for (index, word) in mine.words.iter_mut().enumerate() {
                *word = op(*word, theirs.words.get(index).copied().unwrap_or(0));
            }
        }
        result
    }
}

impl Region {
    /// Whether one of the pages `from..to` is set. Looks at words, not pages: a 64 GiB guest has
    /// 16 million pages.
    fn any(&self, from: u64, to: u64) -> bool {
        let (mut page, mut found) = (from, false);
        while page < to && !found {
            let (word, bit) = (page / 64, page % 64);
            let bits = (to - page).min(64 - bit);
            let mask = (u64::MAX >> (64 - bits)) << bit;
            found = self.words.get(word as usize).is_some_and(|w| w & mask != 0);
            page += bits;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: [(u64, u64); 2] = [(0, 130 * PAGE), (1 << 32, 10 * PAGE)];

    #[test]
    fn a_range_touches_its_pages_and_no_others() {
        let mut set = PageMap::with_layout(&LAYOUT);
        set.add(PAGE - 1, 2);
        set.add((1 << 32) + 3 * PAGE, PAGE);
        set.add(7 * PAGE, 0);
        assert_eq!((set.count(), set.all()), (3, 140));
        assert_eq!(set.counts(), [(0, 2), (1 << 32, 1)]);
        assert_eq!(set.first(), Some(0));
    }

    #[test]
    fn what_no_region_holds_has_no_page() {
        let mut set = PageMap::with_layout(&LAYOUT);
        set.add(130 * PAGE, 1 << 20);
        set.add(u64::MAX, u64::MAX);
        assert_eq!(set.count(), 0);
        set.add(0, u64::MAX);
        assert_eq!(set.count(), 140);
    }

    #[test]
    fn bits_behind_the_last_page_are_dropped() {
        let mut set = PageMap::with_layout(&LAYOUT);
        set.set_words(0, &[u64::MAX; 4]);
        set.set_words(1, &[u64::MAX]);
        set.set_words(2, &[u64::MAX]);
        assert_eq!(set.count(), 140);
    }

    #[test]
    fn sets_combine() {
        let (mut a, mut b) = (PageMap::with_layout(&LAYOUT), PageMap::with_layout(&LAYOUT));
        a.add(0, 100 * PAGE);
        b.add(90 * PAGE, 20 * PAGE);
        assert_eq!(a.minus(&b).count(), 90);
        assert_eq!(b.minus(&a).first(), Some(100 * PAGE));
        assert_eq!(a.union(&b).count(), 110);
        assert_eq!(a.both(&b).count(), 10);
    }

    #[test]
    fn strips_against_a_page_by_page_model() {
        for pages in [1, 7, 63, 64, 65, 130, 1000] {
            for dirty in 0..pages {
                let mut set = PageMap::with_layout(&[(0, pages * PAGE)]);
                set.add(dirty * PAGE, 1);
                let strips = set.strips(64);
                let (start, cells) = &strips[0];
                assert_eq!(*start, 0);
                let n = cells.len() as u64;
                assert_eq!(n, pages.min(64));
                for (cell, &set) in cells.iter().enumerate() {
                    let cell = cell as u64;
                    let want = (cell * pages / n..(cell + 1) * pages / n).contains(&dirty);
                    assert_eq!(set, want, "page {dirty} of {pages}, cell {cell}");
                }
            }
        }
    }
}
