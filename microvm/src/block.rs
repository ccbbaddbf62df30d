//! virtio-blk (virtio 1.2, section 5.2): one request from a descriptor chain to its status byte.
//!
//! Everything in a chain comes from the guest and is taken as hostile. A request is checked whole
//! before a byte of it moves, and every page that the device writes is noted beside the bitmap of
//! guest memory, so that the two can be compared at the end.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

mod later;

use std::sync::Arc;

use crate::chaos::{self, Chaos, Moment};
use crate::disk::Disk;
use crate::iommu::DeviceMemory;
use crate::pages::PageMap;
use crate::plan::SECTOR;
use crate::segments::{split, Segments};
use crate::uring::Ring;
use later::{Later, Transfer};

/// What GET_ID answers, padded with zeroes.
const DEVICE_ID: &[u8] = b"microvm disk";
/// Bytes of a request header: type, reserved, sector.
const HEADER: usize = 16;
/// Refusals whose reason is kept for the report.
const REASONS_KEPT: usize = 8;

/// What the device did, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Completed read requests.
    pub reads: u64,
    /// Completed write requests.
    pub writes: u64,
    /// Completed flushes.
    pub flushes: u64,
    /// Completed requests for the identity.
    pub ids: u64,
    /// Requests answered with an error.
    pub refused: u64,
    /// Chains without a place for a status byte.
    pub malformed: u64,
    /// Bytes from the disk to guest memory.
    pub bytes_read: u64,
    /// Bytes from guest memory to the disk.
    pub bytes_written: u64,
    /// Requests of the storm ([`crate::chaos`]), which count nowhere else.
    pub storm: chaos::Counts,
    /// Why the first requests were refused.
    pub reasons: Vec<String>,
}

impl Counts {
    /// All chains that were taken from the queue.
    pub fn total(&self) -> u64 {
        let storm = self.storm.moved + self.storm.failed;
        self.reads + self.writes + self.flushes + self.ids + self.refused + self.malformed + storm
    }
}

/// A virtio block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    /// What cuts files under it.
    chaos: Option<Arc<Chaos>>,
    /// What moves bytes, if not the calling thread.
    ring: Option<Ring>,
    /// Requests of this notification that the ring is to carry out.
    later: Vec<Later>,
    /// What it has done so far.
    pub counts: Counts,
    /// Pages that it wrote for certain.
    pub dirtied: PageMap,
    /// Pages that a transfer which failed half way may have written.
    pub maybe_dirtied: PageMap,
}

/// How far a request is.
enum Carried {
    /// Done; so many bytes of its buffers were written.
    Out(u64),
    /// To be done by the ring.
    Later(Transfer),
}

/// A request that gets another answer than OK.
#[derive(Debug)]
struct Refusal {
    status: u32,
    why: String,
    /// Whether a page was gone.
    fault: bool,
    /// Whether it has been counted.
    counted: bool,
}

impl Refusal {
    fn io(why: impl Into<String>) -> Self {
        Self {
            status: VIRTIO_BLK_S_IOERR,
            why: why.into(),
            fault: false,
            counted: false,
        }
    }

    /// A transfer that ended with `error`.
    fn transfer(what: &str, sector: u64, error: &GuestMemoryError) -> Self {
        let fault = match error {
            GuestMemoryError::IOError(error) => error.raw_os_error() == Some(libc::EFAULT),
            // Some bytes of the part had been moved.
            GuestMemoryError::PartialBuffer { .. } => true,
            _ => false,
        };
        Self {
            fault,
            ..Self::io(format!("{what} sector {sector}: {error}"))
        }
    }
}

impl Block {
    /// A device over `disk`; `no_pages` is an empty set over guest memory.
    pub fn new(disk: Disk, no_pages: PageMap) -> Self {
        let (dirtied, maybe_dirtied) = (no_pages.clone(), no_pages);
        Self {
            disk,
            chaos: None,
            ring: None,
            later: Vec::new(),
            counts: Counts::default(),
            dirtied,
            maybe_dirtied,
        }
    }

    /// The same device, under which files are cut.
    pub fn with_chaos(self, chaos: Arc<Chaos>) -> Self {
        Self {
            chaos: Some(chaos),
            ..self
        }
    }

    /// The same device, which moves bytes by `ring` if there is one.
    pub fn with_ring(self, ring: Option<Ring>) -> Self {
        Self { ring, ..self }
    }

