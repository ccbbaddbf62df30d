//! The listeners of a [`GuestMemoryAtomic`]: tells them of changes, and undoes what one refuses.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, Weak};
use std::{ptr, slice};

use arc_swap::ArcSwap;

use super::{GuestMemoryAtomic, Writers};
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::listeners::{
    call, lock, next_id, refuse_in_listener, BoxError, ChangeKind, HasTurn, ListenerError,
    MemoryChange, MemoryListener, NotAsBefore, Observer, Pin, RegionNotifier, Turn, Turns,
};
use crate::region::GuestMemoryRegion;
use crate::MemoryRegionAddress;

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
        self.writers.listeners.get_or_init(|| {
            let map = Arc::clone(&self.map);
            MapObserverPointer(Arc::new_cyclic(|this| Listeners {
                id: next_id(),
                turn: Turn::default(),
                map,
                entries: Mutex::default(),
                tracking: AtomicBool::new(false),
                process: std::process::id(),
                this: Weak::clone(this),
            }))
        })
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

struct Listeners<M: GuestMemoryBackend> {
    id: u64,
    turn: Turn,
    /// Changes only while the turn is taken.
    map: Arc<ArcSwap<M>>,
    /// In the order in which they were added. Locked while the turn is taken.
    entries: Mutex<Vec<Entry<M>>>,
    /// Whether listeners log writes. Changes only while the turn is taken.
    tracking: AtomicBool,
    /// The number of the process. A child of fork(2) has copies of the listeners.
    process: u32,
    this: Weak<Self>,
}

struct Entry<M: GuestMemoryBackend> {
    id: ListenerId,
    name: String,
    listener: Box<dyn MemoryListener<M::R>>,
    detached: Option<Kept<M>>,
}

/// The memory that a detached listener may use.
struct Kept<M> {
    _maps: Vec<Arc<M>>,
    _pins: Vec<Pin>,
    error: String,
}

impl<M: GuestMemoryBackend> HasTurn for Listeners<M> {
    fn turn(&self) -> &Turn {
        &self.turn
    }
}

