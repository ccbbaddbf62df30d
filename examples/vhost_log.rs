//! The dirty log of a vhost-user back end: the front end harvests it while the device writes, and
//! replaces it once. No page that the device wrote is missing from the copy.
//!
//! `cargo run -p examples --example vhost_log`

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use examples::Result;
use vm_memory::dirty::DirtyMemory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vm_memory_vhost::log::{LogBitmap, SharedLog};

type FrontEnd = GuestMemoryMmap<()>;

const START: GuestAddress = GuestAddress(0x10_0000);
const SIZE: usize = 64 * 0x1000;

/// Copies all pages, or those that were marked in a log since its last harvest.
fn copy(log: &SharedLog, all: bool, source: &FrontEnd, target: &FrontEnd) -> Result<()> {
    let (mut dirty, mut words) = (DirtyMemory::new(), Vec::new());
    dirty.harvest_with(source, &[log.harvest(&mut words)?]);
    println!("{} pages are dirty", dirty.total_pages());
    if all {
        dirty.insert_all();
    }
    for (addr, len) in dirty.runs() {
        let mut bytes = vec![0; len];
        source.read_slice(&mut bytes, addr)?;
        target.write_slice(&bytes, addr)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    // Both sides map the same file. The regions of the back end mark in the log of the front end.
    let ram = Arc::new(tempfile::tempfile()?);
    ram.set_len(SIZE as u64)?;
    let file = || FileOffset::from_arc(Arc::clone(&ram), 0);
    let source = FrontEnd::from_ranges_with_files([(START, SIZE, Some(file()))])?;
    let target = FrontEnd::from_ranges(&[(START, SIZE)])?;
    let bitmap = Arc::new(LogBitmap::new());
    let marks = bitmap.slice(START);
    let mapping = MmapRegionBuilder::new_with_bitmap(SIZE, marks)
        .with_file_offset(file())
        .with_mmap_flags(libc::MAP_SHARED)
        .build()?;
    let region = GuestRegionMmap::new(mapping, START).ok_or("the region passes the end")?;
    let device = GuestMemoryMmap::from_regions(vec![region])?;
    // `VHOST_USER_SET_LOG_BASE`: the front end allocates a log, and the back end marks in it.
    let set_log_base = || -> Result<SharedLog> {
        let log = SharedLog::create(SharedLog::size_for(&device))?;
        let for_device = SharedLog::map(log.file().try_clone()?, 0, log.pages() / 8)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        bitmap.replace(&device, for_device, deadline)?;
        Ok(log)
    };
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let write_pages = || {
        for value in (1u64..).take_while(|_| !stop.load(Ordering::Relaxed)) {
            let page = GuestAddress(START.0 + value * 7 % 64 * 0x1000);
            device.write_obj(value, page).unwrap();
            writes.store(value, Ordering::Release);
        }
    };
    let wait_for_writes = || {
        let last = writes.load(Ordering::Acquire) + 100;
        while writes.load(Ordering::Acquire) < last {
            thread::yield_now();
        }
    };
    let migrate = || -> Result<SharedLog> {
        // All memory is copied after the acknowledgement of the log, and then the dirty pages.
        let first = set_log_base()?;
        copy(&first, true, &source, &target)?;
        wait_for_writes();
        copy(&first, false, &source, &target)?;
        // The front end replaces the log, and harvests the old one for the last time.
        let second = set_log_base()?;
        copy(&first, false, &source, &target)?;
        wait_for_writes();
        Ok(second)
    };
    let log = thread::scope(|scope| {
        scope.spawn(write_pages);
        let log = migrate();
        stop.store(true, Ordering::Relaxed);
        log
    })?;
    copy(&log, false, &source, &target)?;
    for page in (START.0..).step_by(0x1000).take(64).map(GuestAddress) {
        assert_eq!(target.read_obj::<u64>(page)?, source.read_obj::<u64>(page)?);
    }
    assert_eq!(bitmap.lost_marks(), 0);
    Ok(())
}
