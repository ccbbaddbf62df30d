//! The names of `vm-memory-vhost/src/log/sync.rs`, with loom's types. A run can leave out a fence,
//! or the count of the writers.

use core::fmt;
use core::ops::Deref;
use core::panic::Location;

pub(super) use crate::harness::{fence, lock};
use crate::harness::{wrong, Swap};
pub(super) use loom::sync::atomic::{AtomicBool, Ordering};
pub(super) use loom::sync::Mutex;

/// A counted pointer.
pub(super) struct Arc<T>(loom::sync::Arc<T>);

impl<T> Arc<T> {
    pub(super) fn new(value: T) -> Self {
        Self(loom::sync::Arc::new(value))
    }

    #[track_caller]
    pub(super) fn strong_count(this: &Self) -> usize {
        if wrong(Location::caller()).is_some() {
            1
        } else {
            loom::sync::Arc::strong_count(&this.0)
        }
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        Self(loom::sync::Arc::clone(&self.0))
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Arc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

pub(super) type ArcSwap<T> = Swap<Arc<T>>;
