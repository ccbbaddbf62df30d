//! [`Iotlb`]: the mappings that are known.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use super::counters::{IotlbCounters, LookupCounters};
use super::mapping_table::{Mapping, MappingTable, Place};
use super::{widest, Error, IotlbFails, IovaRange, MappedRange};
use crate::guest_memory::{GuestAddress, Permissions};

/// The mappings of I/O virtual addresses that are known, of any length and at any address.
///
/// Neighbours that continue each other, with the same permissions, are one mapping. A guest chooses how many there are:
/// [`set_bound`](Self::set_bound) keeps it from choosing how much memory they take.
///
/// ```
/// use vm_memory::iommu::{Iotlb, MappedRange};
/// use vm_memory::{GuestAddress, Permissions};
///
/// let mut iotlb = Iotlb::new();
/// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0x9000), 0x1000, Permissions::ReadWrite)?;
/// iotlb.set_mapping(GuestAddress(0x2000), GuestAddress(0x4000), 0x1000, Permissions::Read)?;
///
/// let found = Iotlb::lookup(&iotlb, GuestAddress(0x1ff0), 0x20, Permissions::Read).unwrap();
/// assert_eq!(
///     found.collect::<Vec<_>>(),
///     [
///         MappedRange { base: GuestAddress(0x9ff0), length: 0x10 },
///         MappedRange { base: GuestAddress(0x4000), length: 0x10 },
///     ]
/// );
/// let refused = Iotlb::lookup(&iotlb, GuestAddress(0x1ff0), 0x20, Permissions::Write).unwrap_err();
/// assert_eq!(refused.access_fails[0].base, GuestAddress(0x2000));
///
/// iotlb.invalidate_mapping(GuestAddress(0x1000), 0x800);
/// let missing = Iotlb::lookup(&iotlb, GuestAddress(0x1000), 0x1000, Permissions::Read).unwrap_err();
/// assert_eq!(missing.misses[0].length, 0x800);
/// # Ok::<(), vm_memory::iommu::Error>(())
/// ```
///
/// A clone is a copy of the mappings. The two share them, 128 or less at a time, until one of them changes these. They count lookups together.
#[derive(Debug, Default)]
pub struct Iotlb {
    mappings: MappingTable,
    /// How many mappings are kept at most.
    bound: Option<NonZeroUsize>,
    /// The age of the next mapping.
    next_age: u64,
    /// The last mapping that had to go, as long as nothing says that it is not there any more: none of its addresses is mapped.
    evicted: Option<Mapping>,
    evictions: u64,
    /// When lookups are counted.
    counters: Option<Arc<LookupCounters>>,
}

impl Clone for Iotlb {
    fn clone(&self) -> Self {
        Self {
            mappings: self.mappings.clone(),
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
            counters,
        } = source;
        self.mappings.clone_from(mappings);
        self.bound = *bound;
        self.next_age = *next_age;
        self.evicted = *evicted;
        self.evictions = *evictions;
        // Of two that are not equal, one has none, nearly always: no count is touched.
        let ptr = |counters: &Option<_>| counters.as_ref().map(Arc::as_ptr);
        if ptr(&self.counters) != ptr(counters) {
            self.counters.clone_from(counters);
        }
    }
}

/// The last of `length` addresses from `base` on; `None` if there is none, or it would be past the end of the address space.
fn last_of(base: u64, length: usize) -> Option<u64> {
    let more = u64::try_from(length).ok()?.checked_sub(1)?;
    base.checked_add(more)
}

/// The range from a first to a last address.
fn range_of(first: u64, last: u64) -> IovaRange {
    let length = last.wrapping_sub(first).saturating_add(1);
    IovaRange {
        base: GuestAddress(first),
        length: usize::try_from(length).unwrap_or(usize::MAX),
    }
}

impl Iotlb {
    /// Makes an IOTLB without mappings.
    pub fn new() -> Self {
        Default::default()
    }

