//! [`SharedIotlb`]: an IOTLB that threads look up without a lock.

use core::fmt::{self, Debug};
use core::num::NonZeroUsize;
use core::ops::{Deref, RangeBounds};
use std::sync::Arc;
use std::time::Instant;

use super::counters::LookupCounters;
use super::iotlb::{span_at, span_of, NewMapping, Priority};
use super::mapping_table::Span;
use super::snapshots::{Replay, Snapshot, Snapshots};
use super::{
    CutMapping, Error, Iommu, Iotlb, IotlbCounters, IotlbFails, IotlbIterator, MapError, Mappings,
};
use crate::guest_memory::{Generation, GuestAddress, Permissions, TranslationHold};
use crate::retired::sync::Guard;
use crate::retired::{wait_until_unread, ReadersRemain, Version as _};

/// An [`Iotlb`] that threads look up without a lock, while others change it.
///
/// With a [bound](Self::set_bound), a failed lookup takes a lock, and so does the lookup that then
/// finds the range.
///
/// A lookup works on an immutable [snapshot](IotlbSnapshot). Its iterator keeps the snapshot, and
/// no change waits for it.
///
/// Clones are handles to the same IOTLB. `SharedIotlb` is an [`Iommu`] that uses the mappings it
/// has: a miss is an error. An [`AskingIommu`](super::AskingIommu) requests missing mappings, and
/// waits until they are set here.
///
/// # Invalidation
///
/// When [`invalidate_mapping`](Self::invalidate_mapping) returns, accesses that began before the
/// call may still use the mapping. The returned [`Invalidation`] reports when there are none. A
/// vhost-user back end acknowledges the invalidation then, and not before (vhost-user
/// specification, `VHOST_USER_IOTLB_MSG`).
///
/// # Costs
///
/// A lookup costs about as much as on an [`Iotlb`], plus the guard of the snapshot. A change is
/// applied to two tables in turn, so it takes twice as long as on an `Iotlb`. While readers keep
/// several snapshots (requests in flight), a change copies the groups of 128 mappings that it
/// touches.
///
/// A mapping takes 32 to 90 bytes in each of the two tables. Each snapshot that a reader keeps
/// takes 64 bytes for every 48 to 128 mappings, and 4 KiB for each group that has changed since. A
/// guest chooses the number of mappings and of requests in flight: a [bound](Self::set_bound) and
/// the sizes of the queues limit the memory. The memory of snapshots without readers is freed by
/// the next change, or when an `Invalidation` counts readers.
///
/// # Examples
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
/// let iova = GuestAddress(0x8000_0000);
/// iotlb.set_mapping(iova, GuestAddress(0x1000), 0x1000, Permissions::ReadWrite)?;
/// memory.write_obj(7u64, iova)?;
///
/// // A device is in the middle of a request.
/// let request = memory.get_slices(iova, 0x1000, Permissions::Write)?;
/// let invalidation = iotlb.invalidate_mapping(iova, 0x1000);
/// assert!(memory.read_obj::<u64>(iova).is_err());
/// assert!(!invalidation.is_done());
/// drop(request);
/// invalidation.wait(Instant::now() + Duration::from_secs(1))?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "RCU")]
#[doc(alias = "vhost-user")]
#[doc(alias = "vIOMMU")]
#[derive(Clone, Default)]
pub struct SharedIotlb {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    snapshots: Snapshots<Iotlb>,
    /// Tells windows of a change. Published after it, and before the caller continues.
    generation: Generation,
}

/// A change of an IOTLB.
#[derive(Debug)]
pub(super) enum Update {
    /// Maps addresses, and replaces existing mappings.
    Set(NewMapping),
    /// Maps addresses, unless one of them is mapped.
    Map(NewMapping),
    Invalidate(Option<Span>),
    /// Removes the mappings of a range, unless it cuts one.
    Unmap(Option<Span>),
    InvalidateAll,
    Bound(Option<NonZeroUsize>, Arc<Priority>),
    Count(Arc<LookupCounters>),
}

/// The reason why a change of an IOTLB was refused.
#[derive(Debug)]
pub(super) enum RefusedUpdate {
    Map(MapError),
    Unmap(CutMapping),
}

impl Replay for Iotlb {
    type Operation = Update;
    type Error = RefusedUpdate;

    fn apply(&mut self, update: &Update) -> Result<(), RefusedUpdate> {
        match *update {
            Update::Count(ref counters) => self.count_in(Arc::clone(counters)),
            Update::Set(ref new) => self.set(new),
            Update::Map(ref new) => return self.set_free(new).map_err(RefusedUpdate::Map),
            Update::Unmap(span) => return self.unmap_span(span).map_err(RefusedUpdate::Unmap),
            Update::Invalidate(None) => {}
            Update::Invalidate(Some(span)) => self.invalidate(span),
            Update::InvalidateAll => self.invalidate_all(),
            Update::Bound(bound, ref priority) => {
                self.set_bound_with(bound, Arc::clone(priority));
            }
        }
        Ok(())
    }

