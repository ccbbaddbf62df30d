//! [`Reservation`]: host addresses that are reserved for guest memory.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::process::Process;
use super::{check, page_size, to_u64, Mapped, READ_WRITE};

/// A range of addresses that this object owns, initially inaccessible.
///
/// ```text
///   addr                                             addr + len
///   ├ guard ┤── region ──┤── region ──┤ … ├── region ──┤ guard ┤
/// ```
///
/// Invariant: in the process that made it, nothing else has an address outside of `gaps`. Each
/// belongs to this reservation or to one `Mapped` of it.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(super) addr: *mut u8,
    pub(super) len: usize,
    /// The process that made it.
    ///
    /// A child of fork(2) has a copy of this object, but may have other memory at these addresses.
    pub(super) process: Process,
    /// Start and end of the parts that no longer belong to the reservation.
    ///
    /// These parts were moved or unmapped. The list has room for one part for each `Mapped`, so
    /// that a drop allocates nothing.
    gaps: Mutex<Vec<(usize, usize)>>,
    /// The bytes of dropped regions that could not be unmapped until now.
    kept: AtomicU64,
}

/// The bytes of dropped regions that are still mapped.
static STILL_MAPPED: AtomicU64 = AtomicU64::new(0);

/// Returns the number of bytes of dropped regions that the system has refused to unmap.
pub(crate) fn still_mapped() -> u64 {
    // Relaxed: the counter protects no other memory.
    STILL_MAPPED.load(Ordering::Relaxed)
}

