//! [`Snapshots`]: a value that is read without a lock and changed by operations that can be done again.
//!
//! ```text
//!   readers ──► current: Arc<Snapshot>, version 7         they keep what they loaded as long as they like
//!
//!   writer:     spares:  Arc<Snapshot>, version 6   1. one that nobody reads: do the operations that it lacks again (7), and the new one (8)
//!               log:     … 7                        2. make it the current one; the old one is a spare
//! ```
//!
//! In the steady state there are two snapshots, and every operation is done twice; nothing is copied and nothing waits. A reader that keeps its snapshot for
//! long takes that out of the exchange: then a copy is made, once.
//!
//! # When nobody reads what was before
//!
//! `swap` counts every reader that has loaded the pointer before it returns (arc-swap pays their debts), and nobody loads it after. So the count of a
//! snapshot that is not the current one only falls. A version is out of use when every snapshot with a lower one, the spares and those that
//! were given up with readers in them, has no count but the writer's own. Counts are read under the writer's lock, and followed by an acquiring
//! fence: what a reader did with its snapshot happened before.

use super::sync::{fence, Arc, ArcSwap, Guard, Mutex, Ordering};

/// A value that is changed by operations that can be done again, on another copy of it, with the same outcome.
pub(super) trait Replay: Clone {
    /// What changes it.
    type Operation: core::fmt::Debug;
    /// Why it was not changed.
    type Error;

    /// Does an operation. With an error, nothing has changed.
    fn apply(&mut self, operation: &Self::Operation) -> Result<(), Self::Error>;

    /// How many operations take as long as copying the value.
    fn operations_for_a_copy(&self) -> usize;
}

/// A value as it was after so many operations.
#[derive(Clone, Debug)]
pub(super) struct Snapshot<T> {
    value: T,
    version: u64,
}

impl<T> Snapshot<T> {
    /// The value.
    #[inline(always)]
    pub(super) fn value(&self) -> &T {
        &self.value
    }
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Snapshots<T: Replay> {
    current: ArcSwap<Snapshot<T>>,
    writer: Mutex<Writer<T>>,
}

#[derive(Debug)]
struct Writer<T: Replay> {
    /// The version of the current one.
    version: u64,
    /// Ones that were current, to be made current again when nobody reads them.
    spares: Vec<Arc<Snapshot<T>>>,
    /// Ones that had readers when they were too old to be made current again.
    left: Vec<Arc<Snapshot<T>>>,
    /// The last operations, up to the current version.
    log: Vec<T::Operation>,
}

/// Spares at most. More than two are kept only while readers are in them.
const SPARES: usize = 3;

impl<T: Replay> Snapshots<T> {
    /// Begins with a value.
    pub(super) fn new(value: T) -> Self {
        Self {
            current: ArcSwap::new(Arc::new(Snapshot { value, version: 0 })),
            writer: Mutex::new(Writer {
                version: 0,
                spares: Vec::new(),
                left: Vec::new(),
                log: Vec::new(),
            }),
        }
    }

    /// The value of the moment. It stays as it is.
    #[inline(always)]
    pub(super) fn load(&self) -> Guard<Snapshot<T>> {
        self.current.load()
    }

    /// Does an operation. Returns its version: see [`readers_before`](Self::readers_before).
    pub(super) fn apply(&self, operation: T::Operation) -> Result<u64, T::Error> {
        let mut writer = super::sync::lock(&self.writer);
        let mut next = writer.take_spare().unwrap_or_else(|| {
            let copy = Snapshot::clone(&self.current.load());
            Arc::new(copy)
        });
        let version = writer.version.saturating_add(1);
        // Nobody else has it: it was taken out because of that, or made here.
        let outcome = match Arc::get_mut(&mut next) {
            Some(snapshot) => snapshot
                .value
                .apply(&operation)
                .map(|()| snapshot.version = version),
            None => Ok(()),
        };
        if let Err(error) = outcome {
            writer.spares.push(next);
            return Err(error);
        }
        writer.version = version;
        writer.log.push(operation);
        let cost_of_copy = next.value.operations_for_a_copy();
        let before = self.current.swap(next);
        writer.spares.push(before);
        writer.tidy(cost_of_copy);
        Ok(version)
    }

    /// How many readers there are of what was before a version.
    pub(super) fn readers_before(&self, version: u64) -> usize {
        let mut writer = super::sync::lock(&self.writer);
        writer.forget_unread();
        let before = writer.spares.iter().chain(&writer.left);
        let readers = before
            .filter(|snapshot| snapshot.version < version)
            .map(|snapshot| Arc::strong_count(snapshot).saturating_sub(1))
            .sum();
        // Each reader gave its count back with a release, and the counts were read from what came of that.
        fence(Ordering::Acquire);
        readers
    }
}

impl<T: Replay> Writer<T> {
    /// Takes out the newest spare that nobody reads, with the operations done that it lacks.
    fn take_spare(&mut self) -> Option<Arc<Snapshot<T>>> {
        // The newest is the last.
        let number = self
            .spares
            .iter_mut()
            .rposition(|spare| Arc::get_mut(spare).is_some())?;
        let mut spare = self.spares.remove(number);
        let snapshot = Arc::get_mut(&mut spare)?;
        let lacks = usize::try_from(self.version.saturating_sub(snapshot.version)).ok()?;
        let done = self.log.len().checked_sub(lacks)?;
        for operation in self.log.get(done..)? {
            // What was done once can be done again.
            snapshot.value.apply(operation).ok()?;
        }
        snapshot.version = self.version;
        Some(spare)
    }

    /// Lets go of those that were given up and have no readers now.
    fn forget_unread(&mut self) {
        self.left.retain(|snapshot| Arc::strong_count(snapshot) > 1);
    }

    /// Gives up spares that it would take longer to bring up to date than to make anew, and forgets operations that no spare lacks.
    fn tidy(&mut self, operations_for_a_copy: usize) {
        let worth = u64::try_from(operations_for_a_copy).unwrap_or(u64::MAX);
        while let Some(oldest) = self.spares.first() {
            let lacks = self.version.saturating_sub(oldest.version);
            if self.spares.len() <= SPARES && lacks <= worth {
                break;
            }
            let oldest = self.spares.remove(0);
            self.forget_unread();
            self.left.push(oldest);
        }
        let oldest = self.spares.first().map_or(self.version, |spare| spare.version);
        let lacks = usize::try_from(self.version.saturating_sub(oldest)).unwrap_or(usize::MAX);
        let unneeded = self.log.len().saturating_sub(lacks);
        // Not one by one: that would move all the others each time.
        if unneeded >= lacks.max(16) {
            self.log.drain(..unneeded);
        }
    }
}
