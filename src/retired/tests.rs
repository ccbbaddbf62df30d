//! Waits for readers, with checks that are counted.

use std::cell::Cell;

use super::*;

/// Waits for readers that are gone after a number of checks, and returns the number of checks.
fn checks_of_wait(deadline: Instant, gone_after: usize) -> (Result<(), ReadersRemain>, usize) {
    let checks = Cell::new(0);
    let result = wait_until_unread(deadline, || {
        checks.set(checks.get() + 1);
        gone_after.saturating_sub(checks.get())
    });
    (result, checks.get())
}

#[test]
fn wait_until_unread_past_deadline_checks_once() {
    let now = Instant::now();
    assert_eq!(checks_of_wait(now, 1), (Ok(()), 1));
    assert_eq!(
        checks_of_wait(now, 3),
        (Err(ReadersRemain { readers: 2 }), 1)
    );
}

#[test]
fn wait_until_unread_returns_after_last_reader() {
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(checks_of_wait(deadline, 5), (Ok(()), 5));
}

#[test]
#[cfg_attr(miri, ignore = "the deadline passes before the second check")]
fn wait_until_unread_with_reader_left_ends_after_deadline() {
    let deadline = Instant::now() + Duration::from_millis(5);
    let (result, checks) = checks_of_wait(deadline, usize::MAX);
    assert!(result.is_err() && checks > 1 && Instant::now() >= deadline);
}

#[test]
fn readers_remain_display_gives_count_and_advice() {
    assert_eq!(
        ReadersRemain { readers: 2 }.to_string(),
        "a retired version is still in use (readers: 2); \
         drop any guard, iterator, snapshot, buffer or window that the waiting thread holds"
    );
}
