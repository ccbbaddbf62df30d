//! [`DirtyPages`]: what a harvest found, as words and as runs.

use core::iter::FusedIterator;
use core::num::NonZeroUsize;
use core::ops::Range;

use super::bits::{each_bit, mask, WORD_BITS};

/// Words that a bit of the summary is for.
const LINE_WORDS: usize = 8;

/// The dirty pages of a range of memory, as plain data.
///
/// A harvest adds to it: pages of several logs come together in one, and pages whose transfer failed stay in it for the next round.
/// [`clear`](Self::clear) takes time by what is in there, not by how long the range is.
///
/// ```
/// use std::num::NonZeroUsize;
/// use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
///
/// let page = NonZeroUsize::new(0x1000).unwrap();
/// let bitmap = AtomicBitmap::new(0x10_000, page);
/// bitmap.mark_dirty(0x1ffe, 4);
/// bitmap.mark_dirty(0xf000, 1);
///
/// let mut dirty = DirtyPages::new(0x10_000, page);
/// bitmap.harvest_into(&mut dirty);
/// assert_eq!(dirty.runs().collect::<Vec<_>>(), [0x1000..0x3000, 0xf000..0x10_000]);
///
/// // The device has written too, and its log has a bit for each 8 KiB.
/// dirty.add_words(0, &[0b100], NonZeroUsize::new(0x2000).unwrap());
/// assert_eq!(dirty.runs().next(), Some(0x1000..0x3000));
/// assert_eq!(dirty.runs().nth(1), Some(0x4000..0x6000));
/// assert_eq!(dirty.total_pages(), 5);
/// ```
#[derive(Clone, Debug)]
pub struct DirtyPages {
    words: Vec<u64>,
    /// A bit for each line of words that may have one.
    summary: Vec<u64>,
    byte_size: usize,
    page_size: NonZeroUsize,
}

impl DirtyPages {
    /// Makes an empty one for `byte_size` bytes in pages of `page_size` bytes.
    pub fn new(byte_size: usize, page_size: NonZeroUsize) -> Self {
        let words = byte_size.div_ceil(page_size.get()).div_ceil(WORD_BITS);
        Self {
            words: vec![0; words],
            summary: vec![0; words.div_ceil(LINE_WORDS.saturating_mul(WORD_BITS))],
            byte_size,
            page_size,
        }
    }

    /// Returns how many bytes it is for.
    pub fn byte_size(&self) -> usize {
        self.byte_size
    }

    /// Returns the size of a page in bytes.
    pub fn page_size(&self) -> NonZeroUsize {
        self.page_size
    }

