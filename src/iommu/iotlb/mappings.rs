//! [`Mappings`]: the mappings of a range, one by one.

use std::iter::FusedIterator;
use std::ops::{Bound, Deref, RangeBounds};

use super::super::widest;
use super::{Iotlb, IovaMapping, NewMapping, Position, Span};
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

impl Mapping {
    fn of(mapping: &IovaMapping) -> Self {
        Self {
            first: GuestAddress(mapping.start),
            last: GuestAddress(mapping.last),
            target: GuestAddress(mapping.start.wrapping_add(mapping.offset)),
            permissions: widest(|access| mapping.allows(access)).unwrap_or(Permissions::No),
        }
    }
}

/// The error of an unmap request that cuts a mapping. Nothing was unmapped.
///
/// A virtio-iommu device responds with `VIRTIO_IOMMU_S_RANGE`.
///
/// # Examples
///
/// See [`Iotlb::unmap`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[error(
    "the range cuts the mapping 0x{:x}-0x{:x}; unmap all of that mapping",
    .mapping.first.0,
    .mapping.last.0
)]
pub struct CutMapping {
    /// The mapping, which the range contains only in part.
    pub mapping: Mapping,
}

/// The error of a map request. Nothing was mapped.
///
/// # Examples
///
/// See [`Iotlb::map_range`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// An address of the range is mapped.
    ///
    /// A virtio-iommu device responds with `VIRTIO_IOMMU_S_INVAL`.
    #[error(
        "the range has addresses of the mapping 0x{:x}-0x{:x}; unmap that mapping first",
        .mapping.first.0,
        .mapping.last.0
    )]
    Overlap {
        /// The first mapping in the range.
        mapping: Mapping,
    },
    /// The range has no addresses: its last one is below its first one.
    ///
    /// The virtio specification names no status for this. A virtio-iommu device responds with
    /// `VIRTIO_IOMMU_S_INVAL` (invalid parameters).
    #[error("the range to map is empty; its last address must not be below its first address")]
    Empty,
    /// The target of the range passes 2^64.
    ///
    /// The virtio specification names no status for this. A virtio-iommu device responds with
    /// `VIRTIO_IOMMU_S_RANGE` (out-of-range parameters).
    #[error("the target 0x{:x} of the range passes the end of the address space", .target.0)]
    TargetPastTheEnd {
        /// The guest physical address that the first address was to be mapped to.
        target: GuestAddress,
    },
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
pub(in crate::iommu) fn span_of(range: &impl RangeBounds<GuestAddress>) -> Option<Span> {
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
        Some(Mapping::of(mapping))
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
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::unmerged();
    /// let (first, last) = (GuestAddress(0x1000), GuestAddress(0x2fff));
    /// iotlb.set_mapping(first, GuestAddress(0x9000), 0x2000, Permissions::ReadWrite)?;
    ///
    /// let mapping = iotlb.mappings(GuestAddress(0x2000)..=last).next().unwrap();
    /// assert_eq!((mapping.first, mapping.last), (first, last));
    /// assert!(iotlb.mappings(GuestAddress(0x3000)..).next().is_none());
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn mappings(&self, range: impl RangeBounds<GuestAddress>) -> Mappings<&Self> {
        Mappings::new(self, &range)
    }

    /// Maps a range of addresses to those at `target`, unless one of them is mapped already.
    ///
    /// This is the map request of virtio-iommu (virtio specification, "MAP request"). The range has
    /// a first and a last address, which the guest chooses, and may be all addresses.
    ///
    /// Use it on an IOTLB that is [unmerged](Self::unmerged), as [`unmap`](Self::unmap) requires,
    /// and without a [bound](Self::set_bound), which evicts mappings.
    ///
    /// The device checks the rest of a request before the call: the alignment
    /// (`VIRTIO_IOMMU_S_RANGE`), the flags (`VIRTIO_IOMMU_S_INVAL`; see
    /// [`Permissions::from_rw_bits`]) and the domain (`VIRTIO_IOMMU_S_NOENT`).
    ///
    /// # Limit of the number of mappings
    ///
    /// A guest can map any number of ranges. The device refuses them with `VIRTIO_IOMMU_S_NOMEM`
    /// when [`entries`](Self::entries) has reached a limit, before it calls `map_range`. A guest
    /// can create several domains, so the limit must cover the entries of all IOTLBs together.
    ///
    /// # Errors
    ///
    /// Leaves the IOTLB unchanged, and returns
    ///
    /// - [`MapError::Empty`] if the range has no addresses,
    /// - [`MapError::TargetPastTheEnd`] if the range at `target` passes 2^64, or
    /// - [`MapError::Overlap`] with the first mapping that has an address of the range.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::iommu::MapError;
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::unmerged();
    /// let at = GuestAddress;
    /// let mut map = |virt_start, virt_end, phys_start| {
    ///     iotlb.map_range(at(virt_start)..=at(virt_end), at(phys_start), Permissions::ReadWrite)
    /// };
    /// map(0x1000, 0x2fff, 0x9000)?;
    /// match map(0x2000, 0x3fff, 0xa000) {
    ///     Err(MapError::Overlap { mapping }) => {
    ///         assert_eq!((mapping.first, mapping.last), (at(0x1000), at(0x2fff)));
    ///     }
    ///     other => panic!("{other:?}"),
    /// }
    /// // The numbers of a request may be anything.
    /// assert_eq!(map(0x5000, 0x4fff, 0), Err(MapError::Empty));
    /// assert!(map(0x5000, u64::MAX, 0x5001).is_err());
    /// # Ok::<(), MapError>(())
    /// ```
    #[doc(alias = "VIRTIO_IOMMU_T_MAP")]
    pub fn map_range(
        &mut self,
        range: impl RangeBounds<GuestAddress>,
        target: GuestAddress,
        permissions: Permissions,
    ) -> Result<(), MapError> {
        let new = self.announce_range(&range, target, permissions)?;
        self.set_free(&new)
    }

    /// Checks the arguments of [`map_range`](Self::map_range).
    pub(in crate::iommu) fn announce_range(
        &self,
        range: &impl RangeBounds<GuestAddress>,
        target: GuestAddress,
        permissions: Permissions,
    ) -> Result<NewMapping, MapError> {
        let range = span_of(range).ok_or(MapError::Empty)?;
        let wanted = self.record_mapping(range);
        let more = range.last.saturating_sub(range.first);
        if target.0.checked_add(more).is_none() {
            return Err(MapError::TargetPastTheEnd { target });
        }
        Ok(NewMapping {
            range,
            target,
            permissions,
            wanted,
        })
    }

    /// Sets a mapping, unless one of its addresses is mapped already.
    pub(in crate::iommu) fn set_free(&mut self, new: &NewMapping) -> Result<(), MapError> {
        let Span { first, last } = new.range;
        let range = GuestAddress(first)..=GuestAddress(last);
        match self.mappings(range).next() {
            Some(mapping) => Err(MapError::Overlap { mapping }),
            None => {
                self.set(new);
                Ok(())
            }
        }
    }

    /// Removes the mappings of a range of addresses.
    ///
    /// The range may be all addresses, which
    /// [`invalidate_mapping`](Self::invalidate_mapping) cannot express. A mapping that is partly in
    /// the range keeps the rest. Does nothing if the range is empty.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// let last_page = GuestAddress(u64::MAX - 0xfff);
    /// iotlb.set_mapping(last_page, GuestAddress(0), 0x1000, Permissions::Read)?;
    ///
    /// iotlb.invalidate_range(GuestAddress(0)..=GuestAddress(u64::MAX));
    /// assert_eq!(iotlb.entries(), 0);
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    #[doc(alias = "VHOST_IOTLB_INVALIDATE")]
    pub fn invalidate_range(&mut self, range: impl RangeBounds<GuestAddress>) {
        if let Some(span) = span_of(&range) {
            self.invalidate(span);
        }
    }

    /// Removes the mappings of a range of addresses, unless the range cuts one of them.
    ///
    /// This is the unmap request of virtio-iommu (virtio specification, "UNMAP request"). Addresses
    /// of the range that are not mapped are ignored. The range may be all addresses, or empty.
    ///
    /// Use it on an IOTLB that is [unmerged](Self::unmerged), without a [bound](Self::set_bound).
    /// Otherwise the rule applies to the mappings as they are now: joined, or evicted.
    ///
    /// # Errors
    ///
    /// Returns [`CutMapping`] if the range contains only a part of a mapping. The IOTLB is then
    /// unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::unmerged();
    /// let at = GuestAddress;
    /// iotlb.set_mapping(at(0x1000), at(0x9000), 0x2000, Permissions::ReadWrite)?;
    /// iotlb.set_mapping(at(0x3000), at(0xb000), 0x1000, Permissions::ReadWrite)?;
    ///
    /// let cut = iotlb.unmap(at(0x1000)..=at(0x1fff)).unwrap_err();
    /// assert_eq!((cut.mapping.first, cut.mapping.last), (at(0x1000), at(0x2fff)));
    ///
    /// // The numbers of a request are inclusive, and chosen by the guest.
    /// let (virt_start, virt_end) = (0x3000, u64::MAX);
    /// iotlb.unmap(at(virt_start)..=at(virt_end))?;
    /// iotlb.unmap(at(0)..=at(u64::MAX))?;
    /// assert_eq!(iotlb.entries(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "VIRTIO_IOMMU_T_UNMAP")]
    pub fn unmap(&mut self, range: impl RangeBounds<GuestAddress>) -> Result<(), CutMapping> {
        self.unmap_span(span_of(&range))
    }

    /// Removes mappings as [`unmap`](Self::unmap) does.
    pub(in crate::iommu) fn unmap_span(&mut self, span: Option<Span>) -> Result<(), CutMapping> {
        let Some(span) = span else {
            return Ok(());
        };
        // Only the mappings of the first and the last address can pass an end of the range.
        for end in [span.first, span.last] {
            if let Some((_, mapping)) = self.mapping_at(end) {
                if mapping.start < span.first || mapping.last > span.last {
                    let mapping = Mapping::of(mapping);
                    return Err(CutMapping { mapping });
                }
            }
        }
        self.invalidate(span);
        Ok(())
    }
}
