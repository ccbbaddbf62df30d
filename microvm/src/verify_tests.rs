//! Runs that go well, and runs that are spoilt afterwards: each check must see what it is for.

use std::sync::Arc;

use super::*;
use crate::block::Block;
use crate::bus::Console;
use crate::disk::Disk;
use crate::memory::{second_view, Backing, HIGH_START, MIN_MEM, PAGE};
use crate::plan::{param, PARAMS};
use crate::plug::{Place, Plug, ThreadSide};

/// A finished run.
struct Run {
    ram: Arc<GuestRam>,
    bus: Bus<DeviceRam>,
    plan: Plan,
    before: Vec<u8>,
    dirty: Dirty,
    source: Source,
    prefaulted: Option<Prefaulted>,
}

/// Everything up to the start; `spoil` may change what the guest is told.
fn prepare(
    ram: &Arc<GuestRam>,
    place: Option<Place>,
    spoil: impl FnOnce(&GuestRam),
) -> (Bus<DeviceRam>, Plan, Vec<u8>) {
    let mut disk = Disk::temporary().unwrap();
    let plan = Plan::new(ram, disk.sectors()).with_plug(place);
    let before = disk
        .read_sectors(0, plan.read_chunks * CHUNK_SECTORS)
        .unwrap();
    let words = before
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap()));
    plan.store(ram, words.fold(0, crate::plan::sum)).unwrap();
    spoil(ram);
    let block = Block::new(disk, plan.no_pages(ram));
    let bus = Bus::new(
        crate::iommu::for_devices(ram, None),
        Some(block),
        Console::Margin,
    )
    .unwrap();
    harvest(ram);
    (bus, plan, before)
}

fn harvest(ram: &GuestRam) -> PageMap {
    memory::harvest(ram)
}

impl Run {
    fn on_thread(spoil: impl FnOnce(&GuestRam)) -> Self {
        Self::on_thread_with(false, spoil)
    }

    fn on_thread_with(plugged: bool, spoil: impl FnOnce(&GuestRam)) -> Self {
        let source = Source::open(Backing::Memfd, MIN_MEM).unwrap();
        let ram = Arc::new(source.map().unwrap());
        let view = second_view(&ram).unwrap();
        let log = view.clone();
        let view = vm_memory::GuestMemoryAtomic::new(view);
        let place = plugged.then(|| Place::above(&ram));
        let (mut bus, plan, before) = prepare(&ram, place, spoil);
        bus.plug = place.map(|place| {
            // With the devices' own handle of the map.
            let devices = bus.block.as_ref().unwrap().handle();
            let side = Box::new(ThreadSide::new(view.clone()));
            Plug::new(place, source.clone(), devices, side, plan.no_pages(&ram))
        });
        crate::driver::run(view, &mut bus, None).unwrap();
        let dirty = Dirty::new(&ram, harvest(&log)).with_plug(bus.plug.as_ref());
        Self {
            ram,
            bus,
            plan,
            before,
            dirty,
            source,
            prefaulted: None,
        }
    }

    /// The checks that fail, by number.
    fn wrong(&mut self, on_kvm: bool) -> Vec<usize> {
        let expected = Expected {
            plan: &self.plan,
            before: &self.before,
            on_kvm,
            mapper: None,
            source: &self.source,
            prefaulted: self.prefaulted,
        };
        let checks = all(&self.ram, &mut self.bus, &self.dirty, &expected, None);
        assert_eq!(
            checks.len(),
            9 + usize::from(self.prefaulted.is_some()) + usize::from(self.bus.plug.is_some())
        );
        let wrong = checks
            .iter()
            .enumerate()
            .filter(|(_, check)| check.wrong.is_some());
        wrong.map(|(nth, _)| nth).collect()
    }

    fn results(&self) -> Vec<u64> {
        let at = |n| GuestAddress(RESULTS + 8 * n as u64);
        (0..result::WORDS)
            .map(|n| self.ram.read_obj(at(n)).unwrap())
            .collect()
    }
}

