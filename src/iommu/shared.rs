//! [`SharedIotlb`]: an IOTLB that threads look into without a lock.

use core::fmt::{self, Debug};
use core::num::NonZeroUsize;
use core::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use super::counters::LookupCounters;
use super::snapshots::{Replay, Snapshot, Snapshots};
use super::{Error, Iommu, Iotlb, IotlbCounters, IotlbFails, IotlbIterator};
use crate::guest_memory::{GuestAddress, Permissions, TranslationHold};
use crate::retired::sync::Guard;
use crate::retired::{wait_until_unread, StillRead};

/// An [`Iotlb`] that many threads look into while others change it, without a lock.
///
/// Who looks works on a snapshot, which stays as it is while bytes move through it; no change waits for that. What was invalidated may
/// therefore still be in use when [`invalidate_mapping`](Self::invalidate_mapping) returns: the [`Invalidation`] that it returns tells when it is not.
/// A vhost-user back end acknowledges an invalidation then, and not before (vhost-user specification, `VHOST_USER_IOTLB_MSG`).
///
/// Clones are handles to the same IOTLB. It is an [`Iommu`] by itself, one that knows what it was told and asks nobody; for one that asks, call
/// [`lookup`](Self::lookup) in a [`translate`](Iommu::translate) of your own.
///
/// A change is done on two snapshots in turn, so it takes twice as long as on an [`Iotlb`]. While readers keep several of them (requests in flight), the next
/// one is made from the last, and shares with it what does not change, 128 mappings or less at a time: with 10 000 mappings a change takes two
/// to four times as long then, however many are kept.
///
/// A mapping takes 32 to 90 bytes, twice: there are two tables. Each snapshot that is kept takes 48 bytes for every 48 to 128 mappings, and 4 KiB for each part
/// that has changed since. A guest chooses how many mappings there are and how many requests are in flight: a [bound](Self::set_bound) and the size of
/// the queues bound the memory. What is not kept any more is given back with the next change, or when an [`Invalidation`] is asked.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::time::{Duration, Instant};
/// use vm_memory::iommu::{IommuMemory, SharedIotlb};
/// use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
///
/// let physical: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])?;
/// let iotlb = SharedIotlb::new();
/// let memory = IommuMemory::new(physical, iotlb.clone(), true, ());
///
/// iotlb.set_mapping(GuestAddress(0x8000_0000), GuestAddress(0x1000), 0x1000, Permissions::ReadWrite)?;
/// memory.write_obj(7u64, GuestAddress(0x8000_0010))?;
///
/// // A device is in the middle of a request.
/// let request = memory.get_slices(GuestAddress(0x8000_0000), 0x1000, Permissions::Write)?;
/// let gone = iotlb.invalidate_mapping(GuestAddress(0x8000_0000), 0x1000);
/// assert!(memory.read_obj::<u64>(GuestAddress(0x8000_0010)).is_err());
/// assert!(!gone.is_done());
/// drop(request);
/// gone.wait(Instant::now() + Duration::from_secs(1))?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct SharedIotlb {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    snapshots: Snapshots<Iotlb>,
}

/// What changes an IOTLB.
#[derive(Debug)]
pub(super) enum Change {
    Map(GuestAddress, GuestAddress, usize, Permissions),
    Forget(GuestAddress, usize),
    ForgetAll,
    Bound(Option<NonZeroUsize>),
    Count(Arc<LookupCounters>),
}

impl Replay for Iotlb {
    type Operation = Change;
    type Error = Error;

    fn apply(&mut self, change: &Change) -> Result<(), Error> {
        match *change {
            Change::Count(ref counters) => self.count_in(Arc::clone(counters)),
            Change::Map(iova, map_to, length, permissions) => {
                return self.set_mapping(iova, map_to, length, permissions);
            }
            Change::Forget(iova, length) => self.invalidate_mapping(iova, length),
            Change::ForgetAll => self.invalidate_all(),
            Change::Bound(bound) => self.set_bound(bound),
        }
        Ok(())
    }

    fn operations_for_a_copy(&self) -> usize {
        // Measured: an operation takes about a hundred nanoseconds, and a leaf that both have one. The leaf that is changed next is copied then.
        (self.leaves() / 64).saturating_add(3)
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            snapshots: Snapshots::new(Iotlb::new()),
        }
    }
}

