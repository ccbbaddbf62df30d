//! Runs of set bits.

use core::ops::Range;

use super::WORD_BITS;

/// The runs of bits that are set, in words that ascend.
pub(crate) fn bit_runs<I: Iterator<Item = (usize, u64)>>(words: I) -> BitRuns<I> {
    BitRuns {
        words,
        word: 0,
        bits: 0,
    }
}

/// See [`bit_runs`].
#[derive(Clone, Debug)]
pub(crate) struct BitRuns<I> {
    words: I,
    /// The word at hand, and what is left of it.
    word: usize,
    bits: u64,
}

impl<I: Iterator<Item = (usize, u64)>> BitRuns<I> {
    /// Takes the ones that the word at hand has from bit `from` on, and returns the number behind
    /// them.
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
        // Words between that the iterator leaves out have no bits.
        assert_eq!(runs(&[(0, 1 << 63), (2, 1)]), [63..64, 128..129]);
    }
}
