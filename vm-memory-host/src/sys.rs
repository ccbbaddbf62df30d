//! The system calls, and the only `unsafe` of this crate.
//!
//! What is handed out is safe to use: a [`Reservation`] owns a range of this process's addresses, a [`Mapped`] owns a part of it that memory is
//! mapped in, and every call on a part is checked to stay inside.

use std::ffi::CStr;
use std::fs::File;
use std::io::{Error, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError, PluggedBlocks};
use vm_memory::{FileOffset, MmapRegion, VolatileSlice};

use crate::mapping::HostMapping;

/// Protection of memory that a guest has.
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// The size of a page in bytes.
pub(crate) fn page_size() -> u64 {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// A range of addresses that belongs to nobody else, and in which nothing can be accessed.
///
/// ```text
///   addr                                                    addr + len
///   ├ guard ┤── region ──┤── region ──┤ … ├── region ──┤ guard ┤
/// ```
#[derive(Debug)]
pub(crate) struct Reservation {
    addr: *mut u8,
    len: usize,
    /// The process that it is in: a child of fork(2) has a copy of this, and other things at these addresses, if it was not given them.
    process: u32,
    /// Where the part of it begins and ends that was given away, and is empty if there is none: it is somebody else's, and not unmapped.
    gap: (usize, usize),
    /// Whether a part of it may have become somebody else's, and nobody knows which: then nothing here is unmapped any more.
    lost: AtomicBool,
}

// SAFETY: the pointer is to memory that belongs to no thread. It is used for system calls, and for accesses by the functions of vm-memory, which
// are made for many threads.
unsafe impl Send for Reservation {}
// SAFETY: as above; what changes through `&Reservation` is an atomic, and, by system calls, parts that have one owner each.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes, of which the byte at `offset` has an address that leaves `rest` when divided by `align`, a power of two.
    fn new(len: usize, offset: usize, align: usize, rest: usize) -> Result<Self> {
        let too_large = || Error::from_raw_os_error(libc::ENOMEM);
        let more = len.checked_add(align).ok_or_else(too_large)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: without MAP_FIXED, a new mapping replaces none that is there.
        let addr = unsafe { libc::mmap(null_mut(), more, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let addr: *mut u8 = addr.cast();
        // How far the byte at `offset` is from such an address: less than `align`.
        let ahead = rest.wrapping_sub(addr.addr().wrapping_add(offset)) & align.wrapping_sub(1);
        let reservation = Self {
            addr: addr.wrapping_add(ahead),
            len,
            process: std::process::id(),
            gap: (len, len),
            lost: AtomicBool::new(false),
        };
        let behind = more.saturating_sub(ahead).saturating_sub(len);
        // What is left on both sides. If the system refuses, some addresses stay reserved, and nothing else.
        for (addr, len) in [(addr, ahead), (reservation.addr.wrapping_add(len), behind)] {
            if len != 0 {
                // SAFETY: the range is a part of the mapping that was just made, and not of `reservation`; nobody knows of it.
                let _ = unsafe { libc::munmap(addr.cast(), len) };
            }
        }
        Ok(reservation)
    }
}

impl Reservation {
    /// Whether it is in this process, and not in one that this is a child of.
    ///
    /// By the process's number: a child that has the same one, in a PID namespace of its own, is taken for its parent. If memory was kept from it, it must not use
    /// or drop any map that has it (`Region::forked`).
    fn is_here(&self) -> bool {
        self.process == std::process::id()
    }

    /// Whether all addresses are still its own, in this process.
    fn is_whole(&self) -> bool {
        // Relaxed: who drops the last reference sees what others did before they dropped theirs, by `Arc`; a part asks for itself.
        !self.lost.load(Ordering::Relaxed) && self.is_here()
    }

    /// Maps over a part of the reservation.
    ///
    /// If that fails the part may be mapped by nobody (mmap(2) unmaps first: Linux before 6.12, and later for files), and another thread may have got
    /// those addresses by now. Unless the caller finds that it was not, the reservation is given up then (`map_over_or_lose`): its addresses stay
    /// taken until the process ends, which costs nothing else.
    fn map_over(&self, offset: usize, len: usize, protection: libc::c_int, source: Source<'_>) -> Result<()> {
        let (flags, fd, place) = arguments(source);
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: the range lies in this reservation, and its addresses are the reservation's own. They are either those that come next in
        // `Reserved::map`, which has just asked `is_whole`, or those of a `Mapped` that is being dropped, which has just asked `is_here`: the
        // parts of others are lost without it.
        let answer = unsafe { libc::mmap(addr.cast(), len, protection, flags | libc::MAP_FIXED, fd, place) };
        if answer == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Maps over a part of the reservation, or gives the reservation up.
    fn map_over_or_lose(
        &self,
        offset: usize,
        len: usize,
        protection: libc::c_int,
        source: Source<'_>,
    ) -> Result<()> {
        let answer = self.map_over(offset, len, protection, source);
        if answer.is_err() {
            self.lost.store(true, Ordering::Relaxed);
        }
        answer
    }

    /// Makes a part that nothing was mapped in memory of this process's own.
    ///
    /// The reservation is what a mapping of `Source::Anonymous` would be, but for what it permits. To permit more unmaps nothing, so that a
    /// refusal (`RLIMIT_DATA`, `vm.overcommit_memory` of 2) loses nothing, and counts nothing twice against `RLIMIT_MEMLOCK` in a process that has
    /// called mlockall(2).
    fn open(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: the range is the one that comes next in `Reserved::map`, which has just asked `is_whole`: it is this reservation's own, and
        // there is no `Mapped` of it yet. What can be accessed more than before breaks nothing that others rely on.
        check(unsafe { libc::mprotect(addr.cast(), len, READ_WRITE) })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_whole() {
            return;
        }
        let (start, end) = self.gap;
        for (offset, len) in [(0, start), (end, self.len.saturating_sub(end))] {
            if len != 0 {
                // SAFETY: the range is this reservation's own: all that is outside of `gap` is (just asked). Nobody uses what is mapped in it any
                // more: each `Mapped` keeps the reservation, and is dropped before it.
                let _ = unsafe { libc::munmap(self.addr.wrapping_add(offset).cast(), len) };
            }
        }
    }
}

/// A mapping wherever the system likes, to see whether one can be made at all; unmapped when it is dropped.
struct Trial {
    addr: *mut u8,
    len: usize,
}

impl Trial {
    fn new(len: usize, protection: libc::c_int, source: Source<'_>) -> Result<Self> {
        let (flags, fd, place) = arguments(source);
        // SAFETY: without MAP_FIXED, a new mapping replaces none that is there.
        let addr = unsafe { libc::mmap(null_mut(), len, protection, flags, fd, place) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let addr = addr.cast();
        Ok(Self { addr, len })
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // SAFETY: the mapping is its own, and nobody knows of it.
        let _ = unsafe { libc::munmap(self.addr.cast(), self.len) };
    }
}

/// Flags, descriptor and offset of mmap(2).
fn arguments(source: Source<'_>) -> (libc::c_int, libc::c_int, libc::off_t) {
    match source {
        Source::Anonymous => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        ),
        Source::File {
            file,
            offset,
            shared,
            set_aside,
        } => {
            let kind = if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
            let reserve = if set_aside { 0 } else { libc::MAP_NORESERVE };
            // An offset past the greatest one is negative here, and refused by the system.
            (kind | reserve, file.as_raw_fd(), offset.cast_signed())
        }
    }
}

/// A reservation that parts are being mapped in, from its start to its end.
#[derive(Debug)]
pub(crate) struct Reserved {
    reservation: Arc<Reservation>,
    /// Where the part that comes next begins.
    next: usize,
}

/// What is mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// Zeroes of this process's own.
    Anonymous,
    /// A file.
    File {
        file: &'a File,
        offset: u64,
        /// Whether others see what is written.
        shared: bool,
        /// Whether pages of a pool are set aside for all of it.
        set_aside: bool,
    },
}

impl Reserved {
    /// Reserves `len` bytes and a guard of `guard` bytes before and behind. The address of the first byte leaves `rest` when divided by `align`, a
    /// power of two.
    pub(crate) fn new(len: usize, guard: usize, align: usize, rest: usize) -> Result<Self> {
        let with_guards = guard.checked_mul(2).and_then(|guards| len.checked_add(guards));
        let with_guards = with_guards.ok_or_else(|| Error::from_raw_os_error(libc::ENOMEM))?;
        let reservation = Arc::new(Reservation::new(with_guards, guard, align, rest)?);
        Ok(Self {
            reservation,
            next: guard,
        })
    }

    /// Maps the next `len` bytes.
    pub(crate) fn map(&mut self, len: usize, source: Source<'_>) -> Result<Mapped> {
        let end = self.next.checked_add(len);
        let end = end.filter(|end| *end <= self.reservation.len);
        let end = end.ok_or_else(|| Error::from_raw_os_error(libc::EINVAL))?;
        // What a file can refuse it refuses here, where nothing is replaced. Pages of a pool that are set aside for a shared mapping stay so for the
        // next one: they belong to the file (Linux, "Hugetlbfs Reservation"). Those of a private one do not, so that it has to go first.
        let trial = match source {
            Source::Anonymous => None,
            Source::File { .. } => Some(Trial::new(len, READ_WRITE, source)?),
        };
        let trial = trial.filter(|_| matches!(source, Source::File { shared: true, .. }));
        if !self.reservation.is_whole() {
            return Err(Error::from_raw_os_error(libc::ENOMEM));
        }
        match source {
            Source::Anonymous => self.reservation.open(self.next, len)?,
            Source::File { .. } => self
                .reservation
                .map_over_or_lose(self.next, len, READ_WRITE, source)?,
        }
        drop(trial);
        let offset = std::mem::replace(&mut self.next, end);
        Ok(Mapped {
            reservation: Arc::clone(&self.reservation),
            offset,
            len,
            forked: true,
        })
    }
}

/// Memory that is mapped in a part of a reservation. When it is dropped, the part goes back to the reservation.
#[derive(Debug)]
pub(crate) struct Mapped {
    reservation: Arc<Reservation>,
    /// Where in the reservation it begins.
    offset: usize,
    len: usize,
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
    fn addr(&self) -> *mut u8 {
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
    pub(crate) fn zeroes(len: usize) -> Result<(Self, bool)> {
        let zeroes = Self::apart(len)?;
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
    fn apart(len: usize) -> Result<Self> {
        let page = usize::try_from(page_size()).unwrap_or(4096);
        let no_room = || Error::from_raw_os_error(libc::ENOMEM);
        let end = page.checked_add(len).ok_or_else(no_room)?;
        let with_guards = end.checked_add(page).ok_or_else(no_room)?;
        let (flags, fd, place) = arguments(Source::Anonymous);
        // Once, but for another thread that gets the addresses before this one is back.
        for _ in 0..8 {
            // SAFETY: without MAP_FIXED, a new mapping replaces none that is there.
            let addr = unsafe { libc::mmap(null_mut(), with_guards, libc::PROT_READ, flags, fd, place) };
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
    pub(crate) fn put(&self, offset: usize, mut zeroes: Self) -> Result<()> {
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
        let page = usize::try_from(page_size()).unwrap_or(4096);
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
        let protection = if accessible { READ_WRITE } else { libc::PROT_NONE };
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
    pub(crate) fn bind(&self, offset: usize, len: usize, policy: NodePolicy, mask: &[u64]) -> Result<()> {
        let mode = match policy {
            NodePolicy::Preferred => libc::MPOL_PREFERRED,
            NodePolicy::Bind => libc::MPOL_BIND,
            NodePolicy::Interleave => libc::MPOL_INTERLEAVE,
        };
        let addr = self.part(offset, len)?;
        // One more than there are bits: the kernel counts from one (mbind(2), "BUGS" of get_mempolicy(2)).
        let bits = mask.len().saturating_mul(64).saturating_add(1);
        // SAFETY: the kernel reads `bits - 1` bits at `mask`, which are there; the mapping's bytes do not change.
        let answer = unsafe { libc::syscall(libc::SYS_mbind, addr, len, mode, mask.as_ptr(), bits, 0) };
        check(libc::c_int::try_from(answer).unwrap_or(-1))
    }

    /// For each page of a part, whether it is in memory; `pages` is as long as there are.
    pub(crate) fn resident(&self, offset: usize, len: usize, pages: &mut [u8]) -> Result<()> {
        let page = usize::try_from(page_size()).unwrap_or(4096);
        if pages.len() < len.div_ceil(page) {
            return Err(Error::from_raw_os_error(libc::EINVAL));
        }
        let addr = self.part(offset, len)?;
        // SAFETY: the kernel writes a byte for each page of the range, and `pages` has as many (just checked).
        check(unsafe { libc::mincore(addr.cast(), len, pages.as_mut_ptr()) })
    }

    /// Writes zeroes to a part.
    pub(crate) fn zero(&self, offset: usize, len: usize) -> Result<()> {
        let addr = self.part(offset, len)?;
        // SAFETY: the range is mapped as long as `self` is there, which outlives `slice`, and no reference of Rust's covers it.
        let slice = unsafe { VolatileSlice::new(addr, len) };
        slice.fill_with_byte(0).map_err(Error::other)
    }

    /// Makes a region of vm-memory of the whole mapping, which `owner` has.
    pub(crate) fn region<B: Bitmap>(
        owner: &Arc<HostMapping>,
        file: Option<FileOffset>,
        hugetlb: bool,
        blocks: Option<Arc<PluggedBlocks>>,
        bitmap: B,
    ) -> std::result::Result<MmapRegion<B>, MmapRegionError> {
        let mapped = owner.mapped();
        let shared = owner.is_shared();
        let anonymous = if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
        let kind = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let mut builder = MmapRegionBuilder::new_with_bitmap(mapped.len, bitmap)
            .with_mmap_prot(READ_WRITE)
            .with_mmap_flags(kind | anonymous | libc::MAP_NORESERVE)
            .with_hugetlbfs(hugetlb)
            .with_owner(Arc::clone(owner));
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        if let Some(blocks) = blocks {
            builder = builder.with_plugged_blocks(blocks);
        }
        // SAFETY: 1. `mapped` is as long as the region, and was mapped with its protection; what `protect` takes away, `PluggedBlocks` keep
        // accesses from. 2. It stays in place while `owner` lives, which has it by value and does not give it out, and the region keeps
        // `owner`. 3. It is accessed through vm-memory only, so that no reference of Rust's covers it.
        let builder = unsafe { builder.with_raw_mmap_pointer(mapped.addr()) };
        builder.build()
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
        let page = usize::try_from(page_size()).unwrap_or(4096);
        let is_kept = !is_last && self.reservation.is_whole();
        if is_kept && Trial::new(page, libc::PROT_NONE, Source::Anonymous).is_ok() {
            let replaced = self
                .reservation
                .map_over(offset, len, libc::PROT_NONE, Source::Anonymous);
            match replaced {
                Ok(()) => return,
                // More locked memory than the process may have (mlockall(2)): refused before anything is unmapped (mmap(2)).
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(_) => {
                    self.reservation.lost.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
        // Unmapped, it lets its file go, and with the file the pages. Others may have these addresses from now on, so that the reservation is given up first.
        self.reservation.lost.store(true, Ordering::Relaxed);
        // SAFETY: the range is this mapping's, in this process (asked above), and nothing has been tried that could have unmapped it. `self` is the
        // last that knows of it, as said above.
        let _ = unsafe { libc::munmap(self.addr().cast(), len) };
    }
}

/// `MADV_DONTNEED_LOCKED` (Linux `include/uapi/asm-generic/mman-common.h`, since 5.18).
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// Makes an anonymous file of `len` bytes: of ordinary pages, or of huge ones of `huge` bytes. It can be sealed.
pub(crate) fn memfd(name: &CStr, len: u64, huge: Option<u64>) -> Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if let Some(size) = huge {
        // The size as a power of two, at bit 26 (memfd_create(2), "MFD_HUGE_2MB").
        flags |= libc::MFD_HUGETLB
            | size
                .trailing_zeros()
                .wrapping_shl(libc::MAP_HUGE_SHIFT.unsigned_abs());
    }
    // SAFETY: the kernel reads the name, up to its end.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    check(fd)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    if file_size_limit().is_some_and(|limit| len > limit) {
        // The kernel would send SIGXFSZ, which ends the process, before it answers that.
        return Err(Error::from_raw_os_error(libc::EFBIG));
    }
    file.set_len(len)?;
    Ok(file)
}

/// Seals a memfd: nobody can change its length any more, nor its seals.
pub(crate) fn seal_length(file: &File) -> Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: changes flags of a file.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })
}

/// Whether a descriptor can be written to, as a shared mapping is.
pub(crate) fn is_open_for_writing(file: &File) -> Result<bool> {
    // SAFETY: reads flags of a descriptor.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags & libc::O_ACCMODE != libc::O_RDONLY)
}

/// What `fstatfs(2)` says of a file.
pub(crate) fn file_system(file: &File) -> Result<FileSystem> {
    let mut answer = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `answer` has room for what fstatfs(2) writes.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) })?;
    // SAFETY: zeroes are a valid `statfs`, and the call has succeeded in filling it.
    let answer = unsafe { answer.assume_init() };
    // The fields are of different types for different targets.
    let (kind, block_size) = (i128::from(answer.f_type), i128::from(answer.f_bsize));
    Ok(FileSystem {
        kind,
        block_size: u64::try_from(block_size).unwrap_or(0),
        is_limited: answer.f_blocks != 0,
    })
}

/// What a file is on.
pub(crate) struct FileSystem {
    pub(crate) kind: i128,
    /// On hugetlbfs, the size of a page in bytes.
    pub(crate) block_size: u64,
    /// Whether it has an end: the kernel's own tmpfs, which memfds are on, has none.
    pub(crate) is_limited: bool,
}

/// The kind of file system that hugetlbfs is (`HUGETLBFS_MAGIC`, Linux `include/uapi/linux/magic.h`).
pub(crate) const HUGETLBFS: i128 = 0x958458f6;
/// The kind of file system that tmpfs is, and with it a memfd (`TMPFS_MAGIC`).
pub(crate) const TMPFS: i128 = 0x01021994;

/// Makes a range of a file zeroes. Its length stays.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(
        file,
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    )
}

