//! [`IovaMapping`]: one mapping of an IOTLB.

use crate::guest_memory::Permissions;

/// A mapping of consecutive I/O virtual addresses to consecutive guest physical addresses.
///
/// Neither range passes 2^64.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::iommu) struct IovaMapping {
    /// The first address.
    pub(in crate::iommu) start: u64,
    /// The last address. A range may end with the address space, where there is no next address.
    pub(in crate::iommu) last: u64,
    /// The guest physical address less the I/O virtual address, wrapping.
    pub(in crate::iommu) offset: u64,
    /// The age, shifted by [`PERMISSION_BITS`], and the permissions.
    pub(in crate::iommu) tag: u64,
}

/// A range of addresses that is not empty. It may end with the address space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::iommu) struct Span {
    pub(in crate::iommu) first: u64,
    pub(in crate::iommu) last: u64,
}

impl Span {
    /// Returns whether this range and another one have a common address.
    pub(in crate::iommu) fn overlaps(&self, other: Span) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// The number of bits of the tag that are permissions.
const PERMISSION_BITS: u32 = 2;
const PERMISSION_MASK: u64 = (1 << PERMISSION_BITS) - 1;

impl IovaMapping {
    pub(in crate::iommu) fn new(
        start: u64,
        last: u64,
        offset: u64,
        permissions: Permissions,
        age: u64,
    ) -> Self {
        IovaMapping {
            start,
            last,
            offset,
            tag: age.wrapping_shl(PERMISSION_BITS) | u64::from(permissions.bits()),
        }
    }

    /// Returns whether this mapping has an address of a range.
    pub(in crate::iommu) fn is_in(&self, range: Span) -> bool {
        let (first, last) = (self.start, self.last);
        range.overlaps(Span { first, last })
    }

    /// Returns whether this mapping permits an access.
    #[inline(always)]
    pub(in crate::iommu) fn allows(&self, access: Permissions) -> bool {
        u64::from(access.bits()) & !self.tag == 0
    }

    /// Returns the two bits of the permissions.
    pub(super) fn permission_bits(&self) -> u8 {
        u8::try_from(self.tag & PERMISSION_MASK).unwrap_or(0)
    }

    /// Returns the age: the number of the change that made this mapping or last extended it.
    #[inline]
    pub(in crate::iommu) fn age(&self) -> u64 {
        self.tag >> PERMISSION_BITS
    }

    /// Returns whether this mapping and an adjacent one have the same offset and permissions, so
    /// that they are one mapping.
    ///
    /// They are two if one ends and the other begins at guest physical address 2^64: one mapping
    /// would pass it.
    #[inline]
    pub(in crate::iommu) fn continues(&self, other: &IovaMapping) -> bool {
        // The sum wraps for all addresses of a mapping or for none.
        let wraps = |mapping: &IovaMapping| mapping.start.checked_add(mapping.offset).is_none();
        self.offset == other.offset
            && (self.tag ^ other.tag) & PERMISSION_MASK == 0
            && wraps(self) == wraps(other)
    }
}
