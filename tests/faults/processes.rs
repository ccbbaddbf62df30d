use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use super::*;
use test_support::{emulator, skipped};
use vm_memory::{fault, Bytes};

/// What must still kill, each in a process of its own.
fn in_a_process_of_its_own(what: &str) -> Output {
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
            "processes::dies_as_it_would_without_us",
            "--nocapture",
        ])
        .env("FAULTS_DIE", what);
    if cfg!(panic = "abort") {
        // A test program that aborts on panic runs each test in a child of its own, and would report its death in its own way.
        command.args(["-Zunstable-options", "--force-run-in-process"]);
    }
    command.output().unwrap()
}

#[test]
fn dies_as_it_would_without_us() {
    let Ok(what) = std::env::var("FAULTS_DIE") else {
        return;
    };
    if what == "once" {
        install_a_handler_that_is_called_once();
    }
    if what == "reporter" {
        install_a_reporter();
    }
    if what != "sent without us" {
        fault::install().unwrap();
    }
    let (memory, file) = shared(1);
    match what.as_str() {
        "null" | "once" => {
            // SAFETY: not sound, and meant to kill the process.
            unsafe { std::hint::black_box(std::ptr::null::<u8>()).read_volatile() }.into()
        }
        "sent" | "sent without us" => {
            // SAFETY: sends a signal to this process.
            unsafe { libc::raise(libc::SIGBUS) };
            println!("survived the first");
            if what == "sent" {
                // The former handler is gone, ours is not.
                protect(&memory, 0, libc::PROT_NONE);
                assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
            }
            // SAFETY: as above.
            unsafe { libc::raise(libc::SIGBUS) };
            0
        }
        "notice" => {
            // A memory error that nobody has touched: code 5 of SIGBUS (sigaction(2), BUS_MCEERR_AO), in `siginfo_t` the third number.
            let mut info = [0i32; 32];
            info[0] = libc::SIGBUS;
            info[2] = 5;
            // SAFETY: asks for a number.
            let process = unsafe { libc::getpid() };
            // SAFETY: asks for a number.
            let thread = unsafe { libc::gettid() };
            // SAFETY: `info` is as large as `siginfo_t`; to itself, a thread may send any code (rt_sigqueueinfo(2)).
            let answer = unsafe {
                libc::syscall(
                    libc::SYS_rt_tgsigqueueinfo,
                    process,
                    thread,
                    libc::SIGBUS,
                    info.as_ptr(),
                )
            };
            assert_eq!(answer, 0);
            println!("survived the notice");
            file.set_len(0).unwrap();
            assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
            std::process::exit(77);
        }
        "stack" => overflow(1),
        "unmapped" => {
            // Nothing else runs here that could be given the place.
            let host = memory.get_host_address(BASE).unwrap();
            // SAFETY: not sound, and nobody touches the page but by accesses of the crate; the process ends before the memory is dropped.
            assert_eq!(unsafe { libc::munmap(host.cast(), PAGE) }, 0);
            let (answer, last) = (memory.read_obj::<u64>(BASE), fault::last());
            assert!(is_efault(&answer.unwrap_err()));
            assert_eq!(last.unwrap().host_address, host as usize);
            assert!(is_efault(&memory.write_slice(&[1; 100], BASE).unwrap_err()));
            std::process::exit(77);
        }
        "reporter" => {
            let (other, _other_file) = shared(1);
            let host = other.get_host_address(BASE).unwrap();
            for byte in [5, 9] {
                file.set_len(0).unwrap();
                assert!(is_efault(&memory.read_obj::<u8>(BASE).unwrap_err()));
                assert!(is_efault(&memory.write(&[1; 300], BASE).unwrap_err()));
                protect(&other, 0, libc::PROT_NONE);
                println!("expected {:x}", host as usize + byte);
                // SAFETY: the reporter makes the page accessible.
                unsafe { host.wrapping_add(byte).write_volatile(1) };
            }
            std::process::exit(77);
        }
        what => {
            // "host", where the bytes go, how many bytes, in elements of how many.
            let fields: Vec<_> = what.split(' ').collect();
            let ["host", way, len, element] = fields[..] else {
                unreachable!("{what}");
            };
            // The guest's pages are there, the last of the host's is not.
            let len: usize = len.parse().unwrap();
            let pages = len.div_ceil(PAGE);
            let ((memory, _file), (other, _other_file)) = (shared(pages), shared(pages));
            let host = other.get_host_address(BASE).unwrap();
            protect(&other, pages - 1, libc::PROT_NONE);
            let slice = memory.get_slice(BASE, len).unwrap();
            // SAFETY: not sound, and meant to kill the process.
            let bytes = unsafe { std::slice::from_raw_parts_mut(host, len) };
            // SAFETY: as above.
            let words = unsafe { std::slice::from_raw_parts_mut(host.cast::<u32>(), len / 4) };
            println!("before");
            match (way, element) {
                ("read", "1") => memory.read(bytes, BASE).unwrap() as u64,
                ("write", "1") => memory.write(bytes, BASE).unwrap() as u64,
                ("read", _) => slice.copy_to(words) as u64,
                _ => {
                    slice.copy_from(words);
                    0
                }
            }
        }
    };
    unreachable!("should have died");
}

