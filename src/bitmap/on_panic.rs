//! Marking although a bitmap of another crate panics.
//!
//! One write may be marked in several bitmaps: those of the segments that one system call has
//! written, or the two of a pair. A panic of one must not leave the others unmarked.

use std::panic::{catch_unwind, AssertUnwindSafe};

/// Runs its closure when a panic drops it. The caller must [`forget`] it if there was no panic.
///
/// A panic of the closure itself is caught.
///
/// [`forget`]: core::mem::forget
pub(crate) struct OnPanic<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for OnPanic<F> {
    #[cold]
    fn drop(&mut self) {
        // No code uses the state that a panic leaves, except the bitmap that panicked.
        if let Err(payload) = catch_unwind(AssertUnwindSafe(&mut self.0)) {
            // Dropping the payload may panic. The payload of that panic is leaked, as its drop may
            // panic in turn.
            if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                core::mem::forget(second);
            }
        }
    }
}

/// Calls `mark` for each part, including the parts after one whose call panics.
///
/// Then the first panic continues.
#[inline]
pub(crate) fn mark_each<P>(mut parts: impl Iterator<Item = P>, mark: impl Fn(P)) {
    while let Some(part) = parts.next() {
        let others = OnPanic(|| {
            for part in parts.by_ref() {
                drop(OnPanic(once(|| mark(part))));
            }
        });
        mark(part);
        core::mem::forget(others);
    }
}

/// Returns a closure that calls `call` the first time.
fn once(call: impl FnOnce()) -> impl FnMut() {
    let mut call = Some(call);
    move || {
        if let Some(call) = call.take() {
            call();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Marks the numbers below 6, and panics for those in `bad`. Returns the marked ones, and the
    /// number of the panic.
    fn marked(bad: &[usize]) -> (Vec<usize>, Option<usize>) {
        let marked = RefCell::new(Vec::new());
        let mark = |number: usize| {
            if bad.contains(&number) {
                std::panic::panic_any(number);
            }
            marked.borrow_mut().push(number);
        };
        let panicked = catch_unwind(AssertUnwindSafe(|| mark_each(0..6, mark))).err();
        let number = panicked.map(|payload| *payload.downcast_ref().unwrap());
        (marked.into_inner(), number)
    }

    #[test]
    fn mark_each_marks_all_others_after_panics_and_returns_the_first() {
        assert_eq!(marked(&[]), ((0..6).collect(), None));
        assert_eq!(marked(&[0]), (vec![1, 2, 3, 4, 5], Some(0)));
        assert_eq!(marked(&[5]), (vec![0, 1, 2, 3, 4], Some(5)));
        assert_eq!(marked(&[1, 2, 4]), (vec![0, 3, 5], Some(1)));
        assert_eq!(marked(&[0, 1, 2, 3, 4, 5]), (vec![], Some(0)));
    }
}
