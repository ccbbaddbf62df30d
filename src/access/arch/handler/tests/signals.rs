//! The signals that the handler acts on, and its action.

use core::ffi::c_int;
use core::sync::atomic::AtomicBool;

use crate::access::arch::handler::signals::*;
use crate::access::arch::handler::FaultRange;

/// Returns the start and length of the range that a signal reports.
fn reported(signo: c_int, code: c_int, address: usize, address_lsb: i16) -> Option<(usize, usize)> {
    /// At least as large as a `siginfo_t`, which begins with these fields.
    #[repr(C)]
    struct Info {
        fields: FaultInfo,
        rest: [u64; 16],
    }
    const _: () = assert!(size_of::<Info>() >= size_of::<libc::siginfo_t>());
    let fields = FaultInfo {
        signo,
        errno: 0,
        code,
        padding: 0,
        address,
        address_lsb,
    };
    let info = Info {
        fields,
        rest: [0; 16],
    };
    // SAFETY: `info` is initialised, at least as large as a `siginfo_t`, and has the fields that
    // the system fills.
    unsafe { FaultRange::from_info(core::ptr::from_ref(&info).cast()) }
        .map(|fault| (fault.start, fault.len))
}

const ADDRESS: usize = 0x7f12_3456_789a;

#[test]
fn from_info_of_signal_not_raised_by_access_returns_none() {
    // SI_USER, SI_QUEUE, SI_TIMER, SI_MESGQ, SI_ASYNCIO, SI_SIGIO, SI_TKILL.
    let sent = [0, -1, -2, -3, -4, -5, -6];
    // (signal, codes of faults, other codes)
    let table: [(c_int, &[c_int], &[c_int]); 4] = [
        // BNDERR, ACCADI, ADIDERR, ADIPERR, MTEAERR, CPERR.
        (
            libc::SIGSEGV,
            &[SEGV_MAPERR, SEGV_ACCERR, SEGV_PKUERR, SEGV_MTESERR],
            &[3, 5, 6, 7, 8, 10],
        ),
        // MCEERR_AO, and a code that Linux does not define.
        (
            libc::SIGBUS,
            &[BUS_ADRALN, BUS_ADRERR, BUS_OBJERR, BUS_MCEERR_AR],
            &[BUS_MCEERR_AO, 6],
        ),
        // BADSTK, BADIADDR, and a code that Linux does not define.
        (libc::SIGILL, &[], &[8, 9, 10]),
        (libc::SIGFPE, &[], &[1, 2, 3, 4, 5, SI_KERNEL]),
    ];
    for (signal, faults, others) in table {
        for code in faults {
            assert_eq!(
                reported(signal, *code, ADDRESS, 0),
                Some((ADDRESS, 1)),
                "{signal} {code}"
            );
        }
        for code in others.iter().chain(&sent) {
            assert_eq!(reported(signal, *code, ADDRESS, 0), None, "{signal} {code}");
        }
    }
}

#[test]
fn from_info_of_access_without_address_has_no_address() {
    let nowhere = Some((FaultRange::NO_ADDRESS.start, FaultRange::NO_ADDRESS.len));
    // The kernel sets no address, or that of the instruction.
    for address in [0, ADDRESS] {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            assert_eq!(reported(signal, SI_KERNEL, address, 0), nowhere, "{signal}");
        }
        // ILLOPC, ILLOPN, ILLADR, ILLTRP, PRVOPC, PRVREG, COPROC.
        for code in 1..=7 {
            assert_eq!(reported(libc::SIGILL, code, address, 0), nowhere, "{code}");
        }
    }
    // An external abort of aarch64. Other accesses to address 0 have an address.
    assert_eq!(reported(libc::SIGBUS, BUS_OBJERR, 0, 0), nowhere);
    assert_eq!(reported(libc::SIGBUS, BUS_ADRERR, 0, 0), Some((0, 1)));
    assert_eq!(reported(libc::SIGSEGV, SEGV_MAPERR, 0, 0), Some((0, 1)));
}

#[test]
fn from_info_of_memory_error_returns_its_page() {
    // (bit, start, length)
    let table = [
        (0, ADDRESS, 1),
        (6, 0x7f12_3456_7880, 64),
        (12, 0x7f12_3456_7000, 0x1000),
        (21, 0x7f12_3440_0000, 0x20_0000),
        (30, 0x7f12_0000_0000, 0x4000_0000),
        // Values that the kernel does not report.
        (-1, ADDRESS, 1),
        (64, ADDRESS, 1),
        (i16::MAX, ADDRESS, 1),
    ];
    for (bit, start, len) in table {
        assert_eq!(
            reported(libc::SIGBUS, BUS_MCEERR_AR, ADDRESS, bit),
            Some((start, len)),
            "{bit}"
        );
        for (signal, code) in [
            (libc::SIGSEGV, SEGV_PKUERR),
            (libc::SIGBUS, BUS_ADRERR),
            (libc::SIGSEGV, SEGV_MAPERR),
        ] {
            assert_eq!(
                reported(signal, code, ADDRESS, bit),
                Some((ADDRESS, 1)),
                "{signal} {code} {bit}"
            );
        }
    }
}

#[test]
fn our_action_has_stack_mask_and_flags_of_previous_handler() {
    let handler = our_action_has_stack_mask_and_flags_of_previous_handler as fn() as usize;
    let siginfo = libc::SA_SIGINFO;
    let inherited = INHERITED_FLAGS;
    let (once, alternate) = (libc::SA_RESETHAND, libc::SA_ONSTACK);
    let alone = libc::SA_ONSTACK | libc::SA_RESTART;
    // (handler, flags, our flags, whether the mask is the same)
    let table = [
        (handler, 0, siginfo, true),
        (handler, siginfo, siginfo, true),
        (handler, siginfo | alternate, siginfo | alternate, true),
        (handler, inherited, siginfo | inherited, true),
        (
            handler,
            once | libc::SA_NODEFER,
            siginfo | libc::SA_NODEFER,
            true,
        ),
        (handler, libc::SA_NOCLDSTOP, siginfo, true),
        // Nothing of the previous action runs on our stack.
        (libc::SIG_DFL, 0, siginfo | alone, false),
        (libc::SIG_DFL, libc::SA_NODEFER, siginfo | alone, false),
        (libc::SIG_IGN, 0, siginfo | alone, false),
    ];
    for (handler, flags, expected, masked) in table {
        let mut previous = default_action();
        (previous.sa_sigaction, previous.sa_flags) = (handler, flags);
        // SAFETY: the set is valid for writes.
        let status = unsafe { libc::sigaddset(&mut previous.sa_mask, libc::SIGUSR1) };
        assert_eq!(status, 0);
        let ours = our_action(&previous);
        assert_eq!(ours.sa_flags, expected, "{handler:x} {flags:x}");
        // SAFETY: the set is initialised.
        let blocks = unsafe { libc::sigismember(&ours.sa_mask, libc::SIGUSR1) };
        assert_eq!(blocks == 1, masked, "{handler:x} {flags:x}");
    }
}

#[test]
fn is_withdrawn_with_resethand_is_true_after_first_call() {
    let mut previous = default_action();
    let withdrawn = AtomicBool::new(false);
    assert!(!is_withdrawn(&previous, &withdrawn));
    assert!(!is_withdrawn(&previous, &withdrawn));
    previous.sa_flags = libc::SA_RESETHAND;
    assert!(!is_withdrawn(&previous, &withdrawn));
    assert!(is_withdrawn(&previous, &withdrawn));
}
