//! The guest without a vCPU: the same driver as [`crate::guest_program`], as a thread on the same
//! memory.
//!
//! The thread has a mapping of guest memory of its own, so its writes are logged apart from the
//! device's, as KVM logs a vCPU's. What would be an exit is a message to the thread of the devices;
//! a register write is not waited for, so the driver polls the used ring while the device fills it.

mod plugging;

use std::sync::atomic::Ordering;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryError,
    GuestMemoryLoadGuard, Permissions,
};

use crate::bus::{Bus, DEBUG_EXIT};
use crate::error::Error;
use crate::iommu::{DeviceMemory, Mapper};
use crate::memory::{GuestRam, PAGE};
use crate::plan::{
    mix, op, param, pass, result, step, sum, BAD_REQUESTS, BAD_TYPE, CHUNK_SECTORS, HALF, PARAMS,
    PATTERN_STEP, QUEUE_SIZE, RESULTS, SECTOR, SLOTS,
};
use crate::serial::COM1;
use crate::virtio_mmio::{MAGIC, VERSION};

/// How long the driver waits for the device.
const PATIENCE: Duration = Duration::from_secs(30);
/// Messages under way at most: as many posted writes as a real bus might hold.
const POSTED: usize = 16;

/// What a vCPU would exit for.
enum Access {
    PortOut(u16, u8),
    PortIn(u16),
    MmioWrite(u64, u32),
    MmioRead(u64),
}

/// Runs the driver on `view` and the devices of `bus` until the driver is done. With a mapper, the device is behind an IOMMU, and the mapper is
/// returned.
///
/// # Errors
///
/// [`Error::Thread`] when the driver's thread cannot be started or dies.
pub fn run<M: DeviceMemory + 'static>(
    view: GuestMemoryAtomic<GuestRam>,
    bus: &mut Bus<M>,
    mapper: Option<Mapper>,
) -> Result<Option<Mapper>, Error> {
    let fail = |why: String| Error::Thread {
        what: "run the driver's thread",
        why,
    };
    let (to_device, accesses) = sync_channel(POSTED);
    let (to_driver, answers) = sync_channel(1);
    let driver = thread::Builder::new()
        .name("driver".to_owned())
        .spawn(move || {
            let mut driver = Driver::new(view, to_device, answers, mapper);
            driver.run();
            driver.mapper
        });
    let driver = driver.map_err(|e| fail(e.to_string()))?;
    for access in accesses {
        let answer = match access {
            Access::PortOut(port, byte) => {
                bus.port_out(port, &[byte]);
                continue;
            }
            Access::MmioWrite(addr, value) => {
                bus.mmio_write(addr, &value.to_le_bytes());
                continue;
            }
            Access::PortIn(port) => {
                let mut data = [0; 4];
                bus.port_in(port, &mut data[..1]);
                data
            }
            Access::MmioRead(addr) => {
                let mut data = [0; 4];
                bus.mmio_read(addr, &mut data);
                data
            }
        };
        if to_driver.send(u32::from_le_bytes(answer)).is_err() {
            break;
        }
    }
    driver.join().map_err(|_| fail("it panicked".to_owned()))
}

/// Where and how a driver found something wrong.
struct Failure {
    step: u64,
    place: u64,
    want: u64,
    got: u64,
}

fn check(step: u64, place: u64, want: u64, got: u64) -> Result<(), Failure> {
    if want == got {
        Ok(())
    } else {
        Err(Failure {
            step,
            place,
            want,
            got,
        })
    }
}

/// The addresses of a request's buffers; none for a request without data.
type Buffers = Option<[u64; 2]>;

struct Driver {
    mem: GuestMemoryAtomic<GuestRam>,
    to_device: SyncSender<Access>,
    answers: Receiver<u32>,
    mapper: Option<Mapper>,
    /// Where the device finds headers and status bytes.
    headers: u64,
    params: Vec<u64>,
    /// Requests made available so far: the index of the available ring.
    next: u16,
    sum: u64,
    pages: u64,
    requests: u64,
    /// Of those, the ones that may have failed and did.
    failed: u64,
    /// Pages of plugged memory that were checked.
    plugged: u64,
}

