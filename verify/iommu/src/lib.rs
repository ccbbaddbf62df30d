//! A vhost-user back end behind an IOMMU, with the front end that it talks to.
//!
//! ```text
//!        front end (the VMM)                            back end (the device's process)
//!   ┌──────────────────────────┐   main channel    ┌──────────────────────────────────────┐
//!   │ FrontEnd                 │ ─ UPDATE, ──────► │ receiver thread ──► RwLock<Iotlb>      │
//!   │   send, receive: as the  │   INVALIDATE      │                        ▲ lookup        │
//!   │   test wants it          │ ◄───────── ack ── │                        │               │
//!   │                          │ back-end channel  │ device ──► IommuMemory ─ VhostIommu     │
//!   │                          │ ◄── MISS, ─────── │                        │ misses, waits │
//!   │                          │     ACCESS_FAIL   │                        ▼               │
//!   └──────────────────────────┘                   └──────────────────────────────────────┘
//! ```
//!
//! Both channels are Unix sockets, and carry `VHOST_USER_IOTLB_MSG` (vhost-user specification, section "IOMMU support"): the
//! header of vhost-user, and the kernel's `struct vhost_iotlb_msg` as payload. The back end is what a user of the feature `iommu`
//! has to write; the front end is the least that a test needs, and sends whatever it is told, hostile messages too.
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
