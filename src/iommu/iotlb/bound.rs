//! The bound of an IOTLB, and the eviction of its oldest mappings.

use std::num::NonZeroUsize;
use std::sync::Arc;

use super::{Iotlb, IovaMapping, Priority, Span};
use crate::convert::to_u64;

impl Iotlb {
    /// Limits the number of mappings. `None`, the default, permits any number.
    ///
    /// The oldest mappings are evicted, now and whenever there would be more than `bound`. A
    /// mapping that grows by a neighbour counts as new. An evicted mapping is a miss.
    ///
    /// An eviction takes about as long with many mappings as with few. Lowering the bound takes
    /// time in proportion to the number of mappings before. During the call, there is a second
    /// table of the mappings that stay.
    ///
    /// # Ranges that need more mappings than the bound
    ///
    /// A range of more mappings than the bound can never be cached as a whole: each insertion of
    /// one of its mappings evicts another. Such a lookup fails permanently. It is detected when the
    /// cached mappings of the range and the mapping that was evicted last exceed the bound. Then
    /// all missing parts are in [`access_fails`](crate::iommu::IotlbFails::access_fails) instead of
    /// [`misses`](crate::iommu::IotlbFails::misses), so that callers do not ask for them forever.
    ///
    /// An invalidation, or a mapping that replaces another one, lifts the refusal: the range may
    /// need fewer mappings by then.
    ///
    /// # Loops of lookups and mappings end
    ///
    /// A caller may look up, ask for the misses, map them, and look up again, without a limit of
    /// its own. One range at a time has priority: the first whose lookup fails, until a lookup
    /// finds it or refuses it. Mappings of other ranges are evicted before those of this range. So
    /// the range is found if it fits the bound. Then the next range that fails has priority.
    ///
    /// A lookup makes progress if more of the range is mapped than at the previous one. If not,
    /// although mappings of the range were set, it uses up a try. An invalidation may cause that.
    /// After 32 tries, the range is refused in the same way. In every second try, the whole range
    /// is one miss, so that its mappings arrive in order.
    ///
    /// A device may give up. So after many failed lookups of other ranges, another range gets
    /// priority. Of up to 65 536 ranges that fail in turn, each is found or refused. To limit the
    /// time that they wait for each other, choose a bound of at least: mappings of the longest
    /// request × requests in flight.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_bound(std::num::NonZeroUsize::new(2));
    /// for page in [0x1000, 0x5000, 0x3000] {
    ///     iotlb.set_mapping(GuestAddress(page), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// }
    /// assert!(Iotlb::lookup(&iotlb, GuestAddress(0x1000), 1, Permissions::Read).is_err());
    /// assert!(Iotlb::lookup(&iotlb, GuestAddress(0x5000), 1, Permissions::Read).is_ok());
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn set_bound(&mut self, bound: Option<NonZeroUsize>) {
        self.set_bound_with(bound, Arc::default());
    }

    /// Limits the number of mappings. Failed lookups are recorded in `priority` after this call.
    pub(in crate::iommu) fn set_bound_with(
        &mut self,
        bound: Option<NonZeroUsize>,
        priority: Arc<Priority>,
    ) {
        self.bound = bound;
        self.priority = bound.map(|_| priority);
        self.observed = self.priority.is_some() || self.counters.is_some();
        if let Some(bound) = bound {
            let evictions = self.mappings.keep_newest(bound.get());
            let evictions = to_u64(evictions);
            self.evictions = self.evictions.wrapping_add(evictions);
        }
        self.evicted = None;
    }

    /// Returns the maximum number of mappings, if there is one.
    pub fn bound(&self) -> Option<NonZeroUsize> {
        self.bound
    }

    /// Returns whether a new mapping shows that the evicted one may have changed.
    ///
    /// The new one then overlaps it, or replaces another mapping.
    pub(super) fn outdates_evicted(&self, evicted: &IovaMapping, new: &IovaMapping) -> bool {
        if evicted.start <= new.last && new.start <= evicted.last {
            return true;
        }
        let mut next = match self.mapping_at(new.start) {
            Some(found) => Some(found),
            None => self.mappings.first_at_or_after(new.start),
        };
        while let Some((position, mapping)) = next.filter(|(_, mapping)| mapping.start <= new.last)
        {
            if !mapping.continues(new) {
                return true;
            }
            let position = self.mappings.next(position);
            next = self
                .mappings
                .get(position)
                .map(|mapping| (position, mapping));
        }
        false
    }

    /// Evicts mappings, down to the bound.
    ///
    /// `wanted` is the range that has priority. Mappings outside it are evicted first.
    #[inline]
    pub(super) fn evict(&mut self, wanted: Option<Span>) {
        if self
            .bound
            .is_some_and(|bound| self.mappings.len() > bound.get())
        {
            self.evict_some(wanted);
        }
    }

    fn evict_some(&mut self, wanted: Option<Span>) {
        let bound = self.bound.map_or(usize::MAX, NonZeroUsize::get);
        while self.mappings.len() > bound {
            let unneeded = wanted.and_then(|kept| self.mappings.remove_oldest_outside(kept));
            let Some(gone) = unneeded.or_else(|| self.mappings.remove_oldest()) else {
                return;
            };
            self.evictions = self.evictions.wrapping_add(1);
            // `needs_more_than_bound` can use only a mapping of the wanted range.
            let of_wanted =
                |mapping: &IovaMapping| wanted.is_some_and(|wanted| mapping.is_in(wanted));
            if of_wanted(&gone) || !self.evicted.is_some_and(|before| of_wanted(&before)) {
                self.evicted = Some(gone);
            }
        }
    }
}
