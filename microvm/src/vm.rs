//! The machine on KVM: memory slots with a dirty log, one vCPU, and the loop around its exits.

use std::ffi::CString;
use std::io::Read;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{
    kvm_fpu, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use crate::bus::Bus;
use crate::error::Error;
use crate::iommu::DeviceRam;
use crate::memory::{self, GuestRam, GuestRegion, HIGH_START};
use crate::pages::PageMap;
use crate::plug::GuestSide;

/// Where KVM keeps three pages of its own on Intel: below the BIOS, outside of RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const GDT: u64 = 0x500;
const PML4: u64 = 0xa000;
const PDPT: u64 = 0xb000;
/// A page directory for each GiB from here on; for 73 GiB they end below 0x56000.
const PAGE_DIRECTORIES: u64 = 0xc000;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present and writable. Accessed (and dirty) too: the CPU has nothing to write back then, and the
/// page tables stay out of the dirty log.
const TABLE: u64 = 0x23;
const LARGE_LEAF: u64 = 0xe3;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Interrupt lines on an in-kernel interrupt controller.
const SERIAL_IRQ: u32 = 4;
/// That of the block device, as the kernel command line says.
pub const BLOCK_IRQ: u32 = 5;

/// How a guest is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The built-in program, in 64-bit mode: RIP, RSP, RDI.
    Program {
        /// Its first instruction.
        rip: u64,
        /// Its stack.
        rsp: u64,
        /// Its parameters.
        rdi: u64,
    },
    /// A kernel by the 64-bit Linux boot protocol: RIP, and the zero page in RSI.
    Linux64 {
        /// The 64-bit entry point.
        rip: u64,
        /// The zero page.
        zero_page: u64,
    },
    /// A kernel by PVH, in 32-bit protected mode without paging: EIP, and the start info in EBX.
    Pvh {
        /// The entry point in the note.
        rip: u64,
        /// `hvm_start_info`.
        start_info: u64,
    },
}

/// How a run ended, apart from what the guest itself said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ended it, through the debug-exit port, a reset or a triple fault of a kernel.
    Ended,
    /// Something that should not happen: what, and where the vCPU stood.
    Failed(String),
}

/// What `/dev/kvm` is worth on this machine.
#[derive(Debug)]
pub enum Availability {
    /// It can be used.
    Usable(Kvm),
    /// There is none; the reason fits into a sentence.
    Absent(String),
}

/// Opens the KVM device.
///
/// # Errors
///
/// [`Error::KvmDevice`] when it is there but cannot be used: that is somebody's to mend.
pub fn open(device: &str) -> Result<Availability, Error> {
    let fail = |why: String, fix| Error::KvmDevice {
        device: device.to_owned(),
        why,
        fix,
    };
    let path =
        CString::new(device).map_err(|e| fail(e.to_string(), "give the path of the KVM device"))?;
    let kvm = match Kvm::new_with_path(&path) {
        Ok(kvm) => kvm,
        Err(e) => {
            return match e.errno() {
                libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                    Ok(Availability::Absent(format!("there is no {device}")))
                }
                libc::EACCES | libc::EPERM => Err(fail(
                    e.to_string(),
                    "join the group that owns it (kvm on most systems), or run with --no-kvm",
                )),
                _ => Err(fail(
                    e.to_string(),
                    "give another device, or run with --no-kvm",
                )),
            };
        }
    };
    match kvm.get_api_version() {
        12 => Ok(Availability::Usable(kvm)),
        _ => Err(fail(
            "not KVM, or too old".to_owned(),
            "give another device, or run with --no-kvm",
        )),
    }
}

/// A machine with its memory in place.
#[derive(Debug)]
pub struct Machine {
    // Before the memory, so that it is gone first.
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    ram: Arc<GuestRam>,
    /// The last address that memory has, or may have later.
    last: u64,
    has_irqchip: bool,
}

