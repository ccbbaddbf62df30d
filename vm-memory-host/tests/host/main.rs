//! Tests that build, populate, discard, plug and describe memory on this host.
#![cfg(target_os = "linux")]

mod backing;
mod balloon;
mod common;
mod content;
mod description;
mod discard;
mod errors;
mod mapping;
mod options;
mod own_region;
mod plug;
mod prefault;
mod read_only;
mod residency;
mod userfault;
