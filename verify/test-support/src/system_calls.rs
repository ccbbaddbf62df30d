//! [`record_calls`]: records the system calls of a function. [`documented_calls`]: reads those that
//! the documentation of a crate lists. [`CallRecorder`] compares the two. [`refuse_calls`]: makes
//! system calls of a function fail.

#![expect(
    unsafe_code,
    reason = "installs a seccomp filter, and reads its notifications"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};

/// A system call: its number, and its arguments as the kernel receives them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Call {
    /// The number.
    pub number: i64,
    /// The arguments. Elements after the last argument of the call are unspecified.
    pub arguments: [u64; 6],
}

/// The number of calls of one function that can be recorded.
const CALLS: usize = 1 << 16;

/// The calls of the function that is traced. The supervisor must not allocate memory for them.
struct Recorded {
    calls: [Call; CALLS],
    /// The number of calls. If it is higher than [`CALLS`], some are missing.
    len: usize,
}

static RECORDED: Mutex<Recorded> = Mutex::new(Recorded {
    calls: [Call {
        number: 0,
        arguments: [0; 6],
    }; CALLS],
    len: 0,
});

/// The state that the traced thread and the supervisor share.
struct Shared {
    /// The descriptor of the notifications, -1 before it exists, or -2 without one.
    listener: AtomicI32,
    is_recording: AtomicBool,
}

/// Calls `function` in a new thread, and returns its result and the numbers of its system calls.
///
/// The numbers include the calls of threads that it creates. All calls take effect as usual.
///
/// # Errors
///
/// Returns the error of seccomp(2), for example before Linux 5.9.
///
/// # Panics
///
/// Panics if `function` panics.
pub fn record_calls<R: Send>(function: impl FnOnce() -> R + Send) -> Result<(R, BTreeSet<i64>)> {
    let (result, calls) = record_arguments(function)?;
    Ok((result, calls.iter().map(|call| call.number).collect()))
}

/// Calls `function` as [`record_calls`] does, and returns its result and its system calls.
fn record_arguments<R: Send>(function: impl FnOnce() -> R + Send) -> Result<(R, BTreeSet<Call>)> {
    // Remove the calls that a test has left after a panic.
    let mut recorded = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
    recorded.len = 0;
    let shared = Shared {
        listener: AtomicI32::new(-1),
        is_recording: AtomicBool::new(false),
    };
    let result = std::thread::scope(|scope| {
        let traced = scope.spawn(|| {
            // After this call, each call of the thread waits for the supervisor.
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
        supervise(&shared, &mut recorded);
        traced.join().expect("the traced function has panicked")
    })?;
    let calls = recorded.calls.get(..recorded.len);
    let calls = calls.expect("the function makes too many calls");
    Ok((result, calls.iter().copied().collect()))
}

/// Calls `function` in a new thread whose system calls of one number fail with an error of the
/// system. Returns its result.
///
/// Threads that the function creates are subject to the same filter.
///
/// # Errors
///
/// Returns the error of seccomp(2).
///
/// # Panics
///
/// Panics if `function` panics.
pub fn refuse_calls<R: Send>(
    number: libc::c_long,
    error: i32,
    function: impl FnOnce() -> R + Send,
) -> Result<R> {
    refuse_calls_with(number, (0, 0), error, function)
}

/// Calls `function` as [`refuse_calls`] does, but refuses only the calls with flags in an argument.
///
/// The arguments are counted from 0. All of the flags must be set.
///
/// # Errors
///
/// Returns the error of seccomp(2).
///
/// # Panics
///
/// Panics if `function` panics.
pub fn refuse_calls_with<R: Send>(
    number: libc::c_long,
    (argument, flags): (u32, u32),
    error: i32,
    function: impl FnOnce() -> R + Send,
) -> Result<R> {
    let (load, compare, mask, end) = (
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16,
        (libc::BPF_RET | libc::BPF_K) as u16,
    );
    let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    // `struct seccomp_data`: the number of the call, the architecture, the instruction pointer, and
    // the arguments, of which the low half is at `low`.
    let low = if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut program = [
        instruction(load, 0, 0),
        instruction(compare, 4, number as u32),
        instruction(load, 0, 16 + 8 * argument + low),
        instruction(mask, 0, flags),
        instruction(compare, 1, flags),
        instruction(end, 0, libc::SECCOMP_RET_ERRNO | error as u32),
        instruction(end, 0, libc::SECCOMP_RET_ALLOW),
    ];
    std::thread::scope(|scope| {
        let filtered = scope.spawn(|| {
            install_program(0, &mut program)?;
            Ok(function())
        });
        filtered.join().expect("the filtered function has panicked")
    })
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
    let listener = install_program(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER, &mut program)?;
    Ok(listener as RawFd)
}

/// Installs a filter in this thread, and returns the result of seccomp(2).
fn install_program(
    flags: libc::c_ulong,
    program: &mut [libc::sock_filter],
) -> Result<libc::c_long> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let (one, zero) = (1 as libc::c_ulong, 0 as libc::c_ulong);
    // SAFETY: `PR_SET_NO_NEW_PRIVS` takes numbers, and the kernel accesses no memory.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) } != 0 {
        return Err(Error::last_os_error());
    }
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads `len` instructions at `filter`, which are those of the slice.
    match unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } {
        result @ 0.. => Ok(result),
        _ => Err(Error::last_os_error()),
    }
}

