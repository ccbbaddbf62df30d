//! The registers of an interrupted x86_64 processor.

#![expect(
    clippy::as_conversions,
    reason = "registers hold addresses, and their numbers are C constants"
)]

const RIP: usize = libc::REG_RIP as usize;
const RAX: usize = libc::REG_RAX as usize;
const R8: usize = libc::REG_R8 as usize;
const R9: usize = libc::REG_R9 as usize;
const R10: usize = libc::REG_R10 as usize;
const R11: usize = libc::REG_R11 as usize;
const TRAPNO: usize = libc::REG_TRAPNO as usize;

/// The registers at the interrupted instruction, which the system restores after the handler.
pub(super) struct Registers<'a> {
    general: &'a mut [libc::greg_t; 23],
}

impl<'a> Registers<'a> {
    pub(super) fn new(context: &'a mut libc::mcontext_t) -> Self {
        Self {
            general: &mut context.gregs,
        }
    }

    /// Returns the address of the interrupted instruction.
    pub(super) fn program_counter(&self) -> usize {
        self.general[RIP] as usize
    }

    /// Returns whether the last exception of the thread explains a signal without an address.
    ///
    /// Numbers: Intel SDM, volume 3, table 7-1. A stack fault raises SIGBUS, and a general
    /// protection fault SIGSEGV.
    pub(super) fn is_exception_without_address(&self, signal: libc::c_int) -> bool {
        const STACK_FAULT: libc::greg_t = 12;
        const GENERAL_PROTECTION: libc::greg_t = 13;
        let exception = self.general[TRAPNO];
        (signal, exception) == (libc::SIGBUS, STACK_FAULT)
            || (signal, exception) == (libc::SIGSEGV, GENERAL_PROTECTION)
    }

    /// Returns the bounds of the two guest operands, which routines keep in `r8` to `r11`.
    pub(super) fn operands(&self) -> [(usize, usize); 2] {
        let [r8, r9, r10, r11] = [
            self.general[R8],
            self.general[R9],
            self.general[R10],
            self.general[R11],
        ]
        .map(|bits| bits as usize);
        [(r8, r9), (r10, r11)]
    }

    /// Resumes at `instruction` with `result` in the result register of the routines.
    pub(super) fn resume_at(&mut self, instruction: usize, result: usize) {
        self.general[RAX] = result as libc::greg_t;
        self.general[RIP] = instruction as libc::greg_t;
    }

    /// Sets the interrupted instruction and two guest operands.
    #[cfg(test)]
    pub(super) fn interrupt(&mut self, at: usize, operands: [(usize, usize); 2]) {
        let [first, second] = operands;
        for (register, value) in [RIP, R8, R9, R10, R11]
            .into_iter()
            .zip([at, first.0, first.1, second.0, second.1])
        {
            self.general[register] = value as libc::greg_t;
        }
    }

    /// Returns the result register.
    #[cfg(test)]
    pub(super) fn result(&self) -> usize {
        self.general[RAX] as usize
    }
}
