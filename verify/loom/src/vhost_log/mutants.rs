//! The fences and the wait of `logs.rs` that a model needs: each is left out, and the model fails.

use super::logs_tests as models;
use super::sync::leave_out;

const SOURCE: &str = include_str!("../../../../vm-memory-vhost/src/log/logs.rs");

/// Returns the number of the first line with `operation` after the line with `place`.
fn line_after(place: &str, operation: &str) -> u32 {
    let mut lines = (1u32..).zip(SOURCE.lines());
    lines
        .by_ref()
        .find(|(_, line)| line.contains(place))
        .unwrap_or_else(|| panic!("no line has {place:?}"));
    let found = lines.find(|(_, line)| line.contains(operation));
    found
        .unwrap_or_else(|| panic!("no {operation:?} follows"))
        .0
}

/// Checks that a model fails without the operation at a line.
fn is_needed(line: u32, model: fn()) {
    let run = move || {
        leave_out(line);
        model();
    };
    // On a new thread: a failed model does not reset loom's thread-local state.
    let passed = std::thread::spawn(run).join().is_ok();
    assert!(!passed, "the model passes without line {line}");
}

#[test]
fn wait_left_out_loses_a_page() {
    let wait = line_after("fn writers<L>", "Arc::strong_count");
    is_needed(wait, models::replace_during_write_loses_no_page);
    is_needed(wait, models::two_replacements_during_write_lose_no_page);
}

#[test]
fn w_or_c_left_out_loses_a_page() {
    for place in ["fn is_on_after_fence", "// `C`."] {
        let fence = line_after(place, "fence(Ordering::SeqCst)");
        is_needed(fence, models::first_log_during_write_loses_no_page);
    }
}

// No model needs these:
//
// - The second `W`. The model of arc-swap is a mutex: it orders a load before each later swap, and
//   with it the data of the writer.
// - The acquire fence after the counts. In loom, a read-modify-write of a log finds each earlier
//   one, whatever orders the two threads.
