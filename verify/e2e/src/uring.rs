//! A disk on io_uring: the transfers of one notification are in flight together.
//!
//! Each operation owns its guest memory as an [`IoBuffer`]. The buffer keeps the memory map and the
//! translations of the IOMMU until the kernel completes the operation. Then it marks the pages that
//! the kernel wrote.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, types, IoUring};
use microvm::block::{Disk, Transfer};
use microvm::disk::Image;
use microvm::virtio_mmio::QUEUE_MAX;
use vm_memory::vectored::IoBuffer;
use vm_memory::{GuestMemory, GuestMemoryError, Permissions};

/// The largest number of vectors of one operation (`UIO_MAXIOV`). A transfer with more continues as
/// a short one.
const MOST_VECTORS: usize = vm_memory::vectored::MAX_VECTORS;

/// The largest number of segments of a transfer: 64 descriptors of 4 MiB, in IOMMU mappings of 4
/// KiB.
const MOST_SEGMENTS: usize = 1 << 16;

/// The number of operations and bytes that went through a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Submitted operations. The rest of a short one counts again.
    pub submitted: u64,
    /// Completed operations.
    pub completed: u64,
    /// Operations that moved less than requested and continued.
    pub short: u64,
    /// The largest number of operations in flight at a time.
    pub most: u64,
    /// Moved bytes.
    pub bytes: u64,
}

/// An io_uring instance.
pub struct Ring {
    ring: IoUring,
    /// The counts so far.
    pub counts: Counts,
}

/// A range of bytes between a file and guest memory.
#[derive(Debug)]
pub struct Operation<M: GuestMemory + 'static> {
    /// The caller's number.
    pub number: usize,
    /// Guest memory, with [`Permissions::Write`] for a read of the file.
    pub buffer: IoBuffer<M>,
    /// The file, which stays open until the operation completes.
    pub file: Arc<File>,
    /// The position in the file in bytes.
    pub offset: u64,
    /// Whether the file is read.
    pub is_read: bool,
}

/// The operations in flight. Those that never complete are leaked: the kernel may still use them.
struct InFlight<M: GuestMemory + 'static>(ManuallyDrop<Vec<Option<Operation<M>>>>);

impl<M: GuestMemory + 'static> InFlight<M> {
    fn insert(&mut self, operation: Operation<M>) -> usize {
        let free = self.0.iter().position(Option::is_none).unwrap_or_else(|| {
            self.0.push(None);
            self.0.len() - 1
        });
        self.0[free] = Some(operation);
        free
    }

    fn count(&self) -> usize {
        self.0.iter().flatten().count()
    }
}

