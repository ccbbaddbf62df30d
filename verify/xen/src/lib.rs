//! Scenarios for the feature `xen` of vm-memory: foreign mappings, grants, and their failures.
//!
//! ```text
//!   scenarios     accesses of a device, and their expected results
//!      │
//!      ▼
//!   Environment   grants and revokes pages, and reports which grants are mapped now
//!      │
//!      ├─ Double  /dev/xen/gntdev and /dev/xen/privcmd inside the test program, over memfds
//!      └─ Real    the devices of a machine under Xen, with a domain that the test created
//! ```
//!
//! Each scenario runs in both environments, and must pass or report that it does not apply there.
//! The [`Double`](double::Double) also injects a fault at each call, and records which grants are
//! still mapped and which requests were wrong.
//!
//! ```text
//! cargo test -p verify-xen --features xen
//! cargo xtask xen
//! ```
//!
//! # Layers
//!
//! ```text
//! outcome
//! environment, double   an environment may be the double, whose faults some scenarios inject
//! scenarios, real, vhost_user
//! ```

#![cfg_attr(
    not(test),
    deny(missing_docs, missing_debug_implementations, clippy::as_conversions)
)]
#![cfg(feature = "xen")]

pub mod double;
pub mod environment;
pub mod outcome;
pub mod real;
pub mod scenarios;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;