const ENDED: usize = 0;
const REPORTED: usize = 1;
const PATTERN: usize = 2;
const BUFFERS: usize = 3;
const SECTORS: usize = 4;
const COUNTS: usize = 5;
const DEVICE: usize = 6;
const DRIVER: usize = 7;
const HOST: usize = 8;

#[test]
fn each_check_sees_what_it_is_for() {
    let mut run = Run::on_thread(|_| ());
    assert!(run.wrong(false).is_empty());

    run.bus.ended = Some(1);
    assert_eq!(run.wrong(false), [ENDED]);
    run.bus.ended = Some(0);

    let flip = |run: &Run, at: u64| {
        let byte: u8 = run.ram.read_obj(GuestAddress(at)).unwrap();
        run.ram.write_obj(byte ^ 1, GuestAddress(at)).unwrap();
    };
    let word = run.plan.pattern_words().last().unwrap();
    let (_, buffer, _) = run.plan.read_halves().last().unwrap();
    for (at, check) in [
        (RESULTS, REPORTED),
        (word, PATTERN),
        (buffer + HALF - 1, BUFFERS),
    ] {
        flip(&run, at);
        assert_eq!(run.wrong(false), [check]);
        flip(&run, at);
    }

    run.bus.block.as_mut().unwrap().block.counts.bytes_read += 1;
    assert_eq!(run.wrong(false), [COUNTS]);
    run.bus.block.as_mut().unwrap().block.counts.bytes_read -= 1;

    let whole = run.dirty.clone();
    let mut one = PageMap::new(&run.ram);
    one.add(whole.device.first().unwrap(), 1);
    run.dirty.device = whole.device.minus(&one);
    assert_eq!(run.wrong(false), [DEVICE]);
    run.dirty.device = whole.device.clone();
    run.dirty.device.add(PAGE * 3, 1);
    assert_eq!(run.wrong(false), [DEVICE]);
    run.dirty = whole.clone();

    let mut one = PageMap::new(&run.ram);
    one.add(whole.driver.first().unwrap(), 1);
    run.dirty.driver = whole.driver.minus(&one);
    assert_eq!(run.wrong(false), [DRIVER]);
    run.dirty.driver = whole.driver.clone();
    run.dirty.driver.add(PAGE * 3, 1);
    assert_eq!(run.wrong(false), [DRIVER]);
    run.dirty = whole;

    // A sector of those that the guest wrote, and one of the others.
    for sector in [run.plan.write_sector() + 3, 17] {
        let disk = run.bus.block.as_mut().unwrap().block.disk();
        let kept = disk.read_sectors(sector, 1).unwrap();
        let scratch = GuestAddress(0x70_0000);
        let saved: u64 = run.ram.read_obj(scratch).unwrap();
        let ram = Arc::clone(&run.ram);
        let write = |disk: &mut Disk, bytes: &[u8]| {
            ram.write_slice(bytes, scratch).unwrap();
            disk.write_from_guest(&*ram, scratch, sector * SECTOR, 512)
                .unwrap();
        };
        write(disk, &[0; 512]);
        assert_eq!(run.wrong(false), [SECTORS]);
        let disk = run.bus.block.as_mut().unwrap().block.disk();
        write(disk, &kept);
        run.ram.write_obj(saved, scratch).unwrap();
    }
    assert!(run.wrong(false).is_empty());
}

