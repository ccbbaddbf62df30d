//! Guests on KVM from start to report: the built-in program, or a kernel.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};

use crate::args::{human, Args};
use crate::block::Block;
use crate::boot::{self, Boot};
use crate::bus::{Bus, Console};
use crate::error::Error;
use crate::guest_program;
use crate::iommu::{self, DeviceRam};
use crate::memory::{self, Backing};
use crate::pages::PageMap;
use crate::plan::{PARAMS, PROGRAM, STACK_TOP};
use crate::report::Report;
use crate::verify::{self, Dirty};
use crate::vm::{self, Availability, Entry, Machine, Outcome};
use crate::{no_bus, open_disk, open_ring, say, Host, Job};

/// A guest that is not done by then hangs. It takes milliseconds, and seconds where KVM emulates it.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Runs the built-in program.
///
/// # Errors
///
/// Whatever keeps it from starting.
pub fn run_program(args: &Args, mem: u64, kvm: &Kvm) -> Result<bool, Error> {
    let host = Host::new(args, mem, Backing::Anonymous)?;
    host.ram
        .write_slice(guest_program::bytes(), GuestAddress(PROGRAM))
        .map_err(|why| Error::GuestMemory {
            what: "load the guest program",
            why,
        })?;
    let end = host.place.map_or(0, |place| place.start + place.size);
    let machine = Machine::new(kvm, Arc::clone(&host.ram), end, false)?;
    machine.enter(Entry::Program {
        rip: PROGRAM,
        rsp: STACK_TOP,
        rdi: PARAMS,
    })?;
    let (banner, side) = (
        format!("a 64-bit guest on {}", args.kvm),
        Box::new(machine.slot()),
    );
    let mut job = Job::new(args, &host, &banner, None, side)?;
    let (driver, failed, took);
    (job.bus, driver, failed, took) = run_machine(machine, job.bus, Some(TIME_LIMIT))?;
    job.finish(&host, driver, failed, took, true)
}

/// Boots the kernel that `args` names.
///
/// # Errors
///
/// Whatever keeps it from starting.
pub fn run_kernel(args: &Args, mem: u64) -> Result<bool, Error> {
    let Some(kernel) = &args.kernel else {
        return Ok(true);
    };
    let disk = args.disk.is_some().then(|| open_disk(args)).transpose()?;
    let host = Host::new(args, mem, Backing::Anonymous)?;
    let ram = Arc::clone(&host.ram);
    // Before KVM is looked at, so that a bad file is told of on any machine.
    let (initrd, cmdline) = (args.initrd.as_deref(), args.cmdline.as_str());
    let (entry, how) = boot::load(
        &ram,
        &Boot {
            kernel,
            initrd,
            cmdline,
            disk: disk.is_some(),
        },
    )?;
    let kvm = match vm::open(&args.kvm)? {
        Availability::Usable(kvm) => kvm,
        Availability::Absent(why) => return Err(Error::KernelNeedsKvm(why)),
    };
    let machine = Machine::new(&kvm, Arc::clone(&ram), 0, true)?;
    machine.enter(entry)?;
    say(&format!(
        "microvm: {} on {}, {how}, {} of RAM\n",
        kernel.display(),
        args.kvm,
        human(mem)
    ));
    let ring = open_ring(args)?;
    let block = disk.map(|disk| Block::new(disk, PageMap::new(&ram)).with_ring(ring));
    let bus = Bus::new(iommu::for_devices(&ram, None), block, Console::Raw).map_err(no_bus)?;
    let loaded = memory::harvest(&ram).count();
    let (bus, driver, failed, took) = run_machine(machine, bus, None)?;
    let dirty = Dirty::new(&ram, driver);
    let mut checks = vec![verify::ended(&bus, failed)];
    checks.extend(verify::device_pages(&bus, &dirty));
    checks.push(verify::host_memory(&ram, &host.source, &dirty));
    checks.extend(verify::prefaulted(&ram, host.prefaulted));
    let report = Report {
        ram: &ram,
        prefaulted: host.prefaulted,
        places: &[],
        bus: &bus,
        dirty: &dirty,
        on_kvm: true,
        mapper: None,
        loaded,
        took,
        checks: &checks,
    };
    say(&report.render());
    Ok(report.passed())
}

/// Runs a machine to its end: the devices, the vCPU's dirty pages, why it failed, and how long it
/// took.
fn run_machine(
    machine: Machine,
    bus: Bus<DeviceRam>,
    limit: Option<Duration>,
) -> Result<(Bus<DeviceRam>, PageMap, Option<String>, Duration), Error> {
    let bus = Arc::new(Mutex::new(bus));
    let start = Instant::now();
    let (machine, outcome) = machine.run(&bus, limit)?;
    let took = start.elapsed();
    let pages = machine.dirty_log()?;
    let failed = match outcome {
        Outcome::Ended => None,
        Outcome::Failed(why) => Some(why),
    };
    let mut shared = bus;
    let bus = loop {
        // The thread of standard input holds the devices for a moment at a time.
        match Arc::try_unwrap(shared) {
            Ok(bus) => break bus.into_inner().unwrap_or_else(PoisonError::into_inner),
            Err(still_shared) => shared = still_shared,
        }
        std::thread::yield_now();
    };
    Ok((bus, pages, failed, took))
}
