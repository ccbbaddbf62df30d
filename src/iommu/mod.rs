//! Guest memory behind an IOMMU.
//!
//! A device behind an IOMMU uses I/O virtual addresses (IOVAs). What they stand for is up to the guest, page by page, and changes while the
//! device runs.
//!
//! ```text
//!   IommuMemory::get_slices(IOVA, count, access)
//!     │
//!     ├─ Iommu::translate    yours: looks into an Iotlb; what is missing there, it gets from where the mappings are
//!     │   └─ Iotlb::lookup   IOVA ─► guest physical ranges, or what is missing and what is refused
//!     │
//!     └─ GuestMemoryBackend  guest physical ranges ─► slices of host memory
//! ```
//!
//! That is how vhost-user has it (vhost-user specification, section "IOMMU support"): the front end sends updates and invalidations,
//! the back end keeps an IOTLB and asks for what it misses.
//!
//! A [`SharedIotlb`] is one that threads look into without a lock.
//!
//! Lengths are in bytes. Ranges that pass 2^64 are never accessible; one may end there exactly.

mod counters;
mod iotlb;
mod locked;
mod mapping_table;
mod marking;
mod memory;
mod shared;
#[cfg(all(test, feature = "backend-mmap", feature = "backend-bitmap"))]
mod shared_tests;
mod slices;
mod snapshots;

#[cfg(all(test, feature = "backend-mmap", feature = "backend-bitmap"))]
mod tests;

use std::fmt::Debug;
use std::num::TryFromIntError;
use std::ops::{Deref, Range};

pub use counters::IotlbCounters;
pub use iotlb::{Iotlb, IotlbIterator};
pub use marking::{ByGuestAddress, ByIova, MarkedIommuMemory, Marking};
pub use memory::IommuMemory;
pub use shared::{Invalidation, IotlbSnapshot, SharedIotlb};
pub use slices::IommuMemorySliceIterator;

use crate::guest_memory::{GuestAddress, Permissions, TranslationHold};

pub use crate::retired::StillRead;

/// Why an address is not translated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The IOMMU has no mapping for it, or none that permits the access.
    #[error("cannot translate I/O address range {iova_range}: {reason}")]
    CannotResolve {
        /// The range that was to be translated.
        iova_range: IovaRange,
        /// Why it was not.
        reason: String,
    },
    /// One piece of memory was asked for, and the range is scattered.
    #[error("I/O address range {iova_range} is in pieces, the first of {continuous_length} bytes")]
    Fragmented {
        /// The range that was to be translated.
        iova_range: IovaRange,
        /// How many bytes from its start on lie in one piece.
        continuous_length: usize,
    },
    /// The IOMMU is not set up for this access.
    #[error("the IOMMU is not configured correctly: {reason}")]
    IommuMisconfigured {
        /// What is wrong.
        reason: String,
    },
}

/// A range of I/O virtual addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IovaRange {
    /// The first address.
    pub base: GuestAddress,
    /// The length in bytes.
    pub length: usize,
}

/// Prints the first and the last address.
impl core::fmt::Display for IovaRange {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.length.checked_sub(1) {
            None => write!(f, "0x{:x} (empty)", self.base.0),
            Some(more) => {
                // Wider than an address: a range that passes 2^64 shows where it wants to go.
                let last =
                    u128::from(self.base.0).saturating_add(more.try_into().unwrap_or(u128::MAX));
                write!(f, "0x{:x}-0x{last:x}", self.base.0)
            }
        }
    }
}

/// The range from the first address to the one behind the last. A range that ends before it begins is empty.
impl TryFrom<Range<u64>> for IovaRange {
    type Error = TryFromIntError;

    fn try_from(range: Range<u64>) -> Result<Self, Self::Error> {
        Ok(IovaRange {
            base: GuestAddress(range.start),
            length: range.end.saturating_sub(range.start).try_into()?,
        })
    }
}

/// A range of guest physical addresses that a range of I/O virtual ones is mapped to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MappedRange {
    /// The first address.
    pub base: GuestAddress,
    /// The length in bytes.
    pub length: usize,
}

/// What keeps a range of I/O virtual addresses from being accessed.
#[derive(Clone, Debug)]
pub struct IotlbFails {
    /// Parts that no mapping is known for: asking where the mappings are kept may help.
    pub misses: Vec<IovaRange>,
    /// Parts whose mapping does not permit the access, or that can have no mapping, since they pass 2^64.
    ///
    /// If the last one is empty, the range was refused as it takes more mappings than the [bound](Iotlb::set_bound) permits at a time, and all that is
    /// missing is among the others: asking for that would never end.
    pub access_fails: Vec<IovaRange>,
}

impl IovaRange {
    /// What says in [`IotlbFails::access_fails`] that the bound is the reason.
    fn refused_by_bound(base: GuestAddress) -> Self {
        IovaRange { base, length: 0 }
    }
}