impl Machine {
    /// Makes a machine with `ram` as its memory, to which more may come below `end`. A kernel needs interrupts and timers
    /// (`with_irqchip`), the built-in program neither.
    ///
    /// # Errors
    ///
    /// [`Error::Kvm`].
    pub fn new(kvm: &Kvm, ram: Arc<GuestRam>, end: u64, with_irqchip: bool) -> Result<Self, Error> {
        let vm = kvm
            .create_vm()
            .map_err(|e| refused("create a machine", e))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(|e| refused("place the TSS", e))?;
        if with_irqchip {
            vm.create_irq_chip()
                .map_err(|e| refused("create interrupt controllers", e))?;
            vm.create_pit2(kvm_pit_config::default())
                .map_err(|e| refused("create a timer", e))?;
        }
        for (slot, region) in ram.iter().enumerate() {
            let slot = slot_of(slot as u32, region).map_err(|e| refused("find the memory", e))?;
            set_memory(&vm, slot).map_err(|e| refused("take the memory", e))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(|e| refused("create a vCPU", e))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| refused("tell its CPUID", e))?;
        let last = HIGH_START.max(ram.last_addr().0).max(end.saturating_sub(1));
        for leaf in cpuid
            .as_slice()
            .iter()
            .filter(|leaf| leaf.function == 0x8000_0008)
        {
            // Bits 0 to 7: how wide a guest physical address is.
            if last
                .checked_shr(leaf.eax & 0xff)
                .is_some_and(|beyond| beyond != 0)
            {
                return Err(refused("reach that much memory", "try a smaller --mem"));
            }
        }
        vcpu.set_cpuid2(&cpuid)
            .map_err(|e| refused("set CPUID", e))?;
        Ok(Self {
            vm: Arc::new(vm),
            vcpu,
            ram,
            last,
            has_irqchip: with_irqchip,
        })
    }

    /// A memory slot behind those of its memory.
    pub fn slot(&self) -> Slot {
        Slot {
            vm: Arc::clone(&self.vm),
            number: self.ram.num_regions() as u32,
            region: None,
        }
    }

