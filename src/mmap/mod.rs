//! Guest memory in mappings of this process.
//!
//! ```text
//!   GuestMemoryMmap = GuestRegionCollection<GuestRegionMmap>
//!                                           └─ guest address, and an Arc of
//!                                              MmapRegion: host address, size, protection, file, bitmap
//! ```
//!
//! System calls: `mmap(2)` and `munmap(2)`, and for a region of a file `fstat(2)`, which glibc makes as `newfstatat` in some of its
//! versions. The last is one that 0.18.0 does not make: a seccomp filter must allow it where files are mapped.
//!
//! # Files that end
//!
//! A page of a mapping that lies behind the end of its file kills the process that touches it (SIGBUS). A regular file that lacks whole pages of its
//! region is therefore refused when it is mapped ([`MmapRegionError::MappingPastEof`]); one that ends inside the last page is not, since the
//! rest of that page reads as zeroes. A file that is truncated later is noticed where [`fault`](crate::fault) is installed.
//!
//! # Protection
//!
//! A region made without `PROT_WRITE` refuses writes through [`Bytes`](crate::Bytes), and
//! [`GuestMemory::check_range`](crate::GuestMemory::check_range) and [`GuestMemory::get_slices`](crate::GuestMemory::get_slices) agree. The accesses that do
//! not say what they want ([`GuestMemoryRegion::get_slice`], raw pointers) are not held back.

use std::borrow::Borrow;
use std::ops::Deref;
use std::sync::Arc;

mod blocks;
#[cfg(unix)]
mod owner;
#[cfg(unix)]
mod unix;
pub use blocks::{PluggedBlocks, PluggedBlocksError};
#[cfg(unix)]
use unix::HostRange;
#[cfg(unix)]
pub use unix::{MmapRegion, MmapRegionBuilder, MmapRegionError};

#[cfg(test)]
mod tests;

use crate::address::Address;
pub use crate::bitmap::NewBitmap;
use crate::bitmap::{Bitmap, BS};
use crate::guest_memory::{
    Error, FileOffset, GuestAddress, GuestUsize, MemoryRegionAddress, Permissions, Result,
};
use crate::region::{
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionCollectionError,
};
use crate::volatile_memory::VolatileSlice;

/// Why ranges do not make a guest memory.
#[derive(Debug, thiserror::Error)]
pub enum FromRangesError {
    /// The regions do not go together.
    #[error("the regions do not make a guest memory: {0}")]
    Collection(#[from] GuestRegionCollectionError),
    /// A region could not be mapped.
    #[error("a region could not be mapped: {0}")]
    MmapRegion(#[from] MmapRegionError),
    /// A region reaches the end of the guest's address space.
    #[error("a region does not end below 2^64")]
    InvalidGuestRegion,
}

/// A region of guest memory that is a mapping of this process.
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};
///
/// let region: GuestRegionMmap = GuestRegionMmap::from_range(GuestAddress(0x1000), 0x2000, None)?;
/// region.write_obj(1u8, MemoryRegionAddress(0x1fff))?;
/// assert_eq!(region.last_addr(), GuestAddress(0x2fff));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestRegionMmap<B = ()> {
    guest_base: GuestAddress,
    /// That of the mapping.
    host: HostRange,
    mapping: Arc<MmapRegion<B>>,
}

/// The mapping behind the region.
impl<B> Deref for GuestRegionMmap<B> {
    type Target = MmapRegion<B>;

    fn deref(&self) -> &MmapRegion<B> {
        &self.mapping
    }
}

impl<B: Bitmap> GuestRegionMmap<B> {
    /// Makes a region of `mapping`, at the guest physical address `guest_base`.
    ///
    /// `None` if the region would not end below 2^64.
    pub fn new(mapping: MmapRegion<B>, guest_base: GuestAddress) -> Option<Self> {
        Self::with_arc(Arc::new(mapping), guest_base)
    }

    /// Makes a region of a mapping that others share, at the guest physical address `guest_base`.
    ///
    /// `None` if the region would not end below 2^64.
    pub fn with_arc(mapping: Arc<MmapRegion<B>>, guest_base: GuestAddress) -> Option<Self> {
        let size = u64::try_from(mapping.size()).ok()?;
        guest_base.checked_add(size)?;
        Some(Self {
            guest_base,
            host: mapping.host_range(),
            mapping,
        })
    }

