//! The operations on Linux: what differs from other systems, and [`content()`].

mod blocks;
mod content;
mod pages;
mod populate;
mod usage;

pub(super) use blocks::{
    check_memory as check_memory_of_blocks, close_all, not_plugged, prepare, prepare_empty,
    withdraw,
};
pub use content::{content, Content};
pub(super) use pages::discard_part;
pub(super) use populate::{cause_of, check_memory, cpus_of, populate_pages};
pub(crate) use usage::resident_in_file;
pub(super) use usage::{unknown_usage, usages};
