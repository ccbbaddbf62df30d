//! [`GuestRegionMmap`]: a mapping at a guest address.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::host_range::HostRange;
use super::{FromRangesError, MmapRegion};
use crate::address::Address;
use crate::bitmap::{Bitmap, NewBitmap, BS};
use crate::guest_memory::{
    Error, FileOffset, GuestAddress, GuestUsize, MemoryRegionAddress, Permissions, Result,
};
use crate::listeners::RegionNotifier;
use crate::region::{GuestMemoryRegion, GuestMemoryRegionBytes};
use crate::volatile_memory::VolatileSlice;

/// A region of guest memory that is a mapping of this process.
///
/// It is an [`MmapRegion`] at a guest address. Regions may share one mapping.
///
/// # Examples
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
    /// A copy of the host range of `mapping`, which the fast path finds without a second pointer.
    host: HostRange,
    mapping: Arc<MmapRegion<B>>,
}

impl<B> Deref for GuestRegionMmap<B> {
    type Target = MmapRegion<B>;

    fn deref(&self) -> &MmapRegion<B> {
        &self.mapping
    }
}

impl<B: Bitmap> GuestRegionMmap<B> {
    /// Creates a region of `mapping` at the guest physical address `guest_base`.
    ///
    /// Returns `None` if the region would not end below 2^64.
    pub fn new(mapping: MmapRegion<B>, guest_base: GuestAddress) -> Option<Self> {
        Self::with_arc(Arc::new(mapping), guest_base)
    }

    /// Creates a region of a shared mapping at the guest physical address `guest_base`.
    ///
    /// Returns `None` if the region would not end below 2^64.
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

    /// Returns a range of a mapping with plugged blocks, or an error if it is not accessible.
    ///
    /// Out of line, because dropping an unused error is a call that the fast path cannot afford.
    #[cold]
    #[inline(never)]
    fn slice_slow(&self, offset: usize, count: usize) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        let end = offset.checked_add(count);
        if end.is_none_or(|end| end > self.host.size()) {
            return Err(Error::InvalidBackendAddress);
        }
        // A block that is not plugged has no host memory at this time.
        self.mapping
            .plugged_slice(offset, count)
            .ok_or(Error::HostAddressNotAvailable)
    }
}

impl<B: NewBitmap> GuestRegionMmap<B> {
    /// Maps `size` bytes for the guest physical address `addr`.
    ///
    /// With a file, the mapping is shared with it. Without one, it is private and filled with
    /// zeroes. The length of a [block device](super#devices-that-are-too-short) is not checked.
    ///
    /// # Errors
    ///
    /// - [`FromRangesError::InvalidGuestRegion`] if the region would not end below 2^64;
    /// - [`FromRangesError::MmapRegion`] if the mapping fails: see [`MmapRegion::new`] and
    ///   [`MmapRegion::from_file`].
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
        reason = "lossless: `with_arc` checked that the size fits"
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
        let offset = self
            .check_address(addr)
            .and_then(|addr| usize::try_from(addr.raw_value()).ok());
        let offset = offset.ok_or(Error::InvalidBackendAddress)?;
        if !self.mapping.has_host_address() {
            return Err(Error::HostAddressNotAvailable);
        }
        Ok(self.mapping.as_ptr().wrapping_add(offset))
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
        // SAFETY: `self.host` is the host range of `self.mapping` (`with_arc`, and neither
        // changes). The mapping stays in place while `self` is borrowed. Either `self.mapping`, an
        // `Arc` of its region, unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        match unsafe { self.host.slice(offset, count, bitmap) } {
            Some(slice) => Ok(slice),
            None => self.slice_slow(offset, count),
        }
    }

    fn notifier(&self) -> Option<&Arc<RegionNotifier>> {
        self.mapping.notifier.as_ref()
    }

    fn is_fully_reachable(&self) -> bool {
        self.mapping.is_fully_plugged()
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

    fn reachable_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let offset = usize::try_from(addr.raw_value()).ok()?;
        self.mapping.plugged_part(offset, count)
    }

    fn reachable_range(&self, addr: MemoryRegionAddress, count: usize) -> Range<usize> {
        let (Some(blocks), Ok(offset)) = (
            self.mapping.plugged_blocks(),
            usize::try_from(addr.raw_value()),
        ) else {
            return 0..count;
        };
        // Loads each bit once: a block that is plugged meanwhile is either included or not.
        match blocks.runs_in(offset, count).next() {
            Some((start, len)) => {
                let start = start.saturating_sub(offset);
                start..start.saturating_add(len)
            }
            None => count..count,
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

impl<B: Bitmap> GuestMemoryRegionBytes for GuestRegionMmap<B> {}
