//! The signal handler for SIGBUS, SIGSEGV and SIGILL, on Linux.
//!
//! It reads only state that was written before it was installed, and two relaxed atomics:
//! `WITHDRAWN`, which it writes itself, and `PASSES_ON_SENT_SIGNALS`. The table is read-only data,
//! and `PREVIOUS` is filled before our action is set. The release store of its `OnceLock` and the
//! system call order that before each run of the handler. `OnceLock::get` takes no lock.

use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::ops::Range;
use core::ptr::{null, null_mut};
use core::sync::atomic::{AtomicBool, Ordering};
use std::io::{Error, Result};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::{recover, Entry, FaultRange, Registers};
use crate::access::fault::PASSES_ON_SENT_SIGNALS;

extern "C" {
    /// The start of the table. The linker defines both symbols, by the name of the section.
    #[link_name = "__start_vm_memory_faults_1"]
    static TABLE_START: [Entry; 0];
    /// The end of the table.
    #[link_name = "__stop_vm_memory_faults_1"]
    static TABLE_END: [Entry; 0];
}

/// Returns the addresses of the table.
pub(super) fn table() -> Range<usize> {
    (&raw const TABLE_START).addr()..(&raw const TABLE_END).addr()
}

/// The signals that the handler handles.
const SIGNALS: [c_int; 3] = [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL];

/// The actions that were installed before ours, in the order of `SIGNALS`.
static PREVIOUS: [OnceLock<libc::sigaction>; 3] = [const { OnceLock::new() }; 3];

/// For each signal of `SIGNALS`: whether the previous handler has set the default action itself, or
/// the system would have done so (`SA_RESETHAND`).
///
/// The handler of Rust's standard library does so to let a faulting process die. If it did so for a
/// signal that was sent, the process continues, and the next signal must have the default action.
///
/// Relaxed accesses suffice: each flag protects no other memory. The store in `reinstall` comes
/// before the system call that sets the action again, so a handler that runs after it finds it.
static WITHDRAWN: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];

/// Installs the handler for each signal of `SIGNALS`, once.
pub(in crate::access::arch) fn install() -> Result<()> {
    static INSTALLED: Mutex<[bool; 3]> = Mutex::new([false; 3]);
    let mut all_installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    for ((signal, previous), installed) in
        SIGNALS.into_iter().zip(&PREVIOUS).zip(&mut *all_installed)
    {
        if *installed {
            continue;
        }
        let present = present_action(signal)?;
        // Filled first: the handler may run as soon as it is set. If an earlier attempt failed, the
        // action that it found is still the present one.
        let previous = previous.get_or_init(|| present);
        set_action(signal, &our_action(previous))?;
        *installed = true;
    }
    Ok(())
}

/// Returns the present action for `signal`. Async-signal-safe.
fn present_action(signal: c_int) -> Result<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `sigaction(2)` with a null new action only writes the present one to `action`.
    if unsafe { libc::sigaction(signal, null(), action.as_mut_ptr()) } != 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the call has filled `action`; the zeroes before were a valid `sigaction` as well.
    Ok(unsafe { action.assume_init() })
}

/// Sets the action for `signal`. Async-signal-safe.
fn set_action(signal: c_int, action: &libc::sigaction) -> Result<()> {
    // SAFETY: `action` is valid for reads. The callers pass only results of `default_action`,
    // `our_action` and `present_action`. The handler of `our_action` is `on_signal`, which takes
    // the three arguments that SA_SIGINFO passes and is async-signal-safe. `present_action` returns
    // an action that was in force.
    if unsafe { libc::sigaction(signal, action, null_mut()) } != 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Returns the default action.
pub(super) fn default_action() -> libc::sigaction {
    // SAFETY: zeroes are a valid `sigaction`: no flags, an empty mask, and SIG_DFL, which is 0.
    unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() }
}

/// Returns whether an action calls a handler.
fn calls_handler(action: &libc::sigaction) -> bool {
    action.sa_sigaction != libc::SIG_IGN && action.sa_sigaction != libc::SIG_DFL
}

/// The flag of an action whose handler gets the tag of an address (Linux:
/// `include/uapi/asm-generic/signal-defs.h`).
const SA_EXPOSE_TAGBITS: c_int = 0x800;

/// The flags of the previous handler that the system applies when it calls ours.
///
/// They make the system call ours as it would call the previous one: on the same stack, with the
/// same signals blocked. `chain_to_previous` applies SA_RESETHAND.
pub(super) const INHERITED_FLAGS: c_int =
    libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART | SA_EXPOSE_TAGBITS;

