//! The signal handler, and the table that it looks things up in. What of it is one processor's, is in a file for each.
//!
//! The only state that the handler reads is written before it is installed, and never again: the table is in the program's read-only data, and
//! `PREVIOUS` is filled between asking for the former handlers and setting ours. The release store of `PREVIOUS`' cells (`OnceLock`) and the
//! system call order that before any run of the handler; `OnceLock::get` takes no lock.

#![expect(
    clippy::as_conversions,
    reason = "addresses and pointers to functions are the same bits"
)]

#[cfg_attr(target_arch = "x86_64", path = "linux/x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "linux/aarch64.rs")]
mod processor;

#[cfg(test)]
#[path = "linux/tests.rs"]
mod tests;

use core::ffi::{c_int, c_void};
use core::mem::{size_of, MaybeUninit};
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicBool, Ordering};
use std::io::{Error, Result};
use std::sync::{Mutex, OnceLock, PoisonError};

use processor::Registers;

/// An entry of the table, as the kernels write it (`fault_entry.rs`). The places are distances from the fields themselves.
#[repr(C)]
struct Entry {
    /// The first instruction.
    start: i32,
    /// Behind the last instruction.
    end: i32,
    /// Where to go on after a fault.
    resume: i32,
    /// How the guest operand is known: one of the constants below.
    operand: i32,
}

/// The instructions have no other memory operand.
const ONLY_OPERAND: i32 = 0;
/// Registers hold the start and the end of one and of another ([`Registers::operands`]).
const IN_REGISTERS: i32 = 1;

extern "C" {
    /// The linker's names for the two ends of the section.
    #[link_name = "__start_vm_memory_faults_1"]
    static TABLE_START: [Entry; 0];
    #[link_name = "__stop_vm_memory_faults_1"]
    static TABLE_END: [Entry; 0];
}

/// The handlers that were there before, for SIGBUS and SIGSEGV.
static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];

/// The signals, in the order of `PREVIOUS`.
const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// Installs the handler, once.
pub(super) fn install() -> Result<()> {
    static INSTALLED: Mutex<[bool; 2]> = Mutex::new([false; 2]);
    let mut all_installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    for ((signal, previous), installed) in
        SIGNALS.into_iter().zip(&PREVIOUS).zip(&mut *all_installed)
    {
        if *installed {
            continue;
        }
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: asks for the present action, which is written to `old`.
        if unsafe { libc::sigaction(signal, null(), old.as_mut_ptr()) } != 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the call has succeeded and filled it; zeroes are a valid `sigaction` as well.
        let old = unsafe { old.assume_init() };
        // Before ours is in place: the handler may run at once. An attempt that failed has left what was there then, and nothing of ours.
        let old = previous.get_or_init(|| old);
        let action = our_action(old);
        // SAFETY: `on_signal` is a handler of three arguments, as SA_SIGINFO says, and async-signal-safe.
        if unsafe { libc::sigaction(signal, &action, null_mut()) } != 0 {
            return Err(Error::last_os_error());
        }
        *installed = true;
    }
    Ok(())
}

/// Our handler, beside the one that was there before.
fn our_action(old: &libc::sigaction) -> libc::sigaction {
    // SAFETY: zeroes are a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as usize;
    // The mask is the previous handler's, which may be called from ours; the signal itself stays open if it was.
    action.sa_mask = old.sa_mask;
    action.sa_flags = libc::SA_SIGINFO
        | libc::SA_ONSTACK
        | (old.sa_flags & (libc::SA_NODEFER | libc::SA_RESTART));
    action
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a pointer to the signal's information (SA_SIGINFO).
    let fault = unsafe { Fault::from_info(info) };
    if let Some(fault) = fault {
        // SAFETY: the kernel passes a pointer to the interrupted context, which belongs to the handler until it returns.
        let context = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
        if recover(&mut Registers::of(context), &fault) {
            return;
        }
    }
    pass_on(signal, info, context);
}

/// A range of addresses that an access faulted at.
#[cfg_attr(test, derive(Debug, Eq, PartialEq))]
struct Fault {
    address: usize,
    /// How many bytes from there on are gone: 1, or as many as the kernel says for a memory error.
    len: usize,
}

