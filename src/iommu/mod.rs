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
mod error;
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
use std::ops::Deref;

pub use counters::IotlbCounters;
pub use error::{Error, IotlbFails, IovaRange, MappedRange};
pub use iotlb::{Iotlb, IotlbIterator};
pub use marking::{ByGuestAddress, ByIova, MarkedIommuMemory, Marking};
pub use memory::IommuMemory;
pub use shared::{Invalidation, IotlbSnapshot, SharedIotlb};
pub use slices::IommuMemorySliceIterator;

use crate::guest_memory::{GuestAddress, Permissions, TranslationHold};

pub use crate::retired::StillRead;

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
