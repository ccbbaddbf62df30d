//! [`without_file_size_signal`]: returns an error instead of raising SIGXFSZ.
//! [`without_signals`]: starts a thread that handles no signals of the process.

use std::io::Result;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

/// Calls `work` while this thread does not receive SIGXFSZ.
///
/// A call that would extend a file past `RLIMIT_FSIZE` fails with `EFBIG` and raises SIGXFSZ, which
/// ends the process by default. On tmpfs and hugetlbfs, that includes fallocate(2) past the end of
/// a file. Another process that truncates a file could therefore end this one.
pub(super) fn without_file_size_signal(work: impl FnOnce() -> Result<()>) -> Result<()> {
    let signal = only(libc::SIGXFSZ);
    while_blocked(&signal, |is_blocked| {
        let result = work();
        let is_raised = |error: &std::io::Error| error.raw_os_error() == Some(libc::EFBIG);
        if is_blocked && result.as_ref().is_err_and(is_raised) {
            let no_wait = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the call reads `signal` and `no_wait`, and writes nothing, since the second
            // argument is null. It takes a pending signal of the set, and returns at once.
            let _ = unsafe { libc::sigtimedwait(&signal, null_mut(), &no_wait) };
        }
        result
    })
}

/// Calls `work` while this thread receives no signals, except those of its own faults.
///
/// A thread that `work` starts inherits this. Handlers of the process then run in its other
/// threads, which have the stacks that their authors expect.
pub(super) fn without_signals<R>(work: impl FnOnce() -> R) -> R {
    const FAULTS: [libc::c_int; 6] = [
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGSEGV,
        libc::SIGSYS,
        libc::SIGTRAP,
    ];
    let mut set = only(libc::SIGTERM);
    // SAFETY: sigfillset(3) writes one set to its argument, a live reference to one.
    let _ = unsafe { libc::sigfillset(&mut set) };
    for signal in FAULTS {
        // SAFETY: the set is initialised. An invalid number would change nothing.
        let _ = unsafe { libc::sigdelset(&mut set, signal) };
    }
    while_blocked(&set, |_| work())
}

/// Calls `work` while this thread does not receive the signals of a set. Passes whether that is so.
fn while_blocked<R>(signals: &libc::sigset_t, work: impl FnOnce(bool) -> R) -> R {
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the call reads `signals`, and writes the previous mask to `before`, which has room
    // for it. It changes the mask of this thread only.
    let refused = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, signals, before.as_mut_ptr()) };
    let is_blocked = refused == 0;
    let result = work(is_blocked);
    if is_blocked {
        // SAFETY: the call reads `before`, which the successful call above has written, and writes
        // nothing, since the last argument is null.
        let _ = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut()) };
    }
    result
}

/// Returns a set with one signal.
fn only(signal: libc::c_int) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset(3) writes one set to its argument, which has room for it.
    let _ = unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set was initialised above. An invalid number would change nothing.
    let _ = unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    // SAFETY: sigemptyset(3) has initialised the set. It cannot fail for a valid pointer.
    unsafe { set.assume_init() }
}
