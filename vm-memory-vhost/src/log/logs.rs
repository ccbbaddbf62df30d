//! [`Logs`]: the logs in which writes are marked, and their replacement.
//!
//! ```text
//!   replace   │ old ──► old and new ──► wait ──► new       then acknowledge
//!   writers   │ old     both            both     new
//! ```
//!
//! # Replacement
//!
//! A front end harvests the old log for the last time after the acknowledgement. So a mark must be
//! in the old log before it, or in the new log.
//!
//! A writer stores its data, loads the current logs, marks in them, and releases them. A
//! replacement first publishes both logs, and then waits until no writer uses logs that were
//! published earlier. A writer that the wait has found has marked in the old log before the
//! acknowledgement. Any other writer marks in both logs, or in the new one only.
//!
//! If the wait ends at its deadline, the old log is published alone again. All marks since the
//! beginning are in the old log, so nothing is lost.
//!
//! Before arc-swap's `swap` returns, it adds each writer that uses the old pointer to the count of
//! the pointer. No writer loads that pointer later. So the count can only fall. A writer releases
//! it with a release operation, which the acquire fence after the load of the count pairs with. The
//! module documentation of `retired::list` in vm-memory has the details.
//!
//! # Start
//!
//! A writer that finds no log does not mark. The front end then copies the page with all memory. So
//! both sides have a full fence between their two steps:
//!
//! | thread | first | fence | then |
//! |---|---|---|---|
//! | writer | stores the data | `W` | loads the switch, or the current logs |
//! | replacement | publishes the logs, and switches on | `C` | acknowledges; the front end copies |
//!
//! Of the two fences one precedes the other in the total order. If `W` comes first, the front end
//! copies the data. If `C` comes first, the writer finds a log.
//!
//! The switch makes the common case cheap: there is no log. A writer may find the switch on after
//! the log was removed. It then executes a second `W`, and loads the logs again.
//!
//! `verify/loom` explores this file. Its mutants leave out the first `W`, `C` or the wait, and show
//! that a model loses a page. They do not cover the second `W` and the acquire fence.

use super::sync::{fence, lock, Arc, ArcSwap, AtomicBool, Mutex, Ordering};

/// The logs that writers mark at one time. `second` is present only during a replacement.
#[derive(Debug)]
pub(super) struct Current<L> {
    first: Option<L>,
    second: Option<L>,
}

impl<L> Current<L> {
    /// Returns the logs.
    pub(super) fn iter(&self) -> impl Iterator<Item = &L> {
        self.first.iter().chain(&self.second)
    }
}

/// The logs in which writes are marked.
#[derive(Debug)]
pub(super) struct Logs<L> {
    /// Whether there is a log.
    is_on: AtomicBool,
    current: ArcSwap<Current<L>>,
    /// The logs that were published earlier and may still be used, the oldest first. A replacement
    /// holds the lock.
    retired: Mutex<Vec<Arc<Current<L>>>>,
}

impl<L: Clone> Logs<L> {
    /// Creates a switch without a log.
    pub(super) fn new() -> Self {
        Self {
            is_on: AtomicBool::new(false),
            current: ArcSwap::new(current(None, None)),
            retired: Mutex::new(Vec::new()),
        }
    }

    /// Returns whether there is a log.
    pub(super) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::SeqCst)
    }

    /// Calls `mark` for each log in which a write must be marked. The data were stored before.
    #[inline]
    pub(super) fn mark_each(&self, mark: impl FnMut(&L)) {
        if self.is_on.load(Ordering::Relaxed) || self.is_on_after_fence() {
            self.mark_each_current(mark);
        }
    }

    #[inline(never)]
    fn is_on_after_fence(&self) -> bool {
        fence(Ordering::SeqCst);
        self.is_on()
    }

    fn mark_each_current(&self, mark: impl FnMut(&L)) {
        let mut current = self.current.load();
        if current.first.is_none() {
            // The log was removed in the meantime. Another one may have been added since.
            fence(Ordering::SeqCst);
            current = self.current.load();
        }
        current.iter().for_each(mark);
    }

    /// Returns whether no replacement holds the lock.
    #[cfg(test)]
    pub(super) fn is_unlocked(&self) -> bool {
        self.retired.try_lock().is_ok()
    }

    /// Returns whether `check` returns `true` for all logs.
    pub(super) fn all(&self, check: impl FnMut(&L) -> bool) -> bool {
        self.current.load().iter().all(check)
    }

    /// Replaces the log, or adds the first one. When this returns `Ok`, the change may be
    /// acknowledged.
    ///
    /// `wait` is called with the number of writers that use earlier logs, until there are none.
    ///
    /// # Errors
    ///
    /// Returns the error of `wait`. The old log then stays.
    pub(super) fn replace<E>(
        &self,
        new: L,
        mut wait: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<(), E> {
        // Dropped after the lock, because the close of a file may wait for its server. So it
        // is declared first. It owns the old log as long as `old` does.
        let mut unused = Vec::new();
        let mut retired = lock(&self.retired);
        let old = self.current.load().first.clone();
        let publish = |retired: &mut Vec<_>, first: Option<L>, second| {
            let is_on = first.is_some();
            retired.push(self.current.swap(current(first, second)));
            self.is_on.store(is_on, Ordering::SeqCst);
        };
        publish(&mut retired, Some(new.clone()), old.clone());
        // `C`.
        fence(Ordering::SeqCst);
        loop {
            let writers = writers(&mut retired, &mut unused);
            if writers == 0 {
                break;
            }
            if let Err(error) = wait(writers) {
                publish(&mut retired, old, None);
                return Err(error);
            }
        }
        publish(&mut retired, Some(new), None);
        // Usually the last owner of the old log.
        writers(&mut retired, &mut unused);
        Ok(())
    }

    /// Removes the log. Writers that have loaded it may still mark in it.
    pub(super) fn remove(&self) {
        // Dropped after the lock, as in `replace`.
        let mut unused = Vec::new();
        let mut retired = lock(&self.retired);
        retired.push(self.current.swap(current(None, None)));
        self.is_on.store(false, Ordering::SeqCst);
        writers(&mut retired, &mut unused);
    }
}

fn current<L>(first: Option<L>, second: Option<L>) -> Arc<Current<L>> {
    Arc::new(Current { first, second })
}

/// Returns the number of writers that use what was published earlier. Moves what nobody uses to
/// `unused`.
///
/// If there are none, all their marks happen before the call returns.
fn writers<L>(retired: &mut Vec<Arc<Current<L>>>, unused: &mut Vec<Arc<Current<L>>>) -> usize {
    let mut writers = 0usize;
    unused.extend(retired.extract_if(.., |current| {
        // One owner is the list.
        let others = Arc::strong_count(current).saturating_sub(1);
        writers = writers.saturating_add(others);
        others == 0
    }));
    fence(Ordering::Acquire);
    writers
}
