//! [`RetiredList`]: the retired versions of one value.
//!
//! # Counting readers
//!
//! A writer swaps in the new version and then retires the old one. Before arc-swap's `swap`
//! returns, it adds every reader that has loaded the old pointer to its count. No reader loads that
//! pointer afterwards, and none upgrades a `Weak` of an old version (`RetiredMap`). So a count in
//! the list can rise only when an existing reader is cloned, and a count that has fallen to zero
//! stays there. Counts may therefore be read one after the other.
//!
//! A weak pointer of a user to a memory map breaks this rule, as long as a handle keeps the map. An
//! exact count of weak pointers would need their lock (`Arc::get_mut`), which the list's own weak
//! pointer excludes. The documentation of `RetiredMap` says what to do. No user gets a pointer to a
//! snapshot of an IOTLB.
//!
//! # Ordering
//!
//! A reader releases its count with a release operation. The list loads counts with relaxed
//! operations and issues an acquire fence before it unlocks. Each load that found no reader read a
//! value of the release sequence that the last reader's decrement heads. So all accesses of those
//! readers happen before the fence, and before whatever the caller does next.
//!
//! A reader may be gone before `swap` looks for it, and is then never counted. It has cleared its
//! slot in arc-swap by a sequentially consistent read-modify-write. All changes of a slot are such
//! operations. The sequentially consistent load of `swap` reads a value of the release sequence
//! that the reader's operation heads. So the accesses of that reader happen before `swap` returns.
//!
//! A version that has no reader may be taken out of the list. A later caller does not load its
//! count; it locks the list after the thread that took the version out. That thread's fence comes
//! before its unlock, so the readers' accesses also happen before those of the later caller.
//!
//! # Versions that are not in the list yet
//!
//! Between the swap and the call of [`RetiredList::retire`], the old version is in no list. No
//! thread waits for it yet: the only waits that include it are for the change that is being made.
//! A version that [`RetiredList::retire`] returns has no reader, so no wait misses it either.
//!
//! A writer need not retire a version that has no reader after the swap. The writer issues the
//! acquire fence before it unlocks. A wait that includes the version is for this change or for a
//! later one. A later change takes the writer's lock afterwards, so the readers' accesses happen
//! before that wait returns.

use super::sync::{fence, lock, Mutex, Ordering};

/// A pointer to a version, as a [`RetiredList`] keeps it.
pub(crate) trait Version {
    /// The number of versions without readers that a list keeps for reuse.
    const SPARES: usize;

    /// Returns the number of this version. Numbers ascend from change to change.
    fn number(&self) -> u64;

    /// Returns the number of readers, loaded with relaxed operations.
    ///
    /// The pointer in the list is not a reader. Once this has returned 0, it always does.
    fn readers(&self) -> usize;
}

/// Versions without readers, taken out of a list. Drop them while holding no lock.
#[derive(Debug)]
#[must_use = "dropping it may free many objects; release the writer's lock first"]
#[cfg_attr(
    not(feature = "iommu"),
    expect(dead_code, reason = "memory maps are not reused, only dropped")
)]
pub(crate) struct Unread<V> {
    /// The newest one, for reuse.
    pub(crate) spare: Option<V>,
    /// The other versions, which are not needed any more.
    pub(crate) surplus: Vec<V>,
}

/// The retired versions of one value that may still have readers, the oldest first.
///
/// The lock is held only to walk the list, so counting readers never waits for a change.
#[derive(Debug)]
pub(crate) struct RetiredList<V> {
    versions: Mutex<Vec<V>>,
}

impl<V: Version> RetiredList<V> {
    /// Creates an empty list.
    pub(crate) fn new() -> Self {
        Self {
            versions: Mutex::new(Vec::new()),
        }
    }

    /// Adds a version that was just replaced, and takes out versions without readers.
    ///
    /// The number of the version must be higher than those in the list.
    pub(crate) fn retire(&self, version: V) -> Unread<V> {
        let mut versions = lock(&self.versions);
        versions.push(version);
        let unread = Unread {
            spare: take_newest_unread(&mut versions),
            surplus: take_surplus(&mut versions),
        };
        // After the last load of a count, and before the unlock: see the module.
        fence(Ordering::Acquire);
        unread
    }

    /// Takes out the newest version that has no reader, for reuse.
    #[cfg(feature = "iommu")]
    pub(crate) fn take_unread(&self) -> Option<V> {
        let mut versions = lock(&self.versions);
        let spare = take_newest_unread(&mut versions);
        fence(Ordering::Acquire);
        spare
    }

    /// Returns the number of readers of versions with numbers below `number`.
    ///
    /// Once this returns 0, it always does, and all accesses of the former readers happen before it
    /// returns.
    pub(crate) fn readers_before(&self, number: u64) -> usize {
        let mut versions = lock(&self.versions);
        let readers = versions
            .iter()
            .filter(|version| version.number() < number)
            .map(Version::readers)
            .fold(0, usize::saturating_add);
        let surplus = take_surplus(&mut versions);
        // After the last load of a count, and before the unlock: see the module.
        fence(Ordering::Acquire);
        drop(versions);
        // Dropped without the lock: this may free many objects.
        drop(surplus);
        readers
    }

    /// Returns the number of versions in the list.
    #[cfg(all(test, feature = "backend-mmap", feature = "backend-atomic"))]
    pub(crate) fn len(&self) -> usize {
        lock(&self.versions).len()
    }
}

/// Takes out the newest version without readers.
fn take_newest_unread<V: Version>(versions: &mut Vec<V>) -> Option<V> {
    let newest = versions
        .iter()
        .rposition(|version| version.readers() == 0)?;
    Some(versions.remove(newest))
}

/// Takes out the versions without readers, except for the newest [`Version::SPARES`].
fn take_surplus<V: Version>(versions: &mut Vec<V>) -> Vec<V> {
    let is_unread = |version: &V| version.readers() == 0;
    let unread = versions.iter().filter(|version| is_unread(version)).count();
    let mut surplus = unread.saturating_sub(V::SPARES);
    if surplus == 0 {
        return Vec::new();
    }
    versions
        .extract_if(.., |version| {
            let taken = surplus != 0 && is_unread(version);
            surplus = surplus.saturating_sub(usize::from(taken));
            taken
        })
        .collect()
}
