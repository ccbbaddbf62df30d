//! Memory of this host: built, populated, discarded, plugged and described.
#![cfg(target_os = "linux")]

mod backing;
mod common;
mod description;
mod discard;
mod errors;
mod layout;
mod options;
mod plug;
mod prefault;
mod residency;
