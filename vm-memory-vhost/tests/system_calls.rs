//! The table of system calls in the crate documentation lists the calls that are made.
//!
//! The allocator of this program makes no system calls, so it is a program of its own.
#![cfg(all(target_os = "linux", not(miri)))]

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use test_support::{
    documented_calls, skipped, temp_file_of_len, wait_until, CallRecorder, StaticAllocator,
    ThreadId,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::iommu::{AskingIommu, IommuMemory, IovaRange, MappingSource, SharedIotlb};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};
use vm_memory_vhost::log::{LogBitmap, LogError, SharedLog};
use vm_memory_vhost::{BackendChannel, IotlbMessage, MemoryRegion, RegionTable};

/// The size of a log. Marking all its pages takes about a millisecond.
const SIZE: u64 = 1 << 19;
const MINUTE: Duration = Duration::from_secs(60);

#[global_allocator]
static ALLOCATOR: StaticAllocator = StaticAllocator::new();

/// Maps a log.
fn log() -> SharedLog {
    SharedLog::map_unsealed(temp_file_of_len(SIZE), 0, SIZE).unwrap()
}

fn replace(bitmap: &LogBitmap, log: SharedLog) -> Result<(), LogError> {
    bitmap.replace(&GuestMemoryMmap::<()>::new(), log, Instant::now() + MINUTE)
}

/// Maps, uses and drops logs.
fn use_logs(recorder: &mut CallRecorder) -> io::Result<()> {
    let file = temp_file_of_len(SIZE);
    let log_of_file = recorder.run("log::SharedLog::map_unsealed", || {
        SharedLog::map_unsealed(file, 0, SIZE)
    })?;
    let log_of_file = log_of_file.unwrap();
    let mut words = vec![0; SIZE as usize / 8];
    recorder.run("log::SharedLog::harvest", || {
        log_of_file.harvest(&mut words).map(drop).unwrap();
    })?;
    recorder.run("log::SharedLog", || drop(log_of_file))?;
    let created = recorder.run("log::SharedLog::create", || SharedLog::create(SIZE))?;
    let created = created.unwrap();
    let file = created.file().try_clone().unwrap();
    let sealed = recorder.run("log::SharedLog::map", || SharedLog::map(file, 0, SIZE))?;
    sealed.unwrap();

    let bitmap = LogBitmap::new();
    replace(&bitmap, log()).unwrap();
    recorder.run("log::LogBitmap", || bitmap.mark_dirty(0, usize::MAX))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // While a thread marks a log, its replacement waits.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                bitmap.mark_dirty(0, usize::MAX);
            }
        });
        for log in [log(), log(), log()] {
            recorder.run("log::LogBitmap::replace", || replace(&bitmap, log).unwrap())?;
        }
        stop.store(true, Ordering::Relaxed);
        Ok::<_, io::Error>(())
    })?;
    recorder.run("log::LogBitmap::stop", || bitmap.stop())
}

/// A writer that signals its first message.
struct Signals<'a>(&'a AtomicBool);

impl Write for Signals<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.store(true, Ordering::Release);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Maps a page that an access waits for, and requests another one.
fn apply(recorder: &mut CallRecorder) -> io::Result<()> {
    let is_requested = AtomicBool::new(false);
    let table = RegionTable::new([MemoryRegion::new(GuestAddress(0), 0x1000, 0, 0)]).unwrap();
    let iotlb = SharedIotlb::new();
    let channel = || BackendChannel::new(Signals(&is_requested));
    let physical = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let iommu = AskingIommu::new(iotlb.clone(), MINUTE, channel());
    let memory = IommuMemory::new(physical, iommu, true, ());
    let iova = GuestAddress(0x8000);
    let size = 0x1000;
    thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let memory = &memory;
        let access = scope.spawn(move || {
            sender.send(ThreadId::current()).unwrap();
            memory.read_obj::<u8>(iova)
        });
        let thread = receiver.recv().unwrap();
        wait_until(|| is_requested.load(Ordering::Acquire));
        thread.wait_until_asleep();
        let update = IotlbMessage::Update {
            iova,
            size,
            user_address: 0,
            permissions: Permissions::Read,
        };
        let applied = recorder.run("IotlbMessage::apply", || update.apply(&table, &iotlb))?;
        applied.unwrap();
        access.join().unwrap().unwrap();
        Ok::<_, io::Error>(())
    })?;
    let invalidation = IotlbMessage::Invalidate { iova, size };
    let applied = recorder.run("IotlbMessage::apply", || invalidation.apply(&table, &iotlb))?;
    applied.unwrap();
    let range = IovaRange {
        base: iova,
        length: 8,
    };
    let channel = channel();
    let request = || channel.request_mapping(&range, Permissions::Read);
    recorder.run("BackendChannel", request)?.unwrap();
    recorder.run("RegionTable", || table.guest_address(8))?;
    Ok(())
}

#[test]
fn system_calls_are_those_of_the_documentation() {
    let mut recorder = CallRecorder::default();
    if let Err(error) = use_logs(&mut recorder).and_then(|()| apply(&mut recorder)) {
        return skipped("system_calls_are_those_of_the_documentation", error);
    }
    let table = documented_calls(include_str!("../src/lib.rs"));
    assert_eq!(recorder.undocumented(&table), Vec::<String>::new());
    // The vDSO reads the clock on most hosts, and most kernels make memfds that are not executable.
    let depends_on_host = [
        "log::LogBitmap::replace: clock_gettime",
        "log::SharedLog::create: fchmod",
    ];
    let unused = recorder.unused(&table).into_iter();
    let unused: Vec<_> = unused
        .filter(|call| !depends_on_host.contains(&call.as_str()))
        .collect();
    assert_eq!(unused, Vec::<String>::new());
}