    /// Puts the vCPU at its entry point. Writes GDT and page tables to guest memory.
    ///
    /// # Errors
    ///
    /// [`Error::Kvm`], and [`Error::GuestMemory`].
    pub fn enter(&self, entry: Entry) -> Result<(), Error> {
        let long = !matches!(entry, Entry::Pvh { .. });
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match entry {
            Entry::Program { rip, rsp, rdi } => (regs.rip, regs.rsp, regs.rdi) = (rip, rsp, rdi),
            Entry::Linux64 { rip, zero_page } => (regs.rip, regs.rsi) = (rip, zero_page),
            Entry::Pvh { rip, start_info } => (regs.rip, regs.rbx) = (rip, start_info),
        }
        let mut sregs = self
            .vcpu
            .get_sregs()
            .map_err(|e| refused("read registers", e))?;
        let code = segment(CODE_SELECTOR, 0xb, long);
        let data = segment(DATA_SELECTOR, 0x3, false);
        sregs.cs = code;
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = data;
        }
        let task = kvm_segment {
            limit: 0x67,
            g: 0,
            s: 0,
            db: 0,
            ..segment(TASK_SELECTOR, 0xb, false)
        };
        sregs.tr = task;
        let gdt = [
            0,
            0,
            descriptor(&code),
            descriptor(&data),
            descriptor(&task),
        ];
        self.store_words(GDT, &gdt)?;
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 8 * gdt.len() as u16 - 1);
        // Any exception of the built-in program is a triple fault, and reported as such.
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        (sregs.cr0, sregs.cr4) = (CR0_PE | CR0_ET, 0);
        if long {
            self.identity_map()?;
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        self.vcpu
            .set_sregs(&sregs)
            .map_err(|e| refused("set system registers", e))?;
        self.vcpu
            .set_regs(&regs)
            .map_err(|e| refused("set registers", e))?;
        // The state that FNINIT leaves.
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        self.vcpu
            .set_fpu(&fpu)
            .map_err(|e| refused("set the FPU", e))
    }

    /// Page tables that map every guest physical address to itself, up to the end of RAM and at
    /// least 4 GiB (the hole has devices), with pages of 2 MiB.
    fn identity_map(&self) -> Result<(), Error> {
        let top = self.last / GIB + 1;
        let directory = |gib: u64| PAGE_DIRECTORIES + gib * 4096;
        self.store_words(PML4, &[PDPT | TABLE])?;
        let directories: Vec<u64> = (0..top).map(|gib| directory(gib) | TABLE).collect();
        self.store_words(PDPT, &directories)?;
        for gib in 0..top {
            let pages = (0..512).map(|n| (gib * GIB + n * LARGE_PAGE) | LARGE_LEAF);
            self.store_words(directory(gib), &pages.collect::<Vec<u64>>())?;
        }
        Ok(())
    }

    fn store_words(&self, at: u64, words: &[u64]) -> Result<(), Error> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.ram
            .write_slice(&bytes, GuestAddress(at))
            .map_err(|why| Error::GuestMemory {
                what: "write tables for the vCPU",
                why,
            })
    }

    /// Runs the vCPU until the guest ends the run, fails, or the time is up. Returns the machine,
    /// whose dirty log is still to be read.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`] when the vCPU's thread cannot be started or dies.
    pub fn run(
        self,
        bus: &Arc<Mutex<Bus<DeviceRam>>>,
        limit: Option<Duration>,
    ) -> Result<(Self, Outcome), Error> {
        let fail = |why: String| Error::Thread {
            what: "run the vCPU's thread",
            why,
        };
        if self.has_irqchip {
            forward_stdin(Arc::clone(&self.vm), Arc::downgrade(bus));
        }
        // All that the signal does is to interrupt KVM_RUN.
        let signal = SIGRTMIN();
        register_signal_handler(signal, on_kick).map_err(|e| fail(e.to_string()))?;
        let (done, finished) = channel();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (bus, stopped) = (Arc::clone(bus), Arc::clone(&stop));
        let (mut machine, deadline) = (self, limit.map(|limit| Instant::now() + limit));
        let vcpu = thread::Builder::new()
            .name("vcpu".to_owned())
            .spawn(move || {
                let outcome = machine.run_vcpu(&bus, &stopped);
                // Nobody waits any more if the run was given up, and joins instead.
                let _ = done.send(());
                (machine, outcome)
            });
        let vcpu = vcpu.map_err(|e| fail(e.to_string()))?;
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if finished.recv_timeout(left).is_err() && !vcpu.is_finished() {
                stop.store(true, std::sync::atomic::Ordering::Release);
                // A signal that comes just before KVM_RUN is lost, so there is more than one.
                while !vcpu.is_finished() {
                    vcpu.kill(signal).map_err(|e| fail(e.to_string()))?;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        vcpu.join().map_err(|_| fail("it panicked".to_owned()))
    }

    fn run_vcpu(
        &mut self,
        bus: &Mutex<Bus<DeviceRam>>,
        stop: &std::sync::atomic::AtomicBool,
    ) -> Outcome {
        let mut lines = Lines::default();
        loop {
            if stop.load(std::sync::atomic::Ordering::Acquire) {
                return self.failed("the guest did not finish in time");
            }
            let exit = self.vcpu.run();
            let mut bus = lock(bus);
            let mut failed = None;
            match exit {
                Ok(VcpuExit::IoOut(port, data)) => bus.port_out(port, data),
                Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
                Ok(VcpuExit::MmioRead(addr, data)) => bus.mmio_read(addr, data),
                Ok(VcpuExit::MmioWrite(addr, data)) => bus.mmio_write(addr, data),
                Ok(VcpuExit::Hlt) => {
                    bus.exits.halt += 1;
                    failed = Some("the guest halted without ending the run".to_owned());
                }
                Ok(VcpuExit::Shutdown) => {
                    bus.exits.other += 1;
                    // A kernel resets the machine like this; the built-in program never.
                    match self.has_irqchip {
                        true => bus.ended = Some(0),
                        false => failed = Some("the guest met an exception".to_owned()),
                    }
                }
                Ok(other) => {
                    let other = format!("KVM stopped with {other:?}");
                    bus.exits.other += 1;
                    failed = Some(other);
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => bus.exits.other += 1,
                Err(e) => failed = Some(format!("KVM_RUN: {e}")),
            }
            if let Some(why) = failed {
                drop(bus);
                return self.failed(&why);
            }
            if bus.ended.is_some() {
                return Outcome::Ended;
            }
            if self.has_irqchip {
                lines.update(&self.vm, &bus);
            }
        }
    }

    fn failed(&self, why: &str) -> Outcome {
        Outcome::Failed(match self.vcpu.get_regs() {
            Ok(regs) => format!("{why}, at RIP {:#x}", regs.rip),
            Err(_) => why.to_owned(),
        })
    }

    /// The pages that the vCPU has written since the last time, from KVM's log.
    ///
    /// # Errors
    ///
    /// [`Error::Kvm`].
    pub fn dirty_log(&self) -> Result<PageMap, Error> {
        let mut pages = PageMap::new(&self.ram);
        for (slot, region) in self.ram.iter().enumerate() {
            let len =
                usize::try_from(region.len()).map_err(|e| refused("tell its dirty log", e))?;
            let words = self.vm.get_dirty_log(slot as u32, len);
            pages.set_words(slot, &words.map_err(|e| refused("tell its dirty log", e))?);
        }
        Ok(pages)
    }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A memory slot for a region that comes and goes.
#[derive(Debug)]
pub struct Slot {
    vm: Arc<VmFd>,
    number: u32,
    /// What KVM has been given.
    region: Option<Arc<GuestRegion>>,
}

impl Slot {
    /// Takes the region from KVM, if it has one.
    fn clear(&mut self) -> Result<(), String> {
        let Some(region) = self.region.take() else {
            return Ok(());
        };
        let mut nothing = slot_of(self.number, &region).map_err(|e| e.to_string())?;
        nothing.memory_size = 0;
        set_memory(&self.vm, nothing).map_err(|e| {
            // KVM still has it: it must stay.
            std::mem::forget(region);
            format!("KVM cannot give the memory back: {e}")
        })
    }
}

impl GuestSide for Slot {
    fn insert(&mut self, one: &GuestRam) -> Result<(), String> {
        let region = memory::only_region(one).ok_or("it was not built")?;
        let slot = slot_of(self.number, &region).map_err(|e| e.to_string())?;
        set_memory(&self.vm, slot).map_err(|e| format!("KVM cannot take the memory: {e}"))?;
        self.region = Some(region);
        Ok(())
    }

    fn blocks(&mut self, _: u64, _: u64, _: bool, _: &mut PageMap) -> Result<(), String> {
        // A vCPU that touches a block which is not plugged gets zeroes there.
        Ok(())
    }

    fn remove(&mut self, dirtied: &mut PageMap) -> Result<(), String> {
        let region = self.region.as_ref().ok_or("KVM has no such memory")?;
        let len = usize::try_from(region.len()).map_err(|e| e.to_string())?;
        let log = self.vm.get_dirty_log(self.number, len);
        let log = log.map_err(|e| format!("KVM cannot tell its dirty log: {e}"))?;
        dirtied.set_words(self.number as usize, &log);
        self.clear()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // A guest may have ended without giving it back; what KVM keeps is never unmapped.
        let _ = self.clear();
    }
}

/// A region as KVM takes it.
fn slot_of(
    slot: u32,
    region: &GuestRegion,
) -> Result<kvm_userspace_memory_region, GuestMemoryError> {
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(0))?;
    Ok(kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: host as u64,
    })
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let (l, db) = (u8::from(long), u8::from(!long));
    let limit = u32::MAX;
    kvm_segment {
        selector,
        type_,
        l,
        db,
        limit,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The descriptor of a segment with base 0, as it stands in a GDT.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flag = |bit: u8, at: u32| u64::from(bit) << at;
    (limit & 0xffff)
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.present, 47)
        | (limit >> 16) << 48
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

#[expect(unsafe_code, reason = "KVM takes host memory by its raw address")]
fn set_memory(vm: &VmFd, slot: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: 1. `slot` describes one region of a `GuestRam`: mapped, readable and writable, for as
    //    long as the region lives.
    // 2. `Machine` holds that memory in an `Arc` and drops the machine's descriptors before it; the
    //    `VmFd` of the stdin thread runs no vCPU, and goes with the process. A `Slot` keeps its region until
    //    KVM has given it back.
    // 3. The guest's accesses race with the host's only as bytes that vm-memory moves volatilely.
    unsafe { vm.set_user_memory_region(slot) }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The interrupt lines as they were last given to KVM.
#[derive(Default)]
struct Lines {
    serial: bool,
    block: bool,
}

impl Lines {
    fn update(&mut self, vm: &VmFd, bus: &Bus<DeviceRam>) {
        let serial = bus.serial.interrupt_line();
        let block = bus.block.as_ref().is_some_and(|b| b.interrupt_line());
        for (line, now, irq) in [
            (&mut self.serial, serial, SERIAL_IRQ),
            (&mut self.block, block, BLOCK_IRQ),
        ] {
            // KVM refuses no line of an interrupt controller that it has.
            if *line != now && vm.set_irq_line(irq, now).is_ok() {
                *line = now;
            }
        }
    }
}

/// Hands the terminal's bytes to the serial port. The thread lives until its input or the process
/// ends.
fn forward_stdin(vm: Arc<VmFd>, bus: Weak<Mutex<Bus<DeviceRam>>>) {
    let forward = move || {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().lock().read(&mut bytes) {
            let Some(bus) = bus.upgrade() else {
                break;
            };
            let mut bus = lock(&bus);
            bytes
                .iter()
                .take(count)
                .for_each(|byte| bus.serial.push_input(*byte));
            // The vCPU may be halted in the kernel: raise the line here, it is lowered over there.
            if bus.serial.interrupt_line() {
                let _ = vm.set_irq_line(SERIAL_IRQ, false);
                let _ = vm.set_irq_line(SERIAL_IRQ, true);
            }
        }
    };
    // Without this thread a kernel has no keyboard, and that is all.
    let _ = thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(forward);
}

fn lock(bus: &Mutex<Bus<DeviceRam>>) -> MutexGuard<'_, Bus<DeviceRam>> {
    bus.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(what: &'static str, why: impl std::fmt::Display) -> Error {
    Error::Kvm {
        what,
        why: why.to_string(),
    }
}