// SAFETY: `addr` is passed to system calls, which any thread may make, and to `VolatileSlice`,
// which permits concurrent access from any thread. No field is bound to the thread that created it.
unsafe impl Send for Reservation {}
// SAFETY: `&Reservation` changes only `gaps` under its lock, `kept`, which is atomic, and parts of
// the address space. Each part has one owner (invariant of `Mapped`), and the kernel serialises
// these changes.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes.
    ///
    /// The address of the byte at `offset` equals `rest` modulo `align`, a power of two. Fails
    /// unless all four are whole pages.
    pub(super) fn new(len: usize, offset: usize, align: usize, rest: usize) -> Result<Self> {
        let page = page_size();
        if [len, offset, align, rest]
            .iter()
            .any(|size| !size.is_multiple_of(page))
        {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        let too_large = || Error::from_raw_os_error(libc::ENOMEM);
        // Addresses are whole pages, so an alignment of one page needs no slack.
        let slack = align.saturating_sub(page);
        let with_slack = len.checked_add(slack).ok_or_else(too_large)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let process = Process::current()?;
        // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
        let addr = unsafe { libc::mmap(null_mut(), with_slack, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let addr: *mut u8 = addr.cast();
        let before = rest.wrapping_sub(addr.addr().wrapping_add(offset)) & align.wrapping_sub(1);
        // SAFETY: the range is inside the mapping that mmap(2) has just made in `process`, which is
        // this process. `before` is at most `slack`: it is less than `align`, and the difference of
        // whole pages. The range is whole pages (checked above), and no other code knows its
        // address.
        let reservation = unsafe { Self::of(addr.wrapping_add(before), len, process) };
        let after = with_slack.saturating_sub(before).saturating_sub(len);
        // Unmap the slack on both sides.
        for (addr, len) in [(addr, before), (reservation.addr.wrapping_add(len), after)] {
            if len != 0 {
                // SAFETY: the range is part of the mapping that was made above, and is before or
                // after the range of `reservation`. No other code knows these addresses.
                unsafe { unmap(addr, len) };
            }
        }
        Ok(reservation)
    }

    /// Takes ownership of `len` bytes at `addr`. The drop unmaps them, except for the `gaps`.
    ///
    /// # Safety
    ///
    /// The bytes are whole pages, mapped in `process`, which is this process. Nothing else has
    /// them.
    pub(super) unsafe fn of(addr: *mut u8, len: usize, process: Process) -> Self {
        Self {
            addr,
            len,
            process,
            gaps: Mutex::new(Vec::with_capacity(1)),
            kept: AtomicU64::new(0),
        }
    }

    /// Returns whether the current process made the reservation.
    pub(super) fn is_here(&self) -> bool {
        self.process.is_current()
    }

    /// Gives up a part: the drop of the reservation does not unmap it.
    ///
    /// Also call this if other code may have the part.
    pub(super) fn disown(&self, start: usize, end: usize) {
        self.lock_gaps().push((start, end));
    }

    /// Takes back all parts that it gave up.
    ///
    /// # Safety
    ///
    /// The parts are mapped, and nothing else has them.
    pub(super) unsafe fn own_all(&self) {
        self.lock_gaps().clear();
    }

    /// Makes room for one gap more than `parts`.
    fn make_room(&self, parts: usize) {
        self.lock_gaps().reserve(parts.saturating_add(1));
    }

    /// Locks the list of gaps. Poisoning is ignored: no code panics while it holds this lock.
    fn lock_gaps(&self) -> MutexGuard<'_, Vec<(usize, usize)>> {
        self.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes back a part of a dropped region that could not be unmapped, and counts it.
    ///
    /// # Safety
    ///
    /// The part is still mapped, and nothing else has it.
    pub(super) unsafe fn keep(&self, start: usize, end: usize) {
        self.lock_gaps().retain(|gap| *gap != (start, end));
        let len = to_u64(end.saturating_sub(start));
        // Relaxed: the counters protect no other memory.
        self.kept.fetch_add(len, Ordering::Relaxed);
        STILL_MAPPED.fetch_add(len, Ordering::Relaxed);
    }

    /// Gives up a part of a dropped region that may be mapped, and counts it.
    pub(super) fn lose(&self, start: usize, end: usize) {
        self.disown(start, end);
        STILL_MAPPED.fetch_add(to_u64(end.saturating_sub(start)), Ordering::Relaxed);
    }

    /// Gives up a part, after the kernel has refused to put another mapping there.
    ///
    /// The kernel may have unmapped it, and other code may have mapped memory there. If it has a
    /// hole, the kernel has unmapped all of it, and nothing is counted.
    pub(super) fn lose_after_refusal(&self, start: usize, end: usize) {
        let len = end.saturating_sub(start);
        if is_mapped(self.addr.wrapping_add(start), len) {
            self.lose(start, end);
        } else {
            self.disown(start, end);
        }
    }

    /// Makes an unused part a VMA of its own, so that replacing it needs no other VMA.
    ///
    /// At `vm.max_map_count`, this fails and changes nothing. mmap(2) would also fail, but its
    /// error does not show whether it has unmapped the part.
    ///
    /// # Safety
    ///
    /// The part is in this reservation and in no gap, and no `Mapped` has it.
    /// [`is_here`](Self::is_here) has returned `true`.
    unsafe fn set_apart(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: in this process, the part belongs to this reservation, and no `Mapped` has it
        // (contract of `set_apart`). No code relies on the part being inaccessible.
        check(unsafe { libc::mprotect(addr.cast(), len, libc::PROT_READ) })
    }

    /// Maps `source` over a part of the reservation.
    ///
    /// If mmap(2) fails, it may have unmapped the part: Linux before 6.12 always does, later
    /// versions do for files. Another thread may have mapped memory there since. Unless the error
    /// shows that nothing was unmapped, the caller must give up the part
    /// ([`lose_after_refusal`](Self::lose_after_refusal)).
    ///
    /// # Safety
    ///
    /// 1. The part is in this reservation and in no gap, and nothing uses it.
    /// 2. [`is_here`](Self::is_here) has returned `true`.
    /// 3. For a file on hugetlbfs, `len` is whole pages of the file. The kernel rounds it up.
    pub(super) unsafe fn map_fixed(
        &self,
        offset: usize,
        len: usize,
        protection: libc::c_int,
        source: Source<'_>,
    ) -> Result<()> {
        let (flags, fd, file_offset) = arguments(source);
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: MAP_FIXED replaces the mappings of the range and nothing else (clause 3 of the
        // contract of `map_fixed`). In this process (clause 2), the range belongs to this
        // reservation, and nothing uses it (clause 1).
        let result = unsafe {
            libc::mmap(
                addr.cast(),
                len,
                protection,
                flags | libc::MAP_FIXED,
                fd,
                file_offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Makes an unused part accessible, as private anonymous memory.
    ///
    /// The reserved addresses are already a mapping of [`Source::Anonymous`] without permissions.
    /// Changing the protection unmaps nothing, so a refusal (`RLIMIT_DATA`,
    /// `vm.overcommit_memory` of 2) loses nothing. It also counts nothing twice against
    /// `RLIMIT_MEMLOCK` in a process that has called mlockall(2).
    ///
    /// # Safety
    ///
    /// The part is in this reservation and in no gap, and no `Mapped` has it.
    /// [`is_here`](Self::is_here) has returned `true`.
    unsafe fn make_accessible(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: in this process, the part belongs to this reservation, and no `Mapped` has it
        // (contract of `make_accessible`). No code relies on the part being inaccessible.
        check(unsafe { libc::mprotect(addr.cast(), len, READ_WRITE) })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_here() {
            return;
        }
        // They are counted again below, if they cannot be unmapped now. Relaxed: see `keep`.
        STILL_MAPPED.fetch_sub(*self.kept.get_mut(), Ordering::Relaxed);
        let gaps = self.gaps.get_mut().unwrap_or_else(PoisonError::into_inner);
        gaps.sort_unstable();
        let (addr, mut next) = (self.addr, 0usize);
        for (start, end) in gaps.iter().copied().chain([(self.len, self.len)]) {
            if next < start {
                // SAFETY: the range is outside of `gaps`, and `is_here` has just returned `true`,
                // so by the invariant of this type it belongs to the reservation. Each `Mapped`
                // holds an `Arc` of the reservation, so all of them are gone.
                unsafe { unmap(addr.wrapping_add(next), start.saturating_sub(next)) };
            }
            next = next.max(end);
        }
    }
}

/// Unmaps a range. If the system refuses that, frees its pages and counts it.
///
/// The system refuses to split a VMA when the process has `vm.max_map_count` of them.
///
/// # Safety
///
/// The range consists of whole pages that the caller owns, and nothing uses it any more.
pub(super) unsafe fn unmap(addr: *mut u8, len: usize) {
    // SAFETY: the caller owns the pages of the range, and nothing uses it (contract of `unmap`).
    if unsafe { libc::munmap(addr.cast(), len) } == 0 {
        return;
    }
    let error = Error::last_os_error();
    log_warning!("cannot unmap {len:#x} bytes, whose pages are freed: {error}");
    STILL_MAPPED.fetch_add(to_u64(len), Ordering::Relaxed);
    for advice in [libc::MADV_DONTNEED, super::mapped::MADV_DONTNEED_LOCKED] {
        // SAFETY: munmap(2) has failed, so the range is still mapped. The caller owns its pages,
        // and nothing uses them (contract of `unmap`).
        let _ = unsafe { libc::madvise(addr.cast(), len, advice) };
    }
}

/// Aborts the process if an address of a range is unmapped.
///
/// Call it if the kernel refuses to replace a range that a guest can reach. The kernel may have
/// unmapped it, and another thread could get the addresses. Two cases cannot be detected: another
/// thread has filled exactly the hole already, or the kernel does not tell.
pub(super) fn abort_unless_mapped(addr: *mut u8, len: usize) {
    if !is_mapped(addr, len) {
        std::process::abort();
    }
}

/// The number of times that a part of a range is checked while the kernel lacks memory for that.
const TRIES: usize = 64;

/// Returns `false` if an address of a range of whole pages is unmapped. Allocates nothing.
///
/// Returns `true` if all of them are mapped, or if the kernel does not tell.
fn is_mapped(addr: *mut u8, len: usize) -> bool {
    // Nothing is allocated here, because an allocation could be mapped into the hole.
    let mut pages = [0u8; 4096];
    let step = page_size().saturating_mul(pages.len());
    (0..len).step_by(step).all(|done| {
        let here = len.saturating_sub(done).min(step);
        let at = addr.wrapping_add(done).cast();
        let mut check_part = || {
            // SAFETY: the kernel writes one byte for each page of the range, and `pages` has one
            // for each page of `step`. It accesses no byte of the range.
            check(unsafe { libc::mincore(at, here, pages.as_mut_ptr()) })
        };
        // Only ENOMEM means a hole. EAGAIN means that the kernel lacks a page for the result now.
        // Any other error comes from a seccomp filter.
        let known = (0..TRIES).find_map(|_| match check_part().map_err(|e| e.raw_os_error()) {
            Ok(()) => Some(true),
            Err(Some(libc::EAGAIN)) => None,
            Err(error) => Some(error != Some(libc::ENOMEM)),
        });
        known.unwrap_or(true)
    })
}

/// A mapping at addresses that the kernel chooses, to test whether the kernel accepts it.
pub(super) struct TrialMapping {
    pub(super) addr: *mut u8,
    len: usize,
}

impl TrialMapping {
    pub(super) fn new(len: usize, protection: libc::c_int, source: Source<'_>) -> Result<Self> {
        let (flags, fd, file_offset) = arguments(source);
        // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
        let addr = unsafe { libc::mmap(null_mut(), len, protection, flags, fd, file_offset) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let addr = addr.cast();
        Ok(Self { addr, len })
    }
}

/// Returns whether the kernel populates new mappings of this process at once (mlockall(2),
/// `MCL_FUTURE` without `MCL_ONFAULT`).
pub(crate) fn populates_mappings() -> bool {
    let (len, mut pages) = (page_size(), [0u8]);
    let Ok(trial) = TrialMapping::new(len, READ_WRITE, Source::Anonymous) else {
        return false;
    };
    // SAFETY: `trial` keeps the mapping, and no other code knows its address.
    let unlocked = unsafe { libc::madvise(trial.addr.cast(), len, libc::MADV_DONTNEED) };
    if unlocked == 0 {
        return false;
    }
    // The mapping is locked, so a page that the kernel has populated at once is still in memory.
    // SAFETY: the kernel writes one byte for the only page of the mapping, and `pages` has one.
    // `trial` keeps the mapping.
    let known = unsafe { libc::mincore(trial.addr.cast(), len, pages.as_mut_ptr()) };
    known == 0 && pages != [0]
}

/// Writes to `pages` whether each page of a part of a file is in memory (mincore(2)).
///
/// Fails with `EINVAL` if `pages` is shorter than the number of pages.
pub(crate) fn resident_of_file(
    file: &File,
    offset: u64,
    len: usize,
    pages: &mut [u8],
) -> Result<()> {
    if pages.len() < len.div_ceil(page_size()) {
        return Err(Error::from_raw_os_error(libc::EINVAL));
    }
    let source = Source::File {
        file,
        offset,
        shared: false,
        writable: false,
        reserve: false,
    };
    // Inaccessible, so that mlockall(2) with `MCL_FUTURE` populates nothing.
    let view = TrialMapping::new(len, libc::PROT_NONE, source)?;
    // SAFETY: the kernel writes one byte for each page of the mapping, and `pages` is at least that
    // long by the check above. `view` keeps the mapping.
    check(unsafe { libc::mincore(view.addr.cast(), len, pages.as_mut_ptr()) })
}

impl Drop for TrialMapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping, and no other code has its address.
        unsafe { unmap(self.addr, self.len) };
    }
}

/// Returns the flags, descriptor and offset that mmap(2) takes for a source.
pub(super) fn arguments(source: Source<'_>) -> (libc::c_int, libc::c_int, libc::off_t) {
    match source {
        Source::Anonymous => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        ),
        Source::Accounted => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Source::File {
            file,
            offset,
            shared,
            writable: _,
            reserve,
        } => {
            let sharing = if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
            let reserve = if reserve { 0 } else { libc::MAP_NORESERVE };
            // An offset above `i64::MAX` becomes negative, and mmap(2) refuses it.
            (sharing | reserve, file.as_raw_fd(), offset.cast_signed())
        }
    }
}

/// A reservation that is being filled with mappings, from low to high addresses.
#[derive(Debug)]
pub(crate) struct Reserved {
    reservation: Arc<Reservation>,
    /// The offset of the next free part.
    ///
    /// Invariant: no `Mapped` and no gap has addresses at and after it, since parts are taken in
    /// ascending order.
    next: usize,
    /// The number of parts that are mapped.
    parts: usize,
}

/// The memory that a mapping shows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// Private pages, initially zero.
    Anonymous,
    /// The same, counted against `CommitLimit` (proc_meminfo(5)) from the start.
    Accounted,
    /// A part of a file.
    File {
        file: &'a File,
        offset: u64,
        /// Whether the mapping is shared or copy-on-write.
        shared: bool,
        /// Whether the mapping is writable.
        writable: bool,
        /// Whether to reserve huge pages for the whole mapping.
        reserve: bool,
    },
}

impl Reserved {
    /// Reserves `len` bytes between two guards of `guard` bytes.
    ///
    /// The address of the first byte after the guard equals `rest` modulo `align`, a power of two.
    pub(crate) fn new(len: usize, guard: usize, align: usize, rest: usize) -> Result<Self> {
        let with_guards = guard
            .checked_mul(2)
            .and_then(|guards| len.checked_add(guards));
        let with_guards = with_guards.ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))?;
        let reservation = Arc::new(Reservation::new(with_guards, guard, align, rest)?);
        Ok(Self {
            reservation,
            next: guard,
            parts: 0,
        })
    }

    /// Maps the next `len` bytes: readable, and writable unless the source is a read-only file.
    ///
    /// Fails unless `len` is whole pages.
    ///
    /// For a file on hugetlbfs, the caller has checked that `len` is whole pages of the file.
    pub(crate) fn map(&mut self, len: usize, source: Source<'_>) -> Result<Mapped> {
        let end = self.end_of_next(len)?;
        let trial = source.try_file(len)?;
        if !self.reservation.is_here() {
            return Err(Error::from_raw_os_error(libc::ENOMEM));
        }
        self.parts = self.parts.saturating_add(1);
        self.reservation.make_room(self.parts);
        // SAFETY: 1. `end` is the result of `end_of_next`, and `next` has not changed since. 2.
        // `is_here` has returned `true`. 3. `check_alignment` has refused other sizes for a file on
        // hugetlbfs, before the builder calls `map`.
        unsafe { self.place(len, end, source) }?;
        drop(trial);
        let offset = std::mem::replace(&mut self.next, end);
        Ok(Mapped {
            reservation: Arc::clone(&self.reservation),
            offset,
            len,
            writable: source.protection() == READ_WRITE,
        })
    }

    /// Returns the end of the next part, which has `len` bytes.
    ///
    /// Fails unless the part is whole pages, before the last guard or in it.
    fn end_of_next(&self, len: usize) -> Result<usize> {
        let end = self.next.checked_add(len);
        let end = end.filter(|end| *end <= self.reservation.len && len.is_multiple_of(page_size()));
        end.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))
    }

    /// Puts a source at the next part, and makes it accessible.
    ///
    /// If the kernel refuses to replace the part, this gives it up, and moves `next` after it.
    ///
    /// # Safety
    ///
    /// 1. `end` is the end of the next part, as [`end_of_next`](Self::end_of_next) returned it.
    /// 2. [`Reservation::is_here`] has returned `true`.
    /// 3. For a file on hugetlbfs, `len` is whole pages of the file.
    unsafe fn place(&mut self, len: usize, end: usize, source: Source<'_>) -> Result<()> {
        // Inaccessible memory is not accounted, so only `make_accessible` can lack it.
        let replaced = match source {
            Source::Anonymous => None,
            Source::Accounted => Some(libc::PROT_NONE),
            Source::File { .. } => Some(source.protection()),
        };
        if let Some(protection) = replaced {
            // SAFETY: the part is in the reservation (clause 1), and in no `Mapped` and no gap
            // (invariant of `next`). `is_here` has returned `true` (clause 2).
            unsafe { self.reservation.set_apart(self.next, len) }?;
            // SAFETY: 1. The part is in the reservation (clause 1), and in no `Mapped` and no gap
            // (invariant of `next`), so nothing uses it. Clauses 2 and 3 are those of `place`.
            unsafe {
                self.reservation
                    .map_fixed(self.next, len, protection, source)
            }
            .inspect_err(|_| {
                self.reservation.lose_after_refusal(self.next, end);
                self.next = end;
            })?;
        }
        match source {
            Source::File { .. } => Ok(()),
            // SAFETY: the part is in the reservation (clause 1), and in no `Mapped` and no gap
            // (invariant of `next`). `is_here` has returned `true` (clause 2).
            Source::Anonymous | Source::Accounted => unsafe {
                self.reservation.make_accessible(self.next, len)
            },
        }
    }
}

