//! A run: guest memory, devices and a driver, from a [`Setup`] to an [`Outcome`].

use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use microvm::block::{self, Block, Disk, Transfer};
use microvm::bus::{lock, Bus};
use microvm::disk::Image;
use microvm::memory::{build, harvest, pages, Backing, GuestRam};
use microvm::serial;
use microvm::virtio_mmio::{VirtioMmio, VIRTIO_MMIO, VIRTIO_MMIO_LEN};
use vm_memory::iommu::SharedIotlb;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryAtomic};
use vm_memory_host::prefault;

use crate::driver::{self, Driver};
use crate::mapper::{self, Mapper};
use crate::memory::{for_devices, second_mapping, DeviceRam};
use crate::plan::{Plan, AVAILABLE_RING, CHUNK_SECTORS, USED_RING};
use crate::plug::{History, Place, Plug, Processor, ThreadProcessor, PLUG_MMIO, PLUG_MMIO_LEN};
use crate::processor::{self, Cpu};
use crate::storm::{self, StormDisk, Truncation};
use crate::uring::{self, Ring, UringDisk};
use crate::Error;

/// The sectors of a temporary image.
const IMAGE_SECTORS: u64 = 2048;

/// The parameters of a run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The size of guest RAM.
    pub size: u64,
    /// The backing of guest RAM. It must be mappable twice.
    pub backing: Backing,
    /// Whether guest RAM is populated first.
    pub prefault: bool,
    /// Whether the device is behind an IOMMU.
    pub iommu: bool,
    /// Whether memory is plugged while the driver runs.
    pub plug: bool,
    /// The seed of the thread that truncates files, if there is one.
    pub storm: Option<u64>,
    /// Whether the disk is on io_uring.
    pub uring: bool,
    /// A disk image, and whether the driver writes to it. Otherwise the image is temporary.
    pub disk: Option<(PathBuf, bool)>,
    /// Whether the driver runs on a vCPU.
    pub kvm: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 64 << 20,
            backing: Backing::Memfd,
            prefault: false,
            iommu: false,
            plug: false,
            storm: None,
            uring: false,
            disk: None,
            kvm: false,
        }
    }
}

/// The storage of a run.
pub enum Storage {
    /// An image, by `preadv(2)` and `pwritev(2)`.
    Plain(Image),
    /// An image, by io_uring.
    Uring(UringDisk),
    /// A mapped image that is truncated.
    Storm(StormDisk),
}

impl Storage {
    fn new(
        setup: &Setup,
        image: Image,
        truncation: Option<&Arc<Truncation>>,
    ) -> Result<Self, Error> {
        if let Some(truncation) = truncation {
            let disk = StormDisk::new(image, Arc::clone(truncation))?;
            return Ok(Self::Storm(disk));
        }
        if setup.uring {
            let ring = Ring::new()?;
            return Ok(Self::Uring(UringDisk { image, ring }));
        }
        Ok(Self::Plain(image))
    }

    /// Returns the image.
    pub fn image(&self) -> &Image {
        match self {
            Self::Plain(image) => image,
            Self::Uring(disk) => &disk.image,
            Self::Storm(disk) => &disk.image,
        }
    }
}

impl Disk for Storage {
    fn sectors(&self) -> u64 {
        self.image().sectors()
    }