/// The part of `siginfo_t` that the kernel fills for a fault (Linux, `include/uapi/asm-generic/siginfo.h`, `_sigfault`).
#[repr(C)]
struct FaultInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    padding: c_int,
    address: usize,
    /// The least significant bit of the address of a memory error.
    address_lsb: i16,
}

/// A memory error that an access ran into (`BUS_MCEERR_AR`).
const MEMORY_ERROR: c_int = 4;
/// A memory error that was found without an access (`BUS_MCEERR_AO`).
const MEMORY_ERROR_ELSEWHERE: c_int = 5;

impl Fault {
    /// What the signal says about an access; `None` if it was raised by something else.
    ///
    /// # Safety
    ///
    /// `info` is what the kernel passed to a handler of SIGBUS or SIGSEGV.
    unsafe fn from_info(info: *const libc::siginfo_t) -> Option<Self> {
        // SAFETY: `siginfo_t` is larger than the part read here, aligned for it, and all of it is initialised by the kernel.
        let info = unsafe { &*info.cast::<FaultInfo>() };
        // SIGSEGV: not mapped, no permission, protection key. SIGBUS: no such page, hardware, memory error.
        let raised_by_access = match info.signo {
            libc::SIGSEGV => matches!(info.code, 1 | 2 | 4),
            libc::SIGBUS => matches!(info.code, 2 | 3 | MEMORY_ERROR),
            _ => false,
        };
        if !raised_by_access {
            return None;
        }
        let is_memory_error = info.signo == libc::SIGBUS && info.code == MEMORY_ERROR;
        let len = match u32::try_from(info.address_lsb) {
            Ok(bit) if is_memory_error => 1usize.checked_shl(bit).unwrap_or(1),
            _ => 1,
        };
        Some(Fault {
            // The page of a memory error begins below the address.
            address: info.address & !len.wrapping_sub(1),
            len,
        })
    }

    /// The first address that is both gone and in an operand.
    fn within(&self, (start, end): (usize, usize)) -> Option<usize> {
        let first = self.address.max(start);
        (first < end && first.wrapping_sub(self.address) < self.len).then_some(first)
    }
}

/// Lets a kernel of this crate's go on with the fault's address, if the fault is in its guest operand.
fn recover(registers: &mut Registers<'_>, fault: &Fault) -> bool {
    let Some((resume, operand)) = find(registers.program_counter()) else {
        return false;
    };
    let first = match operand {
        ONLY_OPERAND => Some(fault.address),
        IN_REGISTERS => {
            let [one, other] = registers.operands();
            fault.within(one).or_else(|| fault.within(other))
        }
        _ => None,
    };
    let Some(first) = first else {
        return false;
    };
    // An address that cannot be, but must not read as "no fault".
    registers.go_on(resume, first.max(1));
    true
}

