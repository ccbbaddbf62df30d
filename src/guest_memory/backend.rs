//! [`GuestMemoryBackend`]: guest physical memory as a set of regions.

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

/// Guest physical memory: a set of regions that does not change.
///
/// Hotplug makes a new set, which shares the regions that stay. [`find_region`](Self::find_region) and [`iter`](Self::iter) are
/// what an implementation is about; the rest is provided, and is worth replacing only where it can be faster.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1_0000), 0x1000)])?;
/// assert_eq!(memory.num_regions(), 2);
/// assert_eq!(memory.last_addr(), GuestAddress(0x1_0fff));
/// assert!(memory.find_region(GuestAddress(0x1000)).is_none());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait GuestMemoryBackend {
    /// The type of the regions.
    type R: GuestMemoryRegion;

    /// Returns the number of regions.
    fn num_regions(&self) -> usize {
        self.iter().count()
    }

    /// Returns the region that has the address, or `None` if it lies in a hole.
    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.iter()
            .find(|region| region.to_region_addr(addr).is_some())
    }

    /// Returns the regions.
    fn iter(&self) -> impl Iterator<Item = &Self::R>;

    /// Returns the region that has the address, and then those that follow it without a hole between, in the order of their addresses.
    ///
    /// A range that lies in several regions is gone through so. The provided method looks for each; one that keeps its regions sorted has the next
    /// one at hand.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
    ///
    /// let sizes = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000), (GuestAddress(0x4000), 0x1000)];
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&sizes)?;
    /// let starts: Vec<u64> = memory.regions_from(GuestAddress(0x10)).map(|region| region.start_addr().0).collect();
    /// assert_eq!(starts, [0, 0x1000]);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn regions_from(&self, addr: GuestAddress) -> impl Iterator<Item = &Self::R> {
        core::iter::successors(self.find_region(addr), |region| {
            // One without a byte, or one that overlaps this, would keep us here without end.
            let behind = region
                .start_addr()
                .checked_add(region.len())
                .filter(|_| region.len() != 0)?;
            self.find_region(behind)
                .filter(|next| next.start_addr() == behind)
        })
    }

    /// Returns the highest address that any region has; 0 if there is no region.
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

    /// Returns the region that has the address, and the address in there.
    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Self::R, MemoryRegionAddress)> {
        let region = self.find_region(addr)?;
        Some((region, region.to_region_addr(addr)?))
    }

    /// Returns whether a region has the address.
    fn address_in_range(&self, addr: GuestAddress) -> bool {
        self.find_region(addr).is_some()
    }

    /// Returns the address if a region has it.
    fn check_address(&self, addr: GuestAddress) -> Option<GuestAddress> {
        self.find_region(addr).map(|_| addr)
    }

    /// Returns whether regions have all of the `len` bytes at `base`, in this process's memory. 0 bytes are everywhere.
    ///
    /// The range may end at 2^64 exactly, and never passes it.
    fn check_range(&self, base: GuestAddress, len: usize) -> bool {
        range_allows(self, base, len, Permissions::No)
    }

    /// Returns `base + offset` if a region has that address. What lies between does not matter.
    fn checked_offset(&self, base: GuestAddress, offset: usize) -> Option<GuestAddress> {
        let offset = u64::try_from(offset).ok()?;
        base.checked_add(offset)
            .and_then(|addr| self.check_address(addr))
    }

    /// Calls `f` for each part of the `count` bytes at `addr` that lies in one region, in the order of their addresses.
    ///
    /// `f` is given the number of bytes handled before, the number of bytes that are wanted now, where they begin in the region, and
    /// the region. It answers how many it has handled. 0 ends the walk; fewer than wanted make it go on behind those. The walk ends
    /// at the first hole, and the answer is the number of bytes handled until then.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGuestAddress`] if no region has `addr`; [`Error::CallbackOutOfRange`] if `f` says that it handled more than
    /// there was to handle in all; and what `f` answers.
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
                // Nothing is at 2^64.
                None => return Ok(total),
            }
        }
        match total {
            0 => Err(Error::InvalidGuestAddress(addr)),
            _ => Ok(total),
        }
    }

    /// Returns the address in this process of the byte at `addr`. What is done with it is outside the crate's promises.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGuestAddress`] if no region has it, and what the region answers.
    fn get_host_address(&self, addr: GuestAddress) -> Result<*mut u8> {
        let (region, start) = self
            .to_region_addr(addr)
            .ok_or(Error::InvalidGuestAddress(addr))?;
        region.get_host_address(start)
    }

    /// Returns the `count` bytes at `addr`, which must lie in one region.
    ///
    /// Whether the region permits reading and writing is not looked at: the caller has not said what it wants.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidGuestAddress`] if no region has `addr`, [`Error::InvalidBackendAddress`] if the range passes 2^64, and what the
    /// region answers.
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

    /// Returns the `count` bytes at `addr` as slices, one for each region that they lie in, in the order of their addresses.
    ///
    /// The first hole is reported as an error, which ends the iteration; so is a range that passes 2^64. For 0 bytes there is no
    /// slice. Whether a region permits reading and writing is not looked at: the caller has not said what it wants.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
    ) -> GuestMemoryBackendSliceIterator<'a, Self> {
        GuestMemoryBackendSliceIterator::new(self, addr, count, Permissions::No)
    }
}

