//! Regions of guest physical memory, and collections of them.
//!
//! ```text
//!   GuestRegionCollection     0x0                0xc000_0000   0x1_0000_0000
//!                             ├──────────────────┤   hole      ├──────────────────┤
//!                             GuestMemoryRegion                GuestMemoryRegion
//! ```
//!
//! A [`GuestMemoryRegion`] is a contiguous range of guest physical memory. It need not be RAM.
//! A [`GuestRegionCollection`] holds regions of one type and finds the one that contains an
//! address. Each insertion or removal creates another collection, which shares the regions.
//!
//! This module makes no system calls, except for memory of Xen guests (feature `xen`) that is not
//! mapped in advance.
//!
//! # Examples
//!
//! A region type of your own, here guest RAM on the heap:
//!
//! ```
//! use std::sync::atomic::AtomicU8;
//! use vm_memory::guest_memory::{Error, Result};
//! use vm_memory::{
//!     Bytes, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection,
//!     GuestUsize, MemoryRegionAddress, VolatileSlice,
//! };
//!
//! struct BoxedRegion {
//!     start: GuestAddress,
//!     bytes: Box<[AtomicU8]>,
//! }
//!
//! impl GuestMemoryRegion for BoxedRegion {
//!     type B = ();
//!
//!     fn len(&self) -> GuestUsize {
//!         self.bytes.len() as u64
//!     }
//!     fn start_addr(&self) -> GuestAddress {
//!         self.start
//!     }
//!     fn bitmap(&self) {}
//!     fn get_slice(
//!         &self,
//!         offset: MemoryRegionAddress,
//!         count: usize,
//!     ) -> Result<VolatileSlice<'_>> {
//!         let addr = self.bytes.as_ptr().cast::<u8>().cast_mut();
//!         // SAFETY: the slice borrows `self`, which owns the bytes: they stay mapped. References
//!         // to them are to atomics. `bytes` is private, and only slices access it, atomically.
//!         let all = unsafe { VolatileSlice::new(addr, self.bytes.len()) };
//!         let offset = usize::try_from(offset.0).map_err(|_| Error::InvalidBackendAddress)?;
//!         Ok(all.subslice(offset, count)?)
//!     }
//! }
//!
//! // `Bytes` for the region, by way of `get_slice`.
//! impl GuestMemoryRegionBytes for BoxedRegion {}
//!
//! let bytes = (0..0x1000).map(|_| AtomicU8::new(0)).collect();
//! let region = BoxedRegion { start: GuestAddress(0x1000), bytes };
//! let memory = GuestRegionCollection::from_regions(vec![region])?;
//! memory.write_obj(7u32, GuestAddress(0x1ffc))?;
//! assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1ffc))?, 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/own_region.rs` has RAM and ROM with the numbers of their KVM slots.

mod collection;
mod index;
#[expect(
    unsafe_code,
    reason = "copies pointers without counting, and lists them in memory that it owns"
)]
mod list;
mod region_bytes;
mod table;

#[cfg(test)]
mod tests;

use core::ops::Range;
use std::sync::Arc;

pub use collection::{GuestRegionCollection, GuestRegionCollectionError};

use crate::address::Address;
use crate::bitmap::{Bitmap, BS};
use crate::bytes::Bytes;
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::{
    Error, FileOffset, GuestAddress, GuestUsize, MemoryRegionAddress, Permissions, Result,
};
use crate::listeners::RegionNotifier;
use crate::volatile_memory::VolatileSlice;

/// A contiguous range of guest physical memory.
///
/// A region need not be RAM:
///
/// - RAM implements [`get_slice`](Self::get_slice). It gets [`Bytes`] by implementing
///   [`GuestMemoryRegionBytes`].
/// - Other regions, such as the registers of a device, implement `Bytes` themselves. They keep the
///   provided `get_slice` and [`get_host_address`](Self::get_host_address), which return errors.
///
/// A [`MemoryRegionAddress`] is an offset from the start of the region, in bytes.
///
/// # Examples
///
/// The [module](self) has a region type of its own. This example uses a mapping:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{
///     Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
/// };
///
/// let region = GuestRegionMmap::<()>::from_range(GuestAddress(0x1000), 0x1000, None)?;
/// assert_eq!(region.last_addr(), GuestAddress(0x1fff));
/// let offset = region.to_region_addr(GuestAddress(0x1010));
/// assert_eq!(offset, Some(MemoryRegionAddress(0x10)));
/// region.write_obj(7u8, MemoryRegionAddress(0x10))?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "memslot")]
#[doc(alias = "MemoryRegion")]
#[expect(clippy::len_without_is_empty, reason = "the interface of 0.18.0")]
pub trait GuestMemoryRegion: Bytes<MemoryRegionAddress, E = Error> {
    /// The dirty bitmap.
    type B: Bitmap;

    /// Returns the length in bytes.
    fn len(&self) -> GuestUsize;

    /// Returns the guest physical address of the first byte.
    fn start_addr(&self) -> GuestAddress;

    /// Returns the guest physical address of the last byte, or the start if the region is empty.
    fn last_addr(&self) -> GuestAddress {
        let start = self.start_addr();
        let before_last = self.len().saturating_sub(1);
        GuestAddress(start.raw_value().saturating_add(before_last))
    }

    /// Returns the dirty bitmap of the region.
    fn bitmap(&self) -> BS<'_, Self::B>;

    /// Returns `addr` if it is in the region.
    fn check_address(&self, addr: MemoryRegionAddress) -> Option<MemoryRegionAddress> {
        self.address_in_range(addr).then_some(addr)
    }

