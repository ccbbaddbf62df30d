//! [`Iotlb`]: the cached mappings of an IOMMU.

mod bound;
mod fails;
mod iterator;
#[cfg(test)]
mod many_leaves_tests;
mod mappings;
#[cfg(feature = "backend-bitmap")]
mod parts;
mod priority;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use super::counters::{IotlbCounters, LookupCounters};
use super::kind::{ITS_TARGET, PASSES_THE_END};
use super::mapping_table::{IovaMapping, MappingTable, Position, Span};
use super::{widest, Error, IotlbFails, IovaRange};
use crate::guest_memory::{GuestAddress, Permissions};

pub use iterator::IotlbIterator;
pub(super) use mappings::span_of;
pub use mappings::{CutMapping, MapError, Mapping, Mappings};
pub(super) use priority::{Priority, TRIES};

/// The cached mappings of an IOMMU: I/O virtual address ranges and their guest physical addresses.
///
/// Mappings can have any length and alignment. Adjacent mappings that continue each other, with the
/// same permissions, are one mapping, unless the IOTLB is [unmerged](Self::unmerged).
///
/// # Memory
///
/// A guest chooses how many mappings there are, and each takes 32 to 90 bytes.
/// [`set_bound`](Self::set_bound) limits them if the IOTLB is a cache. A bound evicts mappings,
/// which the table of a virtio-iommu must keep: see [`map_range`](Self::map_range) for its limit.
///
/// # Time
///
/// A guest chooses the length of a range and the mappings in it. A lookup takes time in proportion
/// to the parts that fail, and to the mappings of the range divided by 48 to 128. It takes this
/// time whether it succeeds or fails. If one page arrives between two lookups, a range of n pages
/// takes time in proportion to n². So ask for all [`misses`](IotlbFails::misses) before the next
/// lookup. If the front end maps single pages, limit the length of a range that the device
/// translates at a time.
///
/// # Clones
///
/// A clone has the same mappings, and shares them until one of the two changes. A change copies at
/// most a few groups of 128 mappings. Clones share the counts of lookups and of tries
/// ([`set_bound`](Self::set_bound)).
///
/// # Examples
///
/// ```
/// use vm_memory::iommu::{Iotlb, MappedRange};
/// use vm_memory::{GuestAddress, Permissions};
///
/// let mut iotlb = Iotlb::new();
/// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0x9000), 0x1000, Permissions::ReadWrite)?;
/// iotlb.set_mapping(GuestAddress(0x2000), GuestAddress(0x4000), 0x1000, Permissions::Read)?;
///
/// let iova = GuestAddress(0x1ff0);
/// let found = Iotlb::lookup(&iotlb, iova, 0x20, Permissions::Read).unwrap();
/// assert_eq!(
///     found.collect::<Vec<_>>(),
///     [
///         MappedRange { base: GuestAddress(0x9ff0), length: 0x10 },
///         MappedRange { base: GuestAddress(0x4000), length: 0x10 },
///     ]
/// );
/// let fails = Iotlb::lookup(&iotlb, iova, 0x20, Permissions::Write).unwrap_err();
/// assert_eq!(fails.access_fails[0].base, GuestAddress(0x2000));
///
/// iotlb.invalidate_mapping(GuestAddress(0x1000), 0x800);
/// let fails = Iotlb::lookup(&iotlb, GuestAddress(0x1000), 0x1000, Permissions::Read).unwrap_err();
/// assert_eq!(fails.misses[0].length, 0x800);
/// # Ok::<(), vm_memory::iommu::Error>(())
/// ```
#[derive(Debug, Default)]
#[doc(alias = "IOTLB miss")]
#[doc(alias = "translation cache")]
pub struct Iotlb {
    mappings: MappingTable,
    /// The maximum number of mappings.
    bound: Option<NonZeroUsize>,
    /// The age of the next mapping.
    next_age: u64,
    /// The mapping that was evicted last. None of its addresses is mapped now. `None` after a
    /// change that may have replaced this mapping in the guest's table.
    evicted: Option<IovaMapping>,
    evictions: u64,
    /// The failed lookup that is served first. Present if there is a bound.
    priority: Option<Arc<Priority>>,
    /// Present if lookups are counted.
    counters: Option<Arc<LookupCounters>>,
    /// Whether there is a priority or counters, which lookups update.
    observed: bool,
    /// Whether mappings that continue each other stay apart.
    unmerged: bool,
}

