//! [`GuestMemoryReader`]: a thread's cache of the current map.

use core::fmt::{self, Debug};
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use super::GuestMemoryAtomic;
use crate::guest_memory::GuestMemory;

/// A cached handle to a [`GuestMemoryAtomic`], for a thread that accesses memory often.
///
/// The reader keeps the map that it returned last. [`memory`](Self::memory) checks that it is still
/// current, with a load and a comparison.
/// [`GuestAddressSpace::memory`](crate::GuestAddressSpace::memory) takes several times as long,
/// because it creates a guard.
///
/// # Memory that stays mapped
///
/// The reader keeps its map, with all regions, until the next call of `memory`, or until
/// [`release`](Self::release). Call `release` before the thread sleeps for long: otherwise removed
/// regions stay mapped, and [`RetiredMap::wait`](super::RetiredMap::wait) fails.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
///
/// let map = |ranges: &[_]| GuestMemoryMmap::<()>::from_ranges(ranges);
/// let memory = GuestMemoryAtomic::new(map(&[(GuestAddress(0), 0x1000)])?);
/// let mut reader = memory.reader();
/// reader.memory().write_obj(7u8, GuestAddress(0))?;
///
/// let old = memory.update(|_| map(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]))?;
/// assert_eq!(old.readers(), 1);
/// assert_eq!(reader.memory().num_regions(), 2);
/// assert!(old.is_done());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "RCU")]
#[doc(alias = "cache")]
pub struct GuestMemoryReader<M: GuestMemory> {
    map: Arc<ArcSwap<M>>,
    /// The cache with the last map, or `None` after `release`.
    seen: Option<Cache<Arc<ArcSwap<M>>, Arc<M>>>,
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Creates a cached handle, for a thread that accesses memory often.
    pub fn reader(&self) -> GuestMemoryReader<M> {
        GuestMemoryReader {
            map: Arc::clone(&self.map),
            seen: None,
        }
    }
}

impl<M: GuestMemory> GuestMemoryReader<M> {
    /// Returns the current map.
    ///
    /// If a replacement happens before this call, by any synchronisation of the two threads, the
    /// replaced map is not returned.
    #[inline]
    pub fn memory(&mut self) -> &M {
        if self.seen.is_none() {
            self.seen = Some(Cache::new(Arc::clone(&self.map)));
        }
        let map = &self.map;
        let seen = self.seen.get_or_insert_with(|| Cache::new(Arc::clone(map)));
        seen.load()
    }

    /// Drops the cached map.
    ///
    /// The next call of [`memory`](Self::memory) loads the current map.
    pub fn release(&mut self) {
        self.seen = None;
    }
}

/// Creates a handle to the same memory, for another thread, without a cached map.
impl<M: GuestMemory> Clone for GuestMemoryReader<M> {
    fn clone(&self) -> Self {
        Self {
            map: Arc::clone(&self.map),
            seen: None,
        }
    }
}

impl<M: GuestMemory> Debug for GuestMemoryReader<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemoryReader")
            .field("holds_a_map", &self.seen.is_some())
            .finish_non_exhaustive()
    }
}
