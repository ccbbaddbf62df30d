//! What the handler decides, as tables.

use super::*;

/// What `from_info` makes of a signal: the address and length of the fault.
fn seen(signo: c_int, code: c_int, address: usize, address_lsb: i16) -> Option<(usize, usize)> {
    /// No smaller than a `siginfo_t`, which begins with these fields.
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
    // SAFETY: the fields of a fault, as the kernel fills them, and zeroes.
    unsafe { FaultRange::from_info(core::ptr::from_ref(&info).cast()) }
        .map(|fault| (fault.start, fault.len))
}

const ADDRESS: usize = 0x7f12_3456_789a;

/// Only what an access of the interrupted instruction raises is a fault.
#[test]
fn only_accesses_raise_faults() {
    // SI_USER, SI_QUEUE, SI_TIMER, SI_MESGQ, SI_ASYNCIO, SI_SIGIO, SI_TKILL; SI_KERNEL, which tells no address.
    let sent = [0, -1, -2, -3, -4, -5, -6, 0x80];
    // (signal, the codes of it that are faults, others that there are)
    let table: [(c_int, &[c_int], &[c_int]); 4] = [
        // MAPERR, ACCERR, PKUERR; BNDERR, ACCADI, ADIDERR, ADIPERR, MTEAERR, MTESERR, CPERR.
        (libc::SIGSEGV, &[1, 2, 4], &[3, 5, 6, 7, 8, 9, 10]),
        // ADRERR, OBJERR, MCEERR_AR; ADRALN, MCEERR_AO.
        (libc::SIGBUS, &[2, 3, 4], &[1, 5, 6]),
        (libc::SIGILL, &[], &[1, 2, 3, 4, 5]),
        (libc::SIGFPE, &[], &[1, 2, 3, 4, 5]),
    ];
    for (signal, faults, others) in table {
        for code in faults {
            assert_eq!(
                seen(signal, *code, ADDRESS, 0),
                Some((ADDRESS, 1)),
                "{signal} {code}"
            );
        }
        for code in others.iter().chain(&sent) {
            assert_eq!(seen(signal, *code, ADDRESS, 0), None, "{signal} {code}");
        }
    }
}

/// A memory error takes as many bytes as its least significant bit says; nothing else has that field.
#[test]
fn a_memory_error_is_of_a_page() {
    // (bit, first address that is gone, how many are)
    let table = [
        (0, ADDRESS, 1),
        (6, 0x7f12_3456_7880, 64),
        (12, 0x7f12_3456_7000, 0x1000),
        (21, 0x7f12_3440_0000, 0x20_0000),
        (30, 0x7f12_0000_0000, 0x4000_0000),
        // Not what the kernel says.
        (-1, ADDRESS, 1),
        (64, ADDRESS, 1),
        (i16::MAX, ADDRESS, 1),
    ];
    for (bit, start, len) in table {
        assert_eq!(
            seen(libc::SIGBUS, MEMORY_ERROR, ADDRESS, bit),
            Some((start, len)),
            "{bit}"
        );
        for (signal, code) in [
            (libc::SIGSEGV, MEMORY_ERROR),
            (libc::SIGBUS, 2),
            (libc::SIGSEGV, 1),
        ] {
            assert_eq!(
                seen(signal, code, ADDRESS, bit),
                Some((ADDRESS, 1)),
                "{signal} {code} {bit}"
            );
        }
    }
}

/// (first byte gone, how many, operand, the first byte that is both)
type Within = (usize, usize, (usize, usize), Option<usize>);

const PAGE: usize = 0x1000;

#[rustfmt::skip]
const WITHIN: [Within; 14] = [
    (0x5000, 1, (0x5000, 0x5001), Some(0x5000)),
    (0x5007, 1, (0x5000, 0x5008), Some(0x5007)),
    (0x5008, 1, (0x5000, 0x5008), None),
    (0x4fff, 1, (0x5000, 0x5008), None),
    // The page of a memory error begins below the operand, in it, or where it ends.
    (0x5000, PAGE, (0x5800, 0x5810), Some(0x5800)),
    (0x5000, PAGE, (0x5fff, 0x6100), Some(0x5fff)),
    (0x5000, PAGE, (0x6000, 0x6100), None),
    (0x5000, PAGE, (0x4800, 0x5010), Some(0x5000)),
    (0x5000, PAGE, (0x4800, 0x5000), None),
    (0x20_0000, 0x20_0000, (0x30_0000, 0x30_0001), Some(0x30_0000)),
    (0x20_0000, 0x20_0000, (0x40_0000, 0x40_0001), None),
    // No operand, and one that is empty.
    (0x5000, PAGE, (0, 0), None),
    (0, 1, (0, 0), None),
    (0x5000, PAGE, (0x5800, 0x5800), None),
];