impl IotlbFails {
    /// Returns whether the range takes more mappings than the [bound](Iotlb::set_bound) of the IOTLB permits at a time.
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_bound(std::num::NonZeroUsize::new(1));
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0x7000), 0x1000, Permissions::Read)?;
    /// iotlb.set_mapping(GuestAddress(0x2000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// let fails = Iotlb::lookup(&iotlb, GuestAddress(0x1000), 0x2000, Permissions::Read).unwrap_err();
    /// assert!(fails.is_refused_by_bound());
    ///
    /// // One of the two is a plain miss.
    /// let fails = Iotlb::lookup(&iotlb, GuestAddress(0x1000), 0x1000, Permissions::Read).unwrap_err();
    /// assert!(!fails.is_refused_by_bound());
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn is_refused_by_bound(&self) -> bool {
        // A range that is looked up and empty is always found, so that no part that fails is empty.
        self.access_fails
            .last()
            .is_some_and(|range| range.length == 0)
    }

    /// Makes the error of a lookup of `length` bytes at `iova` that failed so: the first thing that is wrong, with its address and length, and
    /// what was wanted of it.
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// let fails = Iotlb::lookup(&iotlb, GuestAddress(0x1800), 0x10, Permissions::Write).unwrap_err();
    /// assert_eq!(
    ///     fails.into_error(GuestAddress(0x1800), 0x10, Permissions::Write).to_string(),
    ///     "cannot translate I/O address range 0x1800-0x180f: 0x1800-0x180f does not permit to write"
    /// );
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    #[cold]
    pub fn into_error(self, iova: GuestAddress, length: usize, access: Permissions) -> Error {
        let wanted = match access {
            Permissions::No => "be mapped",
            Permissions::Read => "read",
            Permissions::Write => "write",
            Permissions::ReadWrite => "read and write",
        };
        if self.is_refused_by_bound() {
            return Error::CannotResolve {
                iova_range: IovaRange { base: iova, length },
                reason: "it takes more mappings than the bound of the IOTLB permits at a time"
                    .into(),
            };
        }
        let reason = match (self.access_fails.first(), self.misses.first()) {
            (Some(refused), _) => format!("{refused} does not permit to {wanted}"),
            (None, Some(missing)) => format!("{missing} is not mapped, and was to {wanted}"),
            (None, None) => format!("it was to {wanted}"),
        };
        Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason,
        }
    }
}

/// The most that is granted of what can be asked for.
fn widest(mut is_granted: impl FnMut(Permissions) -> bool) -> Option<Permissions> {
    let all = [
        Permissions::ReadWrite,
        Permissions::Read,
        Permissions::Write,
        Permissions::No,
    ];
    all.into_iter().find(|access| is_granted(*access))
}

/// Translates I/O virtual addresses, as an IOMMU does.
///
/// An implementation looks into its [`Iotlb`]. When [`Iotlb::lookup`] fails, it gets the missing
/// mappings from wherever they are kept, adds them to the IOTLB and looks again. How long it waits
/// for them is its own decision.
///
/// An IOMMU whose mappings are all in its IOTLB needs no implementation of its own: use a
/// [`SharedIotlb`], or an `RwLock<Iotlb>`.
///
/// # Examples
///
/// A vhost-user back end asks its front end for a mapping that it does not have:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::{RwLock, RwLockReadGuard};
/// use vm_memory::iommu::{Error, Iommu, IommuMemory, Iotlb, IotlbIterator};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// #[derive(Debug, Default)]
/// struct VhostUserIommu(RwLock<Iotlb>);
///
/// impl VhostUserIommu {
///     /// Sends a miss message and waits for the update. Here, each page is mapped to itself.
///     fn query_front_end(&self, iova: GuestAddress, length: usize) -> Result<(), Error> {
///         let mut iotlb = self.0.write().unwrap();
///         iotlb.set_mapping(iova, iova, length, Permissions::ReadWrite)
///     }
/// }
///
/// impl Iommu for VhostUserIommu {
///     type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;
///
///     fn translate(
///         &self,
///         iova: GuestAddress,
///         length: usize,
///         access: Permissions,
///     ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
///         let fails = match Iotlb::lookup(self.0.read().unwrap(), iova, length, access) {
///             Ok(found) => return Ok(found),
///             Err(fails) => fails,
///         };
///         for miss in fails.misses {
///             self.query_front_end(miss.base, miss.length)?;
///         }
///         // Translates, or fails: this IOMMU queries once.
///         self.0.translate(iova, length, access)
///     }
/// }
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, VhostUserIommu::default(), true, ());
/// memory.write_obj(7u64, GuestAddress(0x1000))?;
/// assert_eq!(memory.get_backend().read_obj::<u64>(GuestAddress(0x1000))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "vIOMMU")]
#[doc(alias = "DMA")]
#[doc(alias = "vhost-user")]
pub trait Iommu: Debug + Send + Sync {
    /// What the IOTLB is reached through: a lock's guard, a counted pointer, a reference.
    ///
    /// It lives as long as an iterator over translated memory does.
    type IotlbGuard<'a>: Deref<Target = Iotlb> + 'a
    where
        Self: 'a;

    /// Translates `length` bytes at `iova`, for an access.
    ///
    /// # Errors
    ///
    /// If not all of them are mapped, or not all mappings permit the access.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error>;

    /// Returns what keeps every translation in use that is made from now on, until it is dropped: an invalidation must not be acknowledged before.
    ///
    /// For I/O that completes later ([`IoBuffer`](crate::vectored::IoBuffer)). `None`, as the provided method has it, if there is no such thing: an IOMMU
    /// whose guard is that of a lock cannot have it on another thread. One that has a [`SharedIotlb`] returns that one's.
    fn hold_translation(&self) -> Option<TranslationHold> {
        None
    }
}
