//! Harvests of an [`AtomicBitmap`], logs that are added to it, and what is put back.

use core::num::NonZeroUsize;
use core::ops::Range;

use super::super::barrier::barrier_in_all_threads;
use super::super::dirty_pages::DirtyPages;
use super::super::log_ranges::log_ranges;
use super::AtomicBitmap;
use crate::bits::{bit_runs, gather_words, mask, position, WORD_BITS};

impl AtomicBitmap {
    /// Harvests the bitmap: returns all marks and clears them.
    ///
    /// Bit `i` of word `w` is page `64 * w + i`. A page that is written while this runs is in the result, or will be in the next.
    /// [`harvest_words`](Self::harvest_words) and [`harvest_into`](Self::harvest_into) need no memory of their own.
    pub fn get_and_reset(&self) -> Vec<u64> {
        let mut words = vec![0; self.len().div_ceil(WORD_BITS)];
        self.harvest_words(&mut words);
        words
    }

    /// Clears all marks.
    pub fn reset(&self) {
        self.marks.take(0, usize::MAX, |_, _| {});
        self.after_taking(|bitmap| bitmap.set_addr_range(0, usize::MAX));
    }

    /// Harvests into a buffer: adds the marks of as many pages as it has bits for, and clears them. Returns how many words had some.
    ///
    /// Bit `i` of word `w` is page `64 * w + i`, as in `KVM_GET_DIRTY_LOG`. What is in the buffer stays: several logs may come together in it.
    /// Pages that it has no bits for stay marked.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    ///
    /// let bitmap = AtomicBitmap::new(0x10_000, NonZeroUsize::new(0x1000).unwrap());
    /// bitmap.mark_dirty(0x1ffe, 4);
    /// let mut log = [0b1000]; // KVM's
    /// assert_eq!(bitmap.harvest_words(&mut log), 1);
    /// assert_eq!(log, [0b1110]);
    /// ```
    pub fn harvest_words(&self, words: &mut [u64]) -> usize {
        let mut found = 0usize;
        self.marks
            .take(0, words.len().saturating_mul(WORD_BITS), |word, bits| {
                if let Some(target) = words.get_mut(word) {
                    *target |= bits;
                    found = found.saturating_add(1);
                }
            });
        self.after_taking(|bitmap| bitmap.set_from_words(0, words, bitmap.page_size()));
        found
    }

    /// Harvests into a [`DirtyPages`]: adds the marks of as many bytes as that is for, and clears them.
    pub fn harvest_into(&self, dirty: &mut DirtyPages) {
        self.harvest_from(0, dirty);
    }

    /// Harvests the bytes from `offset` on.
    pub(in crate::bitmap) fn harvest_from(&self, offset: usize, dirty: &mut DirtyPages) {
        if self.take_from(offset, dirty) && barrier_in_all_threads().is_err() {
            self.put_back_at(offset, &mut dirty.runs());
        }
    }

    /// Takes the marks of the bytes from `offset` on. Returns whether a barrier in all threads has to come before those bytes are read; where there can be
    /// none, all that is in `dirty` is to be put back.
    ///
    /// A page that has bytes of these and tracked ones of others is not taken: its one bit says that some of them were written, and those others belong to
    /// somebody who has not looked yet. It is looked at, and stays marked.
    pub(in crate::bitmap) fn take_from(&self, offset: usize, dirty: &mut DirtyPages) -> bool {
        let Some((first, last)) = self.pages_of(offset, dirty.byte_size()) else {
            return false;
        };
        let size = self.page_size().get();
        let (behind, behind_last) = (
            offset.saturating_add(dirty.byte_size()),
            last.saturating_add(1).saturating_mul(size),
        );
        let of_others_before = first.saturating_mul(size) < offset;
        let of_others_behind = behind < behind_last.min(self.byte_size());
        for (of_others, page) in [(of_others_before, first), (of_others_behind, last)] {
            // Twice if it is the same page, which does no harm.
            if of_others && self.is_bit_set(page) {
                let (word, bit) = position(page);
                self.add_found(offset, word, bit, dirty);
            }
        }
        let first = first.saturating_add(usize::from(of_others_before));
        let end = last.saturating_add(usize::from(!of_others_behind));
        match dirty.page_size() == self.page_size() && offset == 0 {
            true => self
                .marks
                .take(first, end, |word, bits| dirty.add_word(word, bits)),
            false => self.marks.take(first, end, |word, bits| {
                self.add_found(offset, word, bits, dirty)
            }),
        }
        self.looks_first()
    }

    /// Adds the pages of a word to those of the bytes from `offset` on.
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

    /// Marks what another log has: bit `i` of word `w` stands for `page_size` bytes, the first of them at `offset`.
    ///
    /// For what KVM, a vhost back end or a device logged in words of its own. Bits past the end are passed over.
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

    /// Marks pages again whose transfer failed: undoes a harvest, or a part of one.
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
    ///
    /// let page = NonZeroUsize::new(0x1000).unwrap();
    /// let bitmap = AtomicBitmap::new(0x10_000, page);
    /// bitmap.mark_dirty(0x3000, 1);
    /// let mut dirty = DirtyPages::new(0x10_000, page);
    /// bitmap.harvest_into(&mut dirty);
    /// bitmap.put_back(&dirty);
    /// assert_eq!(bitmap.get_and_reset(), [0b1000]);
    /// ```
    pub fn put_back(&self, dirty: &DirtyPages) {
        match dirty.page_size() == self.page_size() {
            true => self.set_whole_words(dirty.dirty_words()),
            false => self.set_ranges(dirty.runs()),
        }
    }

    /// Marks ranges of bytes again that begin at `offset`.
    pub(in crate::bitmap) fn put_back_at(
        &self,
        offset: usize,
        ranges: &mut dyn Iterator<Item = Range<usize>>,
    ) {
        // The sum wraps as that of a slice does.
        self.set_ranges(ranges.map(|range| {
            let start = offset.wrapping_add(range.start);
            start..start.saturating_add(range.len())
        }));
    }

    /// Marks the pages of ranges of bytes that ascend: one read-modify-write a word, however many of them lie in it.
    fn set_ranges(&self, ranges: impl Iterator<Item = Range<usize>>) {
        let look = self.looks_first();
        let pages = ranges.filter_map(|range| self.pages_of(range.start, range.len()));
        let pages = pages.map(|(first, last)| first..last.saturating_add(1));
        for (word, bits) in gather_words(pages) {
            self.update_word(word, bits, look);
        }
    }

    /// Marks what words say, as far as there are such pages.
    fn set_whole_words(&self, words: impl Iterator<Item = (usize, u64)>) {
        let (look, pages) = (self.looks_first(), self.len());
        let end = pages.div_ceil(WORD_BITS);
        for (word, bits) in words.take_while(|(word, _)| *word < end) {
            let left = pages.saturating_sub(word.saturating_mul(WORD_BITS));
            let bits = bits & mask(0, left);
            if bits != 0 {
                self.update_word(word, bits, look);
            }
        }
    }

    /// The barrier that stands between taking marks and reading bytes where writers look first. Without one, the marks are put back.
    #[inline]
    pub(super) fn after_taking(&self, put_back: impl FnOnce(&Self)) {
        if self.looks_first() && barrier_in_all_threads().is_err() {
            put_back(self);
        }
    }
}