#[test]
fn what_the_host_provides_is_looked_at() {
    let mut run = Run::on_thread(|_| ());
    let resident = MIN_MEM;
    let good = Prefaulted {
        bytes: MIN_MEM,
        resident,
        took: std::time::Duration::ZERO,
        threads: 2,
    };
    run.prefaulted = Some(good);
    assert!(run.wrong(false).is_empty());
    for bad in [
        Prefaulted { bytes: 0, ..good },
        Prefaulted {
            resident: MIN_MEM - PAGE,
            ..good
        },
    ] {
        run.prefaulted = Some(bad);
        assert_eq!(run.wrong(false), [HOST + 1]);
    }
    run.prefaulted = None;
    for other in [
        Backing::Anonymous,
        Backing::Hugetlb,
        Backing::File("x".into()),
    ] {
        let memfd = std::mem::replace(&mut run.source.backing, other);
        assert_eq!(run.wrong(false), [HOST]);
        run.source.backing = memfd;
    }
    // A dirty page that has gone.
    let pages = run.dirty.device.union(&run.dirty.driver);
    let page = pages.counts();
    assert!(page.iter().all(|(_, count)| *count > 0));
    vm_memory_host::discard(&*run.ram, GuestAddress(HIGH_START), MIN_MEM / 2).unwrap();
    harvest(&run.ram);
    assert!(run.wrong(false).contains(&HOST));
}

#[test]
fn memory_that_came_and_went_is_looked_at() {
    const PLUGGED: usize = HOST + 1;
    let mut run = Run::on_thread_with(true, |_| ());
    // Other tests are in the same process.
    let story = &mut run.bus.plug.as_mut().unwrap().story;
    assert!(story.process.iter().all(|bytes| *bytes > 0));
    story.process = [50 << 20, 58 << 20, 50 << 20];
    assert!(run.wrong(false).is_empty());
    assert_eq!(run.dirty.driver.counts()[2].1, 2048);
    assert_eq!(run.dirty.device.counts()[2].1, 32);

    let good = run.bus.plug.as_ref().unwrap().story.clone();
    let mut spoil = |change: &dyn Fn(&mut crate::plug::Story)| {
        let story = &mut run.bus.plug.as_mut().unwrap().story;
        change(story);
        let wrong = run.wrong(false);
        run.bus.plug.as_mut().unwrap().story = good.clone();
        wrong
    };
    assert_eq!(spoil(&|story| story.granted[2] = 0), [PLUGGED]);
    assert_eq!(spoil(&|story| story.as_asked = false), [PLUGGED]);
    assert_eq!(
        spoil(&|story| story.refused = Some("no".to_owned())),
        [PLUGGED]
    );
    assert_eq!(spoil(&|story| story.resident[0] -= PAGE), [PLUGGED]);
    assert_eq!(spoil(&|story| story.resident[1] += PAGE), [PLUGGED]);
    assert_eq!(
        spoil(&|story| story.process[0] = story.process[1]),
        [PLUGGED]
    );
    assert_eq!(
        spoil(&|story| story.process[2] = story.process[1]),
        [PLUGGED]
    );
    assert!(spoil(&|_| ()).is_empty());

    // Pages of it that only one of the logs has.
    let place = run.plan.plug.unwrap();
    run.dirty.device.add(place.start + place.first(), 1);
    assert_eq!(run.wrong(false), [DEVICE]);
    run.dirty.driver.add(place.start + place.first(), 1);
    assert_eq!(run.wrong(false), [DEVICE, DRIVER]);
}

#[test]
fn the_driver_finds_that_no_memory_comes() {
    let mut run = Run::on_thread(|ram| {
        // Where the block device is, which has another magic number.
        let at = GuestAddress(PARAMS + 8 * param::PLUG as u64);
        ram.write_obj(crate::bus::VIRTIO_MMIO, at).unwrap();
    });
    let results = run.results();
    assert_eq!(results[..2], [step::PLUG, 0]);
    assert_eq!(results[2], u64::from(crate::plug::MAGIC));
    assert!(run.wrong(false).starts_with(&[ENDED, REPORTED]));
}

