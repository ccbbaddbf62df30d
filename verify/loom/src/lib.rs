//! Every interleaving of the library's lock-free parts, by [loom](https://docs.rs/loom).
//!
//! The files under test are the library's own, compiled here with loom's atomics in the place of the processor's:
//! `RUSTFLAGS="--cfg loom" cargo test --release --manifest-path verify/loom/Cargo.toml`. Each test explores all interleavings to the end, but for one that says how
//! far it goes.
#![cfg(loom)]

#[path = "../../../src/bits/mod.rs"]
mod bits;

mod bitmap {
    #[path = "../../../../src/bitmap/marks.rs"]
    mod marks;
    #[cfg(test)]
    mod marks_tests;
    #[cfg(test)]
    mod mutants;
    mod sync;
}

mod retired {
    #[path = "../../../../src/retired/list.rs"]
    mod list;
    pub(crate) mod sync;

    pub(crate) use list::{RetiredList, Unread, Version};
}

mod iommu {
    #[path = "../../../../src/iommu/snapshots.rs"]
    mod snapshots;
    #[cfg(test)]
    mod snapshots_tests;
}

mod fences {
    #[path = "../../../../src/retired/held.rs"]
    mod held;
    #[path = "../../../../src/retired/list.rs"]
    mod list;
    #[cfg(test)]
    mod list_tests;
    #[cfg(test)]
    mod maps_tests;
    #[cfg(test)]
    mod mutants;
    mod sync;
}
