//! A source and sink whose calls are short, interrupted or failing.

use std::io::ErrorKind;

use super::*;
use crate::io::WriteVolatile;

/// A source or sink of `left` bytes. It moves a few at a time, and may be interrupted before that.
/// Then it returns the error number `end`, or the end of the stream if that is 0.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) left: usize,
    steps: Vec<usize>,
    interrupts: Vec<bool>,
    pub(super) end: i32,
    pub(super) moved: Vec<u8>,
    calls: usize,
    pub(super) reads: usize,
}

impl Stream {
    pub(super) fn new(left: usize, steps: Vec<usize>, interrupts: Vec<bool>, end: i32) -> Self {
        Self {
            left,
            steps,
            interrupts,
            end,
            moved: vec![],
            calls: 0,
            reads: 0,
        }
    }

    /// Returns the number of bytes to move into `room`. Never interrupts twice in a row.
    fn next(&mut self, room: usize) -> std::result::Result<usize, VolatileError> {
        self.calls += 1;
        if self.calls % 2 == 1 && self.interrupts[self.calls / 2 % self.interrupts.len()] {
            return Err(VolatileError::IOError(ErrorKind::Interrupted.into()));
        }
        self.calls += self.calls % 2;
        match (self.left, self.end) {
            (0, 0) => Ok(0),
            (0, number) => Err(VolatileError::IOError(system_error(number))),
            _ => Ok(self.step(room)),
        }
    }

    /// Returns the number of bytes of a read that is not interrupted.
    pub(super) fn step(&mut self, room: usize) -> usize {
        let step = self.steps[self.reads % self.steps.len()];
        self.reads += 1;
        let count = step.min(room).min(self.left);
        self.left -= count;
        count
    }

    /// Returns the next bytes of the stream.
    pub(super) fn bytes(&self, count: usize) -> Vec<u8> {
        let from = self.moved.len();
        (from..from + count).map(|i| i as u8 ^ 0x5a).collect()
    }
}

impl ReadVolatile for Stream {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileError> {
        let count = self.next(buf.len())?;
        let bytes = self.bytes(count);
        buf.copy_from(&bytes);
        self.moved.extend(bytes);
        Ok(count)
    }
}

impl WriteVolatile for Stream {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileError> {
        let mut bytes = vec![0; self.next(buf.len())?];
        buf.copy_to(&mut bytes);
        self.moved.extend(&bytes);
        Ok(bytes.len())
    }
}
