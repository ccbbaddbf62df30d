//! The fault table: a list of the instructions that access guest memory.
//!
//! ```text
//!     section vm_memory_faults_1, or .vmmf1 on Windows: one entry of four 32-bit numbers for each
//!     range of code
//!
//!     start      the first instruction
//!     end        the end of the last instruction
//!     resume     the instruction to resume at after a fault
//!     operand    the kind of guest operand, 0 or 1
//! ```
//!
//! Each instruction that accesses guest memory is in the range of an entry. The handler looks up
//! the interrupted instruction, puts the faulting address into the result register (`rax`, `x16`)
//! and resumes at the given instruction. At that instruction, the register is 0 if there was no
//! fault. An access that does not fault therefore only clears and tests one register.
//!
//! An entry holds distances from its own fields, so loading the program relocates nothing.
//!
//! On Linux, the section is retained (`R`): linkers do not drop the entries of code that is in the
//! program. COFF has no such flag, and its names of sections have at most 8 bytes. GNU ld drops a
//! section that nothing refers to (`--gc-sections`). So on Windows, an instruction that does
//! nothing refers to each entry.

/// Puts an entry, in the language of the assembler, into the table.
#[cfg(target_os = "linux")]
macro_rules! in_fault_table {
    ($($text:literal),+) => {
        concat!(
            ".pushsection vm_memory_faults_1, \"aR\", @progbits\n",
            ".balign 4\n",
            $($text,)+
            ".popsection"
        )
    };
}

/// Puts an entry, in the language of the assembler, into the table.
///
/// The instruction does nothing. It refers to the entry, so that the linker keeps it. Incremental
/// links by Microsoft's linker pad the data of each object with zeroes. The alignment is the size
/// of an entry, so that whole entries precede each entry.
#[cfg(windows)]
macro_rules! in_fault_table {
    ($($text:literal),+) => {
        concat!(
            ".pushsection .vmmf1, \"dr\"\n",
            ".balign 16\n",
            "9:\n",
            $($text,)+
            ".popsection\n",
            "nop dword ptr [rip + 9b]"
        )
    };
}

/// Other systems have neither a fault handler nor a table.
#[cfg(not(any(target_os = "linux", windows)))]
macro_rules! in_fault_table {
    ($($text:literal),+) => {
        ""
    };
}

/// A table entry for the instructions between the labels `$start` and `$end`.
///
/// `$operand` says which guest operand the fault must be in:
///
/// - "0": the only memory operand of the instructions,
/// - "1": one of two, whose start and end are in `r8` to `r11` or `x3` to `x6`.
macro_rules! fault_entry {
    ($start:literal, $end:literal, $resume:literal, $operand:literal) => {
        in_fault_table!(
            ".long ", $start, " - .\n", ".long ", $end, " - .\n", ".long ", $resume, " - .\n",
            ".long ", $operand, "\n"
        )
    };
}

/// Assembles instructions that access one guest operand.
///
/// Evaluates to the value of `$register`: 0, or the faulting address if the instructions did not
/// complete. The handler puts the address there, and resumes after the instructions.
macro_rules! guest_asm {
    (
        $register:tt, options $options:tt, [$($instruction:expr),+], $($operands:tt)+
    ) => {{
        let fault: usize;
        core::arch::asm!(
            "2:",
            $($instruction,)+
            "3:",
            fault_entry!("2b", "3b", "3b", "0"),
            $($operands)+,
            inout($register) 0usize => fault,
            options $options,
        );
        fault
    }};
}
