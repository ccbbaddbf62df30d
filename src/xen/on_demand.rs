//! [`MmapXen`]: memory that is mapped for each access.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::{invalid, GrantMapping, Inaccessible, OnDemand, References, PAGE_SIZE, REQUEST_PAGES};
use crate::access::fault::Direction;
use crate::page_size::host_page_size;

/// The memory of a region that is mapped for each access, and not in advance.
///
/// Only [`MmapRegion::from_range`](crate::MmapRegion::from_range) creates it. Pass `None` where a
/// parameter has this type.
#[derive(Debug)]
pub struct MmapXen {
    device: Arc<File>,
    domid: u16,
    references: References,
    prot: i32,
    flags: i32,
    /// Whether bytes are copied by the hypervisor where an access need not be atomic.
    copies: bool,
}

/// A part of the memory that is mapped until this value is dropped.
///
/// It borrows nothing: it may outlive the region, and keeps the device open.
#[derive(Debug)]
pub(crate) struct MappedGrants {
    mapping: GrantMapping,
    size: usize,
}

/// Grants that stay mapped until the last clone is dropped.
pub(crate) type SharedGrants = Arc<MappedGrants>;

impl MappedGrants {
    /// Returns the address of the first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Returns the number of bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }
}

impl MmapXen {
    /// Creates the memory of `references`, which the domain `domid` grants.
    ///
    /// Makes no system call, and does not check the references.
    pub(crate) fn new(
        device: Arc<File>,
        domid: u16,
        references: References,
        (prot, flags): (i32, i32),
        copies: bool,
    ) -> Self {
        Self {
            device,
            domid,
            references,
            prot,
            flags,
            copies,
        }
    }

    /// Returns the offset of the byte at `offset` from the start of the first page.
    ///
    /// It has the alignment of the byte. It may wrap, for an offset past the end.
    pub(crate) fn offset_from_first_page(&self, offset: usize) -> usize {
        self.references.page_offset().wrapping_add(offset)
    }

    /// Maps the `len` bytes at an [offset](Self::offset_from_first_page), for an access.
    ///
    /// The guest chooses the length, for example of a buffer that a guard maps. The first request
    /// therefore maps [`TRANSFER_PAGES`], and later ones grow with the number of mapped pages: see
    /// [`GrantMapping::new`].
    ///
    /// # Errors
    ///
    /// - `EACCES` if the protection of the region does not permit the access;
    /// - `EINVAL` if the bytes are not all in the region;
    /// - an error of [`GrantMapping::new`].
    pub(crate) fn map(
        &self,
        at: usize,
        len: usize,
        direction: Direction,
    ) -> io::Result<MappedGrants> {
        self.map_references(self.references.part(at, len)?, direction, TRANSFER_PAGES)
    }

    /// Maps the first of the `len` bytes at an [offset](Self::offset_from_first_page), at least
    /// one, for an access.
    ///
    /// If they cannot be mapped together, maps as many as can be, and also returns the error. A
    /// transfer then moves the bytes before the first page that fails.
    ///
    /// A request takes the kernel time and memory for all its pages before it checks the first
    /// grant. The first request is therefore for at most [`TRANSFER_PAGES`]. The search doubles the
    /// number of pages until a request fails, and then bisects. It takes at most two more mappings
    /// for each bit of the number of pages. The cost is in proportion to the pages that the guest
    /// granted, and not to the length, which the guest chooses.
    ///
    /// # Errors
    ///
    /// Returns the error of the first page.
    pub(crate) fn map_first(
        &self,
        at: usize,
        len: usize,
        max_pages: usize,
        direction: Direction,
    ) -> io::Result<(MappedGrants, Option<io::Error>)> {
        let max_pages = match host_page_size().get() {
            PAGE_SIZE => max_pages.max(1),
            // The bytes of several grants are not contiguous.
            _ => 1,
        };
        let all = self.references.part(at, len)?.in_pages(max_pages);
        let pages = all.pages();
        // The first `works` pages can be mapped together. Once there is an error, the first `fails`
        // cannot.
        let (mut works, mut found) = (0, None);
        let (mut fails, mut error) = (pages.saturating_add(1), None);
        let mut tried = pages.min(TRANSFER_PAGES);
        while works < tried && tried < fails {
            match self.map_references(all.in_pages(tried), direction, REQUEST_PAGES) {
                Ok(grants) => (works, found) = (tried, Some(grants)),
                Err(lower) => (fails, error) = (tried, Some(lower)),
            }
            tried = match error {
                None => works.saturating_mul(2).min(pages),
                Some(_) => works.midpoint(fails),
            };
        }
        match found {
            Some(grants) => Ok((grants, error)),
            // There is at least one page.
            None => Err(error.unwrap_or_else(invalid)),
        }
    }

    /// Returns inaccessible addresses for `len` bytes, whose mapping failed with `error`.
    pub(crate) fn inaccessible(&self, len: usize, error: io::Error) -> Inaccessible {
        Inaccessible::new(len, error)
    }

