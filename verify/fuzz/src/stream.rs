//! Streams that are short, slow, interrupted or failing, and their model.

use std::io;

use arbitrary::Arbitrary;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// A stream: how much it has, how much it moves at a time, and whether it fails after that or ends.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct StreamPlan {
    /// How many bytes it has, or takes.
    pub has: u16,
    /// One less than it moves at most in one call.
    pub at_a_time: u16,
    /// Whether it then fails, or moves nothing.
    pub fails: bool,
    /// Whether every other call is interrupted.
    pub interrupted: bool,
}

/// A stream as the plan has it.
#[derive(Debug)]
pub struct Stream {
    plan: StreamPlan,
    /// What it has, or has taken.
    pub data: Vec<u8>,
    done: usize,
    interrupted: bool,
}

impl Stream {
    /// A source of these bytes.
    pub fn source(plan: StreamPlan, data: Vec<u8>) -> Self {
        Stream {
            plan,
            data,
            done: 0,
            interrupted: false,
        }
    }

    /// A target.
    pub fn target(plan: StreamPlan) -> Self {
        Stream::source(plan, Vec::new())
    }

    /// How much of `len` bytes is moved now.
    fn next(&mut self, len: usize) -> Result<usize, VolatileMemoryError> {
        if self.plan.interrupted && !self.interrupted {
            self.interrupted = true;
            return Err(VolatileMemoryError::IOError(
                io::ErrorKind::Interrupted.into(),
            ));
        }
        self.interrupted = false;
        let left = usize::from(self.plan.has) - self.done;
        if left == 0 && len != 0 && self.plan.fails {
            return Err(VolatileMemoryError::IOError(io::ErrorKind::Other.into()));
        }
        Ok(len.min(left).min(usize::from(self.plan.at_a_time) + 1))
    }
}

impl ReadVolatile for Stream {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let len = self.next(buf.len())?;
        let moved = buf.write(&self.data[self.done..self.done + len], 0)?;
        assert_eq!(moved, len);
        self.done += len;
        Ok(len)
    }
}

impl WriteVolatile for Stream {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let len = self.next(buf.len())?;
        let mut bytes = vec![0; len];
        buf.read_slice(&mut bytes, 0)?;
        self.data.extend_from_slice(&bytes);
        self.done += len;
        Ok(len)
    }
}

/// The same stream, as far as counts go. Interruptions are not seen: they are tried again.
#[derive(Debug)]
pub struct ModelStream {
    left: usize,
    at_a_time: usize,
    fails: bool,
}

impl ModelStream {
    /// The same plan, for the model.
    pub fn of(plan: StreamPlan) -> Self {
        ModelStream {
            left: usize::from(plan.has),
            at_a_time: usize::from(plan.at_a_time) + 1,
            fails: plan.fails,
        }
    }

    /// How much of `len` bytes is moved; `None` is an error.
    pub fn transfer(&mut self, len: usize) -> Option<usize> {
        if self.left == 0 && self.fails {
            return None;
        }
        let moved = len.min(self.left).min(self.at_a_time);
        self.left -= moved;
        Some(moved)
    }
}
