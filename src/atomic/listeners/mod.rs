//! The listeners of a [`GuestMemoryAtomic`]: how they are added and removed.

mod regions;
mod registered;
mod telling;

use core::fmt;
use std::sync::Arc;

use super::{GuestMemoryAtomic, Writers};
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::listeners::{lock, refuse_in_listener, ListenerError, MemoryListener};
pub(super) use regions::regions_without;
use registered::Listeners;

/// The number of a listener of one memory, from [`GuestMemoryAtomic::add_listener`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(u64);

/// A listener that failed to undo a change, or to follow one that it could not refuse.
///
/// [`GuestMemoryAtomic::detached_listeners`] returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DetachedListener {
    /// Its number.
    pub id: ListenerId,
    /// Its name.
    pub name: String,
    /// The message of its error.
    pub error: String,
}

impl<M> GuestMemoryAtomic<M>
where
    M: GuestMemoryBackend + Send + Sync + 'static,
{
    /// Adds a listener, and tells it of all regions of the current map.
    ///
    /// A region is known by its place in memory. A map that copies its regions therefore announces
    /// all of them again.
    ///
    /// The [module `listeners`](crate::listeners) states what it is told later. When the last
    /// handle to the memory is dropped, it is told that all regions go. The exception is a drop by
    /// a listener: the map then stays mapped, and the listeners exist, forever. A
    /// [`RetiredMap`](super::RetiredMap) is a handle in this sense.
    ///
    /// # Deadlocks
    ///
    /// Do not call this from within the function of [`update`](GuestMemoryAtomic::update), or while
    /// holding a guard of [`lock`](GuestMemoryAtomic::lock).
    ///
    /// # Errors
    ///
    /// Returns the error of the listener, which is not added. If it also failed to undo, it is
    /// added as a detached listener, and [`detached_listeners`](Self::detached_listeners) returns
    /// its number. Returns [`ListenerError::InListener`] if a listener calls this.
    ///
    /// # Examples
    ///
    /// See the [module `listeners`](crate::listeners).
    #[doc(alias = "MemoryListener")]
    pub fn add_listener(
        &self,
        listener: Box<dyn MemoryListener<M::R>>,
    ) -> Result<ListenerId, ListenerError> {
        refuse_in_listener()?;
        let version = lock(&self.writers.version);
        let (added, refused) = self.listeners().0.add(listener);
        drop(version);
        // The drop of a listener can drop the last handle to another memory.
        drop(refused);
        added
    }

    /// Removes a listener, after it was told that all regions go.
    ///
    /// A [detached](crate::listeners#order) listener is told nothing. The memory that it could use
    /// is no longer kept. Destroy what uses the memory first, such as the device.
    ///
    /// # Errors
    ///
    /// Returns the error of the listener, which stays. Returns [`ListenerError::Unknown`] if the
    /// memory has no such listener, and [`ListenerError::InListener`] if a listener calls this.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use std::sync::{Arc, Mutex};
    /// use vm_memory::listeners::{BoxError, ChangeKind, MemoryChange, MemoryListener};
    /// use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
    ///
    /// /// Counts the bytes that it may use.
    /// struct Usable(Arc<Mutex<u64>>);
    ///
    /// impl<R> MemoryListener<R> for Usable {
    ///     fn change(&mut self, change: &MemoryChange<'_, R>) -> Result<(), BoxError> {
    ///         match change.kind() {
    ///             ChangeKind::Plugged => *self.0.lock().unwrap() += change.len(),
    ///             ChangeKind::Unplugged => *self.0.lock().unwrap() -= change.len(),
    ///             _ => {}
    ///         }
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let usable = Arc::new(Mutex::new(0));
    /// let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let memory = GuestMemoryAtomic::new(map);
    /// let listener = memory.add_listener(Box::new(Usable(Arc::clone(&usable))))?;
    /// assert_eq!(*usable.lock().unwrap(), 0x1000);
    /// memory.remove_listener(listener)?;
    /// assert_eq!(*usable.lock().unwrap(), 0);
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn remove_listener(
        &self,
        id: ListenerId,
    ) -> Result<Box<dyn MemoryListener<M::R>>, ListenerError> {
        refuse_in_listener()?;
        let listeners = self.writers.listeners.get();
        listeners.ok_or(ListenerError::Unknown)?.0.remove(id)
    }

    /// Tells listeners to log writes to guest memory, or that logs are no longer needed.
    ///
    /// This switches no bitmap of a region: `DirtyMemory::set_tracking` does. Start both before the
    /// first copy of a migration. A region that joins the map later is logged from its start, and a
    /// listener that is added later also logs.
    ///
    /// # Errors
    ///
    /// Returns the error of a listener. Nothing has changed then. Returns
    /// [`ListenerError::InListener`] if a listener calls this.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[cfg(feature = "backend-mmap")] {
    /// use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
    ///
    /// let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
    /// let memory = GuestMemoryAtomic::new(map);
    /// // memory.add_listener(…): the slots of KVM
    /// memory.track_writes(true)?;
    /// // The migration: harvests the bitmaps of the memory, and KVM's log.
    /// memory.track_writes(false)?;
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "KVM_MEM_LOG_DIRTY_PAGES")]
    pub fn track_writes(&self, on: bool) -> Result<(), ListenerError> {
        refuse_in_listener()?;
        let _version = lock(&self.writers.version);
        self.listeners().0.track(on)
    }

    fn listeners(&self) -> &MapObserverPointer<M> {
        self.writers
            .listeners
            .get_or_init(|| MapObserverPointer(Listeners::new(Arc::clone(&self.map))))
    }

    /// Returns the listeners that failed to undo a change, and are told nothing more.
    ///
    /// The memory that they may use is kept until they are
    /// [removed](GuestMemoryAtomic::remove_listener).
    ///
    /// # Errors
    ///
    /// Returns [`ListenerError::InListener`] if a listener calls this.
    pub fn detached_listeners(&self) -> Result<Vec<DetachedListener>, ListenerError> {
        refuse_in_listener()?;
        let listeners = self.writers.listeners.get();
        Ok(listeners.map_or_else(Vec::new, |listeners| listeners.0.detached()))
    }
}

