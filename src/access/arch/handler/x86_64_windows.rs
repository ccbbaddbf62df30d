//! The registers of an interrupted x86_64 processor, on Windows.

use windows_sys::Win32::System::Diagnostics::Debug::CONTEXT;

/// The registers at the interrupted instruction, which the system restores after the handler.
pub(super) struct Registers<'a> {
    context: &'a mut CONTEXT,
}

impl<'a> Registers<'a> {
    pub(super) fn new(context: &'a mut CONTEXT) -> Self {
        Self { context }
    }

    /// Returns the address of the interrupted instruction.
    pub(super) fn program_counter(&self) -> usize {
        self.context.Rip as usize
    }

    /// Returns the bounds of the two guest operands, which routines keep in `r8` to `r11`.
    pub(super) fn operands(&self) -> [(usize, usize); 2] {
        let CONTEXT {
            R8, R9, R10, R11, ..
        } = *self.context;
        let [r8, r9, r10, r11] = [R8, R9, R10, R11].map(|bits| bits as usize);
        [(r8, r9), (r10, r11)]
    }

    /// Resumes at `instruction` with `result` in the result register of the routines.
    pub(super) fn resume_at(&mut self, instruction: usize, result: usize) {
        self.context.Rax = result as u64;
        self.context.Rip = instruction as u64;
    }

    /// Sets the interrupted instruction and two guest operands.
    #[cfg(test)]
    pub(super) fn interrupt(&mut self, at: usize, [first, second]: [(usize, usize); 2]) {
        self.context.Rip = at as u64;
        (self.context.R8, self.context.R9) = (first.0 as u64, first.1 as u64);
        (self.context.R10, self.context.R11) = (second.0 as u64, second.1 as u64);
    }

    /// Returns the result register.
    #[cfg(test)]
    pub(super) fn result(&self) -> usize {
        self.context.Rax as usize
    }
}
