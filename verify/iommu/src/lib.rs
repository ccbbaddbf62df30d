//! A vhost-user back end behind an IOMMU, and its front end.
//!
//! ```text
//!        front end (the VMM)                            back end (the device's process)
//!   ┌──────────────────────────┐   main channel    ┌──────────────────────────────────────┐
//!   │ FrontEnd                 │ ─ UPDATE, ──────► │ BackEnd (a thread) ──► SharedIotlb   │
//!   │   sends any message,     │   INVALIDATE      │                          ▲ lookup    │
//!   │   returns the replies    │ ◄───────── ack ── │                          │           │
//!   │                          │ back-end channel  │ device ► IommuMemory ► AskingIommu   │
//!   │                          │ ◄── MISS, ─────── │                          ▼           │
//!   │                          │     ACCESS_FAIL   │                   BackendChannel     │
//!   └──────────────────────────┘                   └──────────────────────────────────────┘
//! ```
//!
//! Both channels are Unix sockets. They carry `VHOST_USER_IOTLB_MSG` (vhost-user specification,
//! section "IOMMU support"): a vhost-user header, and the kernel's `struct vhost_iotlb_msg` as
//! payload.
//!
//! Messages, regions, the back-end channel and the IOMMU are those of `vm-memory-vhost` and
//! `vm-memory`. The back end adds the thread that reads the main channel, which the crates `vhost`
//! and `vhost-user-backend` do for a user. The front end contains only the code that the tests
//! need. It sends any message, including hostile ones.
//!
//! # Properties
//!
//! | test | property |
//! |---|---|
//! | `wire` | the messages have the layout and the numbers of the kernel |
//! | `scenario` | misses, refused accesses and invalidations, step by step |
//! | `hostile` | no message or byte sequence panics; a refused message changes nothing |
//! | `stress` | no access uses a mapping after its invalidation was acknowledged |
//!
//! ```text
//! cargo test -p verify-iommu
//! IOMMU_INVALIDATIONS=100000 cargo test --release -p verify-iommu --test stress
//! ```

#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        missing_debug_implementations,
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

mod backend;
mod frontend;

pub use backend::{BackEnd, Refusal, VhostIommu};
pub use frontend::{FrontEnd, FrontEndError};
