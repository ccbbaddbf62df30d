//! The expected results of accesses, computed from the model.

use std::io;

use vm_memory::{GuestMemoryError, GuestMemoryResult};

use crate::model::Memory;
use crate::stream::{ModelStream, StreamPlan};

/// The kind of an error, without the region and the path of the access.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    NoMemory(u64),
    LeavesRegion,
    Overflow,
    Partial(usize, usize),
    Io(io::ErrorKind),
    Other(String),
}

pub(super) fn kind(error: GuestMemoryError) -> Kind {
    match error {
        GuestMemoryError::InvalidGuestAddress(at) => Kind::NoMemory(at.0),
        GuestMemoryError::InvalidBackendAddress => Kind::LeavesRegion,
        GuestMemoryError::GuestAddressOverflow => Kind::Overflow,
        GuestMemoryError::PartialBuffer {
            expected,
            completed,
        } => Kind::Partial(expected, completed),
        GuestMemoryError::IOError(error) => Kind::Io(error.kind()),
        other => Kind::Other(format!("{other:?}")),
    }
}

pub(super) fn result<T>(outcome: GuestMemoryResult<T>) -> Result<T, Kind> {
    outcome.map_err(kind)
}

impl Memory {
    /// Returns the expected result of `write` and `read`.
    pub(super) fn moved(&self, addr: u64, count: usize) -> Result<usize, Kind> {
        match self.reachable(addr, count) {
            0 if count != 0 => Err(Kind::NoMemory(addr)),
            moved => Ok(moved),
        }
    }

    /// Returns the expected result of `write_slice` and `read_slice`.
    pub(super) fn moved_all(&self, addr: u64, count: usize) -> Result<(), Kind> {
        match self.moved(addr, count)? {
            moved if moved == count => Ok(()),
            moved => Err(Kind::Partial(count, moved)),
        }
    }

    /// Returns the expected result of `load` and `store`.
    pub(super) fn moved_at_once(&self, addr: u64, width: usize) -> Result<(), Kind> {
        let (number, offset) = self.find(addr).ok_or(Kind::NoMemory(addr))?;
        let fits = self.regions[number].1 - offset >= width as u64;
        // A mapping starts on a page, so the offset in the region decides the alignment.
        if fits && offset % width as u64 == 0 {
            Ok(())
        } else {
            Err(Kind::LeavesRegion)
        }
    }

    /// Returns the number of bytes that one call moves between a range and a stream of the model.
    pub(super) fn one_call(
        &self,
        addr: u64,
        count: usize,
        stream: &mut ModelStream,
    ) -> Result<usize, Kind> {
        let segments = self.segments(addr, count);
        if segments.is_empty() && count != 0 {
            return Err(Kind::NoMemory(addr));
        }
        let mut done = 0;
        for (_, len) in segments {
            match stream.transfer(len) {
                Some(moved) => {
                    done += moved;
                    if moved < len {
                        break;
                    }
                }
                None if done == 0 => return Err(Kind::Io(io::ErrorKind::Other)),
                None => break,
            }
        }
        Ok(done)
    }

    /// Returns the number of bytes that are moved when each segment is retried until it is
    /// complete.
    pub(super) fn whole_segments(
        &self,
        addr: u64,
        count: usize,
        stream: &mut ModelStream,
        nothing: Option<io::ErrorKind>,
    ) -> Result<usize, Kind> {
        let segments = self.segments(addr, count);
        if segments.is_empty() && count != 0 {
            return Err(Kind::NoMemory(addr));
        }
        let mut done = 0;
        for (_, len) in segments {
            let mut left = len;
            while left != 0 {
                let error = match stream.transfer(left) {
                    None => io::ErrorKind::Other,
                    Some(0) => match nothing {
                        Some(error) => error,
                        None => return Ok(done),
                    },
                    Some(moved) => {
                        (done, left) = (done + moved, left - moved);
                        continue;
                    }
                };
                return if done == 0 {
                    Err(Kind::Io(error))
                } else {
                    Ok(done)
                };
            }
        }
        Ok(done)
    }

    /// Returns the expected result of a write into a stream.
    pub(super) fn written(&self, addr: u64, count: usize, plan: StreamPlan) -> Result<usize, Kind> {
        self.whole_segments(
            addr,
            count,
            &mut ModelStream::of(plan),
            Some(io::ErrorKind::WriteZero),
        )
    }
}

/// Returns the expected result of a method that moves all bytes or fails.
pub(super) fn all_of(count: usize, moved: &Result<usize, Kind>) -> Result<(), Kind> {
    match moved {
        Ok(moved) if *moved == count => Ok(()),
        Ok(moved) => Err(Kind::Partial(count, *moved)),
        Err(error) => Err(error.clone()),
    }
}
