//! The conversion of a dirty log that another component keeps to ranges of bytes.

use core::num::NonZeroUsize;
use core::ops::Range;

use crate::bits::{bit_runs, WORD_BITS};
use crate::convert::{to_u64, to_usize};

/// Skips the words of a log that stand for its first `skipped` bytes only.
///
/// Returns the number of bytes that are left to skip, and the remaining words.
pub(crate) fn skip_words(skipped: u64, words: &[u64], page_size: NonZeroUsize) -> (usize, &[u64]) {
    let word_bytes = to_u64(page_size.get()).saturating_mul(to_u64(WORD_BITS));
    let gone = to_usize(skipped.checked_div(word_bytes).unwrap_or(0));
    let left = skipped.checked_rem(word_bytes).unwrap_or(0);
    // If `left` does not fit, the memory is smaller than the bytes that one word stands for.
    (to_usize(left), words.get(gone..).unwrap_or_default())
}

/// Returns the dirty ranges of a log, as offsets in its memory of `byte_size` bytes.
///
/// The first byte of the log is at `offset` in the memory, or its first `skipped` bytes are before
/// the memory. Words past the end of the memory are not read.
pub(crate) fn log_ranges(
    skipped: usize,
    offset: usize,
    words: &[u64],
    page_size: NonZeroUsize,
    byte_size: usize,
) -> impl Iterator<Item = Range<usize>> + '_ {
    let size = page_size.get();
    let bytes = skipped.saturating_add(byte_size.saturating_sub(offset));
    let end = bytes.div_ceil(size).div_ceil(WORD_BITS).min(words.len());
    let words = words.get(..end).unwrap_or_default();
    #[cfg(test)]
    WORDS_READ.set(end);
    bit_runs(words.iter().copied().enumerate()).filter_map(move |run| {
        let byte = |page: usize| {
            let byte = page.saturating_mul(size).saturating_sub(skipped);
            offset.saturating_add(byte).min(byte_size)
        };
        let range = byte(run.start)..byte(run.end);
        (!range.is_empty()).then_some(range)
    })
}

#[cfg(test)]
std::thread_local! {
    /// The number of words that the latest [`log_ranges`] of this thread reads.
    pub(crate) static WORDS_READ: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}