    /// Keeps no more than `bound` mappings from now on, or as many as there are (`None`, as in the beginning).
    ///
    /// The oldest go first, now and whenever there would be more; a mapping that grows by a neighbour counts as new. What has gone is a
    /// miss.
    ///
    /// A range that is in more pieces than the bound can never be found whole: its pieces push each other out. It is refused once that is known, that
    /// is when the mappings that there are and the last one that had to go are more pieces of it than the bound, whatever else is in between. Then what
    /// is missing is in [`access_fails`](IotlbFails::access_fails), since asking for it again would go on for ever. What had to go is forgotten
    /// with the next invalidation, or with a mapping that is not what was there: the range may be in fewer pieces from then on.
    ///
    /// Two ranges that both fit, but not together, are not refused: two threads that ask for them may push out each other's pieces. Who asks for what is
    /// missing therefore asks a limited number of times, or for a limited time; a bound of twice the pieces of the longest request times the requests in
    /// flight keeps it from happening.
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
        self.bound = bound;
        self.evict();
        self.evicted = None;
    }

    /// Returns how many mappings are kept at most, if there is a bound.
    pub fn bound(&self) -> Option<NonZeroUsize> {
        self.bound
    }

    /// Returns how many mappings there are.
    pub fn entries(&self) -> usize {
        self.mappings.len()
    }

    /// Returns how many mappings had to go for others so far, because of the [bound](Self::set_bound).
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Returns what all of the `length` addresses from `iova` on permit; `None` if one of them is not mapped, or the range passes 2^64.
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
        widest(|access| Iotlb::lookup(self, iova, length, access).is_ok())
    }

    /// Counts [`counted_lookup`](Self::counted_lookup)s from now on.
    pub fn count_lookups(&mut self) {
        self.count_in(Arc::default());
    }

    /// Counts lookups from now on, there, if they are not counted yet.
    pub(super) fn count_in(&mut self, counters: Arc<LookupCounters>) {
        self.counters.get_or_insert(counters);
    }

    /// Whether lookups are counted.
    pub(super) fn counts(&self) -> bool {
        self.counters.is_some()
    }

    /// Returns what it has done so far.
    ///
    /// ```
    /// use vm_memory::{GuestAddress, Iotlb, Permissions};
    ///
    /// let mut iotlb = Iotlb::new();
    /// iotlb.count_lookups();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// for address in [0x1000, 0x1800, 0x2000] {
    ///     let found = Iotlb::counted_lookup(&iotlb, GuestAddress(address), 8, Permissions::Read);
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

    /// Maps the `length` addresses from `iova` on to those from `map_to` on, instead of whatever they were mapped to.
    ///
    /// Mapping 0 addresses changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::CannotResolve`] if the range passes 2^64; nothing has changed then.
    pub fn set_mapping(
        &mut self,
        iova: GuestAddress,
        map_to: GuestAddress,
        length: usize,
        perm: Permissions,
    ) -> Result<(), Error> {
        if length == 0 {
            return Ok(());
        }
        let first = iova.0;
        let Some(last) = last_of(first, length) else {
            return Err(passes_the_end(iova, length));
        };
        let age = self.next_age;
        self.next_age = self.next_age.wrapping_add(1);
        let new = Mapping::new(first, last, map_to.0.wrapping_sub(first), perm, age);
        if self
            .evicted
            .is_some_and(|evicted| self.makes_doubtful(&evicted, &new))
        {
            self.evicted = None;
        }
        if let Some(place) = self.hole_behind(&new) {
            // As nearly always: one search.
            self.mappings.insert_behind(place, new);
            self.evict();
            return Ok(());
        }

        self.remove(first, last);
        let (mut start, mut end) = (first, last);
        if let Some(before) = first
            .checked_sub(1)
            .and_then(|before| self.mapping_at(before))
        {
            if before.1.continues(&new) {
                start = before.1.start;
            }
        }
        if let Some(after) = last.checked_add(1).and_then(|after| self.mapping_at(after)) {
            if after.1.continues(&new) {
                end = after.1.last;
            }
        }
        if start == first && end == last {
            self.mappings.insert(new);
        } else {
            // They are one, as old as the newest part.
            self.mappings.remove_within(start, end);
            self.mappings
                .insert(Mapping::new(start, end, new.offset, perm, age));
        }
        self.evict();
        Ok(())
    }

    /// Forgets how the `length` addresses from `iova` on are mapped. A range that passes 2^64 is cut there.
    pub fn invalidate_mapping(&mut self, iova: GuestAddress, length: usize) {
        if length != 0 {
            self.evicted = None;
            let last = last_of(iova.0, length).unwrap_or(u64::MAX);
            if let Some((place, mapping)) = self.mappings.last_at_or_before(iova.0) {
                let exactly = mapping.start == iova.0 && mapping.last == last;
                if exactly && self.mappings.remove_at(place) {
                    // As nearly always: one search.
                    return;
                }
            }
            self.remove(iova.0, last);
            // One mapping may have become two.
            self.evict();
        }
    }

    /// Forgets all mappings.
    pub fn invalidate_all(&mut self) {
        self.mappings.clear();
        self.evicted = None;
    }

    /// Looks up `length` addresses from `iova` on, for an access.
    ///
    /// `Permissions::No` finds whatever is mapped. 0 addresses are always found.
    ///
    /// # Errors
    ///
    /// If not all of them are mapped, or not all mappings permit the access: every part of which that is so. A range that passes
    /// 2^64 fails as a whole, in `access_fails`.
    #[inline(always)]
    pub fn lookup<D: Deref<Target = Iotlb>>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<D>, IotlbFails> {
        Self::look(tlb, iova, length, access, |_, _| (), |fails| fails)
    }

    /// [`lookup`](Self::lookup), and counts it, if [lookups are counted](Self::count_lookups): in a place of the thread's own, so that threads do not wait for
    /// each other.
    ///
    /// A method of its own, since only to look whether it is to be counted would cost the other one a fifth of its time.
    ///
    /// # Errors
    ///
    /// As there.
    #[inline(always)]
    pub fn counted_lookup<D: Deref<Target = Iotlb>>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<D>, IotlbFails> {
        Self::look(tlb, iova, length, access, Self::count, |fails| fails)
    }

    /// Counts a lookup.
    #[inline(always)]
    pub(super) fn count(&self, hit: bool) {
        if let Some(counters) = &self.counters {
            counters.count(hit);
        }
    }

    /// Looks up, calls `count` with the outcome, and makes an error of what fails: here, and not of a result that has been made, which would be moved once more.
    #[inline(always)]
    pub(super) fn look<D: Deref<Target = Iotlb>, E>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
        count: impl FnOnce(&Self, bool),
        error: impl FnOnce(IotlbFails) -> E,
    ) -> Result<IotlbIterator<D>, E> {
        let found = |tlb: D, place| IotlbIterator {
            tlb,
            next: iova.0,
            left: length,
            place,
            access,
        };
        let Some(last) = last_of(iova.0, length) else {
            count(&tlb, length == 0);
            if length == 0 {
                return Ok(found(tlb, Place::default()));
            }
            return Err(error(passes_as_a_whole(iova, length)));
        };
        let before = tlb.mappings.last_at_or_before(iova.0);
        if let Some((place, mapping)) = before {
            let whole = last <= mapping.last && mapping.allows(access);
            if whole || tlb.mappings.cover(place, iova.0, last, access) {
                count(&tlb, true);
                return Ok(found(tlb, place));
            }
        }
        let place = before.map(|(place, _)| place).unwrap_or_default();
        count(&tlb, false);
        Err(error(tlb.find_fails(place, iova.0, last, access)))
    }

    /// The place of the mapping before a new one, if the new one's addresses are free and it continues neither of its neighbours.
    fn hole_behind(&self, new: &Mapping) -> Option<Place> {
        let (place, before) = self.mappings.last_at_or_before(new.start)?;
        let joins_before = before.last.checked_add(1) == Some(new.start) && before.continues(new);
        if before.last >= new.start || joins_before {
            return None;
        }
        if let Some(after) = self.mappings.get(self.mappings.next(place)) {
            let joins_after = new.last.checked_add(1) == Some(after.start) && after.continues(new);
            if after.start <= new.last || joins_after {
                return None;
            }
        }
        Some(place)
    }

    /// Parts that copies share until one of them changes them.
    pub(super) fn leaves(&self) -> usize {
        self.mappings.leaves()
    }

    /// Whether a new mapping says that an evicted one may be another by now: it has some of its addresses, or replaces something else.
    fn makes_doubtful(&self, evicted: &Mapping, new: &Mapping) -> bool {
        if evicted.start <= new.last && new.start <= evicted.last {
            return true;
        }
        let mut next = match self.mapping_at(new.start) {
            Some(found) => Some(found),
            None => self.mappings.first_at_or_behind(new.start),
        };
        while let Some((place, mapping)) = next.filter(|(_, mapping)| mapping.start <= new.last) {
            if !mapping.continues(new) {
                return true;
            }
            let place = self.mappings.next(place);
            next = self.mappings.get(place).map(|mapping| (place, mapping));
        }
        false
    }

    /// Removes the oldest mappings, down to the bound.
    #[inline]
    fn evict(&mut self) {
        if self
            .bound
            .is_some_and(|bound| self.mappings.len() > bound.get())
        {
            self.evict_some();
        }
    }

    fn evict_some(&mut self) {
        let bound = self.bound.map_or(usize::MAX, NonZeroUsize::get);
        while self.mappings.len() > bound {
            let Some(oldest) = self.mappings.remove_oldest() else {
                return;
            };
            self.evicted = Some(oldest);
            self.evictions = self.evictions.wrapping_add(1);
        }
    }

    /// The mapping of one address, and its place.
    #[inline(always)]
    fn mapping_at(&self, addr: u64) -> Option<(Place, &Mapping)> {
        self.mappings
            .last_at_or_before(addr)
            .filter(|(_, mapping)| addr <= mapping.last)
    }

    /// What keeps the addresses from `first` to `last` from being accessed. The last mapping that begins at `first` or before it is at
    /// `place`, if there is one; else that is the first one's.
    #[cold]
    fn find_fails(
        &self,
        mut place: Place,
        first: u64,
        last: u64,
        access: Permissions,
    ) -> IotlbFails {
        // The first one may end before the range.
        if self
            .mappings
            .get(place)
            .is_some_and(|mapping| mapping.last < first)
        {
            place = self.mappings.next(place);
        }
        if self
            .mappings
            .get(place)
            .is_none_or(|mapping| mapping.start > last)
        {
            return IotlbFails {
                misses: vec![range_of(first, last)],
                access_fails: Vec::new(),
            };
        }
        let refused_by_bound = self.needs_more_than_the_bound(place, first, last);
        let (mut misses, mut access_fails) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(mapping) = self.mappings.get(place) {
            let Some(from) = next.filter(|_| mapping.start <= last) else {
                break;
            };
            place = self.mappings.next(place);
            let start = mapping.start.max(first);
            let end = mapping.last.min(last);
            if from < start {
                misses.push(range_of(from, start.wrapping_sub(1)));
            }
            if !mapping.allows(access) {
                access_fails.push(range_of(start, end));
            }
            next = end.checked_add(1).filter(|_| end < last);
        }
        if let Some(from) = next {
            misses.push(range_of(from, last));
        }
        if refused_by_bound {
            access_fails.append(&mut misses);
            access_fails.sort_by_key(|range| range.base);
            access_fails.push(IovaRange::refused_by_bound(GuestAddress(first)));
        }
        IotlbFails {
            misses,
            access_fails,
        }
    }

    /// Whether a range can never have all of its mappings at a time. The first of those that there are is at `place`.
    ///
    /// Since the evicted one went, nothing was forgotten or replaced, so that it is where it was for whoever maps, as all the others
    /// are. Two of them that have no other one in between are two pieces of the range, if they do not continue each other; if they do, and there is a
    /// hole, what is missing in there may make them one. So the range has at least so many pieces, and at most `bound` at a time.
    fn needs_more_than_the_bound(&self, mut place: Place, first: u64, last: u64) -> bool {
        let (Some(bound), Some(evicted)) = (self.bound, self.evicted) else {
            return false;
        };
        if evicted.start > last || evicted.last < first {
            return false;
        }
        let mut evicted = Some(evicted);
        let mut before: Option<Mapping> = None;
        let mut pieces = 0usize;
        let mut count = |piece: Mapping| {
            let is_another = before.is_none_or(|before| !before.continues(&piece));
            pieces = pieces.saturating_add(usize::from(is_another));
            before = Some(piece);
        };
        while let Some(mapping) = self.mappings.get(place).filter(|it| it.start <= last) {
            if let Some(evicted) = evicted.take_if(|evicted| evicted.start < mapping.start) {
                count(evicted);
            }
            count(*mapping);
            place = self.mappings.next(place);
        }
        if let Some(evicted) = evicted {
            count(evicted);
        }
        pieces > bound.get()
    }

    /// Removes the addresses from `first` to `last` from all mappings.
    fn remove(&mut self, first: u64, last: u64) {
        // The one that begins before the range may reach into it, or over all of it.
        let before = first
            .checked_sub(1)
            .and_then(|before| self.mapping_at(before));
        if let Some((place, &mapping)) = before.filter(|(_, mapping)| mapping.last >= first) {
            self.mappings
                .change(place, |mapping| mapping.last = first.wrapping_sub(1));
            if let Some(after) = last.checked_add(1).filter(|after| *after <= mapping.last) {
                self.mappings.insert(Mapping {
                    start: after,
                    ..mapping
                });
                return;
            }
        }
        self.mappings.remove_within(first, last);
        // So may the last one reach out of it.
        if let Some((place, _)) = self.mapping_at(last) {
            let after = last.saturating_add(1);
            self.mappings.change(place, |mapping| mapping.start = after);
        }
    }
}