    fn transfer<M>(&mut self, memory: &Arc<M>, transfers: &mut [&mut Transfer])
    where
        M: GuestMemory + 'static,
    {
        match self {
            Self::Plain(image) => image.transfer(memory, transfers),
            Self::Uring(disk) => disk.transfer(memory, transfers),
            Self::Storm(disk) => disk.transfer(memory, transfers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(image) => image.flush(),
            Self::Uring(disk) => disk.flush(),
            Self::Storm(disk) => disk.flush(),
        }
    }
}

/// The pages that were dirtied, from two independent logs.
#[derive(Clone, Debug, Default)]
pub struct Dirty {
    /// Pages that the device wrote: the bitmaps of guest memory.
    pub device: BTreeSet<u64>,
    /// Pages that the driver wrote: the bitmaps of its own mapping, and KVM's log.
    pub driver: BTreeSet<u64>,
}

impl Dirty {
    /// Harvests both logs. `logged` are the pages in KVM's log.
    fn harvest(
        ram: &GuestRam,
        view: &GuestRam,
        logged: BTreeSet<u64>,
        plug: Option<&History>,
    ) -> Self {
        let (mut device, mut driver) = (pages(&harvest(ram)), pages(&harvest(view)));
        driver.extend(logged);
        if let Some(history) = plug {
            device.extend(&history.device);
            driver.extend(&history.driver);
        }
        Self { device, driver }
    }
}

/// The outcome of a run.
pub struct Outcome {
    /// The parameters of the run.
    pub setup: Setup,
    /// The plan.
    pub plan: Plan,
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The sectors that the first pass reads, before the run.
    pub before: Vec<u8>,
    /// The counts of the driver, or the first wrong value that it found.
    pub driver: Result<driver::Counts, Error>,
    /// The counts of the IOMMU's driver side.
    pub mapper: Option<mapper::Counts>,
    /// The mappings that the IOTLB has after the run.
    pub mappings_left: u64,
    /// The block device, with its disk.
    pub block: Block<Storage>,
    /// The number of notifications.
    pub notifications: u64,
    /// The error after which the device needs a reset.
    pub broken: Option<String>,
    /// The history of plugged memory.
    pub plug: Option<History>,
    /// The number of truncations.
    pub truncations: u64,
    /// The dirty pages.
    pub dirty: Dirty,
}

impl Outcome {
    /// Returns the counts of the storm.
    pub fn storm(&mut self) -> Option<storm::Counts> {
        match self.block.disk() {
            Storage::Storm(disk) => Some(disk.counts.clone()),
            _ => None,
        }
    }

    /// Returns the counts of the ring.
    pub fn uring(&mut self) -> Option<uring::Counts> {
        match self.block.disk() {
            Storage::Uring(disk) => Some(disk.ring.counts),
            _ => None,
        }
    }