impl<M> MapObserver<M> for Listeners<M>
where
    M: GuestMemoryBackend + Send + Sync + 'static,
{
    fn replace(&self, new: Arc<M>, on_error: OnError) -> Result<Arc<M>, ListenerError> {
        match (self.check_process(), on_error) {
            (Ok(()), _) => {}
            (Err(error), OnError::Undo) => return Err(error),
            (Err(_), OnError::Detach) => return Ok(self.map.swap(new)),
        }
        let _turn = Turns::take([self]);
        let old = self.map.load_full();
        {
            let (gone, come) = (regions_without(&*old, &*new), regions_without(&*new, &*old));
            let changed = notifiers(gone.iter().chain(&come).copied());
            let _regions = Turns::take(changed.iter().copied());
            let changes = self.changes(gone.iter().copied(), come.iter().copied());
            let maps = [Arc::clone(&old), Arc::clone(&new)];
            tell(&mut lock(&self.entries), &changes, &maps, on_error)?;
            drop(self.map.swap(Arc::clone(&new)));
            let present = new.iter().filter_map(|region| region.notifier());
            let present: HashSet<u64> = present.map(|notifier| notifier.id()).collect();
            for notifier in &changed {
                if present.contains(&notifier.id()) {
                    self.follow(notifier);
                } else {
                    notifier.detach(self.id);
                }
            }
        }
        Ok(old)
    }

    fn end(&self) {
        if refuse_in_listener().is_err() || self.check_process().is_err() {
            // This thread may have the turns and the lock already, or another thread of the parent
            // process had them. And the listeners of that process use the memory.
            std::mem::forget((self.this.upgrade(), self.map.load_full()));
            return;
        }
        let mut entries = {
            let _turn = Turns::take([self]);
            let map = self.map.load_full();
            let notifiers = notifiers(map.iter());
            let _regions = Turns::take(notifiers.iter().copied());
            let changes = self.changes(map.iter(), []);
            let mut entries = lock(&self.entries);
            // Cannot fail: listeners that fail are detached.
            let _ = tell(&mut entries, &changes, &[Arc::clone(&map)], OnError::Detach);
            let detach = |notifier: &&RegionNotifier| notifier.detach(self.id);
            notifiers.iter().for_each(detach);
            std::mem::take(&mut *entries)
        };
        let kept = entries.iter_mut().filter_map(|entry| entry.detached.take());
        kept.for_each(std::mem::forget);
        // Listeners are dropped without a turn: one can drop the last handle to another memory.
    }

    fn add(
        &self,
        mut listener: Box<dyn MemoryListener<M::R>>,
    ) -> (
        Result<ListenerId, ListenerError>,
        Option<Box<dyn MemoryListener<M::R>>>,
    ) {
        let name = self.check_process().and_then(|()| name_of(&mut *listener));
        let name = match name {
            Ok(name) => name,
            Err(error) => return (Err(error), Some(listener)),
        };
        let _turn = Turns::take([self]);
        let map = self.map.load_full();
        let notifiers = notifiers(map.iter());
        let _regions = Turns::take(notifiers.iter().copied());
        let id = ListenerId(next_id());
        let changes = self.changes([], map.iter());
        let mut entry = [Entry {
            id,
            name,
            listener,
            detached: None,
        }];
        let told = tell(&mut entry, &changes, &[Arc::clone(&map)], OnError::Undo);
        let [entry] = entry;
        notifiers.iter().for_each(|notifier| self.follow(notifier));
        // A listener that failed to undo may use the memory, which is kept then.
        if told.is_err() && entry.detached.is_none() {
            return (told.map(|()| id), Some(entry.listener));
        }
        lock(&self.entries).push(entry);
        (told.map(|()| id), None)
    }

    fn remove(&self, id: ListenerId) -> Result<Box<dyn MemoryListener<M::R>>, ListenerError> {
        self.check_process()?;
        let _turn = Turns::take([self]);
        let map = self.map.load_full();
        let notifiers = notifiers(map.iter());
        let _regions = Turns::take(notifiers.iter().copied());
        let mut entries = lock(&self.entries);
        let number = entries.iter().position(|entry| entry.id == id);
        let number = number.ok_or(ListenerError::Unknown)?;
        let changes = self.changes(map.iter(), []);
        let entry = entries.get_mut(number).map(slice::from_mut);
        let maps = [Arc::clone(&map)];
        tell(entry.unwrap_or_default(), &changes, &maps, OnError::Undo)?;
        Ok(entries.remove(number).listener)
    }

    fn track(&self, on: bool) -> Result<(), ListenerError> {
        self.check_process()?;
        let _turn = Turns::take([self]);
        if self.is_tracking() == on {
            return Ok(());
        }
        let map = self.map.load_full();
        let kind = if on {
            ChangeKind::TrackingStarted
        } else {
            ChangeKind::TrackingStopped
        };
        let changes = map.iter().map(|region| whole(kind, region));
        let changes: Vec<_> = changes.collect();
        let maps = [Arc::clone(&map)];
        tell(&mut lock(&self.entries), &changes, &maps, OnError::Undo)?;
        // Relaxed: the turn orders it.
        self.tracking.store(on, Ordering::Relaxed);
        Ok(())
    }

    fn detached(&self) -> Vec<DetachedListener> {
        let entries = lock(&self.entries);
        let detached = entries.iter().filter_map(|entry| {
            let kept = entry.detached.as_ref()?;
            Some(DetachedListener {
                id: entry.id,
                name: entry.name.clone(),
                error: kept.error.clone(),
            })
        });
        detached.collect()
    }
}

impl<M> Listeners<M>
where
    M: GuestMemoryBackend + Send + Sync + 'static,
{
    /// Returns an error in a child of fork(2).
    ///
    /// There, a call of a listener could unmap the memory of the parent. A thread of the parent may
    /// also have held a lock.
    fn check_process(&self) -> Result<(), ListenerError> {
        if self.process == std::process::id() {
            return Ok(());
        }
        Err(ListenerError::OtherProcess)
    }

    fn is_tracking(&self) -> bool {
        // Relaxed: the turn orders it.
        self.tracking.load(Ordering::Relaxed)
    }

    /// Returns the changes by which a listener learns of regions, or forgets them.
    fn changes<'a>(
        &self,
        gone: impl IntoIterator<Item = &'a M::R>,
        come: impl IntoIterator<Item = &'a M::R>,
    ) -> Vec<MemoryChange<'a, M::R>> {
        let mut changes = Vec::new();
        for region in gone {
            changes.extend(runs_of(ChangeKind::Unplugged, region));
            if self.is_tracking() {
                changes.push(whole(ChangeKind::TrackingStopped, region));
            }
            changes.push(whole(ChangeKind::Removed, region));
        }
        for region in come {
            changes.push(whole(ChangeKind::Added, region));
            if self.is_tracking() {
                changes.push(whole(ChangeKind::TrackingStarted, region));
            }
            changes.extend(runs_of(ChangeKind::Plugged, region));
        }
        changes
    }

    /// Tells the listeners of later changes of a region. The caller has the turns of both.
    fn follow(&self, notifier: &RegionNotifier) {
        let this: Weak<dyn Observer> = Weak::<Self>::clone(&self.this);
        notifier.attach(self.id, this);
    }

    /// Tells the listeners of changes of a region. The caller has the turn.
    fn tell_of_region(
        &self,
        notifier: &RegionNotifier,
        kind: ChangeKind,
        runs: &[(u64, u64)],
        on_error: OnError,
    ) -> Result<(), ListenerError> {
        self.check_process()?;
        let map = self.map.load_full();
        let mut changes = Vec::new();
        for region in map.iter() {
            if region.notifier().is_some_and(|it| it.id() == notifier.id()) {
                let change = |&(offset, len)| change(kind, region, offset, len);
                changes.extend(runs.iter().map(change));
            }
        }
        let mut entries = lock(&self.entries);
        tell(&mut entries, &changes, &[Arc::clone(&map)], on_error)
    }
}