/// As a crash reporter does that stays: it says where and on which stack, and here makes the page accessible, so that the process goes on.
fn install_a_reporter() {
    extern "C" fn report(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: zeroes are a valid `stack_t`.
        let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
        // SAFETY: asks for the present one.
        unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) };
        // SAFETY: the kernel passes a pointer to what it says of a fault.
        let info = unsafe { &*info };
        // SAFETY: the signal is one that has an address.
        let address = unsafe { info.si_addr() } as usize;
        let on_stack: &[u8] = match stack.ss_flags & libc::SS_ONSTACK {
            0 => b" on the usual stack\n",
            _ => b" on the alternate stack\n",
        };
        let mut line = *b"reported 0000000000000000";
        for (digit, place) in line
            .iter_mut()
            .rev()
            .take(16)
            .enumerate()
            .map(|(i, p)| (address >> (4 * i) & 15, p))
        {
            *place = b"0123456789abcdef"[digit];
        }
        for part in [&line[..], on_stack] {
            // SAFETY: a buffer and its length; async-signal-safe (signal-safety(7)).
            unsafe { libc::write(1, part.as_ptr().cast(), part.len()) };
        }
        let page = (address & !(PAGE - 1)) as *mut libc::c_void;
        // SAFETY: the page of the test's own mapping.
        if unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            // SAFETY: ends the process.
            unsafe { libc::_exit(1) };
        }
    }
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = report;
    // SAFETY: zeroes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // Not on the alternate stack: that is what the handler in front of it must see to.
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: a handler of three arguments, as the flags say.
    let answer = unsafe { libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()) };
    assert_eq!(answer, 0);
}

/// As a crash logger does that leaves the rest to the default action.
fn install_a_handler_that_is_called_once() {
    extern "C" fn logger(_: i32) {
        let line = b"logged\n";
        // SAFETY: a buffer and its length; async-signal-safe (signal-safety(7)).
        unsafe { libc::write(1, line.as_ptr().cast(), line.len()) };
    }
    let handler: extern "C" fn(i32) = logger;
    // SAFETY: zeroes are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_RESETHAND;
    // SAFETY: a handler of one argument, as the flags say.
    let answer = unsafe { libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()) };
    assert_eq!(answer, 0);
}

fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 100]);
    if depth == 0 {
        0
    } else {
        overflow(depth + 1) + frame[(depth % 100) as usize]
    }
}

#[test]
fn a_null_pointer_elsewhere_still_kills() {
    assert_eq!(
        in_a_process_of_its_own("null").status.signal(),
        Some(libc::SIGSEGV)
    );
}

/// The handler of Rust's standard library lets the first one pass.
#[test]
fn a_signal_that_was_sent_does_what_it_did_before() {
    for what in ["sent", "sent without us"] {
        let output = in_a_process_of_its_own(what);
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("survived the first"),
            "{what}"
        );
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{what}");
    }
}

/// Of every kernel: bytes small, middle and large, and elements, either way.
#[test]
fn a_host_buffer_that_is_not_there_still_kills() {
    for way in ["read", "write"] {
        for (len, element) in [(64, 1), (4096, 1), (65_536, 1), (64, 4), (4096, 4)] {
            let what = format!("host {way} {len} {element}");
            let output = in_a_process_of_its_own(&what);
            assert!(
                String::from_utf8_lossy(&output.stdout).contains("before"),
                "{what}: {output:?}"
            );
            assert_eq!(
                output.status.signal(),
                Some(libc::SIGSEGV),
                "{what}: {output:?}"
            );
        }
    }
}

#[test]
fn a_page_that_was_unmapped_is_an_error() {
    let output = in_a_process_of_its_own("unmapped");
    assert_eq!(output.status.code(), Some(77), "{output:?}");
}

/// It hears of what is not the guest's, with the address, as often as that comes, and of nothing else.
#[test]
fn a_crash_reporter_stays_and_hears_of_no_guest_fault() {
    let output = in_a_process_of_its_own("reporter");
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let after = |start: &str| -> Vec<usize> {
        let lines = said.lines().filter_map(|line| line.split_once(start));
        lines
            .map(|(_, rest)| {
                usize::from_str_radix(&rest[..rest.find(' ').unwrap_or(rest.len())], 16).unwrap()
            })
            .collect()
    };
    assert_eq!(after("reported ").len(), 2, "{said}");
    assert_eq!(after("reported "), after("expected "), "{said}");
    // The reporter did not ask for it: it is called from ours, which runs there.
    assert_eq!(said.matches("on the alternate stack").count(), 2, "{said}");
}

#[test]
fn a_stack_overflow_is_still_reported() {
    let output = in_a_process_of_its_own("stack");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("overflowed its stack"), "{message}");
}

#[test]
fn a_notice_of_a_memory_error_leaves_the_handler_in_place() {
    let output = in_a_process_of_its_own("notice");
    let message = String::from_utf8_lossy(&output.stderr);
    if let (true, Some(emulator)) = (message.contains("accel/tcg"), emulator()) {
        skipped(
            "a_notice_of_a_memory_error_leaves_the_handler_in_place",
            format!(
                "{emulator:?} takes the notice for a fault of its own: {}",
                message.trim()
            ),
        );
        return;
    }
    assert!(String::from_utf8_lossy(&output.stdout).contains("survived the notice"));
    assert_eq!(output.status.code(), Some(77), "{output:?}");
}

#[test]
fn a_handler_that_is_to_be_called_once_is_called_once() {
    let output = in_a_process_of_its_own("once");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout)
            .matches("logged")
            .count(),
        1
    );
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV));
}
