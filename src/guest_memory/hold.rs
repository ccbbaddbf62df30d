//! [`TranslationHold`]: keeps translations in use after an access.

use core::any::Any;
use core::fmt::{self, Debug};
use std::sync::Arc;

#[cfg(feature = "iommu")]
use super::generation::Generation;
use super::generation::SeenGeneration;
use super::{Error, GuestAddress, GuestMemory, Permissions, Result};

/// A guard that keeps the translations of an IOMMU in use until it and its clones are dropped.
///
/// [`GuestMemory::hold_translation`](super::GuestMemory::hold_translation) returns it. Keep it for
/// as long as the kernel or a device accesses slices of the memory.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let hold = memory.hold_translation().expect("the memory supports asynchronous I/O");
/// let buffers = GuestMemory::get_slices(&memory, GuestAddress(0), 0x100, Permissions::Write)?;
/// // Submit the buffers, wait for the completion, then:
/// drop(hold);
/// # drop(buffers);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct TranslationHold {
    /// The object that keeps the translations in use.
    owner: Option<Arc<dyn Any + Send + Sync>>,
    /// The state of the IOTLB that is held, if its changes are counted.
    seen: Option<SeenGeneration>,
}

impl TranslationHold {
    /// Creates an empty hold, for memory that does not translate addresses.
    pub fn nothing() -> Self {
        TranslationHold {
            owner: None,
            seen: None,
        }
    }

    /// Creates a hold that keeps `owner` alive, for an IOMMU that counts its users.
    pub fn of(owner: Arc<impl Any + Send + Sync>) -> Self {
        TranslationHold {
            owner: Some(owner),
            seen: None,
        }
    }

    /// Creates a hold that keeps `owner` alive, the state of an IOTLB after the change `number`.
    #[cfg(feature = "iommu")]
    pub(crate) fn of_change(
        owner: Arc<impl Any + Send + Sync>,
        generation: &Generation,
        number: u64,
    ) -> Self {
        TranslationHold {
            seen: Some(generation.at(number)),
            ..Self::of(owner)
        }
    }

    /// Returns whether no translation has changed since the hold was taken.
    ///
    /// This is one load. A hold of a [`SharedIotlb`](crate::iommu::SharedIotlb) knows its changes.
    /// Other holds return `true`.
    #[inline]
    pub fn is_current(&self) -> bool {
        match &self.seen {
            Some(seen) => seen.is_current(),
            None => true,
        }
    }
}

impl Debug for TranslationHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TranslationHold")
            .field("holds", &self.owner.is_some())
            .finish()
    }
}

/// Returns a hold for slices of `ranges`, which the caller requests after this call.
///
/// The caller translates the ranges again. An invalidation in between then waits for the hold.
///
/// # Errors
///
/// Returns the error of a translation, or an error if the memory does not support holds.
pub(crate) fn hold_for<M: GuestMemory + ?Sized>(
    memory: &M,
    ranges: impl IntoIterator<Item = (GuestAddress, usize)>,
    access: Permissions,
) -> Result<TranslationHold> {
    if memory.physical_memory().is_none() {
        // Before the hold is taken: the IOMMU may get a missing mapping only after an invalidation,
        // which would wait for the hold.
        for (addr, count) in ranges {
            drop(memory.get_slices(addr, count, access)?);
        }
    }
    memory.hold_translation().ok_or_else(cannot_hold)
}

#[cold]
fn cannot_hold() -> Error {
    Error::IOError(std::io::Error::new(
        std::io::ErrorKind::Unsupported,
        "this IOMMU cannot keep a translation in use until an operation completes; \
         implement Iommu::hold_translation or use SharedIotlb",
    ))
}