    /// Returns the words: bit `i` of word `w` is page `64 * w + i`, as in the log of `KVM_GET_DIRTY_LOG` (Linux, Documentation/virt/kvm/api.rst, 4.8).
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Returns whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.dirty_words().next().is_none()
    }

    /// Returns how many pages are dirty.
    pub fn total_pages(&self) -> usize {
        self.dirty_words()
            .map(|(_, bits)| usize::try_from(bits.count_ones()).unwrap_or(0))
            .fold(0, usize::saturating_add)
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        let under = LINE_WORDS.saturating_mul(WORD_BITS);
        for (lines, words) in self.summary.iter_mut().zip(self.words.chunks_mut(under)) {
            match core::mem::take(lines) {
                0 => {}
                // All at once, which takes less time.
                u64::MAX => words.fill(0),
                some => {
                    for line in each_bit(some) {
                        let first = line.saturating_mul(LINE_WORDS);
                        let end = first.saturating_add(LINE_WORDS).min(words.len());
                        words.get_mut(first..end).unwrap_or_default().fill(0);
                    }
                }
            }
        }
    }

    /// Adds the pages of the `len` bytes at `offset`. Bytes past the end are passed over.
    pub fn add_range(&mut self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).min(self.byte_size);
        let Some(last) = end.checked_sub(1).filter(|last| *last >= offset) else {
            return;
        };
        let (first, last) = (offset / self.page_size, last / self.page_size);
        for word in first / WORD_BITS..=last / WORD_BITS {
            let start = word.saturating_mul(WORD_BITS);
            let end = last.saturating_add(1).saturating_sub(start);
            self.add_word(word, mask(first.saturating_sub(start), end));
        }
    }

    /// Adds a log of another's: bit `i` of word `w` stands for `page_size` bytes, the first of them at `offset`. Bits past the end are passed over.
    pub fn add_words(&mut self, offset: usize, words: &[u64], page_size: NonZeroUsize) {
        let first_page = offset / self.page_size;
        let aligned =
            offset.is_multiple_of(self.page_size.get()) && first_page.is_multiple_of(WORD_BITS);
        if page_size == self.page_size && aligned {
            let last = self.byte_size.div_ceil(self.page_size.get());
            for (word, &bits) in (first_page / WORD_BITS..self.words.len()).zip(words) {
                if bits != 0 {
                    let left = last.saturating_sub(word.saturating_mul(WORD_BITS));
                    self.add_word(word, bits & mask(0, left));
                }
            }
            return;
        }
        self.add_log(0, offset, words, page_size);
    }

    /// Adds a log that began before: its first `skipped` bytes are not in here.
    pub(crate) fn add_words_before(
        &mut self,
        skipped: u64,
        words: &[u64],
        page_size: NonZeroUsize,
    ) {
        let (skipped, words) = pass_over(skipped, words, page_size);
        match skipped {
            0 => self.add_words(0, words, page_size),
            _ => self.add_log(skipped, 0, words, page_size),
        }
    }

    fn add_log(&mut self, skipped: usize, offset: usize, words: &[u64], page_size: NonZeroUsize) {
        for range in log_ranges(skipped, offset, words, page_size, self.byte_size) {
            self.add_range(range.start, range.len());
        }
    }

    /// Returns the dirty pages as ranges of bytes, ascending, neighbours joined. The last one ends where the memory does.
    pub fn runs(&self) -> DirtyRuns<'_> {
        DirtyRuns {
            runs: bit_runs(self.dirty_words()),
            page_size: self.page_size.get(),
            byte_size: self.byte_size,
        }
    }

    /// Returns the dirty pages that have bytes from `offset` on, and maybe a few before it: it takes no time by what lies before.
    pub(crate) fn runs_around(&self, offset: usize) -> DirtyRuns<'_> {
        let line = offset / self.page_size / WORD_BITS / LINE_WORDS;
        let above = line / WORD_BITS;
        let lines = self.summary.get(above).copied().unwrap_or(0);
        DirtyRuns {
            runs: bit_runs(DirtyWords {
                pages: self,
                above,
                lines: lines & mask(line % WORD_BITS, WORD_BITS),
                words: 0..0,
            }),
            page_size: self.page_size.get(),
            byte_size: self.byte_size,
        }
    }

    /// Adds bits of a word, of pages that exist.
    #[inline]
    pub(super) fn add_word(&mut self, word: usize, bits: u64) {
        let Some(target) = self.words.get_mut(word) else {
            return;
        };
        // Where it was not empty, its line is noted.
        if *target == 0 {
            let line = word / LINE_WORDS;
            if let Some(above) = self.summary.get_mut(line / WORD_BITS) {
                *above |= 1u64 << (line % WORD_BITS);
            }
        }
        *target |= bits;
    }

    /// The words that are not empty, ascending.
    pub(super) fn dirty_words(&self) -> DirtyWords<'_> {
        DirtyWords {
            pages: self,
            above: 0,
            lines: self.summary.first().copied().unwrap_or(0),
            words: 0..0,
        }
    }
}

/// The words of a [`DirtyPages`] that are not empty.
#[derive(Clone, Debug)]
pub(super) struct DirtyWords<'a> {
    pages: &'a DirtyPages,
    /// The word of the summary at hand, and what is left of it.
    above: usize,
    lines: u64,
    /// What is left of the line at hand.
    words: Range<usize>,
}

impl Iterator for DirtyWords<'_> {
    type Item = (usize, u64);

    fn next(&mut self) -> Option<(usize, u64)> {
        loop {
            for word in self.words.by_ref() {
                match self.pages.words.get(word) {
                    Some(0) | None => {}
                    Some(&bits) => return Some((word, bits)),
                }
            }
            while self.lines == 0 {
                self.above = self.above.saturating_add(1);
                self.lines = *self.pages.summary.get(self.above)?;
            }
            let line = usize::try_from(self.lines.trailing_zeros()).unwrap_or(0);
            self.lines &= self.lines.wrapping_sub(1);
            let first = self
                .above
                .saturating_mul(WORD_BITS)
                .saturating_add(line)
                .saturating_mul(LINE_WORDS);
            self.words = first..first.saturating_add(LINE_WORDS);
        }
    }
}

