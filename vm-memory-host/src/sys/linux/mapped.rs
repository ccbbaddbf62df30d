//! [`Mapped`]: mapped memory, and the system calls that change it.

use std::ffi::CStr;
use std::io::{Error, Result};
use std::ptr::null_mut;
use std::sync::Arc;

use vm_memory::{fault, VolatileSlice};

use super::process::Process;
use super::reservation::{
    abort_unless_mapped, arguments, unmap, Reservation, Source, TrialMapping,
};
use super::{check, page_size, READ_WRITE};
use crate::sys::system_error;

/// Memory that is mapped in a part of a reservation. Dropping it frees the memory.
///
/// Invariants:
///
/// - The part belongs to this object alone, and stays mapped while it exists.
/// - It begins and ends at page boundaries. A call on a range of it, which the kernel extends to
///   whole pages, therefore changes no other memory.
/// - Memory from [`Reserved::map`](super::Reserved::map) is readable, and writable if `writable` is
///   set, except where [`protect`](Self::protect) has made it inaccessible.
/// - No Rust reference ever covers it.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(super) reservation: Arc<Reservation>,
    /// The offset of the part in the reservation.
    pub(super) offset: usize,
    pub(super) len: usize,
    pub(super) writable: bool,
}

/// Advice for `madvise(2)`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Advice {
    HugePages,
    NoHugePages,
    Mergeable,
    NoDump,
    NoFork,
    /// Frees private pages.
    DontNeed,
    /// Frees private pages that are locked (Linux 5.18).
    DontNeedLocked,
    /// Frees pages of a shared file, and punches a hole there.
    Remove,
    /// Populates pages for writing (Linux 5.14).
    PopulateWrite,
    /// Populates pages for reading (Linux 5.14).
    PopulateRead,
}

/// A policy for `mbind(2)`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NodePolicy {
    Bind,
    Preferred,
    Interleave,
}

impl Mapped {
    /// Returns a pointer to the first byte.
    pub(crate) fn addr(&self) -> *mut u8 {
        self.reservation.addr.wrapping_add(self.offset)
    }

    /// Returns the host address of the first byte.
    pub(crate) fn host_address(&self) -> usize {
        self.addr().addr()
    }

    /// Returns the length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Fails in a child of fork(2), whose own memory may be at these addresses.
    pub(crate) fn check_here(&self) -> Result<()> {
        self.part(0, 0).map(|_| ())
    }

    /// Fails for read-only memory.
    fn check_writable(&self) -> Result<()> {
        if self.writable {
            Ok(())
        } else {
            Err(Error::from_raw_os_error(libc::EACCES))
        }
    }

