//! A vhost-user back end behind an IOMMU, and its front end.
//!
//! ```text
//!        front end (the VMM)                            back end (the device's process)
//!   ┌──────────────────────────┐   main channel    ┌──────────────────────────────────────┐
//!   │ FrontEnd                 │ ─ UPDATE, ──────► │ receiver thread ──► RwLock<Iotlb>      │
//!   │   sends any message,     │   INVALIDATE      │                        ▲ lookup        │
//!   │   returns the replies    │ ◄───────── ack ── │                        │               │
//!   │                          │ back-end channel  │ device ──► IommuMemory ─ VhostIommu     │
//!   │                          │ ◄── MISS, ─────── │                        │ misses, waits │
//!   │                          │     ACCESS_FAIL   │                        ▼               │
//!   └──────────────────────────┘                   └──────────────────────────────────────┘
//! ```
//!
//! Both channels are Unix sockets. They carry `VHOST_USER_IOTLB_MSG` (vhost-user specification,
//! section "IOMMU support"): a vhost-user header, and the kernel's `struct vhost_iotlb_msg` as
//! payload.
//!
//! The back end is the code that a user of the feature `iommu` writes. The front end contains only
//! the code that the tests need. It sends any message, including hostile ones.
//!
//! # Properties
//!
//! | test | property |
//! |---|---|
//! | `wire` | the messages have the layout and the numbers of the kernel |
//! | `scenario` | misses, permissions, invalidations, deadlines and dirty marks, step by step |
//! | `hostile` | no message or byte sequence panics; a refused message changes nothing |
//! | `stress` | no access uses a mapping after its invalidation was acknowledged |
//!
//! ```text
//! cargo test -p verify-iommu
//! IOMMU_INVALIDATIONS=100000 cargo test --release -p verify-iommu --test stress
//! ```
//!
//! # Layers
//!
//! ```text
//! message, table       messages, and the table of regions
//! backend, frontend
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
mod message;
mod table;

pub use backend::{Refusal, VhostIommu};
pub use frontend::{FrontEnd, FrontEndError};
pub use message::{Header, IotlbMessage, WireError, HEADER_SIZE, IOTLB_SIZE, MAX_PAYLOAD};
pub use table::{FrontEndRegion, RegionTable, TableError};
