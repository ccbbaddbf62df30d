//! [`Snapshots`]: a value that is read without a lock and changed by operations that can be
//! replayed.
//!
//! ```text
//!   readers ──► current: Arc<Snapshot>, version 7
//!
//!   writer:     retired: Arc<Snapshot>, version 6   1. take the newest without readers, replay
//!               log:     … 7                           operation 7, and apply operation 8
//!                                                   2. make it current, and retire version 7
//! ```
//!
//! While no reader keeps a snapshot for long, there are two. Each operation is applied twice,
//! nothing is copied, and nothing waits.
//!
//! Readers that keep snapshots take them out of this exchange. A snapshot that was kept lacks many
//! operations: it is made equal to the current one, which costs one
//! [`clone_from`](Clone::clone_from). If every retired snapshot has readers, the current one is
//! cloned.
//!
//! [`RetiredList`] counts the readers of retired snapshots. Its lock is taken after the writer's,
//! never before. The writer does not hold it while it applies an operation or makes a copy, so
//! counting readers waits for neither.

use std::collections::VecDeque;

use crate::retired::sync::{lock, Arc, ArcSwap, Guard, Mutex};
use crate::retired::{RetiredList, Unread, Version};

/// A value that is changed by operations, which have the same effect on each copy of it.
pub(super) trait Replay: Clone {
    /// A change of the value.
    type Operation: core::fmt::Debug;
    /// The reason why an operation was refused.
    type Error;

    /// Applies an operation. An error leaves the value unchanged.
    fn apply(&mut self, operation: &Self::Operation) -> Result<(), Self::Error>;

    /// Returns the number of operations that take as long as one
    /// [`clone_from`](Clone::clone_from).
    fn operations_for_a_copy(&self) -> usize;
}

/// An immutable version of the value.
#[derive(Debug)]
pub(super) struct Snapshot<T> {
    value: T,
    /// The number of operations that were applied.
    version: u64,
}

impl<T> Snapshot<T> {
    /// Returns the value.
    #[inline(always)]
    pub(super) fn value(&self) -> &T {
        &self.value
    }
}

impl<T> Version for Arc<Snapshot<T>> {
    /// A snapshot that can be made current again while readers keep the others.
    const SPARES: usize = 1;

    fn number(&self) -> u64 {
        self.version
    }

    fn readers(&self) -> usize {
        // One count is the list's.
        Arc::strong_count(self).saturating_sub(1)
    }
}

/// A value with lock-free readers: see the documentation of the module.
#[derive(Debug)]
pub(super) struct Snapshots<T: Replay> {
    current: ArcSwap<Snapshot<T>>,
    retired: RetiredList<Arc<Snapshot<T>>>,
    writer: Mutex<Writer<T>>,
}

#[derive(Debug)]
struct Writer<T: Replay> {
    /// The current version.
    version: u64,
    /// The last operations, up to the current version.
    log: VecDeque<T::Operation>,
    /// A snapshot without readers, taken out of the list by the last change.
    spare: Option<Arc<Snapshot<T>>>,
}

impl<T: Replay> Snapshots<T> {
    /// Creates the first version.
    pub(super) fn new(value: T) -> Self {
        Self {
            current: ArcSwap::new(Arc::new(Snapshot { value, version: 0 })),
            retired: RetiredList::new(),
            writer: Mutex::new(Writer {
                version: 0,
                log: VecDeque::new(),
                spare: None,
            }),
        }
    }

    /// Returns the current snapshot, and makes the caller a reader of it.
    #[inline(always)]
    pub(super) fn load(&self) -> Guard<Snapshot<T>> {
        self.current.load()
    }

    /// Applies an operation, and returns the number of the new version.
    pub(super) fn apply(&self, operation: T::Operation) -> Result<u64, T::Error> {
        let mut writer = lock(&self.writer);
        let spare = writer.spare.take();
        let mut next = match spare.or_else(|| self.retired.take_unread()) {
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
        // The only owner: `next` was created above, or taken out of the list without a reader.
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
        let Unread { spare, surplus } = self.retired.retire(replaced);
        writer.spare = spare;
        drop(writer);
        drop(surplus);
        Ok(version)
    }

    /// Returns the number of readers of versions below `version`.
    pub(super) fn readers_before(&self, version: u64) -> usize {
        self.retired.readers_before(version)
    }
}

impl<T: Replay> Writer<T> {
    /// Makes a snapshot equal to the current one, by replay or by copy, whichever is faster.
    fn bring_up_to_date(&self, snapshot: &mut Snapshot<T>, current: &ArcSwap<Snapshot<T>>) {
        let lacks =
            usize::try_from(self.version.saturating_sub(snapshot.version)).unwrap_or(usize::MAX);
        let replayed = match self.log.len().checked_sub(lacks) {
            // An operation that succeeded once succeeds again.
            Some(done) => self
                .log
                .range(done..)
                .all(|operation| snapshot.value.apply(operation).is_ok()),
            None => false,
        };
        if !replayed {
            snapshot.value.clone_from(&current.load().value);
        }
        snapshot.version = self.version;
    }
}