impl Driver {
    fn new(
        mem: GuestMemoryAtomic<GuestRam>,
        to_device: SyncSender<Access>,
        answers: Receiver<u32>,
        mapper: Option<Mapper>,
    ) -> Self {
        Self {
            mem,
            to_device,
            answers,
            mapper,
            headers: 0,
            params: Vec::new(),
            next: 0,
            sum: 0,
            pages: 0,
            requests: 0,
            failed: 0,
            plugged: 0,
        }
    }

    /// Memory as it is now. Regions come and go, so nobody keeps this for long.
    fn mem(&self) -> GuestMemoryLoadGuard<GuestRam> {
        self.mem.memory()
    }

    /// Everything that the guest does; the results are in guest memory afterwards.
    fn run(&mut self) {
        let outcome = self.steps();
        let failure = outcome.err().unwrap_or(Failure {
            step: step::DONE,
            place: 0,
            want: 0,
            got: 0,
        });
        let mut results = [0; result::WORDS];
        results[result::STEP] = failure.step;
        results[result::WHERE] = failure.place;
        results[result::WANT] = failure.want;
        results[result::GOT] = failure.got;
        results[result::PAGES] = self.pages;
        results[result::REQUESTS] = self.requests;
        results[result::FAILED] = self.failed;
        results[result::PLUGGED] = self.plugged;
        for (index, word) in results.into_iter().enumerate() {
            // If this cannot be written, the host finds that nothing was reported.
            let _ = self
                .mem()
                .write_obj(word.to_le(), GuestAddress(RESULTS + 8 * index as u64));
        }
        self.send(Access::PortOut(DEBUG_EXIT, failure.step as u8));
    }

    fn steps(&mut self) -> Result<(), Failure> {
        for index in 0..param::WORDS as u64 {
            let word = self.word(PARAMS + 8 * index)?;
            self.params.push(word);
        }
        self.print("driver thread, two RAM regions\n");
        self.pattern(false)?;
        self.pattern(true)?;
        self.print(&format!(
            "memory {} pages written and read back\n",
            self.pages
        ));
        self.set_up()?;
        self.print(&format!(
            "disk   {} sectors behind virtio-mmio\n",
            self.param(param::CAPACITY)
        ));
        for nth in 0..self.param(param::PASS_COUNT) as usize {
            self.pass(param::PASSES + nth * pass::WORDS, 0)?;
        }
        self.single(VIRTIO_BLK_T_FLUSH, 0, None, VIRTIO_BLK_S_OK)?;
        self.print("flush  done\n");
        self.bad_requests()?;
        self.print(&format!(
            "refuse {BAD_REQUESTS} bad requests came back as errors\n"
        ));
        if self.param(param::PLUG) != 0 {
            self.plug()?;
        }
        self.pattern(true)?;
        self.print("memory still as written\n");
        Ok(())
    }

    /// Writes the pattern to every area, or checks it.
    fn pattern(&mut self, check_it: bool) -> Result<(), Failure> {
        for area in 0..2 {
            let [start, pages, stride] = [0, 1, 2].map(|n| self.param(param::AREAS + 3 * area + n));
            for page in (0..pages).map(|n| start + n * stride) {
                for at in (page..page + PAGE).step_by(PATTERN_STEP as usize) {
                    if check_it {
                        check(step::MEMORY, at, mix(at), self.word(at)?)?;
                    } else {
                        self.set_word(at, mix(at))?;
                    }
                }
                self.pages += u64::from(check_it);
            }
        }
        Ok(())
    }

