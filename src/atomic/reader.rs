//! [`GuestMemoryReader`]: a thread's own handle to the map of the moment.

use core::fmt::{self, Debug};
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use super::GuestMemoryAtomic;
use crate::guest_memory::GuestMemory;

/// The map of the moment, for a thread that looks often.
///
/// It keeps the map that it saw last, and [`memory`](Self::memory) asks whether that is still the one: a load and a comparison, where
/// [`GuestAddressSpace::memory`](crate::GuestAddressSpace::memory) takes a guard and gives it back.
///
/// # What it pins
///
/// The map that it saw last, with all of its regions, stays mapped until the next look, or until [`release`](Self::release). A thread that goes to sleep for
/// long with one in its hand keeps removed memory from being given back: see [`RetiredMap`](super::RetiredMap).
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
///
/// let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?);
/// let mut reader = memory.reader();
/// reader.memory().write_obj(7u8, GuestAddress(0))?;
///
/// memory.update(|_| GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]))?;
/// assert_eq!(reader.memory().num_regions(), 2);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GuestMemoryReader<M: GuestMemory> {
    map: Arc<ArcSwap<M>>,
    /// `None` after it was released.
    seen: Option<Cache<Arc<ArcSwap<M>>, Arc<M>>>,
}

impl<M: GuestMemory> GuestMemoryAtomic<M> {
    /// Returns a handle for a thread that looks at the map often.
    pub fn reader(&self) -> GuestMemoryReader<M> {
        GuestMemoryReader {
            map: Arc::clone(&self.map),
            seen: None,
        }
    }
}

impl<M: GuestMemory> GuestMemoryReader<M> {
    /// Returns the map of the moment.
    ///
    /// What was replaced before, in the order that locks, channels and the like make, is not seen any more.
    #[inline]
    pub fn memory(&mut self) -> &M {
        if self.seen.is_none() {
            self.seen = Some(Cache::new(Arc::clone(&self.map)));
        }
        let map = &self.map;
        let seen = self.seen.get_or_insert_with(|| Cache::new(Arc::clone(map)));
        seen.load()
    }

    /// Lets go of the map that it saw last: before sleeping for long. The next look takes a little longer.
    pub fn release(&mut self) {
        self.seen = None;
    }
}

/// A handle to the same memory, for another thread. It has seen nothing yet.
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
