//! The geometry of a summary: one bit for each line of words.

use super::WORD_BITS;

/// The number of words in a line. A loom model must stay small.
pub(crate) const LINE_WORDS: usize = if cfg!(loom) { 2 } else { 8 };

/// The number of bits in a line.
pub(crate) const LINE_BITS: usize = LINE_WORDS * WORD_BITS;

/// The number of words that one word of the summary stands for.
pub(crate) const SUMMARY_WORDS: usize = LINE_WORDS * WORD_BITS;

/// The number of bits in a block: the bits that one word of the summary stands for.
pub(crate) const SUMMARY_BITS: usize = SUMMARY_WORDS * WORD_BITS;

/// Returns the position in the summary of the line that contains a word.
///
/// It is the number of the summary word, and a value with the line's bit set.
#[inline(always)]
pub(crate) fn summary_slot(word: usize) -> (usize, u64) {
    super::position(word / LINE_WORDS)
}
