//! A signal that the fault handler must not handle has the same effect as without the fault
//! handler. Each scenario runs in a process of its own.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use super::*;
use crate::previous::{self, set_action};
use crate::without_address;
use test_support::{emulator, skipped};
use vm_memory::{fault, Bytes};

/// The variable that names the scenario of a child process, and its arguments.
const SCENARIO: &str = "FAULTS_SCENARIO";

/// The exit status of a scenario that ends as it should.
pub(super) const DONE: i32 = 77;

/// A scenario ends the process: by a signal, or with status `DONE`.
type Scenario = fn(arguments: &[&str]);

const SCENARIOS: [(&str, Scenario); 17] = [
    ("null_pointer", |_| {
        fault::install().unwrap();
        read_null();
    }),
    ("handler_called_once", |_| {
        install_handler_called_once();
        fault::install().unwrap();
        read_null();
    }),
    ("sent_signal", |_| {
        fault::install().unwrap();
        send_signal();
        println!("survived the first signal");
        // The previous handler has withdrawn; ours has not.
        let (memory, _file) = shared(1);
        protect(&memory, 0, libc::PROT_NONE);
        assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
        send_signal();
    }),
    ("sent_signal_without_handler", |_| {
        send_signal();
        println!("survived the first signal");
        send_signal();
    }),
    ("memory_error_notice", |_| memory_error_notice()),
    ("stack_overflow", |_| {
        fault::install().unwrap();
        overflow(1);
    }),
    ("unmapped_region", |_| unmapped_region()),
    ("crash_reporter", crash_reporter),
    ("deep_handler", previous::deep_handler),
    ("sent_signal_to_default_action", |_| {
        previous::sent_signal_to_default_action()
    }),
    (
        "sent_signal_not_passed_on",
        previous::sent_signal_not_passed_on,
    ),
    ("ignored_signal", |_| previous::ignored_signal()),
    ("later_handler", |_| previous::later_handler()),
    (
        "sent_signals_during_faults",
        previous::sent_signals_during_faults,
    ),
    ("host_buffer", host_buffer),
    ("protected_memory", without_address::protected_memory),
    ("illegal_instruction", without_address::illegal_instruction),
];

/// Runs a scenario in a child process.
pub(super) fn run(scenario: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let mut command = match emulator() {
        Some(emulator) => Command::new(emulator),
        None => Command::new(&program),
    };
    if emulator().is_some() {
        command.arg(program);
    }
    command
        .args([
            "--exact",
            "processes::child_with_scenario_in_environment_runs_it",
            "--nocapture",
        ])
        .env(SCENARIO, scenario);
    if cfg!(panic = "abort") {
        // With `panic=abort`, libtest runs each test in a child of its own and reports its death.
        command.args(["-Zunstable-options", "--force-run-in-process"]);
    }
    command.output().unwrap()
}

/// Runs a scenario that ends by itself, with the status [`DONE`].
pub(super) fn run_to_end(scenario: &str) -> Output {
    let output = run(scenario);
    assert_eq!(output.status.code(), Some(DONE), "{scenario}: {output:?}");
    output
}

#[test]
fn child_with_scenario_in_environment_runs_it() {
    let Ok(scenario) = std::env::var(SCENARIO) else {
        return;
    };
    let words: Vec<_> = scenario.split(' ').collect();
    let (_, run) = SCENARIOS
        .iter()
        .find(|(name, _)| *name == words[0])
        .unwrap();
    run(&words[1..]);
    unreachable!("{scenario} must end the process");
}

fn read_null() {
    let null = std::hint::black_box(std::ptr::null());
    // SAFETY: not sound: this must kill the process. A read in Rust code would panic in builds of
    // some compilers with debug assertions.
    std::hint::black_box(unsafe { libc::strlen(null) });
}

fn send_signal() {
    // SAFETY: sends a signal to this thread.
    unsafe { libc::raise(libc::SIGBUS) };
}

fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 100]);
    if depth == 0 {
        0
    } else {
        overflow(depth + 1) + frame[(depth % 100) as usize]
    }
}