    /// Returns a pointer to a range of this memory, after checking that the range is inside.
    ///
    /// Fails in a child of fork(2), whose own memory may be there: `Region::forked` or a driver
    /// (VFIO, RDMA) can have excluded the memory from children. This crate cannot know which
    /// memory a driver excludes.
    fn part(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if !self.reservation.is_here() {
            return Err(Error::other("the memory belongs to the parent process"));
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        Ok(self.addr().wrapping_add(offset))
    }

    /// Advises the kernel about a range (madvise(2)).
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<()> {
        let advice = match advice {
            Advice::HugePages => libc::MADV_HUGEPAGE,
            Advice::NoHugePages => libc::MADV_NOHUGEPAGE,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::NoDump => libc::MADV_DONTDUMP,
            Advice::NoFork => libc::MADV_DONTFORK,
            Advice::DontNeed => libc::MADV_DONTNEED,
            Advice::DontNeedLocked => MADV_DONTNEED_LOCKED,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
        };
        let addr = self.part(offset, len)?;
        // SAFETY: `part` has checked that the range belongs to this mapping. No advice above unmaps
        // memory of this process or changes its protection. DONTNEED and REMOVE change bytes to
        // zeroes or to those of the file. No Rust reference covers them (invariant of `Mapped`),
        // and vm-memory expects the guest to change them at any time.
        check(unsafe { libc::madvise(addr.cast(), len, advice) })
    }

    /// Maps private zeroes outside of any region, for [`splice_over`](Self::splice_over).
    ///
    /// Also returns whether they are locked on fault, because the process has called mlockall(2).
    ///
    /// The memory must not be populated before it is in its place. The kernel merges adjacent VMAs
    /// only if at most one of them has an `anon_vma`, which the first page creates. Two rules keep
    /// it unpopulated and unmerged:
    ///
    /// - It is between two pages with another protection, so that the kernel does not merge it
    ///   with a VMA that has pages.
    /// - It is inaccessible until it is unlocked, because mlockall(2) with `MCL_FUTURE` populates
    ///   accessible memory at once.
    pub(crate) fn detached_zeroed(len: usize) -> Result<(Self, bool)> {
        let zeroes = Self::detached_inaccessible(len)?;
        // Locked memory refuses this advice. There is no page yet that it could free.
        let unlocked = zeroes.advise(0, len, Advice::DontNeed);
        let locked = unlocked.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL));
        if locked {
            zeroes.unlock(0, len)?;
        }
        zeroes.protect(0, len, true)?;
        if locked {
            zeroes.lock(0, len, true)?;
        }
        Ok((zeroes, locked))
    }

    /// Maps inaccessible memory in a new reservation, between two readable pages.
    ///
    /// Fails unless `len` is whole pages. Retries if another thread maps memory between two calls.
    fn detached_inaccessible(len: usize) -> Result<Self> {
        for _ in 0..8 {
            if let Some(mapped) = Self::remap_middle(map_with_guards(len)?)? {
                return Ok(mapped);
            }
        }
        Err(Error::from_raw_os_error(libc::ENOMEM))
    }

    /// Maps a reservation again, inaccessible, except for its first and its last page.
    ///
    /// The reservation comes from [`map_with_guards`] and owns all of its range. Returns `None` if
    /// another thread has mapped memory in the range meanwhile, or if a kernel before 4.17 has
    /// placed the mapping elsewhere.
    fn remap_middle(reservation: Reservation) -> Result<Option<Self>> {
        let page = page_size();
        let guards = page.saturating_mul(2);
        let len = reservation.len.saturating_sub(guards);
        let middle: *mut libc::c_void = reservation.addr.wrapping_add(page).cast();
        // SAFETY: the range is empty, which munmap(2) refuses, or all but the first and the last
        // page of the reservation. It owns its range, which `map_with_guards` has just mapped, and
        // was passed by value. So no other code uses the range.
        check(unsafe { libc::munmap(middle, len) })?;
        reservation.disown(page, page.saturating_add(len));
        let (flags, fd, file_offset) = arguments(Source::Anonymous);
        let only_there = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces no mapping. Kernels that do not support it use the
        // address as a hint, and choose addresses that are not in use.
        let result =
            unsafe { libc::mmap(middle, len, libc::PROT_NONE, only_there, fd, file_offset) };
        if result == middle {
            // SAFETY: the only gap is the range that mmap(2) has just mapped again. No other code
            // knows its address.
            unsafe { reservation.own_all() };
            return Ok(Some(Self {
                reservation: Arc::new(reservation),
                offset: page,
                len,
                writable: true,
            }));
        }
        if result != libc::MAP_FAILED {
            // Linux before 4.17 has mapped it elsewhere.
            // SAFETY: mmap(2) has just made this mapping, and no other code knows its address.
            unsafe { unmap(result.cast(), len) };
            return Ok(None);
        }
        match Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(None),
            error => Err(error),
        }
    }

    /// Moves detached zeroes over a range of the same length, atomically (mremap(2)).
    ///
    /// A concurrent access finds the old bytes, or waits and finds the zeroes with their options.
    ///
    /// # Aborts
    ///
    /// Aborts the process if the kernel has unmapped the range and fails to map the zeroes. Another
    /// thread could get these addresses, and the guest would then reach its memory. This happens
    /// only if the kernel lacks memory for page tables, or if `vm.overcommit_memory` is 2 and the
    /// commit limit is reached.
    pub(crate) fn splice_over(&self, offset: usize, mut zeroes: Self) -> Result<()> {
        self.check_writable()?;
        let len = zeroes.len;
        let (to, from) = (self.part(offset, len)?, zeroes.part(0, len)?);
        let (start, end) = (zeroes.offset, zeroes.offset.saturating_add(len));
        let reservation = Arc::get_mut(&mut zeroes.reservation);
        let reservation = &*reservation.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: `to` is a range of this mapping, in the process that made it (`part`). It stays
        // mapped, readable and writable. Only its bytes change: no Rust reference covers them
        // (invariant of `Mapped`), and vm-memory expects the guest to change them at any time.
        // `from` is all of `zeroes`, which was passed by value. Nothing shares its reservation
        // (`get_mut`), so no other code uses the addresses that become unmapped.
        let result = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
        if result != libc::MAP_FAILED {
            reservation.disown(start, end);
            return Ok(());
        }
        let refused = Error::last_os_error();
        abort_unless_mapped(to.cast(), len);
        Err(refused)
    }

    /// Makes a range accessible or inaccessible.
    pub(crate) fn protect(&self, offset: usize, len: usize, accessible: bool) -> Result<()> {
        self.check_writable()?;
        let addr = self.part(offset, len)?;
        let protection = if accessible {
            READ_WRITE
        } else {
            libc::PROT_NONE
        };
        // SAFETY: `part` has checked that the range belongs to this mapping, which stays mapped.
        // Callers unplug a range in `PluggedBlocks` before they make it inaccessible, so vm-memory
        // begins no access to it. An access in progress raises SIGSEGV: the contract of
        // `VolatileSlice::with_bitmap` allows a protection that refuses accesses.
        check(unsafe { libc::mprotect(addr.cast(), len, protection) })
    }

    /// Locks a range in memory: its pages at once, or each page on its first use.
    pub(crate) fn lock(&self, offset: usize, len: usize, on_fault: bool) -> Result<()> {
        let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
        let addr = self.part(offset, len)?;
        // SAFETY: `part` has checked that the range belongs to this mapping. mlock2(2) changes
        // neither bytes nor protection.
        check(unsafe { libc::mlock2(addr.cast(), len, flags) })
    }

    /// Unlocks a range.
    fn unlock(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.part(offset, len)?;
        // SAFETY: `part` has checked that the range belongs to this mapping. munlock(2) changes
        // neither bytes nor protection.
        check(unsafe { libc::munlock(addr.cast(), len) })
    }

    /// Names a range in /proc/self/maps (Linux 5.17; for shared anonymous memory 6.2).
    pub(crate) fn set_name(&self, offset: usize, len: usize, name: &CStr) -> Result<()> {
        let addr = self.part(offset, len)?;
        let (set, what) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME);
        // SAFETY: the kernel reads `name` up to its zero byte, and a `CStr` ends with one. `part`
        // has checked that the range belongs to this mapping, of which only the name changes.
        check(unsafe {
            libc::prctl(
                set,
                libc::c_ulong::from(what.unsigned_abs()),
                addr,
                len,
                name.as_ptr(),
            )
        })
    }

    /// Sets the NUMA nodes of a range (mbind(2)). `mask` has a bit for each node.
    pub(crate) fn bind(
        &self,
        offset: usize,
        len: usize,
        policy: NodePolicy,
        mask: &[u64],
    ) -> Result<()> {
        let mode = libc::c_long::from(match policy {
            NodePolicy::Preferred => libc::MPOL_PREFERRED,
            NodePolicy::Bind => libc::MPOL_BIND,
            NodePolicy::Interleave => libc::MPOL_INTERLEAVE,
        });
        let addr = self.part(offset, len)?;
        // The kernel reads one bit less than this (get_mempolicy(2), "BUGS").
        let bits = mask.len().saturating_mul(64).saturating_add(1);
        // SAFETY: the kernel reads `bits - 1` bits at the pointer, which is the length of `mask`.
        // `part` has checked that the range belongs to this mapping, whose bytes do not change.
        // `mode` has the width that the kernel reads.
        let result =
            unsafe { libc::syscall(libc::SYS_mbind, addr, len, mode, mask.as_ptr(), bits, 0) };
        check(libc::c_int::try_from(result).unwrap_or(-1))
    }

    /// Writes to `pages` whether each page of a range is resident (mincore(2)).
    ///
    /// Fails with `EINVAL` if `pages` is shorter than the number of pages.
    pub(crate) fn resident(&self, offset: usize, len: usize, pages: &mut [u8]) -> Result<()> {
        if pages.len() < len.div_ceil(page_size()) {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        let addr = self.part(offset, len)?;
        // SAFETY: the kernel writes one byte for each page of the range, and `pages` is at least
        // that long by the check above.
        check(unsafe { libc::mincore(addr.cast(), len, pages.as_mut_ptr()) })
    }

    /// Writes zeroes to a range.
    ///
    /// Returns the error of madvise(2) if a page is not available. With a fault handler, the write
    /// returns it. Without one, the write raises SIGBUS before Linux 5.14, and if another process
    /// removes the page during the call.
    pub(crate) fn fill_zeroes(&self, offset: usize, len: usize) -> Result<()> {
        self.check_writable()?;
        let addr = self.part(offset, len)?;
        let page = page_size();
        let end = offset.saturating_add(len).next_multiple_of(page);
        let start = offset.saturating_sub(offset.checked_rem(page).unwrap_or(0));
        match self.advise(start, end.saturating_sub(start), Advice::PopulateWrite) {
            // Linux before 5.14, and the mapping of a device, cannot populate pages for writing.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            // A userfaultfd handler for accesses of user mode can provide the page to the write.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) && fault::is_installed() => {}
            result => result?,
        }
        // SAFETY: the contract of `VolatileSlice::new`. The range is mapped: `part` has checked
        // that it is inside this mapping. It stays mapped while `self` is borrowed, which is longer
        // than `slice` lives. No Rust reference covers it (invariant of `Mapped`).
        let slice = unsafe { VolatileSlice::new(addr, len) };
        slice.fill_with_byte(0).map_err(system_error)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.reservation.is_here() || Arc::get_mut(&mut self.reservation).is_some() {
            // In the second case, the reservation is dropped next and also unmaps this part.
            return;
        }
        // Free the pages first: this succeeds where the calls below may be refused. Locked memory
        // counts against its limit until it is unlocked.
        let (offset, len) = (self.offset, self.len);
        let end = offset.saturating_add(len);
        let _ = self.unlock(0, len);
        if self.advise(0, len, Advice::DontNeed).is_err() {
            // It is still locked: no VMA can be split.
            let _ = self.advise(0, len, Advice::DontNeedLocked);
        }
        // Reserve the addresses again, as the reservation has other parts. A refused MAP_FIXED may
        // have unmapped the part, which could then not be unmapped safely. A trial mapping
        // elsewhere therefore shows first whether a limit forbids it (`RLIMIT_AS`,
        // `vm.max_map_count`).
        let reservation = &self.reservation;
        if TrialMapping::new(page_size(), libc::PROT_NONE, Source::Anonymous).is_ok() {
            // SAFETY: 1. The part belongs to this object alone (invariant of `Mapped`), which is
            // being dropped: nothing uses the part any more. 2. `is_here` has returned `true`
            // above. 3. The source is not a file.
            let replaced =
                unsafe { reservation.map_fixed(offset, len, libc::PROT_NONE, Source::Anonymous) };
            match replaced {
                Ok(()) => return,
                // Too much locked memory (mlockall(2)). mmap(2) checks this before it unmaps.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(_) => {
                    // The part may be unmapped, and other code may have mapped memory there.
                    reservation.lose(offset, end);
                    return;
                }
            }
        }
        // Unmapping releases the file and its pages, and other code may then get the addresses.
        reservation.disown(offset, end);
        // SAFETY: the range is the part of this mapping, in the process that made it (`is_here`).
        // It is still mapped: `map_fixed` was not called, or returned EAGAIN, which mmap(2) returns
        // before it unmaps. Nothing uses the range any more, since `self` is being dropped, and a
        // vm-memory region over it would keep the owner of `self`.
        if unsafe { libc::munmap(self.addr().cast(), len) } != 0 {
            // The part is unmapped with the reservation.
            // SAFETY: munmap(2) has failed, so the part is still mapped. It belonged to this object
            // alone (invariant of `Mapped`), which is being dropped.
            unsafe { reservation.keep(offset, end) };
        }
    }
}

