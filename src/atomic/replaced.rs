//! [`ReplacedMap`]: a map that is not the one of the moment any more, and when nobody reads it.

use core::sync::atomic::{fence, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::GuestMemoryAtomic;
use crate::guest_memory::GuestMemory;
use crate::wait::until_none;

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Replaces the map by what `change` makes of it, as one change: whoever looks sees all of it or nothing.
    ///
    /// Other writers wait until it is done: no region that one of them adds is lost. Readers go on. `change` must not call [`lock`](Self::lock) or `update`
    /// of the same memory, which wait for it.
    ///
    /// Returns the map that was replaced, which tells when nobody reads it any more.
    ///
    /// # Errors
    ///
    /// What `change` answers; the map stays as it is then. It also stays, and can be changed by the next one, if `change` panics.
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::Arc;
    /// use std::time::{Duration, Instant};
    /// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
    /// use vm_memory::{GuestMemoryMmap, GuestRegionMmap};
    ///
    /// let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?);
    /// let device = memory.clone();
    /// let busy = device.memory();
    ///
    /// // Two regions come and one goes, at once.
    /// let region = |start| GuestRegionMmap::from_range(GuestAddress(start), 0x1000, None).map(Arc::new);
    /// let (first, second) = (region(0x1000)?, region(0x2000)?);
    /// let old = memory.update(|map| {
    ///     let map = map.insert_region(first)?.insert_region(second)?;
    ///     map.remove_region(GuestAddress(0), 0x1000).map(|(map, _)| map)
    /// })?;
    /// assert_eq!(memory.memory().num_regions(), 2);
    ///
    /// // A device is still in the middle of something.
    /// let soon = || Instant::now() + Duration::from_millis(5);
    /// assert_eq!(old.wait(soon()).unwrap_err().readers, 1);
    /// drop(busy);
    /// old.wait(soon())?;
    /// let map = old.into_map().expect("nobody reads it");
    /// drop(map); // unmaps the region at 0
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn update<E>(&self, change: impl FnOnce(&M) -> Result<M, E>) -> Result<ReplacedMap<M>, E> {
        // One that panicked in `change` has changed nothing.
        let _only_writer = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let map = change(&self.map.load())?;
        Ok(ReplacedMap {
            map: self.map.swap(Arc::new(map)),
        })
    }
}

/// A map that was replaced, from [`GuestMemoryAtomic::update`].
///
/// While somebody still reads it, its regions are in use: a removed one must not be given back, handed to another guest or told to the device that
/// it is gone. Guards, [cached readers](super::GuestMemoryReader) that have not looked since, and whatever else holds the map as an `Arc` (an `IoBuffer` in flight)
/// count as readers. When this handle is dropped, the map goes with its last reader, as after [`replace`](super::GuestMemoryExclusiveGuard::replace).
#[derive(Debug)]
pub struct ReplacedMap<M: GuestMemory> {
    map: Arc<M>,
}

/// The deadline has passed, and somebody still reads the map. If that is the waiting thread itself, which holds a guard, no wait will end better.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the replaced map still has {readers} readers; does the waiting thread hold a guard of it?")]
pub struct StillRead {
    /// How many there are.
    pub readers: usize,
}

impl<M: GuestMemory> ReplacedMap<M> {
    /// Returns the map.
    pub fn map(&self) -> &M {
        &self.map
    }

    /// Returns how many readers it still has. It does not get new ones but by those there are.
    ///
    /// With 0, what readers did happened before.
    pub fn readers(&self) -> usize {
        // arc-swap counts a guard only when the map is replaced, which it was: a guard taken before is one of these, and there is none taken after.
        let readers = Arc::strong_count(&self.map).saturating_sub(1);
        // Each reader gave its count back with a release, and the count was read from what came of that.
        fence(Ordering::Acquire);
        readers
    }

    /// Waits until it has no readers, but no longer than until `deadline`.
    ///
    /// Readers do not tell when they go, so that reading costs nothing: this looks again and again, and sleeps in between.
    ///
    /// # Errors
    ///
    /// [`StillRead`] at the deadline. A thread that waits with a guard in its own hand gets that, too, instead of waiting for ever.
    pub fn wait(&self, deadline: Instant) -> Result<(), StillRead> {
        until_none(deadline, || self.readers()).map_err(|readers| StillRead { readers })
    }

    /// Returns the map itself, if it has no readers.
    ///
    /// # Errors
    ///
    /// This handle again, if somebody reads it.
    pub fn into_map(self) -> Result<M, Self> {
        Arc::try_unwrap(self.map).map_err(|map| Self { map })
    }
}
