//! [`GrantMapping`]: granted pages that are mapped.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::area::Area;
use super::devices::{map_grants, unmap_grants};
use super::{invalid, References, PAGE_SIZE, REQUEST_PAGES};
use crate::page_size::host_page_size;

/// Granted pages that are mapped until this value is dropped.
///
/// It keeps the device open. The fields are dropped in the order of their declaration: munmap(2)
/// first, then the entries.
#[derive(Debug)]
pub(crate) struct GrantMapping {
    area: Area,
    first: Entry,
    /// The entries of the requests after the first.
    rest: Vec<Entry>,
    page_offset: usize,
}

/// An entry in the table of gntdev, which is removed on drop.
///
/// On an auto-translated host (Arm, PVH), a grant stays mapped in the hypervisor while its entry
/// exists. That holds even if mmap(2) has failed.
#[derive(Debug)]
struct Entry {
    device: Arc<File>,
    index: u64,
    /// The number of grants. 0 after the entry was removed.
    count: u32,
}

impl Entry {
    fn new(device: &Arc<File>, domid: u16, first: u32, pages: usize) -> io::Result<Self> {
        let count = u32::try_from(pages).map_err(|_| invalid())?;
        Ok(Self {
            index: map_grants(device, domid, first, count)?,
            device: Arc::clone(device),
            count,
        })
    }

    /// Removes the entry, once.
    fn remove(&mut self) -> io::Result<()> {
        match core::mem::take(&mut self.count) {
            0 => Ok(()),
            count => unmap_grants(&self.device, self.index, count),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Drop cannot report the error; `MmapRegion::unmap` does.
        let _ = self.remove();
    }
}

impl GrantMapping {
    /// Maps the pages of `references`, which the domain `domid` granted.
    ///
    /// `prot` and `flags` are those of mmap(2). The first request is for at most `batch` pages, and
    /// at least one. Each further request is for at most as many pages as are mapped so far, and at
    /// most 65536. So the pages of the failed request are in proportion to those that could be
    /// mapped. A request takes two system calls. To remove the mapping takes one system call, and
    /// one for each request.
    ///
    /// # Errors
    ///
    /// - `EINVAL` if a page is not granted, or not for writing, or if the domain is gone;
    /// - `EOPNOTSUPP` for several pages, where the host's pages are not those of Xen;
    /// - another error of ioctl(2) or mmap(2).
    pub(crate) fn new(
        device: &Arc<File>,
        domid: u16,
        references: &References,
        (prot, flags): (i32, i32),
        batch: usize,
    ) -> io::Result<Self> {
        let pages = references.pages();
        let page_size = host_page_size().get();
        // Each grant takes a page of the host, so its bytes would not be contiguous.
        if pages > 1 && page_size != PAGE_SIZE {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let len = pages.checked_mul(page_size).ok_or_else(invalid)?;
        let few = pages.min(REQUEST_PAGES).min(batch.max(1));
        if few == pages {
            let first = Entry::new(device, domid, references.first(), pages)?;
            let area = Area::of_device(device, len, prot, flags, first.index)?;
            return Ok(Self {
                area,
                first,
                rest: Vec::new(),
                page_offset: references.page_offset(),
            });
        }
        let area = Area::reserved(len)?;
        let mut mapping = Self {
            area,
            first: Entry::new(device, domid, references.first(), few)?,
            rest: Vec::new(),
            page_offset: references.page_offset(),
        };
        let index = mapping.first.index;
        let len = few.saturating_mul(page_size);
        mapping.area.replace(0, len, (prot, flags), device, index)?;
        let mut done = few;
        while done < pages {
            let count = REQUEST_PAGES.min(done).min(pages.saturating_sub(done));
            // Neither wraps: the references of all pages have 32 bits.
            let at = u32::try_from(done).map_err(|_| invalid())?;
            let reference = references.first().wrapping_add(at);
            let entry = Entry::new(device, domid, reference, count)?;
            let index = entry.index;
            mapping.rest.push(entry);
            let (at, len) = (
                done.saturating_mul(page_size),
                count.saturating_mul(page_size),
            );
            mapping
                .area
                .replace(at, len, (prot, flags), device, index)?;
            done = done.saturating_add(count);
        }
        Ok(mapping)
    }

    /// Returns the address of the first byte of the range.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.area.as_ptr().wrapping_add(self.page_offset)
    }

    /// Unmaps the pages, and returns the first error that dropping the value would ignore.
    ///
    /// Afterwards, dropping it does nothing.
    pub(crate) fn unmap(&mut self) -> io::Result<()> {
        let mut result = self.area.unmap();
        for entry in std::iter::once(&mut self.first).chain(&mut self.rest) {
            result = result.and(entry.remove());
        }
        result
    }
}
