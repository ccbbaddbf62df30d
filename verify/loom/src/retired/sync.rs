//! The names of `src/retired/sync.rs`, with loom's types.

pub(crate) use loom::sync::atomic::{fence, Ordering};
pub(crate) use loom::sync::{Arc, Condvar, Mutex};

/// The guarantees of arc-swap that the library uses. Loads and swaps of the pointer have one order,
/// and `swap` returns after each reader of the old pointer was counted.
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
    mutex.lock().expect("no model panics while it holds a lock")
}

/// `Arc::make_mut`, which loom's counted pointer does not have.
pub(crate) fn make_mut<T: Clone>(pointer: &mut Arc<T>) -> &mut T {
    if Arc::get_mut(pointer).is_none() {
        *pointer = Arc::new((**pointer).clone());
    }
    Arc::get_mut(pointer).expect("the copy has one owner")
}

/// Waits for a notification. Deadlines do not pass in a model: loom reports a wait without end.
pub(crate) fn wait<'a, T>(
    condition: &Condvar,
    guard: loom::sync::MutexGuard<'a, T>,
    _left: Option<std::time::Duration>,
) -> loom::sync::MutexGuard<'a, T> {
    condition
        .wait(guard)
        .expect("no model panics while it holds a lock")
}
