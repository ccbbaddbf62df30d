//! [`LogWords`]: a dirty log that another component keeps.

use core::num::NonZeroUsize;
use core::ops::Range;

use crate::bitmap::{log_ranges, skip_words};
use crate::guest_memory::GuestAddress;

/// The words of a log that somebody else keeps: KVM for a slot, or a vhost back end for all of memory.
///
/// Bit `i` of word `w` stands for page `64 * w + i`. A log of bytes, such as that of vhost-user (vhost-user specification, "Migration"), is one of words in
/// little-endian order.
#[derive(Clone, Copy, Debug)]
pub struct LogWords<'a> {
    /// Where its first page is.
    pub start: GuestAddress,
    /// Its words.
    pub words: &'a [u64],
    /// The size of its pages in bytes.
    pub page_size: NonZeroUsize,
}

impl LogWords<'_> {
    /// Its ranges within a region of `len` bytes at `start`, as bytes of that.
    pub(super) fn ranges_in(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        // It may begin before the region, or within it.
        let behind = self.start.0.saturating_sub(start.0);
        let (skipped, words) = skip_words(
            start.0.saturating_sub(self.start.0),
            self.words,
            self.page_size,
        );
        let offset = usize::try_from(behind).unwrap_or(usize::MAX);
        log_ranges(skipped, offset, words, self.page_size, len)
    }
}