/// A mapping that is to be set. Its ranges do not pass 2^64.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewMapping {
    pub(super) range: Span,
    pub(super) target: GuestAddress,
    pub(super) permissions: Permissions,
    /// The range that has priority. Mappings in it are evicted last.
    pub(super) wanted: Option<Span>,
}

impl Clone for Iotlb {
    fn clone(&self) -> Self {
        Self {
            mappings: self.mappings.clone(),
            priority: self.priority.clone(),
            counters: self.counters.clone(),
            ..*self
        }
    }

    fn clone_from(&mut self, source: &Self) {
        let Self {
            mappings,
            bound,
            next_age,
            evicted,
            evictions,
            priority,
            counters,
            observed,
            unmerged,
        } = source;
        self.mappings.clone_from(mappings);
        self.bound = *bound;
        self.next_age = *next_age;
        self.evicted = *evicted;
        self.evictions = *evictions;
        share(&mut self.priority, priority);
        share(&mut self.counters, counters);
        self.observed = *observed;
        self.unmerged = *unmerged;
    }
}

/// Makes `this` share the value of `source`.
///
/// Does not change the reference count if the two share a value already.
fn share<T>(this: &mut Option<Arc<T>>, source: &Option<Arc<T>>) {
    let ptr = |arc: &Option<Arc<T>>| arc.as_ref().map(Arc::as_ptr);
    if ptr(this) != ptr(source) {
        this.clone_from(source);
    }
}

/// Returns the last of `length` addresses at `base`.
///
/// Returns `None` if there is none, or if it is past the end of the address space.
pub(super) fn last_of(base: u64, length: usize) -> Option<u64> {
    let more = u64::try_from(length).ok()?.checked_sub(1)?;
    base.checked_add(more)
}

impl Iotlb {
    /// Creates an IOTLB without mappings.
    pub fn new() -> Self {
        Default::default()
    }

    /// Returns the number of mappings.
    pub fn entries(&self) -> usize {
        self.mappings.len()
    }

    /// Returns the number of mappings that were evicted because of the [bound](Self::set_bound).
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Returns the most permissive access that all of the `length` addresses at `iova` permit.
    ///
    /// Returns `None` if one of them is not mapped, or if the range passes 2^64.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::ReadWrite)?;
    /// iotlb.set_mapping(GuestAddress(0x2000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// assert_eq!(iotlb.granted(GuestAddress(0x1000), 0x1000), Some(Permissions::ReadWrite));
    /// assert_eq!(iotlb.granted(GuestAddress(0x1800), 0x1000), Some(Permissions::Read));
    /// assert_eq!(iotlb.granted(GuestAddress(0x2800), 0x1000), None);
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn granted(&self, iova: GuestAddress, length: usize) -> Option<Permissions> {
        widest(|access| self.permits(iova, length, access))
    }

    /// Returns whether a lookup would find the range. Does not count as a lookup.
    fn permits(&self, iova: GuestAddress, length: usize, access: Permissions) -> bool {
        let Some(last) = last_of(iova.0, length) else {
            return length == 0;
        };
        self.mappings
            .last_at_or_before(iova.0)
            .is_some_and(|(position, _)| self.mappings.cover(position, iova.0, last, access))
    }

    /// Starts counting [lookups](Self::lookup).
    pub fn count_lookups(&mut self) {
        self.count_in(Arc::default());
    }

    /// Starts counting lookups in `counters`, unless they are counted already.
    pub(super) fn count_in(&mut self, counters: Arc<LookupCounters>) {
        self.counters.get_or_insert(counters);
        self.observed = true;
    }

