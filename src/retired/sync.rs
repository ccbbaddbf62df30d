//! The synchronisation primitives of retired versions. `verify/loom` replaces this file by loom's.

pub(crate) use core::sync::atomic::{fence, Ordering};
#[cfg(feature = "backend-atomic")]
pub(crate) use std::sync::Weak;
pub(crate) use std::sync::{Arc, Mutex};

#[cfg(feature = "iommu")]
pub(crate) use arc_swap::ArcSwap;
#[cfg(feature = "iommu")]
pub(crate) use std::sync::Condvar;

/// A reader of the current version.
#[cfg(feature = "iommu")]
pub(crate) type Guard<T> = arc_swap::Guard<Arc<T>>;

/// Locks a mutex whose contents are consistent even after a panic of another holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Returns the value of a counted pointer for a change.
///
/// If the value has other owners, the pointer is replaced by one to a copy of it.
#[cfg(feature = "iommu")]
pub(crate) fn make_mut<T: Clone>(pointer: &mut Arc<T>) -> &mut T {
    Arc::make_mut(pointer)
}

/// Waits for a notification, for at most `left`. May return earlier.
#[cfg(feature = "iommu")]
pub(crate) fn wait<'a, T>(
    condition: &Condvar,
    guard: std::sync::MutexGuard<'a, T>,
    left: Option<std::time::Duration>,
) -> std::sync::MutexGuard<'a, T> {
    use std::sync::PoisonError;
    match left {
        Some(left) => {
            condition
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        }
        None => condition
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner),
    }
}
