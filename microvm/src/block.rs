//! The block device (virtio 1.2, section 5.2): takes requests from descriptor chains, and moves
//! their data between guest memory and a disk.
//!
//! Everything in a chain comes from the guest and may be hostile. The device checks the whole
//! request before it moves the first byte. Pages that it writes are marked dirty by vm-memory.

use std::io;
use std::sync::Arc;

use serde::Serialize;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::segments::{split, Segments};

/// The number of bytes in a sector.
pub const SECTOR: u64 = 512;
/// The length of a request header: type, reserved word, sector.
const HEADER: usize = 16;
/// The number of refused requests for which the device keeps the reason.
const REASONS_KEPT: usize = 8;

/// The storage of a block device.
pub trait Disk: Send {
    /// Returns the capacity in sectors.
    fn sectors(&self) -> u64;

    /// Performs the transfers of one notification, in any order, and stores the outcome of each.
    fn transfer<M>(&mut self, memory: &Arc<M>, transfers: &mut [&mut Transfer])
    where
        M: GuestMemory + 'static;

    /// Makes completed writes durable.
    ///
    /// # Errors
    ///
    /// Returns an error if the system cannot write them.
    fn flush(&mut self) -> io::Result<()>;
}

/// The data of one request. The device has checked that the range is on the disk and that the
/// buffers are accessible.
#[derive(Debug)]
pub struct Transfer {
    /// Whether the transfer reads the disk and writes guest memory.
    pub is_read: bool,
    /// The position on the disk in bytes.
    pub offset: u64,
    /// The buffers in guest memory.
    pub buffers: Segments,
    /// The outcome. After an error, a part of the data may have been moved.
    pub outcome: Result<(), GuestMemoryError>,
}

/// Counts of requests by kind, and of bytes moved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Completed reads of the disk.
    pub reads: u64,
    /// Completed writes to the disk.
    pub writes: u64,
    /// Completed flushes.
    pub flushes: u64,
    /// Requests that failed.
    pub refused: u64,
    /// Chains for which no status can be written.
    pub malformed: u64,
    /// Bytes from the disk to guest memory.
    pub bytes_read: u64,
    /// Bytes from guest memory to the disk.
    pub bytes_written: u64,
    /// The reasons of the first refused requests.
    pub reasons: Vec<String>,
}

impl Counts {
    /// Returns the number of chains that the device took from the queue.
    pub fn total(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.refused + self.malformed
    }
}

/// A virtio block device.
#[derive(Debug)]
pub struct Block<D> {
    disk: D,
    /// The number of requests so far.
    pub counts: Counts,
}

/// A request that failed: its status byte and the reason.
struct Refusal(u32, String);

impl Refusal {
    fn io(why: impl Into<String>) -> Self {
        Self(VIRTIO_BLK_S_IOERR, why.into())
    }
}

impl<D: Disk> Block<D> {
    /// The feature bits of the device type, which are below bit 32.
    pub const FEATURES: u32 =
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;

    /// Creates a device on `disk`.
    pub fn new(disk: D) -> Self {
        Self {
            disk,
            counts: Counts::default(),
        }
    }

    /// Returns the disk.
    pub fn disk(&mut self) -> &mut D {
        &mut self.disk
    }

    /// Returns the configuration space: `struct virtio_blk_config` up to `blk_size`.
    pub fn config(&self, queue_max: u16) -> [u8; 24] {
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        let seg_max = u32::from(queue_max.saturating_sub(2));
        config[12..16].copy_from_slice(&seg_max.to_le_bytes());
        config[20..].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }

