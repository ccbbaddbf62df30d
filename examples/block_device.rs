//! A block device with io_uring: requests are submitted together and complete in any order. Each
//! request marks its pages when it completes.
//!
//! `cargo run -p examples --example block_device`

use std::collections::HashMap;
use std::error::Error;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, types, IoUring};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

type Memory = GuestMemoryMmap<AtomicBitmap>;
const SECTOR: u64 = 512;

struct Disk {
    ring: IoUring,
    image: std::fs::File,
    /// For each request that the kernel works on: its data, and the address of its status byte.
    in_flight: HashMap<u64, (IoBuffer<Memory>, GuestAddress)>,
}

impl Disk {
    /// Submits a read of `data`, the writable buffers of a request, from `sector` on.
    #[expect(unsafe_code, reason = "io_uring takes pointers")]
    fn submit(&mut self, id: u64, sector: u64, data: IoBuffer<Memory>, status: GuestAddress) {
        // Stored first: the vectors and the memory must stay in place until the completion.
        let (data, _) = self.in_flight.entry(id).or_insert((data, status));
        let vectors = data.vectors_on_heap();
        let (pointer, count) = (vectors.as_ptr().cast(), vectors.len() as u32);
        let read = opcode::Readv::new(types::Fd(self.image.as_raw_fd()), pointer, count)
            .offset(sector * SECTOR)
            .build()
            .user_data(id);
        // SAFETY: `in_flight` keeps the buffer, and with it vectors and mappings, until the kernel
        // has finished. `complete` removes it after that, and `drop` waits for it.
        unsafe { self.ring.submission().push(&read) }.expect("the ring has room for each request");
    }

    /// Waits for `count` requests, marks the pages of their data, and sets their status bytes.
    fn complete(&mut self, memory: &Memory, count: usize) -> Result<(), Box<dyn Error>> {
        self.ring.submit_and_wait(count)?;
        for completion in self.ring.completion() {
            let (id, result) = (completion.user_data(), completion.result());
            let (data, status) = self.in_flight.remove(&id).ok_or("unknown request")?;
            let wanted = data.len();
            // Marks all of it, also after an error or a short count.
            data.complete(usize::try_from(result).unwrap_or(0));
            memory.write_obj(u8::from(result != wanted as i32), status)?;
            println!("request {id}: {result} of {wanted} bytes");
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The kernel writes to the buffers until their completion. If waiting fails, leak them.
        // Their pages are not marked then: a migration must send all pages.
        if self.ring.submit_and_wait(self.in_flight.len()).is_err() {
            std::mem::forget(std::mem::take(&mut self.in_flight));
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let Ok(ring) = IoUring::new(8) else {
        println!("SKIPPED: io_uring is not available");
        return Ok(());
    };
    let mut image = tempfile::tempfile()?;
    let sectors = (0..16u8).flat_map(|number| [number; SECTOR as usize]);
    image.write_all(&sectors.collect::<Vec<_>>())?;
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10_000)])?);
    let mut disk = Disk {
        ring,
        image,
        in_flight: HashMap::new(),
    };
    // Two good requests, and one that reads past the end of the image.
    for (id, sector, addr) in [(0, 0, 0x2f00), (1, 8, 0x5000), (2, 15, 0x8000)] {
        let mut data = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
        data.push(GuestAddress(addr), 0x200)?;
        data.push(GuestAddress(addr + 0x1000), 0x200)?;
        disk.submit(id, sector, data, GuestAddress(0xf000 + id));
    }
    disk.complete(&memory, 3)?;
    assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0xf000))?, [0, 0, 1]);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x6000))?, 9);
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&*memory);
    let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
    assert_eq!(runs, [(0x2000, 0x5000), (0x8000, 0x2000), (0xf000, 0x1000)]);
    Ok(())
}
