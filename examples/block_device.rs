//! A block device with io_uring: requests are submitted together and complete in any order. Each
//! request marks its pages when it completes.
//!
//! `cargo run -p examples --example block_device`

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use examples::disk::{self, SECTOR};
use examples::{take_dirty, Memory, Result};
use io_uring::{opcode, types, IoUring};
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, Permissions};

struct Disk {
    ring: IoUring,
    image: File,
    /// The buffers of the requests that are in flight.
    in_flight: HashMap<u64, IoBuffer<Memory>>,
}

impl Disk {
    /// Submits a read from `sector` into `data`.
    #[expect(unsafe_code, reason = "io_uring takes pointers")]
    fn submit(&mut self, id: u64, sector: usize, data: IoBuffer<Memory>) {
        // Store the buffer first: it must stay in place until the request completes.
        let data = self.in_flight.entry(id).or_insert(data);
        let vectors = data.vectors_on_heap();
        let image = types::Fd(self.image.as_raw_fd());
        let read = opcode::Readv::new(image, vectors.as_ptr(), vectors.len() as u32)
            .offset((sector * SECTOR) as u64)
            .build()
            .user_data(id);
        // SAFETY: `in_flight` keeps the buffer, and with it the vectors and mappings, until the
        // kernel has finished. `complete` removes it after that, and `drop` waits for it.
        unsafe { self.ring.submission().push(&read) }.expect("the ring has room for each request");
    }

    /// Waits for `count` requests, and marks their pages. Returns the numbers of those that failed.
    fn complete(&mut self, count: usize) -> Result<Vec<u64>> {
        self.ring.submit_and_wait(count)?;
        let mut failed = Vec::new();
        for completion in self.ring.completion() {
            let (id, result) = (completion.user_data(), completion.result());
            let data = self.in_flight.remove(&id).ok_or("unknown request")?;
            let (read, wanted) = (usize::try_from(result).unwrap_or(0), data.len());
            println!("request {id}: {read} of {wanted} bytes");
            if read != wanted {
                failed.push(id);
            }
            // Marks all pages of the buffer, also after an error or a short count.
            data.complete(read);
        }
        Ok(failed)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The kernel writes to the buffers until their requests complete. If waiting fails, leak
        // them. Their pages are not marked then, so a migration must send all pages.
        if self.ring.submit_and_wait(self.in_flight.len()).is_err() {
            std::mem::forget(std::mem::take(&mut self.in_flight));
        }
    }
}

fn main() -> Result<()> {
    let Ok(ring) = IoUring::new(8) else {
        println!("SKIPPED: io_uring is not available");
        return Ok(());
    };
    let mut disk = Disk {
        ring,
        image: disk::numbered()?,
        in_flight: HashMap::new(),
    };
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10_000)])?);

    // Each request reads two sectors into two pages. The last one passes the end of the disk.
    for (id, sector, addr) in [(0, 0, 0x2f00), (1, 8, 0x5000), (2, 15, 0x8000)] {
        let ranges = [addr, addr + 0x1000].map(|addr| (GuestAddress(addr), SECTOR));
        let data = IoBuffer::from_ranges(&memory, ranges, Permissions::Write)?;
        disk.submit(id, sector, data);
    }
    assert_eq!(disk.complete(3)?, [2]);

    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x6000))?, 9);
    assert_eq!(take_dirty(&memory), [(0x2000, 0x5000), (0x8000, 0x2000)]);
    Ok(())
}
