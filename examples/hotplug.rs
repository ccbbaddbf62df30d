//! Hotplug: change the memory map while device threads use it, and unmap a region when no thread
//! reads the old map any more.
//!
//! `cargo run -p examples --example hotplug`

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

type Memory = GuestMemoryMmap<()>;

const MODULE: GuestAddress = GuestAddress(1 << 32);
const MODULE_SIZE: u64 = 1 << 20;

#[derive(Default)]
struct Counts {
    moved: AtomicU64,
    refused: AtomicU64,
}

/// A device thread: takes the current map for each request.
fn device(memory: &GuestMemoryAtomic<Memory>, stop: &AtomicBool, counts: &Counts) {
    // A reader costs one load per request; `memory.memory()` would cost a reference count.
    let mut reader = memory.reader();
    while !stop.load(Ordering::Acquire) {
        // The map stays the same for the whole request.
        let count = match reader.memory().write_obj(1u8, MODULE) {
            Ok(()) => &counts.moved,
            Err(_) => &counts.refused,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
    // Before a thread sleeps for long, it must release the map that it saw last:
    reader.release();
}

/// Waits until the device has increased `count`.
fn wait_for(count: &AtomicU64) {
    let before = count.load(Ordering::Relaxed);
    while count.load(Ordering::Relaxed) == before {
        thread::yield_now();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let boot = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let memory = GuestMemoryAtomic::new(boot);
    let (stop, counts) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(Counts::default()),
    );
    let thread = thread::spawn({
        let (memory, stop, counts) = (memory.clone(), Arc::clone(&stop), Arc::clone(&counts));
        move || device(&memory, &stop, &counts)
    });
    wait_for(&counts.refused);

    // Plug: map the region, and publish it to the devices. Add the KVM slot between the two.
    let module = GuestRegionMmap::from_range(MODULE, MODULE_SIZE as usize, None)?;
    memory.update(|map| map.insert_region(Arc::new(module)))?;
    wait_for(&counts.moved);
    println!("plugged: the device writes to the module");

    // A slow request holds a guard of the map.
    let request = memory.memory();
    let mut removed = None;
    let retired = memory.update(|map| {
        let (map, region) = map.remove_region(MODULE, MODULE_SIZE)?;
        removed = Some(region);
        Ok::<_, vm_memory::GuestRegionCollectionError>(map)
    })?;
    let error = retired
        .wait(Instant::now() + Duration::from_millis(20))
        .unwrap_err();
    println!("unplugging: {error}");
    drop(request);
    wait_for(&counts.refused);

    // With no readers left, remove the KVM slot, and unmap the region.
    retired.wait(Instant::now() + Duration::from_secs(5))?;
    drop(retired);
    let region = Arc::try_unwrap(removed.ok_or("nothing was removed")?);
    drop(region.map_err(|_| "the region is still in use")?);
    println!("unplugged: the region is unmapped");

    stop.store(true, Ordering::Release);
    thread.join().map_err(|_| "the device panicked")?;
    assert!(counts.moved.load(Ordering::Relaxed) > 0 && counts.refused.load(Ordering::Relaxed) > 0);
    Ok(())
}
