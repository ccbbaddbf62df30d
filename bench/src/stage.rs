//! What the sides share: the pages of the guest, and the buffer of the host.

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use rustix::fs::{memfd_create, MemfdFlags};

/// All guest memory lies in this many bytes of one file.
pub const GUEST_LEN: usize = 64 << 20;

/// The largest copy.
pub const HOST_LEN: usize = 16 << 20;

/// Where buffers start in a page: on a cache line, and away from where guest buffers start, so that no copy has its loads and
/// stores 4096 bytes apart by accident.
pub const HOST_OFFSET: usize = 17 * 64;

/// The buffer that copies of all sides go to and come from.
#[derive(Clone)]
pub struct HostBuffer(Rc<RefCell<MmapMut>>);

impl HostBuffer {
    /// Hands `len` bytes of the buffer to `with`.
    pub fn with<R>(&self, len: usize, with: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let mut buffer = self.0.borrow_mut();
        let end = HOST_OFFSET + len;
        let bytes = buffer
            .get_mut(HOST_OFFSET..end)
            .context("the buffer of the host is too small")?;
        Ok(with(bytes))
    }
}

/// The pages that every side maps: with the same pages, caches treat them alike.
pub struct Stage {
    pub file: File,
    pub host: HostBuffer,
}

impl Stage {
    pub fn new() -> Result<Self> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).context("memfd_create")?);
        file.set_len(GUEST_LEN as u64)
            .context("cannot set the length of the guest's memory")?;
        let host =
            MmapMut::map_anon(HOST_LEN + HOST_OFFSET + 64).context("no buffer of the host")?;
        Ok(Self {
            file,
            host: HostBuffer(Rc::new(RefCell::new(host))),
        })
    }
}
