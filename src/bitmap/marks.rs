//! [`Marks`]: bits in words, with one summary bit for each line of words.
//!
//! ```text
//!   summary │ 0 1 0 0 … │              one bit per line: a harvest skips lines without marks
//!               │
//!   words   │ 8 words │ 8 words │ …    a line: one cache line, 512 marks
//! ```
//!
//! # Protocol
//!
//! A *writer* is a thread that writes to guest memory and marks the page:
//!
//! | step | operation | purpose |
//! |---|---|---|
//! | `D` | stores to guest memory | the data |
//! | `M` | `fetch_or` on the word | sets the mark |
//! | `L` | load of the summary | tests the bit of the line |
//! | `F` | `fetch_or` on the summary | sets that bit, only if `L` found it clear |
//!
//! A *harvest* drains the marks and then reads the pages:
//!
//! | step | operation | purpose |
//! |---|---|---|
//! | `T` | `swap` on the summary | drains the bits of the lines |
//! | `S` | loads of the words of each such line | skips the empty words |
//! | `H` | `swap` on each other word | drains the marks |
//! | `R` | loads from guest memory | reads the data |
//!
//! `M`, `L`, `F`, `T`, `S` and `H` are sequentially consistent. "The total order" below is the
//! single order of all sequentially consistent operations.
//!
//! # No interleaving loses a page
//!
//! **A harvest that finds a mark reads the data.** Every operation that changes a word is a
//! read-modify-write. The release sequence headed by `M` therefore extends to the `H` that finds
//! the mark, and `H` acquires what `M` released. So `D` happens before `R`.
//!
//! **The next harvest finds a completed mark.** Suppose a writer has completed its steps.
//!
//! 1. The summary had the bit of the line at that time: `F` set it or `L` found it.
//! 2. If no harvest has drained that bit since, the next harvest's `T` finds it.
//! 3. Otherwise some harvest's `T` drained it, after `L` or `F` in the total order. `M` precedes
//!    `L` and `F`, and `T` precedes its `S`. So `M` precedes `S` in the total order, and `S` finds
//!    the mark unless another harvest has drained it already.
//!
//! So a harvest that drains the bit of a line leaves no completed mark in that line. A
//! harvest also skips a summary word if a load finds it 0. That load is sequentially consistent
//! too, so a mark that it misses completes after it in the total order.
//!
//! **`L` is needed.** It is not enough that the writer that finds the word empty sets the summary
//! bit. That writer may be preempted between the two steps. A second writer of the same word would
//! then complete a mark that no harvest can find.
//!
//! # Testing before marking
//!
//! In this mode ([`Marks::test_and_set`]) the writer first tests the word, and then the summary, by
//! sequentially consistent loads. If both have the bits, it skips `M`, `L` and `F`. Alone, this
//! would lose pages. The loads may be satisfied before `D` becomes visible, and a harvest in
//! between would drain the mark and read the old data. An asymmetric pair of barriers prevents
//! that:
//!
//! | barrier | place | implementation |
//! |---|---|---|
//! | `B` | between `D` and the test | a compiler fence |
//! | `B'` | between `H` and `R` | `membarrier(2)`: a full barrier in every running thread |
//!
//! Of any two such barriers one comes first. If `B` comes first, `R` reads the data of `D`. If `B'`
//! comes first, the test comes after `T` and `H`, finds the mark or the summary bit missing, and
//! the writer marks.
//!
//! **The test of the summary follows that of the word.** The mark that the writer found may be that
//! of another writer, which has not set the summary bit yet. A harvest that loads the word earlier
//! finds it empty, and may have drained a stale summary bit. So the argument above must hold for
//! the mark that was found: its `M` precedes the test of the word, and that precedes the test of
//! the summary, which takes the place of `L`.
//!
//! # Verification
//!
//! `verify/loom` explores all interleavings with this file. Its mutants weaken `M`, `L`, `F`, `T`,
//! `S`, `H` and both barriers one by one, and show that a model loses a page for each. It also
//! lists the orderings that the models do not need.

use core::ops::Range;
use std::collections::TryReserveError;

