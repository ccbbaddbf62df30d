//! The names of `src/iommu/sync.rs`, as loom has them.

pub(crate) use loom::sync::atomic::{fence, Ordering};
pub(crate) use loom::sync::{Arc, Mutex};

/// What arc-swap promises: a pointer that is loaded and swapped in one order, and readers that are counted when it has been swapped.
#[derive(Debug)]
pub(crate) struct ArcSwap<T>(Mutex<Arc<T>>);

pub(crate) type Guard<T> = Arc<T>;

impl<T> ArcSwap<T> {
    pub(crate) fn new(value: Arc<T>) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn load(&self) -> Guard<T> {
        Arc::clone(&lock(&self.0))
    }

    pub(crate) fn swap(&self, value: Arc<T>) -> Arc<T> {
        core::mem::replace(&mut lock(&self.0), value)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics in there")
}
