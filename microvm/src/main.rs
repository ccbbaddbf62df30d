//! A small virtual machine monitor that shows guest memory at work.
//!
//! Everything that touches guest memory goes through the public API of vm-memory: mapping it
//! ([`memory`]), loading a guest ([`plan`], `boot`), a virtio block device ([`virtio_mmio`],
//! [`block`], [`disk`], by system calls or by [`uring`]), memory that comes and goes ([`plug`]) and, where there is no KVM, the guest itself
//! ([`driver`]). On KVM (`vm`) the guest is a program in assembly (`guest_program`), or a kernel. At the end [`verify`] holds what
//! was dirtied, moved and counted against what must have been, and [`report`] prints it.
//!
//! Start reading at [`run`].

#![cfg_attr(
    not(test),
    deny(
        missing_docs,
        missing_debug_implementations,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::multiple_unsafe_ops_per_block,
        clippy::panic,
        clippy::unwrap_used
    )
)]
#![cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "where there is no KVM, nothing boots a kernel")
)]

mod args;
mod block;
mod bus;
mod chaos;
mod disk;
mod driver;
mod error;
mod iommu;
mod memory;
mod pages;
mod plan;
mod plug;
mod prefault;
mod report;
mod segments;
mod serial;
#[expect(unsafe_code, reason = "io_uring takes pointers to guest memory")]
mod uring;
mod verify;
mod virtio_mmio;

#[cfg(target_arch = "x86_64")]
mod boot;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "the guest is assembly, and its bytes lie between two labels"
)]
mod guest_program;
#[cfg(target_arch = "x86_64")]
mod machine;
#[cfg(target_arch = "x86_64")]
mod vm;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use args::{human, Args};
use block::Block;
use bus::{Bus, Console};
use chaos::Chaos;
use disk::Disk;
use error::Error;
use iommu::{DeviceRam, Mapper};
use memory::{Backing, GuestRam, Source};
use pages::PageMap;
use plan::{Plan, CHUNK_SECTORS};
use plug::{GuestSide, Place, Plug, ThreadSide};
use prefault::Prefaulted;
use report::Report;
use uring::{DiskIo, Ring};
use verify::{Dirty, Expected};
use vm_memory::iommu::SharedIotlb;
use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion};

fn main() -> ExitCode {
    let outcome = match Args::from_command_line() {
        Ok(Some(args)) => run(&args),
        Ok(None) => Ok(true),
        Err(e) => Err(e),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "microvm: {e}");
            ExitCode::from(2)
        }
    }
}

