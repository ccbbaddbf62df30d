//! Everything that vm-memory 0.18.0 offers, called the way its users call it.
//!
//! `cargo semver-checks` compares declarations. It does not see that a new trait method, a new impl or a new name takes something away
//! from a user who has more than one trait in scope. Here all of them are in scope at once ([`everything`]), with the extension traits
//! that VMMs bring along ([`extensions`]), and every method is called unqualified wherever the published 0.18.0 allows that. What makes
//! such a call ambiguous, or takes one over from a user's own trait, is an error here.
//!
//! It builds against 0.18.0 from the registry as well, and must: a call that 0.18.0 itself refuses proves nothing. Where it does refuse
//! (`check_range` and `get_slices` on a type that is both `GuestMemory` and `GuestMemoryBackend`), the trait is named, as users do.
//!
//! Each module is one area, with functions that panic when an answer is wrong; `tests/calls.rs` runs them.
//!
//! # Layers
//!
//! ```text
//! extensions
//! everything
//! addresses, bitmaps, enums, generic, mappings, memories, own_memory, own_values, streams, swapped, translated, values, volatile
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

/// What the functions here return: any error of the library converts to it by `?`.
pub type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

/// A page of the guest.
pub const PAGE: usize = 0x1000;