/// Maps `len` readable bytes between two readable pages.
///
/// Fails unless `len` is whole pages.
fn map_with_guards(len: usize) -> Result<Reservation> {
    let page = page_size();
    if !len.is_multiple_of(page) {
        return Err(Error::from_raw_os_error(libc::EINVAL));
    }
    let no_room = || Error::from_raw_os_error(libc::ENOMEM);
    let guards = page.checked_mul(2).ok_or_else(no_room)?;
    let with_guards = len.checked_add(guards).ok_or_else(no_room)?;
    let (flags, fd, file_offset) = arguments(Source::Anonymous);
    let process = Process::current()?;
    // SAFETY: without MAP_FIXED, mmap(2) chooses addresses that are not in use.
    let addr = unsafe {
        libc::mmap(
            null_mut(),
            with_guards,
            libc::PROT_READ,
            flags,
            fd,
            file_offset,
        )
    };
    if addr == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: mmap(2) has just made this mapping in `process`, which is this process. No other code
    // knows its address. It is whole pages: `len` was checked.
    Ok(unsafe { Reservation::of(addr.cast(), with_guards, process) })
}

/// `MADV_DONTNEED_LOCKED` (Linux `include/uapi/asm-generic/mman-common.h`, since 5.18).
pub(super) const MADV_DONTNEED_LOCKED: libc::c_int = 24;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Reserved;

    #[test]
    fn mapped_in_child_returns_error() {
        let page = page_size();
        let mut reserved = Reserved::new(page, page, page, 0).unwrap();
        let mut mapped = reserved.map(page, Source::Anonymous).unwrap();
        drop(reserved);
        let here = std::mem::replace(
            &mut Arc::get_mut(&mut mapped.reservation).unwrap().process,
            Process::other(),
        );
        let (zeroes, _) = Mapped::detached_zeroed(page).unwrap();
        for result in [
            mapped.splice_over(0, zeroes),
            mapped.fill_zeroes(0, page),
            mapped.protect(0, page, false),
            mapped.advise(0, page, Advice::DontNeed),
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("parent process"), "{error}");
        }
        Arc::get_mut(&mut mapped.reservation).unwrap().process = here;
        mapped.fill_zeroes(0, page).unwrap();
    }

    #[test]
    fn reserved_new_of_partial_pages_returns_error() {
        let page = page_size();
        assert!(Reserved::new(page, page, page, 0).is_ok());
        for (len, guard, align, rest) in [
            (page + 1, page, page, 0),
            (page, page / 2, page, 0),
            (page, page, page / 2, 0),
            (page, page, 2 * page, page / 2),
        ] {
            let error = Reserved::new(len, guard, align, rest).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(libc::EINVAL),
                "{len:#x} {rest:#x}"
            );
        }
    }

    #[test]
    fn splice_over_replaces_its_range_only() {
        let page = page_size();
        let mut reserved = Reserved::new(4 * page, page, page, 0).unwrap();
        let mapped = reserved.map(4 * page, Source::Anonymous).unwrap();
        let (zeroes, _) = Mapped::detached_zeroed(2 * page).unwrap();
        assert!(mapped.splice_over(3 * page, zeroes).is_err());
        let (zeroes, _) = Mapped::detached_zeroed(2 * page).unwrap();
        mapped.splice_over(page, zeroes).unwrap();
        mapped.fill_zeroes(0, 4 * page).unwrap();
        let mut pages = [0; 4];
        mapped.resident(0, 4 * page, &mut pages).unwrap();
        assert_eq!(pages.map(|page| page & 1), [1; 4]);
    }
}
