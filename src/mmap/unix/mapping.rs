//! [`Mapping`]: a mapping that is made, checked against its file, and unmapped.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use super::{MmapRegionError, Result};
use crate::convert::to_u64;
use crate::guest_memory::{FileOffset, Permissions};
use crate::mmap::host_range::HostRange;
use crate::page_size::host_page_size;
use crate::xen::{OnDemand, XenMemory};

/// A mapping of this process, which is unmapped on drop if it is owned.
#[derive(Debug)]
pub(in crate::mmap) struct Mapping {
    host: HostRange,
    owned: bool,
    /// The memory of a Xen guest, which unmaps itself. `owned` is `false` then.
    xen: Option<XenMemory>,
}

impl Mapping {
    /// Maps `size` bytes.
    pub(super) fn new(
        size: usize,
        prot: i32,
        flags: i32,
        file_offset: Option<&FileOffset>,
    ) -> Result<Self> {
        if flags & libc::MAP_FIXED != 0 {
            return Err(MmapRegionError::MapFixed);
        }
        let (fd, offset) = match file_offset {
            // An offset that is too large becomes negative, and mmap(2) refuses it.
            Some(offset) => (offset.file().as_raw_fd(), offset.start().cast_signed()),
            None => (-1, 0),
        };
        // Miri maps anonymous memory only without this flag.
        let flags_of_call = if cfg!(miri) {
            flags & !libc::MAP_NORESERVE
        } else {
            flags
        };
        // SAFETY: without MAP_FIXED, which was refused above, mmap(2) replaces no existing mapping.
        // So this invalidates no memory that is in use.
        let addr = unsafe { libc::mmap(null_mut(), size, prot, flags_of_call, fd, offset) };
        if addr == libc::MAP_FAILED {
            return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
        }
        if addr.is_null() {
            // A process that may map page 0 (CAP_SYS_RAWIO) gets it for `MAP_FIXED_NOREPLACE`.
            // References and pointers of this crate must not be null.
            // SAFETY: the mapping was made above, and no pointer to it has been handed out.
            let _ = unsafe { libc::munmap(addr, size) };
            return Err(MmapRegionError::Mmap(io::Error::from_raw_os_error(
                libc::EINVAL,
            )));
        }
        // Dropping `mapping` unmaps it.
        let mapping = Self {
            host: HostRange::new(addr.cast(), size, permissions_of(prot)),
            owned: true,
            xen: None,
        };
        if let Some(file_offset) = file_offset.filter(|_| flags & libc::MAP_ANONYMOUS == 0) {
            check_file_end(file_offset, size)?;
        }
        Ok(mapping)
    }

    /// Borrows a mapping that was created elsewhere, with a protection that its creator states.
    pub(super) fn borrowed(addr: *mut u8, size: usize, prot: i32) -> Result<Self> {
        if !addr.addr().is_multiple_of(host_page_size().get()) {
            return Err(MmapRegionError::invalid_pointer());
        }
        Ok(Self {
            host: HostRange::new(addr, size, stated_permissions(prot)),
            owned: false,
            xen: None,
        })
    }

    /// Creates a mapping of the memory of a Xen guest, which begins at `addr`.
    ///
    /// `addr` is null if the memory is mapped for each access.
    #[cfg(feature = "xen")]
    pub(super) fn of_xen(memory: XenMemory, size: usize, prot: i32) -> Self {
        let addr = memory.as_ptr();
        let mut host = HostRange::new(addr, size, permissions_of(prot));
        if addr.is_null() {
            host.close();
        }
        Self {
            host,
            owned: false,
            xen: Some(memory),
        }
    }