impl<M> Observer for Listeners<M>
where
    M: GuestMemoryBackend + Send + Sync + 'static,
{
    fn announce(
        &self,
        notifier: &RegionNotifier,
        kind: ChangeKind,
        runs: &[(u64, u64)],
    ) -> Result<(), ListenerError> {
        self.tell_of_region(notifier, kind, runs, OnError::Undo)
    }

    fn undo(&self, notifier: &RegionNotifier, kind: ChangeKind, runs: &[(u64, u64)]) {
        if let Some(inverse) = kind.inverse() {
            let runs: Vec<_> = runs.iter().rev().copied().collect();
            // Cannot fail: listeners that fail are detached.
            let _ = self.tell_of_region(notifier, inverse, &runs, OnError::Detach);
        }
    }
}

/// Tells listeners of the changes of one transaction, and to commit them.
///
/// `maps` are those that a listener may use if it is detached. Without changes, no one is told.
fn tell<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    changes: &[MemoryChange<'_, M::R>],
    maps: &[Arc<M>],
    on_error: OnError,
) -> Result<(), ListenerError> {
    let mut told = Vec::new();
    let Err(mut error) = try_to_tell(entries, changes, maps, on_error, &mut told) else {
        return Ok(());
    };
    let undone = undo(entries, told, maps);
    if let ListenerError::Refused { detached, .. } | ListenerError::NotCommitted { detached, .. } =
        &mut error
    {
        *detached = undone;
    }
    Err(error)
}

/// Tells listeners of changes. Adds to `told` the number of each listener that was told, and of
/// which change.
fn try_to_tell<'a, M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    changes: &[MemoryChange<'a, M::R>],
    maps: &[Arc<M>],
    on_error: OnError,
    told: &mut Vec<(usize, MemoryChange<'a, M::R>)>,
) -> Result<(), ListenerError> {
    if changes.is_empty() {
        return Ok(());
    }
    for change in changes {
        let count = entries.len();
        for place in 0..count {
            let number = if change.kind().takes_away() {
                count.saturating_sub(1).saturating_sub(place)
            } else {
                place
            };
            let Some(entry) = attached(entries, number) else {
                continue;
            };
            match call(|| entry.listener.change(change)) {
                Ok(()) => told.push((number, *change)),
                Err(source) if on_error == OnError::Detach => entry.detach(maps, &source),
                Err(source) => {
                    if source.is::<NotAsBefore>() {
                        entry.detach(maps, &source);
                    }
                    return Err(ListenerError::Refused {
                        listener: entry.name.clone(),
                        kind: change.kind(),
                        start: change.start(),
                        len: change.len(),
                        detached: Vec::new(),
                        source,
                    });
                }
            }
        }
    }
    for number in 0..entries.len() {
        let Some(entry) = attached(entries, number) else {
            continue;
        };
        match call(|| entry.listener.commit()) {
            Ok(()) => {}
            Err(source) if on_error == OnError::Detach => entry.detach(maps, &source),
            Err(source) => {
                return Err(ListenerError::NotCommitted {
                    listener: entry.name.clone(),
                    detached: Vec::new(),
                    source,
                })
            }
        }
    }
    Ok(())
}

