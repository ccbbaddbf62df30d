//! Readers of snapshots, a writer that changes them, and somebody who waits: nobody reads what was before when that is said to be out of use, and nobody
//! reads what is being changed.
//!
//! Loom's counts order by themselves what the library's order by a fence behind them: that fence is argued in `src/iommu/snapshots.rs`, and not shown here.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::snapshots::{Replay, Snapshots};

/// A number, which loom sees being read and changed: at the same time, that fails.
#[derive(Debug)]
struct Watched(UnsafeCell<u64>);

impl Watched {
    fn get(&self) -> u64 {
        // SAFETY: loom checks that nobody changes it at the same time; the pointer is to a number that lives.
        self.0.with(|number| unsafe { *number })
    }
}

impl Clone for Watched {
    fn clone(&self) -> Self {
        Self(UnsafeCell::new(self.get()))
    }
}

impl Replay for Watched {
    type Operation = u64;
    type Error = u64;

    /// Adds an even number.
    fn apply(&mut self, more: &u64) -> Result<(), u64> {
        if !more.is_multiple_of(2) {
            return Err(*more);
        }
        // SAFETY: as in `get`; and this is the only reference.
        self.0.with_mut(|number| unsafe { *number += more });
        Ok(())
    }

    fn operations_for_a_copy(&self) -> usize {
        1
    }
}

#[test]
fn nobody_reads_what_is_being_changed() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let reader = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || {
                let first = snapshots.load();
                let before = first.value().get();
                let second = snapshots.load().value().get();
                assert_eq!(first.value().get(), before, "a snapshot has changed");
                assert!(before <= second);
            })
        };
        for number in 1..=2 {
            assert_eq!(snapshots.apply(2), Ok(number));
            assert_eq!(snapshots.apply(1), Err(1));
            assert_eq!(snapshots.load().value().get(), 2 * number);
        }
        reader.join().unwrap();
    });
}

/// What a front end does with a page when an invalidation is acknowledged: it gives it to somebody else, who writes to it. A reader that still reads it is seen
/// by loom.
#[test]
fn what_is_out_of_use_is_not_read() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let page = Arc::new(Watched(UnsafeCell::new(0)));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (snapshots, page) = (Arc::clone(&snapshots), Arc::clone(&page));
                thread::spawn(move || {
                    let snapshot = snapshots.load();
                    if snapshot.value().get() == 0 {
                        // Mapped: while the snapshot is kept, it may be read.
                        page.get();
                    }
                })
            })
            .collect();
        let version = snapshots.apply(2).unwrap();
        if snapshots.readers_before(version) == 0 {
            // SAFETY: that is what is to be shown: loom fails if somebody reads it now.
            page.0.with_mut(|number| unsafe { *number = 1 });
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(snapshots.readers_before(version), 0);
    });
}

/// A number that copies share until one of them changes it, as the leaves of an IOTLB's table are shared.
#[derive(Debug)]
struct Shared(Arc<Watched>);

impl Clone for Shared {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    fn clone_from(&mut self, source: &Self) {
        if !Arc::ptr_eq(&self.0, &source.0) {
            self.0 = Arc::clone(&source.0);
        }
    }
}

impl Replay for Shared {
    type Operation = u64;
    type Error = u64;

    fn apply(&mut self, more: &u64) -> Result<(), u64> {
        match Arc::get_mut(&mut self.0) {
            Some(own) => own.apply(more),
            None => {
                let mut copy = Watched::clone(&self.0);
                copy.apply(more)?;
                self.0 = Arc::new(copy);
                Ok(())
            }
        }
    }

    /// No operation is done again: what is unread is made equal to the current one.
    fn operations_for_a_copy(&self) -> usize {
        0
    }
}

#[test]
fn what_snapshots_share_is_not_changed_while_one_of_them_is_read() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Shared(Arc::new(Watched(UnsafeCell::new(
            0,
        ))))));
        let reader = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || {
                let first = snapshots.load();
                let before = first.value().0.get();
                let second = snapshots.load().value().0.get();
                assert_eq!(first.value().0.get(), before, "a snapshot has changed");
                assert!(before <= second);
            })
        };
        for number in 1..=3 {
            assert_eq!(snapshots.apply(2), Ok(number));
            assert_eq!(snapshots.load().value().0.get(), 2 * number);
        }
        reader.join().unwrap();
    });
}

/// One who waits for a change, while another makes the one before or the next one: at no moment does a reader go unseen.
#[test]
fn what_is_out_of_use_is_not_read_while_others_change() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Shared(Arc::new(Watched(UnsafeCell::new(
            0,
        ))))));
        let page = Arc::new(Watched(UnsafeCell::new(0)));
        let reader = {
            let (snapshots, page) = (Arc::clone(&snapshots), Arc::clone(&page));
            thread::spawn(move || {
                let snapshot = snapshots.load();
                if snapshot.value().0.get() == 0 {
                    page.get();
                }
            })
        };
        let writer = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || {
                snapshots.apply(2).unwrap();
            })
        };
        let version = snapshots.apply(2).unwrap();
        if snapshots.readers_before(version) == 0 {
            // SAFETY: that is what is to be shown: loom fails if somebody reads it now.
            page.0.with_mut(|number| unsafe { *number = 1 });
        }
        reader.join().unwrap();
        writer.join().unwrap();
        assert_eq!(snapshots.readers_before(version), 0);
    });
}
