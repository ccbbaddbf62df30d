//! Reads and writes of the disk by io_uring: those of one notification go to the kernel together, and come back in any order.
//!
//! Each operation owns its guest memory as an [`IoBuffer`], which keeps the memory map and what was translated through the IOMMU until the kernel is
//! done, and marks what it has written then.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::RawFd;

use io_uring::{opcode, types, IoUring};
use vm_memory::vectored::IoBuffer;
use vm_memory::GuestMemory;

use crate::error::Error;
use crate::virtio_mmio::QUEUE_MAX;

/// Vectors of one operation, at most (`UIO_MAXIOV`, Linux `include/uapi/linux/uio.h`). What is more comes as a short transfer, and goes on.
const MOST_VECTORS: usize = 1024;

/// How a disk's file is read and written (`--disk-io`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DiskIo {
    /// One request after the other, by preadv and pwritev.
    Sync,
    /// By io_uring, all requests of a notification together.
    #[value(name = "io_uring")]
    IoUring,
}

/// What went through the ring, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations, the rest of a short one counted again.
    pub operations: u64,
    /// Of those, the ones that came back.
    pub completed: u64,
    /// Operations that moved less than they were to, and went on.
    pub short: u64,
    /// The most that were under way at a time.
    pub most: u64,
    /// Bytes moved.
    pub bytes: u64,
}

/// A ring.
pub struct Ring {
    ring: IoUring,
    /// What it did so far.
    pub counts: Counts,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

/// One run of bytes between a file and guest memory.
#[derive(Debug)]
pub struct Operation<M: GuestMemory + 'static> {
    /// Whose it is, for the one who asked for it.
    pub request: usize,
    /// Guest memory: of [`Permissions::Write`](vm_memory::Permissions) for a read of the file.
    pub buffer: IoBuffer<M>,
    /// The file, which stays open until the operation is done.
    pub file: RawFd,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// Whether the file is read.
    pub reads: bool,
}

/// What is under way, by its number. What is not taken out before it is dropped stays for ever: the kernel may still be writing to it.
struct Flying<M: GuestMemory + 'static>(ManuallyDrop<Vec<Option<Operation<M>>>>);

impl<M: GuestMemory + 'static> Flying<M> {
    fn put(&mut self, operation: Operation<M>) -> usize {
        match self.0.iter().position(Option::is_none) {
            Some(free) => {
                if let Some(slot) = self.0.get_mut(free) {
                    *slot = Some(operation);
                }
                free
            }
            None => {
                self.0.push(Some(operation));
                self.0.len() - 1
            }
        }
    }

    fn take(&mut self, number: u64) -> Option<Operation<M>> {
        self.0.get_mut(usize::try_from(number).ok()?)?.take()
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut Operation<M>> {
        self.0.get_mut(number)?.as_mut()
    }

    fn count(&self) -> usize {
        self.0.iter().flatten().count()
    }
}

