//! The handler that was installed before the fault handler runs as if the fault handler were not
//! installed. Each test runs its handlers in another process.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use test_support::{emulator, skipped, ThreadId};

use super::processes::{run, run_to_end, DONE};
use super::*;
use vm_memory::{fault, Bytes};

/// The page that the handler makes accessible, and the file of its mapping.
static TARGET: AtomicUsize = AtomicUsize::new(0);
static FILE: AtomicI32 = AtomicI32::new(-1);
/// The number of calls of the handler.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Makes `TARGET` accessible. Uses 256 KiB of stack, as a crash reporter that unwinds may.
extern "C" fn deep(_: i32) {
    let mut buffer = [0u8; 256 << 10];
    for page in buffer.chunks_mut(1024) {
        page[0] = std::hint::black_box(1);
    }
    std::hint::black_box(&buffer);
    CALLS.fetch_add(1, Ordering::Relaxed);
    let (file, page) = (FILE.load(Ordering::Relaxed), TARGET.load(Ordering::Relaxed));
    // SAFETY: the file is that of the test; ftruncate(2) is async-signal-safe.
    let sized = unsafe { libc::ftruncate(file, PAGE as libc::off_t) };
    // SAFETY: the page is of a mapping of the test, which only this thread uses.
    let open = unsafe { libc::mprotect(page as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    if (sized, open) != (0, 0) {
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) };
    }
}

extern "C" fn deep_with_info(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    deep(signal);
}

/// Sets the action of a signal, and returns the previous one.
pub(super) fn set_action(signal: i32, handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: zeroes are a valid `sigaction`.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) =
        unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the callers pass a handler with the arguments that the flags require.
    let status = unsafe { libc::sigaction(signal, &action, &mut before) };
    assert_eq!(status, 0);
    before
}

/// Lets a handler without SA_ONSTACK handle other faults and sent signals, between guest faults.
pub(super) fn deep_handler(arguments: &[&str]) {
    let [signal, flags] = arguments[..] else {
        unreachable!("{arguments:?}");
    };
    let signal = match signal {
        "segv" => libc::SIGSEGV,
        _ => libc::SIGBUS,
    };
    let plain: extern "C" fn(i32) = deep;
    let with_info: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = deep_with_info;
    let (handler, flags) = match flags {
        "plain" => (plain as usize, 0),
        "nodefer" => (plain as usize, libc::SA_NODEFER),
        "once" => (plain as usize, libc::SA_RESETHAND),
        _ => (with_info as usize, libc::SA_SIGINFO | libc::SA_RESTART),
    };
    set_action(signal, handler, flags);
    fault::install().unwrap();

    let ((memory, _file), (other, file)) = (shared(1), shared(1));
    let host = other.get_host_address(BASE).unwrap();
    TARGET.store(host as usize, Ordering::Relaxed);
    FILE.store(file.as_raw_fd(), Ordering::Relaxed);
    protect(&memory, 0, libc::PROT_NONE);
    let once = flags == libc::SA_RESETHAND;
    for call in 0..if once { 1 } else { 3 } {
        assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
        match signal {
            libc::SIGSEGV => protect(&other, 0, libc::PROT_NONE),
            _ => file.set_len(0).unwrap(),
        }
        // SAFETY: the handler makes the page accessible before the instruction runs again.
        unsafe { host.write_volatile(1) };
        assert_eq!(CALLS.load(Ordering::Relaxed), 2 * call + 1);
        if !once {
            // SAFETY: sends a signal to this thread.
            unsafe { libc::raise(signal) };
            assert_eq!(CALLS.load(Ordering::Relaxed), 2 * call + 2);
        }
    }
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    std::process::exit(DONE);
}

/// The handler that `later_handler` replaced.
static BEFORE_LATER: AtomicUsize = AtomicUsize::new(0);

/// Calls the handler that it replaced, which is that of the crate.
extern "C" fn later(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
    let before = BEFORE_LATER.load(Ordering::Relaxed);
    // SAFETY: the replaced handler has SA_SIGINFO, so it has this type.
    let before = unsafe { std::mem::transmute::<usize, Handler>(before) };
    before(signal, info, context);
}

/// A handler that was installed later stays installed after a signal that was sent.
pub(super) fn later_handler() {
    fault::install().unwrap();
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = later;
    let before = set_action(libc::SIGBUS, handler as usize, libc::SA_SIGINFO);
    BEFORE_LATER.store(before.sa_sigaction, Ordering::Relaxed);
    let (memory, file) = shared(1);
    // The handler of the standard library sets the default action.
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
    assert_eq!(CALLS.load(Ordering::Relaxed), 1);
    file.set_len(0).unwrap();
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    std::process::exit(DONE);
}

