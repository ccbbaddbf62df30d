mod device;
mod exact_buffer;
mod io_buffer;
mod io_vectors;
mod limits;
mod marks;
mod panics;
mod random;
mod transfers;

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use test_support::{temp_file, PAGE};

use super::*;
use crate::bitmap::AtomicBitmap;
use crate::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Creates `count` adjacent regions of one page each.
fn regions(count: u64) -> Memory {
    let ranges: Vec<_> = (0..count)
        .map(|i| (GuestAddress(i * 0x1000), PAGE))
        .collect();
    Memory::from_ranges(&ranges).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

/// Returns whether a buffer was used for an access that it was not created for.
fn is_refused_by_buffer<T>(result: &Result<T>) -> bool {
    let Err(Error::IOError(error)) = result else {
        return false;
    };
    let names_permissions = error.to_string().contains(" with Permissions::");
    error.kind() == ErrorKind::PermissionDenied && names_permissions
}

/// Returns the addresses of the dirty regions, and makes them clean.
fn dirty(memory: &Memory) -> Vec<u64> {
    memory
        .iter()
        .filter(|region| region.get_mmap().bitmap().get_and_reset() != [0])
        .map(|region| region.start_addr().0)
        .collect()
}
