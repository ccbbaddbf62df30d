//! The registers of an interrupted x86_64 processor.

#![expect(
    clippy::as_conversions,
    reason = "registers are numbered by constants, and are the same bits as addresses"
)]

const RIP: usize = libc::REG_RIP as usize;
const RAX: usize = libc::REG_RAX as usize;
const R8: usize = libc::REG_R8 as usize;
const R9: usize = libc::REG_R9 as usize;
const R10: usize = libc::REG_R10 as usize;
const R11: usize = libc::REG_R11 as usize;

/// The registers, as they were at the faulting instruction and will be when the handler has returned.
pub(super) struct Registers<'a> {
    general: &'a mut [libc::greg_t; 23],
}

impl<'a> Registers<'a> {
    pub(super) fn of(context: &'a mut libc::mcontext_t) -> Self {
        Self {
            general: &mut context.gregs,
        }
    }

    /// The instruction that faulted.
    pub(super) fn program_counter(&self) -> usize {
        self.general[RIP] as usize
    }

    /// The starts and ends of two guest operands, as kernels keep them in registers (`x86_64_bulk.rs`).
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

    /// Goes on at another instruction, with an answer in the register that kernels have it in.
    pub(super) fn go_on(&mut self, at: usize, answer: usize) {
        self.general[RAX] = answer as libc::greg_t;
        self.general[RIP] = at as libc::greg_t;
    }

    /// Interrupted at an instruction, with two guest operands.
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

    /// The register of the answer.
    #[cfg(test)]
    pub(super) fn answer(&self) -> usize {
        self.general[RAX] as usize
    }
}