/// Writes an entry that no fault matches, next to the code that looks at the table: the linker takes objects only for what they are needed for, and
/// a program that installs the handler and has no access linked in would have no table.
#[inline(always)]
fn anchor_table() {
    // SAFETY: no instruction at all; the entry is in read-only data, with no code between its start and its end.
    unsafe {
        core::arch::asm!(
            ".pushsection vm_memory_faults_1, \"aR\", @progbits",
            ".balign 4",
            ".long 0, 0, 0, -1",
            ".popsection",
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// Where to go on after a fault at an instruction, and how its guest operand is known.
fn find(at: usize) -> Option<(usize, i32)> {
    anchor_table();
    let mut entry = (&raw const TABLE_START).cast::<Entry>();
    let end = (&raw const TABLE_END).cast::<Entry>();
    while entry < end {
        // SAFETY: the section is a sequence of entries and nothing else, each written whole by the kernels' macros, aligned to 4 as `Entry`
        // is; `entry` is between its ends.
        let fields = unsafe { &*entry };
        let place = |field: &i32| {
            core::ptr::from_ref(field)
                .addr()
                .wrapping_add_signed(*field as isize)
        };
        if (place(&fields.start)..place(&fields.end)).contains(&at) {
            return Some((place(&fields.resume), fields.operand));
        }
        entry = entry.wrapping_byte_add(size_of::<Entry>());
    }
    None
}

/// Does with a signal what would have been done without us.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: as in `on_signal`.
    let code = unsafe { (*info).si_code };
    // The kernel's notice of a memory error that nobody has touched yet is no fault of an instruction either.
    let sent = code <= 0 || (signal == libc::SIGBUS && code == MEMORY_ERROR_ELSEWHERE);
    let index = SIGNALS.iter().position(|one| *one == signal);
    let previous = index.and_then(|index| PREVIOUS.get(index)?.get());
    let withdrawn = index.and_then(|index| WITHDRAWN.get(index));
    match previous {
        // A fault cannot be ignored: the kernel ends the process as by default.
        Some(previous) if previous.sa_sigaction == libc::SIG_IGN && sent => {}
        Some(previous)
            if previous.sa_sigaction != libc::SIG_IGN
                && previous.sa_sigaction != libc::SIG_DFL
                && withdrawn.is_some_and(|withdrawn| !withdrawn.load(Ordering::Relaxed)) =>
        {
            if let (true, Some(withdrawn)) =
                (previous.sa_flags & libc::SA_RESETHAND != 0, withdrawn)
            {
                // It was to be called once.
                withdrawn.store(true, Ordering::Relaxed);
            }
            call(previous, signal, info, context);
            if sent {
                stay(signal, withdrawn);
            }
        }
        _ => default_action(signal, sent),
    }
}

/// Whether the former handler has set the default action in its own place, as the one of Rust's standard library does. After a fault that is how it
/// lets the process die; after a signal that was sent, the process goes on, and the next one meets the default action.
static WITHDRAWN: [AtomicBool; 2] = [const { AtomicBool::new(false) }; 2];

/// After a signal that was sent, puts our handler back if the former one has set the default action.
fn stay(signal: c_int, withdrawn: Option<&AtomicBool>) {
    let mut present = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks for the present action, which is written to `present`; async-signal-safe (signal-safety(7)).
    if unsafe { libc::sigaction(signal, null(), present.as_mut_ptr()) } != 0 {
        return;
    }
    // SAFETY: the call has succeeded and filled it; zeroes are a valid `sigaction` as well.
    let present = unsafe { present.assume_init() };
    if present.sa_sigaction == libc::SIG_DFL {
        if let Some(withdrawn) = withdrawn {
            withdrawn.store(true, Ordering::Relaxed);
        }
        let action = our_action(&present);
        // SAFETY: as in `install`; async-signal-safe.
        unsafe { libc::sigaction(signal, &action, null_mut()) };
    }
}

/// Calls the handler that was there before.
fn call(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    if previous.sa_flags & libc::SA_SIGINFO != 0 {
        type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
        // SAFETY: with SA_SIGINFO, and neither SIG_DFL nor SIG_IGN, the field is a function of that type (sigaction(2)).
        let handler = unsafe { core::mem::transmute::<*const (), Handler>(function_of(previous)) };
        handler(signal, info, context);
    } else {
        type Handler = extern "C" fn(c_int);
        // SAFETY: without SA_SIGINFO, and neither SIG_DFL nor SIG_IGN, the field is a function of that type (sigaction(2)).
        let handler = unsafe { core::mem::transmute::<*const (), Handler>(function_of(previous)) };
        handler(signal);
    }
}

/// The address of a handler as a pointer: what C keeps as a number is one of a function, whose provenance was exposed when it was put there.
fn function_of(previous: &libc::sigaction) -> *const () {
    core::ptr::with_exposed_provenance(previous.sa_sigaction)
}

/// Lets the kernel end the process.
fn default_action(signal: c_int, sent: bool) {
    // SAFETY: zeroes are a valid `sigaction`: the default action.
    let action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    // SAFETY: sets the default action; async-signal-safe (signal-safety(7)).
    unsafe { libc::sigaction(signal, &action, null_mut()) };
    if sent {
        // Not raised by an instruction that runs again when we return. It is delivered when this handler returns and no longer blocks it.
        // SAFETY: sends a signal; async-signal-safe (signal-safety(7)).
        unsafe { libc::raise(signal) };
    }
}
