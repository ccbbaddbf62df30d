//! [`RetiredMap`]: a map that was replaced, and its readers.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Instant;

use super::listeners::{regions_without, OnError};
use super::{GuestMemoryAtomic, Writers};
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::listeners::{refuse_in_listener, ListenerError};
use crate::retired::sync::lock;
use crate::retired::{wait_until_unread, ReadersRemain, RetiredHandle};

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Replaces the map by the one that `change` returns, as one change.
    ///
    /// Readers see all of the change or nothing, and do not wait. Other writers wait, so no change
    /// is lost.
    ///
    /// Returns the replaced map. It reports when it and all maps before it have no readers.
    ///
    /// If `change` fails or panics, the map and the lock stay as they were.
    ///
    /// # Deadlocks
    ///
    /// Writers of one memory exclude each other. Do not call this, or [`lock`](Self::lock), from
    /// within `change`. Do not call this while holding a guard of [`lock`](Self::lock).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use std::time::{Duration, Instant};
    /// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
    /// use vm_memory::{GuestMemoryMmap, GuestRegionMmap};
    ///
    /// let ranges = [(GuestAddress(0), 0x1000)];
    /// let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::from_ranges(&ranges)?);
    /// let device = memory.clone();
    /// let busy = device.memory();
    ///
    /// // Adds two regions and removes one, in one change.
    /// let region =
    ///     |start| GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).map(Arc::new);
    /// let (first, second) = (region(0x1000)?, region(0x2000)?);
    /// let old = memory.update(|map| {
    ///     let map = map.insert_region(first)?.insert_region(second)?;
    ///     map.remove_region(GuestAddress(0), 0x1000).map(|(map, _)| map)
    /// })?;
    /// assert_eq!(memory.memory().num_regions(), 2);
    ///
    /// // The device still uses the old map.
    /// let soon = || Instant::now() + Duration::from_millis(5);
    /// assert_eq!(old.wait(soon()).unwrap_err().readers, 1);
    /// drop(busy);
    /// old.wait(soon())?;
    /// let map = old.into_map().expect("the map has no readers");
    /// drop(map); // unmaps the region at 0
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Returns [`UpdateError::Change`] with the error of `change`. Returns
    /// [`UpdateError::Listener`] if a listener refuses the map, or calls this.
    #[doc(alias = "hotplug")]
    #[doc(alias = "RCU")]
    pub fn update<E>(
        &self,
        change: impl FnOnce(&M) -> Result<M, E>,
    ) -> Result<RetiredMap<M>, UpdateError<E>> {
        refuse_in_listener()?;
        let mut version = lock(&self.writers.version);
        let current = self.map.load();
        let map = match catch_unwind(AssertUnwindSafe(|| change(&current))) {
            Ok(map) => map.map_err(UpdateError::Change)?,
            Err(panic) => {
                // Nothing has changed yet. Unlock first, because unwinding would poison the lock.
                drop(version);
                resume_unwind(panic)
            }
        };
        drop(current);
        let old = self.publish(Arc::new(map), OnError::Undo)?;
        let (handle, retired) = RetiredHandle::new(*version, old);
        let unread = retired.map(|retired| self.writers.retired.retire(retired));
        *version = version.saturating_add(1);
        let replaced_by = *version;
        self.writers.generation.publish(replaced_by);
        drop(version);
        drop(unread);
        Ok(RetiredMap {
            handle,
            replaced_by,
            writers: Arc::clone(&self.writers),
        })
    }
}

/// A map that was not replaced by [`GuestMemoryAtomic::update`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError<E> {
    /// The error of the function that makes the new map.
    #[error(transparent)]
    Change(E),
    /// A [listener](crate::listeners) refused the new map.
    #[error(transparent)]
    Listener(#[from] ListenerError),
}

