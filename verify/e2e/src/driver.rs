//! The driver: performs a [`Plan`] and checks everything that it reads.
//!
//! It repeats the steps of microvm's built-in guest in a second implementation. It also has several
//! requests in flight, uses buffers behind an IOMMU, and plugs memory.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use microvm::block::SECTOR;
use microvm::memory::{GuestRam, PAGE};
use microvm::virtio_mmio::{MAGIC, VERSION, VIRTIO_MMIO};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, Permissions,
};

use crate::mapper::Mapper;
use crate::plan::{
    mix, Op, Pass, Plan, AVAILABLE_RING, CHUNK_SECTORS, DESCRIPTORS, HALF, HOLE, PLUG_WORD,
    QUEUE_SIZE, REQUESTS, SLOTS, USED_RING,
};
use crate::plug::{self, command, status, PLUG_MMIO};
use crate::processor::Cpu;
use crate::Error;

/// The time within which the device must complete a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// A request type that the device does not know.
const UNKNOWN_TYPE: u32 = 0x77;

/// The counts of a driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of the pattern that were checked, twice each.
    pub pages: u64,
    /// Requests that ended as expected, including refused ones.
    pub requests: u64,
    /// Requests of the storm that failed.
    pub failed: u64,
    /// Pages of plugged memory that were checked.
    pub plugged_pages: u64,
}

/// A driver of the block device.
pub struct Driver<C> {
    cpu: C,
    /// The mapping for rings and buffers.
    view: GuestMemoryAtomic<GuestRam>,
    plan: Plan,
    /// The sectors that the first pass reads, before the run.
    disk: Vec<u8>,
    /// The IOMMU, if there is one.
    pub mapper: Option<Mapper>,
    /// The device's address of the request headers.
    headers: u64,
    /// The index of the available ring: the number of requests so far.
    available: u16,
    /// The counts so far.
    pub counts: Counts,
}

/// The device's addresses of a request's buffers. `None` for a request without data.
type Data = Option<[u64; 2]>;

impl<C: Cpu> Driver<C> {
    /// Creates a driver. `disk` contains the sectors that the first pass reads.
    pub fn new(
        cpu: C,
        view: GuestMemoryAtomic<GuestRam>,
        plan: Plan,
        disk: Vec<u8>,
        mapper: Option<Mapper>,
    ) -> Self {
        let counts = Counts::default();
        Self {
            cpu,
            view,
            plan,
            disk,
            mapper,
            headers: 0,
            available: 0,
            counts,
        }
    }

    /// Performs the plan.
    ///
    /// # Errors
    ///
    /// Returns an error for the first wrong value, or if the device does not complete a request.
    pub fn run(&mut self) -> Result<(), Error> {
        self.fill_pattern()?;
        self.check_pattern()?;
        self.set_up()?;
        for pass in self.plan.passes() {
            self.pass(pass)?;
        }
        self.request(VIRTIO_BLK_T_FLUSH, 0, None, VIRTIO_BLK_S_OK)?;
        self.bad_requests()?;
        if self.plan.plug.is_some() {
            self.plug()?;
        }
        // The device did not write over the pattern.
        self.check_pattern()
    }

    fn fill_pattern(&mut self) -> Result<(), Error> {
        let addrs = self.plan.pattern_pages().flat_map(Plan::words_of);
        let words: Vec<_> = addrs.map(|addr| (addr, mix(addr))).collect();
        self.cpu.store(&words)
    }

    fn check_pattern(&mut self) -> Result<(), Error> {
        let addrs: Vec<_> = self.plan.pattern_pages().flat_map(Plan::words_of).collect();
        self.check_words(&addrs)?;
        self.counts.pages += self.plan.pattern_pages().count() as u64;
        Ok(())
    }

    fn check_words(&mut self, addrs: &[u64]) -> Result<(), Error> {
        let mut words: Vec<_> = addrs.iter().map(|addr| (*addr, 0)).collect();
        self.cpu.load(&mut words)?;
        let mut words = words.into_iter();
        words.try_for_each(|(addr, word)| expect("word of the pattern", addr, word, mix(addr)))
    }

