//! The driver for 0.18.0.

use ::reference as vm;

#[path = "driver/mod.rs"]
#[expect(
    clippy::duplicate_mod,
    reason = "the driver is compiled once for each crate"
)]
pub mod driver;
