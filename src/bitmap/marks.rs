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
//! | `W` | full fence | orders the data before the check |
//! | `L` | load of the word | checks the mark |
//! | `M` | `fetch_or` on the word | sets the mark, only if `L` found it missing |
//! | `LS` | load of the summary | checks the bit of the line |
//! | `MS` | `fetch_or` on the summary | sets that bit, only if `LS` found it missing |
//!
//! For one word ([`Marks::mark`]), a relaxed load comes first. If it finds a bit missing, the
//! writer skips `W` and `L`: the page is clean, and `M` orders the data as well. [`Marks::set`]
//! always does so. For a range ([`Marks::mark_range`]), one `W` precedes the checks of all words.
//!
//! A *harvest* clears the marks and then reads the pages:
//!
//! | step | operation | purpose |
//! |---|---|---|
//! | `T` | `swap` on the summary | reads and clears the bits of the lines |
//! | `S` | loads of the words of each such line | skips the empty words |
//! | `H` | `swap` on each other word | reads and clears the marks |
//! | `F` | full fence | orders the cleared marks before the data |
//! | `R` | loads from guest memory | reads the data |
//!
//! All operations but `D`, `R` and the first load of a word are sequentially consistent. "The total
//! order" below is the single order of all sequentially consistent operations and fences. `F` ends
//! [`Marks::harvest`], which is the only way to clear a mark. The callback of `harvest` must not
//! read guest memory, because the fence follows it.
//!
//! # No interleaving loses a page
//!
//! **A harvest that clears the mark of a page reads its data, or the page is marked again.** Let
//! `M` be the operation that set the cleared mark: that of the writer, or of another writer whose
//! mark `L` found.
//!
//! 1. The writer's own `M`: every operation that changes a word is a read-modify-write. The release
//!    sequence headed by `M` therefore extends to the `H` that finds the mark, and `H` acquires
//!    what `M` released. So `D` happens before `R`.
//! 2. Another writer's `M`: the writer executed `W`. If `W` precedes the harvest's `F` in the total
//!    order, `R` reads the data of `D`. Otherwise `H` precedes `F`, `W` and `L` in that order. So
//!    `L` did not find a mark that `H` cleared: the mark that it found was set after `H`, and a
//!    later harvest clears it. The same holds for that harvest.
//!
//! **The next harvest finds a completed mark.** Suppose a writer has completed its steps, and `M`
//! is the operation that set the mark: its own, or the one that `L` found. `M` precedes `LS` in the
//! total order, directly or by `L`.
//!
//! 1. The summary had the bit of the line at that time: `MS` set it or `LS` found it.
//! 2. If no harvest has cleared that bit since, the next harvest's `T` finds it.
//! 3. Otherwise some harvest's `T` cleared it, after `LS` or `MS` in the total order, and `T`
//!    precedes its `S`. So `M` precedes `S` in the total order, and `S` finds the mark unless
//!    another harvest has cleared it already.
//!
//! So a harvest that clears the bit of a line leaves no completed mark in that line. A harvest also
//! skips a summary word if a load finds it 0. That load is sequentially consistent too, so a mark
//! that it misses completes after it in the total order.
//!
//! **`LS` is necessary, and must follow `L`.** The mark that `L` found may be that of another
//! writer, which has not set the summary bit yet. The bit that `LS` finds may be stale: a harvest
//! of a part of a line leaves it. If `LS` came first, a harvest could clear the bit and find the
//! word empty, before the other writer's `M`. The writer would complete a mark that the next
//! harvest does not find.
//!
//! # Verification
//!
//! `verify/loom` explores all interleavings with this file. Its mutants weaken each operation and
//! leave out each fence, one by one, and show that a model loses a page. It also lists the
//! orderings that the models do not need. `super::sync` counts the read-modify-writes in tests.

use core::ops::Range;
use std::collections::TryReserveError;

use super::sync::{fence, try_words, AtomicU64, Ordering};
use crate::bits::{
    bits_between, each_bit, mask, position, summary_slot, words_of, LINE_BITS, LINE_WORDS,
    SUMMARY_WORDS, WORD_BITS,
};

/// The minimum number of words for which there is a summary. Without one, marks are cheaper, and a
/// harvest loads so few words quickly.
#[cfg(not(loom))]
const SUMMARY_FROM: usize = 1 << 15;
#[cfg(loom)]
const SUMMARY_FROM: usize = LINE_WORDS;

/// Bits that threads set and harvest at the same time.
pub(super) struct Marks {
    words: Box<[AtomicU64]>,
    /// Empty if there are fewer than [`SUMMARY_FROM`] words: a harvest then loads all of them.
    summary: Box<[AtomicU64]>,
}

