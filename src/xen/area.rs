//! [`Area`]: addresses of this process that are unmapped on drop.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use super::invalid;

/// Addresses of this process, which are unmapped on drop.
#[derive(Debug)]
pub(crate) struct Area {
    addr: *mut u8,
    /// The length in bytes. 0 after it was unmapped.
    len: usize,
}

// SAFETY: the pointer is not tied to a thread, and `Area` does not dereference it.
unsafe impl Send for Area {}
// SAFETY: no field can be changed through `&Area`, and the pointer is handed out by value only.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `len` bytes of a device.
    pub(super) fn of_device(
        device: &File,
        len: usize,
        prot: i32,
        flags: i32,
        offset: u64,
    ) -> io::Result<Self> {
        if flags & libc::MAP_FIXED != 0 {
            return Err(invalid());
        }
        let (fd, offset) = (device.as_raw_fd(), file_offset(offset)?);
        // SAFETY: without MAP_FIXED, which was refused above, mmap(2) replaces no existing mapping.
        // So this invalidates no memory that is in use.
        let addr = unsafe { libc::mmap(null_mut(), len, prot, flags, fd, offset) };
        Self::of_result(addr, len)
    }

    /// Takes `len` bytes of addresses that are not accessible.
    pub(crate) fn reserved(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED, mmap(2) replaces no existing mapping. So this invalidates no
        // memory that is in use.
        let addr = unsafe { libc::mmap(null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        Self::of_result(addr, len)
    }

    fn of_result(addr: *mut libc::c_void, len: usize) -> io::Result<Self> {
        match addr {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            addr => Ok(Self {
                addr: addr.cast(),
                len,
            }),
        }
    }

    /// Maps `len` bytes of a device over those at `at`, which were reserved.
    pub(super) fn replace(
        &mut self,
        at: usize,
        len: usize,
        (prot, flags): (i32, i32),
        device: &File,
        offset: u64,
    ) -> io::Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid());
        }
        let (fd, offset) = (device.as_raw_fd(), file_offset(offset)?);
        let (addr, flags) = (self.addr.wrapping_add(at), flags | libc::MAP_FIXED);
        // SAFETY: the `len` bytes at `addr` are in this area (just checked), which nobody uses yet:
        // `self` is borrowed exclusively, and its owner hands out no pointer before it is mapped.
        let result = unsafe { libc::mmap(addr.cast(), len, prot, flags, fd, offset) };
        match result {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.addr
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Unmaps the addresses, once.
    pub(super) fn unmap(&mut self) -> io::Result<()> {
        let len = core::mem::take(&mut self.len);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: `[addr, addr + len)` was mapped by this type and not unmapped since: `len` is 0
        // after that. Who uses the memory borrows or owns the owner of this area, which is being
        // dropped or consumed.
        match unsafe { libc::munmap(self.addr.cast(), len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // Drop cannot report the error; `MmapRegion::unmap` does.
        let _ = self.unmap();
    }
}

/// Converts an offset to the kernel's type.
fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| invalid())
}
