//! [`ReplacedMap`]: a map that is not the one of the moment any more, and when nobody reads it.

use core::fmt::{self, Debug};
use core::sync::atomic::{fence, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use super::GuestMemoryAtomic;
use crate::guest_memory::GuestMemory;
use crate::wait::until_none;

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Replaces the map by what `change` makes of it, as one change: whoever looks sees all of it or nothing.
    ///
    /// Other writers wait until it is done: no region that one of them adds is lost. Readers go on.
    ///
    /// Returns the map that was replaced, which tells when nobody reads it any more, nor any map before it.
    ///
    /// # Deadlocks
    ///
    /// `change` must not call [`lock`](Self::lock) or `update` of the same memory, and whoever calls this must not have a guard of `lock` in its hand: it
    /// would wait for itself, for ever.
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
        let mut earlier = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let map = change(&self.map.load())?;
        let map = self.map.swap(Arc::new(map));
        let before = earlier.clone();
        let handle = Arc::new(());
        earlier.remember(&map, Arc::downgrade(&handle));
        Ok(ReplacedMap {
            _handle: handle,
            map,
            earlier: before,
        })
    }
}

/// A map that was replaced, from [`GuestMemoryAtomic::update`].
///
/// While somebody still reads it, its regions are in use: a removed one must not be given back, handed to another guest or told to the device that
/// it is gone. The same regions may be in maps that were replaced before, by `update` or by [`replace`](super::GuestMemoryExclusiveGuard::replace), and so
/// readers of those count as well:
///
/// ```text
///   map 1 {A, B} ◄── guard of a device      map 2 {A, B, C}      map 3 {A, C}
///        └── update: add C ────────────────────┘ └── update: remove B ──┘
///                                                 the handle of map 2 waits for that guard: it may read B
/// ```
///
/// Readers are guards, [cached readers](super::GuestMemoryReader) that have not looked since, and whatever else holds such a map as an `Arc` (an `IoBuffer` in
/// flight). Handles like this are none: who reads through [`map`](Self::map) knows it. When a handle is dropped, its map goes with its last reader, as after
/// `replace`.
#[derive(Debug)]
pub struct ReplacedMap<M: GuestMemory> {
    /// What [`Earlier`] knows this handle by. It goes before the map does.
    _handle: Arc<()>,
    map: Arc<M>,
    earlier: Earlier<M>,
}

/// The maps that were replaced before, as far as somebody had them at the time.
pub(super) struct Earlier<M> {
    maps: Vec<(Weak<M>, Weak<()>)>,
}

impl<M> Earlier<M> {
    /// Adds a map that was replaced just now, and what goes with its handle; forgets those that are gone.
    pub(super) fn remember(&mut self, old: &Arc<M>, handle: Weak<()>) {
        self.maps.retain(|(map, _)| Weak::strong_count(map) != 0);
        // Whoever read one of those gave its count back with a release, and the counts were read from what came of that. So what those readers did happens
        // before all that is done with the list from here on, under its lock: a handle that does not know of these maps need not ask for them.
        fence(Ordering::Acquire);
        self.maps.push((Arc::downgrade(old), handle));
    }

    /// Returns how many readers there are of all of them.
    fn readers(&self) -> usize {
        let of_one = |(map, handle): &(Weak<M>, Weak<()>)| {
            let all = Weak::strong_count(map);
            // A handle gives back itself first and then its map, with a release: if `all` is without its map, it is seen to be gone. The other way
            // round there is one reader too many for a moment.
            fence(Ordering::Acquire);
            all.saturating_sub(Weak::strong_count(handle))
        };
        self.maps.iter().map(of_one).fold(0, usize::saturating_add)
    }

    /// Returns how many maps are remembered.
    #[cfg(all(test, feature = "backend-mmap"))]
    pub(super) fn count(&self) -> usize {
        self.maps.len()
    }
}

/// None.
impl<M> Default for Earlier<M> {
    fn default() -> Self {
        Self { maps: Vec::new() }
    }
}

/// The same ones.
impl<M> Clone for Earlier<M> {
    fn clone(&self) -> Self {
        Self {
            maps: self.maps.clone(),
        }
    }
}

impl<M> Debug for Earlier<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Earlier")
            .field("maps", &self.maps.len())
            .finish_non_exhaustive()
    }
}

/// The deadline has passed, and somebody still reads the map, or one before it. If that is the waiting thread itself, which holds a guard, no wait will end
/// better.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the replaced map and those before it still have {readers} readers; does the waiting thread hold a guard?")]
pub struct StillRead {
    /// How many there are.
    pub readers: usize,
}

impl<M: GuestMemory> ReplacedMap<M> {
    /// Returns the map.
    pub fn map(&self) -> &M {
        &self.map
    }

    /// Returns how many readers it and the maps before it still have. There do not come new ones but by those there are.
    ///
    /// With 0, what readers did happened before, and there will be none any more.
    pub fn readers(&self) -> usize {
        // arc-swap counts a guard only when the map is replaced, which all of these were: a guard taken before is in the count, and there is none taken after.
        // So each of these counts stays 0 once it is, and it makes no difference that they are read one after the other.
        let readers = Arc::strong_count(&self.map).saturating_sub(1);
        let readers = readers.saturating_add(self.earlier.readers());
        // Each reader gave its count back with a release, and the count was read from what came of that.
        fence(Ordering::Acquire);
        readers
    }

    /// Waits until there are no readers of it and of the maps before it, but no longer than until `deadline`.
    ///
    /// Readers do not tell when they go, so that reading costs nothing: this looks again and again, and sleeps in between, up to a millisecond.
    ///
    /// # Errors
    ///
    /// [`StillRead`] at the deadline, and not before it. A thread that waits with a guard in its own hand gets that, too, at the same time, instead of
    /// waiting for ever: it cannot be told sooner, since a guard does not know which thread has it.
    pub fn wait(&self, deadline: Instant) -> Result<(), StillRead> {
        until_none(deadline, || self.readers()).map_err(|readers| StillRead { readers })
    }

    /// Returns the map itself, if there are no readers of it and of the maps before it.
    ///
    /// # Errors
    ///
    /// This handle again, if there are.
    pub fn into_map(self) -> Result<M, Self> {
        match self.readers() {
            0 => {
                let Self {
                    _handle,
                    map,
                    earlier,
                } = self;
                // The map goes before its handle here, but nobody else has it.
                Arc::try_unwrap(map).map_err(|map| Self {
                    _handle,
                    map,
                    earlier,
                })
            }
            _ => Err(self),
        }
    }
}
