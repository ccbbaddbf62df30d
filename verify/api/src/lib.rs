//! Calls of everything in vm-memory 0.18.0, in the way its users call it.
//!
//! `cargo semver-checks` compares declarations. It does not detect that a new trait method, impl or
//! name makes a call ambiguous for users with several traits in scope. Nor does it detect a call
//! that resolves to the new method instead of a user's own. Here all traits of the library are in
//! scope ([`everything`]), with extension traits like those of VMMs ([`extensions`]). Methods are
//! called without naming the trait where 0.18.0 allows it.
//!
//! This crate also builds with 0.18.0 from the registry, because a call that 0.18.0 does not
//! compile proves nothing. `check_range` and `get_slices` are ambiguous there on a type that
//! is both `GuestMemory` and `GuestMemoryBackend`; these calls name the trait.
//!
//! On Windows, it has the calls of what 0.18.0 has there.
//!
//! Each module covers one area. Its functions panic on a wrong result; `tests/calls.rs` runs them.
//!
//! # Layers
//!
//! ```text
//! extensions
//! everything
//! addresses, values, own_values, enums, bitmaps, streams, volatile
//! mappings, own_memory, memories, translated, swapped, generic
//! ```
#![deny(warnings)]
#![deny(deprecated)]
#![expect(
    unsafe_code,
    reason = "calls the unsafe functions of the interface too"
)]

pub mod addresses;
pub mod bitmaps;
pub mod enums;
pub mod everything;
pub mod extensions;
pub mod generic;
pub mod mappings;
pub mod memories;
pub mod own_memory;
pub mod own_values;
pub mod streams;
pub mod swapped;
pub mod translated;
pub mod values;
pub mod volatile;

/// The result of the functions here. Every error of the library converts to it by `?`.
pub type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

/// The size of a page of the guest.
pub const PAGE: usize = 0x1000;
