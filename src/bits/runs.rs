//! Runs of set bits.

use core::ops::Range;

use super::{bit_number, WORD_BITS};

/// Returns the runs of set bits, as ranges of bit numbers. The words must ascend.
pub(crate) fn bit_runs<I: Iterator<Item = (usize, u64)>>(words: I) -> BitRuns<I> {
    BitRuns {
        words,
        word: 0,
        bits: 0,
    }
}

/// An iterator over runs of set bits, created by [`bit_runs`].
#[derive(Clone, Debug)]
pub(crate) struct BitRuns<I> {
    words: I,
    /// The number of the current word, and its remaining bits.
    word: usize,
    bits: u64,
}

impl<I: Iterator<Item = (usize, u64)>> BitRuns<I> {
    /// Removes the set bits of the current word from bit `from` up to the next clear bit.
    ///
    /// Returns the number of that clear bit.
    fn take_ones(&mut self, from: u32) -> usize {
        let end = from.saturating_add(self.bits.wrapping_shr(from).trailing_ones());
        self.bits &= match 1u64.checked_shl(end) {
            Some(bit) => !bit.wrapping_sub(1),
            None => 0,
        };
        self.word
            .saturating_mul(WORD_BITS)
            .saturating_add(bit_number(end))
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
            .saturating_add(bit_number(from));
        let mut end = self.take_ones(from);
        // A run up to the end of a word may continue in the next one.
        while end.is_multiple_of(WORD_BITS) {
            match self.words.next() {
                Some((word, bits)) => (self.word, self.bits) = (word, bits),
                None => break,
            }
            if self.word.saturating_mul(WORD_BITS) != end || self.bits & 1 == 0 {
                break;
            }
            end = self.take_ones(0);
        }
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_runs_across_words_are_joined() {
        let runs = |words: &[(usize, u64)]| bit_runs(words.iter().copied()).collect::<Vec<_>>();
        assert!(runs(&[]).is_empty());
        assert!(runs(&[(0, 0), (3, 0)]).is_empty());
        assert_eq!(runs(&[(0, 0b1011)]), [0..2, 3..4]);
        assert_eq!(
            runs(&[(0, 1 << 63), (1, u64::MAX), (2, 0b101)]),
            [63..129, 130..131]
        );
        // Words that the iterator omits have no bits.
        assert_eq!(runs(&[(0, 1 << 63), (2, 1)]), [63..64, 128..129]);
    }
}