/// Gives pages of a file back: they read as zeroes. Its length stays.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(
        file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    )
}

/// Takes pages, or blocks of a disk, for a range of a file where there are none.
pub(crate) fn allocate_range(file: &File, offset: u64, len: u64) -> Result<()> {
    allocate(file, libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

fn allocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> Result<()> {
    let invalid = |_| Error::from_raw_os_error(libc::EINVAL);
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    let len = libc::off_t::try_from(len).map_err(invalid)?;
    loop {
        // SAFETY: changes a file; memory that is mapped from it stays mapped, and its bytes may change at any time anyway.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            answer => return answer,
        }
    }
}

/// Whether a file is sealed against shrinking; false for one that cannot be.
pub(crate) fn cannot_shrink(file: &File) -> bool {
    // SAFETY: asks for flags.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// How many bytes this process may lock; `None` for as many as it likes.
pub(crate) fn lock_limit() -> Option<u64> {
    // SAFETY: `limit` has room for what getrlimit(2) writes.
    limit(|limit| unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, limit) })
}

/// How long a file may be that this process makes longer, in bytes; `None` for any length.
fn file_size_limit() -> Option<u64> {
    // SAFETY: as above.
    limit(|limit| unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, limit) })
}

/// A limit that `get` asks for. (Their names are of different types for different targets.)
fn limit(get: impl FnOnce(&mut libc::rlimit) -> libc::c_int) -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let answer = get(&mut limit);
    (answer == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

fn check(answer: libc::c_int) -> Result<()> {
    if answer < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a child of fork(2), what was kept from it has left addresses where its own memory may be.
    #[test]
    fn a_child_of_fork_changes_nothing_at_these_addresses() {
        let page = usize::try_from(page_size()).unwrap();
        let mut reserved = Reserved::new(page, page, page, 0).unwrap();
        let mut mapped = reserved.map(page, Source::Anonymous).unwrap();
        drop(reserved);
        let other = std::process::id().wrapping_add(1);
        let here = std::mem::replace(&mut Arc::get_mut(&mut mapped.reservation).unwrap().process, other);
        // A child has what was not kept from it.
        mapped.zero(0, page).unwrap();
        mapped.forked = false;
        let (zeroes, _) = Mapped::zeroes(page).unwrap();
        assert!(mapped.put(0, zeroes).is_err());
        for answer in [
            mapped.zero(0, page),
            mapped.protect(0, page, false),
            mapped.advise(0, page, Advice::DontNeed),
        ] {
            let error = answer.unwrap_err();
            assert!(error.to_string().contains("another process"), "{error}");
        }
        Arc::get_mut(&mut mapped.reservation).unwrap().process = here;
        mapped.zero(0, page).unwrap();
    }

    #[test]
    fn zeroes_are_put_in_a_part_and_nowhere_else() {
        let page = usize::try_from(page_size()).unwrap();
        let mut reserved = Reserved::new(4 * page, page, page, 0).unwrap();
        let mapped = reserved.map(4 * page, Source::Anonymous).unwrap();
        let (zeroes, _) = Mapped::zeroes(2 * page).unwrap();
        assert!(mapped.put(3 * page, zeroes).is_err());
        let (zeroes, _) = Mapped::zeroes(2 * page).unwrap();
        mapped.put(page, zeroes).unwrap();
        mapped.zero(0, 4 * page).unwrap();
        let mut pages = [0; 4];
        mapped.resident(0, 4 * page, &mut pages).unwrap();
        assert_eq!(pages.map(|page| page & 1), [1; 4]);
    }
}