    /// Initialises the device (virtio 1.2, section 3.1.1).
    fn set_up(&mut self) -> Result<(), Error> {
        self.expect_register(reg::VIRTIO_MMIO_MAGIC_VALUE, MAGIC)?;
        self.expect_register(reg::VIRTIO_MMIO_VERSION, VERSION)?;
        self.expect_register(reg::VIRTIO_MMIO_DEVICE_ID, 2)?;
        for status in [0, 1, 3] {
            self.set_register(reg::VIRTIO_MMIO_STATUS, status)?;
        }
        // VERSION_1 is bit 32, FLUSH is bit 9.
        for (half, wanted) in [(1, 1), (0, 1 << 9)] {
            self.set_register(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half)?;
            let offered = self.register(reg::VIRTIO_MMIO_DEVICE_FEATURES)?;
            expect("feature", half.into(), offered & wanted, wanted)?;
            self.set_register(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half)?;
            self.set_register(reg::VIRTIO_MMIO_DRIVER_FEATURES, wanted)?;
        }
        self.set_register(reg::VIRTIO_MMIO_STATUS, 0xb)?;
        self.expect_register(reg::VIRTIO_MMIO_STATUS, 0xb)?;
        self.set_register(reg::VIRTIO_MMIO_QUEUE_SEL, 0)?;
        self.set_register(reg::VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE as u32)?;
        for (reg, addr, len) in [
            (
                reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
                DESCRIPTORS,
                16 * QUEUE_SIZE,
            ),
            (
                reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                AVAILABLE_RING,
                6 + 2 * QUEUE_SIZE,
            ),
            (
                reg::VIRTIO_MMIO_QUEUE_USED_LOW,
                USED_RING,
                6 + 8 * QUEUE_SIZE,
            ),
        ] {
            let addr = self.map_permanently(addr, len);
            self.set_register(reg, addr as u32)?;
            self.set_register(reg + 4, (addr >> 32) as u32)?;
        }
        self.headers = self.map_permanently(REQUESTS, 32 * SLOTS);
        self.set_register(reg::VIRTIO_MMIO_QUEUE_READY, 1)?;
        self.set_register(reg::VIRTIO_MMIO_STATUS, 0xf)?;
        self.expect_register(reg::VIRTIO_MMIO_STATUS, 0xf)?;
        self.expect_register(reg::VIRTIO_MMIO_CONFIG, self.plan.capacity as u32)?;
        self.expect_register(
            reg::VIRTIO_MMIO_CONFIG + 4,
            (self.plan.capacity >> 32) as u32,
        )
    }

    /// Performs a pass, with up to [`SLOTS`] requests in flight.
    fn pass(&mut self, pass: Pass) -> Result<(), Error> {
        let buffers = |chunk: u64| pass.buffers.map(|half| half.of(chunk));
        let sector = |chunk: u64| pass.sector + chunk * CHUNK_SECTORS;
        let mut chunk = 0;
        while chunk < pass.chunks {
            let batch = chunk..pass.chunks.min(chunk + SLOTS);
            for (slot, chunk) in batch.clone().enumerate() {
                self.apply(pass.before, buffers(chunk), sector(chunk), chunk)?;
                self.enqueue(slot as u16, pass.kind, sector(chunk), Some(buffers(chunk)))?;
            }
            let len = if pass.kind == VIRTIO_BLK_T_IN {
                2 * HALF as u32 + 1
            } else {
                1
            };
            let count = (batch.end - batch.start) as u16;
            self.notify(count, VIRTIO_BLK_S_OK, len, pass.may_fail)?;
            for chunk in batch.clone() {
                self.apply(pass.after, buffers(chunk), sector(chunk), chunk)?;
            }
            chunk = batch.end;
        }
        Ok(())
    }

    /// Applies `op` to both halves of a chunk.
    fn apply(&mut self, op: Op, halves: [u64; 2], sector: u64, chunk: u64) -> Result<(), Error> {
        let first_word = sector * (SECTOR / 8);
        for (nth, buffer) in halves.into_iter().enumerate() {
            for n in 0..HALF / 8 {
                let place = first_word + nth as u64 * HALF / 8 + n;
                let addr = buffer + 8 * n;
                match op {
                    Op::None => return Ok(()),
                    Op::Fill => self.write(addr, mix(place))?,
                    Op::Wipe => self.write(addr, 0_u64)?,
                    Op::Compare => expect("word on disk", place, self.read(addr)?, mix(place))?,
                    Op::CompareWithDisk => {
                        let bytes = self.disk[(place * 8) as usize..][..8].try_into();
                        let word = bytes.map(u64::from_le_bytes).map_err(Error::other)?;
                        expect("word on disk", place, self.read(addr)?, word)?;
                    }
                }
            }
        }
        if op == Op::CompareWithDisk && chunk >= self.plan.stamp_from {
            self.write(halves[0], mix(halves[0]))?;
        }
        Ok(())
    }

