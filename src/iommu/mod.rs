//! Guest memory behind an IOMMU.
//!
//! A device behind an IOMMU uses I/O virtual addresses (IOVAs). The guest maps them to guest
//! physical addresses, page by page, and changes the mappings while the device runs.
//!
//! ```text
//!   IommuMemory::get_slices(IOVA, count, access)
//!     │
//!     ├─ Iommu::translate    of AskingIommu, SharedIotlb, RwLock<Iotlb>, or an IOMMU of your own
//!     │   └─ Iotlb::lookup   IOVA ─► guest physical ranges, or the parts that fail
//!     │
//!     └─ GuestMemoryBackend  guest physical ranges ─► slices of host memory
//! ```
//!
//! | type | use it for |
//! |---|---|
//! | [`IommuMemory`] | [`Bytes`](crate::Bytes) and [`GuestMemory`](crate::GuestMemory) by IOVA |
//! | [`MarkedIommuMemory`] | the same, with dirty pages by guest physical address |
//! | [`SharedIotlb`] | mappings that threads look up without a lock |
//! | [`AskingIommu`] | missing mappings that are requested from a front end or a page table |
//! | [`Iotlb`] | mappings behind a lock of your own |
//! | [`Iommu`] | an IOMMU of your own |
//!
//! vhost-user divides the work in this way (vhost-user specification, section "IOMMU support"). The
//! front end sends updates and invalidations. The back end keeps an IOTLB and asks for missing
//! mappings.
//!
//! Lengths are in bytes. A range may end at 2^64. A range that passes 2^64 is never accessible.
//!
//! # System calls
//!
//! `clock_nanosleep(2)` in [`Invalidation::wait`]. `futex(2)` if threads contend for the lock of an
//! IOTLB, if an [`AskingIommu`] waits for a mapping, and when the mapping arrives.
//! `clock_gettime(2)` in these waits, if the vDSO does not read the clock. Otherwise only the
//! allocator and the [`MappingSource`] make system calls.
//!
//! # Examples
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use std::time::{Duration, Instant};
//! use vm_memory::iommu::{IommuMemory, SharedIotlb};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
//!
//! let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
//! let iotlb = SharedIotlb::new();
//! let device = IommuMemory::new(physical, iotlb.clone(), true, ());
//!
//! // The front end maps a page.
//! let iova = GuestAddress(0x8000_0000);
//! iotlb.set_mapping(iova, GuestAddress(0x1000), 0x1000, Permissions::ReadWrite)?;
//! device.write_obj(7u64, iova)?;
//!
//! // It unmaps the page, and waits for accesses in flight before it acknowledges that.
//! let invalidation = iotlb.invalidate_mapping(iova, 0x1000);
//! invalidation.wait(Instant::now() + Duration::from_secs(1))?;
//! assert!(device.read_obj::<u64>(iova).is_err());
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/iommu_device.rs` requests missing mappings from a front end. The crate
//! `vm-memory-vhost` has the messages of vhost-user for that.

mod asking;
mod counters;
mod error;
mod explain;
mod iotlb;
mod kind;
mod locked;
mod mapping_table;
mod marking;
mod memory;
mod requests;
mod shared;
mod slices;
mod snapshots;
#[cfg(all(test, feature = "backend-mmap", feature = "backend-bitmap"))]
mod tests;

use std::fmt::Debug;
use std::ops::Deref;

pub use crate::retired::ReadersRemain;
pub use asking::{AskingIommu, MappingSource};
pub use counters::IotlbCounters;
pub use error::{Error, IotlbFails, IovaRange, MappedRange};
pub use iotlb::{CutMapping, Iotlb, IotlbIterator, MapError, Mapping, Mappings};
pub use kind::ErrorKind;
pub use marking::{ByGuestAddress, ByIova, MarkedIommuMemory, Marking};
pub use memory::IommuMemory;
pub use shared::{Invalidation, IotlbSnapshot, SharedIotlb};
pub use slices::IommuMemorySliceIterator;

use crate::guest_memory::{GuestAddress, Permissions, TranslationHold};

/// Returns the most permissive access that is granted.
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
/// An implementation calls [`Iotlb::lookup`]. On a miss, it fetches the missing mappings, adds them
/// to the IOTLB, and repeats the lookup. It decides how long it waits for them.
///
/// Most IOMMUs need no implementation of their own. If all mappings are in the IOTLB, use a
/// [`SharedIotlb`], or an `RwLock<Iotlb>`. If missing ones are requested, use an [`AskingIommu`].
///
/// # Examples
///
/// An IOMMU that maps each page when it is first missed:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::{RwLock, RwLockReadGuard};
/// use vm_memory::iommu::{Error, Iommu, IommuMemory, Iotlb, IotlbIterator};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
///
/// #[derive(Debug, Default)]
/// struct IdentityIommu(RwLock<Iotlb>);
///
/// impl IdentityIommu {
///     /// Maps each address to itself.
///     fn map(&self, iova: GuestAddress, length: usize) -> Result<(), Error> {
///         let mut iotlb = self.0.write().unwrap();
///         iotlb.set_mapping(iova, iova, length, Permissions::ReadWrite)
///     }
/// }
///
/// impl Iommu for IdentityIommu {
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
///             self.map(miss.base, miss.length)?;
///         }
///         // Translates, or fails: an invalidation may have removed the mappings.
///         self.0.translate(iova, length, access)
///     }
/// }
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, IdentityIommu::default(), true, ());
/// memory.write_obj(7u64, GuestAddress(0x1000))?;
/// assert_eq!(memory.get_backend().read_obj::<u64>(GuestAddress(0x1000))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "vIOMMU")]
#[doc(alias = "DMA")]
#[doc(alias = "vhost-user")]
pub trait Iommu: Debug + Send + Sync {
    /// The pointer to the IOTLB: the guard of a lock, an `Arc`, or a reference.
    ///
    /// An iterator over translated memory holds it.
    type IotlbGuard<'a>: Deref<Target = Iotlb> + 'a
    where
        Self: 'a;

    /// Translates the `length` bytes at `iova`, for an access.
    ///
    /// # Errors
    ///
    /// Returns [`Error::CannotResolve`] if a byte is not mapped, or its mapping does not permit the
    /// access. [`IotlbFails::into_error`] creates that error.
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error>;

    /// Returns the current IOTLB, without asking for missing mappings.
    ///
    /// [`GuestMemory::explain`](crate::GuestMemory::explain) uses it. The provided method returns
    /// `None`: the reason of a refusal is then unknown. An IOMMU that has a [`SharedIotlb`] returns
    /// its [`snapshot`](SharedIotlb::snapshot).
    fn current_iotlb(&self) -> Option<Self::IotlbGuard<'_>> {
        None
    }

    /// Returns a hold that keeps all later translations in use until it is dropped.
    ///
    /// While a hold exists, no invalidation of a mapping that it covers may be acknowledged. I/O
    /// that completes later needs one: see [`IoBuffer`](crate::vectored::IoBuffer).
    ///
    /// Returns `None` by default. An IOMMU whose guard is that of a lock cannot support holds,
    /// since another thread cannot release the lock. An IOMMU that has a [`SharedIotlb`] forwards
    /// the call to it.
    fn hold_translation(&self) -> Option<TranslationHold> {
        None
    }
}
