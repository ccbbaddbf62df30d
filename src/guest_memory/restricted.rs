//! [`RestrictedMemory`]: a view of some ranges of guest memory.

use core::iter::FusedIterator;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::{
    bounded_slices, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions,
    Refusal, RefusalReason, Result, TranslationHold,
};
use crate::bitmap::{BitmapSlice, BS};
use crate::convert::{to_u64, to_usize};
use crate::volatile_memory::VolatileSlice;

/// A view of guest memory that contains only some of its ranges, each with permissions.
///
/// Give it to a device that must not reach all of the memory. An example is a guest that shares
/// only a pool of bounce buffers with the device (`restricted-dma-pool`, swiotlb). A byte has the
/// same address in the view and in the memory.
///
/// An access must be permitted by the view and by the memory. A byte that the view does not permit
/// is like a hole: an access moves the bytes before it. If there are none, the error is an
/// [`IOError`](Error::IOError) of the kind `PermissionDenied`, which contains the [`Refusal`].
/// [`explain`](GuestMemory::explain) returns the same refusal.
///
/// The view has no [`physical_memory`](GuestMemory::physical_memory), which would be all of it.
/// [`unrestricted`](Self::unrestricted) returns the memory to code that may use it. A slice of a
/// range can be written also if the view permits only reads, as in other memories. In front of an
/// [`IommuMemory`](crate::IommuMemory), the ranges are I/O virtual addresses.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::guest_memory::{RefusalReason, RestrictedMemory};
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)])?;
/// let device = RestrictedMemory::new(
///     memory.clone(),
///     [
///         (GuestAddress(0x4000), 0x1000, Permissions::ReadWrite),
///         (GuestAddress(0x5000), 0x1000, Permissions::Read),
///     ],
/// )?;
/// device.write_obj(7u64, GuestAddress(0x4ff8))?;
/// assert_eq!(memory.read_obj::<u64>(GuestAddress(0x4ff8))?, 7);
/// assert_eq!(device.read(&mut [0; 0x4000], GuestAddress(0x4000))?, 0x2000);
///
/// let error = device.write_obj(7u64, GuestAddress(0x5000)).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "transfer from or to guest memory failed: byte 0x0 of the range, at 0x5000: \
///      the view of the memory permits only read access"
/// );
/// let refusal = device.explain(GuestAddress(0x5ff8), 0x10, Permissions::Read);
/// assert_eq!(refusal.ok_or("accessible")?.reason, RefusalReason::NotInView);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "swiotlb")]
#[doc(alias = "restricted-dma-pool")]
#[doc(alias = "subset")]
#[derive(Clone, Debug)]
pub struct RestrictedMemory<M> {
    memory: M,
    /// In ascending order. They do not overlap.
    ranges: Arc<[PermittedRange]>,
}

/// A range of a view.
#[derive(Clone, Copy, Debug)]
struct PermittedRange {
    start: u64,
    last: u64,
    access: Permissions,
}

/// The error of a range that a view cannot have.
///
/// [`RestrictedMemory::new`] returns it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RestrictedMemoryError {
    /// The range has no bytes.
    #[error("range of a view at {:#x} has no bytes; omit it", start.0)]
    Empty {
        /// The start of the range.
        start: GuestAddress,
    },
    /// The range ends past 2^64.
    #[error("range of a view at {:#x} with {len:#x} bytes ends past 2^64", start.0)]
    PastTheEnd {
        /// The start of the range.
        start: GuestAddress,
        /// The length of the range, in bytes.
        len: u64,
    },
    /// The range begins in another one.
    #[error("range of a view at {:#x} begins in another range; separate them", start.0)]
    Overlap {
        /// The start of the range.
        start: GuestAddress,
    },
}

impl<M: GuestMemory> RestrictedMemory<M> {
    /// Creates a view of the given ranges: start, length in bytes, and permissions.
    ///
    /// The ranges may be in any order, and adjacent. They need not be in a region: a region that is
    /// plugged later is then in the view. A range with [`Permissions::No`] is not. Without ranges,
    /// the view permits nothing.
    ///
    /// # Examples
    ///
    /// See [`RestrictedMemory`].
    ///
    /// # Errors
    ///
    /// Returns an error for a range that is empty, ends past 2^64, or overlaps another one.
    pub fn new(
        memory: M,
        ranges: impl IntoIterator<Item = (GuestAddress, u64, Permissions)>,
    ) -> core::result::Result<Self, RestrictedMemoryError> {
        let ranges = ranges.into_iter().map(|(start, len, access)| {
            let more = len
                .checked_sub(1)
                .ok_or(RestrictedMemoryError::Empty { start })?;
            let last = start
                .0
                .checked_add(more)
                .ok_or(RestrictedMemoryError::PastTheEnd { start, len })?;
            Ok(PermittedRange {
                start: start.0,
                last,
                access,
            })
        });
        let mut ranges = ranges.collect::<core::result::Result<Vec<_>, _>>()?;
        ranges.sort_unstable_by_key(|range| range.start);
        let pairs = ranges.iter().zip(ranges.iter().skip(1));
        if let Some((_, second)) = pairs
            .into_iter()
            .find(|(first, second)| second.start <= first.last)
        {
            return Err(RestrictedMemoryError::Overlap {
                start: GuestAddress(second.start),
            });
        }
        // A slice for no access could be read and written.
        ranges.retain(|range| range.access != Permissions::No);
        Ok(Self {
            memory,
            ranges: ranges.into(),
        })
    }

