//! The registers of an interrupted aarch64 processor.

#![expect(
    clippy::as_conversions,
    reason = "registers are the same bits as addresses"
)]

/// The registers, as they were at the faulting instruction and will be when the handler has returned.
pub(super) struct Registers<'a> {
    context: &'a mut libc::mcontext_t,
}

impl<'a> Registers<'a> {
    pub(super) fn of(context: &'a mut libc::mcontext_t) -> Self {
        Self { context }
    }

    /// The instruction that faulted.
    pub(super) fn program_counter(&self) -> usize {
        self.context.pc as usize
    }

    /// The starts and ends of two guest operands, as kernels keep them in `x3` to `x6` (`aarch64_bulk.rs`).
    pub(super) fn operands(&self) -> [(usize, usize); 2] {
        let [_, _, _, x3, x4, x5, x6, ..] = self.context.regs;
        [(x3 as usize, x4 as usize), (x5 as usize, x6 as usize)]
    }

    /// Goes on at another instruction, with an answer in the register that kernels have it in.
    pub(super) fn go_on(&mut self, at: usize, answer: usize) {
        self.context.regs[16] = answer as _;
        self.context.pc = at as _;
    }

    /// Interrupted at an instruction, with two guest operands.
    #[cfg(test)]
    pub(super) fn interrupt(&mut self, at: usize, operands: [(usize, usize); 2]) {
        let [first, second] = operands;
        self.context.pc = at as _;
        for (register, value) in (3usize..).zip([first.0, first.1, second.0, second.1]) {
            self.context.regs[register] = value as _;
        }
    }

    /// The register of the answer.
    #[cfg(test)]
    pub(super) fn answer(&self) -> usize {
        self.context.regs[16] as usize
    }
}