impl Source<'_> {
    /// Returns the protection of the finished mapping.
    fn protection(&self) -> libc::c_int {
        let is_read_only = matches!(
            self,
            Source::File {
                writable: false,
                ..
            }
        );
        if is_read_only {
            libc::PROT_READ
        } else {
            READ_WRITE
        }
    }

    /// Maps a file elsewhere, to find out whether the kernel accepts it. Nothing is replaced yet.
    ///
    /// Huge pages that a shared trial reserves belong to the file (Linux, "Hugetlbfs Reservation").
    /// So this returns the trial, which the caller keeps until the real mapping has them. A private
    /// trial reserves pages for itself, and must go first. So must others: after mlockall(2), both
    /// mappings could exceed `RLIMIT_MEMLOCK`, which one does not.
    fn try_file(self, len: usize) -> Result<Option<TrialMapping>> {
        let Source::File {
            shared, reserve, ..
        } = self
        else {
            return Ok(None);
        };
        let trial = TrialMapping::new(len, self.protection(), self)?;
        Ok((shared && reserve).then_some(trial))
    }
}

#[cfg(test)]
mod tests {
    use test_support::{in_own_process, refuse_calls, skipped};

    use super::*;

    #[test]
    fn lose_after_refusal_counts_addresses_that_are_mapped() {
        // Too large for mappings of other tests to fill it while it is unmapped.
        let len = 1 << 28;
        let reserve = || Reservation::new(len, 0, page_size(), 0).unwrap();
        for is_unmapped in [true, false] {
            let (reservation, before) = (reserve(), still_mapped());
            let addr = reservation.addr;
            if is_unmapped {
                // SAFETY: `reservation` owns the range, and gives it up below.
                assert_eq!(unsafe { libc::munmap(addr.cast(), len) }, 0);
            }
            reservation.lose_after_refusal(0, len);
            let counted = if is_unmapped { 0 } else { to_u64(len) };
            assert_eq!(still_mapped() - before, counted);
            if !is_unmapped {
                // SAFETY: the reservation has given up the range, which is still mapped.
                assert_eq!(unsafe { libc::munmap(addr.cast(), len) }, 0);
            }
        }
    }