/// What [`GuestMemoryBackend::get_slice`] answers where there is no short way: as a rule, an error.
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
        // What the region claims to have past 2^64 is not in it.
        return Err(Error::InvalidBackendAddress);
    }
    Ok(slice)
}

/// How many bytes a region has from `start` on, which is the guest's `addr`. What it claims to have past 2^64 does not count.
#[inline]
fn rest_of<R: GuestMemoryRegion>(
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

/// The part of the `count` bytes from `start` on that a region has, where it did not answer with all of them.
#[cold]
#[inline(never)]
fn other_part<'a, R: GuestMemoryRegion>(
    region: &'a R,
    start: MemoryRegionAddress,
    count: usize,
    answer: Result<VolatileSlice<'a, BS<'a, R::B>>>,
) -> Result<VolatileSlice<'a, BS<'a, R::B>>> {
    // Only where a part of it is missing is anything before that worth asking for.
    let (slice, count) = match answer {
        Ok(slice) => (slice, count),
        Err(error) => match region.reachable_bytes(start, count) {
            reachable if reachable == 0 || reachable >= count => return Err(error),
            reachable => (region.get_slice(start, reachable)?, reachable),
        },
    };
    // A region of another crate's might give something else; it must neither keep us here nor shift what follows.
    if slice.len() != count || count == 0 {
        return Err(Error::PartialBuffer {
            expected: count,
            completed: 0,
        });
    }
    Ok(slice)
}

/// Whether the `count` bytes at `addr` pass 2^64. They may end there.
#[inline]
fn passes_the_end(addr: GuestAddress, count: usize) -> bool {
    let more = to_u64(count.saturating_sub(1));
    addr.raw_value().checked_add(more).is_none()
}

/// Whether all of the `len` bytes at `base` lie in regions that allow the access.
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

/// The same, of a range that is not one piece, or that nothing is known of.
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

/// The slices that a range of guest physical memory consists of.
///
/// From [`GuestMemoryBackend::get_slices`].
#[derive(Debug)]
pub struct GuestMemoryBackendSliceIterator<'a, M: GuestMemoryBackend + ?Sized> {
    memory: &'a M,
    /// Where the next slice begins; `None` is 2^64.
    addr: Option<GuestAddress>,
    /// How many bytes are still wanted; 0 after an error.
    left: usize,
    /// What the regions must allow.
    access: Permissions,
    /// Whether the range was found not to be in one piece: then its parts are not tried to be, one after the other.
    in_parts: bool,
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
            in_parts: false,
        }
    }

    /// Returns the slices up to the first error.
    ///
    /// # Errors
    ///
    /// If the very first slice is an error: then nothing can be accessed.
    pub fn stop_on_error(self) -> Result<impl Iterator<Item = VolatileSlice<'a, MS<'a, M>>>> {
        slices_before_error(self)
    }

    /// The next slice, when there are bytes left. Out of line, where it does not stand in the way of the short way.
    #[inline(never)]
    fn step(&mut self) -> Result<VolatileSlice<'a, MS<'a, M>>> {
        let addr = self.addr.ok_or(Error::GuestAddressOverflow)?;
        let (region, start) = self
            .memory
            .to_region_addr(addr)
            .ok_or(Error::InvalidGuestAddress(addr))?;
        self.part_of(region, addr, start)
    }

    /// The next slice, which is in `region`, from `start` on.
    #[inline(always)]
    fn part_of(
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
            answer => other_part(region, start, count, answer)?,
        };
        self.left = self.left.saturating_sub(slice.len());
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
        // Nearly every range is one piece.
        if !self.in_parts {
            if let Some(slice) = self
                .addr
                .and_then(|addr| self.memory.contiguous_slice(addr, self.left, self.access))
            {
                self.left = 0;
                return Some(Ok(slice));
            }
            self.in_parts = true;
        }
        let step = self.step();
        if step.is_err() {
            self.left = 0;
        }
        Some(step)
    }
}

/// After the last slice or an error there is nothing more.
impl<M: GuestMemoryBackend + ?Sized> FusedIterator for GuestMemoryBackendSliceIterator<'_, M> {}

impl<'a, M: GuestMemoryBackend + ?Sized> GuestMemorySliceIterator<'a, MS<'a, M>>
    for GuestMemoryBackendSliceIterator<'a, M>
{
    /// A part is made where it is taken, and not as a `Result` in memory.
    #[inline]
    fn try_for_each_slice(
        &mut self,
        mut take: impl FnMut(VolatileSlice<'a, MS<'a, M>>) -> Result<()>,
    ) -> Result<()> {
        let mut regions = self.memory.regions_from(self.addr.unwrap_or_default());
        while self.left != 0 {
            let here = self.addr.zip(regions.next());
            let part = match here
                .and_then(|(addr, region)| Some((addr, region, region.to_region_addr(addr)?)))
            {
                Some((addr, region, start)) => self.part_of(region, addr, start),
                // As a rule there is nothing more, and this tells why.
                None => self.step(),
            };
            let taken = part.and_then(&mut take);
            if taken.is_err() {
                self.left = 0;
                return taken;
            }
        }
        Ok(())
    }
}

/// Guest physical memory is memory without an IOMMU between.
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