    /// Returns whether lookups are counted.
    pub(super) fn counts(&self) -> bool {
        self.counters.is_some()
    }

    /// Returns the number of lookups, evictions and mappings.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.count_lookups();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// for address in [0x1000, 0x1800, 0x2000] {
    ///     let found = Iotlb::lookup(&iotlb, GuestAddress(address), 8, Permissions::Read);
    ///     assert_eq!(found.is_ok(), address < 0x2000);
    /// }
    /// let counters = iotlb.counters();
    /// assert_eq!((counters.hits, counters.misses, counters.entries), (2, 1, 1));
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn counters(&self) -> IotlbCounters {
        let counters = self.counters.as_deref();
        let (hits, misses) = counters.map_or((0, 0), LookupCounters::sums);
        IotlbCounters {
            hits,
            misses,
            evictions: self.evictions,
            entries: self.entries(),
        }
    }

    /// Maps the `length` addresses at `iova` to those at `map_to`, with the permissions `perm`.
    ///
    /// Replaces existing mappings of these addresses. Does nothing if `length` is 0. For a map
    /// request of virtio-iommu, which replaces nothing, use [`map_range`](Self::map_range).
    ///
    /// # Errors
    ///
    /// Returns [`Error::CannotResolve`] if the range at `iova` or the one at `map_to` passes 2^64.
    /// The IOTLB is then unchanged.
    #[doc(alias = "VHOST_IOTLB_UPDATE")]
    pub fn set_mapping(
        &mut self,
        iova: GuestAddress,
        map_to: GuestAddress,
        length: usize,
        perm: Permissions,
    ) -> Result<(), Error> {
        if let Some(new) = self.announce(iova, map_to, length, perm)? {
            self.set(&new);
        }
        Ok(())
    }

    /// Checks the arguments of [`set_mapping`](Self::set_mapping).
    ///
    /// Returns `None` if there is nothing to map.
    #[inline]
    pub(super) fn announce(
        &self,
        iova: GuestAddress,
        map_to: GuestAddress,
        length: usize,
        permissions: Permissions,
    ) -> Result<Option<NewMapping>, Error> {
        // A mapping of 0 addresses arrives like one of a single address.
        let range = span_at(iova, length.max(1)).unwrap_or(Span { first: 0, last: 0 });
        let wanted = self.record_mapping(range);
        if length == 0 {
            return Ok(None);
        }
        if last_of(iova.0, length).is_none() {
            return Err(passes_the_end(iova, length));
        }
        if last_of(map_to.0, length).is_none() {
            return Err(target_passes_the_end(iova, map_to, length));
        }
        Ok(Some(NewMapping {
            range,
            target: map_to,
            permissions,
            wanted,
        }))
    }

    /// Records that a range will be mapped. Returns the range that has priority.
    #[inline]
    pub(super) fn record_mapping(&self, range: Span) -> Option<Span> {
        self.priority.as_ref()?.record_mapping(range)
    }

    /// Sets a mapping, and replaces existing mappings of its addresses.
    pub(super) fn set(&mut self, new: &NewMapping) {
        let NewMapping {
            range: Span { first, last },
            target,
            permissions: perm,
            wanted,
        } = *new;
        let age = self.next_age;
        self.next_age = self.next_age.wrapping_add(1);
        let new = IovaMapping::new(first, last, target.0.wrapping_sub(first), perm, age);
        if self
            .evicted
            .is_some_and(|evicted| self.outdates_evicted(&evicted, &new))
        {
            self.evicted = None;
        }
        if let Some(position) = self.hole_after(&new) {
            // The common case takes one search.
            self.mappings.insert_after(position, new);
            self.evict(wanted);
            return;
        }

        self.remove(first, last);
        let (mut start, mut end) = (first, last);
        if let Some(before) = first
            .checked_sub(1)
            .and_then(|before| self.mapping_at(before))
        {
            if self.joins(before.1, &new) {
                start = before.1.start;
            }
        }
        if let Some(after) = last.checked_add(1).and_then(|after| self.mapping_at(after)) {
            if self.joins(after.1, &new) {
                end = after.1.last;
            }
        }
        if start == first && end == last {
            self.mappings.insert(new);
        } else {
            // Merged with its neighbours. The age is that of the newest part.
            self.mappings.remove_within(start, end);
            self.mappings
                .insert(IovaMapping::new(start, end, new.offset, perm, age));
        }
        self.evict(wanted);
    }