    /// Returns the counts of the block device.
    pub fn counts(&self) -> &block::Counts {
        &self.block.counts
    }
}

/// Runs a driver. `prepare` may change the plan, to prove that the driver or
/// [`verify`](crate::verify) detects it.
///
/// # Errors
///
/// Returns an error if the run cannot be set up.
pub fn run_with(setup: &Setup, prepare: impl FnOnce(&mut Plan)) -> Result<Outcome, Error> {
    let (ram, view_log) = map(setup)?;
    let view = GuestMemoryAtomic::new(view_log.clone());
    let (image, truncation) = open_disk(setup, &ram)?;
    let place = setup.plug.then(|| Place::above(&ram));
    let storm = truncation.as_ref().map(|truncation| truncation.storm());
    let mut plan = Plan::new(&ram, image.sectors() - storm_sectors(setup))
        .with_storm(storm)
        .with_plug(place);
    let before = image.read_sectors(0, plan.read_chunks * CHUNK_SECTORS)?;
    prepare(&mut plan);
    let storage = Storage::new(setup, image, truncation.as_ref())?;
    let machine = Machine::new(setup, &ram, &view_log)?;
    let processors = machine.processors(&view);
    let (devices, bus) = Devices::new(setup, &ram, storage, place, processors)?;

    // The run. Pages that are already dirty do not count.
    harvest(&ram);
    harvest(&view_log);
    let mut running = truncation
        .as_ref()
        .map(|truncation| truncation.start())
        .transpose()?;
    let job = Job {
        view,
        plan: plan.clone(),
        before: before.clone(),
        mapper: devices.iotlb.clone().map(Mapper::new),
    };
    let ((driver, mapper), logged) = machine.run(job, bus, &ram)?;
    if let Some(running) = &mut running {
        running.stop()?;
    }

    let (mappings_left, plug) = (devices.mappings(), devices.history());
    let dirty = Dirty::harvest(&ram, &view_log, logged, plug.as_ref());
    let device = devices.into_block()?;
    Ok(Outcome {
        setup: setup.clone(),
        plan,
        ram,
        before,
        driver,
        mapper,
        mappings_left,
        notifications: device.notifications,
        broken: device.broken,
        block: device.block,
        plug,
        truncations: truncation.map_or(0, |truncation| truncation.count()),
        dirty,
    })
}

/// Returns the number of sectors of a temporary image that are truncated.
fn storm_sectors(setup: &Setup) -> u64 {
    setup.storm.map_or(0, |_| storm::CHUNKS * CHUNK_SECTORS)
}

/// Opens the image of the disk, and prepares the truncation of its file.
fn open_disk(setup: &Setup, ram: &GuestRam) -> Result<(Image, Option<Arc<Truncation>>), Error> {
    let image = match &setup.disk {
        Some((path, writable)) => Image::open(path, *writable, CHUNK_SECTORS)?,
        None => Image::temporary(IMAGE_SECTORS + storm_sectors(setup))?,
    };
    let truncation = match setup.storm {
        Some(seed) => Some(Truncation::new(ram, &image, seed)?),
        None => None,
    };
    Ok((image, truncation))
}

/// The devices of a run.
struct Devices {
    iotlb: Option<SharedIotlb>,
    block: Arc<Mutex<VirtioMmio<DeviceRam, Storage>>>,
    plug: Option<Arc<Mutex<Plug>>>,
}

impl Devices {
    /// Creates the devices, and a bus to which they are connected.
    fn new(
        setup: &Setup,
        ram: &GuestRam,
        storage: Storage,
        place: Option<Place>,
        processors: Vec<Box<dyn Processor>>,
    ) -> Result<(Self, Bus), Error> {
        let iotlb = setup.iommu.then(SharedIotlb::new);
        let memory = for_devices(ram, iotlb.clone());
        let block = VirtioMmio::new(memory.clone(), Block::new(storage))?;
        let block = Arc::new(Mutex::new(block));
        let mut bus = Bus::new(Arc::new(Mutex::new(serial::new(false)?)));
        bus.map(VIRTIO_MMIO..VIRTIO_MMIO + VIRTIO_MMIO_LEN, block.clone());
        let plug = place.map(|place| {
            let plug = Plug::new(place, setup.backing.clone(), memory, processors);
            Arc::new(Mutex::new(plug))
        });
        if let Some(plug) = &plug {
            bus.map(PLUG_MMIO..PLUG_MMIO + PLUG_MMIO_LEN, plug.clone());
        }
        Ok((Self { iotlb, block, plug }, bus))
    }

    /// Returns the number of mappings in the IOTLB.
    fn mappings(&self) -> u64 {
        let counters = self.iotlb.as_ref().map(SharedIotlb::counters);
        counters.map_or(0, |counters| counters.entries as u64)
    }

    /// Returns the history of plugged memory.
    fn history(&self) -> Option<History> {
        let plug = self.plug.as_ref();
        plug.map(|plug| lock(plug).history.clone())
    }

