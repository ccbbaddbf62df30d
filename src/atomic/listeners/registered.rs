//! [`Listeners`]: the listeners that a memory has, and the changes that they are told of.

use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::HashSet;
use std::slice;
use std::sync::{Arc, Mutex, Weak};

use arc_swap::ArcSwap;

use super::regions::{change, notifiers, regions_without, runs_of, whole};
use super::telling::{name_of, tell, Entry};
use super::{DetachedListener, ListenerId, MapObserver, OnError};
use crate::guest_memory::GuestMemoryBackend;
use crate::listeners::{
    lock, next_id, refuse_in_listener, ChangeKind, HasTurn, ListenerError, MemoryChange,
    MemoryListener, Observer, RegionNotifier, Turn, Turns,
};
use crate::region::GuestMemoryRegion;

/// The listeners of a memory.
pub(super) struct Listeners<M: GuestMemoryBackend> {
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

impl<M: GuestMemoryBackend> Listeners<M> {
    /// Creates the list of listeners of a memory.
    pub(super) fn new(map: Arc<ArcSwap<M>>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            id: next_id(),
            turn: Turn::default(),
            map,
            entries: Mutex::default(),
            tracking: AtomicBool::new(false),
            process: std::process::id(),
            this: Weak::clone(this),
        })
    }
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