    /// Removes the mappings of the `length` addresses at `iova`.
    ///
    /// A range that passes 2^64 ends there. A mapping that is partly in the range keeps the rest.
    ///
    /// For a range with a first and a last address, use
    /// [`invalidate_range`](Self::invalidate_range), which needs no arithmetic. For an unmap
    /// request of virtio-iommu, use [`unmap`](Self::unmap).
    #[doc(alias = "VHOST_IOTLB_INVALIDATE")]
    pub fn invalidate_mapping(&mut self, iova: GuestAddress, length: usize) {
        if let Some(span) = span_at(iova, length) {
            self.invalidate(span);
        }
    }

    /// Removes the mappings of a range.
    #[inline]
    pub(super) fn invalidate(&mut self, Span { first, last }: Span) {
        self.evicted = None;
        if let Some((position, mapping)) = self.mappings.last_at_or_before(first) {
            let exactly = mapping.start == first && mapping.last == last;
            if exactly && self.mappings.remove_at(position) {
                // The common case takes one search.
                return;
            }
        }
        self.remove(first, last);
        // One mapping may have become two.
        self.evict(None);
    }

    /// Removes all mappings.
    pub fn invalidate_all(&mut self) {
        self.mappings.clear();
        self.evicted = None;
    }

    /// Translates the `length` addresses at `iova`, for an access.
    ///
    /// `Permissions::No` finds any mapping. A range of 0 addresses is always found.
    ///
    /// # Errors
    ///
    /// Returns the parts that are not mapped, and the parts whose mappings do not permit the
    /// access. A range that passes 2^64 fails as a whole, in
    /// [`access_fails`](IotlbFails::access_fails).
    #[inline(always)]
    #[doc(alias = "IOTLB miss")]
    pub fn lookup<D: Deref<Target = Iotlb>>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<D>, IotlbFails> {
        Self::lookup_with(tlb, iova, length, access, |fails| fails)
    }

    /// Records the outcome of a lookup: the range that it found, or `None` if it failed.
    ///
    /// Out of line, to keep the fast path small.
    #[cold]
    #[inline(never)]
    fn observe(&self, found: Option<Span>) {
        if let Some(counters) = &self.counters {
            counters.count(found.is_some());
        }
        if let (Some(priority), Some(range)) = (&self.priority, found) {
            priority.ended(range);
        }
    }

