//! [`Iommu`] for an [`Iotlb`] behind a [`RwLock`].

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::{Error, Iommu, Iotlb, IotlbIterator};
use crate::guest_memory::{GuestAddress, Permissions};

/// An IOMMU that only uses the mappings it has: a miss is an error.
///
/// Translations hold the read lock until their iterator is dropped, so a writer (an invalidation)
/// waits for accesses in flight. [`SharedIotlb`](super::SharedIotlb) has no such wait, and supports
/// I/O that completes on another thread.
///
/// A poisoned lock is used as it is. No operation of [`Iotlb`] panics part-way, so the thread that
/// panicked left a consistent table.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::RwLock;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory, Iotlb, Permissions};
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let memory = IommuMemory::new(physical, RwLock::new(Iotlb::new()), true, ());
/// let (iova, gpa) = (GuestAddress(0x8000_0000), GuestAddress(0x1000));
/// assert!(memory.read_obj::<u64>(iova).is_err());
///
/// memory.iommu().write().unwrap().set_mapping(iova, gpa, 0x1000, Permissions::ReadWrite)?;
/// memory.write_obj(7u64, iova)?;
/// assert_eq!(memory.get_backend().read_obj::<u64>(gpa)?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
impl Iommu for RwLock<Iotlb> {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let iotlb = self.read().unwrap_or_else(PoisonError::into_inner);
        Iotlb::lookup_with(iotlb, iova, length, access, |fails| {
            fails.into_error(iova, length, access)
        })
    }

    fn current_iotlb(&self) -> Option<Self::IotlbGuard<'_>> {
        Some(self.read().unwrap_or_else(PoisonError::into_inner))
    }
}
