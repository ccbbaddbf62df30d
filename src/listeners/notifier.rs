//! [`RegionNotifier`]: tells the memories that have a region of changes of its pages.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::pin::Pins;
use super::turn::{lock, HasTurn, Turn, Turns};
use super::{refuse_in_listener, ChangeKind, ListenerError};

/// Tells listeners of the changes of a region's pages, and keeps pages that are pinned.
///
/// A region type whose pages change has one, and returns it from
/// [`GuestMemoryRegion::notifier`](crate::GuestMemoryRegion::notifier). The code that changes the
/// pages calls [`begin`](Self::begin), and keeps the result until the change is complete. All
/// memories whose current map has the region, and which have listeners, are told.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use vm_memory::listeners::{ChangeKind, ListenerError, RegionNotifier};
///
/// let notifier = RegionNotifier::new();
/// let unplug = |offset, len| {
///     let mut changes = notifier.begin()?;
///     changes.announce(ChangeKind::Unplugged, &[(offset, len)])?;
///     // No listener uses the pages now. Close the blocks, and free their pages.
///     Ok::<_, ListenerError>(())
/// };
/// unplug(0x20_0000, 0x20_0000)?;
/// # Ok::<(), ListenerError>(())
/// ```
pub struct RegionNotifier {
    /// A number that no other notifier has. Turns are taken in this order.
    id: u64,
    turn: Turn,
    observers: Mutex<Observers>,
    pub(super) pins: Pins,
}

/// The memories with listeners whose current map has the region.
#[derive(Default)]
struct Observers {
    /// In the order of their numbers.
    list: Vec<(u64, Weak<dyn Observer>)>,
    /// The number of changes of the list.
    version: u64,
}

/// A memory with listeners.
pub(crate) trait Observer: HasTurn + Send + Sync {
    /// Tells the listeners of changes of a region. After an error, all is as before.
    fn announce(
        &self,
        notifier: &RegionNotifier,
        kind: ChangeKind,
        runs: &[(u64, u64)],
    ) -> Result<(), ListenerError>;

    /// Tells the listeners the inverse of changes. Listeners that fail are detached.
    fn undo(&self, notifier: &RegionNotifier, kind: ChangeKind, runs: &[(u64, u64)]);
}

/// A counted pointer whose turn can be taken.
struct Shared(Arc<dyn Observer>);

impl HasTurn for Shared {
    fn turn(&self) -> &Turn {
        self.0.turn()
    }
}

impl HasTurn for RegionNotifier {
    fn turn(&self) -> &Turn {
        &self.turn
    }
}

/// Returns a number that no other notifier or memory has.
pub(crate) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Relaxed: the numbers differ in any order.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Default for RegionNotifier {
    fn default() -> Self {
        Self::new()
    }
}

impl RegionNotifier {
    /// Creates a notifier for a region that is in no map yet.
    pub fn new() -> Self {
        Self {
            id: next_id(),
            turn: Turn::default(),
            observers: Mutex::default(),
            pins: Pins::default(),
        }
    }

    /// Excludes other changes of the region, and of the maps that have it.
    ///
    /// # Deadlocks
    ///
    /// A thread that holds the result must not call `begin` again. It must not change the map or
    /// the listeners of a memory with listeners, nor drop the last handle to it.
    ///
    /// # Errors
    ///
    /// Returns [`ListenerError::InListener`] if a listener calls it.
    pub fn begin(&self) -> Result<RegionChanges<'_>, ListenerError> {
        refuse_in_listener()?;
        loop {
            let (version, observers) = self.observers();
            // The turns of memories before those of regions, each in the order of their numbers:
            // all changes take them in this order.
            let observers = Turns::take(observers.into_iter().map(Shared));
            let region = Turns::take([self]);
            if self.observers().0 == version {
                return Ok(RegionChanges {
                    notifier: self,
                    _region: region,
                    observers,
                    is_announced: false,
                });
            }
            // A memory got or lost the region meanwhile.
        }
    }

    fn observers(&self) -> (u64, Vec<Arc<dyn Observer>>) {
        let observers = lock(&self.observers);
        let list = observers
            .list
            .iter()
            .filter_map(|(_, observer)| observer.upgrade());
        (observers.version, list.collect())
    }

    #[cfg(feature = "backend-atomic")]
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Tells an observer of later changes. The caller has the turns of both.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn attach(&self, id: u64, observer: Weak<dyn Observer>) {
        self.change_observers(id, Some(observer));
    }

    /// Tells an observer of no more changes. The caller has the turns of both.
    #[cfg(feature = "backend-atomic")]
    pub(crate) fn detach(&self, id: u64) {
        self.change_observers(id, None);
    }

    #[cfg(feature = "backend-atomic")]
    fn change_observers(&self, id: u64, new: Option<Weak<dyn Observer>>) {
        let mut observers = lock(&self.observers);
        observers
            .list
            .retain(|(other, observer)| *other != id && observer.strong_count() != 0);
        if let Some(new) = new {
            let place = observers.list.partition_point(|(other, _)| *other < id);
            observers.list.insert(place, (id, new));
        }
        observers.version = observers.version.wrapping_add(1);
    }
}

