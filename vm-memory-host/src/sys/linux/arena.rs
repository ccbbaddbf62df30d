//! [`ReservedArena`]: reserved addresses in which files are mapped and unmapped later.

use std::fs::File;
use std::io::{Error, Result};

use super::reservation::{abort_unless_mapped, Reservation, Source, TrialMapping};
use super::{file_system, page_size, HUGETLBFS, READ_WRITE};
use crate::sys::end_of_pages;

/// Moves a mapping to a given address, over everything that is mapped there.
const MOVE: libc::c_int = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// Whether a mapping in an arena stays until all of it is unmapped. Linux replaces parts of it.
pub(crate) const MAPPINGS_ARE_WHOLE: bool = false;

/// Reserved addresses between two guards. They are inaccessible, except where a file is mapped.
///
/// Invariant: the reservation has no gaps. No method makes one: [`map`](Self::map) and
/// [`unmap`](Self::unmap) abort the process if the kernel has unmapped a part and not replaced it.
#[derive(Debug)]
pub(crate) struct ReservedArena {
    reservation: Reservation,
    len: usize,
}

impl ReservedArena {
    /// Reserves `len` bytes, aligned to `align`, a power of two. Fails unless both are whole pages.
    pub(crate) fn new(len: usize, align: usize) -> Result<Self> {
        let no_room = || Error::from_raw_os_error(libc::ENOMEM);
        let guard = page_size();
        let guards = guard.checked_mul(2).ok_or_else(no_room)?;
        let with_guards = len.checked_add(guards).ok_or_else(no_room)?;
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
        if end_of_pages(offset, len, self.len).is_none() {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        if !self.reservation.is_here() {
            return Err(Error::other("the arena belongs to the parent process"));
        }
        // Does not overflow: the reservation has a guard more than `self.len`.
        Ok(offset.saturating_add(page_size()))
    }

    /// Maps a part of a file over a range, shared, in place of everything that is mapped there.
    ///
    /// `page` is the [page size](page_size_of) of the file. Fails if the range cuts a page of the
    /// file. The caller checks that it cuts none of a file that is mapped there: the kernel does
    /// not divide a huge page.
    ///
    /// # Aborts
    ///
    /// Aborts the process if the kernel has unmapped the range and then fails, for lack of memory
    /// for page tables. Another thread could get these addresses, and the guest would then reach
    /// its memory.
    pub(crate) fn map(
        &mut self,
        offset: usize,
        len: usize,
        file: &File,
        page: usize,
        file_offset: u64,
        writable: bool,
    ) -> Result<()> {
        let start = self.part(offset, len)?;
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
        let detached = detached(len, page, protection, source)?;
        let to = self.reservation.addr.wrapping_add(start);
        // SAFETY: `part` has checked that the range at `to` is inside the reservation, in the
        // process that made it. The reservation has no gaps (invariant of `ReservedArena`). It is
        // private to `self`, so no `Mapped` has a part of it. `&mut self` excludes another change,
        // and no code of this crate accesses the range. `detached` has `len` bytes and no gaps, and
        // this function owns it.
        let moved = unsafe { libc::mremap(detached.addr.cast(), len, len, MOVE, to) };
        if moved == libc::MAP_FAILED {
            let refused = Error::last_os_error();
            abort_unless_mapped(to, len);
            return Err(refused);
        }
        detached.disown(0, len);
        Ok(())
    }

    /// Makes a range inaccessible again, and unmaps the files there.
    ///
    /// The caller checks that it cuts no huge page.
    ///
    /// # Aborts
    ///
    /// Aborts the process under the condition of [`map`](Self::map).
    pub(crate) fn unmap(&mut self, offset: usize, len: usize) -> Result<()> {
        let start = self.part(offset, len)?;
        let inaccessible = (libc::PROT_NONE, Source::Anonymous);
        // SAFETY: 1. `part` has checked that the range is inside the reservation, which has no
        // gaps (invariant of `ReservedArena`). The reservation is private to `self`, so no `Mapped`
        // has a part of it. `&mut self` excludes another change, and no code of this crate accesses
        // the range. 2. `is_here` has returned `true` in `part`. 3. The source is not a file.
        let replaced = unsafe {
            self.reservation
                .map_fixed(start, len, inaccessible.0, inaccessible.1)
        };
        replaced.inspect_err(|_| {
            abort_unless_mapped(self.reservation.addr.wrapping_add(start), len);
        })
    }
}

/// Returns the page size of a file. May wait for the server of the file (FUSE).
pub(crate) fn page_size_of(file: &File) -> Result<usize> {
    let system = file_system(file)?;
    Ok(match system.kind {
        HUGETLBFS => usize::try_from(system.block_size).unwrap_or(usize::MAX),
        _ => page_size(),
    })
}

/// Maps a file at addresses that are aligned to `page`, and owns them.
///
/// The kernel asks the file when it maps it, and the file may refuse: another process can seal it
/// at any moment. mmap(2) with MAP_FIXED may unmap its target before that. Moving a mapping does
/// not ask the file again. Some mappings cannot be moved, such as huge pages before Linux 5.16.
/// This function has moved the mapping once.
fn detached(
    len: usize,
    page: usize,
    protection: libc::c_int,
    source: Source<'_>,
) -> Result<Reservation> {
    let mapping = TrialMapping::new(len, protection, source)?;
    let detached = Reservation::new(len, 0, page, 0)?;
    // SAFETY: `detached` has `len` bytes and was made above, so nothing uses its addresses, and it
    // has no gaps. `mapping` has `len` bytes, and no other code knows its address.
    let moved = unsafe { libc::mremap(mapping.addr.cast(), len, len, MOVE, detached.addr) };
    if moved == libc::MAP_FAILED {
        let refused = Error::last_os_error();
        detached.lose_after_refusal(0, len);
        return Err(refused);
    }
    // Its addresses are unmapped.
    std::mem::forget(mapping);
    Ok(detached)
}
