//! The driver, on the repository's crate.

use ::ours as vm;

#[path = "driver/mod.rs"]
#[expect(
    clippy::duplicate_mod,
    reason = "one text, two crates: that is the point"
)]
pub mod driver;
