//! The first byte of a translated range that an access cannot reach, and the reason.

use super::marking::{check_marks, Marking};
use super::{widest, Iommu, IommuMemory};
use crate::address::Address;
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::{
    explain, longest, GuestAddress, GuestMemoryBackend, Permissions, Refusal, RefusalReason,
};

impl<M: GuestMemoryBackend, I: Iommu, K: Marking<M>> IommuMemory<M, I, K> {
    /// Explains an access while the IOMMU is on.
    pub(super) fn explain_translated(
        &self,
        iova: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<Refusal> {
        let Some(iotlb) = self.iommu().current_iotlb() else {
            return (count != 0).then(|| Refusal::new(iova, 0, RefusalReason::Unknown));
        };
        let is_tracked = |count| check_marks(&**self.bitmap(), iova, count).is_ok();
        let tracked = if !access.has_write() || is_tracked(count) {
            count
        } else {
            longest(count, is_tracked)
        };
        let mut done = 0usize;
        while done < count {
            let refusal = |reason| Some(Refusal::new(iova, done, reason));
            let Some(at) = iova.checked_add(to_u64(done)) else {
                return refusal(RefusalReason::PastTheEnd);
            };
            if done == tracked {
                return refusal(RefusalReason::NotTracked);
            }
            let Some((mapping, base)) = iotlb.mapping_of(at) else {
                return refusal(RefusalReason::NotMapped);
            };
            if !mapping.allows(access) {
                let granted = widest(|access| mapping.allows(access)).unwrap_or(Permissions::No);
                return refusal(RefusalReason::MappingPermits(granted));
            }
            let rest = to_usize(mapping.last.saturating_sub(at.0)).saturating_add(1);
            let length = rest.min(tracked.saturating_sub(done));
            if let Some(physical) = explain(self.get_backend(), base, length, access) {
                return Some(Refusal {
                    physical: Some(physical.addr),
                    ..Refusal::new(iova, done.saturating_add(physical.offset), physical.reason)
                });
            }
            done = done.saturating_add(length);
        }
        None
    }
}