impl SharedIotlb {
    /// Makes an IOTLB without mappings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks up `length` addresses from `iova` on, for an access: [`Iotlb::lookup`] on the snapshot of the moment.
    ///
    /// # Errors
    ///
    /// As there.
    #[inline(always)]
    pub fn lookup(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, IotlbFails> {
        Iotlb::counted_lookup(self.snapshot(), iova, length, access)
    }

    /// Returns the IOTLB as it is now. It stays so, and an [`Invalidation`] made while it is kept waits for it.
    #[inline(always)]
    pub fn snapshot(&self) -> IotlbSnapshot {
        IotlbSnapshot {
            guard: self.inner.snapshots.load(),
        }
    }

    /// Maps addresses: see [`Iotlb::set_mapping`]. Where others were mapped before, that is an invalidation, too.
    ///
    /// # Errors
    ///
    /// As there; nothing has changed then.
    pub fn set_mapping(
        &self,
        iova: GuestAddress,
        map_to: GuestAddress,
        length: usize,
        perm: Permissions,
    ) -> Result<Invalidation, Error> {
        let version = self
            .inner
            .snapshots
            .apply(Change::Map(iova, map_to, length, perm))?;
        Ok(self.invalidation(version))
    }

    /// Forgets how addresses are mapped: see [`Iotlb::invalidate_mapping`]. Returns what tells when nobody uses what they were mapped to.
    #[must_use = "until it is done, a device may be using what was mapped before"]
    pub fn invalidate_mapping(&self, iova: GuestAddress, length: usize) -> Invalidation {
        self.change(Change::Forget(iova, length))
    }

    /// Forgets all mappings.
    #[must_use = "until it is done, a device may be using what was mapped before"]
    pub fn invalidate_all(&self) -> Invalidation {
        self.change(Change::ForgetAll)
    }

    /// Keeps no more than `bound` mappings from now on: see [`Iotlb::set_bound`].
    pub fn set_bound(&self, bound: Option<NonZeroUsize>) {
        self.change(Change::Bound(bound));
    }

    /// Returns what all of the `length` addresses from `iova` on permit: see [`Iotlb::granted`].
    ///
    /// ```
    /// use vm_memory::iommu::SharedIotlb;
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
    /// assert_eq!(iotlb.granted(GuestAddress(0x1800), 8), Some(Permissions::Read));
    /// assert_eq!(iotlb.granted(GuestAddress(0x2000), 8), None);
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn granted(&self, iova: GuestAddress, length: usize) -> Option<Permissions> {
        self.snapshot().granted(iova, length)
    }

    /// Counts [lookups](Self::lookup) and [translations](Iommu::translate) from now on, at the cost of an addition for each, in a place of the thread's own. Of those
    /// in a [snapshot](Self::snapshot), [`Iotlb::counted_lookup`] counts.
    pub fn count_lookups(&self) {
        if !self.snapshot().counts() {
            // Of several at the same time, the first one stays.
            self.change(Change::Count(Arc::default()));
        }
    }

    /// Returns what it has done so far.
    pub fn counters(&self) -> IotlbCounters {
        self.snapshot().counters()
    }

    fn change(&self, change: Change) -> Invalidation {
        // Only a mapping can be refused.
        let version = self.inner.snapshots.apply(change).unwrap_or(u64::MAX);
        self.invalidation(version)
    }

    fn invalidation(&self, version: u64) -> Invalidation {
        Invalidation {
            iotlb: self.clone(),
            version,
        }
    }
}

/// Knows what it was told, and asks nobody: what is missing is an error.
impl Iommu for SharedIotlb {
    type IotlbGuard<'a> = IotlbSnapshot;

    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, Error> {
        Iotlb::look(
            self.snapshot(),
            iova,
            length,
            access,
            Iotlb::count,
            |fails| fails.into_error(iova, length, access),
        )
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        // Made before the translations, it is older than every change that they are older than.
        let snapshot = Guard::into_inner(self.inner.snapshots.load());
        Some(TranslationHold::of(snapshot))
    }
}

impl Debug for SharedIotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedIotlb")
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// A [`SharedIotlb`] as it was at one moment.
///
/// It is what iterators of translated memory hold on to. As long as it is kept, no [`Invalidation`] made after it is done.
pub struct IotlbSnapshot {
    guard: Guard<Snapshot<Iotlb>>,
}

impl Deref for IotlbSnapshot {
    type Target = Iotlb;

    #[inline(always)]
    fn deref(&self) -> &Iotlb {
        self.guard.value()
    }
}

impl Debug for IotlbSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&**self, f)
    }
}

/// Tells when nobody uses what was mapped before a change of a [`SharedIotlb`].
///
/// Iterators over translated memory and [snapshots](IotlbSnapshot) made before the change keep it from being done. Slices that were collected from an iterator, and
/// live on without it, do not: drop those first.
#[derive(Clone, Debug)]
pub struct Invalidation {
    iotlb: SharedIotlb,
    version: u64,
}

impl Invalidation {
    /// Returns the number of readers (iterators and snapshots) from before the change.
    ///
    /// The count rises only when a reader is cloned. At 0 it stays 0, and all accesses of those
    /// readers happen before this returns.
    pub fn readers(&self) -> usize {
        self.iotlb.inner.snapshots.readers_before(self.version)
    }

    /// Returns whether there are no readers from before the change.
    pub fn is_done(&self) -> bool {
        self.readers() == 0
    }

    /// Waits until there are no readers from before the change, and no longer than until `deadline`.
    ///
    /// Readers send no notification when they go, so that reading costs nothing. This polls, and
    /// sleeps up to a millisecond in between.
    ///
    /// # Errors
    ///
    /// Returns [`StillRead`] if there are readers at the deadline. A thread that waits for a reader
    /// of its own gets this error, too.
    pub fn wait(&self, deadline: Instant) -> Result<(), StillRead> {
        wait_until_unread(deadline, || self.readers())
    }
}