#[test]
fn the_driver_finds_a_wrong_checksum_and_a_wrong_capacity() {
    for (index, step) in [(param::SUM, step::READ), (param::CAPACITY, step::VIRTIO)] {
        let mut run = Run::on_thread(|ram| spoil_param(ram, index));
        assert_eq!(
            (run.results()[result::STEP], run.bus.ended),
            (step, Some(step as u8))
        );
        assert!(run.wrong(false).starts_with(&[ENDED, REPORTED]));
    }
}

fn spoil_param(ram: &GuestRam, index: usize) {
    let at = GuestAddress(PARAMS + 8 * index as u64);
    let word: u64 = ram.read_obj(at).unwrap();
    ram.write_obj(word ^ 1, at).unwrap();
}

#[cfg(target_arch = "x86_64")]
mod kvm {
    use std::io::Write;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    use super::*;
    use crate::plan::{PROGRAM, STACK_TOP};
    use crate::vm::{open, Availability, Entry, Machine, Outcome};

    /// Runs `program` on a vCPU. `None`, said aloud, where there is no KVM.
    fn on_vcpu(
        program: &[u8],
        limit: Duration,
        spoil: impl FnOnce(&GuestRam),
    ) -> Option<(Run, Outcome)> {
        let kvm = match open("/dev/kvm") {
            Ok(Availability::Usable(kvm)) => kvm,
            other => {
                // Not println: that is not shown when a test passes.
                let _ = writeln!(std::io::stderr(), "SKIPPED: no usable /dev/kvm: {other:?}");
                return None;
            }
        };
        let source = Source::open(Backing::Anonymous, MIN_MEM).unwrap();
        let ram = Arc::new(source.map().unwrap());
        ram.write_slice(program, GuestAddress(PROGRAM)).unwrap();
        let machine = Machine::new(&kvm, Arc::clone(&ram), 0, false).unwrap();
        machine
            .enter(Entry::Program {
                rip: PROGRAM,
                rsp: STACK_TOP,
                rdi: PARAMS,
            })
            .unwrap();
        let (bus, plan, before) = prepare(&ram, None, spoil);
        let bus = Arc::new(Mutex::new(bus));
        let (machine, outcome) = machine.run(&bus, Some(limit)).unwrap();
        let dirty = Dirty::new(&ram, machine.dirty_log().unwrap());
        let bus = Arc::into_inner(bus).unwrap();
        let bus = bus.into_inner().unwrap_or_else(PoisonError::into_inner);
        Some((
            Run {
                ram,
                bus,
                plan,
                before,
                dirty,
                source,
                prefaulted: None,
            },
            outcome,
        ))
    }

    #[test]
    fn a_guest_that_hangs_halts_or_faults_is_stopped_and_said_so() {
        let (short, long) = (Duration::from_millis(300), Duration::from_secs(120));
        for (program, limit, why) in [
            (&[0xeb, 0xfe][..], short, "did not finish in time"),
            (&[0xf4], long, "halted"),
            (&[0x0f, 0x0b], long, "exception"),
        ] {
            let Some((mut run, outcome)) = on_vcpu(program, limit, |_| ()) else {
                return;
            };
            assert!(
                matches!(&outcome, Outcome::Failed(e) if e.contains(why)),
                "{outcome:?}"
            );
            assert!(run.wrong(true).starts_with(&[ENDED, REPORTED, PATTERN]));
        }
    }

    #[test]
    fn the_program_finds_a_wrong_capacity() {
        let program = crate::guest_program::bytes();
        let Some((run, outcome)) = on_vcpu(program, Duration::from_secs(120), |ram| {
            spoil_param(ram, param::CAPACITY)
        }) else {
            return;
        };
        assert_eq!(
            (outcome, run.bus.ended),
            (Outcome::Ended, Some(step::VIRTIO as u8))
        );
        let results = run.results();
        assert_eq!(results[..4], [step::VIRTIO, 0x100, 2049, 2048]);
        assert_eq!(results[result::PAGES], run.plan.pattern_pages());
    }
}
