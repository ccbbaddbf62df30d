//! Memory maps that are swapped while devices use them.
//!
//! ```text
//!   GuestMemoryAtomic ──► map A (Arc)  ◄── guard of a device that is in the middle of something
//!          │
//!          └─ lock().replace(map B):  from now on memory() gives map B;
//!                                     map A goes when its last guard does
//! ```
//!
//! [`GuestMemoryAtomic::update`] does that with one call, and returns map A with a way to learn when that is; a thread that looks often has a
//! [`GuestMemoryReader`].
//!
//! A map does not change; hotplug makes another one, which shares the regions that stay. Readers take the map of the moment without waiting for
//! anybody. Writers wait for each other.

mod reader;
mod retired_map;
#[cfg(all(test, feature = "backend-mmap"))]
mod tests;

use core::ops::Deref;
use std::sync::{Arc, LockResult, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::guest_memory::{GuestAddressSpace, GuestMemory};
use crate::retired::{RetiredList, WeakVersion};

pub use crate::retired::StillRead;
pub use reader::GuestMemoryReader;
pub use retired_map::RetiredMap;

/// A memory map that can be replaced while it is used.
///
/// Clones are handles to the same map: what one replaces, all see.
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
/// let more = GuestRegionMmap::from_range(GuestAddress(0x1000), 0x1000, None)?;
/// lock.replace(memory.memory().insert_region(Arc::new(more))?);
///
/// assert_eq!(before.num_regions(), 1);
/// assert_eq!(device.memory().num_regions(), 2);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestMemoryAtomic<M: GuestMemory> {
    map: Arc<ArcSwap<M>>,
    writers: Arc<Writers<M>>,
}

/// The state of a [`GuestMemoryAtomic`] that writers share, and those who wait for readers.
#[derive(Debug)]
struct Writers<M> {
    /// The number of the current map. Locked from loading that map until its successor is current,
    /// and before the list, never after.
    version: Mutex<u64>,
    retired: RetiredList<WeakVersion<M>>,
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Begins with `map`.
    pub fn new(map: M) -> Self {
        Arc::new(map).into()
    }

    /// Keeps other writers out, so that a new map can be made of the present one and put in its place. Readers go on.
    ///
    /// A thread that has one of these guards and calls `lock` or [`update`](Self::update) of the same memory waits for itself, for ever.
    ///
    /// # Errors
    ///
    /// If a writer panicked in here before. The guard is in the error, and works.
    pub fn lock(&self) -> LockResult<GuestMemoryExclusiveGuard<'_, M>> {
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

/// Begins with a map that others share.
impl<M: GuestMemory> From<Arc<M>> for GuestMemoryAtomic<M> {
    fn from(map: Arc<M>) -> Self {
        GuestMemoryAtomic {
            map: Arc::new(ArcSwap::new(map)),
            writers: Arc::new(Writers {
                version: Mutex::new(0),
                retired: RetiredList::new(),
            }),
        }
    }
}

/// Another handle to the same map.
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

/// The map of one moment. It stays as it is, and stays mapped, as long as this is kept.
#[derive(Debug)]
pub struct GuestMemoryLoadGuard<M: GuestMemory> {
    guard: Guard<Arc<M>>,
}

impl<M: GuestMemory> GuestMemoryLoadGuard<M> {
    /// Returns the map as a counted pointer, which is the better one to keep for long.
    pub fn into_inner(self) -> Arc<M> {
        Guard::into_inner(self.guard)
    }
}

/// The same map once more.
impl<M: GuestMemory> Clone for GuestMemoryLoadGuard<M> {
    fn clone(&self) -> Self {
        GuestMemoryLoadGuard {
            guard: Guard::from_inner(Arc::clone(&*self.guard)),
        }
    }
}

impl<M: GuestMemory> Deref for GuestMemoryLoadGuard<M> {
    type Target = M;

    #[inline]
    fn deref(&self) -> &M {
        &self.guard
    }
}

/// The right to replace the map. Other writers wait until it is gone.
#[derive(Debug)]
pub struct GuestMemoryExclusiveGuard<'a, M: GuestMemory> {
    parent: &'a GuestMemoryAtomic<M>,
    version: MutexGuard<'a, u64>,
}

impl<M: GuestMemory> GuestMemoryExclusiveGuard<'_, M> {
    /// Replaces the map, and lets other writers in.
    ///
    /// Whoever looks from now on sees `map`. The old one goes when its last guard does.
    pub fn replace(mut self, map: M) {
        let GuestMemoryAtomic {
            map: current,
            writers,
        } = self.parent;
        let old = current.swap(Arc::new(map));
        let unread = writers
            .retired
            .retire(WeakVersion::new(*self.version, &old));
        *self.version = self.version.saturating_add(1);
        drop(self);
        drop(unread);
    }
}
