//! [`Mappings`]: the mappings of a range, one by one.

use std::iter::FusedIterator;
use std::ops::{Bound, Deref, RangeBounds};

use super::super::widest;
use super::{Iotlb, Position, Span};
use crate::guest_memory::{GuestAddress, Permissions};

/// A mapping of an IOTLB.
///
/// # Examples
///
/// See [`Iotlb::mappings`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Mapping {
    /// The first I/O virtual address.
    pub first: GuestAddress,
    /// The last I/O virtual address. The mapping may end with the address space, where there is no
    /// next address.
    pub last: GuestAddress,
    /// The guest physical address that the first address is mapped to.
    pub target: GuestAddress,
    /// The permissions.
    pub permissions: Permissions,
}

/// An iterator over the mappings of a range, in the order of their addresses.
///
/// [`Iotlb::mappings`] and [`SharedIotlb::mappings`](super::super::SharedIotlb::mappings) return
/// it.
#[derive(Clone, Debug)]
pub struct Mappings<D> {
    tlb: D,
    /// The position of the next mapping.
    position: Position,
    /// The last address of the range, or `None` if there is no mapping left.
    last: Option<u64>,
}

/// Returns the addresses of a range, unless it is empty.
fn span_of(range: &impl RangeBounds<GuestAddress>) -> Option<Span> {
    let first = match range.start_bound() {
        Bound::Included(first) => first.0,
        Bound::Excluded(before) => before.0.checked_add(1)?,
        Bound::Unbounded => 0,
    };
    let last = match range.end_bound() {
        Bound::Included(last) => last.0,
        Bound::Excluded(after) => after.0.checked_sub(1)?,
        Bound::Unbounded => u64::MAX,
    };
    (first <= last).then_some(Span { first, last })
}

impl<D: Deref<Target = Iotlb>> Mappings<D> {
    /// Creates an iterator. `tlb` must always dereference to the same IOTLB.
    pub(in crate::iommu) fn new(tlb: D, range: &impl RangeBounds<GuestAddress>) -> Self {
        let span = span_of(range);
        let position = span.and_then(|Span { first, .. }| {
            let found = tlb.mapping_at(first);
            let found = found.or_else(|| tlb.mappings.first_at_or_after(first));
            found.map(|(position, _)| position)
        });
        Self {
            tlb,
            position: position.unwrap_or_default(),
            last: position.and(span).map(|span| span.last),
        }
    }
}

impl<D: Deref<Target = Iotlb>> Iterator for Mappings<D> {
    type Item = Mapping;

    fn next(&mut self) -> Option<Mapping> {
        let last = self.last.take()?;
        let mapping = self.tlb.mappings.get(self.position)?;
        if mapping.start > last {
            return None;
        }
        self.position = self.tlb.mappings.next(self.position);
        self.last = Some(last);
        Some(Mapping {
            first: GuestAddress(mapping.start),
            last: GuestAddress(mapping.last),
            target: GuestAddress(mapping.start.wrapping_add(mapping.offset)),
            permissions: widest(|access| mapping.allows(access)).unwrap_or(Permissions::No),
        })
    }
}

impl<D: Deref<Target = Iotlb>> FusedIterator for Mappings<D> {}

impl Iotlb {
    /// Creates an IOTLB in which each mapping stays apart, as it was set.
    ///
    /// An IOTLB joins adjacent mappings that continue each other, with the same permissions. This
    /// one does not, so [`mappings`](Self::mappings) returns the mappings that were set. An access
    /// across two of them is scattered.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// for (mut iotlb, entries) in [(Iotlb::new(), 1), (Iotlb::unmerged(), 2)] {
    ///     for page in [GuestAddress(0x1000), GuestAddress(0x2000)] {
    ///         iotlb.set_mapping(page, page, 0x1000, Permissions::Read)?;
    ///     }
    ///     assert_eq!(iotlb.entries(), entries);
    /// }
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    #[must_use]
    pub fn unmerged() -> Self {
        Self {
            unmerged: true,
            ..Self::default()
        }
    }

    /// Returns the mappings that have an address in `range`, in the order of their addresses.
    ///
    /// A mapping that begins before the range or ends after it is returned as a whole. Mappings
    /// that were joined are one, unless the IOTLB is [unmerged](Self::unmerged).
    ///
    /// # Examples
    ///
    /// A virtio-iommu device must refuse an unmap request that cuts a mapping (virtio
    /// specification, "UNMAP request"):
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// fn unmap(iotlb: &mut Iotlb, first: GuestAddress, last: GuestAddress) -> bool {
    ///     let is_cut = iotlb.mappings(first..=last).any(|it| it.first < first || it.last > last);
    ///     if !is_cut {
    ///         let length = (last.0 - first.0 + 1) as usize;
    ///         iotlb.invalidate_mapping(first, length);
    ///     }
    ///     !is_cut
    /// }
    ///
    /// let mut iotlb = Iotlb::unmerged();
    /// let at = GuestAddress;
    /// iotlb.set_mapping(at(0x1000), at(0x9000), 0x2000, Permissions::ReadWrite)?;
    /// iotlb.set_mapping(at(0x3000), at(0xb000), 0x1000, Permissions::ReadWrite)?;
    /// assert!(!unmap(&mut iotlb, at(0x1000), at(0x1fff)));
    /// assert!(unmap(&mut iotlb, at(0x3000), at(0xffff)));
    /// assert!(unmap(&mut iotlb, at(0), at(0x2fff)));
    /// assert_eq!(iotlb.mappings(..).next(), None);
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn mappings(&self, range: impl RangeBounds<GuestAddress>) -> Mappings<&Self> {
        Mappings::new(self, &range)
    }
}
