//! [`Mapped`]: memory in its place, and the calls that change it.

use std::ffi::CStr;
use std::io::{Error, Result};
use std::ptr::null_mut;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::reservation::{arguments, Reservation, Source, TrialMapping};
use super::{check, page_size, READ_WRITE};

/// Memory that is mapped in a part of a reservation. When it is dropped, the part goes back to the reservation.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(super) reservation: Arc<Reservation>,
    /// Where in the reservation it begins.
    pub(super) offset: usize,
    pub(super) len: usize,
    /// Whether a child of fork(2) has it, too.
    pub(crate) forked: bool,
}

/// What `madvise(2)` is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Advice {
    HugePages,
    NoHugePages,
    Mergeable,
    NoDump,
    NoFork,
    /// Gives the pages back.
    DontNeed,
    /// The same where pages are locked (Linux 5.18).
    DontNeedLocked,
    /// Makes pages present for writing (Linux 5.14).
    PopulateWrite,
    /// Makes pages present for reading.
    PopulateRead,
}

/// The policy of `mbind(2)`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NodePolicy {
    Bind,
    Preferred,
    Interleave,
}

impl Mapped {
    /// Its first byte.
    pub(crate) fn addr(&self) -> *mut u8 {
        self.reservation.addr.wrapping_add(self.offset)
    }

