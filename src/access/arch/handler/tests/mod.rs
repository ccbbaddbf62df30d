//! The decisions of the handler, as tables.

#[cfg(windows)]
mod exceptions;
#[cfg(target_os = "linux")]
mod signals;

use core::mem::MaybeUninit;

use super::*;
use test_support::PAGE;

/// The registers, as the system passes them to the handler.
#[cfg(target_os = "linux")]
type Context = libc::mcontext_t;
#[cfg(windows)]
type Context = windows_sys::Win32::System::Diagnostics::Debug::CONTEXT;

/// (start of the fault, its length, operand, first address that is in both)
type Within = (usize, usize, (usize, usize), Option<usize>);

#[rustfmt::skip]
const WITHIN: [Within; 14] = [
    (0x5000, 1, (0x5000, 0x5001), Some(0x5000)),
    (0x5007, 1, (0x5000, 0x5008), Some(0x5007)),
    (0x5008, 1, (0x5000, 0x5008), None),
    (0x4fff, 1, (0x5000, 0x5008), None),
    // The page of a memory error begins below the operand, in it, or at its end.
    (0x5000, PAGE, (0x5800, 0x5810), Some(0x5800)),
    (0x5000, PAGE, (0x5fff, 0x6100), Some(0x5fff)),
    (0x5000, PAGE, (0x6000, 0x6100), None),
    (0x5000, PAGE, (0x4800, 0x5010), Some(0x5000)),
    (0x5000, PAGE, (0x4800, 0x5000), None),
    (0x20_0000, 0x20_0000, (0x30_0000, 0x30_0001), Some(0x30_0000)),
    (0x20_0000, 0x20_0000, (0x40_0000, 0x40_0001), None),
    // No operand, and an empty one.
    (0x5000, PAGE, (0, 0), None),
    (0, 1, (0, 0), None),
    (0x5000, PAGE, (0x5800, 0x5800), None),
];

#[test]
fn within_returns_first_address_in_operand() {
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

/// Returns an instruction of the table with this kind of operand, and the address at which a fault
/// resumes.
fn instruction(operand: i32) -> (usize, usize) {
    let table = table();
    let start = with_exposed_provenance::<Entry>(table.start);
    for number in 0..table.len() / size_of::<Entry>() {
        // SAFETY: the section consists of as many entries.
        let entry = unsafe { &*start.wrapping_add(number) };
        let begin = core::ptr::from_ref(&entry.start)
            .addr()
            .wrapping_add_signed(entry.start as isize);
        if let (true, Some((resume, found))) = (entry.operand == operand, lookup(begin)) {
            assert_eq!(found, operand);
            return (begin, resume);
        }
    }
    panic!("no routine has an operand of kind {operand}");
}

/// Returns the result of `recover`, the next instruction, and the result register, which was 77.
fn recovered(at: usize, operands: [(usize, usize); 2], fault: FaultRange) -> (bool, usize, usize) {
    // SAFETY: zeroes are a valid context: it consists of integers.
    let mut context = unsafe { MaybeUninit::<Context>::zeroed().assume_init() };
    let mut registers = Registers::new(&mut context);
    registers.resume_at(0, 77);
    registers.interrupt(at, operands);
    let recovers = recover(&mut registers, &fault);
    (recovers, registers.program_counter(), registers.result())
}

#[test]
fn recover_with_fault_in_either_operand_resumes() {
    let (at, resume) = instruction(IN_REGISTERS);
    for (address, len, operand, expected) in WITHIN {
        for operands in [
            [operand, (0, 0)],
            [(0, 0), operand],
            [(0x10, 0x20), operand],
        ] {
            let result = recovered(
                at,
                operands,
                FaultRange {
                    start: address,
                    len,
                },
            );
            let wanted = expected.map_or((false, at, 77), |first| (true, resume, first));
            assert_eq!(result, wanted, "{address:x} of {len:x} in {operands:x?}");
        }
    }
}

#[test]
fn recover_with_only_operand_ignores_registers() {
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
        // A result of 0 stands for success.
        assert_eq!(
            recovered(at, operands, FaultRange { start: 0, len: 1 }),
            (true, resume, 1)
        );
    }
}

#[test]
fn recover_without_address_resumes_for_any_operand() {
    for kind in [ONLY_OPERAND, IN_REGISTERS] {
        let (at, resume) = instruction(kind);
        for operands in [[(0, 0); 2], [(0x10, 0x20), (0x5000, 0x6000)]] {
            assert_eq!(
                recovered(at, operands, FaultRange::NO_ADDRESS),
                (true, resume, NO_ADDRESS.get())
            );
        }
    }
}

/// Executes an instruction that the processor refuses, as an access routine, with both kinds of
/// operand.
#[test]
fn illegal_instruction_in_routine_returns_no_address() {
    if crate::fault::install().is_err() {
        return; // these routines do not recover from faults
    }
    macro_rules! illegal {
        ($kind:literal, $instruction:literal, $result:tt) => {{
            let fault: usize;
            // SAFETY: the instruction accesses no memory. The handler resumes after it.
            unsafe {
                core::arch::asm!(
                    "2:",
                    $instruction,
                    "3:",
                    fault_entry!("2b", "3b", "3b", $kind),
                    inout($result) 0usize => fault,
                    options(nostack, preserves_flags),
                );
            }
            fault
        }};
    }
    #[cfg(target_arch = "x86_64")]
    let faults = [illegal!("0", "ud2", "rax"), illegal!("1", "ud2", "rax")];
    #[cfg(target_arch = "aarch64")]
    let faults = [
        illegal!("0", "udf #0", "x16"),
        illegal!("1", "udf #0", "x16"),
    ];
    assert_eq!(faults, [NO_ADDRESS.get(); 2]);
}

/// The base register selects the exception: a general protection fault, or a stack fault (Intel
/// SDM, volume 1, section 3.3.7.1).
#[cfg(target_arch = "x86_64")]
#[test]
fn load_of_address_that_is_not_canonical_returns_no_address() {
    if crate::fault::install().is_err() {
        return; // these routines do not recover from faults
    }
    macro_rules! load {
        ($kind:literal, $operand:literal) => {{
            let fault: usize;
            // SAFETY: an address that is not canonical refers to no memory. The handler resumes
            // after the instruction.
            unsafe {
                core::arch::asm!(
                    "2:",
                    concat!("mov ecx, dword ptr [", $operand, "]"),
                    "3:",
                    fault_entry!("2b", "3b", "3b", $kind),
                    inout("rcx") 1usize << 63 => _,
                    inout("rax") 0usize => fault,
                    options(nostack, preserves_flags),
                );
            }
            fault
        }};
    }
    assert_eq!(
        [load!("0", "rcx"), load!("1", "rcx")],
        [NO_ADDRESS.get(); 2]
    );
    // Windows does not distinguish a stack fault from a stack overflow.
    #[cfg(target_os = "linux")]
    assert_eq!(
        [load!("0", "rsp + rcx"), load!("1", "rsp + rcx")],
        [NO_ADDRESS.get(); 2]
    );
}

#[test]
fn recover_at_other_instruction_changes_nothing() {
    let everything = [(0, usize::MAX), (0, usize::MAX)];
    for at in [
        0,
        1,
        recover_at_other_instruction_changes_nothing as fn() as usize,
        usize::MAX,
    ] {
        for (start, len) in [(0x5000, 1), (NO_ADDRESS.get(), 0)] {
            let fault = FaultRange { start, len };
            assert_eq!(recovered(at, everything, fault), (false, at, 77), "{at:x}");
        }
    }
}
