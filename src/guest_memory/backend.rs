//! [`GuestMemoryBackend`]: guest physical memory as a set of regions.
//!
//! ```text
//!   guest address ──► find_region ──► GuestMemoryRegion::get_slice ──► VolatileSlice
//! ```
//!
//! Every backend is a [`GuestMemory`] without an IOMMU. A range over several regions is walked from
//! region to region by [`GuestMemoryBackendSliceIterator`].

use core::iter::FusedIterator;

use super::{
    slices_before_error, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator,
    MemoryRegionAddress, Permissions, Result,
};
use crate::address::Address;
use crate::bitmap::{BS, MS};
use crate::convert::{to_u64, to_usize};
use crate::region::GuestMemoryRegion;
use crate::volatile_memory::VolatileSlice;

/// Guest physical memory: an immutable set of regions.
///
/// Hotplug creates a new set, which shares the remaining regions. An implementation must provide
/// [`iter`](Self::iter). It should override [`find_region`](Self::find_region) for speed.
/// [`GuestRegionCollection`](crate::GuestRegionCollection) is the implementation of this crate.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1_0000), 0x1000)];
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
/// assert_eq!(memory.num_regions(), 2);
/// assert_eq!(memory.last_addr(), GuestAddress(0x1_0fff));
/// assert!(memory.find_region(GuestAddress(0x1000)).is_none());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "memory map")]
#[doc(alias = "hotplug")]
pub trait GuestMemoryBackend {
    /// The type of the regions.
    type R: GuestMemoryRegion;

    /// Returns the number of regions.
    fn num_regions(&self) -> usize {
        self.iter().count()
    }

