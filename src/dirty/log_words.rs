//! [`LogWords`]: a dirty log that another component keeps.

use core::num::NonZeroUsize;
use core::ops::Range;

use crate::bitmap::{log_ranges, skip_words};
#[cfg(feature = "iommu")]
use crate::bits::bit_runs;
use crate::bits::WORD_BITS;
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::GuestAddress;
use crate::page_size::host_page_size;

/// A dirty log that another component keeps.
///
/// KVM keeps one for each slot, and a vhost back end keeps one for all of memory.
///
/// [`kvm`](Self::kvm) describes the log of a KVM slot.
///
/// Bit `i` of word `w` stands for page `64 * w + i`. A log in bytes, such as that of vhost-user
/// (vhost-user specification, "Migration"), is a log in words of little-endian order. A log in
/// memory that a back end shares must be read and cleared atomically:
/// `vm_memory_vhost::log::SharedLog::harvest` does this, and returns a `LogWords`.
///
/// # Examples
///
/// The log of a vhost back end, with one bit for each 4 KiB of guest memory:
///
/// ```
/// use std::num::NonZeroUsize;
/// use vm_memory::dirty::LogWords;
/// use vm_memory::GuestAddress;
///
/// let vhost = [0b110u64]; // the back end filled it
/// let log = LogWords::new(GuestAddress(0), &vhost, NonZeroUsize::new(0x1000).unwrap());
/// # let _ = log;
/// ```
#[doc(alias = "KVM_GET_DIRTY_LOG")]
#[doc(alias = "VHOST_SET_LOG_BASE")]
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LogWords<'a> {
    /// The guest address of the first page.
    pub start: GuestAddress,
    /// The words of the log.
    pub words: &'a [u64],
    /// The size of a page of the log in bytes.
    pub page_size: NonZeroUsize,
}

impl<'a> LogWords<'a> {
    /// Creates a log whose first bit stands for the page of `page_size` bytes at `start`.
    pub fn new(start: GuestAddress, words: &'a [u64], page_size: NonZeroUsize) -> Self {
        Self {
            start,
            words,
            page_size,
        }
    }

    /// Returns the log of a KVM slot at `start`, which `KVM_GET_DIRTY_LOG` has filled.
    ///
    /// KVM logs in pages of the host, also if huge pages back the slot.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::dirty::{DirtyMemory, LogWords};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let memory: GuestMemoryMmap<AtomicBitmap> =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0x10_0000), 0x10_0000)])?;
    /// let words = [0b1u64]; // KVM_GET_DIRTY_LOG filled it
    /// let mut dirty = DirtyMemory::new();
    /// dirty.harvest_with(&memory, &[LogWords::kvm(GuestAddress(0x10_0000), &words)]);
    /// assert_eq!(dirty.runs().next().unwrap().0, GuestAddress(0x10_0000));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn kvm(start: GuestAddress, words: &'a [u64]) -> Self {
        Self {
            start,
            words,
            page_size: host_page_size(),
        }
    }

    /// Returns the last guest address that a bit may stand for.
    pub(super) fn last(&self) -> u64 {
        let word_bytes = to_u64(self.page_size.get()).saturating_mul(to_u64(WORD_BITS));
        let bytes = to_u64(self.words.len()).saturating_mul(word_bytes);
        self.start.0.saturating_add(bytes.saturating_sub(1))
    }

    /// Returns the dirty ranges of the log, as first and last addresses.
    ///
    /// Bits past the end of the address space are omitted.
    #[cfg(feature = "iommu")]
    pub(super) fn spans(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let size = to_u64(self.page_size.get());
        bit_runs(self.words.iter().copied().enumerate()).filter_map(move |run| {
            let first = to_u64(run.start).checked_mul(size)?;
            let end = to_u64(run.end).saturating_mul(size);
            let last = self.start.0.saturating_add(end.saturating_sub(1));
            Some((self.start.0.checked_add(first)?, last))
        })
    }

    /// Returns the dirty ranges in a region of `len` bytes at `start`, as offsets in the region.
    pub(super) fn ranges_in(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        // The log begins before the region or inside it: one of the two differences is 0.
        let before = start.0.saturating_sub(self.start.0);
        let inside = self.start.0.saturating_sub(start.0);
        let (skipped, words) = skip_words(before, self.words, self.page_size);
        let offset = to_usize(inside);
        log_ranges(skipped, offset, words, self.page_size, len)
    }
}
