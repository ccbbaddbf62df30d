//! The block device refuses invalid requests, rings and register accesses, and marks its writes.
//!
//! The oracle does not depend on the device. It compares the guest memory that a notification
//! changes with the dirty pages, and both with the descriptors.

mod random;
mod refused;
mod requests;
mod rig;