    /// Returns the region that contains `addr`, or `None` if `addr` is in a hole.
    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.iter()
            .find(|region| region.to_region_addr(addr).is_some())
    }

    /// Returns an iterator over the regions.
    fn iter(&self) -> impl Iterator<Item = &Self::R>;

    /// Returns the region that contains `addr`, and the regions that follow it without a hole.
    ///
    /// An access to several regions walks them this way. The provided method looks up each region;
    /// an implementation that keeps them sorted can return the next one directly.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
    ///
    /// let starts = [0, 0x1000, 0x4000].map(GuestAddress);
    /// let ranges = starts.map(|start| (start, 0x1000));
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let run = memory.regions_from(GuestAddress(0x10));
    /// let run: Vec<u64> = run.map(|region| region.start_addr().0).collect();
    /// assert_eq!(run, [0, 0x1000]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn regions_from(&self, addr: GuestAddress) -> impl Iterator<Item = &Self::R> {
        core::iter::successors(self.find_region(addr), |region| {
            // An empty region, or an overlap, would make this loop forever.
            let end = region
                .start_addr()
                .checked_add(region.len())
                .filter(|_| region.len() != 0)?;
            self.find_region(end)
                .filter(|next| next.start_addr() == end)
        })
    }

    /// Returns the highest address of any region, or 0 if there is no region.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    ///
    /// assert_eq!(GuestMemoryMmap::<()>::new().last_addr(), GuestAddress(0));
    /// # }
    /// ```
    fn last_addr(&self) -> GuestAddress {
        self.iter()
            .map(GuestMemoryRegion::last_addr)
            .max()
            .unwrap_or_default()
    }

    /// Returns the region that contains `addr`, and the offset of `addr` in it.
    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Self::R, MemoryRegionAddress)> {
        let region = self.find_region(addr)?;
        Some((region, region.to_region_addr(addr)?))
    }

    /// Returns whether a region contains `addr`.
    fn address_in_range(&self, addr: GuestAddress) -> bool {
        self.find_region(addr).is_some()
    }

    /// Returns `addr` if a region contains it.
    fn check_address(&self, addr: GuestAddress) -> Option<GuestAddress> {
        self.find_region(addr).map(|_| addr)
    }

    /// Returns whether all `len` bytes at `base` are in regions that this process can access.
    ///
    /// They are mapped in this process, or are memory of a Xen guest that is mapped for each
    /// access. That mapping may fail.
    ///
    /// Always `true` for 0 bytes. The range may end at 2^64, but not wrap around.
    fn check_range(&self, base: GuestAddress, len: usize) -> bool {
        range_allows(self, base, len, Permissions::No)
    }

    /// Returns `base + offset` if a region contains that address. There may be holes in between.
    fn checked_offset(&self, base: GuestAddress, offset: usize) -> Option<GuestAddress> {
        let offset = u64::try_from(offset).ok()?;
        base.checked_add(offset)
            .and_then(|addr| self.check_address(addr))
    }

    /// Calls `f` for each segment of the `count` bytes at `addr`, in ascending order of address.
    ///
    /// `f` gets the number of bytes handled before, the length of the segment, its offset in the
    /// region, and the region. It returns the number of bytes it handled. With a smaller number,
    /// the walk continues after those bytes; with 0, it ends. It also ends at the first hole.
    ///
    /// Returns the number of bytes handled.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidGuestAddress`] if no region contains `addr`.
    /// - [`Error::CallbackOutOfRange`] if the numbers that `f` returned exceed `count`.
    /// - The error of `f`.
    #[deprecated(since = "0.17.0", note = "use the iterator of `get_slices()`")]
    fn try_access<F>(&self, count: usize, addr: GuestAddress, mut f: F) -> Result<usize>
    where
        F: FnMut(usize, usize, MemoryRegionAddress, &Self::R) -> Result<usize>,
    {
        let mut total = 0usize;
        let mut cur = addr;
        while let Some((region, start)) = self.to_region_addr(cur) {
            let wanted = count.saturating_sub(total).min(rest_of(region, cur, start));
            let handled = f(total, wanted, start, region)?;
            if handled == 0 {
                return Ok(total);
            }
            total = total
                .checked_add(handled)
                .ok_or(Error::CallbackOutOfRange)?;
            if total > count {
                return Err(Error::CallbackOutOfRange);
            }
            if total == count {
                return Ok(total);
            }
            let next = u64::try_from(handled)
                .ok()
                .and_then(|handled| cur.checked_add(handled));
            match next {
                Some(next) => cur = next,
                // No region starts at 2^64.
                None => return Ok(total),
            }
        }
        match total {
            0 => Err(Error::InvalidGuestAddress(addr)),
            _ => Ok(total),
        }
    }

    /// Returns the host address of the byte at `addr`.
    ///
    /// The [memory model](crate#memory-model) does not cover accesses through the pointer, and
    /// nothing marks them dirty.
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidGuestAddress`] if no region contains `addr`.
    /// - [`Error::HostAddressNotAvailable`] if the region is not mapped in this process.
    fn get_host_address(&self, addr: GuestAddress) -> Result<*mut u8> {
        let (region, start) = self
            .to_region_addr(addr)
            .ok_or(Error::InvalidGuestAddress(addr))?;
        region.get_host_address(start)
    }

    /// Returns the `count` bytes at `addr`, which must be in one region, as a slice.
    ///
    /// Does not check the region's [permissions](GuestMemoryRegion::allowed_access).
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidGuestAddress`] if no region contains `addr`.
    /// - [`Error::InvalidBackendAddress`] if the range leaves the region or ends past 2^64.
    /// - [`Error::HostAddressNotAvailable`] if the region is not mapped in this process.
    #[inline(always)]
    fn get_slice(
        &self,
        addr: GuestAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, MS<'_, Self>>> {
        match self.contiguous_slice(addr, count, Permissions::No) {
            Some(slice) => Ok(slice),
            None => slice_of_region(self, addr, count),
        }
    }

    /// Returns the `count` bytes at `addr` as slices, one per region, in ascending order.
    ///
    /// A hole, or the end of the address space, is an error, which ends the iteration. For 0 bytes
    /// there are no slices. Does not check the regions'
    /// [permissions](GuestMemoryRegion::allowed_access).
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
    ) -> GuestMemoryBackendSliceIterator<'a, Self> {
        GuestMemoryBackendSliceIterator::new(self, addr, count, Permissions::No)
    }
}

/// Serves as the slow path of [`GuestMemoryBackend::get_slice`]. Usually returns an error.
#[cold]
#[inline(never)]
fn slice_of_region<M: GuestMemoryBackend + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    count: usize,
) -> Result<VolatileSlice<'_, MS<'_, M>>> {
    let (region, start) = memory
        .to_region_addr(addr)
        .ok_or(Error::InvalidGuestAddress(addr))?;
    let slice = region.get_slice(start, count)?;
    if passes_the_end(addr, count) {
        // The region claims addresses past 2^64.
        return Err(Error::InvalidBackendAddress);
    }
    Ok(slice)
}

