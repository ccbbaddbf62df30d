//! [`Marks`]: bits in words, and a bit above for every line of words that has one.
//!
//! ```text
//!   summary │ 0 1 0 0 … │            a bit for each line: a harvest of few marks looks at few lines
//!               │
//!   words   │ 8 words │ 8 words │ …  a line: as much as a cache holds together, and 512 marks
//! ```
//!
//! # No interleaving loses a mark
//!
//! A *writer* (a device thread) stores bytes `D`, then marks their page: `M = fetch_or(word)`, then `L`, a look whether the summary has the bit
//! of its line, and `F = fetch_or(summary)` where it has not. A *harvest* takes `T = swap(summary)`, then looks at the words of the lines that it
//! found and takes each that is not empty, `H = swap(word)`; then it reads the bytes of those pages, `R`. All are sequentially consistent.
//!
//! *A harvest that finds the mark sees the bytes.* Every operation that changes a word is a read-modify-write, so the release sequence
//! that `M` heads goes on until `H`, and `H` acquires what `M` released: `D` happens before `R`.
//!
//! *A mark that is done is found by the next harvest.* When the writer is done, the bit of the line is in the summary unless a harvest
//! took it since: either `F` put it there, or `L` found it there. Suppose a harvest took it, `T` after that `L` or `F`. In the one order of all these operations,
//! `M` is before `L` (or `F`), that before `T`, and `T` before the look at the word: the look finds the mark, unless another harvest has found it. So no
//! harvest that takes a line leaves a mark behind that was done, and a mark stays findable until it is found. A harvest passes over words and
//! summary words in which a look finds nothing: the look is sequentially consistent too, and a mark that it misses comes after it.
//!
//! The look `L` is what makes the second writer of a word as safe as the first. It would not be enough to let the one who finds the word empty set the
//! bit above: it may be stopped between the two, and the second one's mark would be done and not findable.
//!
//! *Looking before marking* (a mode, for which a harvest pays): the writer looks at the word and at the summary, and does nothing where it finds
//! both. That alone loses pages: the look may be answered before `D` is visible, and a harvest between them takes the mark and reads
//! old bytes. So there are barriers between: `B` between `D` and the look, and `B'` between `H` and `R`. Of two such barriers, one comes first. If
//! it is `B`, `R` sees `D`. If it is `B'`, the look comes after `T` and `H`, finds one of the two missing, and marks. `B` is for the compiler alone, and `B'`
//! is `membarrier(2)`, which has every other thread of the process go through a full barrier at that moment.
//!
//! `verify/loom/` runs all of this, with this very file: writers, a harvest at the same time and one behind them. `mutants.rs` there weakens these operations one
//! by one (`M`, `L`, `F`, `T`, the look at a line, `H`, both barriers) and has a model lose a page for each; it also lists what the models do not need.

use crate::bits::{each_bit, mask, summary_slot, LINE_BITS, LINE_WORDS, SUMMARY_WORDS, WORD_BITS};

use super::sync::{light_barrier, AtomicU64, Ordering};

/// Fewer words have no summary: a harvest looks at this many in some 10 µs, and a mark that need not look above takes a third less time.
#[cfg(not(loom))]
const SUMMARY_FROM: usize = 1 << 15;
#[cfg(loom)]
const SUMMARY_FROM: usize = LINE_WORDS;

/// Bits that threads set and take at the same time.
pub(super) struct Marks {
    words: Box<[AtomicU64]>,
    /// Empty if there are few words: then a harvest looks at all of them.
    summary: Box<[AtomicU64]>,
}

/// How many words there are, and not which bits: those of a guest are millions, and change while they are printed.
impl core::fmt::Debug for Marks {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} words", self.words.len())
    }
}