/// The answer to a lookup of a range that passes the end of the address space.
#[cold]
fn passes_as_a_whole(base: GuestAddress, length: usize) -> IotlbFails {
    IotlbFails {
        misses: Vec::new(),
        access_fails: vec![IovaRange { base, length }],
    }
}

/// The error of a range that passes the end of the address space.
#[cold]
pub(super) fn passes_the_end(base: GuestAddress, length: usize) -> Error {
    Error::CannotResolve {
        iova_range: IovaRange { base, length },
        reason: "the range passes the end of the address space".into(),
    }
}

/// Goes over the guest physical ranges that a range of I/O virtual addresses is mapped to, in the order of the latter.
///
/// From [`Iotlb::lookup`] and [`Iommu::translate`](super::Iommu::translate). It holds on to the IOTLB as long as it lives: where that is a lock's guard, an invalidation
/// waits for it. Slices collected from it live on without the guard; drop them first.
///
/// Should the IOTLB behind the pointer be another one by now, without the mappings that were found, the iteration ends early.
#[derive(Clone, Debug)]
pub struct IotlbIterator<D: Deref<Target = Iotlb>> {
    tlb: D,
    /// The first address that is left.
    next: u64,
    /// How many are left.
    left: usize,
    /// Where its mapping was found. The pointer may lead to another IOTLB by now.
    place: Place,
    access: Permissions,
}

