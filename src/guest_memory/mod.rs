//! The guest's memory as a whole: its traits, addresses and errors.
//!
//! ```text
//!   GuestMemory             for devices: accesses by guest address, each with a permission.
//!   │                       Behind an IOMMU, the address is an IOVA.
//!   ├── IommuMemory         translates IOVAs, then uses a GuestMemoryBackend (feature `iommu`)
//!   ├── RestrictedMemory    some ranges of another GuestMemory
//!   └── GuestMemoryBackend  guest physical memory: regions, found by address.
//!       │                   Every backend is a GuestMemory.
//!       └── GuestRegionCollection, and its alias GuestMemoryMmap
//! ```
//!
//! [`Bytes<GuestAddress>`](crate::Bytes) is implemented for every [`GuestMemory`]. Devices that
//! outlive a memory map get the current one from a [`GuestAddressSpace`].
//!
//! This module makes no system calls, except for memory of Xen guests (feature `xen`) that is not
//! mapped in advance.
//!
//! # Examples
//!
//! A device that works with and without an IOMMU, and while regions are hotplugged:
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use vm_memory::{
//!     Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, Permissions,
//! };
//!
//! /// Sums up the bytes of a buffer that the driver passed.
//! fn checksum(
//!     space: &impl GuestAddressSpace,
//!     addr: GuestAddress,
//!     len: usize,
//! ) -> vm_memory::GuestMemoryResult<u8> {
//!     // The driver chooses `len`: allocate nothing of that size.
//!     let (memory, mut sum) = (space.memory(), 0u8);
//!     for slice in memory.get_slices(addr, len, Permissions::Read)? {
//!         let slice = slice?;
//!         for offset in 0..slice.len() {
//!             sum = sum.wrapping_add(slice.read_obj(offset)?);
//!         }
//!     }
//!     Ok(sum)
//! }
//!
//! let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
//! memory.write_slice(&[1, 2, 3], GuestAddress(0x10))?;
//! assert_eq!(checksum(&&memory, GuestAddress(0x10), 3)?, 6);
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address_space;
mod all_or_nothing;
mod backend;
mod bounded_slices;
mod bytes;
mod explain;
#[cfg_attr(
    not(any(test, feature = "backend-atomic", feature = "iommu")),
    expect(dead_code, reason = "without these features, nothing changes")
)]
mod generation;
#[expect(
    unsafe_code,
    reason = "a view keeps its slices mapped until it is dropped"
)]
mod held;
mod hold;
mod host_runs;
mod permissions;
mod restricted;
#[expect(
    unsafe_code,
    reason = "a window may own the map that its slices borrow from"
)]
mod window;

#[cfg(all(test, feature = "backend-mmap"))]
mod tests;

use std::fs::File;
use std::sync::Arc;

pub use crate::address::{GuestAddress, MemoryRegionAddress};
pub use address_space::{GuestAddressSpace, IntoMap};
pub use all_or_nothing::AllOrNothing;
pub use backend::{GuestMemoryBackend, GuestMemoryBackendSliceIterator};
pub(crate) use bounded_slices::bounded_slices;
#[cfg(feature = "iommu")]
pub(crate) use explain::{explain, longest};
pub use explain::{Refusal, RefusalReason};
pub use held::HeldMemory;
#[cfg(all(feature = "rawfd", unix))]
pub(crate) use hold::hold_for;
pub use hold::TranslationHold;
pub use host_runs::HostRun;
pub(crate) use permissions::not_created_for;
pub use permissions::Permissions;
pub use restricted::{RestrictedMemory, RestrictedMemoryError};
pub use window::Window;

#[cfg(any(feature = "backend-atomic", feature = "iommu"))]
pub(crate) use generation::Generation;
#[cfg(feature = "backend-atomic")]
pub(crate) use generation::SeenGeneration;

use crate::address::AddressValue;
use crate::bitmap::{Bitmap, BitmapSlice, BS};
use crate::volatile_memory::{self, VolatileSlice};

