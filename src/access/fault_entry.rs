//! The table of the instructions that touch guest memory, as assembly writes it.
//!
//! Each of them lies in a range that is listed in the section `vm_memory_faults_1` of the program: where it begins and ends, where to go on after a
//! fault, and how to tell that the fault was the guest operand's. The handler (`fault/linux.rs`) looks there, puts the faulting address into the
//! register of the answer (`rax`, `x16`), and goes on at that place; the register is otherwise 0 there. An access that does not fault pays for clearing
//! and testing one register.
//!
//! The section is marked to be retained (`R`), so that no linker drops entries of code that is in the program; entries hold distances, not
//! addresses, so that nothing is relocated when the program is loaded.

/// An entry for the instructions between two labels; after a fault, go on at a third. The last number tells the guest operand: 0, the only memory
/// operand they have; 1, registers hold the start and the end of one, and two more those of another (or nothing): `r8` to `r11`, `x3` to `x6`.
#[cfg(target_os = "linux")]
macro_rules! fault_entry {
    ($start:literal, $end:literal, $resume:literal, $operand:literal) => {
        concat!(
            ".pushsection vm_memory_faults_1, \"aR\", @progbits\n",
            ".balign 4\n",
            ".long ",
            $start,
            " - .\n",
            ".long ",
            $end,
            " - .\n",
            ".long ",
            $resume,
            " - .\n",
            ".long ",
            $operand,
            "\n",
            ".popsection"
        )
    };
}

/// Where there is no handler there is no table.
#[cfg(not(target_os = "linux"))]
macro_rules! fault_entry {
    ($($part:literal),*) => {
        ""
    };
}