/// Returns the action of our handler, which may call the handler of `previous`.
pub(super) fn our_action(previous: &libc::sigaction) -> libc::sigaction {
    let mut action = default_action();
    action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    if calls_handler(previous) {
        action.sa_mask = previous.sa_mask;
        action.sa_flags |= previous.sa_flags & INHERITED_FLAGS;
    } else {
        // Our handler calls no other one, so the alternate stack is large enough. An ignored signal
        // does not interrupt system calls.
        action.sa_flags |= libc::SA_ONSTACK | libc::SA_RESTART;
    }
    action
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes the signal's information to a handler with SA_SIGINFO, and this is
    // one for the signals of `SIGNALS`.
    if let Some(fault) = unsafe { FaultRange::from_info(info) } {
        // SAFETY: the system passes the interrupted context, which belongs to the handler until it
        // returns.
        let context = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
        let mut registers = Registers::new(context);
        // SAFETY: the system passes the signal's information to a handler with SA_SIGINFO.
        let is_by_kernel = unsafe { (*info).si_code } == SI_KERNEL;
        let is_fault = !is_by_kernel || registers.is_exception_without_address(signal);
        if is_fault && recover(&mut registers, &fault) {
            return;
        }
    }
    chain_to_previous(signal, info, context);
}

/// The part of `siginfo_t` that the system fills for a fault.
///
/// Linux: `include/uapi/asm-generic/siginfo.h`, `_sigfault`.
#[repr(C)]
pub(super) struct FaultInfo {
    pub(super) signo: c_int,
    pub(super) errno: c_int,
    pub(super) code: c_int,
    pub(super) padding: c_int,
    pub(super) address: usize,
    /// For a memory error: the binary logarithm of its size.
    pub(super) address_lsb: i16,
}

// The codes (`si_code`) of signals that an access raises, by the names of Linux
// (`include/uapi/asm-generic/siginfo.h`).
pub(super) const SEGV_MAPERR: c_int = 1;
pub(super) const SEGV_ACCERR: c_int = 2;
pub(super) const SEGV_PKUERR: c_int = 4;
/// The tag of a pointer is not that of its memory (aarch64).
pub(super) const SEGV_MTESERR: c_int = 9;
/// An access to memory of a device is not aligned (aarch64).
pub(super) const BUS_ADRALN: c_int = 1;
pub(super) const BUS_ADRERR: c_int = 2;
pub(super) const BUS_OBJERR: c_int = 3;
/// An access met a memory error.
pub(super) const BUS_MCEERR_AR: c_int = 4;
/// There is a memory error that no access met yet. No access raises this signal.
pub(super) const BUS_MCEERR_AO: c_int = 5;
/// An illegal opcode. It is the first of the codes of SIGILL that an instruction raises.
pub(super) const ILL_ILLOPC: c_int = 1;
/// A coprocessor error. It is the last of these codes.
pub(super) const ILL_COPROC: c_int = 7;
/// The kernel raises the signal and gives neither a code nor an address.
///
/// On x86_64, this is a general protection fault (SIGSEGV) or a stack fault (SIGBUS). The kernel
/// also ends a process in this way. Examples are a memory error, and a signal whose frame does not
/// fit on the stack. The registers distinguish them.
pub(super) const SI_KERNEL: c_int = 0x80;

impl FaultRange {
    /// Returns the range that an access faulted in. `None` if something else raised the signal.
    ///
    /// # Safety
    ///
    /// The system passed `info` to a handler of a signal of `SIGNALS`.
    pub(super) unsafe fn from_info(info: *const libc::siginfo_t) -> Option<Self> {
        // SAFETY: the system passed `info` to the handler (this function's contract). Linux
        // initialises all of that `siginfo_t`: `clear_siginfo` zeroes the kernel's copy, and
        // `copy_siginfo_to_user` writes it and zeroes the rest. It is larger than a `FaultInfo` and
        // aligned for it.
        let info = unsafe { &*info.cast::<FaultInfo>() };
        match (info.signo, info.code) {
            // The address of SIGILL is that of the instruction.
            (libc::SIGILL, ILL_ILLOPC..=ILL_COPROC) | (libc::SIGSEGV | libc::SIGBUS, SI_KERNEL) => {
                return Some(Self::NO_ADDRESS)
            }
            // aarch64 may not know the address of an external abort.
            (libc::SIGBUS, BUS_OBJERR) if info.address == 0 => return Some(Self::NO_ADDRESS),
            (libc::SIGSEGV, SEGV_MAPERR | SEGV_ACCERR | SEGV_PKUERR | SEGV_MTESERR)
            | (libc::SIGBUS, BUS_ADRALN | BUS_ADRERR | BUS_OBJERR | BUS_MCEERR_AR) => {}
            _ => return None,
        }
        let is_memory_error = info.signo == libc::SIGBUS && info.code == BUS_MCEERR_AR;
        let len = match u32::try_from(info.address_lsb) {
            Ok(bit) if is_memory_error => 1usize.checked_shl(bit).unwrap_or(1),
            _ => 1,
        };
        Some(FaultRange {
            start: info.address & !len.wrapping_sub(1),
            len,
        })
    }
}