fn memory_error_notice() {
    fault::install().unwrap();
    let (memory, file) = shared(1);
    // The fields of `siginfo_t` are: signal, errno, code. BUS_MCEERR_AO has the code 5.
    let mut info = [0i32; 32];
    info[0] = libc::SIGBUS;
    info[2] = 5;
    // SAFETY: getpid(2) accesses no memory of this program.
    let process = unsafe { libc::getpid() };
    // SAFETY: gettid(2) accesses no memory of this program.
    let thread = unsafe { libc::gettid() };
    // SAFETY: `info` has the size of `siginfo_t`. A thread may send any code to itself
    // (rt_sigqueueinfo(2)).
    let status = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            info.as_ptr(),
        )
    };
    assert_eq!(status, 0);
    println!("survived the notice");
    file.set_len(0).unwrap();
    assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
    std::process::exit(DONE);
}

fn unmapped_region() {
    fault::install().unwrap();
    let (memory, _file) = shared(1);
    let host = memory.get_host_address(BASE).unwrap();
    // SAFETY: not sound. But no other code in this process uses the range, and the process ends
    // before the memory is dropped.
    assert_eq!(unsafe { libc::munmap(host.cast(), PAGE) }, 0);
    let (result, last) = (memory.read_obj::<u64>(BASE), fault::last());
    assert!(is_efault(&result.unwrap_err()));
    assert_eq!(last.unwrap().host_address, host as usize);
    assert!(is_efault(&memory.write_slice(&[1; 100], BASE).unwrap_err()));
    std::process::exit(DONE);
}

fn crash_reporter(arguments: &[&str]) {
    install_reporter(if arguments == ["onstack"] {
        libc::SA_ONSTACK
    } else {
        0
    });
    fault::install().unwrap();
    let ((memory, file), (other, _other_file)) = (shared(1), shared(1));
    let host = other.get_host_address(BASE).unwrap();
    for byte in [5, 9] {
        file.set_len(0).unwrap();
        assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
        assert!(is_efault(&memory.write(&[1; 300], BASE).unwrap_err()));
        protect(&other, 0, libc::PROT_NONE);
        println!("expected {:x}", host as usize + byte);
        // SAFETY: the reporter makes the page accessible before the instruction runs again.
        unsafe { host.wrapping_add(byte).write_volatile(1) };
    }
    std::process::exit(DONE);
}

/// Accesses guest memory with a host buffer whose last page is inaccessible.
fn host_buffer(arguments: &[&str]) {
    let [direction, len, element] = arguments[..] else {
        unreachable!("{arguments:?}");
    };
    let len: usize = len.parse().unwrap();
    let pages = len.div_ceil(PAGE);
    fault::install().unwrap();
    let ((memory, _file), (other, _other_file)) = (shared(pages), shared(pages));
    let host = other.get_host_address(BASE).unwrap();
    protect(&other, pages - 1, libc::PROT_NONE);
    let slice = memory.get_slice(BASE, len).unwrap();
    // SAFETY: not sound: an access to the last page must kill the process.
    let bytes = unsafe { std::slice::from_raw_parts_mut(host, len) };
    // SAFETY: not sound: an access to the last page must kill the process.
    let words = unsafe { std::slice::from_raw_parts_mut(host.cast::<u32>(), len / 4) };
    println!("before the access");
    match (direction, element) {
        ("read", "1") => drop(memory.read(bytes, BASE)),
        ("write", "1") => drop(memory.write(bytes, BASE)),
        ("read", _) => drop(slice.copy_to(words)),
        _ => slice.copy_from(words),
    }
}

/// Installs a handler that prints address and stack, makes the page accessible, and stays
/// installed.
fn install_reporter(flags: i32) {
    extern "C" fn report(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: zeroes are a valid `stack_t`.
        let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
        // SAFETY: `stack` is valid for writes.
        unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) };
        // SAFETY: the kernel passes the information of the signal.
        let info = unsafe { &*info };
        // SAFETY: SIGSEGV has an address.
        let address = unsafe { info.si_addr() } as usize;
        let on_stack: &[u8] = match stack.ss_flags & libc::SS_ONSTACK {
            0 => b" on the usual stack\n",
            _ => b" on the alternate stack\n",
        };
        let mut line = *b"reported 0000000000000000";
        for (index, digit) in line.iter_mut().rev().take(16).enumerate() {
            *digit = b"0123456789abcdef"[(address >> (4 * index)) & 15];
        }
        for part in [&line[..], on_stack] {
            // SAFETY: `part` is valid for reads; write(2) is async-signal-safe.
            unsafe { libc::write(1, part.as_ptr().cast(), part.len()) };
        }
        let page = (address & !(PAGE - 1)) as *mut libc::c_void;
        // SAFETY: the page is of a mapping of the test, which only this thread uses.
        if unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            // SAFETY: ends the process.
            unsafe { libc::_exit(1) };
        }
    }
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = report;
    set_action(libc::SIGSEGV, handler as usize, libc::SA_SIGINFO | flags);
}

