//! What tests of this crate say where they cannot run.
#![allow(
    dead_code,
    reason = "which tests have something to skip depends on the target and on the features"
)]

use std::fmt::Display;
use std::io::Write;

/// Says aloud what cannot be tested here. Not by `println!`, which is shown only when a test fails; and in one write, so that nothing that others say at the
/// same time comes between.
pub(crate) fn skipped(test: &str, why: impl Display) {
    let line = format!("SKIPPED: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
