//! [`Iotlb`]: the mappings that are known.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::ops::Deref;

use super::{Error, IotlbFails, IovaRange, MappedRange};
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
#[derive(Debug, Default)]
pub struct Iotlb {
    /// By first address. No two have an address in common.
    mappings: BTreeMap<u64, Mapping>,
    /// How many mappings are kept at most.
    bound: Option<NonZeroUsize>,
    /// When there is a bound: the age and the first address of every mapping, the oldest first.
    ages: BTreeSet<(u64, u64)>,
    /// The age of the next mapping.
    next_age: u64,
}

/// What the addresses from a first to a last one are mapped to.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    /// The last address: a range may end with the address space, where there is no next one.
    last: u64,
    /// What to add to an I/O virtual address, wrapping, for its guest physical address.
    offset: u64,
    permissions: Permissions,
    /// When it was made, or last grew: later is greater.
    age: u64,
}

impl Mapping {
    /// Whether two mappings that are neighbours are one.
    fn continues(&self, other: &Mapping) -> bool {
        self.offset == other.offset && self.permissions == other.permissions
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
    /// miss. A range that is in more pieces than the bound can never be found whole: an [`Iommu`](super::Iommu) must not ask for it for ever.
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
        self.ages = match bound {
            Some(_) => self
                .mappings
                .iter()
                .map(|(start, mapping)| (mapping.age, *start))
                .collect(),
            None => BTreeSet::new(),
        };
        self.evict();
    }

    /// Returns how many mappings are kept at most, if there is a bound.
    pub fn bound(&self) -> Option<NonZeroUsize> {
        self.bound
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
        self.remove(first, last);

        let mut start = first;
        let mut mapping = Mapping {
            last,
            offset: map_to.0.wrapping_sub(first),
            permissions: perm,
            age: self.next_age,
        };
        self.next_age = self.next_age.wrapping_add(1);
        if let Some((&before_start, before)) = self.mappings.range(..first).next_back() {
            if before.last.checked_add(1) == Some(first) && before.continues(&mapping) {
                start = before_start;
            }
        }
        if let Some(after_start) = last.checked_add(1) {
            if let Some(after) = self.mappings.get(&after_start) {
                if after.continues(&mapping) {
                    mapping.last = after.last;
                    self.take(after_start);
                }
            }
        }
        self.put(start, mapping);
        self.evict();
        Ok(())
    }

    /// Forgets how the `length` addresses from `iova` on are mapped. A range that passes 2^64 is cut there.
    pub fn invalidate_mapping(&mut self, iova: GuestAddress, length: usize) {
        if length != 0 {
            self.remove(iova.0, last_of(iova.0, length).unwrap_or(u64::MAX));
            // One mapping may have become two.
            self.evict();
        }
    }

    /// Forgets all mappings.
    pub fn invalidate_all(&mut self) {
        self.mappings.clear();
        self.ages.clear();
    }

