//! The buffers of a request: the guest memory segments in a descriptor chain.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

/// Segments of guest memory, in the order of their descriptors.
///
/// A driver may split a request into descriptors anywhere (virtio 1.2, section 2.7.4). Header, data
/// and status are therefore taken by their length in bytes.
#[derive(Debug, Default)]
pub struct Segments(Vec<(GuestAddress, usize)>);

impl Segments {
    /// Returns the address and the length of each segment.
    pub fn iter(&self) -> impl Iterator<Item = &(GuestAddress, usize)> + Clone {
        self.0.iter()
    }

    /// Returns the number of bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|&(_, len)| len as u64).sum()
    }

    /// Removes the first `count` bytes. Returns `None` if there are fewer.
    pub fn take_front(&mut self, count: usize) -> Option<Self> {
        let (mut taken, mut missing) = (Self::default(), count);
        while missing > 0 {
            let (addr, len) = self.0.first_mut()?;
            let now = missing.min(*len);
            taken.0.push((*addr, now));
            addr.0 = addr.0.checked_add(now as u64)?;
            *len -= now;
            missing -= now;
            if *len == 0 {
                self.0.remove(0);
            }
        }
        Some(taken)
    }

    /// Removes the last byte and returns its address.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        while self.0.last().is_some_and(|&(_, len)| len == 0) {
            self.0.pop();
        }
        let (addr, len) = self.0.last_mut()?;
        *len -= 1;
        addr.0.checked_add(*len as u64).map(GuestAddress)
    }

    /// Checks that all segments are guest memory and permit the access.
    ///
    /// # Errors
    ///
    /// Returns a description of the first segment that fails the check.
    pub fn check(&self, memory: &impl GuestMemory, access: Permissions) -> Result<(), String> {
        let refused = |&&(addr, len): &&_| !GuestMemory::check_range(memory, addr, len, access);
        self.iter().find(refused).map_or(Ok(()), |(addr, len)| {
            let addr = addr.0;
            Err(format!(
                "{len} bytes at {addr:#x} are not guest memory that permits the access"
            ))
        })
    }

    /// Copies the first bytes to `to`.
    ///
    /// # Errors
    ///
    /// Returns an error if a segment cannot be read.
    pub fn read(&self, memory: &impl GuestMemory, to: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = to;
        for &(addr, len) in self.iter() {
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            memory.read_slice(now, addr)?;
            rest = later;
        }
        Ok(())
    }
}

/// Returns the readable and the writable segments of a chain.
///
/// Returns `None` if the chain loops, its descriptors cannot be read, or a readable descriptor
/// follows a writable one.
pub fn split<M: GuestMemory>(chain: DescriptorChain<&M>) -> Option<(Segments, Segments)> {
    let (mut readable, mut writable) = (Segments::default(), Segments::default());
    let mut complete = false;
    for descriptor in chain {
        complete = !descriptor.has_next();
        let segment = (descriptor.addr(), descriptor.len() as usize);
        if descriptor.is_write_only() {
            writable.0.push(segment);
        } else if writable.0.is_empty() {
            readable.0.push(segment);
        } else {
            return None;
        }
    }
    complete.then_some((readable, writable))
}
