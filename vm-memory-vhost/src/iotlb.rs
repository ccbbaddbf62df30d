//! The effect of IOTLB messages on an IOTLB.

use vm_memory::arithmetic::{to_u64, to_usize};
use vm_memory::iommu::{Error, Invalidation, IovaRange, SharedIotlb};
use vm_memory::GuestAddress;

use crate::message::IotlbMessage;
use crate::table::{RegionTable, TableError};

/// The reason why an IOTLB message was refused. A refused message has no effect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Only back ends send messages of this type.
    #[error("a front end cannot send a message of type {}", .0.type_name())]
    NotFromFrontEnd(IotlbMessage),
    /// The target of the mapping is not guest memory.
    #[error("the target of the mapping is not guest memory")]
    Target(#[from] TableError),
    /// The IOTLB refused the mapping.
    #[error("the IOTLB refuses the mapping")]
    Iotlb(#[from] Error),
}

/// Returns the error of a range without addresses.
fn is_empty(iova: GuestAddress) -> ApplyError {
    refusal(iova, 0, "the range is empty")
}

/// Returns the error of a range that passes 2^64, or that is longer than a `usize`.
fn passes_the_end(iova: GuestAddress, size: u64) -> ApplyError {
    refusal(iova, size, "the range passes the end of the address space")
}

fn refusal(iova: GuestAddress, size: u64, reason: &str) -> ApplyError {
    let iova_range = IovaRange {
        base: iova,
        length: to_usize(size),
    };
    ApplyError::Iotlb(Error::CannotResolve {
        iova_range,
        reason: reason.to_owned(),
    })
}

impl IotlbMessage {
    /// Applies a message of the front end to an IOTLB. `table` translates the target of a mapping.
    ///
    /// An `Update` replaces mappings of its range. If its target is in several regions, it makes
    /// several mappings.
    ///
    /// # Replies
    ///
    /// After an `Invalidate`, accesses that began before may still use the mapping. If the message
    /// needs a reply, [wait](Invalidation::wait) for the returned [`Invalidation`] first, with a
    /// deadline. Do not wait after an `Update`: its reader may be the request that needs it.
    ///
    /// If the deadline passes, new accesses do not find the mapping, but an earlier one still uses
    /// it. Do not acknowledge the invalidation: reply with a number other than 0, or end the
    /// connection. Otherwise the front end gives the pages to another user while the device writes
    /// to them. The removed mapping stays removed.
    ///
    /// # Errors
    ///
    /// Returns [`ApplyError`] for a `Miss` or an `AccessFail`. It also does so for an `Update` that
    /// is empty, whose range passes 2^64, or whose target is not in the table. Then the IOTLB does
    /// not change.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use vm_memory::iommu::{IommuMemory, SharedIotlb};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
    /// use vm_memory_vhost::{IotlbMessage, MemoryRegion, RegionTable};
    ///
    /// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    /// let table = RegionTable::new([MemoryRegion {
    ///     guest_address: GuestAddress(0),
    ///     size: 0x4000,
    ///     user_address: 0x7f00_0000_0000,
    ///     mmap_offset: 0,
    /// }])?;
    /// let iotlb = SharedIotlb::new();
    /// let device = IommuMemory::new(physical, iotlb.clone(), true, ());
    ///
    /// // The front end maps a page.
    /// let (iova, size) = (GuestAddress(0x8000_0000), 0x1000);
    /// let (user_address, permissions) = (0x7f00_0000_1000, Permissions::ReadWrite);
    /// let update = IotlbMessage::Update { iova, size, user_address, permissions };
    /// update.apply(&table, &iotlb)?;
    /// device.write_obj(7u64, iova)?;
    /// assert_eq!(device.get_backend().read_obj::<u64>(GuestAddress(0x1000))?, 7);
    ///
    /// // It removes the mapping. The reply is 0 if the mapping is out of use.
    /// let invalidation = IotlbMessage::Invalidate { iova, size }.apply(&table, &iotlb)?;
    /// let is_done = invalidation.wait(Instant::now() + Duration::from_secs(1)).is_ok();
    /// let reply = u64::from(!is_done);
    /// assert_eq!(reply, 0);
    /// assert!(device.read_obj::<u64>(iova).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn apply(
        &self,
        table: &RegionTable,
        iotlb: &SharedIotlb,
    ) -> Result<Invalidation, ApplyError> {
        match *self {
            Self::Update {
                iova,
                size,
                user_address,
                permissions,
            } => {
                // All checks are made before the first mapping is set.
                let ranges = table.translate(user_address, size)?;
                let more = size.checked_sub(1).ok_or_else(|| is_empty(iova))?;
                if iova.0.checked_add(more).is_none() || usize::try_from(size).is_err() {
                    return Err(passes_the_end(iova, size));
                }
                let mut change = None;
                let mut next = iova.0;
                for (target, length) in ranges {
                    let at = GuestAddress(next);
                    change = Some(iotlb.set_mapping(at, target, length, permissions)?);
                    // Wraps only after the last range, if that ends at 2^64.
                    next = next.wrapping_add(to_u64(length));
                }
                // The range is not empty, so there was a mapping. Its change is the last one, and
                // includes the earlier ones.
                change.ok_or_else(|| is_empty(iova))
            }
            Self::Invalidate { iova, size } => {
                // A range that passes the end is not refused, because its mappings must be removed.
                let Some(more) = size.checked_sub(1) else {
                    return Ok(iotlb.invalidate_range(iova..iova));
                };
                let last = GuestAddress(iova.0.saturating_add(more));
                Ok(iotlb.invalidate_range(iova..=last))
            }
            Self::Miss { .. } | Self::AccessFail { .. } => Err(ApplyError::NotFromFrontEnd(*self)),
        }
    }
}