/// Prints only the number of words: a guest has millions of bits, which change while they are
/// printed.
impl core::fmt::Debug for Marks {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} words", self.words.len())
    }
}

impl Marks {
    /// Creates `words` words without marks.
    pub(super) fn new(words: usize) -> Self {
        let empty = |count| {
            // If memory runs out, `collect` ends the process, as a `Vec` does.
            try_words(count).unwrap_or_else(|_| (0..count).map(|_| AtomicU64::new(0)).collect())
        };
        Self {
            words: empty(words),
            summary: empty(summary_len(words)),
        }
    }

    /// Creates `words` words without marks, or returns an error if memory runs out.
    pub(super) fn try_new(words: usize) -> Result<Self, TryReserveError> {
        Ok(Self {
            words: try_words(words)?,
            summary: try_words(summary_len(words))?,
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

    /// Sets bits of a word by a read-modify-write, whether they are set or not.
    #[inline]
    pub(super) fn set(&self, word: usize, bits: u64) {
        if let Some(target) = self.words.get(word) {
            target.fetch_or(bits, Ordering::SeqCst);
            self.mark_line(word);
        }
    }

    /// Marks bits of a word, after the data were written. Modifies nothing if they are set.
    #[inline(always)]
    pub(super) fn mark(&self, word: usize, bits: u64) {
        let Some(target) = self.words.get(word) else {
            return;
        };
        // Loaded first: a load after a fence has to wait for it.
        let has_summary = !self.summary.is_empty();
        if target.load(Ordering::Relaxed) & bits == bits {
            // A harvest may have cleared the marks before the data are visible to it.
            fence(Ordering::SeqCst);
            set_missing(target, bits);
        } else {
            // Orders the data as well.
            target.fetch_or(bits, Ordering::SeqCst);
        }
        if has_summary {
            self.mark_line(word);
        }
    }

    /// Sets the bit of a word's line in the summary, unless it is set.
    ///
    /// It follows the check of the word, or its mark.
    #[inline(always)]
    fn mark_line(&self, word: usize) {
        let (slot, line) = summary_slot(word);
        if let Some(lines) = self.summary.get(slot) {
            set_missing(lines, line);
        }
    }

    /// Marks the bits from `first` to `last`, all of which exist, after the data were written.
    ///
    /// Modifies only words that lack some of them.
    pub(super) fn mark_range(&self, first: usize, last: usize) {
        // Orders the data before all checks.
        fence(Ordering::SeqCst);
        let ((first_word, first_bit), (last_word, last_bit)) = (position(first), position(last));
        match self.words.get(first_word..=last_word).unwrap_or_default() {
            [] => {}
            [word] => set_missing(word, bits_between(first_bit, last_bit)),
            [head, middle @ .., tail] => {
                set_missing(head, bits_between(first_bit, 1 << (WORD_BITS - 1)));
                middle.iter().for_each(|word| set_missing(word, u64::MAX));
                set_missing(tail, bits_between(1, last_bit));
            }
        }
        // After the checks of the words.
        let lines = first_word / LINE_WORDS..(last_word / LINE_WORDS).saturating_add(1);
        for (slot, lines) in words_of(lines) {
            match self.summary.get(slot) {
                Some(word) => set_missing(word, lines),
                None => break,
            }
        }
    }

    /// Clears the bits of a range, and calls `found` for each word that had set bits.
    ///
    /// The words ascend. The caller may read guest memory after the call, but not in `found`.
    pub(super) fn harvest(&self, range: Range<usize>, found: impl FnMut(usize, u64)) {
        self.harvest_words(range, found);
        // The matching fences of the writers are in `mark` and `mark_range`.
        fence(Ordering::SeqCst);
    }

    fn harvest_words(&self, range: Range<usize>, mut found: impl FnMut(usize, u64)) {
        let all = self.words.len().saturating_mul(WORD_BITS);
        let range = range.start..range.end.min(all);
        if range.is_empty() {
            return;
        }
        let lines = range.start / LINE_BITS..range.end.div_ceil(LINE_BITS);
        // Lines that are entirely in the range. The last line of the bitmap may have fewer words.
        let whole_end = if range.end == all {
            lines.end
        } else {
            range.end / LINE_BITS
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
            let candidates = self.harvest_summary(slot, whole) | (lines & !whole);
            for line in each_bit(candidates) {
                let first_word = first_line.saturating_add(line).saturating_mul(LINE_WORDS);
                match whole & position(line).1 {
                    0 => self.harvest_part_of_line(first_word, &range, &mut found),
                    _ => full = self.harvest_line(first_word, full, &mut found),
                }
            }
        }
    }

    /// Clears the bits `lines` of a word of the summary, and returns those that were set.
    ///
    /// Without a summary, returns all of them.
    #[inline]
    fn harvest_summary(&self, slot: usize, lines: u64) -> u64 {
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

    /// Harvests a line, and returns whether each of its words had marks.
    #[inline(always)]
    fn harvest_line(
        &self,
        first_word: usize,
        after_full: bool,
        found: &mut impl FnMut(usize, u64),
    ) -> bool {
        // After a full line, this one is probably full as well. Loads would skip nothing, and would
        // have to wait for the exchanges of the line before.
        let seen = if after_full {
            [u64::MAX; LINE_WORDS]
        } else {
            self.load_line(first_word)
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
        let line = self.words.get(first_word..).unwrap_or_default();
        // Builds optimised for size unroll this, unlike a loop.
        core::array::from_fn(|number| {
            let word = line.get(number);
            word.map_or(0, |word| word.load(Ordering::SeqCst))
        })
    }

    /// Reads and clears the words of a line for which `seen` is not 0.
    ///
    /// It clears all of them before the caller gets any. An exchange waits for earlier stores, and
    /// the caller's stores miss the cache.
    #[inline(always)]
    fn swap_line(&self, first_word: usize, seen: [u64; LINE_WORDS]) -> [u64; LINE_WORDS] {
        let mut harvested = [0; LINE_WORDS];
        let line = self.words.get(first_word..).unwrap_or_default();
        for ((harvested, seen), word) in harvested.iter_mut().zip(seen).zip(line) {
            if seen != 0 {
                *harvested = word.swap(0, Ordering::SeqCst);
            }
        }
        harvested
    }

    /// Harvests the bits of a line that are in `range`.
    #[inline]
    fn harvest_part_of_line(
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
                .map_or(0, |word| harvest_word(word, inside))
            {
                0 => {}
                bits => found(word, bits),
            }
        }
    }

    /// Sets the marks in `other` as well, moved up by `first` words.
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
    if words < SUMMARY_FROM {
        0
    } else {
        words.div_ceil(SUMMARY_WORDS)
    }
}

/// Sets bits of a word, unless all of them are set.
#[inline(always)]
fn set_missing(word: &AtomicU64, bits: u64) {
    if word.load(Ordering::SeqCst) & bits != bits {
        word.fetch_or(bits, Ordering::SeqCst);
    }
}

/// Clears these bits of a word, and returns those that were set.
#[inline(always)]
fn harvest_word(word: &AtomicU64, bits: u64) -> u64 {
    if word.load(Ordering::SeqCst) & bits == 0 {
        return 0;
    }
    let harvested = match bits {
        u64::MAX => word.swap(0, Ordering::SeqCst),
        _ => word.fetch_and(!bits, Ordering::SeqCst),
    };
    harvested & bits
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn harvest_of_any_range_returns_its_bits_and_keeps_the_others() {
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
            let harvest = |range| {
                let mut harvested = Vec::new();
                marks.harvest(range, |word, bits| {
                    harvested.extend(each_bit(bits).map(|bit| word * WORD_BITS + bit));
                });
                harvested
            };
            let inside = |bit: &&usize| (first..end).contains(*bit);
            assert!(
                harvest(first..end).iter().eq(bits.iter().filter(inside)),
                "{first}..{end}"
            );
            assert!(
                harvest(0..usize::MAX)
                    .iter()
                    .eq(bits.iter().filter(|bit| !inside(bit))),
                "{first}..{end}"
            );
            assert!(harvest(0..usize::MAX).is_empty());
        }
    }

    #[test]
    fn mark_range_across_lines_marks_its_bits() {
        let marks = Marks::new(20);
        marks.mark_range(6 * 64 + 60, 18 * 64 + 3);
        marks.mark_range(19 * 64 + 63, 19 * 64 + 63);
        marks.mark_range(2 * 64 + 1, 2 * 64 + 2);
        marks.mark(2, 8);
        marks.mark(20, 1);
        let mut found = Vec::new();
        let copy = Marks::new(21);
        marks.copy_to(&copy, 1);
        copy.harvest(64..usize::MAX, |word, bits| found.push((word - 1, bits)));
        let mut expected = vec![(2, 0b1110), (6, 0xf << 60)];
        expected.extend((7..18).map(|word| (word, u64::MAX)));
        expected.extend([(18, 0xf), (19, 1 << 63)]);
        assert_eq!(found, expected);
    }
}
