//! Streams that are short, slow, interrupted or failing, and their model.

use std::io;

use arbitrary::Arbitrary;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// The plan of a stream: its length, the bytes that it moves in one call, and whether it ends with
/// an error.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct StreamPlan {
    /// The bytes that it has, or accepts.
    pub has: u16,
    /// The maximum number of bytes of one call, minus one.
    pub at_a_time: u16,
    /// Whether it fails at its end, or moves nothing.
    pub fails: bool,
    /// Whether every other call is interrupted.
    pub interrupted: bool,
}

/// A stream that follows a plan.
#[derive(Debug)]
pub struct Stream {
    plan: StreamPlan,
    /// The bytes that it has, or has accepted.
    pub data: Vec<u8>,
    done: usize,
    interrupted: bool,
}

impl Stream {
    /// Creates a source of these bytes.
    pub fn source(plan: StreamPlan, data: Vec<u8>) -> Self {
        Stream {
            plan,
            data,
            done: 0,
            interrupted: false,
        }
    }

    /// Creates a sink.
    pub fn target(plan: StreamPlan) -> Self {
        Stream::source(plan, Vec::new())
    }

    /// Returns the number of bytes that this call moves, at most `len`.
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

/// A model of the counts of a stream. It has no interruptions, because those are retried.
#[derive(Debug)]
pub struct ModelStream {
    left: usize,
    at_a_time: usize,
    fails: bool,
}

impl ModelStream {
    /// Creates the model of the plan.
    pub fn of(plan: StreamPlan) -> Self {
        ModelStream {
            left: usize::from(plan.has),
            at_a_time: usize::from(plan.at_a_time) + 1,
            fails: plan.fails,
        }
    }

    /// Returns the number of bytes that are moved, at most `len`, or `None` for an error.
    pub fn transfer(&mut self, len: usize) -> Option<usize> {
        if self.left == 0 && self.fails {
            return None;
        }
        let moved = len.min(self.left).min(self.at_a_time);
        self.left -= moved;
        Some(moved)
    }
}
