//! The names of `vm-memory-vhost/src/log/sync.rs`, with loom's types. A run can leave out a fence,
//! or the count of the writers.

use core::cell::Cell;
use core::fmt;
use core::ops::Deref;
use core::panic::Location;

pub(super) use loom::sync::atomic::{AtomicBool, Ordering};
pub(super) use loom::sync::Mutex;

std::thread_local! {
    /// The line of `logs.rs` whose operation is left out. loom runs all threads of a model on the
    /// thread that explores it.
    static WITHOUT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Selects the variant for the models that this thread explores next.
pub(super) fn leave_out(line: u32) {
    WITHOUT.set(Some(line));
}

fn is_left_out(at: &Location<'_>) -> bool {
    at.file().ends_with("log/logs.rs") && WITHOUT.get() == Some(at.line())
}

#[track_caller]
pub(super) fn fence(order: Ordering) {
    if !is_left_out(Location::caller()) {
        loom::sync::atomic::fence(order);
    }
}

/// A counted pointer.
pub(super) struct Arc<T>(loom::sync::Arc<T>);

impl<T> Arc<T> {
    pub(super) fn new(value: T) -> Self {
        Self(loom::sync::Arc::new(value))
    }

    #[track_caller]
    pub(super) fn strong_count(this: &Self) -> usize {
        if is_left_out(Location::caller()) {
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

/// The guarantees of arc-swap that the library uses. Loads and swaps of the pointer have one order,
/// and `swap` returns after each reader of the old pointer was counted.
#[derive(Debug)]
pub(super) struct ArcSwap<T>(Mutex<Arc<T>>);

impl<T> ArcSwap<T> {
    pub(super) fn new(value: Arc<T>) -> Self {
        Self(Mutex::new(value))
    }

    pub(super) fn load(&self) -> Arc<T> {
        Arc::clone(&lock(&self.0))
    }

    pub(super) fn swap(&self, value: Arc<T>) -> Arc<T> {
        core::mem::replace(&mut lock(&self.0), value)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> loom::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no model panics while it holds a lock")
}
