//! [`LargePages`]: the pages of larger pages that are in a balloon.

use std::collections::BTreeMap;
use std::ops::Range;

use vm_memory::arithmetic::{bit_number, words_of, WORD_BITS};

/// The pages of one region that are in a balloon, by their larger page.
///
/// Pages are numbered from the start of the region.
#[derive(Debug)]
pub(super) struct LargePages {
    /// The number of pages in each larger page. It is not 0.
    pages_each: usize,
    /// Larger pages of which at least one page is in the balloon, by their number.
    larger: BTreeMap<usize, Collected>,
}

/// The pages of one larger page that are in the balloon.
#[derive(Debug)]
enum Collected {
    All,
    /// Not all of them.
    Some {
        /// The number of bits that are set.
        count: usize,
        /// One bit for each page.
        words: Box<[u64]>,
    },
}

impl LargePages {
    /// Creates an empty set of pages for a region with larger pages of `pages_each` pages.
    pub(super) fn new(pages_each: usize) -> Self {
        Self {
            pages_each: pages_each.max(1),
            larger: BTreeMap::new(),
        }
    }

    /// Adds `count` pages of one larger page.
    ///
    /// Returns whether they complete it: all of its pages are in the set now, and were not before.
    pub(super) fn add(&mut self, first: usize, count: usize) -> bool {
        let (number, bit) = self.position(first);
        let pages_each = self.pages_each;
        let none = || Collected::Some {
            count: 0,
            words: vec![0; pages_each.div_ceil(WORD_BITS)].into(),
        };
        let collected = self.larger.entry(number).or_insert_with(none);
        collected.add(bit..bit.saturating_add(count), pages_each)
    }

    /// Removes `count` pages, which may be in several larger pages.
    pub(super) fn remove(&mut self, first: usize, count: usize) {
        let end = first.saturating_add(count);
        let mut at = first;
        while at < end {
            let (number, bit) = self.position(at);
            let here = self
                .pages_each
                .saturating_sub(bit)
                .min(end.saturating_sub(at));
            if let Some(collected) = self.larger.get_mut(&number) {
                if collected.remove(bit..bit.saturating_add(here), self.pages_each) {
                    self.larger.remove(&number);
                }
            }
            at = at.saturating_add(here);
        }
    }

    /// Returns the number of the larger page that contains a page, and the page's number in it.
    fn position(&self, page: usize) -> (usize, usize) {
        let number = page.checked_div(self.pages_each).unwrap_or(0);
        (number, page.checked_rem(self.pages_each).unwrap_or(0))
    }
}

impl Collected {
    /// Adds pages, and returns whether all are in the set now and were not before.
    fn add(&mut self, pages: Range<usize>, pages_each: usize) -> bool {
        let Collected::Some { count, words } = self else {
            return false;
        };
        for (number, mask) in words_of(pages) {
            if let Some(word) = words.get_mut(number) {
                *count = count.saturating_add(bit_number((mask & !*word).count_ones()));
                *word |= mask;
            }
        }
        let is_complete = *count >= pages_each;
        if is_complete {
            *self = Collected::All;
        }
        is_complete
    }

    /// Removes pages, and returns whether none is left.
    fn remove(&mut self, pages: Range<usize>, pages_each: usize) -> bool {
        if let Collected::All = self {
            let mut words = vec![0; pages_each.div_ceil(WORD_BITS)].into_boxed_slice();
            for (word, (_, mask)) in words.iter_mut().zip(words_of(0..pages_each)) {
                *word = mask;
            }
            *self = Collected::Some {
                count: pages_each,
                words,
            };
        }
        let Collected::Some { count, words } = self else {
            return false;
        };
        for (number, mask) in words_of(pages) {
            if let Some(word) = words.get_mut(number) {
                *count = count.saturating_sub(bit_number((mask & *word).count_ones()));
                *word &= !mask;
            }
        }
        *count == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The number of larger pages that have memory, and of those with a bit for each page.
    fn used(pages: &LargePages) -> (usize, usize) {
        let has_words = |collected: &&Collected| matches!(collected, Collected::Some { .. });
        let with_words = pages.larger.values().filter(has_words).count();
        (pages.larger.len(), with_words)
    }

    #[test]
    fn add_of_last_page_completes_a_larger_page_once() {
        let mut pages = LargePages::new(512);
        assert!(!pages.add(512, 511));
        assert!(!pages.add(600, 10));
        assert!(pages.add(1023, 1));
        assert!(!pages.add(512, 512));
        pages.remove(700, 1);
        assert!(!pages.add(701, 1));
        assert!(pages.add(700, 1));
        // A complete page has no bits.
        assert_eq!(used(&pages), (1, 0));
        pages.remove(0, 4096);
        assert_eq!(used(&pages), (0, 0));
    }

    proptest! {
        #[test]
        fn add_and_remove_equal_a_set_of_pages(
            pages_each in prop::sample::select(vec![2usize, 4, 16, 64, 100, 192]),
            steps in prop::collection::vec((0u8..3, 0usize..4, 0usize..200, 1usize..200), 1..60),
        ) {
            let (mut pages, mut model) = (LargePages::new(pages_each), BTreeSet::new());
            for (kind, number, bit, count) in steps {
                let first = number * pages_each + bit % pages_each;
                if kind == 0 {
                    pages.remove(first, count);
                    (first..first + count).for_each(|page| { model.remove(&page); });
                } else {
                    let count = count.min(pages_each - bit % pages_each);
                    let before = model.len();
                    model.extend(first..first + count);
                    let mut all = number * pages_each..(number + 1) * pages_each;
                    let completed = model.len() > before && all.all(|page| model.contains(&page));
                    prop_assert_eq!(pages.add(first, count), completed);
                }
                let per_page = |number| {
                    let all = number * pages_each..(number + 1) * pages_each;
                    model.range(all).count()
                };
                let counts: Vec<usize> = (0..10).map(per_page).collect();
                let in_use = counts.iter().filter(|count| **count > 0).count();
                let complete = counts.iter().filter(|count| **count == pages_each).count();
                prop_assert_eq!(used(&pages), (in_use, in_use - complete));
            }
        }
    }
}
