//! [`ReceivedFiles`]: descriptors from another process, which are closed without waiting for it.
//! [`Requested`]: regions that may have such descriptors.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::region::{Backing, Region};
use crate::sys;

/// The maximum number of threads of this process that close files.
///
/// A server that never replies keeps its thread forever, and each description can bring one.
const MAX_THREADS: usize = 64;

/// The files that no thread closes yet, and the threads that close them.
#[derive(Debug)]
struct Closing {
    waiting: Vec<File>,
    threads: usize,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing {
    waiting: Vec::new(),
    threads: 0,
});

/// Descriptors that another process has sent.
///
/// close(2) may wait for the server of a file (FUSE), which may never reply. Dropping this closes
/// such files in a separate thread. Memfds and files that are still in use elsewhere are dropped at
/// once.
///
/// If [`MAX_THREADS`] threads are closing files already, one of them closes these later. If the
/// system refuses the thread, a later one closes them. The caller never waits for a server.
#[derive(Debug, Default)]
pub(crate) struct ReceivedFiles(Vec<Arc<File>>);

impl ReceivedFiles {
    /// Keeps the files of those regions that require seals.
    pub(super) fn of_sealed(regions: &[Region]) -> Self {
        let sealed = regions.iter().filter(|region| region.options.sealed);
        let files = sealed.filter_map(|region| match &region.backing {
            Backing::File { file, .. } => Some(Arc::clone(file)),
            _ => None,
        });
        let mut files: Vec<Arc<File>> = files.collect();
        files.sort_by_key(Arc::as_ptr);
        files.dedup_by(|one, other| Arc::ptr_eq(one, other));
        Self(files)
    }

    pub(crate) fn list(&self) -> &[Arc<File>] {
        &self.0
    }
}

impl From<Vec<Arc<File>>> for ReceivedFiles {
    fn from(files: Vec<Arc<File>>) -> Self {
        Self(files)
    }
}

impl Drop for ReceivedFiles {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.0).into_iter();
        let may_wait = files.filter(|file| !sys::can_be_sealed(file));
        // Returns the file to one of the threads that drop it at the same time.
        let slow: Vec<File> = may_wait.filter_map(Arc::into_inner).collect();
        if !slow.is_empty() {
            close_detached(slow);
        }
    }
}

/// Closes files in separate threads, or later if there can be no other thread now.
fn close_detached(files: Vec<File>) {
    let Some(mut closing) = lock_for_caller() else {
        return std::mem::forget(files);
    };
    closing.waiting.extend(files);
    if closing.threads >= MAX_THREADS {
        let count = closing.waiting.len();
        drop(closing);
        log_warning!("{count} descriptors stay open: {MAX_THREADS} threads are closing others");
        return;
    }
    closing.threads = closing.threads.saturating_add(1);
    drop(closing);
    if sys::run_detached(c"close", close_waiting).is_err() {
        if let Some(mut closing) = lock_for_caller() {
            closing.threads = closing.threads.saturating_sub(1);
        }
    }
}

/// Closes files until none waits.
fn close_waiting() {
    loop {
        let mut closing = CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = closing.waiting.pop() else {
            closing.threads = closing.threads.saturating_sub(1);
            return;
        };
        drop(closing);
        // May wait for its server. Other threads close the other files.
        drop(file);
    }
}

/// Locks the list of files, or returns `None` if it stays locked.
///
/// In a child of fork(2), a thread of the parent may have held the lock, and does not release it.
/// Otherwise it is held for a moment only.
fn lock_for_caller() -> Option<MutexGuard<'static, Closing>> {
    const TRIES: usize = 10_000;
    (0..TRIES).find_map(|_| match CLOSING.try_lock() {
        Ok(closing) => Some(closing),
        Err(TryLockError::Poisoned(closing)) => Some(closing.into_inner()),
        Err(TryLockError::WouldBlock) => {
            std::thread::yield_now();
            None
        }
    })
}

/// The regions of a builder. Dropping them closes the files of those that require seals, as
/// [`ReceivedFiles`] does.
#[derive(Debug, Default)]
pub(in crate::builder) struct Requested(pub(in crate::builder) Vec<Region>);

impl Drop for Requested {
    fn drop(&mut self) {
        // Dropped after the regions that use the files.
        let _received = ReceivedFiles::of_sealed(&self.0);
        self.0.clear();
    }
}