/// Returns the number of bytes from `start` to the end of a region, or to 2^64 if that is lower.
///
/// `addr` is the guest address of `start`.
#[inline]
pub(super) fn rest_of<R: GuestMemoryRegion>(
    region: &R,
    addr: GuestAddress,
    start: MemoryRegionAddress,
) -> usize {
    let rest = region.len().saturating_sub(start.raw_value());
    let rest = match addr.checked_add(rest) {
        Some(_) => rest,
        None => u64::MAX.saturating_sub(addr.raw_value()).saturating_add(1),
    };
    to_usize(rest)
}

/// Returns the accessible part of the `count` bytes at `start`.
///
/// `error` is the error of the region for all `count` bytes.
#[cold]
#[inline(never)]
fn reachable_part<R: GuestMemoryRegion>(
    region: &R,
    start: MemoryRegionAddress,
    count: usize,
    error: Error,
) -> Result<VolatileSlice<'_, BS<'_, R::B>>> {
    if let Some(part) = region.reachable_slice(start, count) {
        return match part.len() {
            0 => Err(error),
            len if len <= count => Ok(part),
            _ => Err(wrong_length(count)),
        };
    }
    let reachable = region.reachable_bytes(start, count);
    if reachable == 0 || reachable >= count {
        return Err(error);
    }
    let slice = region.get_slice(start, reachable)?;
    if slice.len() == reachable {
        Ok(slice)
    } else {
        Err(wrong_length(reachable))
    }
}

/// Returns the error for a region that did not return `count` bytes.
///
/// A region of another crate may return any length. It must not cause an endless loop, or shift the
/// slices that follow.
#[cold]
#[inline(never)]
fn wrong_length(count: usize) -> Error {
    Error::PartialBuffer {
        expected: count,
        completed: 0,
    }
}

/// Returns whether the `count` bytes at `addr` end past 2^64.
#[inline]
fn passes_the_end(addr: GuestAddress, count: usize) -> bool {
    let more = to_u64(count.saturating_sub(1));
    addr.raw_value().checked_add(more).is_none()
}

/// Returns whether all `len` bytes at `base` are in regions that permit `access`.
#[inline(always)]
fn range_allows<M: GuestMemoryBackend + ?Sized>(
    memory: &M,
    base: GuestAddress,
    len: usize,
    access: Permissions,
) -> bool {
    len == 0
        || memory.contiguous_slice(base, len, access).is_some()
        || regions_allow(memory, base, len, access)
}

/// Serves as the slow path of [`range_allows`], for ranges that are not contiguous.
#[cold]
#[inline(never)]
fn regions_allow<M: GuestMemoryBackend + ?Sized>(
    memory: &M,
    base: GuestAddress,
    len: usize,
    access: Permissions,
) -> bool {
    GuestMemoryBackendSliceIterator::new(memory, base, len, access)
        .try_for_each_slice(|_| Ok(()))
        .is_ok()
}

/// An iterator over the slices of a range of guest physical memory.
///
/// [`GuestMemoryBackend::get_slices`] returns it.
#[derive(Debug)]
pub struct GuestMemoryBackendSliceIterator<'a, M: GuestMemoryBackend + ?Sized> {
    memory: &'a M,
    /// The address of the next slice. `None` is 2^64.
    addr: Option<GuestAddress>,
    /// The number of bytes left. 0 after an error.
    left: usize,
    /// The permission that the regions must grant.
    access: Permissions,
    /// Whether the range is known not to be contiguous, so that the rest is not tested again.
    scattered: bool,
}

impl<'a, M: GuestMemoryBackend + ?Sized> GuestMemoryBackendSliceIterator<'a, M> {
    pub(crate) fn new(
        memory: &'a M,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Self {
        Self {
            memory,
            addr: Some(addr),
            left: count,
            access,
            scattered: false,
        }
    }

    /// Returns an iterator over the slices before the first error.
    ///
    /// # Errors
    ///
    /// Returns the error if it comes first: no byte of the range is accessible.
    pub fn stop_on_error(self) -> Result<impl Iterator<Item = VolatileSlice<'a, MS<'a, M>>>> {
        slices_before_error(self)
    }