    /// Returns whether `addr` is in the region.
    #[inline]
    fn address_in_range(&self, addr: MemoryRegionAddress) -> bool {
        addr.raw_value() < self.len()
    }

    /// Returns `base + offset` if it is in the region.
    fn checked_offset(
        &self,
        base: MemoryRegionAddress,
        offset: usize,
    ) -> Option<MemoryRegionAddress> {
        let offset = u64::try_from(offset).ok()?;
        base.checked_add(offset)
            .and_then(|addr| self.check_address(addr))
    }

    /// Returns the offset of a guest physical address in the region, or `None` if it is outside.
    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<MemoryRegionAddress> {
        let offset = addr.checked_offset_from(self.start_addr())?;
        (offset < self.len()).then_some(MemoryRegionAddress(offset))
    }

    /// Returns the host address of the byte at `addr`.
    ///
    /// The [memory model](crate#memory-model) does not cover accesses through the pointer, and
    /// nothing marks them dirty.
    ///
    /// # Errors
    ///
    /// - [`Error::HostAddressNotAvailable`] if the region is not mapped in this process.
    /// - [`Error::InvalidBackendAddress`] if `addr` is not in the region.
    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        let _ = addr;
        Err(Error::HostAddressNotAvailable)
    }

    /// Returns the file and offset from which the region is mapped, if any.
    ///
    /// The mapping may still be private or anonymous: see `MmapRegion::file_offset`.
    fn file_offset(&self) -> Option<&FileOffset> {
        None
    }

    /// Returns the `count` bytes at `offset` as a slice.
    ///
    /// Does not check the [permissions](Self::allowed_access).
    /// An implementation must refuse a range that passes [`len`](Self::len). Accesses by guest
    /// address rely on this, and nothing tracks bytes past the end.
    ///
    /// # Errors
    ///
    /// - [`Error::HostAddressNotAvailable`] if the region is not mapped in this process.
    /// - [`Error::InvalidBackendAddress`] if a byte is not in the region.
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
    /// - [`Error::HostAddressNotAvailable`] if the region is not mapped in this process.
    /// - [`Error::InvalidBackendAddress`] if the region is larger than the host's address space.
    fn as_volatile_slice(&self) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        let len = usize::try_from(self.len()).map_err(|_| Error::InvalidBackendAddress)?;
        self.get_slice(MemoryRegionAddress(0), len)
    }

    /// Returns whether hugetlbfs backs the region, or `None` if unknown.
    #[cfg(target_os = "linux")]
    fn is_hugetlbfs(&self) -> Option<bool> {
        None
    }

    /// Returns the permissions that the region grants.
    ///
    /// [`GuestMemory::check_range`](crate::GuestMemory::check_range),
    /// [`GuestMemory::get_slices`](crate::GuestMemory::get_slices) and [`Bytes`] check them. The
    /// provided method grants read and write access. A mapping grants its protection.
    #[inline]
    fn allowed_access(&self) -> Permissions {
        Permissions::ReadWrite
    }

    /// Returns the number of accessible bytes at `addr`, up to `count`.
    ///
    /// Accesses and slice iterators treat the first inaccessible byte like a hole between regions.
    /// By default, the whole region is accessible. A region with
    /// [unplugged blocks](crate::mmap::PluggedBlocks) is not.
    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        let _ = addr;
        count
    }

    /// Returns the accessible bytes at `addr`, up to `count`, as a slice.
    ///
    /// The slice is empty if the first byte is not accessible. Implement it for a region whose
    /// bytes become accessible and inaccessible while threads use them.
    ///
    /// The provided method returns `None`: a caller then uses
    /// [`reachable_bytes`](Self::reachable_bytes) and [`get_slice`](Self::get_slice). A change
    /// between these two calls makes its access fail.
    fn reachable_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::B>>> {
        let _ = (addr, count);
        None
    }

    /// Returns the notifier that tells [listeners](crate::listeners) of changes of the region's
    /// pages.
    ///
    /// The default is `None`, for a region whose pages do not change as long as it exists.
    fn notifier(&self) -> Option<&Arc<RegionNotifier>> {
        None
    }

    /// Returns whether all bytes of the region are accessible.
    ///
    /// The provided method calls [`reachable_bytes`](Self::reachable_bytes) for the whole region.
    /// Each access by offset may call this method, so a large region should not search here.
    fn is_fully_reachable(&self) -> bool {
        let len = to_usize(self.len());
        self.reachable_bytes(MemoryRegionAddress(0), len) == len
    }

    /// Returns the first accessible bytes of a range, as offsets from `addr`.
    ///
    /// The range is the `count` bytes at `addr`. If none of them is accessible, the result is any
    /// empty range.
    ///
    /// The provided method calls [`reachable_bytes`](Self::reachable_bytes) at `addr` and at each
    /// multiple of 4 KiB. A region that implements `reachable_bytes` can find the range faster.
    fn reachable_range(&self, addr: MemoryRegionAddress, count: usize) -> Range<usize> {
        const STEP: u64 = 0x1000;
        let end = addr.raw_value().saturating_add(to_u64(count));
        let mut at = addr;
        while at.raw_value() < end {
            let start = to_usize(at.raw_value().saturating_sub(addr.raw_value()));
            let left = count.saturating_sub(start);
            match self.reachable_bytes(at, left) {
                0 => at.0 = (at.0 | (STEP - 1)).saturating_add(1),
                reachable => return start..start.saturating_add(reachable.min(left)),
            }
        }
        count..count
    }
}

/// A region that gets [`Bytes`] from [`as_volatile_slice`](GuestMemoryRegion::as_volatile_slice).
///
/// Implement it for regions that are RAM. The [module](self) has an example.
pub trait GuestMemoryRegionBytes: GuestMemoryRegion {}
