//! A network device: receive packets into descriptor chains whose buffers are scattered over guest
//! memory. Each packet takes one `readv(2)`, and marks the pages dirty that it reached.
//!
//! `cargo run -p examples --example net_device`

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use examples::{driver, take_dirty, Memory, Result};
use virtio_queue::{Queue, QueueT};
use vm_memory::vectored::IoBuffer;
use vm_memory::{Bytes, GuestAddress, Permissions};

/// Receives one packet for each chain that the driver has made available.
fn process(queue: &mut Queue, memory: &Arc<Memory>, tap: &UnixDatagram) -> Result<()> {
    // One buffer for all chains: it allocates only for a longer chain than any before.
    let mut buffer = IoBuffer::new(memory, Permissions::Write);
    while let Some(chain) = queue.pop_descriptor_chain(Arc::clone(memory)) {
        let head = chain.head_index();
        let ranges = chain
            .writable()
            .map(|descriptor| (descriptor.addr(), descriptor.len() as usize));
        buffer.clear();
        let received = match buffer.try_extend(ranges) {
            Ok(()) => buffer.read_packet_from(tap)?,
            // A chain that is not in guest memory is the guest's error. The device returns the
            // chain with length 0.
            Err(error) => {
                println!("chain {head}: {error}");
                0
            }
        };
        println!("received {received} bytes");
        queue.add_used(&**memory, head, received as u32)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    // Two adjacent regions, so that one buffer crosses from the first to the second.
    let ranges = [0, 0x10_000].map(|start| (GuestAddress(start), 0x10_000));
    let memory = Arc::new(Memory::from_ranges(&ranges)?);
    let mut queue = Queue::new(16)?;
    queue.try_set_desc_table_address(driver::DESCRIPTORS)?;
    queue.try_set_avail_ring_address(driver::AVAILABLE)?;
    queue.try_set_used_ring_address(driver::USED)?;
    queue.set_ready(true);

    // The driver offers buffers of 12, 512 and 1536 bytes, and a packet arrives.
    driver::offer(&memory, &[(0x5000, 12), (0xff00, 0x200), (0x1_8000, 0x600)])?;
    let (wire, tap) = UnixDatagram::pair()?;
    let packet: Vec<u8> = (0..=255).cycle().take(12 + 0x200 + 100).collect();
    wire.send(&packet)?;

    take_dirty(&memory);
    process(&mut queue, &memory, &tap)?;

    let mut tail = [0; 100];
    memory.read_slice(&mut tail, GuestAddress(0x1_8000))?;
    assert_eq!(tail[..], packet[12 + 0x200..]);
    // The used ring, and the pages that the packet reached. A run ends where its region ends.
    let dirty = take_dirty(&memory);
    println!("dirty: {dirty:x?}");
    let starts = dirty.iter().map(|(start, _)| *start);
    assert!(starts.eq([0x3000, 0x5000, 0xf000, 0x1_0000, 0x1_8000]));
    Ok(())
}
