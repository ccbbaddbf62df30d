//! The atomics of [`marks`](super::marks) and [`tracking`](super::tracking).
//!
//! `verify/loom` compiles these files with a module of the same names instead of this one. Tests of
//! this crate count the operations that modify a shared word.

use std::collections::TryReserveError;

use crate::zeroed::try_zeroed;

#[cfg(not(test))]
pub(crate) use core::sync::atomic::{fence, AtomicU64};
pub(crate) use core::sync::atomic::{AtomicU8, Ordering};
#[cfg(test)]
pub(crate) use counted::{fence, swap_pair, AtomicU64};

#[cfg(not(test))]
pub(crate) use super::pair::swap_pair;

/// Creates `count` words that are 0, or returns an error if memory runs out.
#[cfg(not(test))]
pub(crate) fn try_words(count: usize) -> Result<Box<[AtomicU64]>, TryReserveError> {
    Ok(try_zeroed(count)?.into_boxed_slice())
}

/// Creates `count` counted words that are 0, or returns an error if memory runs out.
#[cfg(test)]
pub(crate) fn try_words(count: usize) -> Result<Box<[AtomicU64]>, TryReserveError> {
    let words = try_zeroed::<u64>(count)?;
    Ok(words.into_iter().map(AtomicU64::new).collect())
}

#[cfg(test)]
pub(crate) mod counted {
    use core::cell::Cell;
    use core::sync::atomic;

    use super::Ordering;

    std::thread_local! {
        static COUNTS: Cell<Counts> = const { Cell::new(Counts { modified: 0, after_fence: 0 }) };
    }

    /// The numbers of read-modify-writes of a thread.
    #[derive(Clone, Copy, Debug)]
    struct Counts {
        modified: usize,
        /// Those after its last fence.
        after_fence: usize,
    }

    /// Returns the number of read-modify-writes of `work`, and how many follow its last fence.
    pub(crate) fn count(work: impl FnOnce()) -> (usize, usize) {
        COUNTS.set(Counts {
            modified: 0,
            after_fence: 0,
        });
        work();
        let counts = COUNTS.get();
        (counts.modified, counts.after_fence)
    }

    pub(crate) fn fence(order: Ordering) {
        atomic::fence(order);
        let modified = COUNTS.get().modified;
        COUNTS.set(Counts {
            modified,
            after_fence: 0,
        });
    }

    /// Swaps a pair word by word.
    pub(crate) fn swap_pair(pair: &[AtomicU64; 2], _seen: [u64; 2]) -> [u64; 2] {
        pair.each_ref().map(|word| word.swap(0, Ordering::SeqCst))
    }

    #[derive(Debug)]
    pub(crate) struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> Self {
            Self(atomic::AtomicU64::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u64 {
            self.0.load(order)
        }

        pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
            self.counted().swap(value, order)
        }

        pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
            self.counted().fetch_or(bits, order)
        }

        pub(crate) fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
            self.counted().fetch_and(bits, order)
        }

        fn counted(&self) -> &atomic::AtomicU64 {
            let Counts {
                modified,
                after_fence,
            } = COUNTS.get();
            COUNTS.set(Counts {
                modified: modified + 1,
                after_fence: after_fence + 1,
            });
            &self.0
        }
    }
}
