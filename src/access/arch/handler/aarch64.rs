//! The registers of an interrupted aarch64 processor.

#![expect(clippy::as_conversions, reason = "registers hold addresses")]

/// The registers at the interrupted instruction, which the system restores after the handler.
pub(super) struct Registers<'a> {
    context: &'a mut libc::mcontext_t,
}

impl<'a> Registers<'a> {
    pub(super) fn new(context: &'a mut libc::mcontext_t) -> Self {
        Self { context }
    }

    /// Returns the address of the interrupted instruction.
    pub(super) fn program_counter(&self) -> usize {
        self.context.pc as usize
    }

    /// Returns `false`: faults of this processor have another code.
    pub(super) fn is_exception_without_address(&self, _signal: libc::c_int) -> bool {
        false
    }

    /// Returns the start and the end of two guest operands, as routines keep them in `x3` to `x6`.
    pub(super) fn operands(&self) -> [(usize, usize); 2] {
        let [_, _, _, x3, x4, x5, x6, ..] = self.context.regs;
        [(x3 as usize, x4 as usize), (x5 as usize, x6 as usize)]
    }

    /// Resumes at `instruction` with `result` in the result register of the routines.
    pub(super) fn resume_at(&mut self, instruction: usize, result: usize) {
        self.context.regs[16] = result as _;
        self.context.pc = instruction as _;
    }

    /// Sets the interrupted instruction and two guest operands.
    #[cfg(test)]
    pub(super) fn interrupt(&mut self, at: usize, operands: [(usize, usize); 2]) {
        let [first, second] = operands;
        self.context.pc = at as _;
        for (register, value) in (3usize..).zip([first.0, first.1, second.0, second.1]) {
            self.context.regs[register] = value as _;
        }
    }

    /// Returns the result register.
    #[cfg(test)]
    pub(super) fn result(&self) -> usize {
        self.context.regs[16] as usize
    }
}
