//! The names of `src/retired/sync.rs`, with loom's types.

pub(crate) use crate::harness::lock;
use crate::harness::Swap;
pub(crate) use loom::sync::atomic::{fence, Ordering};
pub(crate) use loom::sync::{Arc, Condvar, Mutex};

pub(crate) type ArcSwap<T> = Swap<Arc<T>>;
pub(crate) type Guard<T> = Arc<T>;

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
