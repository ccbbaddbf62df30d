//! A balloon: while the guest runs, return the pages that it lists to the host system.
//!
//! `cargo run -p examples --example balloon`

use std::sync::Arc;

use examples::{take_dirty, Memory, Result};
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, Permissions};
use vm_memory_host::{residency, Balloon, DiscardReport, MemoryBuilder, Region};

/// The size of the pages that a balloon lists, whatever the page size of the guest.
const PAGE: u64 = 0x1000;
/// The maximum length of a request. The driver of Linux lists up to 256 pages at a time.
const MAX_LEN: usize = 1 << 16;

/// A balloon device whose driver has accepted `VIRTIO_BALLOON_F_MUST_TELL_HOST`.
struct Device {
    memory: Arc<Memory>,
    balloon: Balloon,
}

impl Device {
    /// Reads the page numbers in a request of the driver, which may have any descriptors.
    fn page_numbers(&self, request: &[(GuestAddress, usize)]) -> Result<Vec<u32>> {
        let ranges = request.iter().copied();
        let request = IoBuffer::from_ranges(&self.memory, ranges, Permissions::Read)?;
        let mut bytes = vec![0; request.len().min(MAX_LEN)];
        request.copy_to(0, &mut bytes)?;
        let (pages, _) = bytes.as_chunks();
        Ok(pages.iter().map(|page| u32::from_le_bytes(*page)).collect())
    }

    /// Handles a buffer of the inflate queue. The caller returns the buffer afterwards.
    fn inflate(&mut self, request: &[(GuestAddress, usize)]) -> Result<DiscardReport> {
        let pages = self.page_numbers(request)?;
        Ok(self.balloon.inflate(&*self.memory, pages))
    }

    /// Handles a buffer of the deflate queue. The caller returns the buffer afterwards.
    fn deflate(&mut self, request: &[(GuestAddress, usize)]) -> Result<()> {
        let pages = self.page_numbers(request)?;
        self.balloon.deflate(&*self.memory, pages);
        Ok(())
    }

    /// Returns the number of bytes of guest memory that are resident.
    fn resident(&self) -> Result<u64> {
        let regions = residency(&*self.memory)?;
        Ok(regions.iter().map(|(_, region)| region.resident).sum())
    }
}

/// Writes page numbers to guest memory as the driver does, and returns their length in bytes.
fn list(memory: &Memory, addr: GuestAddress, pages: &[u32]) -> Result<usize> {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    memory.write_slice(&bytes, addr)?;
    Ok(bytes.len())
}

fn main() -> Result<()> {
    let ram = Region::new(GuestAddress(0), 16 << 20);
    let mut device = Device {
        memory: Arc::new(MemoryBuilder::new().region(ram).build()?),
        balloon: Balloon::new(),
    };

    // The guest uses 8 MiB.
    let buffer = GuestAddress(0x1000);
    let bytes = vec![1; 8 << 20];
    device.memory.write_slice(&bytes, GuestAddress(0))?;
    let before = device.resident()?;

    // It returns 4 MiB, in any order. It also lists a page twice, and one outside its RAM.
    let mut pages: Vec<u32> = (0x400..0x800).rev().collect();
    pages.extend([0x400, 0xf_0000]);
    let len = list(&device.memory, buffer, &pages)?;
    take_dirty(&device.memory);
    // The request has two descriptors. A page number begins in the first one.
    let rest = (GuestAddress(buffer.0 + 7), len - 7);
    let report = device.inflate(&[(buffer, 7), rest])?;
    println!("{report}");
    assert_eq!((report.discarded, report.refused), (0x400, 1));

    let after = device.resident()?;
    println!("resident: {before} before, {after} after");
    assert_eq!(before - after, report.freed);

    // The pages read as zeroes. A migration must send them again, so they are dirty.
    let first = GuestAddress(0x400 * PAGE);
    assert_eq!(device.memory.read_obj::<u64>(first)?, 0);
    assert_eq!(take_dirty(&device.memory), [(first.0, 4 << 20)]);

    // The guest takes a page back, and uses it.
    let len = list(&device.memory, buffer, &[0x400])?;
    device.deflate(&[(buffer, len)])?;
    device.memory.write_obj(1u64, first)?;
    assert_eq!(device.resident()?, after + PAGE);
    Ok(())
}
