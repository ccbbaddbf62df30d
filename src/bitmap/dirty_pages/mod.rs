//! [`DirtyPages`]: a set of dirty pages as plain data.

#[cfg(test)]
mod tests;

use core::iter::FusedIterator;
use core::num::NonZeroUsize;
use core::ops::Range;
use std::collections::TryReserveError;

use super::external_log::{log_ranges, skip_words};
use crate::bits::{
    bit_number, bit_runs, each_bit, mask, position, summary_slot, words_of, BitRuns, LINE_WORDS,
    SUMMARY_WORDS, WORD_BITS,
};
use crate::zeroed::try_zeroed;

/// A set of dirty pages of a range of memory, as plain data.
///
/// A harvest adds to the set, so the set can merge several logs. Pages whose transfer failed stay
/// in it for the next round. Sets can be combined: [`union_with`](Self::union_with),
/// [`difference_with`](Self::difference_with), [`intersect_with`](Self::intersect_with).
///
/// The set takes one bit per page, and a summary by which [`clear`](Self::clear) and
/// [`runs`](Self::runs) skip clean pages. Their cost follows the number of dirty pages.
///
/// Offsets and lengths are in bytes. A page that may be dirty is never lost. A range that begins
/// or ends inside a page of the set includes the whole page.
///
/// # Examples
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
/// // A device keeps a log of its own, with one bit per 8 KiB.
/// dirty.add_words(0, &[0b100], NonZeroUsize::new(0x2000).unwrap());
/// assert_eq!(dirty.runs().nth(1), Some(0x4000..0x6000));
/// assert_eq!(dirty.total_pages(), 5);
///
/// // The balloon gave up this range: it need not be sent.
/// dirty.remove_range(0x4000, 0x2000);
/// assert_eq!(dirty.total_pages(), 3);
/// ```
#[doc(alias = "page set")]
#[doc(alias = "KVM_GET_DIRTY_LOG")]
#[derive(Clone, Debug)]
pub struct DirtyPages {
    words: Vec<u64>,
    /// One bit per line of words. It is set if any word of the line is not 0.
    summary: Vec<u64>,
    byte_size: usize,
    page_size: NonZeroUsize,
}

impl DirtyPages {
    /// Creates an empty set for `byte_size` bytes of memory, in pages of `page_size` bytes.
    ///
    /// If memory runs out, the process ends, as it does for a `Vec`. Use [`try_new`](Self::try_new)
    /// for a size that the caller does not control, such as one from the source of a migration.
    pub fn new(byte_size: usize, page_size: NonZeroUsize) -> Self {
        let words = byte_size.div_ceil(page_size.get()).div_ceil(WORD_BITS);
        Self {
            words: vec![0; words],
            summary: vec![0; words.div_ceil(SUMMARY_WORDS)],
            byte_size,
            page_size,
        }
    }

    /// Creates an empty set like [`new`](Self::new), but returns an error if memory runs out.
    ///
    /// # Errors
    ///
    /// Returns an error if memory runs out.
    pub fn try_new(byte_size: usize, page_size: NonZeroUsize) -> Result<Self, TryReserveError> {
        let words = byte_size.div_ceil(page_size.get()).div_ceil(WORD_BITS);
        Ok(Self {
            words: try_zeroed(words)?,
            summary: try_zeroed(words.div_ceil(SUMMARY_WORDS))?,
            byte_size,
            page_size,
        })
    }

    /// Returns the size in bytes of the memory that the set is for.
    pub fn byte_size(&self) -> usize {
        self.byte_size
    }

    /// Returns the size of a page in bytes.
    pub fn page_size(&self) -> NonZeroUsize {
        self.page_size
    }

    /// Returns the set as words: bit `i` of word `w` is page `64 * w + i`.
    ///
    /// This is the layout of the log of `KVM_GET_DIRTY_LOG` (Linux,
    /// Documentation/virt/kvm/api.rst, section 4.8).
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Returns whether no page is dirty.
    pub fn is_empty(&self) -> bool {
        self.dirty_words().next().is_none()
    }

    /// Returns the number of dirty pages.
    pub fn total_pages(&self) -> usize {
        self.dirty_words()
            .map(|(_, bits)| bit_number(bits.count_ones()))
            .fold(0, usize::saturating_add)
    }

