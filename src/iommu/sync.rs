//! What [`snapshots`](super::snapshots) is made of. `verify/loom/` has the same names for what it explores.

pub(crate) use core::sync::atomic::{fence, Ordering};
pub(crate) use std::sync::{Arc, Mutex};

pub(crate) use arc_swap::ArcSwap;

/// What keeps a value that was loaded.
pub(crate) type Guard<T> = arc_swap::Guard<Arc<T>>;

/// Locks. One who panicked in there had not changed anything that the next one cannot do with.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
