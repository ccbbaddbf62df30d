//! [`Waits`]: the failed lookups of an IOTLB with a bound, and the limit of their tries.
//!
//! A device whose lookup fails asks for mappings and looks up again. Each mapping that arrives may
//! evict another one of the same range, so nothing in the mappings guarantees that this ends. Each
//! failed range is therefore recorded until it is found:
//!
//! ```text
//!   lookup fails ──► recorded ──► mappings arrive ──► lookup: found? ──► forgotten
//!                       ▲                               │
//!                       │        no: more of the range is mapped than before? a next round
//!                       └────────    otherwise: one of the `TRIES` is spent; the last one refuses
//! ```
//!
//! A round makes progress if more of the range is mapped than in the round before. A range of n
//! addresses has at most n such rounds between two rounds without progress. So every loop of
//! lookups and mappings ends, whatever the guest, the front end and other threads do in the
//! meantime.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::mapping_table::Span;
use crate::guest_memory::GuestAddress;

/// The number of failed lookups without progress after which a range is refused.
pub(in crate::iommu) const TRIES: u32 = 32;
/// The maximum number of recorded ranges. With more threads than this, tries may be forgotten.
const MAX_WAITS: usize = 64;

/// The ranges whose last lookup failed.
#[derive(Debug, Default)]
pub(in crate::iommu) struct Waits {
    /// One bit per range of `list`, by [`bit`]. It is changed with `list`, under its lock.
    ///
    /// Relaxed: a thread sees the bits of its own failed lookups. A thread that maps addresses has
    /// received the miss, which orders the bit before it. A missing bit costs at most one try.
    filter: AtomicU64,
    /// Sorted by the time of the last failed lookup.
    list: Mutex<Vec<Wait>>,
}

#[derive(Debug)]
struct Wait {
    range: Span,
    /// The number of addresses that were not mapped at the last lookup.
    missing: u64,
    tries: u32,
    /// Whether a mapping of the range was set since.
    mapped: bool,
    /// Whether that mapping has all of the range, so that the next lookup is likely to find it.
    complete: bool,
}

/// The outcome of a failed lookup.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// The missing parts can be requested.
    AskForParts,
    /// The whole range must be requested as one miss: requesting the parts made no progress.
    AskForAll,
    /// The tries are spent.
    Refuse,
}

impl Waits {
    fn list(&self) -> MutexGuard<'_, Vec<Wait>> {
        // No operation panics part-way.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a lookup of a range failed, and that this number of its addresses is missing.
    #[cold]
    pub(super) fn failed(&self, range: Span, missing: u64) -> Verdict {
        let mut list = self.list();
        let known = list.iter().position(|wait| wait.range == range);
        let mut wait = match known {
            Some(at) => list.remove(at),
            None => Wait {
                range,
                missing,
                tries: 0,
                mapped: false,
                complete: false,
            },
        };
        if wait.mapped && missing >= wait.missing {
            wait.tries = wait.tries.saturating_add(1);
        }
        (wait.mapped, wait.complete, wait.missing) = (false, false, missing);
        let verdict = match wait.tries {
            TRIES.. => Verdict::Refuse,
            // Alternates: some IOMMUs can only ask for the first address that they are given.
            tries if tries % 2 == 1 => Verdict::AskForAll,
            _ => Verdict::AskForParts,
        };
        if verdict != Verdict::Refuse {
            if list.len() >= MAX_WAITS {
                let least = list.iter().position(|wait| wait.complete).unwrap_or(0);
                list.remove(least);
            }
            list.push(wait);
        }
        self.changed(&list);
        verdict
    }

    /// Records that a lookup found a range.
    pub(super) fn found(&self, range: Span) {
        if self.filter.load(Ordering::Relaxed) & bit(range) != 0 {
            let mut list = self.list();
            list.retain(|wait| wait.range != range);
            self.changed(&list);
        }
    }

    /// Records that the `length` addresses at `iova` are about to be mapped, which may be none.
    ///
    /// Returns the range that they are mapped for: the last recorded range that contains any of
    /// them, or else the last recorded range.
    pub(in crate::iommu) fn mapping_arrives(
        &self,
        iova: GuestAddress,
        length: usize,
    ) -> Option<Span> {
        if self.filter.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let first = iova.0;
        let more = u64::try_from(length.saturating_sub(1)).unwrap_or(u64::MAX);
        let last = first.saturating_add(more);
        let mut list = self.list();
        let mut wanted = None;
        for wait in list.iter_mut() {
            // A mapping without addresses, or one that is refused, counts, too.
            if wait.range.overlaps(Span { first, last }) {
                wait.mapped = true;
                wait.complete |= first <= wait.range.first && wait.range.last <= last;
                wanted = Some(wait.range);
            }
        }
        wanted.or(list.last().map(|wait| wait.range))
    }

    /// Forgets all ranges.
    pub(in crate::iommu) fn clear(&self) {
        let mut list = self.list();
        list.clear();
        self.changed(&list);
    }

    /// Updates the filter after a change of the list.
    fn changed(&self, list: &[Wait]) {
        let bits = list.iter().fold(0, |bits, wait| bits | bit(wait.range));
        self.filter.store(bits, Ordering::Relaxed);
    }
}

/// Returns the bit of a range in the filter.
fn bit(range: Span) -> u64 {
    // Any hash is correct. This one spreads ranges of pages, by the upper bits of the product.
    let mixed = (range.first ^ range.last.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    1u64.wrapping_shl(u32::try_from(mixed.wrapping_shr(58)).unwrap_or(0))
}