    /// Returns the mapping, to share it.
    pub fn get_mmap(&self) -> Arc<MmapRegion<B>> {
        Arc::clone(&self.mapping)
    }

    /// A range of a mapping whose blocks decide, or the error of one that is not in the region. Out of line: to drop an error that is not needed is a
    /// call, on the shortest of ways.
    #[cold]
    #[inline(never)]
    fn slice_further(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        let end = offset.checked_add(count);
        if end.is_none_or(|end| end > self.host.size()) {
            return Err(Error::InvalidBackendAddress);
        }
        // In a block that is not plugged there is no host memory, for now.
        self.mapping
            .plugged_slice(offset, count)
            .ok_or(Error::HostAddressNotAvailable)
    }
}

impl<B: NewBitmap> GuestRegionMmap<B> {
    /// Maps `size` bytes for the guest physical address `addr`: shared with `file`, or private and of zeroes.
    ///
    /// # Errors
    ///
    /// If the region would not end below 2^64, or cannot be mapped.
    pub fn from_range(
        addr: GuestAddress,
        size: usize,
        file: Option<FileOffset>,
    ) -> std::result::Result<Self, FromRangesError> {
        let mapping = match file {
            Some(file) => MmapRegion::from_file(file, size)?,
            None => MmapRegion::new(size)?,
        };
        Self::new(mapping, addr).ok_or(FromRangesError::InvalidGuestRegion)
    }
}

impl<B: Bitmap> GuestMemoryRegion for GuestRegionMmap<B> {
    type B = B;

    #[inline]
    #[expect(
        clippy::as_conversions,
        reason = "no loss: that the size fits was checked when the region was made"
    )]
    fn len(&self) -> GuestUsize {
        self.host.size() as GuestUsize
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.guest_base
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.mapping.bitmap().slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        // Only an address in the mapping is turned into a pointer.
        let offset = self
            .check_address(addr)
            .and_then(|addr| usize::try_from(addr.raw_value()).ok());
        offset
            .map(|offset| self.mapping.as_ptr().wrapping_add(offset))
            .ok_or(Error::InvalidBackendAddress)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapping.file_offset()
    }

    #[inline(always)]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        let offset =
            usize::try_from(offset.raw_value()).map_err(|_| Error::InvalidBackendAddress)?;
        let bitmap = || self.mapping.bitmap().slice_at(offset);
        // SAFETY: the range is that of `self.mapping`, which nobody can change (`with_arc` takes it from there), and which stays in place as long as
        // `self` is borrowed: `self` shares it, and it is that mapping's own or was promised to stay (`build_raw`, `with_raw_mmap_pointer`).
        match unsafe { self.host.slice(offset, count, bitmap) } {
            Some(slice) => Ok(slice),
            None => self.slice_further(offset, count),
        }
    }

    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        match (
            self.mapping.plugged_blocks(),
            usize::try_from(addr.raw_value()),
        ) {
            (Some(blocks), Ok(offset)) => blocks.plugged_from(offset, count),
            _ => count,
        }
    }

    #[cfg(target_os = "linux")]
    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapping.is_hugetlbfs()
    }

    #[inline]
    fn allowed_access(&self) -> Permissions {
        self.host.permissions()
    }
}

/// A mapping is ordinary memory.
impl<B: Bitmap> GuestMemoryRegionBytes for GuestRegionMmap<B> {}

/// A guest memory whose regions are mappings of this process.
pub type GuestMemoryMmap<B = ()> = GuestRegionCollection<GuestRegionMmap<B>>;

impl<B: NewBitmap> GuestRegionCollection<GuestRegionMmap<B>> {
    /// Maps regions of zeroes at the given guest physical addresses, with the given sizes in bytes.
    ///
    /// # Errors
    ///
    /// As [`from_ranges_with_files`](Self::from_ranges_with_files).
    pub fn from_ranges(
        ranges: &[(GuestAddress, usize)],
    ) -> std::result::Result<Self, FromRangesError> {
        Self::from_ranges_with_files(ranges.iter().map(|(addr, size)| (*addr, *size, None)))
    }

    /// Maps regions at the given guest physical addresses, with the given sizes in bytes; each shared with a file or of zeroes.
    ///
    /// # Errors
    ///
    /// If a region cannot be mapped or would not end below 2^64; if there is no region, they are not sorted, or two overlap.
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