    /// Performs the requests of `chains`. Returns the head of each chain, and the number of bytes
    /// that the device wrote to its buffers.
    pub fn process<M>(
        &mut self,
        memory: &Arc<M>,
        chains: Vec<DescriptorChain<&M>>,
    ) -> Vec<(u16, u32)>
    where
        M: GuestMemory + 'static,
    {
        let (mut pending, mut completed) = (Vec::new(), Vec::new());
        for chain in chains {
            let head = chain.head_index();
            match with_status(&**memory, chain) {
                Some((status, readable, writable)) => {
                    pending.push((head, status, self.start(&**memory, readable, writable)));
                }
                None => {
                    self.counts.malformed += 1;
                    self.note("a chain without a writable status byte".into());
                    completed.push((head, 0));
                }
            }
        }
        let transfers = pending
            .iter_mut()
            .filter_map(|(_, _, outcome)| outcome.as_mut().ok()?.as_mut());
        self.disk
            .transfer(memory, &mut transfers.collect::<Vec<_>>());
        for (head, status, outcome) in pending {
            let outcome = outcome.and_then(|transfer| transfer.map_or(Ok(0), |t| self.count(t)));
            completed.push((head, self.write_status(&**memory, status, outcome)));
        }
        completed
    }

    /// Checks a request. Performs a flush at once; returns the transfer of a read or write.
    fn start<M: GuestMemory>(
        &mut self,
        memory: &M,
        mut readable: Segments,
        writable: Segments,
    ) -> Result<Option<Transfer>, Refusal> {
        let mut header = [0; HEADER];
        let segments = readable
            .take_front(HEADER)
            .ok_or_else(|| Refusal::io("short header"))?;
        let read = segments.read(memory, &mut header);
        read.map_err(|e| Refusal::io(format!("header: {e}")))?;
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let (buffers, access) = match kind {
            VIRTIO_BLK_T_IN => (writable, Permissions::Write),
            VIRTIO_BLK_T_OUT => (readable, Permissions::Read),
            VIRTIO_BLK_T_FLUSH => {
                self.disk
                    .flush()
                    .map_err(|e| Refusal::io(format!("flush: {e}")))?;
                self.counts.flushes += 1;
                return Ok(None);
            }
            _ => {
                let why = format!("unknown request type {kind:#x}");
                return Err(Refusal(VIRTIO_BLK_S_UNSUPP, why));
            }
        };
        let (len, sectors) = (buffers.bytes(), self.disk.sectors());
        let end = sector.checked_add(len / SECTOR);
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > sectors) {
            let why = format!("{len} bytes at sector {sector:#x} are not on the disk");
            return Err(Refusal::io(why));
        }
        buffers.check(memory, access).map_err(Refusal::io)?;
        let (is_read, offset) = (kind == VIRTIO_BLK_T_IN, sector * SECTOR);
        Ok(Some(Transfer {
            is_read,
            offset,
            buffers,
            outcome: Ok(()),
        }))
    }

    /// Counts a transfer. Returns the number of bytes that the device wrote to guest memory.
    fn count(&mut self, transfer: Transfer) -> Result<u64, Refusal> {
        let (len, sector) = (transfer.buffers.bytes(), transfer.offset / SECTOR);
        transfer
            .outcome
            .map_err(|e| Refusal::io(format!("sector {sector}: {e}")))?;
        if transfer.is_read {
            self.counts.reads += 1;
            self.counts.bytes_read += len;
            Ok(len)
        } else {
            self.counts.writes += 1;
            self.counts.bytes_written += len;
            Ok(0)
        }
    }

    /// Writes the status byte. Returns the number of bytes that the device wrote, including it.
    fn write_status(
        &mut self,
        memory: &impl GuestMemory,
        addr: GuestAddress,
        outcome: Result<u64, Refusal>,
    ) -> u32 {
        let (status, written) = match outcome {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal(status, why)) => {
                self.counts.refused += 1;
                self.note(why);
                (status, 0)
            }
        };
        match memory.write_obj(status as u8, addr) {
            // The queue limits a chain to 4 GiB.
            Ok(()) => u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1),
            Err(_) => 0,
        }
    }

    fn note(&mut self, why: String) {
        if self.counts.reasons.len() < REASONS_KEPT {
            self.counts.reasons.push(why);
        }
    }
}

/// Splits a chain into its status byte, the other readable bytes, and the other writable bytes.
fn with_status<M: GuestMemory>(
    memory: &M,
    chain: DescriptorChain<&M>,
) -> Option<(GuestAddress, Segments, Segments)> {
    let (readable, mut writable) = split(chain)?;
    let status = writable.take_last_byte()?;
    let is_memory = GuestMemory::check_range(memory, status, 1, Permissions::Write);
    is_memory.then_some((status, readable, writable))
}