    /// Where it begins in this process.
    pub(crate) fn host_address(&self) -> usize {
        self.addr().addr()
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of a part; `EINVAL` if it is none.
    ///
    /// In a child of fork(2) that has not got the memory it is refused: the child may have anything at these addresses.
    fn part(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if !self.forked && !self.reservation.is_here() {
            return Err(Error::other(
                "the memory was built by another process, of which this is a child, and was kept from children (Region::forked)",
            ));
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        end.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        Ok(self.addr().wrapping_add(offset))
    }

    /// `madvise(2)` of a part.
    pub(crate) fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<()> {
        let advice = match advice {
            Advice::HugePages => libc::MADV_HUGEPAGE,
            Advice::NoHugePages => libc::MADV_NOHUGEPAGE,
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::NoDump => libc::MADV_DONTDUMP,
            Advice::NoFork => libc::MADV_DONTFORK,
            Advice::DontNeed => libc::MADV_DONTNEED,
            Advice::DontNeedLocked => MADV_DONTNEED_LOCKED,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
        };
        let addr = self.part(offset, len)?;
        // SAFETY: the range is this mapping's. No advice unmaps it or takes its protection; those that change its bytes make them zeroes, or
        // those of the file, as a guest that writes at any time could.
        check(unsafe { libc::madvise(addr.cast(), len, advice) })
    }

    /// Maps zeroes of this process's own somewhere else, which are then told their options and put in a place. They are locked on use if the process
    /// locks all that it maps; `true` comes with them then.
    ///
    /// Nothing touches them before they are in their place: only then does the kernel make one area of them and of what is next to them there. (Pages
    /// have an `anon_vma`, by which the kernel finds who maps them, and areas that have each its own stay apart for good.) That takes more than to
    /// leave them alone:
    ///
    /// - They have a page of other protection on both sides, so that they are no part of an area of somebody else's, which may have pages.
    /// - What is accessible and locked gets its pages at once (mlockall(2) with `MCL_FUTURE`). So they are not accessible until they are not locked.
    pub(crate) fn detached_zeroed(len: usize) -> Result<(Self, bool)> {
        let zeroes = Self::detached_inaccessible(len)?;
        // Locked memory refuses this advice, and there is no page that it could take.
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

    /// An area of addresses that is no part of another one and that nothing can be accessed in, in a reservation of its own.
    fn detached_inaccessible(len: usize) -> Result<Self> {
        let page = page_size();
        let no_room = || Error::from_raw_os_error(libc::ENOMEM);
        let end = page.checked_add(len).ok_or_else(no_room)?;
        let with_guards = end.checked_add(page).ok_or_else(no_room)?;
        let (flags, fd, place) = arguments(Source::Anonymous);
        // Once, but for another thread that gets the addresses before this one is back.
        for _ in 0..8 {
            // SAFETY: without MAP_FIXED, a new mapping replaces none that is there.
            let addr =
                unsafe { libc::mmap(null_mut(), with_guards, libc::PROT_READ, flags, fd, place) };
            if addr == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            let mut reservation = Reservation {
                addr: addr.cast(),
                len: with_guards,
                process: std::process::id(),
                gap: (with_guards, with_guards),
                lost: AtomicBool::new(false),
            };
            let middle: *mut libc::c_void = reservation.addr.wrapping_add(page).cast();
            // SAFETY: the range is a part of the mapping that was just made, and nobody knows of it.
            check(unsafe { libc::munmap(middle, len) })?;
            reservation.gap = (page, end);
            let only_there = flags | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: with MAP_FIXED_NOREPLACE, and without MAP_FIXED, a new mapping replaces none that is there.
            let answer = unsafe { libc::mmap(middle, len, libc::PROT_NONE, only_there, fd, place) };
            if answer == middle {
                reservation.gap = (with_guards, with_guards);
                return Ok(Self {
                    reservation: Arc::new(reservation),
                    offset: page,
                    len,
                    forked: true,
                });
            }
            if answer != libc::MAP_FAILED {
                // Linux before 4.17 maps it elsewhere.
                // SAFETY: the mapping was just made, and nobody knows of it.
                let _ = unsafe { libc::munmap(answer, len) };
                continue;
            }
            let error = Error::last_os_error();
            if error.raw_os_error() != Some(libc::EEXIST) {
                return Err(error);
            }
        }
        Err(no_room())
    }

    /// Puts zeroes that were made ready in place of a part that is as long, in one step: who accesses the part meanwhile finds what was there, or waits
    /// and finds the zeroes, with all their options.
    ///
    /// # Aborts
    ///
    /// If the system has unmapped the part and cannot map the zeroes there: guest memory would be anybody's. That takes a kernel that has no memory for
    /// its own tables, or that accounts all memory (`vm.overcommit_memory` is 2) and has none left.
    pub(crate) fn splice_over(&self, offset: usize, mut zeroes: Self) -> Result<()> {
        let len = zeroes.len;
        if !self.reservation.is_here() {
            // Whether a child has the memory is not only this crate's to say: a driver may have kept it from children, too.
            return Err(Error::other(
                "the memory was built by another process, of which this is a child",
            ));
        }
        let (to, from) = (self.part(offset, len)?, zeroes.part(0, len)?);
        let (start, end) = (zeroes.offset, zeroes.offset.saturating_add(len));
        let reservation = Arc::get_mut(&mut zeroes.reservation);
        let reservation = reservation.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: what is replaced is a part of this mapping (`part`), in the process that has it (asked above), and stays mapped, with the protection
        // that it had: bytes change, as a guest that writes at any time could change them. What is moved away is all of `zeroes`, which nobody else
        // has: it is taken by value, and its reservation is lent to nobody (`get_mut`).
        let answer = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
        if answer != libc::MAP_FAILED {
            reservation.gap = (start, end);
            return Ok(());
        }
        let refused = Error::last_os_error();
        let page = page_size();
        // Nothing is allocated here: that could map something into the hole, if there is one.
        let mut pages = [0; 4096];
        let step = page.saturating_mul(pages.len());
        for done in (0..len).step_by(step) {
            let here = len.saturating_sub(done).min(step);
            // ENOMEM says that there is an address in the range that is not mapped (mincore(2)).
            if self
                .resident(offset.saturating_add(done), here, &mut pages)
                .is_err()
            {
                std::process::abort();
            }
        }
        // It was refused before anything was unmapped; or another thread has filled the whole hole since, which nobody could tell.
        Err(refused)
    }

    /// Takes away or gives back what a part permits.
    pub(crate) fn protect(&self, offset: usize, len: usize, accessible: bool) -> Result<()> {
        let addr = self.part(offset, len)?;
        let protection = if accessible {
            READ_WRITE
        } else {
            libc::PROT_NONE
        };
        // SAFETY: the range is this mapping's. What cannot be accessed any more is not lent from now on: `PluggedBlocks` are asked first; an access
        // that was under way is answered with a signal, which is no undefined behaviour, and an error where `fault` is installed.
        check(unsafe { libc::mprotect(addr.cast(), len, protection) })
    }

    /// Locks a part: now, or each page when it is first there.
    pub(crate) fn lock(&self, offset: usize, len: usize, on_fault: bool) -> Result<()> {
        let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
        let addr = self.part(offset, len)?;
        // SAFETY: locking changes no bytes.
        check(unsafe { libc::mlock2(addr.cast(), len, flags) })
    }

    /// Lets a part be swapped out.
    fn unlock(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.part(offset, len)?;
        // SAFETY: unlocking changes no bytes.
        check(unsafe { libc::munlock(addr.cast(), len) })
    }

    /// Gives a part a name in /proc/self/maps (Linux 5.17; of shared anonymous memory 6.2).
    pub(crate) fn name(&self, offset: usize, len: usize, name: &CStr) -> Result<()> {
        let addr = self.part(offset, len)?;
        let (set, what) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME);
        // SAFETY: the kernel reads the name, up to its end; the mapping's bytes do not change.
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

    /// Sets on which nodes a part takes its pages. `mask` has a bit for each.
    pub(crate) fn bind(
        &self,
        offset: usize,
        len: usize,
        policy: NodePolicy,
        mask: &[u64],
    ) -> Result<()> {
        let mode = match policy {
            NodePolicy::Preferred => libc::MPOL_PREFERRED,
            NodePolicy::Bind => libc::MPOL_BIND,
            NodePolicy::Interleave => libc::MPOL_INTERLEAVE,
        };
        let addr = self.part(offset, len)?;
        // One more than there are bits: the kernel counts from one (mbind(2), "BUGS" of get_mempolicy(2)).
        let bits = mask.len().saturating_mul(64).saturating_add(1);
        // SAFETY: the kernel reads `bits - 1` bits at `mask`, which are there; the mapping's bytes do not change.
        let answer =
            unsafe { libc::syscall(libc::SYS_mbind, addr, len, mode, mask.as_ptr(), bits, 0) };
        check(libc::c_int::try_from(answer).unwrap_or(-1))
    }

    /// For each page of a part, whether it is in memory; `pages` is as long as there are.
    pub(crate) fn resident(&self, offset: usize, len: usize, pages: &mut [u8]) -> Result<()> {
        let page = page_size();
        if pages.len() < len.div_ceil(page) {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        let addr = self.part(offset, len)?;
        // SAFETY: the kernel writes a byte for each page of the range, and `pages` has as many (just checked).
        check(unsafe { libc::mincore(addr.cast(), len, pages.as_mut_ptr()) })
    }

    /// Writes zeroes to a part.
    pub(crate) fn fill_zeroes(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.part(offset, len)?;
        // SAFETY: the range is mapped as long as `self` is there, which outlives `slice`, and no reference of Rust's covers it.
        let slice = unsafe { VolatileSlice::new(addr, len) };
        slice.fill_with_byte(0).map_err(Error::other)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.reservation.is_here() {
            return;
        }
        let is_last = Arc::get_mut(&mut self.reservation).is_some();
        if is_last && self.reservation.is_whole() {
            // The reservation goes with this, its last part, and takes it along.
            return;
        }
        // Nobody has a use for the pages, and they need not wait for what may be refused: pages go even where there is no room for anything. What
        // is locked is counted until it is unlocked, and may refuse to go. There is nobody to tell of an error.
        let (offset, len) = (self.offset, self.len);
        let _ = self.unlock(0, len);
        let _ = self.advise(0, len, Advice::DontNeed);
        // The part becomes what it was, so that nobody else is given its addresses while the reservation has its others. It is this mapping's, even
        // where the reservation has lost another part, and `self` is the last that knows of it: a region that was made of it keeps its owner.
        //
        // What would refuse that is found elsewhere (`RLIMIT_AS`, `vm.max_map_count`): where it was refused here, nobody could say whether the part
        // is still mapped, and it could not be unmapped.
        let page = page_size();
        let is_kept = !is_last && self.reservation.is_whole();
        if is_kept && TrialMapping::new(page, libc::PROT_NONE, Source::Anonymous).is_ok() {
            let replaced =
                self.reservation
                    .map_fixed(offset, len, libc::PROT_NONE, Source::Anonymous);
            match replaced {
                Ok(()) => return,
                // More locked memory than the process may have (mlockall(2)): refused before anything is unmapped (mmap(2)).
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(_) => {
                    self.reservation.abandon();
                    return;
                }
            }
        }
        // Unmapped, it lets its file go, and with the file the pages. Others may have these addresses from now on, so that the reservation is given up first.
        self.reservation.abandon();
        // SAFETY: the range is this mapping's, in this process (asked above), and nothing has been tried that could have unmapped it. `self` is the
        // last that knows of it, as said above.
        let _ = unsafe { libc::munmap(self.addr().cast(), len) };
    }
}

/// `MADV_DONTNEED_LOCKED` (Linux `include/uapi/asm-generic/mman-common.h`, since 5.18).
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Reserved;

    /// In a child of fork(2), what was kept from it has left addresses where its own memory may be.
    #[test]
    fn a_child_of_fork_changes_nothing_at_these_addresses() {
        let page = page_size();
        let mut reserved = Reserved::new(page, page, page, 0).unwrap();
        let mut mapped = reserved.map(page, Source::Anonymous).unwrap();
        drop(reserved);
        let other = std::process::id().wrapping_add(1);
        let here = std::mem::replace(
            &mut Arc::get_mut(&mut mapped.reservation).unwrap().process,
            other,
        );
        // A child has what was not kept from it.
        mapped.fill_zeroes(0, page).unwrap();
        mapped.forked = false;
        let (zeroes, _) = Mapped::detached_zeroed(page).unwrap();
        assert!(mapped.splice_over(0, zeroes).is_err());
        for answer in [
            mapped.fill_zeroes(0, page),
            mapped.protect(0, page, false),
            mapped.advise(0, page, Advice::DontNeed),
        ] {
            let error = answer.unwrap_err();
            assert!(error.to_string().contains("another process"), "{error}");
        }
        Arc::get_mut(&mut mapped.reservation).unwrap().process = here;
        mapped.fill_zeroes(0, page).unwrap();
    }

    #[test]
    fn zeroes_are_put_in_a_part_and_nowhere_else() {
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
