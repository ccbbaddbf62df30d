//! [`Snapshots`]: a value that is read without a lock and changed by operations that can be done again.
//!
//! ```text
//!   readers ──► current: Arc<Snapshot>, version 7         they keep what they loaded as long as they like
//!
//!   writer:     before:  Arc<Snapshot>, version 6   1. the newest that nobody reads: do the operations that it lacks again (7), and the new one (8)
//!               log:     … 7                        2. make it the current one; the old one is one of those before
//! ```
//!
//! While nobody keeps a snapshot for long there are two, and every operation is done twice; nothing is copied and nothing waits. Readers that keep theirs
//! take them out of the exchange. What they let go of lacks many operations: it is made equal to the current one, which costs what
//! [`clone_from`](Clone::clone_from) does. Where there is none, a copy is made.
//!
//! # When nobody reads what was before
//!
//! `swap` counts every reader that has loaded the pointer before it returns (arc-swap pays their debts), and nobody loads it after. So the count of a
//! snapshot that is not the current one only falls. A version is out of use when every snapshot with a lower one has no count but the list's own.
//! Counts are read under the lock of the list, and followed by an acquiring fence: what a reader did with its snapshot happened before.
//!
//! The writer takes a snapshot out of the list to change it, and puts the one that it has replaced in, a moment after nobody loads that any more. Who looks in
//! between misses neither: the first had no reader, and the second is of the version right before the one that is being made, so that nobody waits for
//! it yet. So the list is locked only to go over it, and who asks for readers never waits for an operation or a copy.

use std::collections::VecDeque;

use super::sync::{fence, Arc, ArcSwap, Guard, Mutex, Ordering};

/// A value that is changed by operations that can be done again, on another copy of it, with the same outcome.
pub(super) trait Replay: Clone {
    /// What changes it.
    type Operation: core::fmt::Debug;
    /// Why it was not changed.
    type Error;

    /// Does an operation. With an error, nothing has changed.
    fn apply(&mut self, operation: &Self::Operation) -> Result<(), Self::Error>;

    /// How many operations take as long as making another value equal to this one, by [`clone_from`](Clone::clone_from).
    fn operations_for_a_copy(&self) -> usize;
}

/// A value as it was after so many operations.
#[derive(Debug)]
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

type List<T> = Vec<Arc<Snapshot<T>>>;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Snapshots<T: Replay> {
    current: ArcSwap<Snapshot<T>>,
    /// Ones that were current, the oldest first. It is locked after the writer, never before.
    before: Mutex<List<T>>,
    writer: Mutex<Writer<T>>,
}

#[derive(Debug)]
struct Writer<T: Replay> {
    /// The version of the current one.
    version: u64,
    /// The last operations, up to the current version.
    log: VecDeque<T::Operation>,
    /// One that nobody reads, taken out of the list when that was locked last.
    spare: Option<Arc<Snapshot<T>>>,
}

/// How many are kept in the list that nobody reads, to be made current again when somebody reads the others.
const SPARES: usize = 1;

impl<T: Replay> Snapshots<T> {
    /// Begins with a value.
    pub(super) fn new(value: T) -> Self {
        Self {
            current: ArcSwap::new(Arc::new(Snapshot { value, version: 0 })),
            before: Mutex::new(Vec::new()),
            writer: Mutex::new(Writer {
                version: 0,
                log: VecDeque::new(),
                spare: None,
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
        let spare = writer.spare.take();
        let mut next = match spare.or_else(|| take_spare(&mut super::sync::lock(&self.before))) {
            Some(spare) => spare,
            None => {
                let current = self.current.load();
                Arc::new(Snapshot {
                    value: current.value.clone(),
                    version: writer.version,
                })
            }
        };
        let version = writer.version.saturating_add(1);
        // Nobody else has it: it was taken out because of that, or made here.
        let outcome = match Arc::get_mut(&mut next) {
            Some(snapshot) => {
                writer.bring_up_to_date(snapshot, &self.current);
                snapshot
                    .value
                    .apply(&operation)
                    .map(|()| snapshot.version = version)
            }
            None => Ok(()),
        };
        if let Err(error) = outcome {
            writer.spare = Some(next);
            return Err(error);
        }
        let worth = next.value.operations_for_a_copy();
        writer.version = version;
        writer.log.push_back(operation);
        while writer.log.len() > worth {
            writer.log.pop_front();
        }
        let replaced = self.current.swap(next);
        let mut before = super::sync::lock(&self.before);
        before.push(replaced);
        writer.spare = take_spare(&mut before);
        let unneeded = take_unread(&mut before);
        drop(before);
        drop(writer);
        // Not under a lock: it may be the last to have many things.
        drop(unneeded);
        Ok(version)
    }

    /// How many readers there are of what was before a version.
    pub(super) fn readers_before(&self, version: u64) -> usize {
        let mut list = super::sync::lock(&self.before);
        let readers = list
            .iter()
            .filter(|snapshot| snapshot.version < version)
            .map(|snapshot| Arc::strong_count(snapshot).saturating_sub(1))
            .sum();
        // Each reader gave its count back with a release, and the counts were read from what came of that.
        fence(Ordering::Acquire);
        let unneeded = take_unread(&mut list);
        drop(list);
        drop(unneeded);
        readers
    }
}

/// Whether nobody reads one of the list: then nobody ever will.
fn is_unread<T>(snapshot: &Arc<Snapshot<T>>) -> bool {
    // Who then changes it, or lets go of it, looks again with an acquiring load.
    Arc::strong_count(snapshot) == 1
}

/// Takes out the newest that nobody reads.
fn take_spare<T>(before: &mut List<T>) -> Option<Arc<Snapshot<T>>> {
    let newest = before.iter().rposition(is_unread)?;
    Some(before.remove(newest))
}

/// Takes out those that nobody reads, but for the newest ones that are kept.
fn take_unread<T>(before: &mut List<T>) -> List<T> {
    let unread = before.iter().filter(|snapshot| is_unread(snapshot)).count();
    let mut surplus = unread.saturating_sub(SPARES);
    if surplus == 0 {
        return Vec::new();
    }
    before
        .extract_if(.., |snapshot| {
            let taken = surplus != 0 && is_unread(snapshot);
            surplus = surplus.saturating_sub(usize::from(taken));
            taken
        })
        .collect()
}

impl<T: Replay> Writer<T> {
    /// Makes a snapshot equal to the current one: by the operations that it lacks, if that is shorter than by a copy.
    fn bring_up_to_date(&self, snapshot: &mut Snapshot<T>, current: &ArcSwap<Snapshot<T>>) {
        let lacks =
            usize::try_from(self.version.saturating_sub(snapshot.version)).unwrap_or(usize::MAX);
        // What was done once can be done again.
        let done_again = match self.log.len().checked_sub(lacks) {
            Some(done) => self
                .log
                .range(done..)
                .all(|operation| snapshot.value.apply(operation).is_ok()),
            None => false,
        };
        if !done_again {
            snapshot.value.clone_from(&current.load().value);
        }
        snapshot.version = self.version;
    }
}