#[test]
fn a_fault_within_an_operand_is_at_its_first_byte_there() {
    for (address, len, operand, expected) in WITHIN {
        let fault = FaultRange {
            start: address,
            len,
        };
        assert_eq!(
            fault.within(operand),
            expected,
            "{fault:x?} in {operand:x?}"
        );
    }
}

/// An instruction of the table whose guest operand is known in that way, and where it goes on.
fn instruction(operand: i32) -> (usize, usize) {
    let (start, end) = (
        (&raw const TABLE_START).cast::<Entry>(),
        (&raw const TABLE_END).cast::<Entry>(),
    );
    let count = end.addr().wrapping_sub(start.addr()) / size_of::<Entry>();
    for number in 0..count {
        // SAFETY: the section is a sequence of so many entries.
        let entry = unsafe { &*start.wrapping_add(number) };
        let begin = core::ptr::from_ref(&entry.start)
            .addr()
            .wrapping_add_signed(entry.start as isize);
        if let (true, Some((resume, found))) = (entry.operand == operand, lookup(begin)) {
            assert_eq!(found, operand);
            return (begin, resume);
        }
    }
    panic!("no kernel has an operand of kind {operand}");
}

/// What `recover` answers, where it goes on and with what in the register of the answer, which was 77.
fn recovered(at: usize, operands: [(usize, usize); 2], fault: FaultRange) -> (bool, usize, usize) {
    // SAFETY: zeroes are a valid context.
    let mut context = unsafe { MaybeUninit::<libc::mcontext_t>::zeroed().assume_init() };
    let mut registers = Registers::new(&mut context);
    registers.resume_at(0, 77);
    registers.interrupt(at, operands);
    let recovers = recover(&mut registers, &fault);
    (recovers, registers.program_counter(), registers.result())
}

#[test]
fn a_kernel_goes_on_if_the_fault_is_in_either_of_its_guest_operands() {
    let (at, resume) = instruction(IN_REGISTERS);
    for (address, len, operand, expected) in WITHIN {
        for operands in [
            [operand, (0, 0)],
            [(0, 0), operand],
            [(0x10, 0x20), operand],
        ] {
            let answer = recovered(
                at,
                operands,
                FaultRange {
                    start: address,
                    len,
                },
            );
            let wanted = expected.map_or((false, at, 77), |first| (true, resume, first));
            assert_eq!(answer, wanted, "{address:x} of {len:x} in {operands:x?}");
        }
    }
}

#[test]
fn an_instruction_with_one_operand_goes_on_whatever_the_registers_hold() {
    let (at, resume) = instruction(ONLY_OPERAND);
    for operands in [[(0, 0); 2], [(0x10, 0x20), (0x5000, 0x6000)]] {
        for (address, len) in [(0x5008, 1), (0x5000, PAGE), (0x20_0000, 0x20_0000)] {
            assert_eq!(
                recovered(
                    at,
                    operands,
                    FaultRange {
                        start: address,
                        len
                    }
                ),
                (true, resume, address)
            );
        }
        // It must not read as "no fault".
        assert_eq!(
            recovered(at, operands, FaultRange { start: 0, len: 1 }),
            (true, resume, 1)
        );
    }
}

#[test]
fn no_other_instruction_is_touched() {
    let everything = [(0, usize::MAX), (0, usize::MAX)];
    for at in [
        0,
        1,
        no_other_instruction_is_touched as fn() as usize,
        usize::MAX,
    ] {
        let fault = FaultRange {
            start: 0x5000,
            len: 1,
        };
        assert_eq!(recovered(at, everything, fault), (false, at, 77), "{at:x}");
    }
}
