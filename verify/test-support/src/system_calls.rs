//! [`record_calls`]: records the system calls of a function.

#![expect(
    unsafe_code,
    reason = "installs a seccomp filter, and reads its notifications"
)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// The number of system calls that are told apart. Higher numbers count as the last one.
const CALLS: usize = 1024;

/// The state that the traced thread and the supervisor share.
struct Shared {
    /// The descriptor of the notifications, -1 before it exists, or -2 without one.
    listener: AtomicI32,
    is_recording: AtomicBool,
    made: [AtomicBool; CALLS],
}

/// Calls `function` in a new thread, and returns its result and the numbers of its system calls.
///
/// Calls of threads that it creates count, too. They are made as usual.
///
/// # Errors
///
/// Returns the error of seccomp(2). Linux 5.9 is needed.
///
/// # Panics
///
/// Panics if `function` panics.
pub fn record_calls<R: Send>(function: impl FnOnce() -> R + Send) -> Result<(R, BTreeSet<i64>)> {
    let shared = Shared {
        listener: AtomicI32::new(-1),
        is_recording: AtomicBool::new(false),
        made: [const { AtomicBool::new(false) }; CALLS],
    };
    let result = std::thread::scope(|scope| {
        let traced = scope.spawn(|| {
            // From here on, each call waits for the supervisor.
            match install_filter() {
                Ok(listener) => shared.listener.store(listener, Ordering::Release),
                Err(error) => {
                    shared.listener.store(-2, Ordering::Release);
                    return Err(error);
                }
            }
            shared.is_recording.store(true, Ordering::Release);
            let result = function();
            shared.is_recording.store(false, Ordering::Release);
            Ok(result)
        });
        supervise(&shared);
        traced.join().expect("the traced function has panicked")
    })?;
    let numbers = shared.made.iter().enumerate();
    let made = numbers.filter(|(_, made)| made.load(Ordering::Relaxed));
    Ok((result, made.map(|(number, _)| number as i64).collect()))
}

/// Installs a filter in this thread that notifies a supervisor of each call.
fn install_filter() -> Result<RawFd> {
    // `SECCOMP_RET_USER_NOTIF` for all calls.
    let mut program = [libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_USER_NOTIF,
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: program.as_mut_ptr(),
    };
    let (one, zero) = (1 as libc::c_ulong, 0 as libc::c_ulong);
    // SAFETY: `PR_SET_NO_NEW_PRIVS` takes numbers, and the kernel accesses no memory.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) } != 0 {
        return Err(Error::last_os_error());
    }
    let (mode, flags) = (
        libc::SECCOMP_SET_MODE_FILTER,
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
    );
    // SAFETY: the kernel reads one instruction at `filter`, which is that of the array.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    match listener {
        0.. => Ok(listener as RawFd),
        _ => Err(Error::last_os_error()),
    }
}

/// Records calls and lets them continue, until the traced threads have ended.
///
/// It allocates nothing: a traced thread may wait for it within the allocator.
fn supervise(shared: &Shared) {
    const RECEIVE: u32 = 0xc050_2100;
    const SEND: u32 = 0xc018_2101;
    const CONTINUE: u32 = 1;
    let listener = loop {
        match shared.listener.load(Ordering::Acquire) {
            -1 => std::thread::yield_now(),
            -2 => return,
            listener => break listener,
        }
    };
    // SAFETY: seccomp(2) has just returned this descriptor, and nothing else owns it.
    let listener = unsafe { File::from_raw_fd(listener) };
    loop {
        let mut ready = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: poll(2) reads and writes one structure at its argument.
        unsafe { libc::poll(&raw mut ready, 1, -1) };
        if ready.revents & libc::POLLIN == 0 {
            // No thread has the filter.
            return;
        }
        // `struct seccomp_notif`: 80 bytes, of which the first 8 are the identifier. The number of
        // the call follows at byte 16.
        let mut call = [0u64; 10];
        // SAFETY: the kernel writes the 80 bytes that the request states, the size of the array.
        let received =
            unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, call.as_mut_ptr()) };
        if received != 0 {
            // The thread was killed.
            continue;
        }
        let number = (call[2] & 0xffff_ffff) as usize;
        if shared.is_recording.load(Ordering::Acquire) {
            shared.made[number.min(CALLS - 1)].store(true, Ordering::Relaxed);
        }
        // `struct seccomp_notif_resp`: the identifier, a result, an error, and the flags.
        let mut response = [call[0], 0, u64::from(CONTINUE) << 32];
        // SAFETY: the kernel reads the 24 bytes that the request states, the size of the array.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, response.as_mut_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_calls_returns_the_calls_of_all_threads_of_the_function() {
        let recorded = record_calls(|| {
            // SAFETY: getppid(2) has no arguments.
            let other = || unsafe { libc::getppid() };
            std::thread::scope(|scope| scope.spawn(other).join().unwrap());
            7
        });
        match recorded {
            Ok((result, calls)) => {
                assert_eq!(result, 7);
                assert!(calls.contains(&libc::SYS_getppid), "{calls:?}");
                assert!(!calls.contains(&libc::SYS_getsid), "{calls:?}");
            }
            Err(error) => crate::skipped("record_calls", error),
        }
    }
}