    /// Returns the block device, after the bus was dropped.
    fn into_block(self) -> Result<VirtioMmio<DeviceRam, Storage>, Error> {
        let unused = Arc::into_inner(self.block);
        let unused = unused.ok_or_else(|| Error::other("the device is in use"))?;
        unused.into_inner().map_err(Error::poisoned)
    }
}

/// Maps guest memory for the devices, and a second time for the driver.
fn map(setup: &Setup) -> Result<(Arc<GuestRam>, GuestRam), Error> {
    let mut ram = build(setup.size, &setup.backing)?;
    if setup.storm.is_some() {
        ram = storm::with_region(&ram)?;
    }
    if setup.prefault {
        let two = NonZeroUsize::MIN.saturating_add(1);
        prefault(&ram, two, |_| ControlFlow::Continue(())).map_err(Error::other)?;
    }
    let view = second_mapping(&ram)?;
    // Memory in a file may contain the rings of an earlier run.
    for ring in [AVAILABLE_RING, USED_RING] {
        let cleared = view.write_obj(0_u64, GuestAddress(ring));
        cleared.map_err(Error::other)?;
    }
    Ok((Arc::new(ram), view))
}

/// Runs a driver.
///
/// # Errors
///
/// Returns an error if the run cannot be set up.
pub fn run(setup: &Setup) -> Result<Outcome, Error> {
    run_with(setup, |_| ())
}

/// The parts of a driver.
struct Job {
    view: GuestMemoryAtomic<GuestRam>,
    plan: Plan,
    before: Vec<u8>,
    mapper: Option<Mapper>,
}

/// The outcome of a driver, and the counts of its mapper.
type Report = (Result<driver::Counts, Error>, Option<mapper::Counts>);

impl Job {
    fn start(self, cpu: impl Cpu + 'static) -> io::Result<thread::JoinHandle<Report>> {
        let Self {
            view,
            plan,
            before,
            mapper,
        } = self;
        thread::Builder::new().name("driver".into()).spawn(move || {
            let mut driver = Driver::new(cpu, view, plan, before, mapper);
            let outcome = driver.run().map(|()| driver.counts);
            (outcome, driver.mapper.map(|mapper| mapper.counts))
        })
    }
}

/// The processor on which a driver runs.
enum Machine {
    Thread,
    #[cfg(target_arch = "x86_64")]
    Kvm(microvm::kvm::Vm, crate::vcpu::Vcpu),
}

impl Machine {
    #[cfg(target_arch = "x86_64")]
    fn new(setup: &Setup, ram: &Arc<GuestRam>, view: &GuestRam) -> Result<Self, Error> {
        if !setup.kvm {
            return Ok(Self::Thread);
        }
        let vm = microvm::kvm::Vm::new("/dev/kvm", false)?;
        vm.slots().add(ram)?;
        let (vcpu, entry) = crate::vcpu::Vcpu::load(view.clone())?;
        vm.set_entry(ram, entry)?;
        Ok(Self::Kvm(vm, vcpu))
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn new(setup: &Setup, _: &Arc<GuestRam>, _: &GuestRam) -> Result<Self, Error> {
        if setup.kvm {
            return Err(Error::other("a vCPU needs x86_64"));
        }
        Ok(Self::Thread)
    }

    /// Returns the accesses to memory that must change when memory is plugged.
    fn processors(&self, view: &GuestMemoryAtomic<GuestRam>) -> Vec<Box<dyn Processor>> {
        let thread = Box::new(ThreadProcessor::new(view.clone()));
        match self {
            Self::Thread => vec![thread],
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(vm, _) => {
                let slot = crate::vcpu::PluggedSlot::new(Arc::clone(vm.slots()));
                vec![thread, Box::new(slot)]
            }
        }
    }

    /// Runs the driver and the devices. Returns the report of the driver, and the pages in KVM's
    /// log.
    fn run(
        self,
        job: Job,
        mut bus: Bus,
        ram: &Arc<GuestRam>,
    ) -> Result<(Report, BTreeSet<u64>), Error> {
        let panicked = |_| Error::other("the driver panicked");
        match self {
            Self::Thread => {
                let _ = ram;
                let (cpu, devices) = processor::thread(job.view.clone());
                let driver = job.start(cpu)?;
                devices.run(&mut bus);
                Ok((driver.join().map_err(panicked)?, BTreeSet::new()))
            }
            #[cfg(target_arch = "x86_64")]
            Self::Kvm(vm, vcpu) => {
                let driver = job.start(vcpu)?;
                let microvm::kvm::Stopped { vm, bus, failure } = vm.run(bus, Some(TIME_LIMIT))?;
                drop(bus);
                let report = driver.join().map_err(panicked)?;
                if let Some(failure) = failure {
                    return Err(Error::other(failure));
                }
                let logged = crate::vcpu::logged(ram, &vm.slots().dirty_log()?);
                Ok((report, logged))
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
const TIME_LIMIT: std::time::Duration = std::time::Duration::from_secs(300);