/// A map that was replaced by [`GuestMemoryAtomic::update`].
///
/// A region that was removed from the memory is in use as long as this map, or any map before it,
/// has a reader. Until then, do not discard its pages, do not reuse them for another guest, and do
/// not report the removal to the device.
///
/// Maps before this one count because they may have the same region. This includes maps that were
/// replaced by [`replace`](super::GuestMemoryExclusiveGuard::replace):
///
/// ```text
///   map 1 {A, B} ◄── guard of a device      map 2 {A, B, C}      map 3 {A, C}
///        └── update: add C ────────────────────┘ └── update: remove B ──┘
///                                the RetiredMap of map 2 waits for that guard: it may read B
/// ```
///
/// These are readers:
///
/// - a [guard](super::GuestMemoryLoadGuard),
/// - a [cached reader](super::GuestMemoryReader) that has not called `memory` since,
/// - any other owner of an `Arc` of the map, such as an `IoBuffer` in flight.
///
/// A `RetiredMap` is not a reader. If it is dropped, its map lives until the last reader is gone.
///
/// A clone of a map is another map with the same regions. Its owner can access a removed region
/// after the wait. An `IommuMemory` owns such a clone: share the whole `IommuMemory` as a
/// `GuestMemoryAtomic`, as the example of `IommuMemory::with_replaced_backend` does.
///
/// # Weak pointers
///
/// A [`Weak`](std::sync::Weak) pointer to a map is not a reader, since it cannot access the map.
/// But it can be upgraded as long as the `RetiredMap` of that map exists. The new `Arc` is a reader
/// that a wait may miss, if the upgrade comes after the last other reader.
///
/// So if `Weak` pointers exist, a wait is not the end of all accesses. After the wait, call
/// [`into_map`](Self::into_map), also for the maps before this one that have a `RetiredMap`. If it
/// succeeds, no pointer to the map exists, and no `Weak` pointer can be upgraded any more.
///
/// # Examples
///
/// See [`GuestMemoryAtomic::update`].
#[derive(Debug)]
#[doc(alias = "unplug")]
#[doc(alias = "grace period")]
pub struct RetiredMap<M: GuestMemory> {
    handle: RetiredHandle<M>,
    /// The version that replaced this one.
    replaced_by: u64,
    writers: Arc<Writers<M>>,
}

impl<M: GuestMemory> RetiredMap<M> {
    /// Returns the map.
    ///
    /// The reference is not counted as a reader.
    pub fn map(&self) -> &M {
        self.handle.value()
    }

    /// Returns the regions that a later map, such as the current one, no longer has.
    ///
    /// A region is known by its place in memory: maps share the regions that stay.
    pub fn removed_regions(&self, later: &M) -> Vec<&M::R>
    where
        M: GuestMemoryBackend,
    {
        regions_without(self.map(), later)
    }

    /// Returns the regions that a later map, such as the current one, has in addition.
    pub fn added_regions<'a>(&self, later: &'a M) -> Vec<&'a M::R>
    where
        M: GuestMemoryBackend,
    {
        regions_without(later, self.map())
    }

    /// Returns the number of readers of this map and of the maps before it.
    ///
    /// The count rises only when a reader is cloned, or a [`Weak`
    /// pointer](RetiredMap#weak-pointers) is upgraded. Without upgrades, it stays 0 once it is 0.
    /// All accesses of the readers that are gone happen before this returns.
    pub fn readers(&self) -> usize {
        self.writers.retired.readers_before(self.replaced_by)
    }

    /// Returns whether this map and the maps before it have no readers.
    pub fn is_done(&self) -> bool {
        self.readers() == 0
    }

    /// Waits until this map and all maps before it have no readers, or until `deadline`.
    ///
    /// Readers send no notification, so that reading costs nothing. This function polls, and sleeps
    /// up to a millisecond between two checks.
    ///
    /// # Errors
    ///
    /// Returns [`ReadersRemain`] if there are readers at `deadline`. A thread that waits for its
    /// own guard also gets this error. A guard does not record its thread, so the wait cannot fail
    /// earlier.
    pub fn wait(&self, deadline: Instant) -> Result<(), ReadersRemain> {
        wait_until_unread(deadline, || self.readers())
    }

    /// Returns the map itself, if it and the maps before it have no readers.
    ///
    /// On success, [`Weak` pointers](RetiredMap#weak-pointers) to it cannot be upgraded any more.
    ///
    /// # Errors
    ///
    /// Returns this handle if there are readers.
    pub fn into_map(self) -> Result<M, Self> {
        if !self.is_done() {
            return Err(self);
        }
        let Self {
            handle,
            replaced_by,
            writers,
        } = self;
        handle.into_value().map_err(|handle| Self {
            handle,
            replaced_by,
            writers,
        })
    }
}
