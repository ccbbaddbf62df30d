//! Harvests of an [`AtomicBitmap`], merged logs, and pages that are put back.

use core::num::NonZeroUsize;
use core::ops::Range;

use super::super::dirty_pages::DirtyPages;
use super::super::external_log::log_ranges;
use super::AtomicBitmap;
use crate::bits::{bit_runs, for_each_word, mask, position, WORD_BITS};

impl AtomicBitmap {
    /// Harvests the bitmap: returns all marks and clears them.
    ///
    /// Bit `i` of word `w` is page `64 * w + i`. A page that is written during the harvest is in
    /// this result or in the next one.
    ///
    /// [`harvest_words`](Self::harvest_words) and [`harvest_into`](Self::harvest_into) do the same
    /// without an allocation.
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    #[doc(alias = "harvest")]
    pub fn get_and_reset(&self) -> Vec<u64> {
        let mut words = vec![0; self.len().div_ceil(WORD_BITS)];
        self.harvest_words(&mut words);
        words
    }

    /// Clears all marks.
    pub fn reset(&self) {
        self.marks.harvest(0..usize::MAX, &mut [], &mut []);
    }

    /// Harvests into `words`: adds the marks and clears them.
    ///
    /// Bit `i` of word `w` is page `64 * w + i`, as in `KVM_GET_DIRTY_LOG`. Bits that are set in
    /// `words` stay set, so that several logs can be merged in one buffer. Pages for which `words`
    /// has no bit stay marked.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.mark_dirty(0x1ffe, 4);
    ///
    /// let mut log = [0b1000]; // as KVM_GET_DIRTY_LOG filled it
    /// bitmap.harvest_words(&mut log);
    /// assert_eq!(log, [0b1110]);
    /// ```
    pub fn harvest_words(&self, words: &mut [u64]) {
        let pages = words.len().saturating_mul(WORD_BITS);
        self.marks.harvest(0..pages, words, &mut []);
    }

    /// Harvests into `dirty`: adds the marks of the bytes that `dirty` is for, and clears them.
    pub fn harvest_into(&self, dirty: &mut DirtyPages) {
        self.harvest_from(0, dirty);
    }

    /// Harvests the bytes that start at `offset`.
    ///
    /// A page that is only partly in this range, while the bitmap tracks its other bytes as well,
    /// is reported and stays marked. Its bit also stands for the other bytes, which are harvested
    /// separately.
    pub(in crate::bitmap) fn harvest_from(&self, offset: usize, dirty: &mut DirtyPages) {
        self.harvest_seen(offset, self.byte_size(), dirty);
    }

    /// Harvests the bytes that start at `offset`.
    ///
    /// `byte_size` is the number of tracked bytes that this thread has seen.
    pub(super) fn harvest_seen(&self, offset: usize, byte_size: usize, dirty: &mut DirtyPages) {
        let Some((first, last)) = self.pages_of(offset, dirty.byte_size()) else {
            return;
        };
        let size = self.page_size().get();
        let end = offset.saturating_add(dirty.byte_size());
        let last_page_end = last.saturating_add(1).saturating_mul(size);
        let first_is_shared = first.saturating_mul(size) < offset;
        let shares_last = |byte_size: usize| end < last_page_end.min(byte_size);
        let last_is_shared = shares_last(byte_size);
        for (shared, page) in [(first_is_shared, first), (last_is_shared, last)] {
            // If both are the same page, it is added twice, which has no further effect.
            if shared && self.is_bit_set(page) {
                let (word, bit) = position(page);
                self.add_found(offset, word, bit, dirty);
            }
        }
        let first = first.saturating_add(usize::from(first_is_shared));
        let harvested_end = last.saturating_add(usize::from(!last_is_shared));
        if dirty.page_size() == self.page_size() && offset == 0 {
            let (words, lines) = dirty.words_and_summary();
            self.marks.harvest(first..harvested_end, words, lines);
        } else {
            self.marks.harvest_each(first..harvested_end, |word, bits| {
                self.add_found(offset, word, bits, dirty)
            })
        }
        // The bitmap may have grown in the meantime. A thread that marks one of the new bytes has
        // seen the growth, and the harvest acquires what that thread released. So if the harvest
        // found a mark of a new byte, this load finds the new size.
        if !last_is_shared && shares_last(self.byte_size()) {
            let start = last.saturating_mul(size).saturating_sub(offset);
            if dirty.contains(start) {
                self.set_bit(last);
            }
        }
    }

    /// Adds the pages of a word to a set of the bytes that start at `offset`.
    fn add_found(&self, offset: usize, word: usize, bits: u64, dirty: &mut DirtyPages) {
        let size = self.page_size().get();
        let page = word.saturating_mul(WORD_BITS);
        for run in bit_runs(core::iter::once((0, bits))) {
            let start = page.saturating_add(run.start).saturating_mul(size);
            let end = start.saturating_add(run.len().saturating_mul(size));
            // The first page may begin before the offset.
            let from = start.max(offset);
            dirty.insert_range(from.saturating_sub(offset), end.saturating_sub(from));
        }
    }

