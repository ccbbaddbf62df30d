//! A guest from the first mapping to the report. Start reading at [`run`].

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryAtomic;
use vm_memory_host::prefault;

use crate::args::{Args, Format};
use crate::block::Block;
use crate::bus::{lock, Bus};
use crate::dirty::DirtyBySource;
use crate::disk::Image;
use crate::kvm::{Stopped, Vm};
use crate::report::{self, Check, Report};
use crate::serial::{self, SerialPort, SERIAL_IRQ};
use crate::virtio_mmio::{VirtioMmio, VIRTIO_IRQ, VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use crate::{boot, guest, memory, Error};

/// The time limit of the built-in guest. It takes milliseconds, or seconds under nested KVM.
const TIME_LIMIT: Duration = Duration::from_secs(120);

const PREFAULT_THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

/// Runs the guest that `args` describes. Returns the report.
///
/// # Errors
///
/// Returns an error if guest memory, a file, KVM or another resource is not available, or if the
/// kernel cannot be booted.
pub fn run(args: &Args) -> Result<Report, Error> {
    // 1. Guest memory: two regions with dirty bitmaps, and a KVM slot for each.
    let ram = Arc::new(memory::build(args.mem, &args.backing)?);
    if args.prefault {
        prefault(&*ram, PREFAULT_THREADS, |_| ControlFlow::Continue(()))?;
    }
    // The built-in guest polls its devices. A kernel needs interrupts.
    let is_kernel = args.kernel.is_some();
    let vm = Vm::new(&args.kvm, is_kernel)?;
    vm.slots().add(&ram)?;

    // 2. The guest: its image in RAM, and its entry point in the registers of the vCPU.
    let (entry, disk_sectors) = match &args.kernel {
        None => (guest::load(&ram, args.mem)?, guest::DISK_SECTORS),
        Some(path) => (boot::load(&ram, path, args)?, 1),
    };
    vm.set_entry(&ram, entry)?;

    // 3. The devices. Their handle to the memory map lets the map change, for instance by hotplug.
    let image = match &args.disk {
        Some(path) => Image::open(path, args.disk_write, disk_sectors)?,
        None => Image::temporary(guest::DISK_SECTORS)?,
    };
    let before = image
        .read_sectors(0, disk_sectors / 2)
        .map_err(Error::Disk)?;
    let memory = GuestMemoryAtomic::from(Arc::clone(&ram));
    let disk = Arc::new(Mutex::new(VirtioMmio::new(memory, Block::new(image))?));
    let serial = Arc::new(Mutex::new(serial::new(args.format == Format::Text)?));
    if is_kernel {
        vm.connect(&lock(&disk).interrupt, VIRTIO_IRQ)?;
        vm.connect(lock(&serial).interrupt_evt(), SERIAL_IRQ)?;
        forward_stdin(Arc::downgrade(&serial))?;
    }
    let mut bus = Bus::new(Arc::clone(&serial));
    bus.map(VIRTIO_MMIO..VIRTIO_MMIO + VIRTIO_MMIO_LEN, disk.clone());

    // 4. The run. Pages that are dirty because microvm loaded the guest do not count.
    memory::harvest(&ram);
    let start = Instant::now();
    let limit = (!is_kernel).then_some(TIME_LIMIT);
    let Stopped { vm, bus, failure } = vm.run(bus, limit)?;
    let duration = start.elapsed();

    // 5. The outcome: dirty pages from both logs, and the checks of memory and disk.
    let dirty = DirtyBySource::harvest(&ram, &vm.slots().dirty_log()?);
    let mut disk = lock(&disk);
    let mut checks = vec![match (failure, bus.ended) {
        (None, Some(code)) => Check::new(format!("the guest ended with code {code}"), code == 0),
        (failure, _) => Check::new(failure.unwrap_or_default(), false),
    }];
    if !is_kernel {
        let image = (&*disk.block.disk(), before.as_slice());
        checks.extend(guest::checks(&ram, args.mem, image, &dirty));
    }
    let console = String::from_utf8_lossy(&lock(&serial).writer().text).into_owned();
    Ok(Report {
        memory: report::memory(&ram),
        console,
        duration,
        exits: bus.exits,
        notifications: disk.notifications,
        requests: disk.block.counts.clone(),
        dirty,
        checks,
    })
}

/// Forwards standard input to the serial port, until either is closed.
fn forward_stdin(serial: Weak<Mutex<SerialPort>>) -> io::Result<()> {
    let forward = move || {
        let mut byte = [0];
        while let (Ok(1), Some(serial)) = (io::stdin().lock().read(&mut byte), serial.upgrade()) {
            // Wait while the FIFO of the UART is full.
            while lock(&serial).enqueue_raw_bytes(&byte).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    let thread = std::thread::Builder::new().name("stdin".into());
    thread.spawn(forward).map(drop)
}