    /// Translates addresses as [`lookup`](Self::lookup) does, and passes a failure to `error`.
    ///
    /// Converting the failure here saves the caller from moving the result once more.
    #[inline(always)]
    pub(super) fn lookup_with<D: Deref<Target = Iotlb>, E>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
        error: impl FnOnce(IotlbFails) -> E,
    ) -> Result<IotlbIterator<D>, E> {
        let Some(last) = last_of(iova.0, length) else {
            if tlb.observed {
                // Addresses that never have priority.
                let none = Span { first: 1, last: 0 };
                tlb.observe((length == 0).then_some(none));
            }
            if length == 0 {
                let position = Position::default();
                return Ok(IotlbIterator::new(tlb, iova, length, position, access));
            }
            return Err(error(fails::fails_past_the_end(iova, length)));
        };
        let before = tlb.mappings.last_at_or_before(iova.0);
        if let Some((position, mapping)) = before {
            let whole = last <= mapping.last && mapping.allows(access);
            if whole || tlb.mappings.cover(position, iova.0, last, access) {
                if tlb.observed {
                    let first = iova.0;
                    tlb.observe(Some(Span { first, last }));
                }
                return Ok(IotlbIterator::new(tlb, iova, length, position, access));
            }
        }
        let position = before.map(|(position, _)| position).unwrap_or_default();
        if tlb.observed {
            tlb.observe(None);
        }
        Err(error(tlb.find_fails(position, iova.0, last, access)))
    }

    /// Returns the number of parts that clones share until one of them changes.
    pub(super) fn leaves(&self) -> usize {
        self.mappings.leaves()
    }

    /// Returns whether two adjacent mappings become one.
    #[inline]
    fn joins(&self, one: &IovaMapping, other: &IovaMapping) -> bool {
        !self.unmerged && one.continues(other)
    }

    /// Returns the position of the mapping before a new one.
    ///
    /// Returns `None` if its addresses are not free, or if it continues one of its neighbours.
    fn hole_after(&self, new: &IovaMapping) -> Option<Position> {
        let (position, before) = self.mappings.last_at_or_before(new.start)?;
        let joins_before = before.last.checked_add(1) == Some(new.start) && self.joins(before, new);
        if before.last >= new.start || joins_before {
            return None;
        }
        if let Some(after) = self.mappings.get(self.mappings.next(position)) {
            let joins_after =
                new.last.checked_add(1) == Some(after.start) && self.joins(after, new);
            if after.start <= new.last || joins_after {
                return None;
            }
        }
        Some(position)
    }

    /// Returns the mapping of an address, and the address that it is mapped to.
    ///
    /// Does not count as a lookup.
    pub(super) fn mapping_of(&self, iova: GuestAddress) -> Option<(&IovaMapping, GuestAddress)> {
        let (_, mapping) = self.mapping_at(iova.0)?;
        Some((mapping, GuestAddress(iova.0.wrapping_add(mapping.offset))))
    }

    /// Returns the mapping of an address, and its position.
    #[inline(always)]
    fn mapping_at(&self, addr: u64) -> Option<(Position, &IovaMapping)> {
        self.mappings
            .last_at_or_before(addr)
            .filter(|(_, mapping)| addr <= mapping.last)
    }

    /// Removes the addresses from `first` to `last` from all mappings.
    fn remove(&mut self, first: u64, last: u64) {
        // The mapping of the address before the range may extend into the range, or past its end.
        let before = first
            .checked_sub(1)
            .and_then(|before| self.mapping_at(before));
        if let Some((position, &mapping)) = before.filter(|(_, mapping)| mapping.last >= first) {
            self.mappings
                .change(position, |mapping| mapping.last = first.wrapping_sub(1));
            if let Some(after) = last.checked_add(1).filter(|after| *after <= mapping.last) {
                self.mappings.insert(IovaMapping {
                    start: after,
                    ..mapping
                });
                return;
            }
        }
        self.mappings.remove_within(first, last);
        // The mapping of the last address may extend past the end of the range.
        if let Some((position, _)) = self.mapping_at(last) {
            let after = last.saturating_add(1);
            self.mappings
                .change(position, |mapping| mapping.start = after);
        }
    }
}

/// Returns the `length` addresses at `iova`, up to the last one of the address space.
pub(super) fn span_at(iova: GuestAddress, length: usize) -> Option<Span> {
    (length != 0).then(|| Span {
        first: iova.0,
        last: last_of(iova.0, length).unwrap_or(u64::MAX),
    })
}

/// Creates the error of a range that passes the end of the address space.
#[cold]
pub(super) fn passes_the_end(base: GuestAddress, length: usize) -> Error {
    Error::CannotResolve {
        iova_range: IovaRange { base, length },
        reason: PASSES_THE_END.into(),
    }
}

/// Creates the error of a mapping whose guest physical range passes the end of the address space.
#[cold]
fn target_passes_the_end(base: GuestAddress, map_to: GuestAddress, length: usize) -> Error {
    Error::CannotResolve {
        iova_range: IovaRange { base, length },
        reason: format!(
            "{ITS_TARGET} 0x{:x} passes the end of the address space",
            map_to.0
        ),
    }
}
