//! [`ReservedArena`]: reserved addresses in which files are mapped and unmapped later.

use std::fs::File;
use std::io::{Error, Result};

use super::reservation::{Reservation, Source, TrialMapping};
use super::{file_system, huge_page_size, page_size, HUGETLBFS, READ_WRITE};

/// Reserved addresses between two guards. They are inaccessible, except where a file is mapped.
#[derive(Debug)]
pub(crate) struct ReservedArena {
    reservation: Reservation,
    len: usize,
}

impl ReservedArena {
    /// Reserves `len` bytes, aligned to a huge page. Fails unless `len` is whole pages.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let no_room = || Error::from_raw_os_error(libc::ENOMEM);
        let guard = page_size();
        let guards = guard.checked_mul(2).ok_or_else(no_room)?;
        let with_guards = len.checked_add(guards).ok_or_else(no_room)?;
        let align = usize::try_from(huge_page_size()).map_err(|_| no_room())?;
        Ok(Self {
            reservation: Reservation::new(with_guards, guard, align, 0)?,
            len,
        })
    }

    pub(crate) fn host_address(&self) -> usize {
        self.reservation.addr.addr().wrapping_add(page_size())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the offset of a range in the reservation, after checking that it can be mapped.
    fn part(&self, offset: usize, len: usize) -> Result<usize> {
        let invalid = || Error::from_raw_os_error(libc::EINVAL);
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let end = end.ok_or_else(invalid)?;
        if len == 0 || !(offset | end).is_multiple_of(page_size()) {
            return Err(invalid());
        }
        if !self.reservation.is_here() {
            return Err(Error::other("the arena belongs to the parent process"));
        }
        // Does not overflow: the reservation has a guard more than `self.len`.
        let start = offset.saturating_add(page_size());
        if self
            .reservation
            .has_gap_in(start, start.saturating_add(len))
        {
            return Err(Error::other("an earlier change has lost these addresses"));
        }
        Ok(start)
    }

    /// Maps a part of a file over a range, shared, in place of everything that is mapped there.
    /// Returns the page size of the file.
    ///
    /// Fails if the range cuts a page of the file. The caller checks that it cuts none of a file
    /// that is mapped there: the kernel does not divide a huge page.
    pub(crate) fn map(
        &mut self,
        offset: usize,
        len: usize,
        file: &File,
        file_offset: u64,
        writable: bool,
    ) -> Result<usize> {
        let start = self.part(offset, len)?;
        let system = file_system(file)?;
        let page = match system.kind {
            HUGETLBFS => usize::try_from(system.block_size).unwrap_or(usize::MAX),
            _ => page_size(),
        };
        let at = self.host_address().wrapping_add(offset);
        if !(at | len).is_multiple_of(page.max(1)) {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        let source = Source::File {
            file,
            offset: file_offset,
            shared: true,
            writable,
            reserve: false,
        };
        let protection = if writable {
            READ_WRITE
        } else {
            libc::PROT_READ
        };
        self.replace(start, len, protection, source, len)?;
        Ok(page)
    }

    /// Makes a range inaccessible again, and unmaps the files there.
    ///
    /// The caller checks that it cuts no huge page.
    pub(crate) fn unmap(&mut self, offset: usize, len: usize) -> Result<()> {
        let start = self.part(offset, len)?;
        self.replace(start, len, libc::PROT_NONE, Source::Anonymous, page_size())
    }

    /// Replaces a part of the reservation that [`part`](Self::part) has checked.
    ///
    /// A trial mapping of `trial` bytes elsewhere shows first whether the kernel accepts it.
    fn replace(
        &mut self,
        start: usize,
        len: usize,
        protection: libc::c_int,
        source: Source<'_>,
        trial: usize,
    ) -> Result<()> {
        drop(TrialMapping::new(trial, protection, source)?);
        // SAFETY: 1. `part` has checked that the range is inside the reservation and in no gap.
        // No `Mapped` exists for this reservation, which is private to `self`, and `&mut self`
        // excludes another change. No code of this crate accesses the range. 2. `is_here` has
        // returned `true` in `part`. 3. `map` has refused other lengths for a file on hugetlbfs.
        let replaced = unsafe { self.reservation.map_fixed(start, len, protection, source) };
        replaced.inspect_err(|_| self.reservation.lose(start, start.saturating_add(len)))
    }
}