/// Prepares and runs a guest; whether everything agreed in the end.
fn run(args: &Args) -> Result<bool, Error> {
    let mem = args::parse_mem(&args.mem)?;
    #[cfg(target_arch = "x86_64")]
    {
        if args.kernel.is_some() {
            return machine::run_kernel(args, mem);
        }
        if !args.no_kvm && !args.iommu {
            match vm::open(&args.kvm)? {
                vm::Availability::Usable(kvm) => return machine::run_program(args, mem, &kvm),
                vm::Availability::Absent(why) => return run_thread(args, mem, &why),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    if args.kernel.is_some() {
        return Err(Error::KernelNeedsKvm(
            "this machine is no x86_64".to_owned(),
        ));
    }
    let why = if args.iommu {
        "--iommu"
    } else if args.no_kvm {
        "--no-kvm"
    } else {
        "this machine is no x86_64"
    };
    run_thread(args, mem, why)
}

/// Runs the driver as a thread.
fn run_thread(args: &Args, mem: u64, why: &str) -> Result<bool, Error> {
    if args.backing == Some(Backing::Anonymous) {
        return Err(Error::NoSecondView);
    }
    let host = Host::new(args, mem, Backing::Memfd)?;
    let view = memory::second_view(&host.ram)?;
    // Its bitmap is read after the thread is gone: the mappings are shared with this map.
    let log = view.clone();
    let view = GuestMemoryAtomic::new(view);
    let banner = format!("no KVM ({why}); the driver runs as a thread instead");
    let iotlb = args.iommu.then(SharedIotlb::new);
    if let Some(iotlb) = &iotlb {
        iotlb.count_lookups();
    }
    let side = Box::new(ThreadSide::new(view.clone()));
    let mut job = Job::new(args, &host, &banner, iotlb.clone(), side)?;
    let start = Instant::now();
    job.mapper = driver::run(view, &mut job.bus, iotlb.map(Mapper::new))?;
    let took = start.elapsed();
    job.finish(&host, memory::harvest(&log), None, took, false)
}

/// What a guest gets from this machine.
#[derive(Debug)]
struct Host {
    ram: Arc<GuestRam>,
    source: Source,
    /// Where memory may come later.
    place: Option<Place>,
    prefaulted: Option<Prefaulted>,
}

impl Host {
    /// Maps guest memory, kept in `usual` unless the options say otherwise, with what they add to it.
    fn new(args: &Args, mem: u64, usual: Backing) -> Result<Self, Error> {
        let backing = args.backing.clone().unwrap_or(usual);
        let source = Source::open(backing, mem)?;
        let mut ram = source.map()?;
        if args.chaos {
            ram = chaos::with_region(&ram)?;
        }
        let prefaulted = args.prefault.then(|| prefault::run(&ram)).transpose()?;
        Ok(Self {
            place: args.plug.then(|| Place::above(&ram)),
            ram: Arc::new(ram),
            source,
            prefaulted,
        })
    }
}

/// The ring that `--disk-io` asks for, if the kernel lets this process have one.
fn open_ring(args: &Args) -> Result<Option<Ring>, Error> {
    if args.disk_io == DiskIo::Sync {
        return Ok(None);
    }
    match Ring::open()? {
        Ok(ring) => Ok(Some(ring)),
        Err(why) => {
            let text = format!("microvm: --disk-io io_uring: {why}; going on with sync");
            let _ = writeln!(std::io::stderr(), "{text}");
            Ok(None)
        }
    }
}

/// A run of the built-in guest, under way.
struct Job {
    bus: Bus<DeviceRam>,
    plan: Plan,
    /// The sectors that will be read, as they are now.
    before: Vec<u8>,
    loaded: u64,
    chaos: Option<chaos::Running>,
    /// The driver's side of the IOMMU, after it has run.
    mapper: Option<Mapper>,
}

impl Job {
    /// Opens the disk, plans the run, puts the plan into guest memory, and says what will run.
    fn new(
        args: &Args,
        host: &Host,
        banner: &str,
        iotlb: Option<SharedIotlb>,
        side: Box<dyn GuestSide>,
    ) -> Result<Self, Error> {
        let ram = &host.ram;
        let mut disk = open_disk(args)?;
        let chaos = match args.chaos {
            true => Some(Chaos::new(ram, &disk, seed(args))?),
            false => None,
        };
        let plan = match &chaos {
            Some(chaos) => Plan::new(ram, chaos.storm().sector).with_storm(chaos.storm()),
            None => Plan::new(ram, disk.sectors()),
        };
        let plan = plan.with_plug(host.place);
        let before = disk
            .read_sectors(0, plan.read_chunks * CHUNK_SECTORS)
            .map_err(|why| Error::Image {
                what: "read the disk image",
                why,
            })?;
        let words = before.chunks_exact(8).map(|word| {
            word.iter()
                .rev()
                .fold(0, |n: u64, byte| n << 8 | u64::from(*byte))
        });
        plan.store(ram, words.fold(0, plan::sum))?;
        let size = human(ram.iter().map(GuestMemoryRegion::len).sum());
        let (regions, image) = (ram.num_regions(), disk.describe());
        let mut block = Block::new(disk, plan.no_pages(ram)).with_ring(open_ring(args)?);
        if let Some(chaos) = &chaos {
            block = block.with_chaos(Arc::clone(chaos));
        }
        let devices = iommu::for_devices(ram, iotlb);
        let mut bus = Bus::new(devices.clone(), Some(block), Console::Margin).map_err(no_bus)?;
        let no_pages = plan.no_pages(ram);
        bus.plug = host
            .place
            .map(|place| Plug::new(place, host.source.clone(), devices, side, no_pages));
        // The device's pages are counted from here on.
        let loaded = memory::harvest(ram).count();
        say(&format!(
            "microvm: {banner}\n\nRAM   {size} in {regions} regions\nDisk  {image}\n"
        ));
        if let Some(chaos) = &chaos {
            say(&format!("Chaos --seed {}\n", chaos.seed()));
        }
        say("\n");
        let chaos = chaos.map(|chaos| chaos.start()).transpose()?;
        Ok(Self {
            bus,
            plan,
            before,
            loaded,
            chaos,
            mapper: None,
        })
    }

    /// Compares, reports, and says whether all agreed.
    fn finish(
        mut self,
        host: &Host,
        driver: PageMap,
        failed: Option<String>,
        took: Duration,
        on_kvm: bool,
    ) -> Result<bool, Error> {
        if let Some(running) = self.chaos.take() {
            running.stop()?;
        }
        self.bus.drain_console(true);
        let ram: &GuestRam = &host.ram;
        let dirty = Dirty::new(ram, driver).with_plug(self.bus.plug.as_ref());
        let expected = Expected {
            source: &host.source,
            prefaulted: host.prefaulted,
            plan: &self.plan,
            before: &self.before,
            on_kvm,
            mapper: self.mapper.as_ref(),
        };
        let checks = verify::all(ram, &mut self.bus, &dirty, &expected, failed);
        let report = Report {
            ram,
            prefaulted: host.prefaulted,
            places: &self.plan.places(),
            bus: &self.bus,
            dirty: &dirty,
            on_kvm,
            mapper: self.mapper.as_ref(),
            loaded: self.loaded,
            took,
            checks: &checks,
        };
        say(&report.render());
        Ok(report.passed())
    }
}

fn open_disk(args: &Args) -> Result<Disk, Error> {
    match &args.disk {
        None if args.chaos => Disk::temporary_and_mapped(chaos::CHUNKS * CHUNK_SECTORS),
        Some(path) => Disk::open(path, args.disk_write),
        None => Disk::temporary(),
    }
}

/// The seed of `--chaos`: given, or the time.
fn seed(args: &Args) -> u64 {
    args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| u64::from(now.subsec_nanos()))
    })
}

fn no_bus(why: virtio_queue::Error) -> Error {
    Error::Thread {
        what: "make the virtqueue",
        why: why.to_string(),
    }
}

/// Prints to standard output. A pipe that was closed is nobody's error.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
