//! The other side of the examples: a kernel, the guest and its driver, device threads, a disk, and
//! the front end of an IOMMU. An example can be read without these modules.

// # Layers
//
// ```text
// device, disk, driver, front_end, kernel, vcpu
// guest
// ```
pub mod device;
pub mod disk;
pub mod driver;
pub mod front_end;
pub mod guest;
pub mod kernel;
mod vcpu;

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory that records the pages that are written.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A result whose error the example prints before it ends.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Returns the ranges that were written since the last call, and clears their marks.
pub fn take_dirty(memory: &Memory) -> Vec<(u64, usize)> {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(memory);
    dirty.runs().map(|(start, len)| (start.0, len)).collect()
}

/// Returns the bytes of all regions.
///
/// # Errors
///
/// Returns an error if a region cannot be read.
pub fn contents(memory: &Memory) -> Result<Vec<u8>> {
    let mut contents = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory.read_slice(&mut bytes, region.start_addr())?;
        contents.append(&mut bytes);
    }
    Ok(contents)
}

/// Waits until another thread changes `count`.
pub fn wait_for_change(count: &AtomicU64) {
    let before = count.load(Ordering::Relaxed);
    while count.load(Ordering::Relaxed) == before {
        thread::yield_now();
    }
}
