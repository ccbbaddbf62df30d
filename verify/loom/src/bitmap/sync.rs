//! The names of `src/bitmap/sync.rs`, with loom's atomics. A run can weaken an operation.

use core::panic::Location;
use std::collections::TryReserveError;

use loom::sync::atomic;

pub(crate) use crate::harness::fence;
use crate::harness::{loads_modify, wrong, Wrong};
pub(crate) use loom::sync::atomic::{AtomicU8, Ordering};

#[derive(Debug)]
pub(crate) struct AtomicU64(atomic::AtomicU64);

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self(atomic::AtomicU64::new(value))
    }

    #[track_caller]
    pub(crate) fn load(&self, order: Ordering) -> u64 {
        let order = match wrong(Location::caller()) {
            None => order,
            Some(Wrong::Relaxed) => Ordering::Relaxed,
            Some(Wrong::AcqRel) => Ordering::Acquire,
            // Finds nothing.
            Some(_) => return 0,
        };
        match (order, loads_modify()) {
            (Ordering::SeqCst, true) => self.0.fetch_or(0, order),
            _ => self.0.load(order),
        }
    }

    #[track_caller]
    pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.modify(
            Location::caller(),
            order,
            |_| value,
            |order| self.0.swap(value, order),
        )
    }

    #[track_caller]
    pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        let at = Location::caller();
        self.modify(
            at,
            order,
            |now| now | bits,
            |order| self.0.fetch_or(bits, order),
        )
    }

    #[track_caller]
    pub(crate) fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        let at = Location::caller();
        self.modify(
            at,
            order,
            |now| now & bits,
            |order| self.0.fetch_and(bits, order),
        )
    }

    fn modify(
        &self,
        at: &Location<'_>,
        order: Ordering,
        change: impl Fn(u64) -> u64,
        operation: impl Fn(Ordering) -> u64,
    ) -> u64 {
        match wrong(at) {
            None => operation(order),
            Some(Wrong::Relaxed) => operation(Ordering::Relaxed),
            Some(Wrong::AcqRel) => operation(Ordering::AcqRel),
            Some(Wrong::InTwo) => {
                let now = self.0.load(Ordering::SeqCst);
                self.0.store(change(now), Ordering::SeqCst);
                now
            }
            Some(Wrong::Missing) => 0,
        }
    }
}

/// Swaps a pair word by word, which has more interleavings than one operation on both.
#[track_caller]
pub(crate) fn swap_pair(pair: &[AtomicU64; 2], seen: [u64; 2]) -> [u64; 2] {
    let [low, high] = pair;
    let [seen_low, seen_high] = seen;
    let low = if seen_low == 0 {
        0
    } else {
        low.swap(0, Ordering::SeqCst)
    };
    let high = if seen_high == 0 {
        0
    } else {
        high.swap(0, Ordering::SeqCst)
    };
    [low, high]
}

/// Creates `count` words that are 0.
pub(crate) fn try_words(count: usize) -> Result<Box<[AtomicU64]>, TryReserveError> {
    Ok((0..count).map(|_| AtomicU64::new(0)).collect())
}