/// The error of an access to guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No region contains the address.
    #[error("no guest memory at address 0x{:x}", .0 .0)]
    InvalidGuestAddress(GuestAddress),
    /// The access must be contiguous but leaves its region, or it is not aligned.
    #[error("access leaves its region, or is not aligned; align it and keep it in one region")]
    InvalidBackendAddress,
    /// The memory is not mapped in this process, is in an unplugged block, or is in a region that
    /// does not permit the access.
    ///
    /// [`GuestMemoryRegion::allowed_access`](crate::GuestMemoryRegion::allowed_access) returns what
    /// a region permits.
    ///
    /// [`GuestMemory::explain`] returns the reason, and the first byte that is not accessible.
    #[error(
        "memory is unplugged, is not mapped in this process, or does not permit the access; \
         GuestMemory::explain returns the reason"
    )]
    HostAddressNotAvailable,
    /// The callback of [`GuestMemoryBackend::try_access`] returned a count that is too high.
    #[error("callback of try_access returned more bytes than it was given")]
    CallbackOutOfRange,
    /// The range ends past 2^64.
    #[error("range ends past the guest's address space of 2^64 bytes")]
    GuestAddressOverflow,
    /// A stream failed, or the access [faulted](crate::fault).
    ///
    /// The number of a fault is `EFAULT`. If a page of a Xen guest cannot be mapped, it is that of
    /// the mapping. A page that is not granted is `EINVAL`.
    #[error("transfer from or to guest memory failed: {0}")]
    IOError(#[source] std::io::Error),
    /// Only the first bytes of the range were moved.
    #[error("only {completed} of {expected} bytes could be moved")]
    PartialBuffer {
        /// The requested number of bytes.
        expected: usize,
        /// The number of bytes moved.
        completed: usize,
    },
    /// The IOMMU did not translate the address.
    ///
    /// [`iommu::Error::kind`](crate::iommu::Error::kind) tells the failures apart. The mapping is
    /// missing or does not permit the access, or its request failed.
    #[cfg(feature = "iommu")]
    #[error("the IOMMU cannot translate the address for the access: {0}")]
    IommuError(#[source] crate::iommu::Error),
}

impl From<volatile_memory::Error> for Error {
    #[cold]
    fn from(error: volatile_memory::Error) -> Self {
        match error {
            volatile_memory::Error::OutOfBounds { .. }
            | volatile_memory::Error::Overflow { .. }
            | volatile_memory::Error::TooBig { .. }
            | volatile_memory::Error::Misaligned { .. } => Error::InvalidBackendAddress,
            volatile_memory::Error::IOError(error) => Error::IOError(error),
            volatile_memory::Error::PartialBuffer {
                expected,
                completed,
            } => Error::PartialBuffer {
                expected,
                completed,
            },
        }
    }
}

/// The result of an access to guest memory.
pub type Result<T> = core::result::Result<T, Error>;

/// The integer type of guest addresses and of region lengths.
pub type GuestUsize = <GuestAddress as AddressValue>::V;

/// A file and an offset from which a region of guest memory is mapped.
///
/// It does not check them. The function that maps the region compares the offset with the length of
/// a regular file. It cannot do so for a block device, whose length `fstat(2)` does not return.
///
/// # Examples
///
/// ```no_run
/// use std::fs::File;
/// use vm_memory::FileOffset;
///
/// let shared = FileOffset::new(File::open("/dev/shm/guest-ram")?, 0x1000);
/// assert_eq!(shared.start(), 0x1000);
/// # Ok::<(), std::io::Error>(())
/// ```
#[doc(alias = "memfd")]
#[derive(Clone, Debug)]
pub struct FileOffset {
    file: Arc<File>,
    start: u64,
}

impl FileOffset {
    /// Creates the offset `start` in `file`, in bytes.
    pub fn new(file: File, start: u64) -> Self {
        FileOffset::from_arc(Arc::new(file), start)
    }

    /// Creates the offset `start` in a shared `file`, in bytes.
    pub fn from_arc(file: Arc<File>, start: u64) -> Self {
        FileOffset { file, start }
    }

    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the shared file.
    pub fn arc(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the offset in the file, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }
}

/// Memory that devices access by guest address.
///
/// [`Bytes<GuestAddress>`](crate::Bytes) is implemented for every `GuestMemory`.
///
/// Behind an IOMMU, the addresses are IOVAs. A range may then be scattered over physical memory,
/// and its mapping may change between two calls. Each access states its [`Permissions`], and the
/// memory may refuse it.
///
/// # Examples
///
/// Collect the segments of a buffer, for example to build a list of `iovec`s:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
/// let mut lengths = Vec::new();
/// for slice in GuestMemory::get_slices(&memory, GuestAddress(0xf00), 0x800, Permissions::Read)? {
///     lengths.push(slice?.len());
/// }
/// assert_eq!(lengths, [0x100, 0x700]);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "DMA")]
#[doc(alias = "AddressSpace")]
pub trait GuestMemory {
    /// The guest physical memory that backs this memory.
    type PhysicalMemory: GuestMemoryBackend + ?Sized;

    /// The dirty bitmap of a slice.
    type Bitmap: Bitmap;

    /// Returns whether all `count` bytes at `addr` permit `access`. Always `true` for 0 bytes.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool;

    /// Returns the `count` bytes at `addr` as slices, in ascending order of address.
    ///
    /// The first error ends the iteration. The slices before it are valid. Without an error, their
    /// lengths add up to `count`. No slice is empty. For 0 bytes there are no slices.
    ///
    /// Accesses by other methods do not rely on this. They end after `count` bytes or at an empty
    /// slice, with [`Error::InvalidBackendAddress`] if it is the first one.
    ///
    /// # Errors
    ///
    /// Returns an error if `addr` cannot be translated, or does not permit `access`. The iterator
    /// returns the errors of a single slice.
    #[doc(alias = "iovec")]
    #[doc(alias = "scatter-gather")]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>>;

    /// Returns the first of `count` bytes at `addr` that an access cannot reach, and the reason.
    ///
    /// Returns `None` if the range permits `access`. Use it after an access has failed: the error
    /// of an access does not contain the address of the byte. It walks over the regions of the
    /// range, and behind an IOMMU also over the mappings of the range.
    ///
    /// It has no side effects: it accesses no byte of the range, counts no lookup of an IOTLB, and
    /// asks for no mapping. So it does not find a page that [faults](crate::fault), or a page of a
    /// Xen guest that is not granted. Behind an IOMMU that does not implement
    /// [`Iommu::current_iotlb`](crate::iommu::Iommu::current_iotlb), the reason is
    /// [`RefusalReason::Unknown`].
    ///
    /// The provided method finds the reason for memory whose addresses are guest physical
    /// addresses. For other memory, it calls [`check_range`](Self::check_range), and the reason is
    /// [`RefusalReason::Unknown`].
    ///
    /// # Examples
    ///
    /// Behind an IOMMU:
    ///
    /// ```
    /// # #[cfg(all(feature = "backend-mmap", feature = "iommu"))] {
    /// use vm_memory::iommu::{IommuMemory, SharedIotlb};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x8000), GuestAddress(0x3000), 0x2000, Permissions::Read)?;
    /// let memory = IommuMemory::new(physical, iotlb, true, ());
    ///
    /// let why = |addr, access| {
    ///     let refusal = memory.explain(GuestAddress(addr), 8, access);
    ///     refusal.map(|refusal| refusal.to_string())
    /// };
    /// assert_eq!(why(0x8000, Permissions::Read), None);
    /// assert_eq!(
    ///     why(0x8000, Permissions::Write).ok_or("the range is accessible")?,
    ///     "byte 0x0 of the range, at 0x8000: its mapping in the IOMMU permits only read access"
    /// );
    /// assert_eq!(
    ///     why(0x8ffc, Permissions::Read).ok_or("the range is accessible")?,
    ///     "byte 0x4 of the range, at 0x9000, which the IOMMU maps to 0x4000: \
    ///      no region of guest memory contains it"
    /// );
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "diagnose")]
    #[cold]
    fn explain(&self, addr: GuestAddress, count: usize, access: Permissions) -> Option<Refusal> {
        match self.physical_memory() {
            Some(physical) => explain::explain(physical, addr, count, access),
            None if self.check_range(addr, count, access) => None,
            None => Some(Refusal::new(addr, 0, RefusalReason::Unknown)),
        }
    }

    /// Returns the `count` bytes at `addr` as runs of host memory, in ascending order of address.
    ///
    /// Unlike the slices of [`get_slices`](Self::get_slices), a run spans adjacent regions that are
    /// also adjacent in host memory, such as regions of one reservation. So one vector or one
    /// registration covers them. The first error ends the iteration, and the runs before it are
    /// valid. The iterator keeps the translation in use.
    ///
    /// The host addresses are for the kernel and for devices. Nothing marks writes through them,
    /// and Rust code should access a run by its guest address.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let mut covered = 0;
    /// for run in memory.host_runs(GuestAddress(0x800), 0x1000, Permissions::Read)? {
    ///     let run = run?;
    ///     println!("{:#x}: {} bytes at {:p}", run.addr.0, run.len, run.host);
    ///     covered += run.len;
    /// }
    /// assert_eq!(covered, 0x1000);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the error of [`get_slices`](Self::get_slices): behind an IOMMU, an error if a byte
    /// of the range is not mapped. The iterator returns the error of an address that is in no
    /// region, or whose region does not permit `access`. It returns
    /// [`Error::HostAddressNotAvailable`] for memory that is mapped for each access (feature
    /// `xen`).
    #[doc(alias = "iovec")]
    #[doc(alias = "coalesce")]
    fn host_runs(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl Iterator<Item = Result<HostRun>>> {
        let slices = bounded_slices(self, addr, count, access)?;
        Ok(host_runs::host_runs(slices, addr))
    }

    /// Returns a view whose accesses move all bytes of their range, or none.
    ///
    /// # Examples
    ///
    /// See [`AllOrNothing`], which also lists the limits.
    #[doc(alias = "transaction")]
    fn all_or_nothing(&self) -> AllOrNothing<'_, Self> {
        AllOrNothing(self)
    }

    /// Returns a view whose slices stay mapped until it is dropped.
    ///
    /// # Examples
    ///
    /// See [`HeldMemory`].
    #[doc(alias = "pin")]
    fn held(&self) -> HeldMemory<'_, Self> {
        HeldMemory::new(self)
    }

    /// Returns the `len` bytes at `addr` as a window: checked once, then accessed by offset.
    ///
    /// The window borrows the memory. [`Window::from_arc`] creates one that a device can keep. A
    /// window of 0 bytes is empty, at any address. A range may end at 2^64.
    ///
    /// # Examples
    ///
    /// See [`Window`].
    ///
    /// # Errors
    ///
    /// - the error of the first byte that is not in a region, is not mapped by the IOMMU, or does
    ///   not permit `access`;
    /// - [`Error::IOError`] of the kind `PermissionDenied` if `access` is [`Permissions::No`];
    /// - [`Error::IOError`] of the kind `InvalidInput` if the range has more than 1024 slices, or
    ///   `OutOfMemory` if an allocation fails;
    /// - [`Error::IOError`] of the kind `Unsupported` behind an IOMMU that cannot keep translations
    ///   in use ([`hold_translation`](Self::hold_translation) returns `None`);
    /// - [`Error::IOError`] with the error of the system for a page of a Xen guest that cannot be
    ///   mapped.
    #[doc(alias = "MemoryRegionCache")]
    #[doc(alias = "subrange")]
    fn window(
        &self,
        addr: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Result<Window<'_, Self>> {
        Window::new(self, addr, len, access)
    }

    /// Returns the physical memory if guest addresses are guest physical addresses.
    ///
    /// Returns `None` if an IOMMU translates them.
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        None
    }

    /// Returns a hold on all translations made after this call, until the hold is dropped.
    ///
    /// Take one for slices that outlive their iterator, as in I/O that completes later. See
    /// [`Iommu::hold_translation`](crate::iommu::Iommu::hold_translation). For guest physical
    /// memory, the hold is empty. Returns `None` if the memory does not support holds.
    fn hold_translation(&self) -> Option<TranslationHold> {
        self.physical_memory().map(|_| TranslationHold::nothing())
    }

    /// Returns the `count` bytes at `addr` as one slice, if they are contiguous.
    ///
    /// They must be contiguous in host memory, and permit `access`.
    ///
    /// `None` is not an error: the range is not contiguous, or cannot be lent. Use
    /// [`get_slices`](Self::get_slices) instead.
    ///
    /// The slice must be valid while `self` is borrowed. A memory that translates addresses cannot
    /// promise that, because its iterator holds the translation. The provided method returns
    /// `None`. See [`with_contiguous_slice`](Self::with_contiguous_slice) for such memory.
    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        let _ = (addr, count, access);
        None
    }

    /// Lends the `count` bytes at `addr` to `transfer` as one slice, if they are contiguous.
    ///
    /// They must be contiguous in host memory, and permit `access`.
    ///
    /// This is the fast path of [`Bytes`](crate::Bytes): almost every access is contiguous. The
    /// translation is held until `transfer` returns. An IOMMU acknowledges an invalidation only
    /// after that.
    ///
    /// `Ok(None)` is not an error: `transfer` did not run. Use [`get_slices`](Self::get_slices)
    /// instead.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let len = |addr, count| {
    ///     memory.with_contiguous_slice(GuestAddress(addr), count, Permissions::Read, |s| s.len())
    /// };
    /// assert_eq!(len(0xff0, 0x10)?, Some(0x10));
    /// assert_eq!(len(0xff0, 0x11)?, None);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns an error if the range cannot be translated, or its mapping does not permit `access`.
    /// `get_slices` would return the same error.
    #[inline(always)]
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
        // Not `Option::map`, which becomes a call when built for size.
        match self.contiguous_slice(addr, count, access) {
            Some(slice) => Ok(Some(transfer(&slice))),
            None => Ok(None),
        }
    }
}

