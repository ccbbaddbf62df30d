//! Interleavings of lock-free parts of the libraries, explored by [loom](https://docs.rs/loom):
//! dirty marks, retired versions, the shared IOTLB and the logs of vhost-user.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --manifest-path verify/loom/Cargo.toml
//! ```
//!
//! The code under test is the library's own: modules here include its files by path. Only the
//! `sync` module of each of them differs. In the library it names the standard library's and
//! arc-swap's types; here it names loom's.
//!
//! | module | file under test | property |
//! |---|---|---|
//! | `bitmap` | `src/bitmap/marks.rs`, `src/bitmap/tracking.rs` | a harvest loses no page that was written and marked; tracking that is switched on loses none |
//! | `iommu`, `retired` | `src/iommu/snapshots.rs`, `src/iommu/requests.rs`, `src/retired/list.rs` | a snapshot never changes, an IOTLB mapping without readers is out of use, and a thread that requests a mapping is woken |
//! | `vhost_log` | `vm-memory-vhost/src/log/logs.rs` | a log that is replaced while threads mark loses no page |
//! | `fences` | `src/retired/list.rs`, `src/retired/handle.rs` | a map without readers is out of use, and the fences are needed |
//!
//! The models explore all interleavings, unless their documentation states a limit. `mutants`
//! modules weaken one ordering, operation or fence at a time, and check that a model fails. At
//! their end they list the orderings that no model needs, and the reason.
//!
//! Limits: arc-swap is modelled by its guarantees, as a mutex. loom does not explore every old
//! value that a relaxed load may return, and treats acquire fences as stronger than they are.
#![cfg(loom)]

#[path = "../../../src/bits/mod.rs"]
mod bits;
#[path = "../../../src/convert.rs"]
mod convert;
mod harness;

/// Dirty marks.
mod bitmap {
    #[path = "../../../../src/bitmap/marks.rs"]
    mod marks;
    #[cfg(test)]
    mod marks_tests;
    #[cfg(test)]
    mod mutants;
    mod sync;
    #[path = "../../../../src/bitmap/tracking.rs"]
    mod tracking;
}

/// The list of retired versions, with loom's counted pointers.
mod retired {
    #[path = "../../../../src/retired/list.rs"]
    mod list;
    pub(crate) mod sync;

    pub(crate) use list::{RetiredList, Unread, Version};
}

/// The snapshots of an IOTLB.
mod iommu {
    #[path = "../../../../src/iommu/requests.rs"]
    mod requests;
    #[path = "../../../../src/iommu/snapshots.rs"]
    mod snapshots;
    #[cfg(test)]
    #[expect(unsafe_code, reason = "accesses values that loom watches")]
    mod snapshots_tests;
}

/// The list of retired versions, with counted pointers that have the orderings of the standard
/// library's. loom's own order more than those, so that no model would need a fence.
#[expect(
    clippy::duplicate_mod,
    reason = "the same file is checked with two kinds of counted pointers"
)]
mod fences {
    #[path = "../../../../src/retired/handle.rs"]
    mod handle;
    #[path = "../../../../src/retired/list.rs"]
    mod list;
    #[cfg(test)]
    mod list_tests;
    #[cfg(test)]
    mod maps_tests;
    #[cfg(test)]
    mod mutants;
    #[expect(unsafe_code, reason = "implements counted pointers")]
    mod sync;
}

/// The logs of a vhost-user back end.
mod vhost_log {
    #[path = "../../../../vm-memory-vhost/src/log/logs.rs"]
    mod logs;
    #[cfg(test)]
    mod logs_tests;
    #[cfg(test)]
    mod mutants;
    mod sync;
}
