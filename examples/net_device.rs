//! A network device: receive packets into descriptor chains whose buffers are scattered over guest
//! memory. Each packet takes one `readv(2)`, and marks the pages dirty that it reached.
//!
//! `cargo run -p examples --example net_device`

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// The driver's side: makes one chain of writable buffers available.
fn offer(memory: &Memory, buffers: &[(u64, u32)]) -> Result<(), Box<dyn Error>> {
    let (next, write) = (1u16, 2u16);
    for (index, (addr, len)) in buffers.iter().enumerate() {
        let last = index + 1 == buffers.len();
        let flags = if last { write } else { write | next };
        let descriptor = GuestAddress(DESCRIPTORS + 16 * index as u64);
        memory.write_obj(*addr, descriptor)?;
        memory.write_obj(*len, GuestAddress(descriptor.0 + 8))?;
        memory.write_obj(flags, GuestAddress(descriptor.0 + 12))?;
        memory.write_obj(index as u16 + 1, GuestAddress(descriptor.0 + 14))?;
    }
    memory.write_obj(0u16, GuestAddress(AVAILABLE + 4))?; // head of the chain
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2))?; // index of the ring
    Ok(())
}

/// Receives one packet into `buffer`; marks the pages that it reached, and returns its length.
#[expect(unsafe_code, reason = "readv(2) takes pointers")]
fn receive(fd: RawFd, mut buffer: IoBuffer<Memory>) -> io::Result<usize> {
    let vectors = buffer.vectors();
    // An `IoBuffer` has no more than `MAX_VECTORS` segments.
    let count = vectors.len() as i32;
    // SAFETY: an `IoVector` is an `iovec`. `buffer` keeps the memory mapped until after the call,
    // and no Rust reference to that memory exists.
    let received = unsafe { libc::readv(fd, vectors.as_ptr().cast(), count) };
    // On an error, the buffer is dropped, which marks all of it.
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // The kernel copies a datagram whole, and nothing after it: the rest needs no marks.
    if let Some(rest) = buffer.split_off(received) {
        rest.cancel();
    }
    Ok(buffer.complete(received))
}

fn main() -> Result<(), Box<dyn Error>> {
    // Two regions, so that one buffer crosses from the first to the second.
    let ranges = [0, 0x10_000].map(|start| (GuestAddress(start), 0x10_000));
    let memory = Arc::new(Memory::from_ranges(&ranges)?);
    let (wire, tap) = UnixDatagram::pair()?;

    let mut queue = Queue::new(16)?;
    queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
    queue.try_set_used_ring_address(GuestAddress(USED))?;
    queue.set_ready(true);
    offer(&memory, &[(0x5000, 12), (0xff00, 0x200), (0x1_8000, 0x600)])?;

    let mut dirty = DirtyMemory::new();
    dirty.harvest(&*memory);
    dirty.clear();

    let packet: Vec<u8> = (0..0x300u32).map(|byte| (byte % 251) as u8).collect();
    wire.send(&packet)?;

    // The device. It returns a chain that does not lie in guest memory with length 0.
    while let Some(chain) = queue.pop_descriptor_chain(Arc::clone(&memory)) {
        let head = chain.head_index();
        let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Write);
        let pushed: Result<(), _> = chain
            .writable()
            .try_for_each(|part| buffer.push(part.addr(), part.len() as usize));
        let segments = buffer.vectors().len();
        let written = pushed.map_or(0, |()| receive(tap.as_raw_fd(), buffer).unwrap_or(0));
        println!("{written} bytes in {segments} segments");
        queue.add_used(&*memory, head, u32::try_from(written)?)?;
    }

    let mut tail = [0; 0x300 - 12 - 0x200];
    memory.read_slice(&mut tail, GuestAddress(0x1_8000))?;
    assert_eq!(tail[..], packet[12 + 0x200..]);
    dirty.harvest(&*memory);
    let runs: Vec<_> = dirty.runs().map(|(start, len)| (start.0, len)).collect();
    println!("dirty: {runs:x?}"); // the used ring, and the pages that the packet reached
    assert_eq!(runs.iter().map(|run| run.1).sum::<usize>(), 5 * 0x1000);
    Ok(())
}