    /// Returns whether the page of the byte at `offset` is dirty.
    ///
    /// Returns `false` past the end of the memory.
    pub fn contains(&self, offset: usize) -> bool {
        let (word, bit) = position(offset / self.page_size);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Removes all pages. The buffers stay allocated.
    pub fn clear(&mut self) {
        let lines = self.words.chunks_mut(SUMMARY_WORDS);
        for (lines, words) in self.summary.iter_mut().zip(lines) {
            match core::mem::take(lines) {
                0 => {}
                // One call for all lines is faster than one for each.
                u64::MAX => words.fill(0),
                some => {
                    for line in each_bit(some) {
                        words_of_line(words, line).fill(0);
                    }
                }
            }
        }
    }

    /// Adds the pages of the `len` bytes at `offset`, ignoring bytes past the end of the memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::DirtyPages;
    ///
    /// let mut dirty = DirtyPages::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// dirty.insert_range(0x1fff, 2);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [0x1000..0x3000]);
    /// ```
    pub fn insert_range(&mut self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).min(self.byte_size);
        let Some(last) = end.checked_sub(1).filter(|last| *last >= offset) else {
            return;
        };
        let (first, last) = (offset / self.page_size, last / self.page_size);
        for (word, bits) in words_of(first..last.saturating_add(1)) {
            self.add_word(word, bits);
        }
    }

    /// Removes the pages that are entirely in the `len` bytes at `offset`.
    ///
    /// A page that is only partly in the range stays, because its other part may be dirty. The last
    /// page of the memory ends with the memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::DirtyPages;
    ///
    /// let mut dirty = DirtyPages::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// dirty.insert_range(0, 0x5000);
    /// dirty.remove_range(0x1800, 0x2800);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [0..0x2000, 0x4000..0x5000]);
    /// ```
    #[doc(alias = "KVM_CLEAR_DIRTY_LOG")]
    pub fn remove_range(&mut self, offset: usize, len: usize) {
        let size = self.page_size.get();
        let end = offset.saturating_add(len);
        let end_page = if end < self.byte_size {
            end / self.page_size
        } else {
            self.byte_size.div_ceil(size)
        };
        for (word, bits) in words_of(offset.div_ceil(size)..end_page) {
            // The summary may keep the bit of a line that is now empty.
            if let Some(target) = self.words.get_mut(word) {
                *target &= !bits;
            }
        }
    }

    /// Adds the pages that `other` covers, completely or partly.
    ///
    /// Both sets begin at the same byte of memory; they may differ in page size and length.
    pub fn union_with(&mut self, other: &DirtyPages) {
        if other.page_size == self.page_size {
            let pages = self.byte_size.div_ceil(self.page_size.get());
            for (word, bits) in other.dirty_words() {
                let left = pages.saturating_sub(word.saturating_mul(WORD_BITS));
                self.add_word(word, bits & mask(0, left));
            }
        } else {
            for run in other.runs() {
                self.insert_range(run.start, run.len());
            }
        }
    }

    /// Removes the pages that `other` covers completely.
    ///
    /// Both sets begin at the same byte of memory; they may differ in page size and length. Pages
    /// that `other` covers only partly stay.
    pub fn difference_with(&mut self, other: &DirtyPages) {
        if other.page_size == self.page_size {
            // The last page of `other` may cover only a part of a page of this set.
            let whole = if other.byte_size < self.byte_size {
                other.byte_size / other.page_size
            } else {
                usize::MAX
            };
            for (word, bits) in other.dirty_words() {
                let left = whole.saturating_sub(word.saturating_mul(WORD_BITS));
                if let Some(target) = self.words.get_mut(word) {
                    *target &= !(bits & mask(0, left));
                }
            }
        } else {
            for run in other.runs() {
                self.remove_range(run.start, run.len());
            }
        }
    }

    /// Keeps only the pages that `other` covers, completely or partly.
    ///
    /// Both sets begin at the same byte of memory; they may differ in page size and length.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::DirtyPages;
    ///
    /// let page = NonZeroUsize::new(0x1000).unwrap();
    /// let mut dirty = DirtyPages::new(0x8000, page);
    /// dirty.insert_range(0, 0x4000);
    /// let mut working_set = DirtyPages::new(0x8000, page);
    /// working_set.insert_range(0x3000, 0x3000);
    /// dirty.intersect_with(&working_set);
    /// assert_eq!(dirty.runs().collect::<Vec<_>>(), [0x3000..0x4000]);
    /// ```
    pub fn intersect_with(&mut self, other: &DirtyPages) {
        let converted;
        let kept = if other.page_size == self.page_size {
            &other.words
        } else {
            let mut pages = DirtyPages::new(self.byte_size, self.page_size);
            pages.union_with(other);
            converted = pages.words;
            &converted
        };
        let mut kept = kept.chunks(SUMMARY_WORDS);
        let lines = self.words.chunks_mut(SUMMARY_WORDS);
        for (lines, words) in self.summary.iter().zip(lines) {
            let kept = kept.next().unwrap_or_default();
            for line in each_bit(*lines) {
                let first = line.saturating_mul(LINE_WORDS);
                let kept = kept.get(first..).unwrap_or_default().iter().copied();
                let kept = kept.chain(core::iter::repeat(0));
                for (word, kept) in words_of_line(words, line).iter_mut().zip(kept) {
                    *word &= kept;
                }
            }
        }
    }