/// Records calls and lets them continue, until the traced threads have ended.
///
/// It allocates nothing: a traced thread may wait for it within the allocator.
fn supervise(shared: &Shared, recorded: &mut Recorded) {
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
        if unsafe { libc::poll(&raw mut ready, 1, -1) } < 0 {
            // A signal interrupted it.
            continue;
        }
        if ready.revents & libc::POLLIN == 0 {
            // No thread has the filter.
            return;
        }
        // `struct seccomp_notif`: 80 bytes, of which the first 8 are the identifier. The number of
        // the call is at byte 16, and its arguments are the last 48 bytes.
        let mut call = [0u64; 10];
        // SAFETY: the kernel writes the 80 bytes that the request states, the size of the array.
        let received =
            unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, call.as_mut_ptr()) };
        if received != 0 {
            // The thread was killed.
            continue;
        }
        if shared.is_recording.load(Ordering::Acquire) {
            let [_, _, number, _, arguments @ ..] = call;
            if let Some(next) = recorded.calls.get_mut(recorded.len) {
                let number = (number & 0xffff_ffff) as i64;
                *next = Call { number, arguments };
            }
            recorded.len += 1;
        }
        // `struct seccomp_notif_resp`: the identifier, a result, an error, and the flags.
        let mut response = [call[0], 0, u64::from(CONTINUE) << 32];
        // SAFETY: the kernel reads the 24 bytes that the request states, the size of the array.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, response.as_mut_ptr()) };
    }
}

/// A row of a table of system calls.
#[derive(Debug)]
pub struct CallRow {
    /// `boot`, `run time`, `migration`, or `all`.
    pub phase: String,
    /// The function, or the description of an operation.
    pub function: String,
    /// The condition.
    pub condition: String,
    /// The names of the calls.
    pub calls: Vec<String>,
}

/// Reads the tables of system calls in the documentation of a crate, given the text of its root.
///
/// Returns the calls of each function. Excludes those that all phases make.
///
/// # Panics
///
/// Panics if the text has no section "System calls", or a row has other columns.
pub fn documented_calls(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut calls: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in call_rows(text).into_iter().filter(|row| row.phase != "all") {
        let names = row.calls.into_iter().map(|name| match name.as_str() {
            "fstat" => "newfstatat".to_owned(),
            _ => name,
        });
        calls.entry(row.function).or_default().extend(names);
    }
    calls
}

/// Reads the rows of the tables of system calls in the documentation of a crate.
///
/// Each row has a phase, functions, a condition, and a list of calls in backticks. Returns a row
/// for each function.
///
/// # Panics
///
/// Panics if the text has no section "System calls", or a row has other columns.
pub fn call_rows(text: &str) -> Vec<CallRow> {
    let mut found = Vec::new();
    let (_, text) = text.split_once("//! # System calls").expect("the section");
    let text = text
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with("//!"));
    let rows = text.take_while(|line| !line.starts_with("//! # "));
    for row in rows.filter_map(|line| line.strip_prefix("//! | ")) {
        let columns: Vec<&str> = row.trim_end_matches('|').split('|').collect();
        let [phase, function, condition, list] = columns[..] else {
            panic!("a row of the table does not have four columns: {row}");
        };
        if ["boot", "run time", "migration", "all"].contains(&phase.trim()) {
            let mut functions: Vec<&str> = function.split('`').skip(1).step_by(2).collect();
            // A prose description may name a function that it depends on.
            if !function.trim().starts_with(['[', '`']) {
                functions = vec![function.trim()];
            }
            // `raise(3)` is a function of the C library.
            let names = list.split('`').skip(1).step_by(2);
            let names = names.filter(|name| !name.ends_with(')')).map(str::to_owned);
            let calls: Vec<String> = names.collect();
            found.extend(functions.into_iter().map(|function| CallRow {
                phase: phase.trim().to_owned(),
                function: function.trim_end_matches("()").to_owned(),
                condition: condition.trim().to_owned(),
                calls: calls.clone(),
            }));
        }
    }
    found
}

/// The system calls of functions, recorded in several scenarios and compared with documentation.
#[derive(Debug, Default)]
pub struct CallRecorder {
    made: BTreeMap<String, BTreeSet<String>>,
    calls: BTreeMap<String, BTreeSet<Call>>,
}

impl CallRecorder {
    /// Runs a scenario of `function` as [`record_calls`] does, and returns its result.
    ///
    /// # Errors
    ///
    /// Returns the error of [`record_calls`].
    pub fn run<R: Send>(
        &mut self,
        function: &str,
        scenario: impl FnOnce() -> R + Send,
    ) -> Result<R> {
        let (result, calls) = record_arguments(scenario)?;
        let made = self.made.entry(function.to_owned()).or_default();
        made.extend(calls.iter().map(|call| name(usual(call.number))));
        self.calls
            .entry(function.to_owned())
            .or_default()
            .extend(calls);
        Ok(result)
    }

