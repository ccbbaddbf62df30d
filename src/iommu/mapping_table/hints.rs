//! [`Hints`]: a guess of the leaf that an address is in.

use std::sync::Arc;

use super::leaf::Leaf;
use crate::convert::{to_u64, to_usize};

/// The number of hints per leaf. With more hints, fewer of them are one leaf off.
const HINTS_PER_LEAF: usize = 4;

/// A guess of the leaf for each interval of addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Hints {
    /// The first address of the first interval.
    pub(super) base: u64,
    /// The binary logarithm of the length of an interval.
    shift: u32,
    /// Shared by copies of the table.
    leaves: Arc<[u32]>,
}

impl Hints {
    pub(super) fn new(leaves: &[Leaf]) -> Self {
        let (Some(first), Some(last)) = (leaves.first(), leaves.last()) else {
            return Hints::default();
        };
        let (base, span) = (first.first, last.first.wrapping_sub(first.first));
        let wanted = to_u64(leaves.len().saturating_mul(HINTS_PER_LEAF));
        let mut shift = 0u32;
        while span.wrapping_shr(shift) >= wanted {
            shift = shift.saturating_add(1);
        }
        let mut hints = Vec::with_capacity(to_usize(span.wrapping_shr(shift)).saturating_add(1));
        for (number, leaf) in leaves.iter().enumerate() {
            // The intervals that begin in this leaf are those before the next leaf's first address.
            let next = leaves.get(number.saturating_add(1));
            let end = next.map_or(span, |next| next.first.wrapping_sub(base).saturating_sub(1));
            let end = to_usize(end.wrapping_shr(shift));
            debug_assert!(leaf.first >= base);
            while hints.len() <= end {
                hints.push(u32::try_from(number).unwrap_or(0));
            }
        }
        Hints {
            base,
            shift,
            leaves: hints.into(),
        }
    }

    /// Copies `source`. Does not change the reference count if both have the same hints.
    #[inline]
    pub(super) fn copy_from(&mut self, source: &Self) {
        self.base = source.base;
        self.shift = source.shift;
        if !Arc::ptr_eq(&self.leaves, &source.leaves) {
            self.leaves = Arc::clone(&source.leaves);
        }
    }

    /// Returns the guess for an address.
    #[inline(always)]
    pub(super) fn leaf_of(&self, addr: u64) -> usize {
        let number = addr.wrapping_sub(self.base).wrapping_shr(self.shift);
        let number = to_usize(number).min(self.leaves.len().wrapping_sub(1));
        let leaf = self.leaves.get(number).copied().unwrap_or(0);
        usize::try_from(leaf).unwrap_or(0)
    }
}
