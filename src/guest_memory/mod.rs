//! A whole guest memory: its addresses, its errors, and the traits that everything else is written against.
//!
//! ```text
//!   GuestMemory            what devices use: slices and Bytes at a guest address, with a wish to read or write.
//!   │                      Behind an IOMMU the address is an I/O virtual address (IOVA).
//!   ├── IommuMemory        translates, then asks a GuestMemoryBackend        (feature `iommu`)
//!   └── GuestMemoryBackend guest physical memory: a set of regions, each found by its address.
//!       │                  Every backend is a GuestMemory, by a blanket implementation.
//!       └── GuestRegionCollection, and with it GuestMemoryMmap
//! ```
//!
//! A [`GuestAddressSpace`] gives a device the memory map of the moment, where maps change.

mod address_space;
mod backend;
mod bytes;
mod hold;
mod permissions;

#[cfg(all(test, feature = "backend-mmap"))]
mod tests;

use std::fs::File;
use std::sync::Arc;

pub use crate::address::{GuestAddress, MemoryRegionAddress};
pub use address_space::GuestAddressSpace;
pub use backend::{GuestMemoryBackend, GuestMemoryBackendSliceIterator};
pub use hold::TranslationHold;
pub use permissions::Permissions;

use crate::address::AddressValue;
use crate::bitmap::{Bitmap, BitmapSlice, BS};
use crate::volatile_memory::{self, VolatileSlice};

/// What is wrong with an access to guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no memory at this address, or none that the access can reach.
    #[error("no guest memory at address 0x{:x}", .0 .0)]
    InvalidGuestAddress(GuestAddress),
    /// The access ends behind its region, crosses into another where it may not, or is not aligned.
    #[error("the access leaves its region or is misaligned in it")]
    InvalidBackendAddress,
    /// The region has no host memory that the access may use: it is no RAM, or does not permit reading or writing
    /// (see [`GuestMemoryRegion::allowed_access`](crate::GuestMemoryRegion::allowed_access)).
    #[error("no host memory is available for this access")]
    HostAddressNotAvailable,
    /// The callback of [`GuestMemoryBackend::try_access`] says that it handled more than it was given.
    #[error("the callback handled more bytes than it was given")]
    CallbackOutOfRange,
    /// The range passes the end of the address space.
    #[error("the range passes the end of the guest's address space")]
    GuestAddressOverflow,
    /// A stream or the system answered with an error.
    #[error("{0}")]
    IOError(std::io::Error),
    /// Not everything could be moved.
    #[error("only {completed} of {expected} bytes could be moved")]
    PartialBuffer {
        /// How many bytes were to be moved.
        expected: usize,
        /// How many were, from the first on.
        completed: usize,
    },
    /// The IOMMU does not translate the address for this access.
    #[cfg(feature = "iommu")]
    #[error("{0}")]
    IommuError(crate::iommu::Error),
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

/// What the methods of this module return.
pub type Result<T> = core::result::Result<T, Error>;

/// The raw number in a [`GuestAddress`], and the length of a region in bytes.
pub type GuestUsize = <GuestAddress as AddressValue>::V;

/// A place in a file, which a region of guest memory is mapped from.
#[derive(Clone, Debug)]
pub struct FileOffset {
    file: Arc<File>,
    start: u64,
}

impl FileOffset {
    /// Makes the place `start` bytes into `file`.
    pub fn new(file: File, start: u64) -> Self {
        FileOffset::from_arc(Arc::new(file), start)
    }

    /// Makes the place `start` bytes into `file`, which others share.
    pub fn from_arc(file: Arc<File>, start: u64) -> Self {
        FileOffset { file, start }
    }

    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the file, to share it.
    pub fn arc(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the offset in the file, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }
}

