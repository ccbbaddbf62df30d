//! A virtqueue in windows: the device resolves its rings once, and again only when memory changed.
//!
//! `cargo run -p examples --example virtqueue`

use std::sync::{atomic::Ordering, Arc};

use examples::driver::{AVAILABLE, DESCRIPTORS, USED};
use examples::{Memory, Result};
use vm_memory::{
    guest_memory::Window, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
    GuestMemoryResult, GuestRegionMmap, Permissions,
};

/// The number of descriptors.
const SIZE: u16 = 16;

/// The three parts of a split virtqueue (virtio 1.2, section 2.7), which the device keeps.
struct Queue {
    descriptors: Window<'static, Memory>,
    available: Window<'static, Memory>,
    used: Window<'static, Memory>,
    next_available: u16,
    next_used: u16,
}

impl Queue {
    fn new(memory: &GuestMemoryAtomic<Memory>) -> GuestMemoryResult<Self> {
        let size = usize::from(SIZE);
        Ok(Self {
            descriptors: memory.window(DESCRIPTORS, 16 * size, Permissions::Read)?,
            available: memory.window(AVAILABLE, 6 + 2 * size, Permissions::Read)?,
            used: memory.window(USED, 6 + 8 * size, Permissions::ReadWrite)?,
            next_available: 0,
            next_used: 0,
        })
    }

    /// Resolves the rings again, if the map or the IOTLB has changed.
    fn refresh(&mut self) -> GuestMemoryResult<()> {
        for window in [&mut self.descriptors, &mut self.available, &mut self.used] {
            if !window.is_current() {
                println!("the ring at {:#x} is resolved again", window.addr().0);
                window.refresh()?;
            }
        }
        Ok(())
    }

    /// Takes the next chain: the number, address and length of its first descriptor.
    fn take(&mut self) -> GuestMemoryResult<Option<(u16, GuestAddress, usize)>> {
        let index: u16 = self.available.load(2, Ordering::Acquire)?;
        // A hostile driver may claim more chains than the queue has.
        if !(1..=SIZE).contains(&index.wrapping_sub(self.next_available)) {
            return Ok(None);
        }
        let entry = 4 + 2 * usize::from(self.next_available % SIZE);
        let head: u16 = self.available.read_obj(entry)?;
        // A number from a hostile driver may be too large. Then this returns an error.
        let [addr, rest]: [u64; 2] = self.descriptors.read_obj(16 * usize::from(head))?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some((head, GuestAddress(addr), rest as u32 as usize)))
    }

    /// Returns a chain to the driver. Each write marks its page dirty.
    fn add_used(&mut self, head: u16, len: u32) -> GuestMemoryResult<()> {
        let entry = 4 + 8 * usize::from(self.next_used % SIZE);
        self.used.write_obj([u32::from(head), len], entry)?;
        self.next_used = self.next_used.wrapping_add(1);
        self.used.store(self.next_used, 2, Ordering::Release)
    }
}

/// The driver offers a buffer of any length. The device fills it with zeroes in place.
fn serve(memory: &GuestMemoryAtomic<Memory>, queue: &mut Queue, buffer: u64) -> Result<()> {
    let map = memory.memory();
    map.write_obj([buffer, 64], DESCRIPTORS)?;
    let index = queue.next_available.wrapping_add(1);
    map.write_obj(index, GuestAddress(AVAILABLE.0 + 2))?;
    queue.refresh()?;
    while let Some((head, addr, len)) = queue.take()? {
        for slice in GuestMemory::get_slices(&*map, addr, len, Permissions::Write)? {
            slice?.fill_with_byte(0)?;
        }
        queue.add_used(head, len as u32)?;
    }
    let used: u16 = map.read_obj(GuestAddress(USED.0 + 2))?;
    assert_eq!(used, queue.next_used, "buffer at {buffer:#x}");
    Ok(())
}

fn main() -> Result<()> {
    let memory = GuestMemoryAtomic::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 16)])?);
    let mut queue = Queue::new(&memory)?;
    serve(&memory, &mut queue, 0x8000)?;
    // The guest gets more memory, and the next buffer is there.
    let module = GuestRegionMmap::from_range(GuestAddress(1 << 32), 1 << 16, None)?;
    memory.update(|map| map.insert_region(Arc::new(module)))?;
    assert!(!queue.used.is_current());
    serve(&memory, &mut queue, 1 << 32)
}