    /// Returns whether `other` is this memory.
    pub(crate) fn is_same(&self, other: OnDemand<'_>) -> bool {
        core::ptr::eq(self, other)
    }

    fn map_references(
        &self,
        references: References,
        direction: Direction,
        batch: usize,
    ) -> io::Result<MappedGrants> {
        Ok(MappedGrants {
            mapping: GrantMapping::new(
                &self.device,
                self.domid,
                &references,
                (self.prot_for(direction)?, self.flags),
                batch,
            )?,
            size: references.size(),
        })
    }

    /// Returns the protection to map pages with: not more than the access needs.
    fn prot_for(&self, direction: Direction) -> io::Result<i32> {
        let (needed, prot) = match direction {
            Direction::Read => (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ),
            Direction::Write => (libc::PROT_WRITE, libc::PROT_READ | libc::PROT_WRITE),
        };
        match self.prot & needed {
            0 => Err(io::Error::from_raw_os_error(libc::EACCES)),
            _ => Ok(prot),
        }
    }

    pub(super) fn device(&self) -> &File {
        &self.device
    }

    pub(super) fn domid(&self) -> u16 {
        self.domid
    }

    pub(super) fn references(&self) -> &References {
        &self.references
    }

    /// Returns whether the hypervisor copies these bytes.
    ///
    /// It does not copy a value of 1, 2, 4 or 8 bytes that is naturally aligned: such an access
    /// must not be torn.
    pub(crate) fn copies(&self, at: usize, len: usize) -> bool {
        let atomic = matches!(len, 1 | 2 | 4 | 8) && at.is_multiple_of(len);
        self.copies && !atomic
    }

    /// Checks that the protection of the region permits an access.
    pub(super) fn check(&self, direction: Direction) -> io::Result<()> {
        self.prot_for(direction).map(|_| ())
    }
}

/// The maximum number of pages that a transfer maps at once, and that the first request of an
/// access maps.
///
/// That is 1 MiB. The system calls are cheap compared with moving as many bytes, and mappings take
/// entries of a table that the hypervisor limits.
pub(crate) const TRANSFER_PAGES: usize = 256;

const _: () = assert!(TRANSFER_PAGES <= REQUEST_PAGES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::GuestAddress;

    fn memory(prot: i32, copies: bool) -> MmapXen {
        let references = References::of(GuestAddress(1 << 63 | 0x5400), 0x10_0000).unwrap();
        let device = Arc::new(File::open("/dev/null").unwrap());
        MmapXen::new(device, 1, references, (prot, libc::MAP_SHARED), copies)
    }

    const BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

    #[test]
    fn offset_from_first_page_has_alignment_of_guest_address() {
        let memory = memory(BOTH, false);
        assert_eq!(memory.offset_from_first_page(0), 0x400);
        assert_eq!(memory.offset_from_first_page(0xc00), 0x1000);
    }

    #[test]
    fn copies_is_true_for_accesses_that_need_not_be_atomic() {
        let memory = memory(BOTH, true);
        for len in [1, 2, 4, 8] {
            assert!(!memory.copies(0x408, len));
        }
        for (at, len) in [(0x404, 8), (0x401, 2), (0x400, 3), (0x400, 16), (0x402, 4)] {
            assert!(memory.copies(at, len));
        }
        assert!(!self::memory(BOTH, false).copies(0x400, 16));
    }

    #[test]
    fn prot_for_access_is_no_more_than_it_needs() {
        let prot = |region, direction| memory(region, false).prot_for(direction).ok();
        for region in [BOTH, libc::PROT_READ, libc::PROT_WRITE] {
            assert_eq!(prot(region, Direction::Read), Some(libc::PROT_READ));
        }
        assert_eq!(prot(BOTH, Direction::Write), Some(BOTH));
        assert_eq!(prot(libc::PROT_WRITE, Direction::Write), Some(BOTH));
        assert_eq!(prot(libc::PROT_READ, Direction::Write), None);
        assert_eq!(prot(libc::PROT_NONE, Direction::Read), None);
    }

    #[test]
    fn map_of_file_that_is_not_gntdev_returns_error() {
        let memory = memory(BOTH, true);
        let number = |error: io::Error| error.raw_os_error();
        let read = memory.map(0x400, 8, Direction::Read).map(|_| ());
        assert_eq!(read.map_err(number), Err(Some(libc::ENOTTY)));
        let first = memory.map_first(0x400, 0x5000, 256, Direction::Write);
        assert_eq!(first.map(|_| ()).map_err(number), Err(Some(libc::ENOTTY)));
        let copied = memory.copy_to(0x400, &mut [0; 16]).unwrap_err();
        assert_eq!(
            (copied.completed, number(copied.error)),
            (0, Some(libc::ENOTTY))
        );
        // Bytes that are not in the region make no request.
        let outside = memory.map(0x3ff, 1, Direction::Read).map(|_| ());
        assert_eq!(outside.map_err(number), Err(Some(libc::EINVAL)));
    }
}
