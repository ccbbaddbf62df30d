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
//!
//! # Requests
//!
//! A reader that misses something in a snapshot requests it ([`Snapshots::request`]), and waits
//! until an operation resolves the request ([`Snapshots::wait`]). No wake-up is lost. The requests
//! are under the writer's lock, with the number of the current version. A request is refused if
//! that is not the version of the reader's snapshot. So each operation that the snapshot lacks
//! comes after the request, finds it, and resolves it before the lock is released. The reader
//! checks for that under the same lock, which the condition variable releases when it waits.

use std::collections::VecDeque;
use std::time::Instant;

use super::requests::{Requests, Waits};
use crate::convert::to_usize;
use crate::retired::sync::{lock, make_mut, wait, Arc, ArcSwap, Condvar, Guard, Mutex};
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

    /// Returns the first and the last address for which an operation resolves requests, and the
    /// bits of the access that it permits.
    fn resolves(operation: &Self::Operation) -> Option<(u64, u64, u8)>;
}

/// An immutable version of the value.
#[derive(Clone, Debug)]
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
    /// Signalled after requests were resolved or taken back.
    resolved: Condvar,
}

#[derive(Debug)]
struct Writer<T: Replay> {
    /// The current version.
    version: u64,
    /// The last operations, up to the current version.
    log: VecDeque<T::Operation>,
    /// A snapshot without readers, taken out of the list by the last change.
    spare: Option<Arc<Snapshot<T>>>,
    requests: Requests,
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
                requests: Requests::default(),
            }),
            resolved: Condvar::new(),
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
        // Copies nothing: `next` was created above, or taken out of the list without a reader.
        let snapshot = make_mut(&mut next);
        writer.bring_up_to_date(snapshot, &self.current);
        if let Err(error) = snapshot.value.apply(&operation) {
            writer.spare = Some(next);
            return Err(error);
        }
        snapshot.version = version;
        let resolves = !writer.requests.is_empty()
            && T::resolves(&operation).is_some_and(|(first, last, permits)| {
                writer.requests.resolve(first, last, permits)
            });
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
        if resolves {
            self.resolved.notify_all();
        }
        drop(surplus);
        Ok(version)
    }

    /// Lets a reader wait for addresses that it misses in the snapshot `version`.
    ///
    /// Returns the indexes of the addresses that the reader must request. Returns `None` if there
    /// is a later version; with `None` as version, that does not matter.
    pub(super) fn request(
        &self,
        version: Option<u64>,
        misses: impl Iterator<Item = u64>,
        access: u8,
        waits: &mut Waits,
    ) -> Option<Vec<usize>> {
        let writer = &mut lock(&self.writer);
        if version.is_some_and(|version| version != writer.version) {
            return None;
        }
        let new = misses
            .enumerate()
            .filter(|(_, first)| writer.requests.wait_for(*first, access, waits))
            .map(|(index, _)| index);
        Some(new.collect())
    }

    /// Waits until all requests of a reader were resolved or taken back, or `is_over` returns true.
    ///
    /// Returns at the deadline at the latest, and `true` if it returns earlier. Call
    /// [`wake`](Self::wake) after changing the result of `is_over`.
    pub(super) fn wait(
        &self,
        waits: &mut Waits,
        deadline: Option<Instant>,
        is_over: impl Fn() -> bool,
    ) -> bool {
        let mut writer = lock(&self.writer);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let is_late = left.is_some_and(|left| left.is_zero());
            if is_late || writer.requests.are_resolved(waits) || is_over() {
                return !is_late;
            }
            writer = wait(&self.resolved, writer, left);
        }
    }

    /// Takes back the requests of a reader that are not resolved.
    pub(super) fn take_back(&self, waits: &mut Waits) {
        if lock(&self.writer).requests.take_back(waits) {
            self.resolved.notify_all();
        }
    }

    /// Lets all waiting readers check again whether their wait is over.
    pub(super) fn wake(&self) {
        // A reader that has checked before holds the lock until it waits.
        drop(lock(&self.writer));
        self.resolved.notify_all();
    }

    /// Returns the number of readers of versions below `version`.
    pub(super) fn readers_before(&self, version: u64) -> usize {
        self.retired.readers_before(version)
    }
}

impl<T: Replay> Writer<T> {
    /// Makes a snapshot equal to the current one, by replay or by copy, whichever is faster.
    fn bring_up_to_date(&self, snapshot: &mut Snapshot<T>, current: &ArcSwap<Snapshot<T>>) {
        let lacks = to_usize(self.version.saturating_sub(snapshot.version));
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[derive(Clone, Debug)]
    struct Sum(u64);

    impl Replay for Sum {
        type Operation = u64;
        type Error = u64;

        fn apply(&mut self, more: &u64) -> Result<(), u64> {
            self.0 = self.0.checked_add(*more).ok_or(*more)?;
            Ok(())
        }

        fn operations_for_a_copy(&self) -> usize {
            4
        }

        fn resolves(_: &u64) -> Option<(u64, u64, u8)> {
            None
        }
    }

    /// The writer's spare has no other owner. If it had one, no operation would be lost.
    #[test]
    fn apply_to_spare_with_other_owner_applies_to_a_copy() {
        let snapshots = Snapshots::new(Sum(0));
        assert_eq!((snapshots.apply(1), snapshots.apply(2)), (Ok(1), Ok(2)));
        let kept = lock(&snapshots.writer).spare.clone().unwrap();
        let before = kept.value.0;
        assert_eq!((snapshots.apply(4), snapshots.load().value.0), (Ok(3), 7));
        assert_eq!(snapshots.apply(u64::MAX), Err(u64::MAX));
        assert_eq!((snapshots.apply(8), snapshots.load().value.0), (Ok(4), 15));
        assert_eq!(kept.value.0, before);
    }
}
