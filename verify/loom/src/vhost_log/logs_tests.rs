//! Threads write pages and mark them, while their log is replaced. The front end reads the pages in
//! the end.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use super::logs::Logs;

type Log = Arc<AtomicU64>;

/// Two pages of a guest, and the logs in which a back end marks them.
struct Guest {
    bytes: [AtomicU64; 2],
    logs: Logs<Log>,
}

fn guest() -> Arc<Guest> {
    Arc::new(Guest {
        bytes: [AtomicU64::new(0), AtomicU64::new(0)],
        logs: Logs::new(),
    })
}

fn log() -> Log {
    Arc::new(AtomicU64::new(0))
}

/// Writes a page on another thread.
fn write(guest: &Arc<Guest>, page: usize) -> JoinHandle<()> {
    let guest = Arc::clone(guest);
    thread::spawn(move || {
        guest.bytes[page].store(1, Ordering::Relaxed);
        guest.logs.mark_each(|log| {
            log.fetch_or(1 << page, Ordering::SeqCst);
        });
    })
}

impl Guest {
    /// Replaces the log, and waits without a deadline.
    fn replace(&self, log: &Log) {
        let wait = |_| {
            thread::yield_now();
            Ok::<_, ()>(())
        };
        self.logs.replace(Arc::clone(log), wait).unwrap();
    }

    /// Harvests a log, as the front end does, and reads the dirty pages.
    fn harvest(&self, log: &Log, sent: &mut [u64; 2]) {
        let dirty = log.swap(0, Ordering::SeqCst);
        for (page, sent) in sent.iter_mut().enumerate() {
            if dirty & (1 << page) != 0 {
                *sent = self.bytes[page].load(Ordering::Relaxed);
            }
        }
    }

    /// Reads all of memory.
    fn copy(&self) -> [u64; 2] {
        [0, 1].map(|page| self.bytes[page].load(Ordering::Relaxed))
    }
}

/// The front end harvests the old log once more after the acknowledgement.
#[test]
pub(super) fn replace_during_write_loses_no_page() {
    loom::model(|| {
        let (guest, logs) = (guest(), [log(), log()]);
        guest.replace(&logs[0]);
        let writer = write(&guest, 0);
        guest.replace(&logs[1]);
        let mut sent = [0; 2];
        guest.harvest(&logs[0], &mut sent);
        writer.join().unwrap();
        guest.harvest(&logs[1], &mut sent);
        assert_eq!(sent, [1, 0]);
    });
}

/// The writer may still use the logs of the first replacement during the second one.
#[test]
pub(super) fn two_replacements_during_write_lose_no_page() {
    loom::model(|| {
        let (guest, logs) = (guest(), [log(), log(), log()]);
        guest.replace(&logs[0]);
        let writer = write(&guest, 0);
        let mut sent = [0; 2];
        guest.replace(&logs[1]);
        guest.harvest(&logs[0], &mut sent);
        guest.replace(&logs[2]);
        guest.harvest(&logs[1], &mut sent);
        writer.join().unwrap();
        guest.harvest(&logs[2], &mut sent);
        assert_eq!(sent, [1, 0]);
    });
}

/// A replacement that fails at its deadline leaves all marks in the old log. It fails because of
/// one writer, while another one may have loaded both logs. A bounded number of preemptions is
/// explored, because a complete exploration would take hours.
#[test]
pub(super) fn failed_replacement_during_writes_loses_no_page() {
    let mut explored = loom::model::Builder::new();
    explored.preemption_bound = Some(3);
    explored.check(|| {
        let (guest, logs) = (guest(), [log(), log()]);
        guest.replace(&logs[0]);
        let writers = [0, 1].map(|page| write(&guest, page));
        let replaced = guest.logs.replace(Arc::clone(&logs[1]), Err);
        for writer in writers {
            writer.join().unwrap();
        }
        let mut sent = [0; 2];
        guest.harvest(&logs[0], &mut sent);
        if replaced.is_ok() {
            guest.harvest(&logs[1], &mut sent);
        }
        assert_eq!(sent, [1, 1]);
    });
}

/// The front end copies all of memory after the acknowledgement of the first log.
#[test]
pub(super) fn first_log_during_write_loses_no_page() {
    loom::model(|| {
        let (guest, log) = (guest(), log());
        let writer = write(&guest, 0);
        guest.replace(&log);
        let mut sent = guest.copy();
        writer.join().unwrap();
        guest.harvest(&log, &mut sent);
        assert_eq!(sent, [1, 0]);
    });
}

/// The writer has found the switch on, before the log was removed.
#[test]
pub(super) fn log_after_removal_during_write_loses_no_page() {
    loom::model(|| {
        let (guest, logs) = (guest(), [log(), log()]);
        guest.replace(&logs[0]);
        let writer = write(&guest, 0);
        guest.logs.remove();
        guest.replace(&logs[1]);
        let mut sent = guest.copy();
        writer.join().unwrap();
        guest.harvest(&logs[1], &mut sent);
        assert_eq!(sent, [1, 0]);
    });
}
