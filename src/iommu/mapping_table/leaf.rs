//! [`Leaf`]: up to 128 consecutive mappings.

use core::ops::Range;
use std::sync::Arc;

use super::count_steps;
use super::mapping::IovaMapping;
use super::summary::{Cached, Summary};

/// The maximum number of mappings in a leaf.
pub(super) const CAPACITY: usize = 128;

/// Consecutive mappings, sorted by address. Never empty, except while it is being changed.
#[derive(Debug)]
pub(super) struct Leaf {
    /// The start of the first mapping.
    pub(super) first: u64,
    /// The number of mappings per address, as a fraction of 2^64, if they are spread evenly.
    scale: u64,
    /// Valid and sorted up to `len`. Copies of the table share the array, so a
    /// change copies the array first.
    pub(super) mappings: Arc<[IovaMapping; CAPACITY]>,
    pub(super) len: usize,
    /// Cleared by each change of the mappings. A copy that shares the mappings may have another
    /// length, and so another summary.
    summary: Cached,
}

/// Shares the mappings.
impl Clone for Leaf {
    fn clone(&self) -> Self {
        Leaf {
            mappings: Arc::clone(&self.mappings),
            summary: self.summary.clone(),
            ..*self
        }
    }

    /// Does not change the reference count if both leaves have the same mappings. Changing it costs
    /// more than the rest of the copy.
    #[inline]
    fn clone_from(&mut self, source: &Self) {
        if !Arc::ptr_eq(&self.mappings, &source.mappings) {
            self.mappings = Arc::clone(&source.mappings);
            self.summary.clone_from(&source.summary);
        }
        self.first = source.first;
        self.scale = source.scale;
        self.len = source.len;
    }
}

impl Leaf {
    /// Creates a leaf of at least one and at most [`CAPACITY`] mappings.
    pub(super) fn new(mappings: &[IovaMapping]) -> Self {
        let mut array = [IovaMapping::default(); CAPACITY];
        let len = mappings.len().min(CAPACITY);
        for (to, from) in array.iter_mut().zip(mappings) {
            *to = *from;
        }
        let mut leaf = Leaf {
            first: 0,
            scale: 0,
            mappings: Arc::new(array),
            len,
            summary: Cached::default(),
        };
        leaf.measure();
        leaf
    }

    #[inline(always)]
    pub(super) fn mappings(&self) -> &[IovaMapping] {
        self.mappings.get(..self.len).unwrap_or_default()
    }

    /// Returns the mappings for a change. Copies them if another table shares them.
    #[inline]
    fn make_mut(&mut self) -> &mut [IovaMapping; CAPACITY] {
        Arc::make_mut(&mut self.mappings)
    }

    /// Returns the summary of the mappings.
    pub(super) fn summary(&self) -> Summary {
        self.summary.get(self.len, || {
            count_steps(self.len);
            Summary::of(self.mappings())
        })
    }

    /// Updates `first` and `scale` after a change of the mappings.
    fn measure(&mut self) {
        self.summary.forget();
        let (Some(first), Some(last)) = (self.mappings().first(), self.mappings().last()) else {
            return;
        };
        let (first, span) = (first.start, last.start.wrapping_sub(first.start));
        self.first = first;
        // Rounded up, so that the guess for a mapping's start is that mapping, not the one before.
        self.scale = match u64::try_from(self.len.saturating_sub(1)) {
            Ok(steps) if steps != 0 && span > steps => {
                // Divides by the upper 32 bits of the span. A 128-bit division takes as long as the
                // rest of a change, and guesses are checked.
                let shift = 32u32.saturating_sub(span.leading_zeros());
                let part = steps
                    .wrapping_shl(56)
                    .checked_div(span.wrapping_shr(shift))
                    .unwrap_or(0);
                match shift.checked_sub(8) {
                    Some(less) => part.wrapping_shr(less).saturating_add(1),
                    None => part
                        .saturating_add(1)
                        .saturating_mul(1u64.wrapping_shl(8u32.saturating_sub(shift))),
                }
            }
            Ok(0) | Err(_) => 0,
            Ok(_) => u64::MAX,
        };
    }

    /// Returns the index of the last mapping that starts at or before `addr`, which must not be
    /// before the first mapping.
    #[inline(always)]
    pub(super) fn last_at_or_before(&self, addr: u64) -> usize {
        let product =
            u128::from(addr.wrapping_sub(self.first)).wrapping_mul(u128::from(self.scale));
        let guess = usize::try_from(product.wrapping_shr(64))
            .unwrap_or(usize::MAX)
            .min(self.len.wrapping_sub(1));
        let mappings = self.mappings();
        if let Some(here) = mappings.get(guess) {
            let before_next = mappings
                .get(guess.wrapping_add(1))
                .is_none_or(|next| addr < next.start);
            if here.start <= addr && before_next {
                return guess;
            }
        }
        mappings
            .partition_point(|mapping| mapping.start <= addr)
            .saturating_sub(1)
    }

    /// Inserts a mapping at an index. The leaf must not be full.
    pub(super) fn insert(&mut self, at: usize, mapping: IovaMapping) {
        let end = self.len.saturating_add(1);
        if let Some(moved @ [_, ..]) = self.make_mut().get_mut(at..end) {
            moved.rotate_right(1);
            if let Some(first) = moved.first_mut() {
                *first = mapping;
            }
            self.len = end;
            self.measure();
        }
    }

    /// Removes the mappings with these indices.
    pub(super) fn remove(&mut self, range: Range<usize>) {
        let len = self.len;
        if range.start <= range.end && range.end <= len {
            if range.end < len {
                self.make_mut().copy_within(range.end..len, range.start);
            }
            self.len = len.saturating_sub(range.len());
            self.measure();
        }
    }

    /// Changes the mapping at an index, whose start must stay between those of its neighbours.
    #[inline]
    pub(super) fn change(&mut self, at: usize, change: impl FnOnce(&mut IovaMapping)) {
        if at >= self.len {
            return;
        }
        self.summary.forget();
        if let Some(mapping) = self.make_mut().get_mut(at) {
            let start = mapping.start;
            change(mapping);
            if mapping.start != start {
                self.measure();
            }
        }
    }

    /// Appends the mappings of the next leaf. They must fit.
    pub(super) fn append(&mut self, next: &Leaf) {
        let (len, end) = (self.len, self.len.saturating_add(next.len));
        if let Some(to) = self.make_mut().get_mut(len..end) {
            for (to, from) in to.iter_mut().zip(next.mappings()) {
                *to = *from;
            }
            self.len = end;
            self.measure();
        }
    }
}
