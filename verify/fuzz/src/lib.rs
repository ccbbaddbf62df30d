//! What the fuzz targets do, as plain functions: each takes bytes, turns them into a sequence of operations, and runs that on the
//! library and on a model that is slow and obvious. A difference panics.
//!
//! `tests/replay.rs` runs every file of `corpus/` through them, on stable Rust and without libFuzzer.

pub mod access;
pub mod dirty;
pub mod iotlb;
pub mod model;
pub mod regions;
pub mod stream;

/// A target: a name, which is the name of its corpus too, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] = [
    ("access", access::run),
    ("dirty", dirty::run),
    ("iotlb", iotlb::run),
    ("regions", regions::run),
];