/// The treatment of a listener that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnError {
    /// Nothing changes: what was told is undone.
    Undo,
    /// The change takes place, and the listener is detached.
    Detach,
}

/// The listeners of a memory whose type may be no [`GuestMemoryBackend`].
pub(super) trait MapObserver<M: GuestMemory>: Send + Sync {
    /// Tells the listeners of a new map, makes it the current one, and returns the old one.
    fn replace(&self, new: Arc<M>, on_error: OnError) -> Result<Arc<M>, ListenerError>;

    /// Tells the listeners that all regions go. Keeps the memory of those that fail forever.
    fn end(&self);

    /// Also returns the listener if it was not added. Drop it without a lock.
    #[expect(
        clippy::type_complexity,
        reason = "the refused listener is dropped by the caller"
    )]
    fn add(
        &self,
        listener: Box<dyn MemoryListener<M::R>>,
    ) -> (
        Result<ListenerId, ListenerError>,
        Option<Box<dyn MemoryListener<M::R>>>,
    )
    where
        M: GuestMemoryBackend;

    fn remove(&self, id: ListenerId) -> Result<Box<dyn MemoryListener<M::R>>, ListenerError>
    where
        M: GuestMemoryBackend;

    fn track(&self, on: bool) -> Result<(), ListenerError>;

    fn detached(&self) -> Vec<DetachedListener>;
}

/// Owns the listeners of a memory.
pub(super) struct MapObserverPointer<M: GuestMemory>(pub(super) Arc<dyn MapObserver<M>>);

/// A panic of a listener is an error, and leaves nothing half done.
impl<M: GuestMemory> std::panic::UnwindSafe for MapObserverPointer<M> {}
impl<M: GuestMemory> std::panic::RefUnwindSafe for MapObserverPointer<M> {}

impl<M: GuestMemory> fmt::Debug for MapObserverPointer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listeners")
    }
}

impl<M: GuestMemory> Drop for Writers<M> {
    fn drop(&mut self) {
        if let Some(listeners) = self.listeners.get() {
            listeners.0.end();
        }
    }
}