/// An iterator over the slices of a range of guest memory, which ends with the first error.
///
/// [`GuestMemory::get_slices`] returns it.
pub trait GuestMemorySliceIterator<'a, B: BitmapSlice>:
    Iterator<Item = Result<VolatileSlice<'a, B>>> + core::iter::FusedIterator + Sized
{
    /// Returns an iterator over the slices before the first error.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::guest_memory::GuestMemorySliceIterator;
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let slices = GuestMemory::get_slices(&memory, GuestAddress(0xfff), 2, Permissions::Read)?;
    /// let reachable: usize = slices.stop_on_error()?.map(|slice| slice.len()).sum();
    /// assert_eq!(reachable, 1);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the error if it comes first: no byte of the range is accessible.
    fn stop_on_error(self) -> Result<impl Iterator<Item = VolatileSlice<'a, B>>> {
        slices_before_error(self)
    }

    /// Calls `take` with each remaining slice, in order.
    ///
    /// Implementations may be faster than a loop over the iterator. The translation is held until
    /// the iterator is dropped, which may be after this call.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::guest_memory::GuestMemorySliceIterator;
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
    /// let start = GuestAddress(0xf00);
    /// let mut slices = GuestMemory::get_slices(&memory, start, 0x1200, Permissions::Read)?;
    /// let mut lengths = Vec::new();
    /// let result = slices.try_for_each_slice(|slice| {
    ///     lengths.push(slice.len());
    ///     Ok(())
    /// });
    /// assert_eq!(lengths, [0x100, 0x1000]);
    /// assert!(result.is_err(), "no memory at 0x2000");
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns the first error, of the iterator or of `take`, and stops there.
    #[inline]
    fn try_for_each_slice(
        &mut self,
        mut take: impl FnMut(VolatileSlice<'a, B>) -> Result<()>,
    ) -> Result<()> {
        for slice in self {
            take(slice?)?;
        }
        Ok(())
    }

    /// Returns whether no slice is empty, and their lengths add up to the range or less.
    ///
    /// The default is `false`: this crate then checks each slice.
    #[doc(hidden)]
    #[inline(always)]
    fn is_bounded_by_range(&self) -> bool {
        false
    }
}

/// Returns the items before the first error, or the error if it is the first item.
fn slices_before_error<T>(
    mut slices: impl Iterator<Item = Result<T>>,
) -> Result<impl Iterator<Item = T>> {
    let first = slices.next().transpose()?;
    Ok(first.into_iter().chain(slices.map_while(Result::ok)))
}
