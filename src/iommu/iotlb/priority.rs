//! [`Priority`]: the failed lookup that an IOTLB with a bound serves first.
//!
//! A device whose lookup fails asks for mappings and looks up again. Each new mapping may evict a
//! mapping that another device waits for. So these loops might never end. Therefore one range at a
//! time has priority: the first whose lookup fails.
//!
//! - Mappings of other ranges are evicted first. So a range that fits the bound is found, in
//!   whatever order its mappings arrive. Then the next range that fails has priority.
//! - A lookup makes progress if more of the range is mapped than at the previous lookup. A failed
//!   lookup without progress uses up one of the [`TRIES`], if mappings of the range were set since
//!   the previous lookup. The last try refuses the range. A range of n addresses makes progress at
//!   most n times between two tries. So it is found or refused. Every second try reports the whole
//!   range as one miss, so that its mappings arrive in order.
//! - A device may give up. So another range gets priority after `max_others` failed lookups of
//!   other ranges without one of this range. This maximum then doubles, up to 65 536. It is halved
//!   each time the range with priority is found or refused. If it exceeds the number of ranges that
//!   fail in turn, no range loses priority early.
//!
//! This takes constant memory. With one record of tries for each range, memory would have to grow
//! with the number of ranges. With fewer records than ranges, each range would lose its record
//! before its next lookup.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::mapping_table::Span;

/// The number of failed lookups without progress after which a range is refused.
pub(in crate::iommu) const TRIES: u32 = 32;
/// The minimum and the maximum of [`State::max_others`].
const MAX_OTHERS: (u32, u32) = (16, 1 << 16);

/// The range that is served first, if a lookup has failed.
#[derive(Debug, Default)]
pub(in crate::iommu) struct Priority {
    /// [`key`] of the range that has priority, or 0. It is changed under the lock of `state`.
    ///
    /// Relaxed: a thread sees the key of its own failed lookup. A thread that maps addresses has
    /// received the miss, and so sees the key. A thread that does not see a key loses at most one
    /// try.
    key: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    first: Option<Failed>,
    /// The number of failed lookups of other ranges after which priority passes on.
    max_others: u32,
}

/// A range whose last lookup failed.
#[derive(Debug)]
struct Failed {
    range: Span,
    /// The number of addresses that were not mapped at that lookup.
    missing: u64,
    tries: u32,
    /// Whether a mapping of the range was set since that lookup.
    mapped: bool,
    /// The number of lookups of other ranges that failed since that lookup.
    others: u32,
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

impl Default for State {
    fn default() -> Self {
        Self {
            first: None,
            max_others: MAX_OTHERS.0,
        }
    }
}

impl Priority {
    fn state(&self) -> MutexGuard<'_, State> {
        // Poisoning is ignored: no code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a lookup of a range failed, and that this number of its addresses is missing.
    #[cold]
    pub(super) fn failed(&self, range: Span, missing: u64) -> Verdict {
        let mut state = self.state();
        let max_others = state.max_others;
        match &mut state.first {
            Some(first) if first.range == range => {
                if first.mapped && missing >= first.missing {
                    first.tries = first.tries.saturating_add(1);
                }
                (first.mapped, first.missing, first.others) = (false, missing, 0);
                match first.tries {
                    TRIES.. => {
                        self.release(&mut state);
                        return Verdict::Refuse;
                    }
                    // Alternates: some IOMMUs can only ask for the first address of a miss.
                    tries if tries % 2 == 1 => return Verdict::AskForAll,
                    _ => return Verdict::AskForParts,
                }
            }
            Some(first) if first.others < max_others => {
                first.others = first.others.saturating_add(1);
                return Verdict::AskForParts;
            }
            Some(_) => state.max_others = max_others.saturating_mul(2).min(MAX_OTHERS.1),
            None => {}
        }
        state.first = Some(Failed {
            range,
            missing,
            tries: 0,
            mapped: false,
            others: 0,
        });
        self.key.store(key(range), Ordering::Relaxed);
        Verdict::AskForParts
    }

    /// Records that the loop of a range has ended: a lookup found it, or its failure is final.
    pub(super) fn ended(&self, range: Span) {
        if self.key.load(Ordering::Relaxed) == key(range) {
            let mut state = self.state();
            if state
                .first
                .as_ref()
                .is_some_and(|first| first.range == range)
            {
                self.release(&mut state);
            }
        }
    }

    /// Records that a range will be mapped.
    ///
    /// Returns the range whose mappings are evicted last.
    pub(super) fn record_mapping(&self, range: Span) -> Option<Span> {
        if self.key.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut state = self.state();
        let failed = state.first.as_mut()?;
        // A mapping that is then refused also counts.
        failed.mapped |= failed.range.overlaps(range);
        Some(failed.range)
    }

    fn release(&self, state: &mut State) {
        state.first = None;
        state.max_others = (state.max_others / 2).max(MAX_OTHERS.0);
        self.key.store(0, Ordering::Relaxed);
    }
}

/// Returns a hash of a range that is not 0.
fn key(range: Span) -> u64 {
    // If two ranges have the same key, a lookup takes the lock without need.
    (range.first ^ range.last.rotate_left(32)) | 1
}
