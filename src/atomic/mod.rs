//! Memory maps that are replaced while devices use them.
//!
//! A map never changes. Hotplug builds a new map, which shares the regions that stay, and swaps it
//! in. Readers load the current map without waiting. Writers exclude each other.
//!
//! ```text
//!   GuestMemoryAtomic ──► map A (Arc)  ◄── guard of a device that is accessing memory
//!          │
//!          └─ update(map A ─► map B):  then memory() returns map B,
//!                                      and map A lives until its last guard is dropped
//! ```
//!
//! | type | use it for |
//! |---|---|
//! | [`GuestMemoryAtomic`] | the shared handle, which writers [`update`](GuestMemoryAtomic::update) |
//! | [`GuestMemoryLoadGuard`] | one access, or a few |
//! | [`GuestMemoryReader`] | a thread that accesses memory often |
//! | [`RetiredMap`] | waiting until a removed region is out of use |
//!
//! # System calls
//!
//! - `clock_nanosleep(2)` in [`RetiredMap::wait`],
//! - `clock_gettime(2)` in [`RetiredMap::wait`], if the vDSO does not read the clock,
//! - `futex(2)` if writers contend,
//! - `munmap(2)` when a map is dropped, for each region that no other map has.
//!
//! # Examples
//!
//! ```
//! # #[cfg(feature = "backend-mmap")] {
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//! use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
//! use vm_memory::{GuestMemoryMmap, GuestRegionMmap};
//!
//! let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
//! let memory = GuestMemoryAtomic::new(map);
//!
//! // Plugs a region. A device sees it with its next access.
//! let dimm = Arc::new(GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None)?);
//! memory.update(|map| map.insert_region(dimm))?;
//! memory.memory().write_obj(7u8, GuestAddress(0x1000))?;
//!
//! // Unplugs it, and waits until no device uses it.
//! let old = memory.update(|map| {
//!     map.remove_region(GuestAddress(0x1000), 0x1000).map(|(map, _)| map)
//! })?;
//! old.wait(Instant::now() + Duration::from_secs(1))?;
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/hotplug.rs` plugs and unplugs a region while a device thread runs.

mod listeners;
mod reader;
mod retired_map;
#[cfg(all(test, feature = "backend-mmap"))]
mod tests;
mod window;

use core::ops::Deref;
use std::sync::{Arc, LockResult, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::guest_memory::{Generation, GuestAddressSpace, GuestMemory, IntoMap};
use crate::listeners::{refuse_in_listener, ListenerError};
use crate::retired::{RetiredList, WeakVersion};
use listeners::{MapObserverPointer, OnError};

pub use crate::retired::ReadersRemain;
pub use listeners::{DetachedListener, ListenerId};
pub use reader::GuestMemoryReader;
pub use retired_map::{RetiredMap, UpdateError};

/// A memory map that can be replaced while it is used.
///
/// Clones are handles to the same memory: all of them see a replacement.
///
/// [`update`](Self::update) replaces the map with one call. [`lock`](Self::lock) and
/// [`replace`](GuestMemoryExclusiveGuard::replace) do it in two steps.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
/// use vm_memory::{GuestMemoryMmap, GuestRegionMmap};
///
/// let map: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let memory = GuestMemoryAtomic::new(map);
/// let device = memory.clone();
/// let before = device.memory();
///
/// let lock = memory.lock().unwrap();
/// let dimm = GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None)?;
/// lock.replace(memory.memory().insert_region(Arc::new(dimm))?);
///
/// assert_eq!(before.num_regions(), 1);
/// assert_eq!(device.memory().num_regions(), 2);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "hotplug")]
#[doc(alias = "RCU")]
#[derive(Debug)]
pub struct GuestMemoryAtomic<M: GuestMemory> {
    map: Arc<ArcSwap<M>>,
    writers: Arc<Writers<M>>,
}

/// The state of a [`GuestMemoryAtomic`] that writers share with threads that wait for readers.
#[derive(Debug)]
struct Writers<M: GuestMemory> {
    /// The number of the current map. A writer holds the lock from loading that map until its
    /// successor is current. It is locked before the list, never after it.
    version: Mutex<u64>,
    /// Tells windows of the number of the current map. A writer publishes it after the swap.
    generation: Generation,
    retired: RetiredList<WeakVersion<M>>,
    /// Set by the first listener.
    listeners: OnceLock<MapObserverPointer<M>>,
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Creates a handle to a memory whose current map is `map`.
    pub fn new(map: M) -> Self {
        Arc::new(map).into()
    }

    /// Excludes other writers, so that the caller can make a new map from the current one.
    ///
    /// Readers do not wait. [`update`](Self::update) is the simpler way.
    ///
    /// # Deadlocks
    ///
    /// A thread that holds the guard must not call `lock` or [`update`](Self::update) of the same
    /// memory.
    ///
    /// # Errors
    ///
    /// Returns [`PoisonError`] if a writer panicked while it held the guard. The guard is in the
    /// error, and can be used: the map is that of the last replacement. A panic in
    /// [`update`](Self::update) does not poison the lock.
    ///
    /// # Panics
    ///
    /// Panics if a [listener](crate::listeners) calls it, which then has failed.
    #[expect(
        clippy::panic,
        reason = "the result has no error for it, and the caller turns the panic into one"
    )]
    pub fn lock(&self) -> LockResult<GuestMemoryExclusiveGuard<'_, M>> {
        if let Err(error) = refuse_in_listener() {
            panic!("{error}");
        }
        let guard = |version| GuestMemoryExclusiveGuard {
            parent: self,
            version,
        };
        match self.writers.version.lock() {
            Ok(version) => Ok(guard(version)),
            Err(poisoned) => Err(PoisonError::new(guard(poisoned.into_inner()))),
        }
    }
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Makes a map the current one, after its listeners were told. Returns the old one.
    ///
    /// The caller has the lock of writers.
    fn publish(&self, map: Arc<M>, on_error: OnError) -> Result<Arc<M>, ListenerError> {
        match self.writers.listeners.get() {
            Some(listeners) => listeners.0.replace(map, on_error),
            None => Ok(self.map.swap(map)),
        }
    }
}

/// Creates a handle to a memory whose current map is shared with other owners.
impl<M: GuestMemory> From<Arc<M>> for GuestMemoryAtomic<M> {
    fn from(map: Arc<M>) -> Self {
        GuestMemoryAtomic {
            map: Arc::new(ArcSwap::new(map)),
            writers: Arc::new(Writers {
                version: Mutex::new(0),
                generation: Generation::default(),
                retired: RetiredList::new(),
                listeners: OnceLock::new(),
            }),
        }
    }
}

/// Creates another handle to the same memory.
impl<M: GuestMemory> Clone for GuestMemoryAtomic<M> {
    fn clone(&self) -> Self {
        Self {
            map: Arc::clone(&self.map),
            writers: Arc::clone(&self.writers),
        }
    }
}

impl<M: GuestMemory> GuestAddressSpace for GuestMemoryAtomic<M> {
    type M = M;
    type T = GuestMemoryLoadGuard<M>;

    #[inline]
    fn memory(&self) -> Self::T {
        GuestMemoryLoadGuard {
            guard: self.map.load(),
        }
    }
}

/// A guard of the map that was current when [`memory`](GuestAddressSpace::memory) was called.
///
/// The map stays as it is, and stays mapped, as long as the guard exists. Drop a guard soon: only
/// the first few guards of a thread are cheap. Use [`into_inner`](Self::into_inner) to keep a map.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
///
/// let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// let memory = GuestMemoryAtomic::new(map);
/// let guard = memory.memory();
/// guard.write_obj(7u32, GuestAddress(0x10))?;
/// assert_eq!(guard.read_obj::<u32>(GuestAddress(0x10))?, 7);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestMemoryLoadGuard<M: GuestMemory> {
    guard: Guard<Arc<M>>,
}

impl<M: GuestMemory> GuestMemoryLoadGuard<M> {
    /// Converts the guard into an `Arc`, which can be kept indefinitely.
    pub fn into_inner(self) -> Arc<M> {
        Guard::into_inner(self.guard)
    }
}

/// Creates another guard of the same map, which need not be the current one.
impl<M: GuestMemory> Clone for GuestMemoryLoadGuard<M> {
    fn clone(&self) -> Self {
        GuestMemoryLoadGuard {
            guard: Guard::from_inner(Arc::clone(&*self.guard)),
        }
    }
}

impl<M: GuestMemory> IntoMap for GuestMemoryLoadGuard<M> {
    type M = M;

    fn into_map(self) -> Arc<M> {
        self.into_inner()
    }
}

impl<M: GuestMemory> IntoMap for &GuestMemoryLoadGuard<M> {
    type M = M;

    fn into_map(self) -> Arc<M> {
        Arc::clone(&*self.guard)
    }
}

impl<M: GuestMemory> Deref for GuestMemoryLoadGuard<M> {
    type Target = M;

    #[inline]
    fn deref(&self) -> &M {
        &self.guard
    }
}

/// The exclusive right to replace the map, from [`GuestMemoryAtomic::lock`].
///
/// Other writers wait until it is dropped.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
/// use vm_memory::GuestMemoryMmap;
///
/// let map = |size| GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), size)]);
/// let memory = GuestMemoryAtomic::new(map(0x1000)?);
/// let writer = memory.lock().expect("no writer has panicked");
/// writer.replace(map(0x2000)?);
/// assert_eq!(memory.memory().last_addr(), GuestAddress(0x1fff));
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestMemoryExclusiveGuard<'a, M: GuestMemory> {
    parent: &'a GuestMemoryAtomic<M>,
    version: MutexGuard<'a, u64>,
}

impl<M: GuestMemory> GuestMemoryExclusiveGuard<'_, M> {
    /// Replaces the map, and releases the lock.
    ///
    /// Later readers see `map`. The replaced map lives until its last reader is gone. Use
    /// [`update`](GuestMemoryAtomic::update) to wait for that.
    ///
    /// A [listener](crate::listeners) cannot refuse the map. If it fails, it is detached, and the
    /// regions of both maps are kept for it.
    pub fn replace(mut self, map: M) {
        let Ok(old) = self.parent.publish(Arc::new(map), OnError::Detach) else {
            // Not reached: listeners that fail are detached.
            return;
        };
        let writers = &self.parent.writers;
        let version = WeakVersion::new(*self.version, &old);
        let unread = version.map(|version| writers.retired.retire(version));
        *self.version = self.version.saturating_add(1);
        writers.generation.publish(*self.version);
        drop(self);
        drop(unread);
    }
}
