//! What every test program needs that may have something to skip.

use std::fmt::Display;
use std::io::Write;

/// Says aloud what cannot be tested here. Not by `println!`, which is shown only when a test fails; and in one write, so that nothing that others say at the
/// same time comes between.
pub(crate) fn skipped(test: &str, why: impl Display) {
    let line = format!("SKIPPED: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
