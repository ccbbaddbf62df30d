//! Fences of `src/retired/` that the models show to be needed: each is left out, and a model fails.
//!
//! Each model passes with all fences.

use super::{list_tests, maps_tests};
use crate::harness::{fails, left_out};

const LIST: (&str, &str) = (
    "src/retired/list.rs",
    include_str!("../../../../src/retired/list.rs"),
);
const HELD: (&str, &str) = (
    "src/retired/handle.rs",
    include_str!("../../../../src/retired/handle.rs"),
);

/// Checks that a model passes, and fails without the first fence of a function.
fn is_needed(source: (&'static str, &str), function: &str, model: fn()) {
    let place = format!("fn {function}(");
    let fence = left_out(source, &place, "fence(Ordering::Acquire)");
    assert!(!fails(model, None), "the model fails with all fences");
    assert!(fails(model, Some(fence)), "nothing fails without {fence:?}");
}

#[test]
fn readers_before_without_fence_fails() {
    let model = list_tests::readers_before_orders_readers;
    is_needed(LIST, "readers_before", model);
}

#[test]
fn readers_of_weak_version_without_fence_fails() {
    let model = maps_tests::readers_before_with_handle_being_dropped_is_not_too_low;
    is_needed(HELD, "readers", model);
}

// Not in the list: the fences of `retire`, `take_unread` and `has_readers`. They order a reader
// before a later thread that takes the lock of the list or of the writer. That thread does not load
// the reader's count. loom's acquire fence synchronises with all stores that happen before it, even
// if only another thread has loaded them. So the fence of the later `readers_before` hides the
// absence of one of these.
