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

    /// Reserves `len` bytes of addresses, which are not accessible.
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
    ///
    /// # Errors
    ///
    /// Returns an error of mmap(2). The area then ends at `at`. The kernel may have unmapped the
    /// bytes that it should replace, and another thread may have mapped memory there since. If it
    /// kept them, their addresses stay reserved.
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
        // SAFETY: the `len` bytes at `addr` are in this area (just checked). Nobody uses it yet:
        // `self` is borrowed exclusively, and its owner hands out no pointer before it is mapped.
        let result = unsafe { libc::mmap(addr.cast(), len, prot, flags, fd, offset) };
        match result {
            libc::MAP_FAILED => {
                let error = io::Error::last_os_error();
                // Does not wrap: the end of the bytes is in the area.
                self.end_at(at, at.wrapping_add(len));
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Ends the area at `at`, and unmaps its bytes at and after `rest`.
    ///
    /// The bytes between the two are no longer part of the area.
    ///
    /// Ignores an error of munmap(2): the addresses stay reserved.
    fn end_at(&mut self, at: usize, rest: usize) {
        let len = self.len.saturating_sub(rest);
        self.len = self.len.min(at);
        if len == 0 {
            return;
        }
        let addr = self.addr.wrapping_add(rest);
        // SAFETY: `[addr, addr + len)` was the end of this area: this type mapped it and has not
        // unmapped it, and the failed mmap(2) did not concern it. The area no longer has it. Nobody
        // uses it: `self` is borrowed exclusively, and its owner hands out no pointer before all
        // parts are mapped.
        let _ = unsafe { libc::munmap(addr.cast(), len) };
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
        // SAFETY: This type mapped `[addr, addr + len)`, and has not unmapped it since, because
        // `unmap` sets `len` to 0. A part that `replace` may have unmapped is past the end. Each
        // user of the memory borrows or owns the owner of this area, which is being dropped or
        // consumed.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_size::host_page_size;

    /// Returns whether the page at an address is mapped.
    fn is_mapped(addr: *mut u8) -> bool {
        let mut residence = 0u8;
        // SAFETY: mincore(2) writes one byte for one page, and accesses no other memory.
        let result = unsafe { libc::mincore(addr.cast(), 1, &mut residence) };
        result == 0
    }

    /// Makes an area of 4 pages whose second page could not be replaced.
    fn area_cut_at_second_page() -> Area {
        let page = host_page_size().get();
        let mut area = Area::reserved(4 * page).unwrap();
        let file = program();
        let how = (libc::PROT_READ, libc::MAP_SHARED);
        area.replace(0, page, how, &file, 0).unwrap();
        assert_eq!(area.len(), 4 * page);
        // This device cannot be mapped.
        let device = File::open("/dev/null").unwrap();
        area.replace(page, page, how, &device, 0).unwrap_err();
        area
    }

    fn program() -> File {
        File::open("/proc/self/exe").unwrap()
    }

    #[test]
    fn replace_after_error_keeps_only_the_part_before() {
        let page = host_page_size().get();
        let mut area = area_cut_at_second_page();
        assert_eq!(area.len(), page);
        assert!(is_mapped(area.as_ptr()));
        // The area has neither the part that failed nor the bytes after it.
        let file = program();
        let how = (libc::PROT_READ, libc::MAP_SHARED);
        let again = area.replace(page, page, how, &file, 0).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(area.len(), page);
        area.unmap().unwrap();
        assert_eq!(area.len(), 0);
    }

    #[test]
    fn replace_after_error_unmaps_the_rest() {
        let page = host_page_size().get();
        // Another thread may map memory there, but not each time.
        let is_unmapped = || {
            let area = area_cut_at_second_page();
            !is_mapped(area.as_ptr().wrapping_add(3 * page))
        };
        assert!((0..100).any(|_| is_unmapped()));
    }
}
