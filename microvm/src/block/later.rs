//! Requests that a ring carries out: looked at one by one, handed to the kernel together, and ended in any order.

use std::sync::Arc;

use vm_memory::vectored::IoBuffer;
use vm_memory::{GuestAddress, GuestMemoryError, Permissions};

use super::{Block, Refusal};
use crate::iommu::DeviceMemory;
use crate::plan::SECTOR;
use crate::segments::Segments;
use crate::uring::Operation;

/// A transfer that has been looked at, and not been carried out.
#[derive(Debug)]
pub(super) struct Later {
    /// The head of its chain.
    pub(super) head: u16,
    /// Where its status byte goes.
    pub(super) status_at: GuestAddress,
    /// What is to be moved.
    pub(super) data: Transfer,
}

/// Which bytes go where.
#[derive(Debug)]
pub(super) struct Transfer {
    /// Whether the disk is read.
    pub(super) reads: bool,
    /// The first sector.
    pub(super) sector: u64,
    /// Where the bytes begin on the disk.
    pub(super) offset: u64,
    /// How many.
    pub(super) len: u64,
    /// The buffers.
    pub(super) data: Segments,
}

impl Block {
    /// Carries out what [`process`](Self::process) has left, all of it at once, and calls `used` for each request as it ends: with its head, and how many
    /// bytes the device wrote.
    ///
    /// # Errors
    ///
    /// What `used` answers; the requests that end later are carried out all the same.
    pub fn finish<M, E>(
        &mut self,
        mem: &Arc<M>,
        mut used: impl FnMut(&mut Self, u16, u32) -> Result<(), E>,
    ) -> Result<(), E>
    where
        M: DeviceMemory + 'static,
    {
        let later = std::mem::take(&mut self.later);
        let Some(mut ring) = self.ring.take() else {
            // Nothing is left to a ring that is not there.
            return Ok(());
        };
        let (mut operations, mut under_way) = (Vec::new(), Vec::with_capacity(later.len()));
        let mut outcome = Ok(());
        for (request, later) in later.into_iter().enumerate() {
            let (more, error) = match self.operations(mem, request, &later.data) {
                Ok(more) => (more, None),
                Err(error) => (Vec::new(), Some(error)),
            };
            if more.is_empty() {
                outcome = outcome.and(self.end(mem, later, error, &mut used));
                under_way.push(None);
            } else {
                under_way.push(Some((later, more.len(), None)));
                operations.extend(more);
            }
        }
        let ran = ring.run(operations, |request, moved| {
            let Some(place) = under_way.get_mut(request) else {
                return;
            };
            if let Some((_, left, error)) = place {
                *left -= 1;
                *error = error.take().or(moved.err().map(GuestMemoryError::IOError));
                if *left > 0 {
                    return;
                }
            }
            if let Some((later, _, error)) = place.take() {
                let ended = self.end(mem, later, error, &mut used);
                outcome = std::mem::replace(&mut outcome, Ok(())).and(ended);
            }
        });
        match ran {
            Ok(()) => self.ring = Some(ring),
            Err(why) => {
                // Without a ring from now on.
                self.note(format!("io_uring does not work: {why}"));
                for (later, ..) in under_way.into_iter().flatten() {
                    let why = GuestMemoryError::IOError(std::io::Error::other(why.to_string()));
                    outcome = outcome.and(self.end(mem, later, Some(why), &mut used));
                }
            }
        }
        outcome
    }

    /// What the ring has to do for a transfer: an operation for each file that has some of its bytes.
    fn operations<M: DeviceMemory>(
        &mut self,
        mem: &Arc<M>,
        request: usize,
        transfer: &Transfer,
    ) -> Result<Vec<Operation<M>>, GuestMemoryError> {
        let reads = transfer.reads;
        let access = if reads {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let mut buffer = IoBuffer::new(Arc::clone(mem), access);
        for &(addr, len) in &transfer.data.parts {
            buffer.push(addr, len)?;
        }
        let (mut operations, mut offset) = (Vec::new(), transfer.offset);
        while !buffer.is_empty() {
            let (file, run) = self.disk.place(offset, buffer.len(), reads);
            let rest = buffer.split_off(run);
            operations.push(Operation {
                request,
                buffer,
                file,
                offset,
                reads,
            });
            offset += run as u64;
            match rest {
                Some(rest) => buffer = rest,
                None => break,
            }
        }
        Ok(operations)
    }

    /// Ends a request whose bytes were moved by the ring, or were not.
    fn end<M: DeviceMemory, E>(
        &mut self,
        mem: &Arc<M>,
        later: Later,
        error: Option<GuestMemoryError>,
        used: &mut impl FnMut(&mut Self, u16, u32) -> Result<(), E>,
    ) -> Result<(), E> {
        let Later {
            head,
            status_at,
            data,
        } = later;
        let outcome = match error {
            None => Ok(self.moved(&**mem, &data)),
            Some(error) => Err(self.failed(&**mem, &data, &error)),
        };
        let written = self.answer(&**mem, status_at, outcome);
        used(self, head, written)
    }

    /// Notes that all bytes of a transfer were moved.
    fn moved<M: DeviceMemory>(&mut self, mem: &M, transfer: &Transfer) -> u64 {
        let Transfer {
            reads,
            sector,
            len,
            ref data,
            ..
        } = *transfer;
        if reads {
            for &(addr, len) in &data.parts {
                self.wrote(mem, addr.0, len as u64);
            }
        } else {
            self.disk.commit(sector, len / SECTOR);
        }
        self.count(reads, len)
    }

    /// Notes that not all bytes of a transfer were.
    fn failed<M: DeviceMemory>(
        &mut self,
        mem: &M,
        transfer: &Transfer,
        error: &GuestMemoryError,
    ) -> Refusal {
        if transfer.reads {
            for &(addr, len) in &transfer.data.parts {
                for (at, len) in mem.guest_ranges(addr.0, len as u64) {
                    self.maybe_dirtied.add(at, len);
                }
            }
            return Refusal::transfer("reading", transfer.sector, error);
        }
        Refusal::transfer("writing", transfer.sector, error)
    }
}
