//! [`wait_until`]: waits for a condition. [`ThreadId`]: waits until a thread sleeps.

use std::time::{Duration, Instant};

/// The time after which a condition counts as never true.
const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `condition` returns `true`.
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// let started = AtomicBool::new(false);
/// std::thread::scope(|scope| {
///     scope.spawn(|| started.store(true, Ordering::Release));
///     test_support::wait_until(|| started.load(Ordering::Acquire));
/// });
/// ```
///
/// # Panics
///
/// Panics if the condition is not true within a minute.
#[track_caller]
pub fn wait_until(mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(
            begin.elapsed() < LIMIT,
            "the condition is still false after {LIMIT:?}"
        );
        std::thread::yield_now();
    }
}

/// A thread of this process.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug)]
pub struct ThreadId(i32);

#[cfg(target_os = "linux")]
impl ThreadId {
    /// Returns the calling thread.
    pub fn current() -> Self {
        Self(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Waits until this thread sleeps, for example in a system call that waits.
    ///
    /// A signal wakes a thread before the call that sends it returns. After a signal, this waits
    /// until the thread sleeps again.
    ///
    /// # Panics
    ///
    /// Panics if the thread does not exist, or does not sleep within a minute.
    #[track_caller]
    pub fn wait_until_asleep(self) {
        let path = format!("/proc/self/task/{}/stat", self.0);
        wait_until(|| {
            let stat = std::fs::read_to_string(&path).expect("cannot read the state of a thread");
            // The name in parentheses may contain any byte (proc_pid_stat(5)).
            let state = stat
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            state == Some('S')
        });
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn wait_until_asleep_returns_while_the_thread_waits() {
        let (sender, receiver) = channel::<()>();
        let thread = ThreadId::current();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                thread.wait_until_asleep();
                sender.send(()).unwrap();
            });
            receiver.recv().unwrap();
        });
    }
}
