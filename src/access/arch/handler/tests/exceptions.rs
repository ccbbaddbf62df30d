//! The exceptions that the handler acts on.

use windows_sys::Win32::Foundation::{
    FreeLibrary, EXCEPTION_ACCESS_VIOLATION, EXCEPTION_GUARD_PAGE, EXCEPTION_ILLEGAL_INSTRUCTION,
    EXCEPTION_IN_PAGE_ERROR, EXCEPTION_PRIV_INSTRUCTION, NTSTATUS, STATUS_STACK_OVERFLOW,
};
use windows_sys::Win32::System::Diagnostics::Debug::{
    EXCEPTION_CONTINUE_EXECUTION, EXCEPTION_CONTINUE_SEARCH, EXCEPTION_POINTERS, EXCEPTION_RECORD,
};
use windows_sys::Win32::System::LibraryLoader::{GetModuleHandleW, LoadLibraryW};

use super::*;
use crate::access::arch::handler::exceptions::{keep_loaded, on_exception};

const ADDRESS: usize = 0x7f12_3456_789a;

/// Returns the record of an exception with these parameters.
fn record(code: NTSTATUS, parameters: &[usize]) -> EXCEPTION_RECORD {
    let mut record = EXCEPTION_RECORD {
        ExceptionCode: code,
        NumberParameters: parameters.len() as u32,
        ..Default::default()
    };
    record.ExceptionInformation[..parameters.len()].copy_from_slice(parameters);
    record
}

#[test]
fn from_record_of_exception_not_raised_by_access_returns_none() {
    const NOWHERE: (usize, usize) = (FaultRange::NO_ADDRESS.start, FaultRange::NO_ADDRESS.len);
    let range = |code, parameters: &[usize]| {
        FaultRange::from_record(&record(code, parameters)).map(|fault| (fault.start, fault.len))
    };
    for code in [EXCEPTION_ACCESS_VIOLATION, EXCEPTION_IN_PAGE_ERROR] {
        for kind in [0, 1] {
            assert_eq!(range(code, &[kind, ADDRESS]), Some((ADDRESS, 1)));
            assert_eq!(
                range(code, &[kind, ADDRESS, 0xc000_009c]),
                Some((ADDRESS, 1))
            );
        }
        // An address that is not canonical.
        assert_eq!(range(code, &[0, usize::MAX]), Some(NOWHERE));
        // An instruction fetch, and no parameters.
        for parameters in [&[8, ADDRESS][..], &[8, usize::MAX], &[], &[1]] {
            assert_eq!(range(code, parameters), None, "{parameters:x?}");
        }
    }
    assert_eq!(range(EXCEPTION_ILLEGAL_INSTRUCTION, &[]), Some(NOWHERE));
    for code in [
        EXCEPTION_GUARD_PAGE,
        EXCEPTION_PRIV_INSTRUCTION,
        STATUS_STACK_OVERFLOW,
        0,
        -1,
    ] {
        assert_eq!(range(code, &[0, ADDRESS]), None, "{code:x}");
    }
}

/// Returns what the handler does with an exception, the next instruction, and the result register.
fn handled(
    mut record: EXCEPTION_RECORD,
    at: usize,
    operand: (usize, usize),
) -> (i32, usize, usize) {
    let mut context = Context::default();
    Registers::new(&mut context).interrupt(at, [(0, 0), operand]);
    let mut exception = EXCEPTION_POINTERS {
        ExceptionRecord: &mut record,
        ContextRecord: &mut context,
    };
    // SAFETY: both pointers are valid.
    let action = unsafe { on_exception(&mut exception) };
    let registers = Registers::new(&mut context);
    (action, registers.program_counter(), registers.result())
}

/// A page of a file on a medium that was removed. Wine raises no such exception.
#[test]
fn on_exception_in_page_of_file_that_cannot_be_read_resumes() {
    let (at, resume) = instruction(IN_REGISTERS);
    for code in [EXCEPTION_IN_PAGE_ERROR, EXCEPTION_ACCESS_VIOLATION] {
        // STATUS_DEVICE_DATA_ERROR
        let record = record(code, &[0, ADDRESS, 0xc000_009c]);
        assert_eq!(
            handled(record, at, (ADDRESS - 10, ADDRESS + 1)),
            (EXCEPTION_CONTINUE_EXECUTION, resume, ADDRESS)
        );
        assert_eq!(
            handled(record, at, (ADDRESS - 10, ADDRESS)),
            (EXCEPTION_CONTINUE_SEARCH, at, 0)
        );
        assert_eq!(
            handled(record, resume, (0, usize::MAX)),
            (EXCEPTION_CONTINUE_SEARCH, resume, 0)
        );
    }
}

#[test]
fn table_has_entry_of_each_kind() {
    assert!(table().len() >= 2 * size_of::<Entry>());
    assert_eq!(table().len() % size_of::<Entry>(), 0);
    let (only, _) = instruction(ONLY_OPERAND);
    let (in_registers, _) = instruction(IN_REGISTERS);
    assert_ne!(only, in_registers);
}

/// Incremental links by Microsoft's linker pad the data of each object.
#[test]
fn lookup_with_padding_in_table_finds_entry() {
    let (at, resume): (usize, usize);
    // SAFETY: the instructions change two registers. The zeroes are padding of the table.
    unsafe {
        core::arch::asm!(
            ".pushsection .vmmf1, \"dr\"",
            ".long 0",
            ".popsection",
            "lea {at}, [rip + 2f]",
            "lea {resume}, [rip + 3f]",
            "2:",
            "nop",
            "3:",
            fault_entry!("2b", "3b", "3b", "1"),
            at = out(reg) at,
            resume = out(reg) resume,
            options(nomem, nostack, preserves_flags),
        );
    }
    assert_eq!(lookup(at), Some((resume, IN_REGISTERS)));
    assert_eq!(lookup(resume), None);
}

#[test]
fn keep_loaded_of_library_that_is_freed_keeps_it() {
    let name: Vec<u16> = "version.dll\0".encode_utf16().collect();
    for keeps in [false, true] {
        // SAFETY: the name ends with a zero. Loading a library of the system has no other effect.
        let library = unsafe { LoadLibraryW(name.as_ptr()) };
        assert!(!library.is_null());
        if keeps {
            keep_loaded(library.cast()).unwrap();
        }
        // SAFETY: nothing refers to the library.
        assert_ne!(unsafe { FreeLibrary(library) }, 0);
        // SAFETY: the name ends with a zero.
        let found = unsafe { GetModuleHandleW(name.as_ptr()) };
        assert_eq!(!found.is_null(), keeps);
    }
    let outside = keep_loaded(core::ptr::without_provenance(8)).unwrap_err();
    assert!(outside.raw_os_error().is_some());
}
