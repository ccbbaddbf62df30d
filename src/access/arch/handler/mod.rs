//! The fault handler: a signal handler on Linux, and a vectored exception handler on Windows.
//!
//! ```text
//!     on_signal, on_exception
//!        1. FaultRange::from_…       not raised by an access ──────► the handler before
//!        2. lookup                   not in the fault table ───────► the handler before
//!        3. FaultRange::within       not in the guest operand ─────► the handler before
//!                                    (a fault without an address passes)
//!        4. Registers::resume_at     the routine returns the address of the fault
//! ```

#![expect(
    clippy::as_conversions,
    reason = "addresses and pointers to functions are the same bits"
)]

#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
mod aarch64;
#[cfg(windows)]
mod exceptions;
#[cfg(target_os = "linux")]
mod signals;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod x86_64;
#[cfg(windows)]
mod x86_64_windows;

#[cfg(test)]
mod tests;

use core::mem::size_of;
use core::ptr::with_exposed_provenance;

use crate::access::routine_set::NO_ADDRESS;

#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
use aarch64::Registers;
#[cfg(windows)]
pub(super) use exceptions::install;
#[cfg(windows)]
use exceptions::table;
#[cfg(target_os = "linux")]
pub(super) use signals::install;
#[cfg(target_os = "linux")]
use signals::table;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use x86_64::Registers;
#[cfg(windows)]
use x86_64_windows::Registers;

/// An entry of the fault table ([`fault_table`](super::fault_table)).
///
/// The first three fields are distances from the fields themselves.
#[repr(C)]
struct Entry {
    /// The first instruction.
    start: i32,
    /// The end of the last instruction.
    end: i32,
    /// The instruction to resume at after a fault.
    resume: i32,
    /// The kind of guest operand: one of the constants below.
    operand: i32,
}

/// The guest operand is the only memory operand of the instructions.
const ONLY_OPERAND: i32 = 0;
/// There are two guest operands, whose bounds are in registers ([`Registers::operands`]).
const IN_REGISTERS: i32 = 1;

/// The range of addresses that a signal or an exception reports as inaccessible.
#[cfg_attr(test, derive(Debug, Eq, PartialEq))]
struct FaultRange {
    start: usize,
    /// 1, or the size that the system reports for a memory error, or 0 if there is no address.
    len: usize,
}

impl FaultRange {
    /// The range of a fault for which the system reports no address of data.
    const NO_ADDRESS: Self = Self {
        start: NO_ADDRESS.get(),
        len: 0,
    };

    /// Returns the first inaccessible address in an operand, given as `(start, end)`.
    fn within(&self, (start, end): (usize, usize)) -> Option<usize> {
        let first = self.start.max(start);
        (first < end && first.wrapping_sub(self.start) < self.len).then_some(first)
    }
}

/// Makes an access routine return the address of the fault, if the fault is in its guest operand.
///
/// Returns `false` and changes nothing if it is not. A fault without an address counts as one in
/// the guest operand: the routine returns [`NO_ADDRESS`].
fn recover(registers: &mut Registers<'_>, fault: &FaultRange) -> bool {
    let Some((resume, operand)) = lookup(registers.program_counter()) else {
        return false;
    };
    let first = match operand {
        ONLY_OPERAND => Some(fault.start),
        IN_REGISTERS if fault.len == 0 => Some(fault.start),
        IN_REGISTERS => {
            let [one, other] = registers.operands();
            fault.within(one).or_else(|| fault.within(other))
        }
        _ => None,
    };
    let Some(first) = first else {
        return false;
    };
    // 0 stands for success.
    registers.resume_at(resume, first.max(NO_ADDRESS.get()));
    true
}

/// Adds an entry to the table that matches no instruction, so that the table exists.
///
/// The linker takes only objects that something refers to. Without this entry, a program that
/// installs the handler but links no access routine would have no table.
#[inline(always)]
fn anchor_table() {
    // SAFETY: the block adds read-only data: an entry whose range contains no code. It has no
    // instruction, or one that does nothing (`in_fault_table`).
    unsafe {
        core::arch::asm!(
            in_fault_table!(".long 0, 0, 0, -1\n"),
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// Returns the address to resume at after a fault at `instruction`, and the kind of its operand.
fn lookup(instruction: usize) -> Option<(usize, i32)> {
    anchor_table();
    // A pointer to a static without length permits no access to the section. But the section is
    // memory that Rust did not allocate, and the provenance of such memory counts as exposed.
    let table = table();
    let mut entry = with_exposed_provenance::<Entry>(table.start);
    while entry.addr() < table.end {
        // SAFETY: the section consists of whole entries, each aligned to 4 bytes as `Entry` is:
        // only `fault_entry` and `anchor_table` write to it. On Windows, padding between them has
        // the size of entries (`in_fault_table`). Zeroes are an entry for code in itself, where no
        // instruction is. `entry` is one of them, as it is below the end of the section.
        let fields = unsafe { &*entry };
        let resolve = |field: &i32| {
            core::ptr::from_ref(field)
                .addr()
                .wrapping_add_signed(*field as isize)
        };
        if (resolve(&fields.start)..resolve(&fields.end)).contains(&instruction) {
            return Some((resolve(&fields.resume), fields.operand));
        }
        entry = entry.wrapping_byte_add(size_of::<Entry>());
    }
    None
}