/// Memory that a device uses by guest address.
///
/// [`Bytes<GuestAddress>`](crate::Bytes) is implemented for everything that implements this.
///
/// Behind an IOMMU, the addresses are IOVAs: a range may be scattered over physical memory in any way, and what it is mapped to may
/// change from one call to the next. Every access says what it wants to do ([`Permissions`]), and may be refused.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::guest_memory::GuestMemorySliceIterator;
/// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// /// Adds up the lengths of the pieces that a range is in.
/// fn reachable(memory: &impl GuestMemory, addr: GuestAddress, count: usize) -> usize {
///     let pieces = memory.get_slices(addr, count, Permissions::Read).and_then(|p| p.stop_on_error());
///     pieces.map_or(0, |pieces| pieces.map(|slice| slice.len()).sum())
/// }
///
/// let memory: GuestMemoryMmap =
///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])?;
/// assert_eq!(reachable(&memory, GuestAddress(0xfff), 0x800), 0x800);
/// assert_eq!(reachable(&memory, GuestAddress(0x1fff), 0x800), 1);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait GuestMemory {
    /// The physical memory underneath.
    type PhysicalMemory: GuestMemoryBackend + ?Sized;

    /// What marks written pages.
    type Bitmap: Bitmap;

    /// Returns whether all of the `count` bytes at `addr` can be accessed as `access` wants. 0 bytes always can.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool;

    /// Returns the `count` bytes at `addr` as slices, in the order of their addresses.
    ///
    /// An error ends the iteration; the slices before it are good. Without one, their lengths add up to `count`. For 0 bytes
    /// there is no slice.
    ///
    /// # Errors
    ///
    /// If the range cannot be translated, or not for this access; what is wrong with a single piece is reported by the
    /// iterator.
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>>;

    /// Returns the physical memory if there is nothing between: if addresses are guest physical addresses.
    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        None
    }

    /// Returns what keeps the translations of addresses in use that are made from now on, until it is dropped; `None` if there is no such thing.
    ///
    /// For slices that outlive their iterator, in I/O that completes later: see [`Iommu::hold_translation`](crate::iommu::Iommu::hold_translation). Guest physical
    /// memory has nothing to hold.
    fn hold_translation(&self) -> Option<TranslationHold> {
        self.physical_memory().map(|_| TranslationHold::nothing())
    }

    /// Returns the `count` bytes at `addr` as one slice, if they lie in one piece of host memory and `access` is allowed.
    ///
    /// `None` is no error: [`get_slices`](Self::get_slices) tells what is there, and whoever got `None` asks it. The slice must be good for as
    /// long as `self` is borrowed. A memory that translates addresses cannot promise that: its iterator holds on to what the slice was
    /// translated through, and the slice would outlive that. So the provided method gives none;
    /// [`with_contiguous_slice`](Self::with_contiguous_slice) is for such memory, too.
    #[inline]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        // A slice from an iterator may be good only for as long as the iterator holds on to what it was translated through.
        let _ = (addr, count, access);
        None
    }

    /// Lends the `count` bytes at `addr` to `transfer` as one slice, if they lie in one piece of host memory and `access` is allowed.
    ///
    /// This is the short way of [`Bytes`](crate::Bytes): nearly every access lies in one region, or in one mapping of an IOMMU. What the
    /// address was translated through is held until `transfer` returns, so that no invalidation is acknowledged while bytes are moving; `transfer`
    /// can keep nothing of the slice.
    ///
    /// `Ok(None)` is no error: `transfer` did not run, and [`get_slices`](Self::get_slices) tells what is there.
    ///
    /// # Errors
    ///
    /// If the range cannot be translated, or not for this access. `get_slices` need not be asked then: it would have the same question put to
    /// whoever keeps the mappings.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let length = |addr, count| {
    ///     memory.with_contiguous_slice(GuestAddress(addr), count, Permissions::Read, |slice| slice.len())
    /// };
    /// assert_eq!(length(0xff0, 0x10)?, Some(0x10));
    /// assert_eq!(length(0xff0, 0x11)?, None);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
        // `Option::map` is a call when built for size.
        match self.contiguous_slice(addr, count, access) {
            Some(slice) => Ok(Some(transfer(&slice))),
            None => Ok(None),
        }
    }
}

/// The slices that together are a range of guest memory, or the error that ends them.
pub trait GuestMemorySliceIterator<'a, B: BitmapSlice>:
    Iterator<Item = Result<VolatileSlice<'a, B>>> + core::iter::FusedIterator + Sized
{
    /// Returns the slices up to the first error.
    ///
    /// # Errors
    ///
    /// If the very first slice is an error: then nothing can be accessed.
    fn stop_on_error(self) -> Result<impl Iterator<Item = VolatileSlice<'a, B>>> {
        slices_before_error(self)
    }

    /// Hands all slices that are left to `take`, in order.
    ///
    /// As a loop over the iterator, which it is unless an implementation has a shorter way. The iterator is borrowed, not used up: what it holds on
    /// to is held until it is dropped.
    ///
    /// # Errors
    ///
    /// The first error among the slices, or of `take`: either is the last thing that happens.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::guest_memory::GuestMemorySliceIterator;
    /// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
    ///
    /// let memory: GuestMemoryMmap =
    ///     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])?;
    /// let mut lengths = Vec::new();
    /// let mut slices = GuestMemory::get_slices(&memory, GuestAddress(0xf00), 0x1200, Permissions::Read)?;
    /// let end = slices.try_for_each_slice(|slice| {
    ///     lengths.push(slice.len());
    ///     Ok(())
    /// });
    /// assert_eq!(lengths, [0x100, 0x1000]);
    /// assert!(end.is_err(), "nothing is at 0x2000");
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
}

/// What [`GuestMemorySliceIterator::stop_on_error`] does.
fn slices_before_error<T>(
    mut slices: impl Iterator<Item = Result<T>>,
) -> Result<impl Iterator<Item = T>> {
    let first = slices.next().transpose()?;
    Ok(first.into_iter().chain(slices.map_while(Result::ok)))
}
