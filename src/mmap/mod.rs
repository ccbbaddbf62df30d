//! Guest memory in mappings of this process.
//!
//! ```text
//!   GuestMemoryMmap          a GuestRegionCollection of
//!     └─ GuestRegionMmap     a guest address, and an Arc of
//!          └─ MmapRegion     host address, size, protection, file, bitmap, plugged blocks
//! ```
//!
//! | to | use |
//! |---|---|
//! | map zeroes or files at guest addresses | [`GuestMemoryMmap::from_ranges`], [`GuestMemoryMmap::from_ranges_with_files`] |
//! | choose permissions, flags, bitmap | [`MmapRegionBuilder`] |
//! | use a mapping that exists already | [`MmapRegionBuilder::with_raw_mmap_pointer`] |
//! | plug and unplug memory while devices run | [`PluggedBlocks`] |
//! | map memory of a Xen guest | `MmapRange` and `MmapXenFlags`, with the feature `xen` |
//! | use huge pages, NUMA nodes, prefaulting | the crate `vm-memory-host` |
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! // 1 GiB below the 32-bit hole of a PC, and 1 GiB above it.
//! let ranges = [(GuestAddress(0), 1 << 30), (GuestAddress(1 << 32), 1 << 30)];
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
//! memory.write_slice(b"console=ttyS0\0", GuestAddress(0x2_0000))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/boot.rs` loads a kernel image. `examples/virtio_mem.rs` plugs and unplugs
//! blocks of a region.
//!
//! # Files that are too short
//!
//! Accessing a page of a mapping past the end of its file raises SIGBUS. A regular file that ends
//! before the last page of its region is therefore refused ([`MmapRegionError::MappingPastEof`]). A
//! file that ends inside the last page is accepted: the rest of that page reads as zeroes. If a
//! file is truncated later, accesses return an error where [`fault`](crate::fault) is installed.
//!
//! # Devices that are too short
//!
//! A block device that is shorter than its region is accepted. `fstat(2)` does not return the
//! length of a device, and this crate makes no other system call. Accessing a page past its end
//! raises SIGBUS, or returns an error where [`fault`](crate::fault) is installed. Compare the
//! lengths before you map the device. Seek to its end, or use the crate `vm-memory-host`, which
//! does so.
//!
//! # Protection
//!
//! A region without `PROT_WRITE` refuses writes through [`Bytes`](crate::Bytes).
//! [`GuestMemory::check_range`](crate::GuestMemory::check_range) and
//! [`GuestMemory::get_slices`](crate::GuestMemory::get_slices) apply the same rule. Raw pointers
//! and [`GuestMemoryRegion::get_slice`](crate::GuestMemoryRegion::get_slice), which name no access,
//! are not checked.
//!
//! The protection is that of the call which creates the region: a later `mprotect(2)` does not
//! change what the region refuses. A region of an existing mapping refuses nothing if its
//! protection is not stated ([`MmapRegion::build_raw`]).
//!
//! # Windows
//!
//! A region of zeroes is private memory of `VirtualAlloc`, which is committed at once. A region of
//! a file is a view (`MapViewOfFile`), at any page of the file. `MmapRegionError` is
//! [`std::io::Error`] there. A file that is too short is refused, and not extended. While a file
//! has a view, the system does not truncate it.
//!
//! The builder has no protection and no flags; use [`MmapRegionBuilder::with_permissions`]. The
//! methods that return them do not exist.
//!
//! # System calls
//!
//! `mmap(2)` and `munmap(2)`, `madvise(2)` if `munmap(2)` fails, and `fstat(2)` for a region of a
//! file. Some versions of glibc call `newfstatat` instead of `fstat`. 0.18.0 calls neither: a
//! seccomp filter must allow the one in use if files are mapped. A region of a Xen guest also calls
//! `ioctl(2)`, as `MmapRange` describes.

use std::borrow::Borrow;

mod blocks;
mod builder;
mod guest_region;
mod host_range;
mod owner;
mod region;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;
#[cfg(feature = "xen")]
mod xen;

#[cfg(test)]
mod tests;

pub use blocks::{BlockStates, PluggedBlocks, PluggedBlocksError};
pub use builder::MmapRegionBuilder;
pub use guest_region::GuestRegionMmap;
pub use region::MmapRegion;
pub use system::MmapRegionError;
/// The mappings of this system: their options, errors and constructors.
#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;
#[cfg(feature = "xen")]
pub use xen::{MmapRange, MmapXenFlags};

pub use crate::bitmap::NewBitmap;
use crate::guest_memory::{FileOffset, GuestAddress};
use crate::region::{GuestRegionCollection, GuestRegionCollectionError};

/// The reason why ranges do not form a guest memory.
#[derive(Debug, thiserror::Error)]
pub enum FromRangesError {
    /// The regions overlap, are not sorted, or there are none.
    #[error("the regions do not form a guest memory: {0}")]
    Collection(#[from] GuestRegionCollectionError),
    /// A region could not be mapped.
    #[error("cannot map a region: {0}")]
    MmapRegion(#[from] MmapRegionError),
    /// A region reaches the end of the guest's address space.
    #[error("a region does not end below 2^64; move it down or make it smaller")]
    InvalidGuestRegion,
}

/// A guest memory whose regions are mappings of this process.
pub type GuestMemoryMmap<B = ()> = GuestRegionCollection<GuestRegionMmap<B>>;

impl<B: NewBitmap> GuestRegionCollection<GuestRegionMmap<B>> {
    /// Maps regions of zeroes, given as guest physical addresses and sizes in bytes.
    ///
    /// # Errors
    ///
    /// - [`FromRangesError::Collection`] if there are no regions, they are not sorted, or two
    ///   overlap;
    /// - [`FromRangesError::InvalidGuestRegion`] if a region would not end below 2^64;
    /// - [`FromRangesError::MmapRegion`] if a mapping fails: see [`MmapRegion::new`].
    pub fn from_ranges(
        ranges: &[(GuestAddress, usize)],
    ) -> std::result::Result<Self, FromRangesError> {
        Self::from_ranges_with_files(ranges.iter().map(|(addr, size)| (*addr, *size, None)))
    }

    /// Maps regions, given as guest physical addresses, sizes in bytes, and files.
    ///
    /// A region with a file is shared with it. A region without one is private and filled with
    /// zeroes. The length of a [block device](self#devices-that-are-too-short) is not checked.
    ///
    /// Two regions may map the same bytes of a file, as in 0.18.0. A write to one is then visible
    /// in the other, but only the address that was written is marked dirty. A migration of such a
    /// guest must send both. [`MmapRegion::fds_overlap`] finds such regions.
    ///
    /// # Errors
    ///
    /// - [`FromRangesError::Collection`] if there are no regions, they are not sorted, or two
    ///   overlap;
    /// - [`FromRangesError::InvalidGuestRegion`] if a region would not end below 2^64;
    /// - [`FromRangesError::MmapRegion`] if a mapping fails: see [`MmapRegion::new`] and
    ///   [`MmapRegion::from_file`].
    pub fn from_ranges_with_files<A, T>(ranges: T) -> std::result::Result<Self, FromRangesError>
    where
        A: Borrow<(GuestAddress, usize, Option<FileOffset>)>,
        T: IntoIterator<Item = A>,
    {
        let regions = ranges
            .into_iter()
            .map(|range| {
                let (addr, size, file) = range.borrow();
                GuestRegionMmap::from_range(*addr, *size, file.clone())
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Self::from_regions(regions)?)
    }
}