impl fmt::Debug for RegionNotifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionNotifier")
            .field("id", &self.id)
            .field("memories", &lock(&self.observers).list.len())
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

/// The exclusive right to change a region's pages, from [`RegionNotifier::begin`].
///
/// Keep it until the change is complete.
#[must_use = "announce changes before they are made"]
pub struct RegionChanges<'a> {
    notifier: &'a RegionNotifier,
    // Dropped before the turns of the memories.
    _region: Turns<&'a RegionNotifier>,
    observers: Turns<Shared>,
    /// Whether a discard or an unplug was announced. The memories have their turns again.
    is_announced: bool,
}

impl RegionChanges<'_> {
    /// Tells all listeners of a change of some ranges, given as offset and length in bytes.
    ///
    /// Call this before blocks close and pages are freed, and after pages exist. After `Unplugged`
    /// and `Discarded`, the ranges cannot be pinned until this is dropped. These changes cannot be
    /// undone, so other changes of the memories can begin. A further announcement is an error.
    ///
    /// # Errors
    ///
    /// Returns the error of a listener. Returns [`ListenerError::Pinned`] if a page to discard or
    /// unplug is pinned. In both cases, listeners that were told of `Plugged` or `Unplugged` were
    /// told the inverse, and the caller must not make the change.
    pub fn announce(&mut self, kind: ChangeKind, runs: &[(u64, u64)]) -> Result<(), ListenerError> {
        if self.is_announced {
            return Err(ListenerError::AlreadyAnnounced);
        }
        if kind == ChangeKind::Discarded {
            // A discard cannot be undone, so pins are checked first.
            self.withdraw(kind, runs)?;
        }
        let observers = self.observers.owners();
        for (told, observer) in observers.iter().enumerate() {
            if let Err(error) = observer.0.announce(self.notifier, kind, runs) {
                for observer in observers.iter().take(told).rev() {
                    observer.0.undo(self.notifier, kind, runs);
                }
                return Err(error);
            }
        }
        if kind == ChangeKind::Unplugged {
            // After the listeners, since one that unmaps its range drops its pin.
            self.withdraw(kind, runs)
                .inspect_err(|_| self.undo(kind, runs))?;
        }
        if matches!(kind, ChangeKind::Unplugged | ChangeKind::Discarded) {
            // Freeing pages can take long, and may wait for another process.
            self.observers.give_back();
            self.is_announced = true;
        }
        Ok(())
    }

    /// Checks that no page of some ranges is pinned, of which listeners are not told.
    ///
    /// These are unplugged blocks whose pages are freed. A listener that failed to undo may use
    /// them.
    ///
    /// # Errors
    ///
    /// Returns [`ListenerError::Pinned`] if a page is pinned.
    pub fn check_unpinned(
        &self,
        kind: ChangeKind,
        runs: &[(u64, u64)],
    ) -> Result<(), ListenerError> {
        match self.notifier.pins.pinned_run(runs) {
            Some((offset, len)) => Err(ListenerError::Pinned { kind, offset, len }),
            None => Ok(()),
        }
    }

    /// Tells all listeners the inverse of a `Plugged` that was announced, if the plug then failed.
    ///
    /// Listeners that fail are detached.
    pub fn undo(&self, kind: ChangeKind, runs: &[(u64, u64)]) {
        for observer in self.observers.owners().iter().rev() {
            observer.0.undo(self.notifier, kind, runs);
        }
    }

    fn withdraw(&self, kind: ChangeKind, runs: &[(u64, u64)]) -> Result<(), ListenerError> {
        let withdrawn = self.notifier.pins.withdraw(runs);
        withdrawn.map_err(|(offset, len)| ListenerError::Pinned { kind, offset, len })
    }
}

impl Drop for RegionChanges<'_> {
    fn drop(&mut self) {
        self.notifier.pins.end_withdrawals();
    }
}

impl fmt::Debug for RegionChanges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionChanges")
            .field("notifier", self.notifier)
            .finish_non_exhaustive()
    }
}
