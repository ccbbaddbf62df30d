//! Mappings, and guest memory that consists of them.

mod guest_memory;
mod region;
#[cfg(feature = "backend-bitmap")]
mod with_bitmaps;
#[cfg(feature = "xen")]
mod xen_unix;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::{
    Error, GuestAddressSpace, GuestMemory, GuestMemoryBackend, MemoryRegionAddress, Permissions,
};
use crate::region::GuestMemoryRegion;
use crate::volatile_memory::VolatileMemory;

const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn file(len: u64) -> File {
    test_support::temp_file_of_len(len)
}

fn page() -> usize {
    test_support::page_size()
}
