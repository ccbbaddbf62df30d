//! Mappings, and guest memory that consists of them.

mod guest_memory;
#[cfg(unix)]
mod region;
#[cfg(feature = "backend-bitmap")]
mod with_bitmaps;
#[cfg(feature = "xen")]
mod xen_unix;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
#[cfg(unix)]
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::{
    Error, GuestAddressSpace, GuestMemory, GuestMemoryBackend, MemoryRegionAddress, Permissions,
};
use crate::region::GuestMemoryRegion;
use crate::volatile_memory::VolatileMemory;

#[cfg(unix)]
const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn file(len: u64) -> File {
    test_support::temp_file_of_len(len)
}

fn page() -> usize {
    test_support::page_size()
}

fn write_at(mut file: &File, bytes: &[u8], offset: u64) {
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
}

fn read_at<const LEN: usize>(mut file: &File, offset: u64) -> [u8; LEN] {
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut bytes = [0; LEN];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

/// Returns whether the error is that of a file that ends before its region.
fn is_past_eof(error: &FromRangesError) -> bool {
    #[cfg(unix)]
    return matches!(
        error,
        FromRangesError::MmapRegion(MmapRegionError::MappingPastEof)
    );
    #[cfg(windows)]
    matches!(error, FromRangesError::MmapRegion(e) if e.to_string().contains("file ends at"))
}