    /// Adds the pages of a log, whose first byte is at `offset`.
    ///
    /// Bit `i` of word `w` stands for page `64 * w + i`, in pages of `page_size` bytes. Bits past
    /// the end of the memory are ignored, and words past it are not read.
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

    /// Adds a log whose first `skipped` bytes are before this memory.
    pub(crate) fn add_words_before(
        &mut self,
        skipped: u64,
        words: &[u64],
        page_size: NonZeroUsize,
    ) {
        let (skipped, words) = skip_words(skipped, words, page_size);
        match skipped {
            0 => self.add_words(0, words, page_size),
            _ => self.add_log(skipped, 0, words, page_size),
        }
    }

    fn add_log(&mut self, skipped: usize, offset: usize, words: &[u64], page_size: NonZeroUsize) {
        for range in log_ranges(skipped, offset, words, page_size, self.byte_size) {
            self.insert_range(range.start, range.len());
        }
    }

    /// Returns the dirty pages as ranges of bytes, ascending. Adjacent pages are one range.
    ///
    /// The last range ends with the memory, if its last page is dirty.
    pub fn runs(&self) -> DirtyRuns<'_> {
        self.runs_of(self.dirty_words())
    }

    /// Returns the dirty ranges at and after `offset`, and possibly a few ranges before it.
    ///
    /// The cost does not depend on the pages before `offset`.
    pub(crate) fn runs_around(&self, offset: usize) -> DirtyRuns<'_> {
        let line = offset / self.page_size / WORD_BITS / LINE_WORDS;
        let slot = line / WORD_BITS;
        let lines = self.summary.get(slot).copied().unwrap_or(0);
        self.runs_of(DirtyWords {
            pages: self,
            slot,
            lines: lines & mask(line % WORD_BITS, WORD_BITS),
            words: 0..0,
        })
    }

    fn runs_of<'a>(&self, words: DirtyWords<'a>) -> DirtyRuns<'a> {
        DirtyRuns {
            runs: bit_runs(words),
            page_size: self.page_size.get(),
            byte_size: self.byte_size,
        }
    }

    /// Returns the words and their summary.
    pub(super) fn words_and_summary(&mut self) -> (&mut [u64], &mut [u64]) {
        (&mut self.words, &mut self.summary)
    }

    /// Adds bits of a word, all of which stand for pages that exist.
    #[inline]
    pub(super) fn add_word(&mut self, word: usize, bits: u64) {
        let Some(target) = self.words.get_mut(word) else {
            return;
        };
        // If the word was not empty, the summary has its line already.
        if *target == 0 {
            let (slot, line) = summary_slot(word);
            if let Some(lines) = self.summary.get_mut(slot) {
                *lines |= line;
            }
        }
        *target |= bits;
    }

    /// Returns the words that are not 0, ascending.
    pub(super) fn dirty_words(&self) -> DirtyWords<'_> {
        DirtyWords {
            pages: self,
            slot: 0,
            lines: self.summary.first().copied().unwrap_or(0),
            words: 0..0,
        }
    }
}

/// Returns the words of a line, given the words that its word of the summary stands for.
fn words_of_line(words: &mut [u64], line: usize) -> &mut [u64] {
    let first = line.saturating_mul(LINE_WORDS).min(words.len());
    let end = first.saturating_add(LINE_WORDS).min(words.len());
    words.get_mut(first..end).unwrap_or_default()
}

/// An iterator over the words of a [`DirtyPages`] that are not 0.
#[derive(Clone, Debug)]
pub(super) struct DirtyWords<'a> {
    pages: &'a DirtyPages,
    /// The number of the current word of the summary, and its remaining bits.
    slot: usize,
    lines: u64,
    /// The remaining words of the current line.
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
                self.slot = self.slot.saturating_add(1);
                self.lines = *self.pages.summary.get(self.slot)?;
            }
            let line = bit_number(self.lines.trailing_zeros());
            self.lines &= self.lines.wrapping_sub(1);
            let first = self
                .slot
                .saturating_mul(WORD_BITS)
                .saturating_add(line)
                .saturating_mul(LINE_WORDS);
            self.words = first..first.saturating_add(LINE_WORDS);
        }
    }
}

/// An iterator over dirty pages as ranges of bytes, created by [`DirtyPages::runs`].
#[derive(Clone, Debug)]
#[must_use = "iterators do nothing unless they are consumed"]
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

impl FusedIterator for DirtyRuns<'_> {}