    /// Iterates over the calls that were made: the function, the name of the call, and the call.
    pub fn calls(&self) -> impl Iterator<Item = (&str, String, &Call)> {
        let functions = self.calls.iter();
        functions.flat_map(|(function, calls)| {
            calls
                .iter()
                .map(|call| (function.as_str(), name(call.number), call))
        })
    }

    /// Returns the calls that were made and are not in a table, as `function: call`.
    pub fn undocumented(&self, table: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
        difference(&self.made, table)
            // With debug assertions, the standard library checks each descriptor that it closes.
            .filter(|(function, call)| {
                !(cfg!(debug_assertions)
                    && call.as_str() == "fcntl"
                    && self.made[*function].contains("close"))
            })
            .map(|(function, call)| format!("{function}: {call}"))
            .collect()
    }

    /// Returns the calls of a table that were not made, as `function: call`.
    pub fn unused(&self, table: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
        let unused = difference(table, &self.made);
        unused
            .map(|(function, call)| format!("{function}: {call}"))
            .collect()
    }
}

/// Iterates over the calls of `some` that `others` does not have.
fn difference<'a>(
    some: &'a BTreeMap<String, BTreeSet<String>>,
    others: &'a BTreeMap<String, BTreeSet<String>>,
) -> impl Iterator<Item = (&'a String, &'a String)> {
    some.iter().flat_map(move |(function, calls)| {
        let others = others.get(function);
        let is_new = move |call: &&String| others.is_none_or(|others| !others.contains(*call));
        calls
            .iter()
            .filter(is_new)
            .map(move |call| (function, call))
    })
}

/// Returns the name of a system call.
fn name(number: i64) -> String {
    macro_rules! names {
        ($($name:ident: $number:ident),* $(,)?) => {
            match number {
                $(libc::$number => stringify!($name).to_owned(),)*
                other => format!("call {other}"),
            }
        };
    }
    names! {
        clone: SYS_clone, clone3: SYS_clone3, close: SYS_close, exit: SYS_exit,
        fallocate: SYS_fallocate, fcntl: SYS_fcntl, fstatfs: SYS_fstatfs, ftruncate: SYS_ftruncate,
        fstat: SYS_fstat, newfstatat: SYS_newfstatat, ioctl: SYS_ioctl, fchmod: SYS_fchmod,
        futex: SYS_futex, getdents64: SYS_getdents64, getpid: SYS_getpid, gettid: SYS_gettid,
        lseek: SYS_lseek, madvise: SYS_madvise, mbind: SYS_mbind,
        memfd_create: SYS_memfd_create, mincore: SYS_mincore, mlock: SYS_mlock,
        mlock2: SYS_mlock2, mmap: SYS_mmap, mprotect: SYS_mprotect, mremap: SYS_mremap,
        munlock: SYS_munlock, munmap: SYS_munmap, openat: SYS_openat, prctl: SYS_prctl,
        pread64: SYS_pread64, prlimit64: SYS_prlimit64, read: SYS_read, rseq: SYS_rseq,
        rt_sigprocmask: SYS_rt_sigprocmask, rt_sigreturn: SYS_rt_sigreturn,
        sched_getaffinity: SYS_sched_getaffinity, sched_setaffinity: SYS_sched_setaffinity,
        sched_yield: SYS_sched_yield, set_robust_list: SYS_set_robust_list,
        statx: SYS_statx, write: SYS_write, brk: SYS_brk,
        sigaltstack: SYS_sigaltstack, readv: SYS_readv, writev: SYS_writev,
        preadv: SYS_preadv, pwritev: SYS_pwritev, membarrier: SYS_membarrier,
        clock_nanosleep: SYS_clock_nanosleep, getppid: SYS_getppid, rt_sigaction: SYS_rt_sigaction,
    }
}

/// Returns the number of the call that most versions of the C library make for the same purpose.
fn usual(number: i64) -> i64 {
    match number {
        libc::SYS_clone => libc::SYS_clone3,
        libc::SYS_fstat => libc::SYS_newfstatat,
        number => number,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_have_their_names_and_arguments() {
        let mut recorder = CallRecorder::default();
        // SAFETY: getpriority(2) has two numbers as arguments.
        let priority = || unsafe { libc::getpriority(libc::PRIO_USER, 0x1234_5678) };
        if let Err(error) = recorder.run("priority", priority) {
            return crate::skipped("calls_have_their_names_and_arguments", error);
        }
        let number = libc::SYS_getpriority;
        let (function, _, call) = recorder
            .calls()
            .find(|(_, _, call)| call.number == number)
            .unwrap();
        assert_eq!(function, "priority");
        let who = libc::PRIO_USER as u64;
        assert_eq!(call.arguments[..2], [who, 0x1234_5678]);
    }

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
