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
//! | `T` | `fetch_and` on the summary | reads and clears the bits of the lines |
//! | `S` | loads of the words of each such line | skips the empty words |
//! | `H` | `swap` or `fetch_and` on each other word, or on two at once | reads and clears the marks |
//! | `F` | full fence | orders the cleared marks before the data |
//! | `R` | loads from guest memory | reads the data |
//!
//! All operations except `D`, `R` and the first load of a word are sequentially consistent. "The
//! total order" below is the single order of all sequentially consistent operations and fences.
//! `F` ends [`Marks::harvest`] and [`Marks::harvest_each`], the only ways to clear a mark. The
//! callback of `harvest_each` must not read guest memory, because the fence follows it.
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
use core::slice::from_mut;
use std::alloc::{handle_alloc_error, Layout};
use std::collections::TryReserveError;

use super::sync::{fence, swap_pair, try_words, AtomicU64, Ordering};
use crate::bits::{
    bit_number, bits_between, each_bit, mask, position, summary_slot, words_of, LINE_BITS,
    LINE_WORDS, SUMMARY_BITS, SUMMARY_WORDS, WORD_BITS,
};

/// The minimum number of words for which there is a summary. Without one, marks are cheaper, and a
/// harvest loads so few words quickly.
const SUMMARY_FROM: usize = if cfg!(loom) { LINE_WORDS } else { 1 << 15 };

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
    /// Creates `words` words without marks. If memory runs out, the process ends.
    pub(super) fn new(words: usize) -> Self {
        let size = || Layout::array::<u64>(words).unwrap_or(Layout::new::<u64>());
        Self::try_new(words).unwrap_or_else(|_| handle_alloc_error(size()))
    }

    /// Creates `words` words without marks, or returns an error if memory runs out.
    pub(super) fn try_new(words: usize) -> Result<Self, TryReserveError> {
        let summary = match words {
            0..SUMMARY_FROM => 0,
            _ => words.div_ceil(SUMMARY_WORDS),
        };
        Ok(Self {
            words: try_words(words.next_multiple_of(LINE_WORDS))?,
            summary: try_words(summary)?,
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
        let words = self.words.get(first_word..=last_word).unwrap_or_default();
        let is_set = matches!(words, [head, middle @ .., tail]
            if has_bits(head, bits_between(first_bit, 1 << (WORD_BITS - 1)))
                && has_bits(tail, bits_between(1, last_bit))
                && all_are(middle, u64::MAX));
        if !is_set || !self.summary.is_empty() {
            self.mark_missing(first, last, is_set);
        }
    }

    /// Completes the marks of a range: those of the words, unless `is_set`, and of the summary.
    ///
    /// Out of line, so that [`mark_range`](Self::mark_range) saves no registers: a fence waits for
    /// earlier stores.
    #[inline(never)]
    fn mark_missing(&self, first: usize, last: usize, is_set: bool) {
        if !is_set {
            set_missing_range(&self.words, first, last);
        }
        // After the checks of the words.
        set_missing_range(&self.summary, first / LINE_BITS, last / LINE_BITS);
    }

    /// Clears the bits of a range, and adds them to `words`.
    ///
    /// The caller may read guest memory after the call. `words` begins at the block (the words of
    /// one summary word) of `range.start`. Bits past its end are dropped. `lines` is a summary of
    /// `words`, or empty.
    pub(super) fn harvest(&self, range: Range<usize>, words: &mut [u64], lines: &mut [u64]) {
        self.clear(range, words, lines);
        // The matching fences of the writers are in `mark` and `mark_range`.
        fence(Ordering::SeqCst);
    }

    /// Clears the bits of a range, and calls `found` for each word that had set bits.
    ///
    /// The words ascend. The caller may read guest memory after the call, but not in `found`.
    pub(super) fn harvest_each(&self, range: Range<usize>, mut found: impl FnMut(usize, u64)) {
        let end = range.end.min(self.words.len().saturating_mul(WORD_BITS));
        let (mut start, mut words) = (range.start, [0; SUMMARY_WORDS]);
        while start < end {
            let block = start / SUMMARY_BITS;
            let next = block.saturating_add(1).saturating_mul(SUMMARY_BITS);
            let mut lines = 0;
            self.clear(start..end.min(next), &mut words, from_mut(&mut lines));
            let numbers = (block.saturating_mul(SUMMARY_WORDS)..).zip(&mut words);
            for (number, bits) in numbers.filter(|(_, bits)| **bits != 0) {
                found(number, core::mem::take(bits));
            }
            start = next;
        }
        fence(Ordering::SeqCst);
    }

    /// Does what [`harvest`](Self::harvest) does, without the fence.
    fn clear(&self, range: Range<usize>, words: &mut [u64], lines: &mut [u64]) {
        let all = self.words.len().saturating_mul(WORD_BITS);
        let range = range.start..range.end.min(all);
        let mut blocks = words.chunks_mut(SUMMARY_WORDS);
        let mut summary = lines.iter_mut();
        for (slot, lines) in words_of(range.start / LINE_BITS..range.end.div_ceil(LINE_BITS)) {
            let block = self.words.chunks(SUMMARY_WORDS).nth(slot);
            let (block, words) = (block.unwrap_or_default(), blocks.next().unwrap_or_default());
            // The bits of the block that are in the range.
            let first_bit = slot.saturating_mul(SUMMARY_BITS);
            let part = range.start.saturating_sub(first_bit)..range.end.saturating_sub(first_bit);
            // Lines that are entirely in the range.
            let whole = mask(part.start.div_ceil(LINE_BITS), part.end / LINE_BITS);
            // Other lines keep their bit in the summary, and are searched whether it is set or not.
            let candidates = self.harvest_summary(slot, whole) | (lines & !whole);
            // `words` has all words of these lines.
            let direct = candidates & whole & mask(0, words.len() / LINE_WORDS);
            let mut found = harvest_lines(block, direct, words);
            for number in each_bit(candidates & !direct) {
                let line = number.saturating_mul(LINE_BITS);
                let bits = part.start.max(line)..part.end.min(line.saturating_add(LINE_BITS));
                if harvest_bits(block, bits, words) {
                    found |= position(number).1;
                }
            }
            if let Some(lines) = summary.next() {
                *lines |= found;
            }
        }
    }

    /// Clears the bits `lines` of a word of the summary, and returns those that were set.
    ///
    /// Without a summary, returns all of them.
    #[inline]
    fn harvest_summary(&self, slot: usize, lines: u64) -> u64 {
        match self.summary.get(slot) {
            None => lines,
            Some(word) if word.load(Ordering::SeqCst) & lines == 0 => 0,
            Some(word) => lines & word.fetch_and(!lines, Ordering::SeqCst),
        }
    }

    /// Returns the number of bits of a range that are set.
    ///
    /// Bits that other threads set or clear in the meantime may be counted or not.
    pub(super) fn count(&self, range: Range<usize>) -> usize {
        let end = range.end.min(self.words.len().saturating_mul(WORD_BITS));
        let slots = words_of(range.start / LINE_BITS..end.div_ceil(LINE_BITS));
        let lines = slots.flat_map(|(slot, lines)| {
            // A line whose bit is clear has no completed mark.
            let summary = self.summary.get(slot);
            let marked = summary.map_or(u64::MAX, |word| word.load(Ordering::Relaxed));
            each_bit(lines & marked).map(move |line| slot.saturating_mul(WORD_BITS) | line)
        });
        let words = lines.flat_map(|line| {
            let first = line.saturating_mul(LINE_BITS);
            words_of(first.max(range.start)..first.saturating_add(LINE_BITS).min(end))
        });
        words
            .map(|(word, bits)| bit_number((bits & self.word(word)).count_ones()))
            .sum()
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

/// Sets bits of a word, unless all of them are set.
#[inline(always)]
fn set_missing(word: &AtomicU64, bits: u64) {
    if !has_bits(word, bits) {
        word.fetch_or(bits, Ordering::SeqCst);
    }
}

/// Sets the bits from `first` to `last` that are not set, in the words that exist.
#[inline(always)]
fn set_missing_range(words: &[AtomicU64], first: usize, last: usize) {
    for (word, bits) in words_of(first..last.saturating_add(1)) {
        match words.get(word) {
            Some(word) => set_missing(word, bits),
            None => break,
        }
    }
}

/// Returns whether a word has all of these bits.
#[inline(always)]
fn has_bits(word: &AtomicU64, bits: u64) -> bool {
    word.load(Ordering::SeqCst) & bits == bits
}

/// Loads a word.
#[inline(always)]
fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::SeqCst)
}

/// Returns whether all words are `bits`.
#[inline(always)]
fn all_are(words: &[AtomicU64], bits: u64) -> bool {
    // Four at a time without a branch. Built for size, the compiler unrolls no loop.
    let (fours, rest) = words.as_chunks();
    let differs = |word: &AtomicU64| load(word) ^ bits;
    fours
        .iter()
        .all(|[a, b, c, d]| differs(a) | differs(b) | differs(c) | differs(d) == 0)
        && rest.iter().all(|word| differs(word) == 0)
}

/// Harvests the lines `which` of a block, and adds their bits to `words`. Returns those in which a
/// load found bits: another harvest may have taken them since.
///
/// Out of line, because the loop needs all registers.
#[inline(never)]
fn harvest_lines(block: &[AtomicU64], which: u64, words: &mut [u64]) -> u64 {
    let mut found = 0;
    let block = block.as_chunks::<LINE_WORDS>().0;
    let words = words.as_chunks_mut::<LINE_WORDS>().0;
    for number in each_bit(which) {
        let (Some(line), Some(words)) = (block.get(number), words.get_mut(number)) else {
            break;
        };
        if all_are(line, 0) {
            continue;
        }
        found |= position(number).1;
        for (pair, words) in line.as_chunks().0.iter().zip(words.as_chunks_mut().0) {
            let seen = pair.each_ref().map(load);
            if seen != [0, 0] {
                let [low, high] = swap_pair(pair, seen);
                let [low_word, high_word] = words;
                *low_word |= low;
                *high_word |= high;
            }
        }
    }
    found
}

/// Harvests a range of bits of a block, and adds them to `words`. Returns whether any was set.
#[inline(never)]
fn harvest_bits(block: &[AtomicU64], range: Range<usize>, words: &mut [u64]) -> bool {
    let mut any = 0;
    for (number, bits) in words_of(range) {
        let Some(word) = block.get(number) else { break };
        if word.load(Ordering::SeqCst) & bits != 0 {
            let bits = bits & word.fetch_and(!bits, Ordering::SeqCst);
            any |= bits;
            if let Some(word) = words.get_mut(number) {
                *word |= bits;
            }
        }
    }
    any != 0
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
        for (first, end, each) in [
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
        ]
        .into_iter()
        .flat_map(|(first, end)| [(first, end, false), (first, end, true)])
        {
            let marks = Marks::new(words);
            for bit in &bits {
                marks.set(bit / WORD_BITS, 1 << (bit % WORD_BITS));
            }
            let harvest = |range: Range<usize>, each: bool| {
                let (mut words, mut lines) = (vec![0; words], [0]);
                if each {
                    marks.harvest_each(range, |word, bits| words[word] |= bits);
                } else {
                    marks.harvest(range, &mut words, &mut lines);
                    let dirty = |line: &[u64]| line.iter().any(|bits| *bits != 0);
                    let dirty = words.chunks(LINE_WORDS).map(dirty).enumerate();
                    let expected: u64 = dirty.map(|(line, is)| u64::from(is) << line).sum();
                    assert_eq!(lines, [expected]);
                }
                let bits = words.into_iter().enumerate();
                bits.flat_map(|(word, bits)| each_bit(bits).map(move |bit| word * WORD_BITS + bit))
                    .collect::<Vec<_>>()
            };
            let inside = |bit: &&usize| (first..end).contains(*bit);
            assert!(
                harvest(first..end, each)
                    .iter()
                    .eq(bits.iter().filter(inside)),
                "{first}..{end}"
            );
            assert!(
                harvest(0..usize::MAX, false)
                    .iter()
                    .eq(bits.iter().filter(|bit| !inside(bit))),
                "{first}..{end}"
            );
            assert!(harvest(0..usize::MAX, each).is_empty());
        }
    }

    #[test]
    fn count_of_any_range_equals_number_of_its_bits() {
        // Without a summary, and with one. Miri would take minutes for the latter.
        let sizes = [3 * LINE_WORDS + 2, SUMMARY_FROM + 3 * LINE_WORDS];
        for &words in sizes.iter().take(if cfg!(miri) { 1 } else { 2 }) {
            let all = words.next_multiple_of(LINE_WORDS) * WORD_BITS;
            let mut bits: Vec<usize> = (0..all).filter(|bit| bit % 1237 == 5).collect();
            bits.extend(all - 70..all);
            let marks = Marks::new(words);
            for bit in &bits {
                marks.set(bit / WORD_BITS, 1 << (bit % WORD_BITS));
            }
            let bounds = [
                0,
                5,
                6,
                511,
                512,
                700,
                1242,
                1243,
                all - 65,
                all,
                usize::MAX,
            ];
            for (first, end) in bounds
                .iter()
                .flat_map(|first| bounds.map(|end| (*first, end)))
            {
                let inside = bits.iter().filter(|bit| (first..end).contains(*bit));
                assert_eq!(marks.count(first..end), inside.count(), "{first}..{end}");
            }
        }
    }

    #[test]
    fn mark_range_across_lines_marks_its_bits() {
        let marks = Marks::new(20);
        marks.mark_range(6 * 64 + 60, 18 * 64 + 3);
        marks.mark_range(19 * 64 + 63, 19 * 64 + 63);
        marks.mark_range(2 * 64 + 1, 2 * 64 + 2);
        marks.mark(2, 8);
        marks.mark(24, 1);
        let mut found = Vec::new();
        let copy = Marks::new(21);
        marks.copy_to(&copy, 1);
        copy.harvest_each(64..usize::MAX, |word, bits| found.push((word - 1, bits)));
        let mut expected = vec![(2, 0b1110), (6, 0xf << 60)];
        expected.extend((7..18).map(|word| (word, u64::MAX)));
        expected.extend([(18, 0xf), (19, 1 << 63)]);
        assert_eq!(found, expected);
    }
}