/// Passes over the words of a log that are of its first `skipped` bytes only. Returns how many bytes are left to pass over, and the words.
pub(crate) fn pass_over(skipped: u64, words: &[u64], page_size: NonZeroUsize) -> (usize, &[u64]) {
    let wide = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    let of_word = wide(page_size.get()).saturating_mul(wide(WORD_BITS));
    let gone = usize::try_from(skipped.checked_div(of_word).unwrap_or(0)).unwrap_or(usize::MAX);
    let left = skipped.checked_rem(of_word).unwrap_or(0);
    // Where it does not fit, there is less memory than a word of the log stands for.
    let left = usize::try_from(left).unwrap_or(usize::MAX);
    (left, words.get(gone..).unwrap_or_default())
}

/// The ranges of a log, as bytes of the `byte_size` that it is for: its first byte is at `offset` there, or its first `skipped` bytes are not in there. It
/// ends where the memory does, however long the log is.
pub(crate) fn log_ranges(
    skipped: usize,
    offset: usize,
    words: &[u64],
    page_size: NonZeroUsize,
    byte_size: usize,
) -> impl Iterator<Item = Range<usize>> + '_ {
    let size = page_size.get();
    let bytes = skipped.saturating_add(byte_size.saturating_sub(offset));
    let end = bytes.div_ceil(size).div_ceil(WORD_BITS).min(words.len());
    let words = words.get(..end).unwrap_or_default();
    bit_runs(words.iter().copied().enumerate()).filter_map(move |run| {
        let byte = |page: usize| {
            let byte = page.saturating_mul(size).saturating_sub(skipped);
            offset.saturating_add(byte).min(byte_size)
        };
        let range = byte(run.start)..byte(run.end);
        (!range.is_empty()).then_some(range)
    })
}

/// The runs of bits that are set, in words that ascend.
pub(super) fn bit_runs<I: Iterator<Item = (usize, u64)>>(words: I) -> BitRuns<I> {
    BitRuns {
        words,
        word: 0,
        bits: 0,
    }
}

/// See [`bit_runs`].
#[derive(Clone, Debug)]
pub(super) struct BitRuns<I> {
    words: I,
    /// The word at hand, and what is left of it.
    word: usize,
    bits: u64,
}

impl<I: Iterator<Item = (usize, u64)>> BitRuns<I> {
    /// Takes the ones that the word at hand has from bit `from` on, and returns the number behind them.
    fn ones(&mut self, from: u32) -> usize {
        let behind = from.saturating_add(self.bits.wrapping_shr(from).trailing_ones());
        self.bits &= match 1u64.checked_shl(behind) {
            Some(end) => !end.wrapping_sub(1),
            None => 0,
        };
        let behind = usize::try_from(behind).unwrap_or(WORD_BITS);
        self.word.saturating_mul(WORD_BITS).saturating_add(behind)
    }
}

impl<I: Iterator<Item = (usize, u64)>> Iterator for BitRuns<I> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        while self.bits == 0 {
            (self.word, self.bits) = self.words.next()?;
        }
        let from = self.bits.trailing_zeros();
        let start = self
            .word
            .saturating_mul(WORD_BITS)
            .saturating_add(usize::try_from(from).unwrap_or(0));
        let mut end = self.ones(from);
        // It may go on at the start of the next word.
        while end.is_multiple_of(WORD_BITS) {
            match self.words.next() {
                Some((word, bits)) => (self.word, self.bits) = (word, bits),
                None => break,
            }
            if self.word.saturating_mul(WORD_BITS) != end || self.bits & 1 == 0 {
                break;
            }
            end = self.ones(0);
        }
        Some(start..end)
    }
}

/// Goes over dirty pages as ranges of bytes: from [`DirtyPages::runs`].
#[derive(Clone, Debug)]
pub struct DirtyRuns<'a> {
    runs: BitRuns<DirtyWords<'a>>,
    page_size: usize,
    byte_size: usize,
}

impl Iterator for DirtyRuns<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let run = self.runs.next()?;
        let byte = |page: usize| page.saturating_mul(self.page_size).min(self.byte_size);
        Some(byte(run.start)..byte(run.end))
    }
}

