//! No snapshot is read while it is changed, and no page is read after its mapping has no readers.
//!
//! The fences are left to the module `fences`: loom's counted pointers do not need them.

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::Arc;
use loom::thread;

use super::requests::Waits;
use super::snapshots::{Replay, Snapshots};
use crate::retired::Version as _;

/// A number. loom reports a read that is concurrent with a change.
#[derive(Debug)]
struct Watched(UnsafeCell<u64>);

impl Watched {
    fn get(&self) -> u64 {
        // SAFETY: `number` points to the contents of the borrowed cell. loom has checked that no
        // thread changes them now.
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

    /// Adds an even number, and refuses an odd one.
    fn apply(&mut self, more: &u64) -> Result<(), u64> {
        if !more.is_multiple_of(2) {
            return Err(*more);
        }
        // SAFETY: `number` points to the contents of the cell, which is borrowed mutably.
        self.0.with_mut(|number| unsafe { *number += more });
        Ok(())
    }

    fn operations_for_a_copy(&self) -> usize {
        1
    }

    fn resolves(more: &u64) -> Option<(u64, u64, u8)> {
        Some((*more, *more, u8::MAX))
    }
}

#[test]
fn apply_during_read_does_not_change_its_snapshot() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let reader = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || {
                let first = snapshots.load();
                let before = first.value().get();
                let second = snapshots.load().value().get();
                assert_eq!(first.value().get(), before, "a snapshot changed");
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

/// A front end that has received the acknowledgement of an invalidation writes to the page. loom
/// reports a reader that still reads it.
#[test]
fn readers_before_returning_zero_means_no_page_is_read() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let page = Arc::new(Watched(UnsafeCell::new(0)));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (snapshots, page) = (Arc::clone(&snapshots), Arc::clone(&page));
                thread::spawn(move || {
                    let snapshot = snapshots.load();
                    if snapshot.value().get() == 0 {
                        // The page is mapped in this snapshot.
                        page.get();
                    }
                })
            })
            .collect();
        let version = snapshots.apply(2).unwrap();
        if snapshots.readers_before(version) == 0 {
            // SAFETY: `number` points to the contents of the cell, which `page` keeps alive. loom
            // has checked that no thread reads them now, which is the property under test.
            page.0.with_mut(|number| unsafe { *number = 1 });
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(snapshots.readers_before(version), 0);
    });
}

/// A number that copies share until one of them changes it, as tables share their leaves.
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

    /// Prevents replay: snapshots are made equal to the current one instead.
    fn operations_for_a_copy(&self) -> usize {
        0
    }

    fn resolves(_: &u64) -> Option<(u64, u64, u8)> {
        None
    }
}

#[test]
fn apply_during_read_does_not_change_shared_parts() {
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
                assert_eq!(first.value().0.get(), before, "a snapshot changed");
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

/// Another thread makes a change before or after the one that is waited for.
#[test]
fn readers_before_during_another_change_misses_no_reader() {
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
            // SAFETY: `number` points to the contents of the cell, which `page` keeps alive. loom
            // has checked that no thread reads them now, which is the property under test.
            page.0.with_mut(|number| unsafe { *number = 1 });
        }
        reader.join().unwrap();
        writer.join().unwrap();
        assert_eq!(snapshots.readers_before(version), 0);
    });
}

/// Waits until a snapshot has a number of at least `wanted`, as `AskingIommu` waits for a mapping.
///
/// Returns the number of requests. loom reports a wait without end.
fn wait_for(snapshots: &Snapshots<Watched>, wanted: u64, is_over: impl Fn() -> bool) -> usize {
    let mut waits = Waits::default();
    let mut requests = 0;
    loop {
        let snapshot = snapshots.load();
        let (found, version) = (snapshot.value().get() >= wanted, snapshot.number());
        drop(snapshot);
        if found || is_over() {
            break;
        }
        // An operation with the number 2 resolves it.
        let misses = [2u64].into_iter();
        if let Some(new) = snapshots.request(Some(version), misses, 0, &mut waits) {
            requests += new.len();
            assert!(snapshots.wait(&mut waits, None, &is_over));
        }
    }
    snapshots.take_back(&mut waits);
    requests
}

#[test]
fn wait_for_operation_loses_no_wake_up() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let waiter = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || wait_for(&snapshots, 2, || false))
        };
        snapshots.apply(2).unwrap();
        // One request, or none if the operation came first.
        assert!(waiter.join().unwrap() <= 1);
    });
}

#[test]
fn wait_for_second_operation_requests_again() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let waiter = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || wait_for(&snapshots, 4, || false))
        };
        snapshots.apply(2).unwrap();
        snapshots.apply(2).unwrap();
        assert!(waiter.join().unwrap() <= 2);
    });
}

/// The thread that made the shared request may give up first.
#[test]
fn wait_for_shared_request_loses_no_wake_up() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let waiter = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || wait_for(&snapshots, 2, || false))
        };
        let mut waits = Waits::default();
        let misses = [2u64].into_iter();
        let mine = snapshots.request(None, misses, 0, &mut waits).unwrap();
        assert!(mine.len() <= 1);
        // Gives up: the waiter requests the page itself, if it has not done so.
        snapshots.take_back(&mut waits);
        let applied = {
            let snapshots = Arc::clone(&snapshots);
            thread::spawn(move || snapshots.apply(2).unwrap())
        };
        assert!(waiter.join().unwrap() <= 1);
        applied.join().unwrap();
    });
}

#[test]
fn wait_that_is_over_ends_after_wake() {
    loom::model(|| {
        let snapshots = Arc::new(Snapshots::new(Watched(UnsafeCell::new(0))));
        let is_closed = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (snapshots, is_closed) = (Arc::clone(&snapshots), Arc::clone(&is_closed));
            thread::spawn(move || wait_for(&snapshots, 2, || is_closed.load(Ordering::Acquire)))
        };
        is_closed.store(true, Ordering::Release);
        snapshots.wake();
        waiter.join().unwrap();
    });
}