    /// Looks up `length` addresses from `iova` on, for an access.
    ///
    /// `Permissions::No` finds whatever is mapped. 0 addresses are always found.
    ///
    /// # Errors
    ///
    /// If not all of them are mapped, or not all mappings permit the access: every part of which that is so. A range that passes
    /// 2^64 fails as a whole, in `access_fails`.
    pub fn lookup<D: Deref<Target = Iotlb>>(
        tlb: D,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<D>, IotlbFails> {
        if length == 0 {
            return Ok(IotlbIterator {
                tlb,
                rest: None,
                access,
            });
        }
        let Some(last) = last_of(iova.0, length) else {
            let whole = IovaRange { base: iova, length };
            return Err(IotlbFails {
                misses: Vec::new(),
                access_fails: vec![whole],
            });
        };
        match tlb.find_fails(iova.0, last, access) {
            None => Ok(IotlbIterator {
                tlb,
                rest: Some((iova.0, last)),
                access,
            }),
            Some(fails) => Err(fails),
        }
    }

    /// Adds a mapping, or replaces the one with that first address.
    fn put(&mut self, start: u64, mapping: Mapping) {
        let replaced = self.mappings.insert(start, mapping);
        if self.bound.is_some() {
            if let Some(replaced) = replaced {
                self.ages.remove(&(replaced.age, start));
            }
            self.ages.insert((mapping.age, start));
        }
    }

    /// Removes the mapping with that first address.
    fn take(&mut self, start: u64) {
        if let Some(taken) = self.mappings.remove(&start) {
            self.ages.remove(&(taken.age, start));
        }
    }

    /// Removes the oldest mappings, down to the bound.
    fn evict(&mut self) {
        let Some(bound) = self.bound else {
            return;
        };
        while self.mappings.len() > bound.get() {
            let Some((_, start)) = self.ages.pop_first() else {
                return;
            };
            self.mappings.remove(&start);
        }
    }

    /// The mapping of one address, and the first address that it has.
    fn mapping_at(&self, addr: u64) -> Option<(u64, &Mapping)> {
        let (&start, mapping) = self.mappings.range(..=addr).next_back()?;
        (addr <= mapping.last).then_some((start, mapping))
    }

    /// What keeps the addresses from `first` to `last` from being accessed, if anything does.
    fn find_fails(&self, first: u64, last: u64, access: Permissions) -> Option<IotlbFails> {
        let (mut misses, mut access_fails) = (Vec::new(), Vec::new());
        let mut next = first;
        let before = self.mapping_at(first).map(|(start, mapping)| (start, *mapping));
        let behind = match first.checked_add(1) {
            Some(after_first) if after_first <= last => Some(self.mappings.range(after_first..=last)),
            _ => None,
        };
        let others = behind
            .into_iter()
            .flatten()
            .map(|(start, mapping)| (*start, *mapping));
        let mut covered = false;
        for (start, mapping) in before.into_iter().chain(others) {
            let from = start.max(first);
            let to = mapping.last.min(last);
            if next < from {
                misses.push(range_of(next, from.wrapping_sub(1)));
            }
            if !mapping.permissions.allow(access) {
                access_fails.push(range_of(from, to));
            }
            match to.checked_add(1) {
                Some(after) if to < last => next = after,
                _ => {
                    covered = true;
                    break;
                }
            }
        }
        if !covered {
            misses.push(range_of(next, last));
        }
        (!misses.is_empty() || !access_fails.is_empty()).then_some(IotlbFails { misses, access_fails })
    }

    /// Removes the addresses from `first` to `last` from all mappings.
    fn remove(&mut self, first: u64, last: u64) {
        // The one that begins before the range may reach into it, or over all of it.
        if let Some((_, before)) = self.mappings.range_mut(..first).next_back() {
            let reaches = before.last;
            if reaches >= first {
                // `first` is above that mapping's start, so it is not 0.
                before.last = first.wrapping_sub(1);
                let rest = Mapping {
                    last: reaches,
                    ..*before
                };
                if let Some(after) = last.checked_add(1).filter(|after| *after <= reaches) {
                    self.put(after, rest);
                }
            }
        }
        while let Some((&start, &mapping)) = self.mappings.range(first..=last).next() {
            self.take(start);
            if let Some(after) = last.checked_add(1).filter(|after| *after <= mapping.last) {
                self.put(after, mapping);
            }
        }
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
    /// The first and the last address that are left.
    rest: Option<(u64, u64)>,
    access: Permissions,
}

impl<D: Deref<Target = Iotlb>> Iterator for IotlbIterator<D> {
    type Item = MappedRange;

    fn next(&mut self) -> Option<Self::Item> {
        let (first, last) = self.rest.take()?;
        let (_, mapping) = self.tlb.mapping_at(first)?;
        if !mapping.permissions.allow(self.access) {
            return None;
        }
        let to = mapping.last.min(last);
        self.rest = to.checked_add(1).filter(|_| to < last).map(|after| (after, last));
        Some(MappedRange {
            base: GuestAddress(first.wrapping_add(mapping.offset)),
            length: range_of(first, to).length,
        })
    }
}

/// Nothing is left after the end.
impl<D: Deref<Target = Iotlb>> core::iter::FusedIterator for IotlbIterator<D> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
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
                                .flat_map(|p| (0..p.length as u64).map(move |i| p.base.0.wrapping_add(i)))
                                .collect();
                            let expected: Vec<u64> = addresses(base, length).map(|a| model[&a].0).collect();
                            prop_assert_eq!(targets, expected);
                        }
                        Err(fails) => {
                            prop_assert_eq!(flat(&fails.misses), missing);
                            prop_assert_eq!(flat(&fails.access_fails), refused);
                            prop_assert!(!fails.misses.is_empty() || !fails.access_fails.is_empty());
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
                for ((_, a), (start, b)) in iotlb.mappings.iter().zip(iotlb.mappings.iter().skip(1)) {
                    prop_assert!(a.last < *start);
                    prop_assert!(a.last + 1 != *start || !a.continues(b));
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
                let ages: BTreeSet<_> = bounded.mappings.iter().map(|(start, m)| (m.age, *start)).collect();
                prop_assert_eq!(&ages, &bounded.ages);
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
            prop_assert!(bounded.ages.is_empty() && bounded.bound().is_none());
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
        assert!(iotlb.mappings.is_empty());
        for addr in [0, 0x1000, u64::MAX] {
            assert_eq!(
                Iotlb::lookup(&iotlb, GuestAddress(addr), 0, Read)
                    .unwrap()
                    .count(),
                0
            );
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
        let mut pieces =
            Iotlb::lookup(Switch(&switched, &full, &empty), GuestAddress(0), 0x2000, Read).unwrap();
        assert_eq!(pieces.next().map(|p| p.base), Some(GuestAddress(0x1000)));
        switched.set(true);
        assert_eq!(pieces.next(), None);
        switched.set(false);
        assert_eq!(pieces.next(), None);
    }
}