    /// munmap(2) fails at `vm.max_map_count` if the kernel has merged the reservation with the
    /// mapping after it.
    #[test]
    fn reservation_that_is_aligned_to_pages_unmaps_nothing() {
        let test = "sys::linux::reservation::tests::\
            reservation_that_is_aligned_to_pages_unmaps_nothing";
        // Other tests change the counter.
        in_own_process(test, |test| {
            let page = page_size();
            let reserve = || Reservation::new(3 * page, page, page, 0);
            match refuse_calls(libc::SYS_munmap, libc::ENOMEM, reserve) {
                Ok(reservation) => drop(reservation.unwrap()),
                Err(error) => return skipped(test, format!("no seccomp filters: {error}")),
            }
            assert_eq!(still_mapped(), 0);
            for align in [2 * page, 512 * page] {
                let reservation = Reservation::new(3 * page, page, align, page).unwrap();
                assert_eq!((reservation.addr.addr() + page) % align, page);
                assert!(is_all_mapped(&reservation));
            }
        });
    }

    fn is_all_mapped(reservation: &Reservation) -> bool {
        is_mapped(reservation.addr, reservation.len)
    }

    #[test]
    fn is_mapped_is_false_only_for_ranges_with_holes() {
        let page = page_size();
        let reservation = Reservation::new(3 * page, 0, page, 0).unwrap();
        assert!(is_all_mapped(&reservation));
        for error in [libc::EAGAIN, libc::EPERM, libc::ENOSYS] {
            match refuse_calls(libc::SYS_mincore, error, || is_all_mapped(&reservation)) {
                Ok(is_mapped) => assert!(is_mapped, "{error}"),
                Err(error) => skipped(
                    "is_mapped_is_false_only_for_ranges_with_holes",
                    format!("no seccomp filters: {error}"),
                ),
            }
        }
        // The first page of the address space is not mapped.
        assert!(!is_mapped(null_mut(), page));
    }
}