/// Sends signals while other threads fault. The argument is the state before the fault handler.
///
/// - `own`: a handler of the program takes the signals.
/// - `installed`: the same, and the fault handler is installed while they are sent.
/// - `ignored`: the signals are ignored, and are not passed on.
pub(super) fn sent_signals_during_faults(arguments: &[&str]) {
    extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
    let is_installed = arguments != ["installed"];
    // The number of faults of each thread while signals are sent.
    let faults = if is_installed { 2000 } else { 50 };
    let is_ignored = arguments == ["ignored"];
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = count;
    let action = if is_ignored {
        libc::SIG_IGN
    } else {
        handler as usize
    };
    // qemu reads the handler and its flags at different times. Without this flag, it can call the
    // fault handler, which is installed meanwhile, without the information.
    set_action(libc::SIGBUS, action, libc::SA_SIGINFO);
    if is_installed {
        fault::install().unwrap();
    }
    fault::pass_on_sent_signals(!is_ignored);
    let (sent, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // SAFETY: sends a signal to this thread.
                    unsafe { libc::raise(libc::SIGBUS) };
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while sent.load(Ordering::Relaxed) < 100 {
            std::hint::spin_loop();
        }
        fault::install().unwrap();
        let faulting = [(); 3].map(|()| {
            scope.spawn(|| {
                let (memory, file) = shared(1);
                file.set_len(0).unwrap();
                for _ in 0..faults {
                    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
                }
            })
        });
        let ended = faulting.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    let calls = if is_ignored { 0 } else { sent.into_inner() };
    assert_eq!(CALLS.load(Ordering::Relaxed), calls);
    std::process::exit(DONE);
}

/// A signal that was ignored before does not interrupt a system call.
pub(super) fn ignored_signal() {
    set_action(libc::SIGBUS, libc::SIG_IGN, 0);
    fault::install().unwrap();
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    let status = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(status, 0);
    // SAFETY: pthread_self(3) has no preconditions.
    let handle = unsafe { libc::pthread_self() } as usize;
    let reader = ThreadId::current();
    std::thread::spawn(move || {
        // All but the first few reach the reader in its system call.
        for _ in 0..50 {
            reader.wait_until_asleep();
            // SAFETY: the reader lives until the process ends.
            let status = unsafe { libc::pthread_kill(handle as libc::pthread_t, libc::SIGBUS) };
            assert_eq!(status, 0);
        }
        // SAFETY: the byte is valid for reads.
        assert_eq!(unsafe { libc::write(ends[1], [7u8].as_ptr().cast(), 1) }, 1);
    });
    let mut byte = 0u8;
    // SAFETY: the byte is valid for writes.
    let read = unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) };
    assert_eq!((read, byte), (1, 7), "{}", std::io::Error::last_os_error());
    std::process::exit(DONE);
}

#[test]
fn signal_that_was_ignored_before_does_not_interrupt_read() {
    let output = run("ignored_signal");
    let message = String::from_utf8_lossy(&output.stderr);
    if let (true, Some(emulator)) = (message.contains("Interrupted"), emulator()) {
        let test = "signal_that_was_ignored_before_does_not_interrupt_read";
        return skipped(test, format!("{emulator:?} does not restart the read(2)"));
    }
    assert_eq!(output.status.code(), Some(DONE), "{output:?}");
}

#[test]
fn previous_handler_without_onstack_may_use_large_stack() {
    for signal in ["segv", "bus"] {
        for flags in ["plain", "nodefer", "info", "once"] {
            run_to_end(&format!("deep_handler {signal} {flags}"));
        }
    }
}

#[test]
fn sent_signal_leaves_later_handler_installed() {
    run_to_end("later_handler");
}

#[test]
fn signals_sent_to_own_handler_leave_faults_of_other_threads_alone() {
    run_to_end("sent_signals_during_faults own");
}

#[test]
fn ignored_signals_leave_faults_of_other_threads_alone() {
    run_to_end("sent_signals_during_faults ignored");
}

#[test]
fn signals_sent_during_install_reach_own_handler() {
    for _ in 0..10 {
        run_to_end("sent_signals_during_faults installed");
    }
}

/// Without a previous handler, a sent signal has its default action: see [`fault`].
#[test]
fn sent_signal_without_previous_handler_kills() {
    let output = run("sent_signal_to_default_action");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("survived"));
}

/// Sends a signal whose action was the default one at [`fault::install`].
pub(super) fn sent_signal_to_default_action() {
    set_action(libc::SIGBUS, libc::SIG_DFL, 0);
    fault::install().unwrap();
    let (memory, file) = shared(1);
    file.set_len(0).unwrap();
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
    println!("survived");
    std::process::exit(DONE);
}

/// Sends a signal that is not passed on. The argument names what was installed before.
pub(super) fn sent_signal_not_passed_on(arguments: &[&str]) {
    let handler: extern "C" fn(i32) = deep;
    match arguments {
        ["own"] => drop(set_action(libc::SIGBUS, handler as usize, 0)),
        ["ignored"] => drop(set_action(libc::SIGBUS, libc::SIG_IGN, 0)),
        _ => {}
    }
    fault::install().unwrap();
    fault::pass_on_sent_signals(false);
    let ((memory, backing), (other, file)) = (shared(1), shared(1));
    backing.set_len(0).unwrap();
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    if arguments == ["own"] {
        let host = other.get_host_address(BASE).unwrap();
        TARGET.store(host as usize, Ordering::Relaxed);
        FILE.store(file.as_raw_fd(), Ordering::Relaxed);
        file.set_len(0).unwrap();
        // SAFETY: the handler makes the page accessible before the instruction runs again.
        unsafe { host.write_volatile(1) };
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
    }
    if arguments == ["again"] {
        fault::pass_on_sent_signals(true);
    }
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    println!("survived");
    std::process::exit(DONE);
}

/// This keeps the standard library's handler from setting the default action during guest faults.
#[test]
fn sent_signal_that_is_not_passed_on_has_default_action() {
    for (before, survives) in [
        ("standard", false),
        ("own", false),
        ("ignored", true),
        ("again", true),
    ] {
        let output = run(&format!("sent_signal_not_passed_on {before}"));
        let survived = String::from_utf8_lossy(&output.stdout).contains("survived");
        let expected = if survives {
            (Some(DONE), None)
        } else {
            (None, Some(libc::SIGBUS))
        };
        let ended = (output.status.code(), output.status.signal());
        assert_eq!(
            (ended, survived),
            (expected, survives),
            "{before}: {output:?}"
        );
    }
}