/// Handles a signal that is not ours as if our handler were not installed.
fn chain_to_previous(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system passed the signal's information to `on_signal`.
    let code = unsafe { (*info).si_code };
    // The notice of a memory error that no access met does not come from an instruction either.
    let was_sent = code <= 0 || (signal == libc::SIGBUS && code == BUS_MCEERR_AO);
    let index = SIGNALS.iter().position(|one| *one == signal);
    let previous = index.and_then(|index| PREVIOUS.get(index)?.get());
    let is_passed_on = !was_sent || PASSES_ON_SENT_SIGNALS.load(Ordering::Relaxed);
    match (previous, index.and_then(|index| WITHDRAWN.get(index))) {
        // A fault cannot be ignored: the system applies the default action instead.
        (Some(previous), _) if previous.sa_sigaction == libc::SIG_IGN && was_sent => {}
        (Some(previous), Some(withdrawn))
            if is_passed_on && calls_handler(previous) && !is_withdrawn(previous, withdrawn) =>
        {
            let present = was_sent.then(|| present_action(signal));
            call_previous(previous, signal, info, context);
            if let Some(Ok(present)) = present {
                reinstall(signal, &present, withdrawn);
            }
        }
        _ => apply_default_action(signal, was_sent),
    }
}

/// Returns whether the previous handler must not be called any more.
pub(super) fn is_withdrawn(previous: &libc::sigaction, withdrawn: &AtomicBool) -> bool {
    match previous.sa_flags & libc::SA_RESETHAND {
        0 => withdrawn.load(Ordering::Relaxed),
        // It is called only once, by the first thread.
        _ => withdrawn.swap(true, Ordering::Relaxed),
    }
}

/// Sets the action `before` again, if the previous handler has set the default action.
///
/// That action is ours, or that of a handler that was installed later and called ours. While the
/// default action is set, a fault in another thread ends the process.
fn reinstall(signal: c_int, before: &libc::sigaction, withdrawn: &AtomicBool) {
    let Ok(present) = present_action(signal) else {
        return;
    };
    if present.sa_sigaction != libc::SIG_DFL {
        return;
    }
    withdrawn.store(true, Ordering::Relaxed);
    // The call fails only for an invalid signal, and a handler cannot report that.
    let _ = if calls_handler(before) {
        set_action(signal, before)
    } else {
        // Another thread's signal had set it already.
        set_action(signal, &our_action(&present))
    };
}

/// Calls the handler that was installed before ours.
fn call_previous(
    previous: &libc::sigaction,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // C keeps the handler as a number. Its provenance was exposed when it was stored there.
    let function = core::ptr::with_exposed_provenance::<()>(previous.sa_sigaction);
    if previous.sa_flags & libc::SA_SIGINFO != 0 {
        type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
        // SAFETY: `previous` was in force before `install` (`PREVIOUS`). An action with SA_SIGINFO
        // that is neither SIG_DFL nor SIG_IGN, as `calls_handler` has checked, has a handler of
        // this type (sigaction(2)).
        let handler = unsafe { core::mem::transmute::<*const (), Handler>(function) };
        handler(signal, info, context);
    } else {
        type Handler = extern "C" fn(c_int);
        // SAFETY: `previous` was in force before `install` (`PREVIOUS`). An action without
        // SA_SIGINFO that is neither SIG_DFL nor SIG_IGN, as `calls_handler` has checked, has a
        // handler of this type (sigaction(2)).
        let handler = unsafe { core::mem::transmute::<*const (), Handler>(function) };
        handler(signal);
    }
}

/// Sets the default action, which ends the process after our handler returns.
fn apply_default_action(signal: c_int, was_sent: bool) {
    // The call fails only for an invalid signal, and a handler cannot report that.
    let _ = set_action(signal, &default_action());
    if was_sent {
        // No instruction will raise the signal again, so it is sent again. It is delivered when our
        // handler returns, which unblocks it.
        //
        // SAFETY: `raise(3)` sends a signal to this thread; it is async-signal-safe.
        unsafe { libc::raise(signal) };
    }
}
