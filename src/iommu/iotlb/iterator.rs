//! [`IotlbIterator`]: the translation of a range.

use std::iter::FusedIterator;
use std::ops::Deref;

use super::super::MappedRange;
use super::{Iotlb, IovaMapping, Position};
use crate::convert::to_usize;
use crate::guest_memory::{GuestAddress, Permissions};

/// An iterator over the guest physical ranges that a range of I/O virtual addresses is mapped to.
///
/// The ranges are in the order of the I/O virtual addresses. [`Iotlb::lookup`] and
/// [`Iommu::translate`](crate::Iommu::translate) return it.
///
/// It holds the pointer to the IOTLB as long as it lives. If that is the guard of a lock, an
/// invalidation waits for it. Ranges that were collected from it live on without the guard; drop
/// them before you acknowledge an invalidation.
///
/// The iteration ends early if `D` now dereferences to another IOTLB that lacks the mappings.
///
/// # Examples
///
/// See [`Iotlb`].
#[derive(Clone, Debug)]
pub struct IotlbIterator<D: Deref<Target = Iotlb>> {
    tlb: D,
    /// The first address that is left.
    next: u64,
    /// The number of addresses that are left.
    left: usize,
    /// The position of its mapping: a guess, since `tlb` may point to a different IOTLB by now.
    position: Position,
    access: Permissions,
}

impl<D: Deref<Target = Iotlb>> IotlbIterator<D> {
    /// Creates an iterator over `length` addresses. The mapping of the first is at `position`.
    #[inline(always)]
    pub(super) fn new(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        position: Position,
        access: Permissions,
    ) -> Self {
        Self {
            tlb,
            next: iova.0,
            left: length,
            position,
            access,
        }
    }

    /// Returns the mapping of the next address, and its position.
    #[inline(always)]
    fn mapping(&self) -> Option<(Position, IovaMapping)> {
        match self.tlb.mappings.get(self.position) {
            // Mappings do not overlap, so any mapping that has the address is the right one.
            Some(mapping) if mapping.start <= self.next && self.next <= mapping.last => {
                Some((self.position, *mapping))
            }
            _ => self
                .tlb
                .mapping_at(self.next)
                .map(|(position, mapping)| (position, *mapping)),
        }
    }
}

impl<D: Deref<Target = Iotlb>> Iterator for IotlbIterator<D> {
    type Item = MappedRange;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let more = self.left.checked_sub(1)?;
        let found = self
            .mapping()
            .filter(|(_, mapping)| mapping.allows(self.access));
        let Some((position, mapping)) = found else {
            self.left = 0;
            return None;
        };
        let base = GuestAddress(self.next.wrapping_add(mapping.offset));
        // One less than the length, which may be 2^64.
        let more_here = to_usize(mapping.last.wrapping_sub(self.next));
        if more <= more_here {
            let length = self.left;
            self.left = 0;
            return Some(MappedRange { base, length });
        }
        let length = more_here.wrapping_add(1);
        self.left = self.left.wrapping_sub(length);
        self.next = mapping.last.wrapping_add(1);
        self.position = self.tlb.mappings.next(position);
        Some(MappedRange { base, length })
    }
}

impl<D: Deref<Target = Iotlb>> FusedIterator for IotlbIterator<D> {}