impl Ring {
    /// Creates a ring.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel refuses, for instance because of a seccomp filter.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(QUEUE_MAX.into())?;
        Ok(Self {
            ring,
            counts: Counts::default(),
        })
    }

    /// Performs all operations. Calls `done` with the number and outcome of each one that ends.
    ///
    /// # Errors
    ///
    /// Returns an error if the ring does not work. `done` is not called for the remaining
    /// operations, and the memory of those in flight is leaked.
    pub fn run<M: GuestMemory + 'static>(
        &mut self,
        operations: Vec<Operation<M>>,
        mut done: impl FnMut(usize, io::Result<()>),
    ) -> io::Result<()> {
        let mut waiting = VecDeque::from(operations);
        let mut in_flight = InFlight(ManuallyDrop::new(Vec::new()));
        loop {
            // No more than the completion queue can hold.
            while in_flight.count() < QUEUE_MAX.into() && !self.ring.submission().is_full() {
                let Some(operation) = waiting.pop_front() else {
                    break;
                };
                let slot = in_flight.insert(operation);
                self.submit(&mut in_flight, slot)?;
            }
            if in_flight.count() == 0 {
                drop(ManuallyDrop::into_inner(in_flight.0));
                return Ok(());
            }
            self.counts.most = self.counts.most.max(in_flight.count() as u64);
            match self.ring.submit_and_wait(1) {
                Err(e) if !is_transient(&e) => return Err(e),
                _ => {}
            }
            let completions = self.ring.completion();
            let completions: Vec<_> = completions.map(|c| (c.user_data(), c.result())).collect();
            for (slot, result) in completions {
                let slot = in_flight.0.get_mut(slot as usize).and_then(Option::take);
                let operation = slot.ok_or_else(|| io::Error::other("unknown completion"))?;
                self.counts.completed += 1;
                waiting.extend(self.complete(operation, result, &mut done));
            }
        }
    }

    fn submit<M: GuestMemory + 'static>(
        &mut self,
        in_flight: &mut InFlight<M>,
        slot: usize,
    ) -> io::Result<()> {
        let operation = in_flight.0[slot].as_mut().expect("the slot is in use");
        let file = types::Fd(operation.file.as_raw_fd());
        let vectors = operation.buffer.vectors_on_heap();
        let (start, count) = (vectors.as_ptr(), vectors.len().min(MOST_VECTORS) as u32);
        let (offset, slot) = (operation.offset, slot as u64);
        let entry = if operation.is_read {
            let read = opcode::Readv::new(file, start, count);
            read.offset(offset).build().user_data(slot)
        } else {
            let write = opcode::Writev::new(file, start, count);
            write.offset(offset).build().user_data(slot)
        };
        // SAFETY: 1. The vectors are on the heap and do not change. The buffer is not modified
        // before its completion takes it out of `in_flight`, which never drops it before.
        // 2. The buffer keeps the memory mapped, and was created for the access of this operation.
        // 3. vm-memory makes only volatile accesses to guest memory, so the kernel may race with
        //    it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        self.counts.submitted += 1;
        pushed.map_err(io::Error::other)
    }

    /// Ends an operation, or returns its rest.
    fn complete<M: GuestMemory + 'static>(
        &mut self,
        operation: Operation<M>,
        result: i32,
        done: &mut impl FnMut(usize, io::Result<()>),
    ) -> Option<Operation<M>> {
        let moved = match usize::try_from(result) {
            Ok(0) if operation.is_read => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(moved) => Ok(moved),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        let Operation {
            number, mut buffer, ..
        } = operation;
        let moved = match moved {
            Ok(moved) => moved,
            Err(error) if is_transient(&error) => {
                return Some(Operation {
                    buffer,
                    ..operation
                });
            }
            Err(error) => {
                // The kernel may have written a part of it: dropping the buffer marks it.
                drop(buffer);
                done(number, Err(error));
                return None;
            }
        };
        let rest = buffer.split_off(moved).filter(|rest| !rest.is_empty());
        // Marks the pages that the kernel wrote.
        buffer.complete(moved);
        self.counts.bytes += moved as u64;
        let Some(buffer) = rest else {
            done(number, Ok(()));
            return None;
        };
        self.counts.short += 1;
        Some(Operation {
            buffer,
            offset: operation.offset + moved as u64,
            ..operation
        })
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

/// A disk image whose transfers go through a ring.
pub struct UringDisk {
    /// The image.
    pub image: Image,
    /// The ring.
    pub ring: Ring,
}

impl Disk for UringDisk {
    fn sectors(&self) -> u64 {
        self.image.sectors()
    }

    fn transfer<M>(&mut self, memory: &Arc<M>, transfers: &mut [&mut Transfer])
    where
        M: GuestMemory + 'static,
    {
        let mut operations = Vec::new();
        for (number, transfer) in transfers.iter_mut().enumerate() {
            match buffer(memory, transfer) {
                Ok(buffer) if buffer.is_empty() => {}
                Ok(buffer) => operations.push(Operation {
                    number,
                    buffer,
                    file: Arc::clone(&self.image.file),
                    offset: transfer.offset,
                    is_read: transfer.is_read,
                }),
                Err(e) => transfer.outcome = Err(e),
            }
        }
        let mut unfinished: Vec<_> = operations
            .iter()
            .map(|operation| operation.number)
            .collect();
        let ran = self.ring.run(operations, |number, outcome| {
            unfinished.retain(|other| *other != number);
            transfers[number].outcome = outcome.map_err(GuestMemoryError::IOError);
        });
        for number in unfinished {
            let why = format!("io_uring: {ran:?}");
            transfers[number].outcome = Err(GuestMemoryError::IOError(io::Error::other(why)));
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()
    }
}

fn buffer<M: GuestMemory>(
    memory: &Arc<M>,
    transfer: &Transfer,
) -> Result<IoBuffer<M>, GuestMemoryError> {
    let access = if transfer.is_read {
        Permissions::Write
    } else {
        Permissions::Read
    };
    let mut buffer = IoBuffer::new(memory, access);
    buffer.set_segment_limit(MOST_SEGMENTS);
    buffer.try_extend(transfer.buffers.iter().copied())?;
    Ok(buffer)
}
