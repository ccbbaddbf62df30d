//! Fences of `src/retired/` that the models show to be needed: each is left out, and a model fails.
//!
//! Each model passes with all fences.

use super::sync::{choose, Fence, Run};
use super::{list_tests, maps_tests};

const LIST: (&str, &str) = (
    "src/retired/list.rs",
    include_str!("../../../../src/retired/list.rs"),
);
const HELD: (&str, &str) = (
    "src/retired/handle.rs",
    include_str!("../../../../src/retired/handle.rs"),
);

/// Returns the line of the first fence after the start of a function.
fn fence_in((file, source): (&'static str, &str), function: &str) -> Fence {
    let mut lines = (1u32..).zip(source.lines());
    lines
        .by_ref()
        .find(|(_, line)| line.contains(&format!("fn {function}(")))
        .unwrap_or_else(|| panic!("{file} has no function {function}"));
    let (line, _) = lines
        .find(|(_, line)| line.contains("fence(Ordering::Acquire)"))
        .unwrap_or_else(|| panic!("{function} of {file} has no fence"));
    Fence { file, line }
}

/// Returns whether a model fails, with loads of either kind.
fn fails(model: fn(), without: Option<Fence>) -> bool {
    [false, true].into_iter().any(|loads_modify| {
        let run = move || {
            choose(Run {
                loads_modify,
                without,
            });
            model();
        };
        // On a new thread: a failed model does not reset loom's thread-local state.
        std::thread::spawn(run).join().is_err()
    })
}

fn is_needed(fence: Fence, model: fn()) {
    assert!(!fails(model, None), "the model fails with all fences");
    assert!(fails(model, Some(fence)), "nothing fails without {fence:?}");
}

#[test]
fn readers_before_without_fence_fails() {
    let fence = fence_in(LIST, "readers_before");
    is_needed(fence, list_tests::readers_before_orders_readers);
}

#[test]
fn readers_of_weak_version_without_fence_fails() {
    let fence = fence_in(HELD, "readers");
    is_needed(
        fence,
        maps_tests::readers_before_with_handle_being_dropped_is_not_too_low,
    );
}

// Not in the list: the fences of `retire`, `take_unread` and `has_readers`. They order a reader
// before a later thread that takes the lock of the list or of the writer. That thread does not load
// the reader's count. loom's acquire fence synchronises with all stores that happen before it, even
// if only another thread has loaded them. So the fence of the later `readers_before` hides the
// absence of one of these.