/// Tells listeners the inverse of what they were told, in reverse order.
///
/// Returns the names of the listeners that failed. They are detached.
fn undo<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    told: Vec<(usize, MemoryChange<'_, M::R>)>,
    maps: &[Arc<M>],
) -> Vec<String> {
    let numbers: BTreeSet<usize> = told.iter().map(|(number, _)| *number).collect();
    let mut failed = Vec::new();
    let mut undo = |number, step: &mut dyn FnMut(&mut dyn MemoryListener<M::R>) -> Result<_, _>| {
        let Some(entry) = attached(entries, number) else {
            return;
        };
        if let Err(source) = call(|| step(&mut *entry.listener)) {
            entry.detach(maps, &source);
            failed.push(entry.name.clone());
        }
    };
    for (number, change) in told.into_iter().rev() {
        if let Some(inverse) = change.inverse() {
            undo(number, &mut |listener| listener.change(&inverse));
        }
    }
    for number in numbers {
        undo(number, &mut |listener| listener.commit());
    }
    failed
}

/// Returns the name of a listener, for errors.
fn name_of<R>(listener: &mut dyn MemoryListener<R>) -> Result<String, ListenerError> {
    let mut name = String::new();
    let named = call(|| {
        name = listener.name().to_owned();
        Ok(())
    });
    named.map_err(|source| ListenerError::NotCommitted {
        listener: "without a name".to_owned(),
        detached: Vec::new(),
        source,
    })?;
    Ok(name)
}

/// Returns a listener that is not detached.
fn attached<M: GuestMemoryBackend>(
    entries: &mut [Entry<M>],
    number: usize,
) -> Option<&mut Entry<M>> {
    entries
        .get_mut(number)
        .filter(|entry| entry.detached.is_none())
}

impl<M: GuestMemoryBackend> Entry<M> {
    /// Keeps all that the listener may use, and tells it nothing more.
    fn detach(&mut self, maps: &[Arc<M>], error: &BoxError) {
        let mut text = String::new();
        // A panic of `Display` leaves the text empty.
        let _ = call(|| {
            text = error.to_string();
            Ok(())
        });
        let regions = maps.iter().flat_map(|map| map.iter());
        let pins =
            regions.filter_map(|region| Some(region.notifier()?.pin_always(0, region.len())));
        self.detached = Some(Kept {
            _pins: pins.collect(),
            _maps: maps.to_vec(),
            error: text,
        });
    }
}

fn change<R: GuestMemoryRegion>(
    kind: ChangeKind,
    region: &R,
    offset: u64,
    len: u64,
) -> MemoryChange<'_, R> {
    MemoryChange::new(kind, region, region.start_addr(), offset, len)
}

fn whole<R: GuestMemoryRegion>(kind: ChangeKind, region: &R) -> MemoryChange<'_, R> {
    change(kind, region, 0, region.len())
}

fn runs_of<R: GuestMemoryRegion>(
    kind: ChangeKind,
    region: &R,
) -> impl Iterator<Item = MemoryChange<'_, R>> {
    let runs = plugged_runs(region).into_iter();
    runs.map(move |(offset, len)| change(kind, region, offset, len))
}

/// Returns the accessible ranges of a region, as offset and length.
fn plugged_runs<R: GuestMemoryRegion>(region: &R) -> Vec<(u64, u64)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < region.len() {
        let left = to_usize(region.len().saturating_sub(at));
        let run = region.reachable_range(MemoryRegionAddress(at), left);
        if run.is_empty() {
            break;
        }
        let len = run.end.saturating_sub(run.start);
        runs.push((at.saturating_add(to_u64(run.start)), to_u64(len)));
        at = at.saturating_add(to_u64(run.end));
    }
    runs
}

/// Returns the notifiers of regions, each once, in the order in which their turns are taken.
fn notifiers<'a, R: GuestMemoryRegion + 'a>(
    regions: impl Iterator<Item = &'a R>,
) -> Vec<&'a RegionNotifier> {
    let mut notifiers: Vec<_> = regions
        .filter_map(|region| region.notifier().map(Arc::as_ref))
        .collect();
    notifiers.sort_unstable_by_key(|notifier| notifier.id());
    notifiers.dedup_by_key(|notifier| notifier.id());
    notifiers
}

/// Returns the regions of a map that another one does not have. Maps share regions, so a region is
/// known by its place in memory.
pub(super) fn regions_without<'a, M: GuestMemoryBackend>(map: &'a M, other: &M) -> Vec<&'a M::R> {
    let known: HashSet<*const M::R> = other.iter().map(ptr::from_ref).collect();
    let unknown = map
        .iter()
        .filter(|region| !known.contains(&ptr::from_ref(*region)));
    unknown.collect()
}