impl<D: Deref<Target = Iotlb>> IotlbIterator<D> {
    /// The mapping of the next address, and its place.
    #[inline(always)]
    fn mapping(&self) -> Option<(Place, Mapping)> {
        let mappings = &self.tlb.mappings;
        match mappings.get(self.place) {
            // No two have an address in common: whatever was found before, this one is right.
            Some(mapping) if mapping.start <= self.next && self.next <= mapping.last => {
                Some((self.place, *mapping))
            }
            _ => self
                .tlb
                .mapping_at(self.next)
                .map(|(place, mapping)| (place, *mapping)),
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
        let Some((place, mapping)) = found else {
            self.left = 0;
            return None;
        };
        let base = GuestAddress(self.next.wrapping_add(mapping.offset));
        // One less than the length: the length itself may be 2^64.
        let more_here = usize::try_from(mapping.last.wrapping_sub(self.next)).unwrap_or(usize::MAX);
        if more <= more_here {
            let length = self.left;
            self.left = 0;
            return Some(MappedRange { base, length });
        }
        let length = more_here.wrapping_add(1);
        self.left = self.left.wrapping_sub(length);
        self.next = mapping.last.wrapping_add(1);
        self.place = self.tlb.mappings.next(place);
        Some(MappedRange { base, length })
    }
}

/// Nothing is left after the end.
impl<D: Deref<Target = Iotlb>> core::iter::FusedIterator for IotlbIterator<D> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use Permissions::*;

