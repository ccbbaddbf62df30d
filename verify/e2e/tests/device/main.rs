//! The block device against invalid requests, rings and register accesses.
//!
//! The oracle does not depend on the device. It compares the guest memory that a notification
//! changes with the dirty pages, and both with the descriptors.

mod random;
mod refused;
mod requests;
mod rig;