    /// Sends requests that the device must refuse.
    fn bad_requests(&mut self) -> Result<(), Error> {
        let [low, high] = self.plan.passes()[1].buffers.map(|half| half.start);
        let (read, past_end) = (VIRTIO_BLK_T_IN, self.plan.capacity);
        self.request(read, past_end, Some([low, high]), VIRTIO_BLK_S_IOERR)?;
        self.request(UNKNOWN_TYPE, 0, Some([low, high]), VIRTIO_BLK_S_UNSUPP)?;
        self.request(read, 0, Some([low, HOLE]), VIRTIO_BLK_S_IOERR)
    }

    /// Plugs memory, uses it, and unplugs it in two steps.
    fn plug(&mut self) -> Result<(), Error> {
        expect(
            "plug magic",
            PLUG_MMIO,
            self.plug_register(plug::reg::MAGIC)?,
            plug::MAGIC,
        )?;
        self.plug_command(plug::reg::COMMAND, command::ADD, status::PRESENT)?;
        let low = u64::from(self.plug_register(plug::reg::ADDRESS)?);
        let high = u64::from(self.plug_register(plug::reg::ADDRESS + 4)?);
        let place = plug::Place {
            start: low | high << 32,
        };
        let block = self.plug_register(plug::reg::BLOCK_SIZE)?;
        let (first, kept) = (place.first(), place.kept());

        self.plug_command(plug::reg::BLOCKS, first as u32 / block, status::PRESENT)?;
        let words: Vec<_> = plugged_words(place.start, first)
            .map(|at| (at, mix(at)))
            .collect();
        self.cpu.store(&words)?;
        self.pass(self.plan.plug_pass(place))?;
        self.refused(place.start + first)?;
        self.check_plugged(place.start, first)?;

        // Half of the blocks are unplugged. The others keep their bytes.
        self.plug_command(plug::reg::BLOCKS, kept as u32 / block, status::PRESENT)?;
        self.refused(place.start + kept)?;
        self.check_plugged(place.start, kept)?;

        self.plug_command(plug::reg::COMMAND, command::REMOVE, status::NONE)?;
        self.refused(place.start)
    }

    /// Sends a read into memory that is not plugged.
    fn refused(&mut self, addr: u64) -> Result<(), Error> {
        self.request(VIRTIO_BLK_T_IN, 0, Some([addr, addr]), VIRTIO_BLK_S_IOERR)
    }

    fn check_plugged(&mut self, start: u64, len: u64) -> Result<(), Error> {
        let addrs: Vec<_> = plugged_words(start, len).collect();
        self.check_words(&addrs)?;
        self.counts.plugged_pages += addrs.len() as u64;
        Ok(())
    }

    fn plug_register(&mut self, reg: u32) -> Result<u32, Error> {
        self.cpu.read_register(PLUG_MMIO + u64::from(reg))
    }

    fn plug_command(&mut self, reg: u32, value: u32, status: u32) -> Result<(), Error> {
        self.cpu.write_register(PLUG_MMIO + u64::from(reg), value)?;
        expect(
            "plug status after",
            value.into(),
            self.plug_register(plug::reg::STATUS)?,
            status,
        )
    }

    /// Sends one request, which must end with `status`.
    fn request(&mut self, kind: u32, sector: u64, data: Data, status: u32) -> Result<(), Error> {
        self.enqueue(0, kind, sector, data)?;
        self.notify(1, status, 1, false)
    }

    /// Makes a request available in slot `slot`.
    fn enqueue(&mut self, slot: u16, kind: u32, sector: u64, data: Data) -> Result<(), Error> {
        let offset = 32 * u64::from(slot);
        self.write(REQUESTS + offset, u64::from(kind))?;
        self.write(REQUESTS + offset + 8, sector)?;
        self.write(REQUESTS + offset + 16, u8::MAX)?;
        let first = 4 * slot;
        let header = self.headers + offset;
        let next = if data.is_some() { first + 1 } else { first + 3 };
        self.descriptor(first, header, 16, VRING_DESC_F_NEXT, next)?;
        for (n, addr) in (1..).zip(data.into_iter().flatten()) {
            let (flags, access) = match kind {
                VIRTIO_BLK_T_OUT => (VRING_DESC_F_NEXT, Permissions::Read),
                VIRTIO_BLK_T_IN => (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, Permissions::Write),
                _ => (VRING_DESC_F_NEXT, Permissions::Read),
            };
            let addr = match &mut self.mapper {
                Some(mapper) if addr != HOLE => mapper.map_for_request(addr, HALF, access),
                _ => addr,
            };
            self.descriptor(first + n, addr, HALF, flags, first + n + 1)?;
        }
        self.descriptor(first + 3, header + 16, 1, VRING_DESC_F_WRITE, 0)?;
        let entry = u64::from(self.available % QUEUE_SIZE as u16);
        self.write(AVAILABLE_RING + 4 + 2 * entry, first.to_le())?;
        self.available = self.available.wrapping_add(1);
        Ok(())
    }

