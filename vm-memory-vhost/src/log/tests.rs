//! Tests of [`Logs`], whose logs are names.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, Weak};

use super::logs::Logs;

/// Returns the logs in which a write is marked now.
fn marked(logs: &Logs<char>) -> Vec<char> {
    let marked = RefCell::new(Vec::new());
    logs.mark_each(|log| marked.borrow_mut().push(*log));
    marked.into_inner()
}

#[test]
fn replace_without_writers_marks_in_new_log_only() {
    let logs = Logs::new();
    assert!(marked(&logs).is_empty());
    for log in ['a', 'b'] {
        logs.replace(log, Err).unwrap();
        assert_eq!(marked(&logs), [log]);
    }
    logs.remove();
    assert!(!logs.is_on() && marked(&logs).is_empty());
    logs.replace('c', Err).unwrap();
    assert_eq!(marked(&logs), ['c']);
}

#[test]
fn replace_with_writer_marks_in_both_until_the_wait_fails() {
    let logs = Logs::new();
    logs.replace('a', Err).unwrap();
    logs.mark_each(|_| {
        // This thread is the writer.
        let replaced = logs.replace('b', |writers| {
            assert_eq!(marked(&logs), ['b', 'a']);
            Err(writers)
        });
        assert_eq!(replaced, Err(1));
        assert_eq!(marked(&logs), ['a']);
    });
    logs.replace('b', Err).unwrap();
    assert_eq!(marked(&logs), ['b']);
}

#[test]
fn replace_waits_for_writer_of_logs_before_the_replaced_one() {
    let logs = Logs::new();
    logs.replace('a', Err).unwrap();
    logs.mark_each(|_| {
        assert_eq!(logs.replace('b', Err), Err(1));
        // The failed replacement has published the old log again, which no writer has loaded.
        assert_eq!(logs.replace('c', Err), Err(1));
    });
    assert_eq!(marked(&logs), ['a']);
}

#[test]
fn first_replace_that_fails_switches_off_again() {
    let logs = Logs::new();
    logs.replace('a', Err).unwrap();
    logs.mark_each(|_| {
        logs.remove();
        assert_eq!(logs.replace('b', Err), Err(1));
        assert!(!logs.is_on() && marked(&logs).is_empty());
    });
}

/// A log that checks in its drop that no replacement holds the lock.
struct CheckedLog {
    number: usize,
    logs: Weak<Logs<Arc<Self>>>,
    dropped: Arc<Mutex<Vec<usize>>>,
}

impl Drop for CheckedLog {
    fn drop(&mut self) {
        let Some(logs) = self.logs.upgrade() else {
            return;
        };
        assert!(
            logs.is_unlocked(),
            "log {} is dropped under the lock",
            self.number
        );
        self.dropped.lock().unwrap().push(self.number);
    }
}

#[test]
fn replace_and_remove_drop_the_old_log_after_the_lock() {
    let logs = Arc::new(Logs::new());
    let dropped = Arc::default();
    let log = |number| {
        Arc::new(CheckedLog {
            number,
            logs: Arc::downgrade(&logs),
            dropped: Arc::clone(&dropped),
        })
    };
    for number in 0..3 {
        logs.replace(log(number), Err).unwrap();
    }
    assert_eq!(*dropped.lock().unwrap(), [0, 1]);
    logs.mark_each(|_| assert_eq!(logs.replace(log(3), Err), Err(1)));
    logs.replace(log(4), Err).unwrap();
    logs.remove();
    let mut dropped = dropped.lock().unwrap().clone();
    dropped.sort_unstable();
    assert_eq!(dropped, [0, 1, 2, 3, 4]);
}