/// Nothing comes after the last one.
impl FusedIterator for DirtyRuns<'_> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages(byte_size: usize, page_size: usize) -> DirtyPages {
        DirtyPages::new(byte_size, NonZeroUsize::new(page_size).unwrap())
    }

    #[test]
    fn runs_go_over_words_and_end_with_the_memory() {
        let mut dirty = pages(200 * 16 + 3, 16);
        assert!(dirty.is_empty() && dirty.runs().next().is_none());
        dirty.add_range(16 * 60, 16 * 68);
        dirty.add_range(16 * 200, 1);
        dirty.add_range(16 * 201, 1);
        dirty.add_range(5, 0);
        assert_eq!(
            dirty.runs().collect::<Vec<_>>(),
            [16 * 60..16 * 128, 16 * 200..16 * 200 + 3]
        );
        assert_eq!(dirty.total_pages(), 69);
        dirty.clear();
        assert!(dirty.is_empty() && dirty.words().iter().all(|word| *word == 0));
        assert!(pages(0, 1).runs().next().is_none());
    }

    /// A log of all of memory is gone through as far as the region goes, whatever comes behind.
    #[test]
    fn a_log_takes_no_time_by_what_lies_behind() {
        let log = vec![0u64; 1 << 24];
        let page = NonZeroUsize::new(16).unwrap();
        let mut dirty = pages(64 * 16, 16);
        let mut quickest = |add: &mut dyn FnMut(&mut DirtyPages)| {
            let time = |_| {
                let start = std::time::Instant::now();
                add(&mut dirty);
                start.elapsed()
            };
            // The quickest of some: the machine may have other things to do.
            (0..20).map(time).min().unwrap()
        };
        let most = std::time::Duration::from_millis(1);
        assert!(quickest(&mut |dirty| dirty.add_words(3, &log, page)) < most);
        assert!(
            quickest(&mut |dirty| dirty.add_words(0, &log, NonZeroUsize::new(32).unwrap())) < most
        );
        assert!(quickest(&mut |dirty| dirty.add_words_before(17, &log, page)) < most);
        assert!(quickest(&mut |dirty| dirty.add_words_before(64 * 16 * 5 + 1, &log, page)) < most);
    }

    #[test]
    fn runs_begin_where_they_are_asked_for() {
        let mut dirty = pages(16 * 64 * 8 * 200, 16);
        for line in [0, 63, 64, 70, 199] {
            dirty.add_range(16 * 64 * 8 * line + 16, 1);
        }
        let first = |line: usize| {
            let run = dirty.runs_around(16 * 64 * 8 * line).next();
            run.map(|run| run.start / (16 * 64 * 8))
        };
        assert_eq!(
            [0, 1, 63, 64, 65, 71, 199].map(first),
            [0, 63, 63, 64, 70, 199, 199].map(Some)
        );
        assert_eq!(first(200), None);
    }

    proptest! {
        /// Against a set of single pages: any page size, any log, any offset.
        #[test]
        fn ranges_and_logs_are_what_they_are_page_by_page(
            byte_size in 0usize..40_000,
            page_size in 1usize..70,
            ranges in prop::collection::vec((0usize..50_000, 0usize..5000), 0..6),
            logs in prop::collection::vec((0usize..20_000, prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..8), prop_oneof![Just(None), (1usize..200).prop_map(Some)]), 0..4),
        ) {
            let mut dirty = pages(byte_size, page_size);
            let mut model = BTreeSet::new();
            for (offset, len) in ranges {
                dirty.add_range(offset, len);
                model.extend((offset..offset + len).filter(|byte| *byte < byte_size).map(|byte| byte / page_size));
            }
            for (offset, words, log_page) in logs {
                let log_page = log_page.unwrap_or(page_size);
                // An offset at a word of the same pages is the quick way.
                let offset = if log_page == page_size { offset / (64 * page_size) * 64 * page_size } else { offset };
                dirty.add_words(offset, &words, NonZeroUsize::new(log_page).unwrap());
                for bit in 0..words.len() * 64 {
                    if words[bit / 64] >> (bit % 64) & 1 != 0 {
                        let start = offset + bit * log_page;
                        model.extend((start..start + log_page).filter(|byte| *byte < byte_size).map(|byte| byte / page_size));
                    }
                }
            }
            prop_assert_eq!(dirty.total_pages(), model.len());
            prop_assert_eq!(dirty.is_empty(), model.is_empty());
            let mut last_end = None;
            let mut found = BTreeSet::new();
            for run in dirty.runs() {
                prop_assert!(run.start < run.end && run.end <= byte_size);
                prop_assert!(last_end.is_none_or(|end| end < run.start), "neighbours are one run");
                last_end = Some(run.end);
                found.extend(run.map(|byte| byte / page_size));
            }
            prop_assert_eq!(found, model);
        }
    }
}