impl Marks {
    /// Makes `words` words, all of them empty.
    pub(super) fn new(words: usize) -> Self {
        let empty = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            words: empty(words),
            summary: empty(match words < SUMMARY_FROM {
                true => 0,
                false => words.div_ceil(SUMMARY_WORDS),
            }),
        }
    }

    /// How many words there are.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    /// The bits of a word; none if it does not exist.
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
            // Looked at before: a load behind a locked instruction waits for it.
            let few = self.summary.is_empty();
            target.fetch_or(bits, Ordering::SeqCst);
            if !few {
                self.note(word);
            }
        }
    }

    /// Sets all bits of the words from `first` to before `end`, of which there are as many as exist.
    pub(super) fn set_words(&self, first: usize, end: usize) {
        let end = end.min(self.words.len());
        let mut next = first;
        while next < end {
            let line_end = (next | (LINE_WORDS - 1)).saturating_add(1).min(end);
            for word in self.words.get(next..line_end).unwrap_or_default() {
                word.fetch_or(u64::MAX, Ordering::SeqCst);
            }
            self.note(next);
            next = line_end;
        }
    }

    /// Sets bits of a word, unless they are set: for harvests with a barrier between what they take and what they read.
    #[inline(always)]
    pub(super) fn look_and_set(&self, word: usize, bits: u64) {
        light_barrier();
        let here = self
            .words
            .get(word)
            .map(|word| word.load(Ordering::Relaxed));
        let (above, bit) = summary_slot(word);
        // Without a summary, everything is noted.
        let noted = match self.summary.get(above) {
            Some(above) => above.load(Ordering::Relaxed) & bit != 0,
            None => true,
        };
        if noted && here.is_some_and(|here| here & bits == bits) {
            return;
        }
        self.set(word, bits);
    }

    /// Notes in the summary that the line of a word has marks.
    #[inline(always)]
    fn note(&self, word: usize) {
        if self.summary.is_empty() {
            return;
        }
        let (above, bit) = summary_slot(word);
        if let Some(above) = self.summary.get(above) {
            if above.load(Ordering::SeqCst) & bit == 0 {
                above.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    /// Clears bits of a word. The summary keeps its line: a harvest will look there, and find what is left.
    pub(super) fn clear(&self, word: usize, bits: u64) {
        if let Some(word) = self.words.get(word) {
            // A read-modify-write, so that it breaks no release sequence.
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    /// Takes the bits from number `first` to before number `end`, and calls `found` for each word that has some, in ascending order.
    pub(super) fn take(&self, first: usize, end: usize, mut found: impl FnMut(usize, u64)) {
        let end = end.min(self.words.len().saturating_mul(WORD_BITS));
        if first >= end {
            return;
        }
        let (first_line, end_line) = (first / LINE_BITS, end.div_ceil(LINE_BITS));
        // Lines that are in the range as a whole. The others keep their bit above, and are looked at whether they have it or not.
        let last_whole = end == self.words.len().saturating_mul(WORD_BITS);
        let (first_whole, end_whole) = (
            first.div_ceil(LINE_BITS),
            if last_whole {
                end_line
            } else {
                end / LINE_BITS
            },
        );
        let mut full = false;
        for above in first_line / WORD_BITS..end_line.div_ceil(WORD_BITS) {
            let first_here = above.saturating_mul(WORD_BITS);
            let within = |first: usize, end: usize| {
                mask(
                    first.saturating_sub(first_here),
                    end.saturating_sub(first_here),
                )
            };
            let whole = within(first_whole, end_whole);
            let lines = self.take_noted(above, whole) | (within(first_line, end_line) & !whole);
            for line_here in each_bit(lines) {
                let line = first_here.saturating_add(line_here);
                let first_word = line.saturating_mul(LINE_WORDS);
                let is_whole = whole.wrapping_shr(u32::try_from(line_here).unwrap_or(0)) & 1 != 0;
                // Behind a full line, another one is likely: a look would find nothing to pass over, and wait for the exchanges before it.
                let seen = match full && is_whole {
                    true => [u64::MAX; LINE_WORDS],
                    false => self.look_at_line(first_word),
                };
                if seen.iter().fold(0, |all, bits| all | bits) == 0 {
                    continue;
                }
                if is_whole {
                    let taken = self.take_line(first_word, seen);
                    full = true;
                    for (number, bits) in taken.into_iter().enumerate() {
                        match bits {
                            0 => full = false,
                            _ => found(first_word.saturating_add(number), bits),
                        }
                    }
                    continue;
                }
                for word in first_word..first_word.saturating_add(LINE_WORDS) {
                    let start = word.saturating_mul(WORD_BITS);
                    let inside = mask(first.saturating_sub(start), end.saturating_sub(start));
                    let bits = self.words.get(word).map_or(0, |word| take(word, inside));
                    if bits != 0 {
                        found(word, bits);
                    }
                }
            }
        }
    }

    /// Takes the notes of these lines from a word of the summary.
    #[inline]
    fn take_noted(&self, above: usize, lines: u64) -> u64 {
        let Some(above) = self.summary.get(above) else {
            // No summary: all of them may have some.
            return lines;
        };
        if above.load(Ordering::SeqCst) & lines == 0 {
            return 0;
        }
        let noted = match lines {
            u64::MAX => above.swap(0, Ordering::SeqCst),
            _ => above.fetch_and(!lines, Ordering::SeqCst),
        };
        noted & lines
    }

    /// Looks at the words of a line; there is nothing in those that do not exist.
    #[inline(always)]
    fn look_at_line(&self, first_word: usize) -> [u64; LINE_WORDS] {
        let mut seen = [0; LINE_WORDS];
        let line = self.words.get(first_word..).unwrap_or_default();
        for (seen, word) in seen.iter_mut().zip(line) {
            *seen = word.load(Ordering::SeqCst);
        }
        seen
    }

    /// Takes those words of a line that a look found something in.
    ///
    /// All of them before any goes to the caller: an exchange waits for the stores before it, and those of the caller go to memory that no cache has.
    #[inline(always)]
    fn take_line(&self, first_word: usize, seen: [u64; LINE_WORDS]) -> [u64; LINE_WORDS] {
        let mut taken = [0; LINE_WORDS];
        let line = self.words.get(first_word..).unwrap_or_default();
        for ((taken, seen), word) in taken.iter_mut().zip(seen).zip(line) {
            if seen != 0 {
                *taken = word.swap(0, Ordering::SeqCst);
            }
        }
        taken
    }

    /// Sets the marks as they are found in `other`, from its word `first` on.
    pub(super) fn copy_to(&self, other: &Marks, first: usize) {
        for (number, word) in self.words.iter().enumerate() {
            match word.load(Ordering::Acquire) {
                0 => {}
                bits => other.set(first.saturating_add(number), bits),
            }
        }
    }
}

/// Takes these bits from a word.
#[inline(always)]
fn take(word: &AtomicU64, bits: u64) -> u64 {
    if word.load(Ordering::SeqCst) & bits == 0 {
        return 0;
    }
    let taken = match bits {
        u64::MAX => word.swap(0, Ordering::SeqCst),
        _ => word.fetch_and(!bits, Ordering::SeqCst),
    };
    taken & bits
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every part of a few lines is taken as it would be bit by bit, and what is outside of it stays findable.
    #[test]
    fn any_range_is_taken_and_nothing_beside() {
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
            let take = |first, end| {
                let mut taken = Vec::new();
                marks.take(first, end, |word, bits| {
                    taken.extend(each_bit(bits).map(|bit| word * WORD_BITS + bit));
                });
                taken
            };
            let inside = |bit: &&usize| (first..end).contains(*bit);
            assert!(
                take(first, end).iter().eq(bits.iter().filter(inside)),
                "{first}..{end}"
            );
            assert!(
                take(0, usize::MAX)
                    .iter()
                    .eq(bits.iter().filter(|bit| !inside(bit))),
                "{first}..{end}"
            );
            assert!(take(0, usize::MAX).is_empty());
        }
    }

    #[test]
    fn whole_words_are_set_over_lines_and_to_the_end() {
        let marks = Marks::new(20);
        marks.set_words(6, 18);
        marks.set_words(19, 99);
        marks.set_words(30, 40);
        marks.look_and_set(2, 7);
        marks.look_and_set(7, 1);
        marks.look_and_set(99, 1);
        marks.clear(17, u64::MAX);
        let mut found = Vec::new();
        let copy = Marks::new(19);
        marks.copy_to(&copy, 1);
        marks.take(19 * 64, usize::MAX, |word, bits| found.push((word, bits)));
        copy.take(0, usize::MAX, |word, bits| found.push((word, bits)));
        let last = [(19, u64::MAX), (3, 7)];
        assert_eq!(
            found,
            last.into_iter()
                .chain((7..18).map(|word| (word, u64::MAX)))
                .collect::<Vec<_>>()
        );
    }
}