    /// How the calling thread moves bytes, where there is no ring.
    pub fn way(&self) -> &'static str {
        if self.disk.is_mapped() {
            "copied from the mapped image"
        } else {
            "by preadv and pwritev"
        }
    }

    /// What moves its bytes.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// What cuts files under it.
    pub fn chaos(&self) -> Option<&Chaos> {
        self.chaos.as_deref()
    }

    /// Feature bits of the device type.
    pub fn features() -> u64 {
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH
    }

    /// The configuration space: `struct virtio_blk_config` up to `blk_size`.
    pub fn config(&self, queue_max: u16) -> [u8; 24] {
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        let seg_max = u32::from(queue_max.saturating_sub(2));
        config[12..16].copy_from_slice(&seg_max.to_le_bytes());
        config[20..].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }

    /// The disk behind it.
    pub fn disk(&mut self) -> &mut Disk {
        &mut self.disk
    }

    /// Notes that the device wrote `len` bytes at `addr`.
    pub fn wrote(&mut self, mem: &impl DeviceMemory, addr: u64, len: u64) {
        for (at, len) in mem.guest_ranges(addr, len) {
            self.dirtied.add(at, len);
        }
    }

    /// Carries out one request, whose chain has the head `head`, and returns how many bytes of its buffers the device wrote. Nothing if that is left to
    /// [`finish`](Self::finish).
    pub fn process<M>(&mut self, mem: &M, head: u16, chain: DescriptorChain<&M>) -> Option<u32>
    where
        M: DeviceMemory,
    {
        let Some((mut readable, mut writable)) = split(chain) else {
            self.counts.malformed += 1;
            self.note("a chain that loops, leaves the table or mixes directions".to_owned());
            return Some(0);
        };
        // Without a status byte there is no way to answer.
        let status = writable
            .take_back(1)
            .filter(|s| s.accessible(mem, Permissions::Write));
        let Some(status_at) = status.and_then(|s| s.parts.first().map(|p| p.0)) else {
            self.counts.malformed += 1;
            self.note("a chain without a writable status byte".to_owned());
            return Some(0);
        };
        match self.carry_out(mem, &mut readable, writable) {
            Ok(Carried::Later(data)) => {
                self.later.push(Later {
                    head,
                    status_at,
                    data,
                });
                None
            }
            Ok(Carried::Out(written)) => Some(self.answer(mem, status_at, Ok(written))),
            Err(refusal) => Some(self.answer(mem, status_at, Err(refusal))),
        }
    }

    /// Writes the status byte, and returns how many bytes the device wrote, that one among them.
    fn answer<M>(&mut self, mem: &M, status_at: GuestAddress, outcome: Result<u64, Refusal>) -> u32
    where
        M: DeviceMemory,
    {
        let (status, written) = match outcome {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(refusal) => {
                if !refusal.counted {
                    self.counts.refused += 1;
                    self.note(refusal.why);
                }
                (refusal.status, 0)
            }
        };
        if mem.write_obj(status as u8, status_at).is_err() {
            return 0;
        }
        self.wrote(mem, status_at.0, 1);
        // A chain is at most 4 GiB; the queue stops it there.
        u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn note(&mut self, why: String) {
        if self.counts.reasons.len() < REASONS_KEPT {
            self.counts.reasons.push(why);
        }
    }

    fn carry_out<M>(
        &mut self,
        mem: &M,
        readable: &mut Segments,
        writable: Segments,
    ) -> Result<Carried, Refusal>
    where
        M: DeviceMemory,
    {
        let mut header = [0; HEADER];
        let parts = readable
            .take_front(HEADER)
            .ok_or_else(|| Refusal::io("a header cut short"))?;
        parts
            .read(mem, &mut header)
            .map_err(|e| Refusal::io(format!("header: {e}")))?;
        // The type, 32 reserved bits, the sector.
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
                let (reads, data) = match kind {
                    VIRTIO_BLK_T_IN => (true, writable),
                    _ => (false, std::mem::take(readable)),
                };
                match self.chaos.clone() {
                    _ if self.ring.is_some() => {
                        return self.look_at(mem, sector, reads, data).map(Carried::Later)
                    }
                    Some(chaos)
                        if (chaos.storm().sector..self.disk.sectors()).contains(&sector) =>
                    {
                        self.in_the_storm(&chaos, mem, sector, reads, &data)
                    }
                    _ => self.transfer(mem, sector, reads, &data),
                }
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk
                    .flush()
                    .map_err(|e| Refusal::io(format!("flush: {e}")))?;
                self.counts.flushes += 1;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => self.identify(mem, &writable),
            _ => {
                let why = format!("no request has type {kind:#x}");
                Err(Refusal {
                    status: VIRTIO_BLK_S_UNSUPP,
                    ..Refusal::io(why)
                })
            }
        }
        .map(Carried::Out)
    }

    /// Checks all of a transfer that is carried out later.
    fn look_at<M>(
        &self,
        mem: &M,
        sector: u64,
        reads: bool,
        data: Segments,
    ) -> Result<Transfer, Refusal>
    where
        M: DeviceMemory,
    {
        let (offset, len) = self.extent(sector, &data)?;
        let access = if reads {
            Permissions::Write
        } else {
            Permissions::Read
        };
        data.check(mem, access).map_err(Refusal::io)?;
        Ok(Transfer {
            reads,
            sector,
            offset,
            len,
            data,
        })
    }

    /// Moves data, counts it, and returns how many bytes of the buffers were written.
    fn transfer<M>(
        &mut self,
        mem: &M,
        sector: u64,
        reads: bool,
        data: &Segments,
    ) -> Result<u64, Refusal>
    where
        M: DeviceMemory,
    {
        let len = if reads {
            self.read(mem, sector, data)?
        } else {
            self.write(mem, sector, data)?
        };
        Ok(self.count(reads, len))
    }

    /// Counts a transfer, and returns how many bytes of the buffers were written.
    fn count(&mut self, reads: bool, len: u64) -> u64 {
        let (requests, bytes) = match reads {
            true => (&mut self.counts.reads, &mut self.counts.bytes_read),
            false => (&mut self.counts.writes, &mut self.counts.bytes_written),
        };
        *requests += 1;
        *bytes += len;
        if reads {
            len
        } else {
            0
        }
    }

    /// The same while files are cut, and counted apart.
    fn in_the_storm<M>(
        &mut self,
        chaos: &Chaos,
        mem: &M,
        sector: u64,
        reads: bool,
        data: &Segments,
    ) -> Result<u64, Refusal>
    where
        M: DeviceMemory,
    {
        let nth = self.counts.storm.moved + self.counts.storm.failed;
        let moment = chaos
            .before(nth)
            .map_err(|e| Refusal::io(format!("cutting files: {e}")))?;
        let outcome = if reads {
            self.read(mem, sector, data)
        } else {
            self.write(mem, sector, data).map(|_| 0)
        };
        let mut good = outcome
            .as_ref()
            .map_or_else(|refusal| refusal.fault, |_| true);
        if let Moment::Certain { whole, .. } = moment {
            good &= outcome.is_ok() == whole;
            if whole {
                self.counts.storm.certain_whole += 1;
                good &= self.holds_the_same(mem, sector, data);
            } else {
                self.counts.storm.certain_cut += 1;
            }
        }
        self.counts.storm.wrong += u64::from(!good);
        match outcome {
            Ok(written) => {
                self.counts.storm.moved += 1;
                Ok(written)
            }
            Err(refusal) => {
                self.counts.storm.failed += 1;
                if !good {
                    self.note(refusal.why.clone());
                }
                Err(Refusal {
                    counted: true,
                    ..refusal
                })
            }
        }
    }

    /// Whether guest memory has the bytes of the file.
    fn holds_the_same<M: GuestMemory>(&mut self, mem: &M, sector: u64, data: &Segments) -> bool {
        let mut guest = vec![0; usize::try_from(data.len()).unwrap_or(0)];
        let file = self.disk.read_sectors(sector, data.len() / SECTOR);
        data.read(mem, &mut guest).is_ok() && file.is_ok_and(|file| file == guest)
    }

    fn read<M>(&mut self, mem: &M, sector: u64, to: &Segments) -> Result<u64, Refusal>
    where
        M: DeviceMemory,
    {
        let (mut offset, len) = self.extent(sector, to)?;
        to.check(mem, Permissions::Write).map_err(Refusal::io)?;
        for &(addr, len) in &to.parts {
            if let Err(e) = self.disk.read_to_guest(mem, addr, offset, len) {
                for (at, len) in mem.guest_ranges(addr.0, len as u64) {
                    self.maybe_dirtied.add(at, len);
                }
                return Err(Refusal::transfer("reading", sector, &e));
            }
            self.wrote(mem, addr.0, len as u64);
            offset += len as u64;
        }
        Ok(len)
    }

    fn write<M>(&mut self, mem: &M, sector: u64, from: &Segments) -> Result<u64, Refusal>
    where
        M: GuestMemory,
    {
        let (mut offset, len) = self.extent(sector, from)?;
        from.check(mem, Permissions::Read).map_err(Refusal::io)?;
        for &(addr, len) in &from.parts {
            self.disk
                .write_from_guest(mem, addr, offset, len)
                .map_err(|e| Refusal::transfer("writing", sector, &e))?;
            offset += len as u64;
        }
        self.disk.commit(sector, len / SECTOR);
        Ok(len)
    }

    fn identify<M>(&mut self, mem: &M, to: &Segments) -> Result<u64, Refusal>
    where
        M: DeviceMemory,
    {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(DEVICE_ID) {
            *to = *from;
        }
        to.check(mem, Permissions::Write).map_err(Refusal::io)?;
        let mut rest = id.as_slice();
        for &(addr, len) in &to.parts {
            let (now, later) = rest.split_at(len.min(rest.len()));
            mem.write_slice(now, addr)
                .map_err(|e| Refusal::io(format!("identity: {e}")))?;
            self.wrote(mem, addr.0, now.len() as u64);
            rest = later;
        }
        self.counts.ids += 1;
        Ok((id.len() - rest.len()) as u64)
    }

    /// The byte offset and length of a transfer, if all of it lies on the disk.
    fn extent(&self, sector: u64, data: &Segments) -> Result<(u64, u64), Refusal> {
        let len = data.len();
        if !len.is_multiple_of(SECTOR) {
            return Err(Refusal::io(format!("{len} bytes are not whole sectors")));
        }
        let (count, sectors) = (len / SECTOR, self.disk.sectors());
        match sector.checked_add(count) {
            // The disk's length in bytes fits, so this offset does.
            Some(end) if end <= sectors => Ok((sector * SECTOR, len)),
            _ => Err(Refusal::io(format!(
                "{count} sectors from {sector} on pass the end at {sectors}"
            ))),
        }
    }
}
