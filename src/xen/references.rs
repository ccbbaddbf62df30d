//! [`References`]: the grant references that a range of guest addresses names.

use std::io;

use super::{invalid, PAGE_SHIFT, PAGE_SIZE};
use crate::address::GuestAddress;
use crate::convert::{to_u64, to_usize};

/// The bit of a guest address that names a grant (Linux, `XEN_GRANT_DMA_ADDR_OFF`).
const GRANT_BIT: u64 = 1 << 63;

/// The first address past those of all references, which have 32 bits.
const END: u64 = 1 << (32 + PAGE_SHIFT);

/// A range of bytes in pages with consecutive grant references.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct References {
    /// The reference of the first page.
    first: u32,
    /// The offset of the first byte in the first page.
    page_offset: usize,
    /// The number of bytes.
    size: usize,
}

impl References {
    /// Returns the references of the `size` bytes at `addr`.
    ///
    /// A guest address is `1 << 63 | reference << 12 | offset in the page`.
    ///
    /// # Errors
    ///
    /// Returns `EINVAL` if there are no bytes, the address does not name a grant, or a reference
    /// does not fit its 32 bits.
    pub(crate) fn of(addr: GuestAddress, size: usize) -> io::Result<Self> {
        let start = addr.0.checked_sub(GRANT_BIT).ok_or_else(invalid)?;
        let end = start.checked_add(to_u64(size)).filter(|end| *end <= END);
        if size == 0 || end.is_none() {
            return Err(invalid());
        }
        Ok(Self {
            first: u32::try_from(start >> PAGE_SHIFT).map_err(|_| invalid())?,
            page_offset: to_usize(start & to_u64(PAGE_SIZE - 1)),
            size,
        })
    }

    /// Returns the references of the `size` bytes that begin `at` bytes after the start of the
    /// first page.
    ///
    /// # Errors
    ///
    /// Returns `EINVAL` if they are not in the range, or if there are none.
    pub(crate) fn part(&self, at: usize, size: usize) -> io::Result<Self> {
        let offset = at.checked_sub(self.page_offset);
        let end = offset.and_then(|offset| offset.checked_add(size));
        if size == 0 || end.is_none_or(|end| end > self.size) {
            return Err(invalid());
        }
        let page = u32::try_from(at >> PAGE_SHIFT).map_err(|_| invalid())?;
        Ok(Self {
            first: self.first.checked_add(page).ok_or_else(invalid)?,
            page_offset: at & (PAGE_SIZE - 1),
            size,
        })
    }

    /// Returns the first bytes of the range, which are in its first `pages` pages.
    pub(crate) fn in_pages(&self, pages: usize) -> Self {
        let end = pages.saturating_mul(PAGE_SIZE);
        Self {
            size: self.size.min(end.saturating_sub(self.page_offset)),
            ..*self
        }
    }

    /// Returns the reference of the first page.
    pub(crate) fn first(&self) -> u32 {
        self.first
    }

    /// Returns the offset of the first byte in the first page.
    pub(crate) fn page_offset(&self) -> usize {
        self.page_offset
    }

    /// Returns the number of bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> usize {
        // The sum does not saturate: `of` checked that the range ends below 2^44.
        self.page_offset
            .saturating_add(self.size)
            .div_ceil(PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(addr: u64, size: usize) -> Option<(u32, usize, usize)> {
        let references = References::of(GuestAddress(addr), size).ok()?;
        assert_eq!(references.size(), size);
        Some((
            references.first(),
            references.page_offset(),
            references.pages(),
        ))
    }

    #[test]
    fn references_of_address_count_pages_from_its_first_byte() {
        assert_eq!(of(GRANT_BIT, 1), Some((0, 0, 1)));
        assert_eq!(of(GRANT_BIT | 0x5000, 0x1000), Some((5, 0, 1)));
        assert_eq!(of(GRANT_BIT | 0x5400, 0xc00), Some((5, 0x400, 1)));
        assert_eq!(of(GRANT_BIT | 0x5400, 0xc01), Some((5, 0x400, 2)));
        assert_eq!(of(GRANT_BIT | 0x5fff, 2), Some((5, 0xfff, 2)));
        let last = GRANT_BIT + END - 1;
        assert_eq!(of(last, 1), Some((u32::MAX, 0xfff, 1)));
        assert_eq!(of(GRANT_BIT, 1 << 44), Some((0, 0, 1 << 32)));
    }

    #[test]
    fn references_that_do_not_fit_are_refused() {
        assert_eq!(of(GRANT_BIT - 1, 1), None);
        assert_eq!(of(0x5000, 0x1000), None);
        assert_eq!(of(GRANT_BIT, 0), None);
        assert_eq!(of(GRANT_BIT + END - 1, 2), None);
        assert_eq!(of(GRANT_BIT + END, 1), None);
        assert_eq!(of(u64::MAX, 1), None);
        assert_eq!(of(GRANT_BIT, (1 << 44) + 1), None);
        assert_eq!(of(GRANT_BIT, usize::MAX), None);
    }

    #[test]
    fn part_of_references_begins_at_its_page() {
        let all = References::of(GuestAddress(GRANT_BIT | 0x5400), 0x2000).unwrap();
        let part = |at, size| {
            let part = all.part(at, size).ok()?;
            Some((part.first(), part.page_offset(), part.pages()))
        };
        assert_eq!(part(0x400, 1), Some((5, 0x400, 1)));
        assert_eq!(part(0x1000, 4), Some((6, 0, 1)));
        assert_eq!(part(0xffe, 4), Some((5, 0xffe, 2)));
        assert_eq!(part(0x23ff, 1), Some((7, 0x3ff, 1)));
        for (at, size) in [
            (0x3ff, 1),
            (0x400, 0),
            (0x2400, 1),
            (0x400, 0x2001),
            (usize::MAX, 2),
        ] {
            assert_eq!(part(at, size), None);
        }
        assert_eq!(all.in_pages(1).size(), 0xc00);
        assert_eq!(all.in_pages(2).size(), 0x1c00);
        assert_eq!(all.in_pages(9).size(), 0x2000);
    }
}
