//! [`ReceivedFiles`]: descriptors from another process, which are closed without waiting for it.
//! [`Requested`]: regions that may have such descriptors.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use crate::region::{Backing, Region};
use crate::sys;

/// The maximum number of threads of this process that close files.
///
/// A server that never replies keeps its thread for ever, and each description can bring one.
const MAX_THREADS: usize = 64;

/// The number of threads that are closing files.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Descriptors that another process has sent.
///
/// close(2) may wait for the server of a file (FUSE), which may never reply. Dropping this closes
/// such files in a separate thread. Memfds and files that are still in use elsewhere are dropped at
/// once.
///
/// If [`MAX_THREADS`] threads are closing files already, or if the system refuses the thread, the
/// files stay open until the process ends. The caller never waits for a server.
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

/// Closes files in a separate thread, or leaves them open if there can be no such thread.
fn close_detached(files: Vec<File>) {
    // Relaxed: the counter protects no other memory.
    let one_more = |threads: usize| (threads < MAX_THREADS).then(|| threads.saturating_add(1));
    if THREADS
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
        .is_err()
    {
        let count = files.len();
        log_warning!("{count} descriptors stay open: {MAX_THREADS} threads are closing others");
        return std::mem::forget(files);
    }
    // Nothing drops `files` in this thread, even if the thread is refused.
    let mut files = ManuallyDrop::new(files);
    let close = move || {
        drop(std::mem::take(&mut *files));
        THREADS.fetch_sub(1, Ordering::Relaxed);
    };
    if sys::run_detached(c"close", close).is_err() {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The regions of a builder. Dropping them closes the files of those that require seals, as
/// [`ReceivedFiles`] does.
#[derive(Debug, Default)]
pub(super) struct Requested(pub(super) Vec<Region>);

impl Drop for Requested {
    fn drop(&mut self) {
        // Dropped after the regions that use the files.
        let _received = ReceivedFiles::of_sealed(&self.0);
        self.0.clear();
    }
}
