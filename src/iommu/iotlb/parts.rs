//! The mapped and the unmapped parts of a range.

use super::Iotlb;
use crate::guest_memory::GuestAddress;

/// A part of a range of I/O virtual addresses that is in one mapping, or in none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Part {
    /// The first address.
    pub(crate) first: u64,
    /// The last address.
    pub(crate) last: u64,
    /// The guest physical address of the first address, if it is mapped.
    pub(crate) target: Option<GuestAddress>,
}

impl Iotlb {
    /// Returns the parts of the addresses from `first` to `last`, ascending.
    ///
    /// All permissions count as mapped. This does not count as a lookup: neither the counters nor
    /// the order of evictions change.
    pub(crate) fn parts(&self, first: u64, last: u64) -> impl Iterator<Item = Part> + '_ {
        let before = self.mappings.last_at_or_before(first);
        let mut position = before.map(|(position, _)| position).unwrap_or_default();
        let mut next = Some(first);
        core::iter::from_fn(move || {
            let from = next?;
            let mut mapping = self.mappings.get(position);
            if mapping.is_some_and(|mapping| mapping.last < from) {
                position = self.mappings.next(position);
                mapping = self.mappings.get(position);
            }
            let (end, target) = match mapping {
                Some(mapping) if mapping.start <= from => {
                    let target = GuestAddress(from.wrapping_add(mapping.offset));
                    (mapping.last, Some(target))
                }
                // It starts after `from`, so the difference does not wrap.
                Some(mapping) => (mapping.start.wrapping_sub(1), None),
                None => (last, None),
            };
            let end = end.min(last);
            next = end.checked_add(1).filter(|_| end < last);
            Some(Part {
                first: from,
                last: end,
                target,
            })
        })
    }
}