    fn operations_for_a_copy(&self) -> usize {
        // An operation takes about as long as 64 comparisons of leaves. After a copy, the next
        // operation copies the leaf that it changes, which takes as long as 3 operations.
        (self.leaves() / 64).saturating_add(3)
    }

    fn resolves(update: &Update) -> Option<(u64, u64, u8)> {
        match update {
            Update::Set(new) | Update::Map(new) => {
                let Span { first, last } = new.range;
                Some((first, last, new.permissions.bits()))
            }
            _ => None,
        }
    }
}

impl Inner {
    fn new(iotlb: Iotlb) -> Self {
        Self {
            snapshots: Snapshots::new(iotlb),
            generation: Generation::default(),
        }
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self::new(Iotlb::new())
    }
}

impl SharedIotlb {
    /// Creates an IOTLB without mappings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an IOTLB in which each mapping stays apart. See [`Iotlb::unmerged`].
    #[must_use]
    pub fn unmerged() -> Self {
        Self {
            inner: Arc::new(Inner::new(Iotlb::unmerged())),
        }
    }

    /// Returns the versions of the mappings.
    pub(super) fn snapshots(&self) -> &Snapshots<Iotlb> {
        &self.inner.snapshots
    }

    /// Translates the `length` addresses at `iova`, for an access, with the current mappings.
    ///
    /// `Permissions::No` finds any mapping. A range of 0 addresses is always found.
    ///
    /// # Errors
    ///
    /// Returns the parts that are not mapped, and the parts whose mappings do not permit the
    /// access. A range that passes 2^64 fails as a whole, in
    /// [`access_fails`](IotlbFails::access_fails).
    #[inline(always)]
    pub fn lookup(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, IotlbFails> {
        Iotlb::lookup(self.snapshot(), iova, length, access)
    }

    /// Returns a snapshot of the current mappings.
    ///
    /// Later [`Invalidation`]s wait for it.
    #[inline(always)]
    pub fn snapshot(&self) -> IotlbSnapshot {
        IotlbSnapshot {
            guard: self.inner.snapshots.load(),
        }
    }

    /// Maps the `length` addresses at `iova` to those at `map_to`, with the permissions `perm`.
    ///
    /// Replaces existing mappings of these addresses. In that case, this is also an invalidation:
    /// wait for the returned [`Invalidation`]. Does nothing if `length` is 0.
    ///
    /// # Errors
    ///
    /// Returns [`Error::CannotResolve`] if the range at `iova` or the one at `map_to` passes 2^64.
    /// The IOTLB is then unchanged.
    #[doc(alias = "VHOST_IOTLB_UPDATE")]
    pub fn set_mapping(
        &self,
        iova: GuestAddress,
        map_to: GuestAddress,
        length: usize,
        perm: Permissions,
    ) -> Result<Invalidation, Error> {
        // Checked once, before the update: both tables apply the same update.
        let new = self.snapshot().announce(iova, map_to, length, perm)?;
        Ok(self.update(new.map_or(Update::Invalidate(None), Update::Set)))
    }

    /// Maps a range of addresses to those at `target`, unless one of them is mapped already. See
    /// [`Iotlb::map_range`].
    ///
    /// No other change comes between the check and the mapping. Nothing is removed, so there is no
    /// invalidation to wait for.
    ///
    /// To limit the number of mappings, compare `snapshot().entries()` with the limit first. Each
    /// other thread that maps at the same time may exceed the limit by one mapping.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Iotlb::map_range`]. The IOTLB is then unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::iommu::{MapError, SharedIotlb};
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let iotlb = SharedIotlb::unmerged();
    /// let at = GuestAddress;
    /// iotlb.map_range(at(0x1000)..=at(0x1fff), at(0x9000), Permissions::Read)?;
    /// let error = iotlb.map_range(at(0)..=at(u64::MAX), at(0), Permissions::Read).unwrap_err();
    /// assert!(matches!(error, MapError::Overlap { mapping } if mapping.first == at(0x1000)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "VIRTIO_IOMMU_T_MAP")]
    pub fn map_range(
        &self,
        range: impl RangeBounds<GuestAddress>,
        target: GuestAddress,
        permissions: Permissions,
    ) -> Result<(), MapError> {
        let new = self
            .snapshot()
            .announce_range(&range, target, permissions)?;
        match self.apply(Update::Map(new)) {
            Err(RefusedUpdate::Map(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the mappings of the `length` addresses at `iova`.
    ///
    /// A range that passes 2^64 ends there. Accesses that began before the call may still use the
    /// mappings: wait for the returned [`Invalidation`].
    #[doc(alias = "VHOST_IOTLB_INVALIDATE")]
    #[must_use = "until it is done, a device may use the removed mapping"]
    pub fn invalidate_mapping(&self, iova: GuestAddress, length: usize) -> Invalidation {
        self.update(Update::Invalidate(span_at(iova, length)))
    }

    /// Removes the mappings of a range of addresses. See [`Iotlb::invalidate_range`].
    ///
    /// Accesses that began before the call may still use the mappings: wait for the returned
    /// [`Invalidation`].
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use vm_memory::iommu::SharedIotlb;
    /// use vm_memory::GuestAddress;
    ///
    /// let iotlb = SharedIotlb::new();
    /// // A request with a first and a last address, which the guest chooses.
    /// let (first, last) = (GuestAddress(0), GuestAddress(u64::MAX));
    /// let invalidation = iotlb.invalidate_range(first..=last);
    /// invalidation.wait(Instant::now() + Duration::from_secs(1))?;
    /// # Ok::<(), vm_memory::iommu::ReadersRemain>(())
    /// ```
    #[doc(alias = "VHOST_IOTLB_INVALIDATE")]
    #[must_use = "until it is done, a device may use the removed mapping"]
    pub fn invalidate_range(&self, range: impl RangeBounds<GuestAddress>) -> Invalidation {
        self.update(Update::Invalidate(span_of(&range)))
    }

    /// Removes the mappings of a range of addresses, unless the range cuts one of them. See
    /// [`Iotlb::unmap`].
    ///
    /// No other change comes between the check and the removal. Accesses that began before the call
    /// may still use the mappings: wait for the returned [`Invalidation`] before the device
    /// responds. If the wait ends at its deadline, the mappings are removed, but may be in use. Let
    /// the request fail (`VIRTIO_IOMMU_S_DEVERR`): a driver that repeats it waits for the same
    /// accesses.
    ///
    /// # Errors
    ///
    /// Returns [`CutMapping`] if the range contains only a part of a mapping. The IOTLB is then
    /// unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use vm_memory::iommu::SharedIotlb;
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let iotlb = SharedIotlb::unmerged();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x2000, Permissions::Read)?;
    /// let cut = iotlb.unmap(GuestAddress(0x2000)..=GuestAddress(0x2fff)).unwrap_err();
    /// assert_eq!(
    ///     cut.to_string(),
    ///     "the range cuts the mapping 0x1000-0x2fff; unmap all of that mapping"
    /// );
    ///
    /// let invalidation = iotlb.unmap(GuestAddress(0)..=GuestAddress(u64::MAX))?;
    /// invalidation.wait(Instant::now() + Duration::from_secs(1))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "VIRTIO_IOMMU_T_UNMAP")]
    pub fn unmap(&self, range: impl RangeBounds<GuestAddress>) -> Result<Invalidation, CutMapping> {
        match self.apply(Update::Unmap(span_of(&range))) {
            Err(RefusedUpdate::Unmap(cut)) => Err(cut),
            outcome => Ok(outcome.unwrap_or_else(|_| self.all_readers())),
        }
    }

    /// Removes all mappings.
    ///
    /// Accesses that began before the call may still use them: wait for the returned
    /// [`Invalidation`].
    #[must_use = "until it is done, a device may use the removed mapping"]
    pub fn invalidate_all(&self) -> Invalidation {
        self.update(Update::InvalidateAll)
    }

    /// Limits the number of mappings. `None`, the default, permits any number.
    ///
    /// The oldest mappings are evicted. See [`Iotlb::set_bound`].
    pub fn set_bound(&self, bound: Option<NonZeroUsize>) {
        self.update(Update::Bound(bound, Arc::default()));
    }

    /// Returns the most permissive access that all of the `length` addresses at `iova` permit.
    ///
    /// Returns `None` if one of them is not mapped, or if the range passes 2^64.
    ///
    /// # Examples
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

    /// Returns the current mappings that have an address in `range`. See [`Iotlb::mappings`].
    ///
    /// The iterator keeps a [snapshot](Self::snapshot).
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::iommu::SharedIotlb;
    /// use vm_memory::{GuestAddress, Permissions};
    ///
    /// let iotlb = SharedIotlb::new();
    /// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0x9000), 0x2000, Permissions::Read)?;
    /// let mapping = iotlb.mappings(GuestAddress(0x1800)..).next().unwrap();
    /// assert_eq!((mapping.first.0, mapping.last.0, mapping.target.0), (0x1000, 0x2fff, 0x9000));
    /// # Ok::<(), vm_memory::iommu::Error>(())
    /// ```
    pub fn mappings(&self, range: impl RangeBounds<GuestAddress>) -> Mappings<IotlbSnapshot> {
        Mappings::new(self.snapshot(), &range)
    }

    /// Starts counting [lookups](Self::lookup) and [translations](Iommu::translate). This includes
    /// lookups in [snapshots](Self::snapshot) that are created later.
    ///
    /// Each count is an atomic addition. Up to 16 threads count in separate cache lines.
    pub fn count_lookups(&self) {
        if !self.snapshot().counts() {
            // If several threads do this at the same time, the first one's counters stay.
            self.update(Update::Count(Arc::default()));
        }
    }

    /// Returns the number of lookups, evictions and mappings.
    pub fn counters(&self) -> IotlbCounters {
        self.snapshot().counters()
    }

    fn update(&self, update: Update) -> Invalidation {
        // Only `Update::Map` and `Update::Unmap` can fail.
        self.apply(update).unwrap_or_else(|_| self.all_readers())
    }

    /// Returns a handle to all readers, for an outcome that the kind of an update excludes.
    #[cold]
    fn all_readers(&self) -> Invalidation {
        Invalidation {
            iotlb: self.clone(),
            version: u64::MAX,
        }
    }

    fn apply(&self, update: Update) -> Result<Invalidation, RefusedUpdate> {
        let version = self.inner.snapshots.apply(update)?;
        self.inner.generation.publish(version);
        Ok(Invalidation {
            iotlb: self.clone(),
            version,
        })
    }
}

/// An IOMMU that only uses the mappings it has: a miss is an error.
impl Iommu for SharedIotlb {
    type IotlbGuard<'a> = IotlbSnapshot;

    #[inline(always)]
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, Error> {
        Iotlb::lookup_with(self.snapshot(), iova, length, access, |fails| {
            fails.into_error(iova, length, access)
        })
    }

    fn current_iotlb(&self) -> Option<IotlbSnapshot> {
        Some(self.snapshot())
    }

    fn hold_translation(&self) -> Option<TranslationHold> {
        // The hold is older than the translations. So a change after a translation waits for it.
        let snapshot = Guard::into_inner(self.inner.snapshots.load());
        let (generation, version) = (&self.inner.generation, snapshot.number());
        Some(TranslationHold::of_change(snapshot, generation, version))
    }
}

impl Debug for SharedIotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedIotlb")
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// An immutable version of the mappings of a [`SharedIotlb`].
///
/// Iterators over translated memory keep a snapshot. As long as it exists, no [`Invalidation`] that
/// was created later is done.
///
/// # Examples
///
/// ```
/// use vm_memory::iommu::SharedIotlb;
/// use vm_memory::{GuestAddress, Permissions};
///
/// let iotlb = SharedIotlb::new();
/// iotlb.set_mapping(GuestAddress(0x1000), GuestAddress(0), 0x1000, Permissions::Read)?;
/// let snapshot = iotlb.snapshot();
///
/// let invalidation = iotlb.invalidate_all();
/// assert_eq!((iotlb.snapshot().entries(), snapshot.entries()), (0, 1));
/// assert_eq!(invalidation.readers(), 1);
/// # Ok::<(), vm_memory::iommu::Error>(())
/// ```
pub struct IotlbSnapshot {
    guard: Guard<Snapshot<Iotlb>>,
}

impl IotlbSnapshot {
    /// Returns the number of changes before it.
    pub(super) fn version(&self) -> u64 {
        self.guard.number()
    }
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

/// A handle to the readers from before a change of a [`SharedIotlb`].
///
/// Readers are iterators over translated memory and [snapshots](IotlbSnapshot) that were created
/// before the change. While there is one, a device may use a mapping that the change removed.
///
/// Slices that were collected from an iterator and outlive it are not counted: drop them first.
///
/// # Examples
///
/// See [`SharedIotlb`].
#[derive(Clone, Debug)]
pub struct Invalidation {
    iotlb: SharedIotlb,
    version: u64,
}

impl Invalidation {
    /// Returns the number of readers (iterators and snapshots) from before the change.
    ///
    /// The count rises only when a reader is cloned. Once it is 0, it stays 0, and all accesses of
    /// those readers happen before this returns.
    pub fn readers(&self) -> usize {
        self.iotlb.inner.snapshots.readers_before(self.version)
    }

    /// Returns whether there are no readers from before the change.
    pub fn is_done(&self) -> bool {
        self.readers() == 0
    }

    /// Waits until there are no readers from before the change, or until `deadline`.
    ///
    /// Readers send no notification, so that reading costs nothing. This function polls, and sleeps
    /// up to a millisecond between two checks.
    ///
    /// # Errors
    ///
    /// Returns [`ReadersRemain`] if there are readers at the deadline. A thread that waits for its
    /// own reader also gets this error.
    pub fn wait(&self, deadline: Instant) -> Result<(), ReadersRemain> {
        wait_until_unread(deadline, || self.readers())
    }
}