/// Installs a handler that prints a line and leaves the rest to the default action.
fn install_handler_called_once() {
    extern "C" fn log(_: i32) {
        let line = b"logged\n";
        // SAFETY: `line` is valid for reads; write(2) is async-signal-safe.
        unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
    }
    let handler: extern "C" fn(i32) = log;
    set_action(libc::SIGSEGV, handler as usize, libc::SA_RESETHAND);
}

#[test]
fn null_pointer_in_other_code_kills() {
    let output = run("null_pointer");
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV));
}

/// The handler of Rust's standard library ignores the first signal.
#[test]
fn sent_signal_has_same_effect_as_without_handler() {
    for scenario in ["sent_signal", "sent_signal_without_handler"] {
        let output = run(scenario);
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("survived the first signal"),
            "{scenario}"
        );
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{scenario}");
    }
}

#[test]
fn access_to_inaccessible_host_buffer_kills_process() {
    for direction in ["read", "write"] {
        for (len, element) in [(64, 1), (4096, 1), (65_536, 1), (64, 4), (4096, 4)] {
            let scenario = format!("host_buffer {direction} {len} {element}");
            let output = run(&scenario);
            assert!(
                String::from_utf8_lossy(&output.stdout).contains("before the access"),
                "{scenario}: {output:?}"
            );
            assert_eq!(
                output.status.signal(),
                Some(libc::SIGSEGV),
                "{scenario}: {output:?}"
            );
        }
    }
}

#[test]
fn access_to_unmapped_region_returns_efault() {
    run_to_end("unmapped_region");
}

#[test]
fn previous_handler_is_called_for_other_faults_only_and_on_its_stack() {
    for (scenario, stack) in [
        ("crash_reporter", "on the usual stack"),
        ("crash_reporter onstack", "on the alternate stack"),
    ] {
        let output = run_to_end(scenario);
        check_report(&String::from_utf8_lossy(&output.stdout), stack);
    }
}

/// Checks that the reporter was called on `stack`, for the expected addresses.
fn check_report(printed: &str, stack: &str) {
    let addresses = |start: &str| -> Vec<usize> {
        let lines = printed.lines().filter_map(|line| line.split_once(start));
        lines
            .map(|(_, rest)| {
                usize::from_str_radix(&rest[..rest.find(' ').unwrap_or(rest.len())], 16).unwrap()
            })
            .collect()
    };
    assert_eq!(addresses("reported ").len(), 2, "{printed}");
    assert_eq!(addresses("reported "), addresses("expected "), "{printed}");
    assert_eq!(printed.matches(stack).count(), 2, "{printed}");
}

#[test]
fn stack_overflow_is_reported_by_standard_library() {
    let output = run("stack_overflow");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("overflowed its stack"), "{message}");
}

#[test]
fn memory_error_notice_leaves_handler_installed() {
    let test = "memory_error_notice_leaves_handler_installed";
    let output = run("memory_error_notice");
    let message = String::from_utf8_lossy(&output.stderr);
    if let (true, Some(emulator)) = (message.contains("accel/tcg"), emulator()) {
        let why = format!(
            "{emulator:?} takes the notice for a fault of its own: {}",
            message.trim()
        );
        return skipped(test, why);
    }
    assert!(String::from_utf8_lossy(&output.stdout).contains("survived the notice"));
    assert_eq!(output.status.code(), Some(DONE), "{output:?}");
}

#[test]
fn previous_handler_with_resethand_is_called_once() {
    let output = run("handler_called_once");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout)
            .matches("logged")
            .count(),
        1
    );
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV));
}
