//! Replacements for the items of `src/retired/sync.rs`. The counted pointers have the orderings of
//! those in the standard library. A run can leave out a fence.

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::Deref;
use std::sync::Arc as Memory;

use crate::harness::loads_modify;
pub(crate) use crate::harness::{fence, lock};
use loom::sync::atomic::AtomicUsize;
pub(crate) use loom::sync::atomic::Ordering;
pub(crate) use loom::sync::Mutex;

fn load(count: &AtomicUsize) -> usize {
    if loads_modify() {
        count.fetch_or(0, Ordering::Relaxed)
    } else {
        count.load(Ordering::Relaxed)
    }
}

/// The target of counted pointers. The memory itself outlives the model's last pointer.
struct Target<T> {
    strong: AtomicUsize,
    /// `None` after the last strong pointer is dropped.
    value: UnsafeCell<Option<T>>,
}

// SAFETY: the value is shared by, moved with, and dropped by the last of the strong pointers, which
// threads may share. That needs both bounds, as for `std::sync::Arc`.
unsafe impl<T: Send + Sync> Send for Target<T> {}
// SAFETY: sharing a pointer permits cloning it, so that threads share the value and the last one
// drops it. That needs both bounds.
unsafe impl<T: Send + Sync> Sync for Target<T> {}

pub(crate) struct Arc<T>(Memory<Target<T>>);

impl<T> Arc<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Memory::new(Target {
            strong: AtomicUsize::new(1),
            value: UnsafeCell::new(Some(value)),
        }))
    }

    pub(crate) fn strong_count(this: &Self) -> usize {
        load(&this.0.strong)
    }

    pub(crate) fn downgrade(this: &Self) -> Weak<T> {
        Weak(Some(Memory::clone(&this.0)))
    }

    pub(crate) fn try_unwrap(this: Self) -> Result<T, Self> {
        let only = this
            .0
            .strong
            .compare_exchange(1, 0, Ordering::Relaxed, Ordering::Relaxed);
        if only.is_err() {
            return Err(this);
        }
        fence(Ordering::Acquire);
        let this = core::mem::ManuallyDrop::new(this);
        #[expect(clippy::disallowed_methods, reason = "moves a counted pointer")]
        // SAFETY: `this` is not used again, and `ManuallyDrop` does not drop it.
        let memory = unsafe { core::ptr::read(&this.0) };
        // SAFETY: the count was 1, so this was the only strong pointer; now it is 0 and there is
        // none.
        let value = unsafe { &mut *memory.value.get() };
        Ok(value.take().expect("a strong pointer has a value"))
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        self.0.strong.fetch_add(1, Ordering::Relaxed);
        Self(Memory::clone(&self.0))
    }
}

impl<T> Drop for Arc<T> {
    fn drop(&mut self) {
        if self.0.strong.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: the count was 1, so this is the only strong pointer.
            let value = unsafe { &mut *self.0.value.get() };
            drop(value.take());
        }
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: while a strong pointer is borrowed, `try_unwrap` and `drop` of the last one
        // cannot run. Nothing else changes the value: the count is not 1 for another pointer, and
        // this one is borrowed.
        let value = unsafe { &*self.0.value.get() };
        value.as_ref().expect("a strong pointer has a value")
    }
}

impl<T: fmt::Debug> fmt::Debug for Arc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

pub(crate) struct Weak<T>(Option<Memory<Target<T>>>);

impl<T> Weak<T> {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    pub(crate) fn strong_count(&self) -> usize {
        self.0.as_ref().map_or(0, |target| load(&target.strong))
    }
}

impl<T> fmt::Debug for Weak<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(Weak)")
    }
}