    fn descriptor(&self, n: u16, addr: u64, len: u64, flags: u32, next: u16) -> Result<(), Error> {
        let descriptor = DESCRIPTORS + 16 * u64::from(n);
        self.write(descriptor, addr)?;
        self.write(
            descriptor + 8,
            len | u64::from(flags) << 32 | u64::from(next) << 48,
        )
    }

    /// Notifies the device of the last `count` requests, and waits until all are used.
    fn notify(&mut self, count: u16, status: u32, len: u32, may_fail: bool) -> Result<(), Error> {
        let (view, index) = (self.view.clone(), GuestAddress(AVAILABLE_RING + 2));
        let stored = view
            .memory()
            .store(self.available.to_le(), index, Ordering::Release);
        stored.map_err(Error::other)?;
        self.set_register(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0)?;
        let start = Instant::now();
        loop {
            let used = view
                .memory()
                .load::<u16>(GuestAddress(USED_RING + 2), Ordering::Acquire);
            if u16::from_le(used.map_err(Error::other)?) == self.available {
                break;
            }
            if start.elapsed() > REQUEST_TIMEOUT {
                return Err(Error::other("the device did not complete the requests"));
            }
            if let Some(mapper) = &mut self.mapper {
                mapper.remap_in_flight();
            }
            thread::yield_now();
        }
        if let Some(mapper) = &mut self.mapper {
            mapper.unmap_completed();
        }
        self.expect_register(reg::VIRTIO_MMIO_INTERRUPT_STATUS, 1)?;
        self.set_register(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1)?;
        self.check_used(count, status, len, may_fail)
    }

    /// Checks the used elements and the status bytes of the last `count` requests.
    fn check_used(
        &mut self,
        count: u16,
        status: u32,
        len: u32,
        may_fail: bool,
    ) -> Result<(), Error> {
        let first = self.available.wrapping_sub(count);
        for slot in 0..count {
            let entry = u64::from(first.wrapping_add(slot) % QUEUE_SIZE as u16);
            let element: u64 = self.read(USED_RING + 4 + 8 * entry)?;
            let got: u8 = self.read(REQUESTS + 32 * u64::from(slot) + 16)?;
            let failed = u32::from(got) == VIRTIO_BLK_S_IOERR;
            // After a failure, the device has written nothing but the status byte.
            let len = u64::from(if failed { 1 } else { len });
            expect(
                "used element",
                entry,
                element,
                u64::from(slot * 4) | len << 32,
            )?;
            if may_fail && failed {
                self.counts.failed += 1;
            } else {
                expect("status of slot", slot.into(), got.into(), status)?;
            }
            self.counts.requests += 1;
        }
        Ok(())
    }

    fn map_permanently(&mut self, addr: u64, len: u64) -> u64 {
        self.mapper
            .as_mut()
            .map_or(addr, |mapper| mapper.map_permanently(addr, len))
    }

    fn read<T: ByteValued>(&self, addr: u64) -> Result<T, Error> {
        self.view
            .memory()
            .read_obj(GuestAddress(addr))
            .map_err(Error::other)
    }

    fn write<T: ByteValued>(&self, addr: u64, value: T) -> Result<(), Error> {
        self.view
            .memory()
            .write_obj(value, GuestAddress(addr))
            .map_err(Error::other)
    }

    fn register(&mut self, reg: u32) -> Result<u32, Error> {
        self.cpu.read_register(VIRTIO_MMIO + u64::from(reg))
    }

    fn set_register(&mut self, reg: u32, value: u32) -> Result<(), Error> {
        self.cpu.write_register(VIRTIO_MMIO + u64::from(reg), value)
    }

    fn expect_register(&mut self, reg: u32, value: u32) -> Result<(), Error> {
        expect("register", reg.into(), self.register(reg)?, value)
    }
}

/// Returns the addresses of the pattern words in plugged memory.
fn plugged_words(start: u64, len: u64) -> impl Iterator<Item = u64> {
    (start + PLUG_WORD..start + len).step_by(PAGE as usize)
}

/// Compares a value with the expected one. The error names it by `what` and `place`.
fn expect<T: Into<u64>>(
    what: &'static str,
    place: u64,
    found: T,
    expected: T,
) -> Result<(), Error> {
    let (found, expected) = (found.into(), expected.into());
    if found == expected {
        Ok(())
    } else {
        Err(Error::Mismatch {
            what,
            place,
            found,
            expected,
        })
    }
}
