//! The driver for this crate.

use ::ours as vm;

#[path = "driver/mod.rs"]
#[expect(
    clippy::duplicate_mod,
    reason = "the driver is compiled once for each crate"
)]
pub mod driver;
