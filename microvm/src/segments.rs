//! The buffers of a request: runs of guest memory, as the descriptors of a chain name them.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

/// Runs of guest memory, in the order of their descriptors.
///
/// A driver may cut a request into descriptors as it likes (section 2.7.4), so header, data and
/// status are taken by bytes and not by descriptors.
#[derive(Debug, Default)]
pub struct Segments {
    /// Address and length of each.
    pub parts: Vec<(GuestAddress, usize)>,
}

impl Segments {
    /// Bytes of all runs.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|p| p.1 as u64).sum()
    }

    /// Takes `count` bytes off the front, if there are as many.
    pub fn take_front(&mut self, count: usize) -> Option<Self> {
        let (mut taken, mut left) = (Self::default(), count);
        while left > 0 {
            let (addr, len) = self.parts.first_mut()?;
            let now = left.min(*len);
            taken.parts.push((*addr, now));
            addr.0 = addr.0.checked_add(now as u64)?;
            *len -= now;
            left -= now;
            if *len == 0 {
                self.parts.remove(0);
            }
        }
        Some(taken)
    }

    /// Takes `count` bytes off the back of the last run, if it is that long.
    pub fn take_back(&mut self, count: usize) -> Option<Self> {
        while self.parts.last().is_some_and(|p| p.1 == 0) {
            self.parts.pop();
        }
        let (addr, len) = self.parts.last_mut()?;
        let rest = len.checked_sub(count)?;
        let at = addr.0.checked_add(rest as u64)?;
        *len = rest;
        Some(Self {
            parts: vec![(GuestAddress(at), count)],
        })
    }

    /// Whether all of it permits the access.
    pub fn accessible<M: GuestMemory>(&self, mem: &M, access: Permissions) -> bool {
        self.parts
            .iter()
            .all(|&(addr, len)| GuestMemory::check_range(mem, addr, len, access))
    }

    /// Checks that all of it permits the access.
    ///
    /// # Errors
    ///
    /// The first run that does not, in words.
    pub fn check<M: GuestMemory>(&self, mem: &M, access: Permissions) -> Result<(), String> {
        let reachable = |&&(addr, len): &&(GuestAddress, usize)| {
            !GuestMemory::check_range(mem, addr, len, access)
        };
        match self.parts.iter().find(reachable) {
            None => Ok(()),
            Some((addr, len)) => Err(format!("{len} bytes at {:#x} are not guest memory", addr.0)),
        }
    }

    /// Copies the first bytes into `to`.
    ///
    /// # Errors
    ///
    /// Those of guest memory.
    pub fn read<M: GuestMemory>(&self, mem: &M, mut to: &mut [u8]) -> Result<(), GuestMemoryError> {
        for &(addr, len) in &self.parts {
            let (now, later) = to.split_at_mut(len.min(to.len()));
            mem.read_slice(now, addr)?;
            to = later;
        }
        Ok(())
    }
}

/// The readable and the writable buffers of a chain. `None` for one that the queue cut off (it
/// loops, or an index or the table leaves its place), and for one with a readable buffer behind a
/// writable one.
pub fn split<M>(chain: DescriptorChain<&M>) -> Option<(Segments, Segments)>
where
    M: GuestMemory,
{
    let (mut readable, mut writable) = (Segments::default(), Segments::default());
    let mut complete = false;
    for descriptor in chain {
        complete = !descriptor.has_next();
        let part = (descriptor.addr(), usize::try_from(descriptor.len()).ok()?);
        if descriptor.is_write_only() {
            writable.parts.push(part);
        } else if writable.parts.is_empty() {
            readable.parts.push(part);
        } else {
            return None;
        }
    }
    complete.then_some((readable, writable))
}
