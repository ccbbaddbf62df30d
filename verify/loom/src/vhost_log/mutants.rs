//! The fences and the wait of `logs.rs` that a model needs: each is left out, and the model fails.

use super::logs_tests as models;
use crate::harness::{fails, left_out};

const LOGS: (&str, &str) = (
    "log/logs.rs",
    include_str!("../../../../vm-memory-vhost/src/log/logs.rs"),
);

/// Checks that a model fails without the first line with `operation` after the line with `place`.
fn is_needed(place: &str, operation: &str, model: fn()) {
    let mutant = left_out(LOGS, place, operation);
    assert!(fails(model, Some(mutant)), "nothing fails with {mutant:?}");
}

#[test]
fn wait_left_out_loses_a_page() {
    for model in [
        models::replace_during_write_loses_no_page as fn(),
        models::two_replacements_during_write_lose_no_page,
    ] {
        is_needed("fn writers<L>", "Arc::strong_count", model);
    }
}

#[test]
fn w_or_c_left_out_loses_a_page() {
    for place in ["fn is_on_after_fence", "// `C`."] {
        let model = models::first_log_during_write_loses_no_page;
        is_needed(place, "fence(Ordering::SeqCst)", model);
    }
}

// No model needs these:
//
// - The second `W`. The model of arc-swap is a mutex: it orders a load before each later swap, and
//   with it the data of the writer.
// - The acquire fence after the counts. In loom, a read-modify-write of a log finds each earlier
//   one, whatever orders the two threads.
