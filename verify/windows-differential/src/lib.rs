//! Compares the mappings of `vm-memory` 0.18.0 and of this crate on Windows, where
//! `verify/differential` does not build. `tests/mappings.rs` compares mappings,
//! and `tests/interface.rs` the rest of the interface.