    /// Returns the memory, if it is mapped for each access.
    pub(in crate::mmap) fn on_demand(&self) -> Option<OnDemand<'_>> {
        self.xen.as_ref().and_then(XenMemory::on_demand)
    }

    /// Returns the host addresses.
    #[inline]
    pub(in crate::mmap) fn host(&self) -> HostRange {
        self.host
    }

    /// Returns whether dropping this value unmaps the memory.
    pub(in crate::mmap) fn is_owned(&self) -> bool {
        self.owned || self.xen.is_some()
    }

    /// Closes the mapping to the fast path.
    pub(in crate::mmap) fn close(&mut self) {
        self.host.close();
    }

    /// Unmaps the memory, if it is owned.
    pub(in crate::mmap) fn unmap(&mut self) -> io::Result<()> {
        if let Some(memory) = &mut self.xen {
            return memory.unmap();
        }
        if !core::mem::take(&mut self.owned) {
            return Ok(());
        }
        let (addr, wanted) = (self.host.addr(), self.host.size());
        let (mut size, mut page) = (wanted, host_page_size().get());
        loop {
            // SAFETY: `[addr, addr + size)` contains this mapping and nothing else. `size` is its
            // size or, after an `EINVAL`, that size in whole huge pages (see below). No slice of it
            // is left: slices borrow the region, which is being dropped or consumed.
            let result = unsafe { libc::munmap(addr.cast(), size) };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // Linux maps whole huge pages, and refuses a length that is not a multiple of their
            // size (mmap(2), "Huge page (Huge TLB) mappings"). The page size is not known
            // here, so larger ones are tried in ascending order. The first length that the kernel
            // accepts is the one that it mapped; every shorter one ends inside the last huge page.
            let larger = page
                .checked_mul(2)
                .and_then(|page| wanted.checked_next_multiple_of(page).map(|s| (page, s)));
            match larger {
                Some((larger_page, rounded))
                    if cfg!(any(target_os = "linux", target_os = "android"))
                        && error.raw_os_error() == Some(libc::EINVAL)
                        && larger_page <= LARGEST_PAGE =>
                {
                    (page, size) = (larger_page, rounded);
                }
                _ => {
                    log_warning!(
                        "cannot unmap {wanted:#x} bytes, whose private pages are freed: {error}"
                    );
                    self.free_pages();
                    return Err(error);
                }
            }
        }
    }

    /// Frees the private pages of an owned mapping that could not be unmapped.
    ///
    /// Shared pages stay: they belong to a file, or a child process may use them.
    ///
    /// munmap(2) fails with `ENOMEM` at `vm.max_map_count`, if the kernel has merged the mapping
    /// with its neighbours: unmapping then splits a VMA. Freeing pages splits none.
    fn free_pages(&self) {
        let (addr, size) = (self.host.addr(), self.host.size());
        // SAFETY: `[addr, addr + size)` is this mapping (see `unmap`), which the kernel extends to
        // whole pages of it. No slice of it is left: slices borrow the region, which is being
        // dropped or consumed. So nothing observes that the bytes are lost.
        let _ = unsafe { libc::madvise(addr.cast(), size, libc::MADV_DONTNEED) };
    }
}

/// The largest page of any architecture: 16 GiB, on aarch64 and powerpc (Linux, "HugeTLB Pages").
const LARGEST_PAGE: usize = 1 << 34;

impl Drop for Mapping {
    fn drop(&mut self) {
        // Drop cannot report the error; `MmapRegion::unmap` does.
        let _ = self.unmap();
    }
}

/// Returns the accesses that a mapping with the protection `prot` permits.
///
/// `PROT_WRITE` permits both: no processor that Linux runs on can write a page without reading it
/// (mmap(2), "NOTES").
fn permissions_of(prot: i32) -> Permissions {
    let has = |bit: i32| prot & bit != 0;
    Permissions::of(
        has(libc::PROT_READ | libc::PROT_WRITE),
        has(libc::PROT_WRITE),
    )
}

/// Returns the accesses to permit for a mapping that was created elsewhere.
///
/// Its creator may not have stated the protection. Then the region refuses nothing, and an access
/// that the mapping does not permit faults.
fn stated_permissions(prot: i32) -> Permissions {
    match permissions_of(prot) {
        Permissions::No => Permissions::ReadWrite,
        stated => stated,
    }
}

/// Returns an error if a regular file ends before the last page of its new mapping.
///
/// It must follow the mmap(2): mapping a file of hugetlbfs extends the file.
fn check_file_end(file_offset: &FileOffset, size: usize) -> Result<()> {
    let Some(file_size) = regular_file_size(file_offset.file()).map_err(MmapRegionError::Mmap)?
    else {
        return Ok(());
    };
    let page = to_u64(host_page_size().get());
    let end = file_offset.start().checked_add(to_u64(size));
    let end = end.ok_or(MmapRegionError::InvalidOffsetLength)?;
    if file_size.div_ceil(page) < end.div_ceil(page) {
        return Err(MmapRegionError::MappingPastEof);
    }
    Ok(())
}

/// Returns the size of a file in bytes, or `None` if it is not a regular file.
///
/// [`File::metadata`] is not used: it makes another system call (`statx`), which seccomp filters
/// may not allow.
fn regular_file_size(file: &File) -> io::Result<Option<u64>> {
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: `stat` is writable and as large as the structure that fstat(2) fills.
    if unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all fields of `stat` are integers, for which zeroes are valid; fstat(2) has
    // overwritten them with other valid values.
    let stat = unsafe { stat.assume_init() };
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(None);
    }
    Ok(u64::try_from(stat.st_size).ok())
}