use super::sync::{asymmetric_light_barrier, AtomicU64, Ordering};
use crate::bits::{
    each_bit, mask, position, summary_slot, words_of, LINE_BITS, LINE_WORDS, SUMMARY_WORDS,
    WORD_BITS,
};

/// The smallest number of words that has a summary. A harvest loads fewer words than these quickly,
/// and a mark without a summary is cheaper.
#[cfg(not(loom))]
const SUMMARY_FROM: usize = 1 << 15;
#[cfg(loom)]
const SUMMARY_FROM: usize = LINE_WORDS;

/// Bits that threads set and drain at the same time.
pub(super) struct Marks {
    words: Box<[AtomicU64]>,
    /// Empty if there are fewer than [`SUMMARY_FROM`] words: a harvest then loads all of them.
    summary: Box<[AtomicU64]>,
}

/// Prints the number of words only: a guest has millions of bits, and they change while printed.
impl core::fmt::Debug for Marks {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} words", self.words.len())
    }
}

impl Marks {
    /// Makes `words` words without marks.
    pub(super) fn new(words: usize) -> Self {
        let empty = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            words: empty(words),
            summary: empty(summary_len(words)),
        }
    }

    /// Makes `words` words without marks, or returns an error if memory runs out.
    pub(super) fn try_new(words: usize) -> Result<Self, TryReserveError> {
        let empty = |count| -> Result<Box<[AtomicU64]>, TryReserveError> {
            let mut words = Vec::new();
            words.try_reserve_exact(count)?;
            words.resize_with(count, || AtomicU64::new(0));
            Ok(words.into_boxed_slice())
        };
        Ok(Self {
            words: empty(words)?,
            summary: empty(summary_len(words))?,
        })
    }

    /// Returns the number of words.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    /// Returns the bits of a word; 0 past the last word.
    #[inline(always)]
    pub(super) fn word(&self, word: usize) -> u64 {
        self.words
            .get(word)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets bits of a word.
    #[inline(always)]
    pub(super) fn set(&self, word: usize, bits: u64) {
        if let Some(target) = self.words.get(word) {
            // Loaded first: a load after a locked instruction has to wait for it.
            let has_summary = !self.summary.is_empty();
            target.fetch_or(bits, Ordering::SeqCst);
            if has_summary {
                self.mark_summary(word);
            }
        }
    }

    /// Sets all bits of the words `first..end`, as far as they exist.
    pub(super) fn set_words(&self, first: usize, end: usize) {
        let end = end.min(self.words.len());
        let mut next = first;
        while next < end {
            let line_end = (next | (LINE_WORDS - 1)).saturating_add(1).min(end);
            for word in self.words.get(next..line_end).unwrap_or_default() {
                word.fetch_or(u64::MAX, Ordering::SeqCst);
            }
            self.mark_summary(next);
            next = line_end;
        }
    }

    /// Sets bits of a word, unless they are set already.
    ///
    /// Every harvest must then issue a process-wide barrier between draining the marks and reading
    /// the pages: see the [module documentation](self).
    #[inline(always)]
    pub(super) fn test_and_set(&self, word: usize, bits: u64) {
        asymmetric_light_barrier();
        let marked = self.words.get(word).is_some_and(|word| has(word, bits));
        let (slot, line) = summary_slot(word);
        // Without a summary, a harvest finds every word.
        let in_summary = || self.summary.get(slot).is_none_or(|lines| has(lines, line));
        if !(marked && in_summary()) {
            self.set(word, bits);
        }
    }

    /// Sets the bit of a word's line in the summary.
    #[inline(always)]
    fn mark_summary(&self, word: usize) {
        if self.summary.is_empty() {
            return;
        }
        let (slot, line) = summary_slot(word);
        if let Some(lines) = self.summary.get(slot) {
            if lines.load(Ordering::SeqCst) & line == 0 {
                lines.fetch_or(line, Ordering::SeqCst);
            }
        }
    }

    /// Clears bits of a word. The summary keeps the bit of the line, in case other words have
    /// marks.
    pub(super) fn clear(&self, word: usize, bits: u64) {
        if let Some(word) = self.words.get(word) {
            // A read-modify-write, so that it does not end a release sequence.
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    /// Drains the bits of a range, and calls `found` for each word that had some, ascending.
    pub(super) fn drain(&self, range: Range<usize>, mut found: impl FnMut(usize, u64)) {
        let all = self.words.len().saturating_mul(WORD_BITS);
        let range = range.start..range.end.min(all);
        if range.is_empty() {
            return;
        }
        let lines = range.start / LINE_BITS..range.end.div_ceil(LINE_BITS);
        // Lines that lie in the range as a whole. The last line of all may have fewer words.
        let whole_end = match range.end == all {
            true => lines.end,
            false => range.end / LINE_BITS,
        };
        let whole = range.start.div_ceil(LINE_BITS)..whole_end;
        let mut full = false;
        for (slot, lines) in words_of(lines) {
            let first_line = slot.saturating_mul(WORD_BITS);
            let whole = mask(
                whole.start.saturating_sub(first_line),
                whole.end.saturating_sub(first_line),
            );
            // Other lines keep their bit in the summary, and are searched whether it is set or not.
            let candidates = self.drain_summary(slot, whole) | (lines & !whole);
            for line in each_bit(candidates) {
                let first_word = first_line.saturating_add(line).saturating_mul(LINE_WORDS);
                match whole & position(line).1 {
                    0 => self.drain_part_of_line(first_word, &range, &mut found),
                    _ => full = self.drain_line(first_word, full, &mut found),
                }
            }
        }
    }

    /// Drains the bits `lines` of a word of the summary, and returns those that were set. Without a
    /// summary, returns all of them.
    #[inline]
    fn drain_summary(&self, slot: usize, lines: u64) -> u64 {
        let Some(word) = self.summary.get(slot) else {
            return lines;
        };
        if word.load(Ordering::SeqCst) & lines == 0 {
            return 0;
        }
        let marked = match lines {
            u64::MAX => word.swap(0, Ordering::SeqCst),
            _ => word.fetch_and(!lines, Ordering::SeqCst),
        };
        marked & lines
    }

    /// Drains a line, and returns whether every word of it had marks.
    #[inline(always)]
    fn drain_line(
        &self,
        first_word: usize,
        after_full: bool,
        found: &mut impl FnMut(usize, u64),
    ) -> bool {
        // After a full line, this one is probably full as well. Loads would skip nothing, and would
        // have to wait for the exchanges of the line before.
        let seen = match after_full {
            true => [u64::MAX; LINE_WORDS],
            false => self.load_line(first_word),
        };
        if seen.iter().fold(0, |all, bits| all | bits) == 0 {
            return false;
        }
        let mut full = true;
        for (number, bits) in self.swap_line(first_word, seen).into_iter().enumerate() {
            match bits {
                0 => full = false,
                _ => found(first_word.saturating_add(number), bits),
            }
        }
        full
    }

    /// Loads the words of a line; 0 for words that do not exist.
    #[inline(always)]
    fn load_line(&self, first_word: usize) -> [u64; LINE_WORDS] {
        let mut seen = [0; LINE_WORDS];
        let line = self.words.get(first_word..).unwrap_or_default();
        for (seen, word) in seen.iter_mut().zip(line) {
            *seen = word.load(Ordering::SeqCst);
        }
        seen
    }

    /// Drains the words of a line for which `seen` is not 0.
    ///
    /// It drains all of them before the caller gets any. An exchange waits for earlier stores, and
    /// those of the caller miss the cache.
    #[inline(always)]
    fn swap_line(&self, first_word: usize, seen: [u64; LINE_WORDS]) -> [u64; LINE_WORDS] {
        let mut drained = [0; LINE_WORDS];
        let line = self.words.get(first_word..).unwrap_or_default();
        for ((drained, seen), word) in drained.iter_mut().zip(seen).zip(line) {
            if seen != 0 {
                *drained = word.swap(0, Ordering::SeqCst);
            }
        }
        drained
    }

    /// Drains the bits of a line that lie in `range`.
    #[inline]
    fn drain_part_of_line(
        &self,
        first_word: usize,
        range: &Range<usize>,
        found: &mut impl FnMut(usize, u64),
    ) {
        let start = first_word.saturating_mul(WORD_BITS);
        let end = start.saturating_add(LINE_BITS);
        for (word, inside) in words_of(range.start.max(start)..range.end.min(end)) {
            match self
                .words
                .get(word)
                .map_or(0, |word| drain_word(word, inside))
            {
                0 => {}
                bits => found(word, bits),
            }
        }
    }

    /// Sets in `other` the marks found here, moved up by `first` words.
    pub(super) fn copy_to(&self, other: &Marks, first: usize) {
        for (number, word) in self.words.iter().enumerate() {
            match word.load(Ordering::Acquire) {
                0 => {}
                bits => other.set(first.saturating_add(number), bits),
            }
        }
    }
}

/// Returns the number of words in the summary of `words` words.
fn summary_len(words: usize) -> usize {
    match words < SUMMARY_FROM {
        true => 0,
        false => words.div_ceil(SUMMARY_WORDS),
    }
}

/// Returns whether a word has all of these bits.
#[inline(always)]
fn has(word: &AtomicU64, bits: u64) -> bool {
    let found = word.load(Ordering::SeqCst);
    found & bits == bits
}

/// Drains these bits of a word, and returns those that were set.
#[inline(always)]
fn drain_word(word: &AtomicU64, bits: u64) -> u64 {
    if word.load(Ordering::SeqCst) & bits == 0 {
        return 0;
    }
    let drained = match bits {
        u64::MAX => word.swap(0, Ordering::SeqCst),
        _ => word.fetch_and(!bits, Ordering::SeqCst),
    };
    drained & bits
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn drain_of_any_range_returns_its_bits_and_keeps_the_others() {
        let words = 3 * LINE_WORDS + 2;
        let bits: Vec<usize> = (0..words * WORD_BITS)
            .filter(|bit| bit % 37 == 5 || bit % 512 > 500)
            .collect();
        for (first, end) in [
            (0, usize::MAX),
            (0, 1),
            (5, 6),
            (64, 128),
            (511, 513),
            (512, 1024),
            (513, 1024),
            (500, 1600),
            (1536, 1664),
            (1600, 99_999),
            (9_999, 99_999),
            (700, 600),
        ] {
            let marks = Marks::new(words);
            for bit in &bits {
                marks.set(bit / WORD_BITS, 1 << (bit % WORD_BITS));
            }
            let drain = |range| {
                let mut drained = Vec::new();
                marks.drain(range, |word, bits| {
                    drained.extend(each_bit(bits).map(|bit| word * WORD_BITS + bit));
                });
                drained
            };
            let inside = |bit: &&usize| (first..end).contains(*bit);
            assert!(
                drain(first..end).iter().eq(bits.iter().filter(inside)),
                "{first}..{end}"
            );
            assert!(
                drain(0..usize::MAX)
                    .iter()
                    .eq(bits.iter().filter(|bit| !inside(bit))),
                "{first}..{end}"
            );
            assert!(drain(0..usize::MAX).is_empty());
        }
    }

    #[test]
    fn set_words_across_lines_and_past_the_end_sets_existing_words() {
        let marks = Marks::new(20);
        marks.set_words(6, 18);
        marks.set_words(19, 99);
        marks.set_words(30, 40);
        marks.test_and_set(2, 7);
        marks.test_and_set(7, 1);
        marks.test_and_set(99, 1);
        marks.clear(17, u64::MAX);
        let mut found = Vec::new();
        let copy = Marks::new(19);
        marks.copy_to(&copy, 1);
        marks.drain(19 * 64..usize::MAX, |word, bits| found.push((word, bits)));
        copy.drain(0..usize::MAX, |word, bits| found.push((word, bits)));
        let last = [(19, u64::MAX), (3, 7)];
        assert_eq!(
            found,
            last.into_iter()
                .chain((7..18).map(|word| (word, u64::MAX)))
                .collect::<Vec<_>>()
        );
    }
}
