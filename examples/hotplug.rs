//! Hotplug: change the memory map while device threads use it, and unmap a region once no thread
//! uses the old map.
//!
//! `cargo run -p examples --example hotplug`

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use examples::{wait_for_change, Result};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};

type Memory = GuestMemoryMmap<()>;

/// The memory module that is plugged and unplugged.
const MODULE: GuestAddress = GuestAddress(1 << 32);
const MODULE_SIZE: usize = 1 << 20;

/// A device that writes to the module as often as it can, and counts the results.
#[derive(Default)]
struct Device {
    stop: AtomicBool,
    written: AtomicU64,
    refused: AtomicU64,
}

impl Device {
    fn run(&self, memory: &GuestMemoryAtomic<Memory>) {
        // `memory.memory()` would increment a reference count for each request. A reader does not.
        let mut reader = memory.reader();
        while !self.stop.load(Ordering::Acquire) {
            // The map stays the same for the whole request.
            let count = match reader.memory().write_obj(1u8, MODULE) {
                Ok(()) => &self.written,
                Err(_) => &self.refused,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
        // Before the thread sleeps or ends, it releases the map that it used last.
        reader.release();
    }
}

/// Plugs and unplugs the module while `device` runs.
fn plug_and_unplug(memory: &GuestMemoryAtomic<Memory>, device: &Device) -> Result<()> {
    wait_for_change(&device.refused);

    // Plug: map the region, add its KVM slot, and publish the region to the devices.
    let module = Arc::new(GuestRegionMmap::from_range(MODULE, MODULE_SIZE, None)?);
    memory.update(|map| map.insert_region(Arc::clone(&module)))?;
    wait_for_change(&device.written);
    println!("plugged: the device writes to the module");

    // Unplug: publish a map without the region. A slow request still uses the old map.
    let request = memory.memory();
    let without = |map: &Memory| {
        map.remove_region(MODULE, MODULE_SIZE as u64)
            .map(|(map, _)| map)
    };
    let retired = memory.update(without)?;
    wait_for_change(&device.refused);
    let soon = Instant::now() + Duration::from_millis(20);
    println!("unplugging: {}", retired.wait(soon).unwrap_err());

    // The request ends. Now remove the KVM slot, and drop the region, which unmaps it.
    drop(request);
    retired.wait(Instant::now() + Duration::from_secs(5))?;
    drop(retired);
    assert_eq!(Arc::strong_count(&module), 1);
    drop(module);
    println!("unplugged: the region is unmapped");
    Ok(())
}

fn main() -> Result<()> {
    let boot = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let memory = GuestMemoryAtomic::new(boot);
    let device = Device::default();
    thread::scope(|scope| {
        scope.spawn(|| device.run(&memory));
        let result = plug_and_unplug(&memory, &device);
        device.stop.store(true, Ordering::Release);
        result
    })
}
