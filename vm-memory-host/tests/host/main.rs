//! Real memory of this machine, built, filled, given back, plugged and described.
#![cfg(target_os = "linux")]
#![expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that goes wrong may panic, and says what it does in fewer words"
)]

mod backings;
mod common;
mod giving_back;
mod plugging;
mod refusals;