impl Ring {
    /// A ring for the requests of one notification; the reason, in words, where the kernel refuses it to this process.
    ///
    /// # Errors
    ///
    /// [`Error::Uring`] when it is to be had, and something else is in the way.
    pub fn open() -> Result<Result<Self, String>, Error> {
        match IoUring::new(u32::from(QUEUE_MAX)) {
            Ok(ring) => Ok(Ok(Self {
                ring,
                counts: Counts::default(),
            })),
            // Not built in; turned off (kernel.io_uring_disabled), or kept from by a seccomp filter.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOSYS | libc::EPERM | libc::EACCES)
                ) =>
            {
                Ok(Err(format!("the kernel refuses it ({e})")))
            }
            Err(e) => Err(Error::Uring(e)),
        }
    }

    /// Carries out all operations, and calls `done` for each as it ends: with the number of its request, and why not all bytes were moved, if they were
    /// not. Its memory is not in use any more then.
    ///
    /// # Errors
    ///
    /// If the ring does not work. `done` is not called for what is left, and the memory of what is under way is never given back.
    pub fn run<M: GuestMemory + 'static>(
        &mut self,
        operations: Vec<Operation<M>>,
        mut done: impl FnMut(usize, io::Result<()>),
    ) -> io::Result<()> {
        let mut waiting = VecDeque::from(operations);
        let mut flying = Flying(ManuallyDrop::new(Vec::with_capacity(waiting.len())));
        loop {
            // No more than there is room for answers.
            while flying.count() < usize::from(QUEUE_MAX) && !self.ring.submission().is_full() {
                let Some(operation) = waiting.pop_front() else {
                    break;
                };
                let number = flying.put(operation);
                self.push(&mut flying, number)?;
            }
            let count = flying.count();
            if count == 0 {
                // Nothing in it: its own memory may go.
                drop(ManuallyDrop::into_inner(flying.0));
                return Ok(());
            }
            self.counts.most = self.counts.most.max(count as u64);
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(e) => return Err(e),
            }
            let completions: Vec<_> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (number, result) in completions {
                let Some(operation) = flying.take(number) else {
                    return Err(io::Error::other("a completion of no operation"));
                };
                self.counts.completed += 1;
                if let Some(rest) = self.ended(operation, result, &mut done) {
                    waiting.push_back(rest);
                }
            }
        }
    }

    /// Hands an operation that is in `flying` to the kernel, with the next submission.
    fn push<M: GuestMemory + 'static>(
        &mut self,
        flying: &mut Flying<M>,
        number: usize,
    ) -> io::Result<()> {
        let Some(operation) = flying.get_mut(number) else {
            return Err(io::Error::other("an operation of no number"));
        };
        let (file, offset, reads) = (types::Fd(operation.file), operation.offset, operation.reads);
        let vectors = operation.buffer.vectors_on_heap();
        let (start, count) = (
            vectors.as_ptr().cast(),
            vectors.len().min(MOST_VECTORS) as u32,
        );
        let entry = match reads {
            true => opcode::Readv::new(file, start, count)
                .offset(offset)
                .build(),
            false => opcode::Writev::new(file, start, count)
                .offset(offset)
                .build(),
        };
        let entry = entry.user_data(number as u64);
        // SAFETY: 1. The vectors are on the heap, and change no more: nothing is added to or split off the buffer before its completion takes
        //    it out of `flying`. What is never taken out is never dropped (`Flying`).
        // 2. The buffer keeps the memory that they name mapped, and is one of the access that the operation makes (`Operation`).
        // 3. The guest's and the host's accesses race with the kernel's only as bytes that vm-memory moves volatilely.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        self.counts.operations += 1;
        pushed.map_err(io::Error::other)
    }

    /// What follows from a completion: the operation is done, or its rest goes on.
    fn ended<M: GuestMemory + 'static>(
        &mut self,
        operation: Operation<M>,
        result: i32,
        done: &mut impl FnMut(usize, io::Result<()>),
    ) -> Option<Operation<M>> {
        let Operation {
            request,
            mut buffer,
            file,
            offset,
            reads,
        } = operation;
        let len = buffer.len();
        let moved = match usize::try_from(result) {
            Ok(0) if len > 0 => {
                drop(buffer);
                let why = match reads {
                    true => io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before"),
                    false => {
                        io::Error::new(io::ErrorKind::WriteZero, "the file takes no more bytes")
                    }
                };
                done(request, Err(why));
                return None;
            }
            Ok(moved) => moved.min(len),
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => 0,
            Err(_) => {
                if reads {
                    // Nobody knows how much had been written.
                    buffer.complete(len);
                }
                done(request, Err(io::Error::from_raw_os_error(-result)));
                return None;
            }
        };
        // It is as long as `moved` at least.
        let rest = buffer.split_off(moved).filter(|rest| !rest.is_empty());
        if reads {
            buffer.complete(moved);
        } else {
            drop(buffer);
        }
        self.counts.bytes += moved as u64;
        let Some(buffer) = rest else {
            done(request, Ok(()));
            return None;
        };
        self.counts.short += 1;
        Some(Operation {
            request,
            buffer,
            file,
            offset: offset + moved as u64,
            reads,
        })
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
