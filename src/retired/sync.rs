//! The synchronisation primitives of retired versions. `verify/loom` replaces this file by loom's.

pub(crate) use core::sync::atomic::{fence, Ordering};
#[cfg(feature = "backend-atomic")]
pub(crate) use std::sync::Weak;
pub(crate) use std::sync::{Arc, Mutex};

#[cfg(feature = "iommu")]
pub(crate) use arc_swap::ArcSwap;

/// A reader of the current version.
#[cfg(feature = "iommu")]
pub(crate) type Guard<T> = arc_swap::Guard<Arc<T>>;

/// Locks a mutex whose contents are consistent even after a panic of another holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
