//! The driver of a virtio queue, in the guest.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::Memory;

/// The table of descriptors.
pub const DESCRIPTORS: GuestAddress = GuestAddress(0x1000);
/// The ring of chains that the driver makes available.
pub const AVAILABLE: GuestAddress = GuestAddress(0x2000);
/// The ring of chains that the device has used.
pub const USED: GuestAddress = GuestAddress(0x3000);

const DESCRIPTOR_SIZE: u64 = 16;
/// The descriptor continues in the one that its last field names.
const NEXT: u16 = 1;
/// The device writes to the buffer.
const WRITE: u16 = 2;

/// Makes one chain of buffers available, to which the device may write. Each buffer is an address
/// and a length.
///
/// # Errors
///
/// Returns an error if the queue is not in guest memory.
pub fn offer(memory: &Memory, buffers: &[(u64, u32)]) -> Result<(), GuestMemoryError> {
    for (index, (addr, len)) in (0u16..).zip(buffers) {
        let is_last = usize::from(index) + 1 == buffers.len();
        let flags = if is_last { WRITE } else { WRITE | NEXT };
        let descriptor = DESCRIPTORS.0 + DESCRIPTOR_SIZE * u64::from(index);
        memory.write_obj(*addr, GuestAddress(descriptor))?;
        memory.write_obj(*len, GuestAddress(descriptor + 8))?;
        memory.write_obj(flags, GuestAddress(descriptor + 12))?;
        memory.write_obj(index + 1, GuestAddress(descriptor + 14))?;
    }
    // The first entry of the ring names the first descriptor. The ring has one entry.
    memory.write_obj(0u16, GuestAddress(AVAILABLE.0 + 4))?;
    memory.write_obj(1u16, GuestAddress(AVAILABLE.0 + 2))
}