    /// Returns about how many pages are dirty. The marks stay.
    ///
    /// Writers may mark at the same time. It loads each word of the bitmap. A large bitmap has a
    /// summary, by which it skips lines of eight words without marks.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.mark_dirty(0x1ffe, 4);
    /// assert_eq!(bitmap.estimate_pages(), 2);
    /// assert_eq!(bitmap.get_and_reset(), [0b110]);
    /// ```
    #[must_use]
    pub fn estimate_pages(&self) -> usize {
        self.marks.count(0..self.len())
    }

    /// Returns about how many of the `len` bytes at `offset` are in dirty pages.
    pub(in crate::bitmap) fn estimate_from(&self, offset: usize, len: usize) -> usize {
        let Some((first, last)) = self.pages_of(offset, len) else {
            return 0;
        };
        let pages = self.marks.count(first..last.saturating_add(1));
        pages.saturating_mul(self.page_size().get()).min(len)
    }

    /// Marks the pages of a log, whose first byte is at `offset`.
    ///
    /// Bit `i` of word `w` stands for page `64 * w + i`, in pages of `page_size` bytes. This merges
    /// the log of KVM, of a vhost back end or of a device. Bits past the end of the bitmap are
    /// ignored.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x2000).unwrap());
    /// bitmap.set_from_words(0, &[0b1001], NonZeroUsize::new(0x1000).unwrap());
    /// assert_eq!(bitmap.get_and_reset(), [0b11]);
    /// ```
    pub fn set_from_words(&self, offset: usize, words: &[u64], page_size: NonZeroUsize) {
        let first_page = offset / self.page_size();
        let aligned =
            offset.is_multiple_of(self.page_size().get()) && first_page.is_multiple_of(WORD_BITS);
        if page_size == self.page_size() && aligned {
            let first = first_page / WORD_BITS;
            return self.set_whole_words((first..).zip(words.iter().copied()));
        }
        self.set_ranges(log_ranges(0, offset, words, page_size, self.byte_size()));
    }

    /// Marks harvested pages again, after their transfer failed.
    ///
    /// `dirty` may be the whole harvest or any part of it.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
    ///
    /// let page = NonZeroUsize::new(0x1000).unwrap();
    /// let bitmap = AtomicBitmap::new(0x10_000, page);
    /// bitmap.mark_dirty(0x3000, 1);
    ///
    /// let mut dirty = DirtyPages::new(0x10_000, page);
    /// bitmap.harvest_into(&mut dirty);
    /// // The connection broke before these pages were sent.
    /// bitmap.put_back(&dirty);
    /// assert_eq!(bitmap.get_and_reset(), [0b1000]);
    /// ```
    pub fn put_back(&self, dirty: &DirtyPages) {
        if dirty.page_size() == self.page_size() {
            self.set_whole_words(dirty.dirty_words())
        } else {
            self.set_ranges(dirty.runs())
        }
    }

    /// Marks ranges of bytes, given relative to `offset`.
    pub(in crate::bitmap) fn put_back_at(
        &self,
        offset: usize,
        ranges: &mut dyn Iterator<Item = Range<usize>>,
    ) {
        // The sum wraps, as it does in `BaseSlice::mark_dirty`.
        self.set_ranges(ranges.map(|range| {
            let start = offset.wrapping_add(range.start);
            start..start.saturating_add(range.len())
        }));
    }

    /// Marks the pages of ranges of bytes. If the ranges ascend, each word is updated once.
    fn set_ranges(&self, ranges: impl Iterator<Item = Range<usize>>) {
        let pages = ranges.filter_map(|range| self.pages_of(range.start, range.len()));
        let pages = pages.map(|(first, last)| first..last.saturating_add(1));
        for_each_word(pages, |word, bits| self.set_word(word, bits));
    }

    /// Sets the bits of `words` that stand for pages of this bitmap.
    fn set_whole_words(&self, words: impl Iterator<Item = (usize, u64)>) {
        let pages = self.len();
        let end = pages.div_ceil(WORD_BITS);
        for (word, bits) in words.take_while(|(word, _)| *word < end) {
            let left = pages.saturating_sub(word.saturating_mul(WORD_BITS));
            let bits = bits & mask(0, left);
            if bits != 0 {
                self.set_word(word, bits);
            }
        }
    }

    /// Sets bits of a word, all of which stand for pages that exist.
    ///
    /// Makes a read-modify-write without a load before it: harvested pages are usually clean.
    fn set_word(&self, word: usize, bits: u64) {
        if let Some((marks, word)) = self.marks.locate(word) {
            marks.set(word, bits);
        }
    }
}
