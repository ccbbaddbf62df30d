//! The fuzz targets as functions. Each turns bytes into a sequence of operations, and runs it on
//! the library and on a slow and simple model. It panics on a difference.
//!
//! `tests/replay.rs` runs each file of `corpus/` through its target, on stable Rust and without
//! libFuzzer.

pub mod access;
pub mod dirty;
pub mod iotlb;
pub mod model;
pub mod regions;
pub mod stream;

/// A target: its name, which is also the name of its corpus, and the function that runs an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] = [
    ("access", access::run),
    ("dirty", dirty::run),
    ("iotlb", iotlb::run),
    ("regions", regions::run),
];
