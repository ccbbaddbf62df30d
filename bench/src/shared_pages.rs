//! The memory that the sides share: the pages of the guest, and the buffer of the host.

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use rustix::fs::{memfd_create, MemfdFlags};

/// The size in bytes of the file that contains all guest memory.
pub const GUEST_LEN: usize = 64 << 20;

/// The size of the largest copy in bytes.
pub const HOST_LEN: usize = 16 << 20;

/// The offset of host buffers in their page: a multiple of a cache line. It differs from the offset
/// of guest buffers, so that the loads and stores of a copy do not alias (a distance of 4096
/// bytes).
pub const HOST_OFFSET: usize = 17 * 64;

/// The host buffer of the copies of all sides.
#[derive(Clone)]
pub struct HostBuffer(Rc<RefCell<MmapMut>>);

impl HostBuffer {
    /// Calls `with` on `len` bytes of the buffer.
    pub fn with<R>(&self, len: usize, with: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let mut buffer = self.0.borrow_mut();
        let end = HOST_OFFSET + len;
        let bytes = buffer
            .get_mut(HOST_OFFSET..end)
            .context("the buffer of the host is too small")?;
        Ok(with(bytes))
    }
}

/// The pages that every side maps, so that caches treat all sides alike.
pub struct SharedPages {
    pub file: File,
    pub host: HostBuffer,
}

impl SharedPages {
    pub fn new() -> Result<Self> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).context("memfd_create")?);
        file.set_len(GUEST_LEN as u64)
            .context("cannot set the length of the guest's memory")?;
        let host = MmapMut::map_anon(HOST_LEN + HOST_OFFSET + 64)
            .context("cannot map the buffer of the host")?;
        Ok(Self {
            file,
            host: HostBuffer(Rc::new(RefCell::new(host))),
        })
    }
}
