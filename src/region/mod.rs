//! Regions: contiguous ranges of guest physical memory, and collections of them.

mod collection;
mod index;
mod region_bytes;
mod table;

#[cfg(test)]
mod tests;

pub use collection::{GuestRegionCollection, GuestRegionCollectionError};

use crate::address::Address;
use crate::bitmap::{Bitmap, BS};
use crate::bytes::Bytes;
use crate::guest_memory::{
    Error, FileOffset, GuestAddress, GuestUsize, MemoryRegionAddress, Permissions, Result,
};
use crate::volatile_memory::VolatileSlice;

/// A contiguous range of guest physical memory.
///
/// A region need not be RAM. One that is gives out [`VolatileSlice`]s, and gets its [`Bytes`] by implementing
/// [`GuestMemoryRegionBytes`]; one that is not (a device's registers, a ROM that is made up on reading) implements `Bytes` itself and leaves
/// [`get_slice`](Self::get_slice) and [`get_host_address`](Self::get_host_address) as they are.
///
/// Addresses in a region ([`MemoryRegionAddress`]) count from its start, in bytes.
#[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
pub trait GuestMemoryRegion: Bytes<MemoryRegionAddress, E = Error> {
    /// What marks written pages.
    type B: Bitmap;

    /// Returns the length in bytes.
    fn len(&self) -> GuestUsize;

    /// Returns the guest physical address of the first byte.
    fn start_addr(&self) -> GuestAddress;

    /// Returns the guest physical address of the last byte; that of the start if there is none.
    fn last_addr(&self) -> GuestAddress {
        let start = self.start_addr();
        let before_last = self.len().saturating_sub(1);
        GuestAddress(start.raw_value().saturating_add(before_last))
    }

    /// Returns the region's bitmap, as a slice of all of it.
    fn bitmap(&self) -> BS<'_, Self::B>;

    /// Returns the address if it lies in the region.
    fn check_address(&self, addr: MemoryRegionAddress) -> Option<MemoryRegionAddress> {
        self.address_in_range(addr).then_some(addr)
    }

    /// Returns whether the address lies in the region.
    #[inline]
    fn address_in_range(&self, addr: MemoryRegionAddress) -> bool {
        addr.raw_value() < self.len()
    }

    /// Returns `base + offset` if it lies in the region.
    fn checked_offset(
        &self,
        base: MemoryRegionAddress,
        offset: usize,
    ) -> Option<MemoryRegionAddress> {
        let offset = u64::try_from(offset).ok()?;
        base.checked_add(offset)
            .and_then(|addr| self.check_address(addr))
    }

    /// Returns where in the region a guest physical address lies, or `None` if it does not.
    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<MemoryRegionAddress> {
        let offset = addr.checked_offset_from(self.start_addr())?;
        (offset < self.len()).then_some(MemoryRegionAddress(offset))
    }

    /// Returns the address in this process of the byte at `addr`. What is done with it is outside the crate's promises.
    ///
    /// # Errors
    ///
    /// [`Error::HostAddressNotAvailable`] if the region is not in this process's memory; [`Error::InvalidBackendAddress`] if the
    /// address is not in the region.
    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        let _ = addr;
        Err(Error::HostAddressNotAvailable)
    }

    /// Returns the file that the region is mapped from, if there is one.
    fn file_offset(&self) -> Option<&FileOffset> {
        None
    }

    /// Returns the `count` bytes at `offset`.
    ///
    /// Whether the region permits reading and writing is not looked at: the caller has not said what it wants.
    ///
    /// # Errors
    ///
    /// [`Error::HostAddressNotAvailable`] if the region is not in this process's memory; [`Error::InvalidBackendAddress`] if the
    /// bytes are not all in the region.
    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        let _ = (offset, count);
        Err(Error::HostAddressNotAvailable)
    }

    /// Returns the whole region as a slice.
    ///
    /// # Errors
    ///
    /// As [`get_slice`](Self::get_slice).
    fn as_volatile_slice(&self) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        let len = usize::try_from(self.len()).map_err(|_| Error::InvalidBackendAddress)?;
        self.get_slice(MemoryRegionAddress(0), len)
    }

    /// Returns whether the region lies on huge pages of hugetlbfs, if that is known.
    #[cfg(target_os = "linux")]
    fn is_hugetlbfs(&self) -> Option<bool> {
        None
    }

    /// Returns what accesses may do here.
    ///
    /// [`GuestMemory::check_range`](crate::GuestMemory::check_range), [`GuestMemory::get_slices`](crate::GuestMemory::get_slices)
    /// and [`Bytes`] go by it. Regions permit everything unless they say otherwise; a mapping permits what it was made with.
    #[inline]
    fn allowed_access(&self) -> Permissions {
        Permissions::ReadWrite
    }

    /// Returns how many of the `count` bytes at `addr` come before the first that cannot be reached although it lies in the region.
    ///
    /// Regions are reached as a whole unless they say otherwise; one with [blocks](crate::mmap::PluggedBlocks) that come and go is not. Accesses
    /// and iterators over slices stop there as they stop at a hole between regions.
    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        let _ = addr;
        count
    }
}

/// Marks a region that is ordinary memory: it gets [`Bytes`] from its [`as_volatile_slice`](GuestMemoryRegion::as_volatile_slice).
pub trait GuestMemoryRegionBytes: GuestMemoryRegion {}
