//! The synchronisation primitives of [`logs`](super::logs). `verify/loom` replaces this file by
//! loom's.

pub(super) use core::sync::atomic::{fence, AtomicBool, Ordering};
pub(super) use std::sync::{Arc, Mutex};

pub(super) use arc_swap::ArcSwap;

/// Locks a mutex whose contents are consistent even after a panic of another holder.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
