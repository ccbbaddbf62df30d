//! The driver, on the published crate.

use ::reference as vm;

#[path = "driver/mod.rs"]
#[expect(
    clippy::duplicate_mod,
    reason = "one text, two crates: that is the point"
)]
pub mod driver;