    /// Returns the same view of another memory, after a region was added or removed.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::guest_memory::RestrictedMemory;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    ///
    /// let pool = [(GuestAddress(0x1000), 0x1000, Permissions::ReadWrite)];
    /// let device = RestrictedMemory::new(GuestMemoryMmap::<()>::new(), pool)?;
    /// assert!(device.read_obj::<u8>(GuestAddress(0x1000)).is_err());
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let device = device.with_replaced_memory(memory);
    /// assert_eq!(device.read_obj::<u8>(GuestAddress(0x1000))?, 0);
    /// assert!(device.read_obj::<u8>(GuestAddress(0x2000)).is_err());
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_replaced_memory<N: GuestMemory>(&self, memory: N) -> RestrictedMemory<N> {
        RestrictedMemory {
            memory,
            ranges: Arc::clone(&self.ranges),
        }
    }

    /// Returns the memory without the restriction, for code that may reach all of it.
    pub fn unrestricted(&self) -> &M {
        &self.memory
    }

    /// Returns how many of the `count` bytes at `addr` the view permits, and the reason for the
    /// first one that it does not.
    #[inline]
    fn reach(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> (usize, Option<RefusalReason>) {
        let (wanted, mut reached) = (to_u64(count), 0u64);
        if wanted == 0 {
            return (0, None);
        }
        let refused = |reached, reason| (to_usize(reached), Some(reason));
        let first = self.ranges.partition_point(|range| range.last < addr.0);
        let mut at = addr.0;
        for range in self.ranges.get(first..).unwrap_or_default() {
            if range.start > at {
                break;
            }
            if !range.access.allow(access) {
                return refused(reached, RefusalReason::ViewPermits(range.access));
            }
            let len = range.last.saturating_sub(at).saturating_add(1);
            reached = reached.saturating_add(len);
            if reached >= wanted {
                return (count, None);
            }
            // No range follows one that ends at 2^64.
            at = range.last.saturating_add(1);
        }
        refused(reached, RefusalReason::NotInView)
    }

    /// Returns whether the view permits all `count` bytes at `addr`.
    #[inline]
    fn permits(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.reach(addr, count, access).1.is_none()
    }
}

/// Returns the error of an access that the view does not permit.
#[cold]
fn refused(refusal: Refusal) -> Error {
    Error::IOError(io::Error::new(ErrorKind::PermissionDenied, refusal))
}

impl<M: GuestMemory> GuestMemory for RestrictedMemory<M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = M::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.permits(addr, count, access) && self.memory.check_range(addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let (reached, reason) = self.reach(addr, count, access);
        let refusal = reason.map(|reason| Refusal::new(addr, reached, reason));
        match refusal {
            // An IOMMU must not translate an address that is not in the view.
            Some(refusal) if reached == 0 => Err(refused(refusal)),
            _ => Ok(PermittedSlices {
                slices: bounded_slices(&self.memory, addr, reached, access)?,
                refusal,
            }),
        }
    }

    #[cold]
    fn explain(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Refusal> {
        let (reached, reason) = self.reach(addr, count, access);
        let of_memory = self.memory.explain(addr, reached, access);
        of_memory.or_else(|| Some(Refusal::new(addr, reached, reason?)))
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        self.memory.hold_translation()
    }

    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        if !self.permits(addr, count, access) {
            return None;
        }
        self.memory.contiguous_slice(addr, count, access)
    }

    #[inline]
    fn with_contiguous_slice<T, F>(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
        transfer: F,
    ) -> Result<Option<T>>
    where
        F: for<'s> FnOnce(&VolatileSlice<'s, BS<'s, Self::Bitmap>>) -> T,
    {
        if !self.permits(addr, count, access) {
            return Ok(None);
        }
        self.memory
            .with_contiguous_slice(addr, count, access, transfer)
    }
}

/// The slices of the permitted bytes at the start of a range, and the refusal of the next byte.
#[derive(Debug)]
struct PermittedSlices<S> {
    slices: S,
    /// `None` if the view permits the whole range, or after an error.
    refusal: Option<Refusal>,
}

impl<'a, B, S> Iterator for PermittedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
    type Item = Result<VolatileSlice<'a, B>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let next = self.slices.next();
        match next {
            Some(Ok(_)) => next,
            Some(Err(_)) => {
                self.refusal = None;
                next
            }
            None => self.refusal.take().map(|refusal| Err(refused(refusal))),
        }
    }
}

impl<'a, B, S> FusedIterator for PermittedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
}

impl<'a, B, S> GuestMemorySliceIterator<'a, B> for PermittedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
    #[inline(always)]
    fn is_bounded_by_range(&self) -> bool {
        true
    }

    #[inline]
    fn try_for_each_slice(
        &mut self,
        take: impl FnMut(VolatileSlice<'a, B>) -> Result<()>,
    ) -> Result<()> {
        // An error ends the iteration, so the refusal is returned by this call or never.
        let refusal = self.refusal.take();
        self.slices.try_for_each_slice(take)?;
        match refusal {
            Some(refusal) => Err(refused(refusal)),
            None => Ok(()),
        }
    }
}