    /// The whole address space of the model: this many addresses at the bottom and as many at the top.
    const WINDOW: u64 = 40;

    /// What each address is mapped to.
    type Model = BTreeMap<u64, (u64, Permissions)>;

    fn addr() -> impl Strategy<Value = u64> {
        prop_oneof![0..WINDOW, (u64::MAX - WINDOW + 1)..=u64::MAX]
    }

    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![8 => 0usize..20, 1 => Just(usize::MAX), 1 => (usize::MAX - 20)..usize::MAX]
    }

    fn permissions() -> impl Strategy<Value = Permissions> {
        prop::sample::select(vec![No, Read, Write, ReadWrite])
    }

    #[derive(Clone, Debug)]
    enum Step {
        Map {
            iova: u64,
            to: u64,
            length: usize,
            permissions: Permissions,
        },
        Invalidate {
            iova: u64,
            length: usize,
        },
        Clear,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (addr(), addr(), 0usize..20, permissions())
                .prop_map(|(iova, to, length, permissions)| Step::Map { iova, to, length, permissions }),
            4 => (addr(), length()).prop_map(|(iova, length)| Step::Invalidate { iova, length }),
            1 => Just(Step::Clear),
        ]
    }

    /// The addresses of a range, up to the end of the address space.
    fn addresses(base: u64, length: usize) -> impl Iterator<Item = u64> {
        // No more than the windows have is ever looked at.
        (0..length.min(WINDOW as usize) as u64).map_while(move |i| base.checked_add(i))
    }

    /// Every lookup of every access agrees with the model.
    fn compare(iotlb: &Iotlb, model: &Model) -> Result<(), TestCaseError> {
        for base in (0..WINDOW).chain(u64::MAX - WINDOW + 1..=u64::MAX) {
            for length in [0usize, 1, 2, 7, 20] {
                for access in [No, Read, Write, ReadWrite] {
                    let answer = Iotlb::lookup(iotlb, GuestAddress(base), length, access);
                    if last_of(base, length).is_none() && length != 0 {
                        let fails = answer.unwrap_err();
                        prop_assert!(fails.misses.is_empty());
                        prop_assert_eq!(
                            fails.access_fails,
                            vec![IovaRange {
                                base: GuestAddress(base),
                                length
                            }]
                        );
                        continue;
                    }
                    let missing: Vec<u64> = addresses(base, length)
                        .filter(|a| !model.contains_key(a))
                        .collect();
                    let refused: Vec<u64> = addresses(base, length)
                        .filter(|a| model.get(a).is_some_and(|(_, p)| !p.allow(access)))
                        .collect();
                    let flat = |ranges: &[IovaRange]| -> Vec<u64> {
                        ranges
                            .iter()
                            .flat_map(|r| addresses(r.base.0, r.length))
                            .collect()
                    };
                    match answer {
                        Ok(pieces) => {
                            prop_assert!(missing.is_empty() && refused.is_empty());
                            let targets: Vec<u64> = pieces
                                .flat_map(|p| {
                                    (0..p.length as u64).map(move |i| p.base.0.wrapping_add(i))
                                })
                                .collect();
                            let expected: Vec<u64> =
                                addresses(base, length).map(|a| model[&a].0).collect();
                            prop_assert_eq!(targets, expected);
                        }
                        Err(fails) => {
                            prop_assert_eq!(flat(&fails.misses), missing);
                            prop_assert_eq!(flat(&fails.access_fails), refused);
                            prop_assert!(
                                !fails.misses.is_empty() || !fails.access_fails.is_empty()
                            );
                        }
                    }
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

        /// Against a map of single addresses, at both ends of the address space.
        #[test]
        fn lookups_agree_with_a_map_of_addresses(steps in prop::collection::vec(step(), 0..24)) {
            let mut iotlb = Iotlb::new();
            let mut model = Model::new();
            for step in steps {
                match step {
                    Step::Map { iova, to, length, permissions } => {
                        let answer = iotlb.set_mapping(GuestAddress(iova), GuestAddress(to), length, permissions);
                        if length != 0 && last_of(iova, length).is_none() {
                            prop_assert!(answer.is_err());
                        } else {
                            prop_assert!(answer.is_ok());
                            for (i, a) in addresses(iova, length).enumerate() {
                                model.insert(a, (to.wrapping_add(i as u64), permissions));
                            }
                        }
                    }
                    Step::Invalidate { iova, length } => {
                        iotlb.invalidate_mapping(GuestAddress(iova), length);
                        match last_of(iova, length) {
                            _ if length == 0 => {}
                            Some(last) => model.retain(|a, _| *a < iova || *a > last),
                            None => model.retain(|a, _| *a < iova),
                        }
                    }
                    Step::Clear => {
                        iotlb.invalidate_all();
                        model.clear();
                    }
                }
                // Mappings never touch without a difference, and never overlap.
                for (a, b) in iotlb.mappings.iter().zip(iotlb.mappings.iter().skip(1)) {
                    prop_assert!(a.last < b.start);
                    prop_assert!(a.last + 1 != b.start || !a.continues(b));
                }
            }
            compare(&iotlb, &model)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

        /// B14: with a bound there are never more, what is found is right, and what was mapped last is found.
        #[test]
        fn b14_a_bound_is_kept_and_the_oldest_go(
            bound in 1usize..6,
            first in prop::collection::vec(step(), 0..8),
            steps in prop::collection::vec(step(), 0..24),
        ) {
            let (mut bounded, mut unbounded) = (Iotlb::new(), Iotlb::new());
            for (number, step) in first.iter().chain(&steps).enumerate() {
                if number == first.len() {
                    bounded.set_bound(NonZeroUsize::new(bound));
                }
                for iotlb in [&mut bounded, &mut unbounded] {
                    match *step {
                        Step::Map { iova, to, length, permissions } => {
                            let _ = iotlb.set_mapping(GuestAddress(iova), GuestAddress(to), length, permissions);
                        }
                        Step::Invalidate { iova, length } => iotlb.invalidate_mapping(GuestAddress(iova), length),
                        Step::Clear => iotlb.invalidate_all(),
                    }
                }
                if bounded.bound().is_none() {
                    continue;
                }
                prop_assert!(bounded.mappings.len() <= bound);
                if let Some(evicted) = bounded.evicted {
                    let oldest = bounded.mappings.iter().map(|m| (m.age(), m.start)).min();
                    prop_assert!(oldest.is_none_or(|oldest| (evicted.age(), evicted.start) < oldest));
                }
                for base in (0..WINDOW).chain(u64::MAX - WINDOW + 1..=u64::MAX) {
                    let found = |iotlb| Iotlb::lookup(iotlb, GuestAddress(base), 1, No).ok().and_then(|mut i| i.next());
                    if let Some(here) = found(&bounded) {
                        prop_assert_eq!(Some(here), found(&unbounded));
                    }
                }
                if let Step::Map { iova, length, .. } = *step {
                    prop_assert!(last_of(iova, length).is_none() || Iotlb::lookup(&bounded, GuestAddress(iova), length, No).is_ok());
                }
            }
            bounded.set_bound(None);
            prop_assert!(bounded.bound().is_none());
        }
    }

    /// B2: sums of addresses and lengths are checked, and the last page is a page like any other.
    #[test]
    fn b2_ranges_end_at_the_end_of_the_address_space_and_never_pass_it() {
        let mut iotlb = Iotlb::new();
        let last_page = GuestAddress(0xffff_ffff_ffff_f000);
        iotlb
            .set_mapping(last_page, GuestAddress(0x1000), 0x1000, ReadWrite)
            .unwrap();
        let found: Vec<_> = Iotlb::lookup(&iotlb, last_page, 0x1000, ReadWrite)
            .unwrap()
            .collect();
        assert_eq!(
            found,
            [MappedRange {
                base: GuestAddress(0x1000),
                length: 0x1000
            }]
        );

        let fails = Iotlb::lookup(&iotlb, last_page, 0x1001, Read).unwrap_err();
        assert!(fails.misses.is_empty());
        assert_eq!(
            fails.access_fails,
            [IovaRange {
                base: last_page,
                length: 0x1001
            }]
        );

        // Refused, and nothing is changed.
        let refused = iotlb
            .set_mapping(last_page, GuestAddress(0x8000), 0x1001, Read)
            .unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("0xfffffffffffff000-0x10000000000000000"),
            "{refused}"
        );
        assert!(Iotlb::lookup(&iotlb, last_page, 0x1000, Write).is_ok());

        // Cut at the top, not ignored.
        iotlb.invalidate_mapping(GuestAddress(0xffff_ffff_ffff_f800), usize::MAX);
        assert!(Iotlb::lookup(&iotlb, last_page, 0x800, Write).is_ok());
        assert!(Iotlb::lookup(&iotlb, last_page, 0x801, Write).is_err());
    }

    /// B2: nothing is a range too.
    #[test]
    fn b2_a_length_of_zero_is_empty() {
        let mut iotlb = Iotlb::new();
        iotlb
            .set_mapping(GuestAddress(0x1000), GuestAddress(0), 0, ReadWrite)
            .unwrap();
        iotlb
            .set_mapping(GuestAddress(u64::MAX), GuestAddress(0), 0, ReadWrite)
            .unwrap();
        iotlb.invalidate_mapping(GuestAddress(0), 0);
        assert_eq!(iotlb.mappings.len(), 0);
        for addr in [0, 0x1000, u64::MAX] {
            assert_eq!(
                Iotlb::lookup(&iotlb, GuestAddress(addr), 0, Read)
                    .unwrap()
                    .count(),
                0
            );
        }
    }

    /// However many pieces there are, they are found by one search: over leaves, too.
    #[test]
    fn a_lookup_and_its_iteration_make_one_search() {
        use crate::iommu::mapping_table::SEARCHES;
        let mut iotlb = Iotlb::new();
        for page in 0..1000u64 {
            iotlb
                .set_mapping(
                    GuestAddress(page * 0x1000),
                    GuestAddress(page * 0x3000),
                    0x1000,
                    ReadWrite,
                )
                .unwrap();
        }
        for first in [0, 120, 500, 984] {
            let before = SEARCHES.get();
            let found =
                Iotlb::lookup(&iotlb, GuestAddress(first * 0x1000), 0x1_0000, Read).unwrap();
            assert_eq!(found.count(), 16);
            assert_eq!(SEARCHES.get() - before, 1, "from page {first} on");
        }
    }

    /// A pointer whose target is exchanged between a lookup and its iteration: nothing wrong is handed out.
    #[test]
    fn an_iotlb_that_is_exchanged_ends_the_iteration() {
        use std::cell::Cell;
        let mut full = Iotlb::new();
        full.set_mapping(GuestAddress(0), GuestAddress(0x1000), 0x1000, Read)
            .unwrap();
        full.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Read)
            .unwrap();
        let empty = Iotlb::new();
        struct Switch<'a>(&'a Cell<bool>, &'a Iotlb, &'a Iotlb);
        impl Deref for Switch<'_> {
            type Target = Iotlb;
            fn deref(&self) -> &Iotlb {
                if self.0.get() {
                    self.2
                } else {
                    self.1
                }
            }
        }
        let switched = Cell::new(false);
        let mut pieces = Iotlb::lookup(
            Switch(&switched, &full, &empty),
            GuestAddress(0),
            0x2000,
            Read,
        )
        .unwrap();
        assert_eq!(pieces.next().map(|p| p.base), Some(GuestAddress(0x1000)));
        switched.set(true);
        assert_eq!(pieces.next(), None);
        switched.set(false);
        assert_eq!(pieces.next(), None);
    }
}