    /// Section 3.1.1: from reset to DRIVER_OK, with one queue.
    fn set_up(&mut self) -> Result<(), Failure> {
        let expect = |reg: u32, want: u32, got: u32| {
            check(
                step::VIRTIO,
                u64::from(reg),
                u64::from(want),
                u64::from(got),
            )
        };
        for (reg, want) in [
            (reg::VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (reg::VIRTIO_MMIO_VERSION, VERSION),
            (reg::VIRTIO_MMIO_DEVICE_ID, 2),
        ] {
            expect(reg, want, self.register(reg))?;
        }
        for status in [0, 1, 3] {
            self.set_register(reg::VIRTIO_MMIO_STATUS, status);
        }
        // Of bits 32 and up VERSION_1; of those below, FLUSH.
        for (half, wanted) in [(1, 1), (0, 1 << 9)] {
            self.set_register(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.register(reg::VIRTIO_MMIO_DEVICE_FEATURES);
            expect(reg::VIRTIO_MMIO_DEVICE_FEATURES, wanted, offered & wanted)?;
            self.set_register(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set_register(reg::VIRTIO_MMIO_DRIVER_FEATURES, wanted);
        }
        self.set_register(reg::VIRTIO_MMIO_STATUS, 0xb);
        expect(
            reg::VIRTIO_MMIO_STATUS,
            0xb,
            self.register(reg::VIRTIO_MMIO_STATUS),
        )?;
        self.set_register(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        self.set_register(reg::VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE as u32);
        for (reg, index, len) in [
            (
                reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
                param::DESC,
                16 * QUEUE_SIZE,
            ),
            (
                reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                param::AVAIL,
                6 + 2 * QUEUE_SIZE,
            ),
            (
                reg::VIRTIO_MMIO_QUEUE_USED_LOW,
                param::USED,
                6 + 8 * QUEUE_SIZE,
            ),
        ] {
            let address = self.kept(self.param(index), len);
            self.set_register(reg, address as u32);
            self.set_register(reg + 4, (address >> 32) as u32);
        }
        self.headers = self.kept(self.param(param::REQUESTS), 32 * SLOTS);
        self.set_register(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        self.set_register(reg::VIRTIO_MMIO_STATUS, 0xf);
        expect(
            reg::VIRTIO_MMIO_STATUS,
            0xf,
            self.register(reg::VIRTIO_MMIO_STATUS),
        )?;
        for (reg, shift) in [
            (reg::VIRTIO_MMIO_CONFIG, 0),
            (reg::VIRTIO_MMIO_CONFIG + 4, 32),
        ] {
            let want = (self.param(param::CAPACITY) >> shift) as u32;
            expect(reg, want, self.register(reg))?;
        }
        Ok(())
    }

    /// The requests of one pass, [`SLOTS`] at a time, with buffers whose addresses count from `base`.
    fn pass(&mut self, at: usize, base: u64) -> Result<(), Failure> {
        let this = |index: usize| self.params.get(at + index).copied().unwrap_or(0);
        let (kind, sector, chunks) = (
            this(pass::TYPE) as u32,
            this(pass::SECTOR),
            this(pass::CHUNKS),
        );
        let (before, after) = (this(pass::BEFORE), this(pass::AFTER));
        let [low, low_stride] = [this(pass::LOW), this(pass::LOW_STRIDE)];
        let [high, high_stride] = [this(pass::HIGH), this(pass::HIGH_STRIDE)];
        let may_fail = this(pass::MAY_FAIL) != 0;
        let buffers = |chunk: u64| {
            [
                base + low + chunk * low_stride,
                base + high + chunk * high_stride,
            ]
        };
        let sector_of = |chunk: u64| sector + chunk * CHUNK_SECTORS;
        let mut chunk = 0;
        while chunk < chunks {
            let batch = chunk..chunks.min(chunk + SLOTS);
            for (slot, chunk) in batch.clone().enumerate() {
                self.apply(before, buffers(chunk), sector_of(chunk))?;
                self.enqueue(slot as u16, kind, sector_of(chunk), Some(buffers(chunk)))?;
            }
            let len = if kind == VIRTIO_BLK_T_IN {
                2 * HALF as u32 + 1
            } else {
                1
            };
            self.kick(
                (batch.end - batch.start) as u16,
                VIRTIO_BLK_S_OK,
                len,
                may_fail,
            )?;
            for chunk in batch.clone() {
                self.apply(after, buffers(chunk), sector_of(chunk))?;
                if after == op::SUM && chunk >= self.param(param::STAMP_FROM) {
                    let [stamp, _] = buffers(chunk);
                    self.set_word(stamp, mix(stamp))?;
                }
            }
            chunk = batch.end;
        }
        if after == op::SUM {
            check(step::READ, 0, self.param(param::SUM), self.sum)?;
        }
        let sectors = chunks * CHUNK_SECTORS;
        self.print(
            match after {
                _ if may_fail => format!("storm  {sectors} sectors from sector {sector} on\n"),
                op::SUM => format!("read   {sectors} sectors, checksum agrees\n"),
                op::COMPARE => format!("check  {sectors} sectors read back and compared\n"),
                _ => format!("write  {sectors} sectors from sector {sector} on\n"),
            }
            .as_str(),
        );
        Ok(())
    }

    /// Does something to both halves of a chunk.
    fn apply(&mut self, what: u64, halves: [u64; 2], sector: u64) -> Result<(), Failure> {
        if what == op::NONE {
            return Ok(());
        }
        for (half, buffer) in halves.into_iter().enumerate() {
            for n in 0..HALF / 8 {
                let (at, place) = (
                    buffer + 8 * n,
                    sector * (SECTOR / 8) + half as u64 * HALF / 8 + n,
                );
                match what {
                    op::FILL => self.set_word(at, mix(place))?,
                    op::WIPE => self.set_word(at, 0)?,
                    op::COMPARE => check(step::WRITE, place, mix(place), self.word(at)?)?,
                    _ => self.sum = sum(self.sum, self.word(at)?),
                }
            }
        }
        Ok(())
    }

    /// Requests that no device may carry out.
    fn bad_requests(&mut self) -> Result<(), Failure> {
        let good = [
            self.param(param::PASSES + pass::WORDS + pass::LOW),
            self.param(param::PASSES + pass::WORDS + pass::HIGH),
        ];
        let hole = [good[0], self.param(param::HOLE)];
        let capacity = self.param(param::CAPACITY);
        self.single(VIRTIO_BLK_T_IN, capacity, Some(good), VIRTIO_BLK_S_IOERR)?;
        self.single(BAD_TYPE, 0, Some(good), VIRTIO_BLK_S_UNSUPP)?;
        self.single(VIRTIO_BLK_T_IN, 0, Some(hole), VIRTIO_BLK_S_IOERR)
    }

    /// One request alone, which must end with `status`.
    fn single(
        &mut self,
        kind: u32,
        sector: u64,
        data: Buffers,
        status: u32,
    ) -> Result<(), Failure> {
        self.enqueue(0, kind, sector, data)?;
        self.kick(1, status, 1, false)
    }

    /// Writes header and descriptors of slot `slot`, and puts it into the available ring.
    fn enqueue(&mut self, slot: u16, kind: u32, sector: u64, data: Buffers) -> Result<(), Failure> {
        let header = self.param(param::REQUESTS) + 32 * u64::from(slot);
        self.set_word(header, u64::from(kind))?;
        self.set_word(header + 8, sector)?;
        self.store(0xff_u8, header + 16)?;
        let (first, next, write) = (slot * 4, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE);
        let direction = if kind == VIRTIO_BLK_T_IN {
            next | write
        } else {
            next
        };
        let seen = self.headers + 32 * u64::from(slot);
        let after_header = if data.is_some() { first + 1 } else { first + 3 };
        self.descriptor(first, seen, 16, next, after_header)?;
        if let Some(halves) = data {
            let [low, high] = halves.map(|at| self.for_request(at, kind));
            self.descriptor(first + 1, low, HALF, direction, first + 2)?;
            self.descriptor(first + 2, high, HALF, direction, first + 3)?;
        }
        self.descriptor(first + 3, seen + 16, 1, write, 0)?;
        let ring = self.param(param::AVAIL) + 4;
        self.store(
            first.to_le(),
            ring + 2 * u64::from(self.next % QUEUE_SIZE as u16),
        )?;
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    fn descriptor(
        &self,
        nth: u16,
        at: u64,
        len: u64,
        flags: u32,
        next: u16,
    ) -> Result<(), Failure> {
        let descriptor = self.param(param::DESC) + 16 * u64::from(nth);
        self.set_word(descriptor, at)?;
        self.set_word(
            descriptor + 8,
            len | u64::from(flags) << 32 | u64::from(next) << 48,
        )
    }

    /// Publishes the last `count` requests, notifies, and waits until all are used. If they `may_fail`, an I/O error is as good as an
    /// answer.
    fn kick(&mut self, count: u16, status: u32, len: u32, may_fail: bool) -> Result<(), Failure> {
        let avail = GuestAddress(self.param(param::AVAIL) + 2);
        let stored = self
            .mem()
            .store(self.next.to_le(), avail, Ordering::Release);
        stored.map_err(|e| lost(avail.0, &e))?;
        self.set_register(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        let used = self.param(param::USED);
        let start = Instant::now();
        loop {
            let index = self
                .mem()
                .load::<u16>(GuestAddress(used + 2), Ordering::Acquire);
            let index = u16::from_le(index.map_err(|e| lost(used, &e))?);
            if index == self.next {
                break;
            }
            if start.elapsed() > PATIENCE {
                check(
                    step::QUEUE,
                    u64::from(index),
                    u64::from(self.next),
                    u64::from(index),
                )?;
            }
            if let Some(mapper) = &mut self.mapper {
                mapper.change_in_flight();
            }
            thread::yield_now();
        }
        if let Some(mapper) = &mut self.mapper {
            mapper.requests_are_done();
        }
        let interrupt = self.register(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        check(
            step::QUEUE,
            u64::from(reg::VIRTIO_MMIO_INTERRUPT_STATUS),
            1,
            u64::from(interrupt),
        )?;
        self.set_register(reg::VIRTIO_MMIO_INTERRUPT_ACK, interrupt);
        for slot in 0..count {
            let index = self.next.wrapping_sub(count).wrapping_add(slot);
            let element = self.word(used + 4 + 8 * u64::from(index % QUEUE_SIZE as u16))?;
            let at = self.param(param::REQUESTS) + 32 * u64::from(slot) + 16;
            let got = self
                .mem()
                .read_obj::<u8>(GuestAddress(at))
                .map_err(|e| lost(at, &e))?;
            // What fails writes its status and nothing else.
            let io_error = u32::from(got) == VIRTIO_BLK_S_IOERR;
            let len = if io_error { 1 } else { len };
            let want = (u64::from(slot) * 4) | (u64::from(len) << 32);
            check(step::QUEUE, u64::from(index), want, element)?;
            if may_fail && io_error {
                self.failed += 1;
            } else {
                check(
                    step::STATUS,
                    u64::from(slot),
                    u64::from(status),
                    u64::from(got),
                )?;
            }
            self.requests += 1;
        }
        Ok(())
    }

    /// Where the device finds what lies at `at` for as long as it runs.
    fn kept(&mut self, at: u64, len: u64) -> u64 {
        self.mapper
            .as_mut()
            .map_or(at, |mapper| mapper.keep(at, len))
    }

    /// Where the device finds half a chunk at `at` until the request is done. The hole is mapped by nobody.
    fn for_request(&mut self, at: u64, kind: u32) -> u64 {
        let hole = self.param(param::HOLE);
        let access = match kind {
            VIRTIO_BLK_T_IN => Permissions::Write,
            _ => Permissions::Read,
        };
        match &mut self.mapper {
            Some(mapper) if at != hole => mapper.for_request(at, HALF, access),
            _ => at,
        }
    }

    fn param(&self, index: usize) -> u64 {
        self.params.get(index).copied().unwrap_or(0)
    }

    fn word(&self, at: u64) -> Result<u64, Failure> {
        let word = self.mem().read_obj::<u64>(GuestAddress(at));
        word.map(u64::from_le).map_err(|e| lost(at, &e))
    }

    fn set_word(&self, at: u64, word: u64) -> Result<(), Failure> {
        self.store(word.to_le(), at)
    }

    fn store<T: vm_memory::ByteValued>(&self, value: T, at: u64) -> Result<(), Failure> {
        self.mem()
            .write_obj(value, GuestAddress(at))
            .map_err(|e| lost(at, &e))
    }

    fn print(&self, text: &str) {
        // As a real driver would, once a line: is the transmitter empty?
        self.ask(Access::PortIn(COM1 + 5));
        text.bytes()
            .for_each(|byte| self.send(Access::PortOut(COM1, byte)));
    }

    fn register(&self, reg: u32) -> u32 {
        self.ask(Access::MmioRead(self.param(param::MMIO) + u64::from(reg)))
    }

    fn set_register(&self, reg: u32, value: u32) {
        self.send(Access::MmioWrite(
            self.param(param::MMIO) + u64::from(reg),
            value,
        ));
    }

    fn ask(&self, access: Access) -> u32 {
        self.send(access);
        // The devices go first only when the run is over; then nobody looks at this.
        self.answers.recv().unwrap_or(u32::MAX)
    }

    fn send(&self, access: Access) {
        let _ = self.to_device.send(access);
    }
}

/// Guest memory refused an access of the driver's: reported as a memory failure at that address.
fn lost(at: u64, _why: &GuestMemoryError) -> Failure {
    Failure {
        step: step::MEMORY,
        place: at,
        want: 0,
        got: u64::MAX,
    }
}