    /// Returns the next slice. Out of line, to keep the fast path small.
    #[inline(never)]
    fn step(&mut self) -> Result<VolatileSlice<'a, MS<'a, M>>> {
        let addr = self.addr.ok_or(Error::GuestAddressOverflow)?;
        let (region, start) = self
            .memory
            .to_region_addr(addr)
            .ok_or(Error::InvalidGuestAddress(addr))?;
        self.segment_of(region, addr, start)
    }

    /// Returns the next slice, which begins at `start` in `region`.
    #[inline(always)]
    fn segment_of(
        &mut self,
        region: &'a M::R,
        addr: GuestAddress,
        start: MemoryRegionAddress,
    ) -> Result<VolatileSlice<'a, MS<'a, M>>> {
        if !region.allowed_access().allow(self.access) {
            return Err(Error::HostAddressNotAvailable);
        }
        let count = self.left.min(rest_of(region, addr, start));
        let slice = match region.get_slice(start, count) {
            Ok(slice) if slice.len() == count && count != 0 => slice,
            Ok(_) => return Err(wrong_length(count)),
            Err(error) => reachable_part(region, start, count, error)?,
        };
        // Does not wrap: the slice has `count` bytes or fewer.
        self.left = self.left.wrapping_sub(slice.len());
        self.addr = u64::try_from(slice.len())
            .ok()
            .and_then(|count| addr.checked_add(count));
        Ok(slice)
    }
}

impl<'a, M: GuestMemoryBackend + ?Sized> Iterator for GuestMemoryBackendSliceIterator<'a, M> {
    type Item = Result<VolatileSlice<'a, MS<'a, M>>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        // Fast path: almost every range is contiguous.
        if let (false, Some(addr)) = (self.scattered, self.addr) {
            // Not in `Option::and_then`, which becomes a call when built for size.
            if let Some(slice) = self.memory.contiguous_slice(addr, self.left, self.access) {
                self.left = 0;
                return Some(Ok(slice));
            }
            self.scattered = true;
        }
        let step = self.step();
        if step.is_err() {
            self.left = 0;
        }
        Some(step)
    }
}

impl<M: GuestMemoryBackend + ?Sized> FusedIterator for GuestMemoryBackendSliceIterator<'_, M> {}

impl<'a, M: GuestMemoryBackend + ?Sized> GuestMemorySliceIterator<'a, MS<'a, M>>
    for GuestMemoryBackendSliceIterator<'a, M>
{
    #[inline(always)]
    fn is_bounded_by_range(&self) -> bool {
        true
    }

    /// Walks from region to region, without a lookup and without a `Result` in memory per slice.
    #[inline]
    fn try_for_each_slice(
        &mut self,
        mut take: impl FnMut(VolatileSlice<'a, MS<'a, M>>) -> Result<()>,
    ) -> Result<()> {
        let mut regions = self.memory.regions_from(self.addr.unwrap_or_default());
        while self.left != 0 {
            let here = self.addr.zip(regions.next());
            let segment = match here
                .and_then(|(addr, region)| Some((addr, region, region.to_region_addr(addr)?)))
            {
                Some((addr, region, start)) => self.segment_of(region, addr, start),
                // Usually the end of the memory: `step` returns the error.
                None => self.step(),
            };
            // Not `and_then`, which keeps each slice in memory as a part of a `Result`.
            let taken = match segment {
                Ok(slice) => take(slice),
                Err(error) => Err(error),
            };
            if taken.is_err() {
                self.left = 0;
                return taken;
            }
        }
        Ok(())
    }
}

/// Guest physical memory, accessed without an IOMMU.
impl<M: GuestMemoryBackend + ?Sized> GuestMemory for M {
    type PhysicalMemory = M;
    type Bitmap = <M::R as GuestMemoryRegion>::B;

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        range_allows(self, addr, count, access)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        Ok(GuestMemoryBackendSliceIterator::new(
            self, addr, count, access,
        ))
    }

    #[inline]
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        Some(self)
    }

    #[inline(always)]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        let region = self.find_region(addr)?;
        let start = addr.checked_offset_from(region.start_addr())?;
        if passes_the_end(addr, count) {
            return None;
        }
        if !region.allowed_access().allow(access) {
            return None;
        }
        let slice = region.get_slice(MemoryRegionAddress(start), count).ok()?;
        (slice.len() == count).then_some(slice)
    }
}
