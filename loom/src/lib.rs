//! Every interleaving of the library's lock-free parts, by [loom](https://docs.rs/loom).
//!
//! The files under test are the library's own, compiled here with loom's atomics in the place of the processor's:
//! `RUSTFLAGS="--cfg loom" cargo test --release --manifest-path loom/Cargo.toml`. Each test explores all interleavings to the end.
#![cfg(loom)]

mod bitmap {
    #[path = "../../../src/bitmap/bits.rs"]
    mod bits;
    #[path = "../../../src/bitmap/marks.rs"]
    mod marks;
    mod marks_tests;
    mod sync;
}

mod iommu {
    #[path = "../../../src/iommu/snapshots.rs"]
    mod snapshots;
    mod snapshots_tests;
    mod sync;
}
