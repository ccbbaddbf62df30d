//! Addresses of this process that are kept for guest memory, and what is mapped there.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::{check, Mapped, READ_WRITE};

/// A range of addresses that belongs to nobody else, and in which nothing can be accessed.
///
/// ```text
///   addr                                                    addr + len
///   ├ guard ┤── region ──┤── region ──┤ … ├── region ──┤ guard ┤
/// ```
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(super) addr: *mut u8,
    pub(super) len: usize,
    /// The process that it is in: a child of fork(2) has a copy of this, and other things at these addresses, if it was not given them.
    pub(super) process: u32,
    /// Where the part of it begins and ends that was given away, and is empty if there is none: it is somebody else's, and not unmapped.
    pub(super) gap: (usize, usize),
    /// Whether a part of it may have become somebody else's, and nobody knows which: then nothing here is unmapped any more.
    pub(super) lost: AtomicBool,
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
    pub(super) fn is_here(&self) -> bool {
        self.process == std::process::id()
    }

    /// Whether all addresses are still its own, in this process.
    pub(super) fn is_whole(&self) -> bool {
        // Relaxed: who drops the last reference sees what others did before they dropped theirs, by `Arc`; a part asks for itself.
        !self.lost.load(Ordering::Relaxed) && self.is_here()
    }

    /// Maps over a part of the reservation.
    ///
    /// If that fails the part may be mapped by nobody (mmap(2) unmaps first: Linux before 6.12, and later for files), and another thread may have got
    /// those addresses by now. Unless the caller finds that it was not, the reservation is given up then ([`abandon`](Self::abandon)): its addresses stay
    /// taken until the process ends, which costs nothing else.
    pub(super) fn map_fixed(
        &self,
        offset: usize,
        len: usize,
        protection: libc::c_int,
        source: Source<'_>,
    ) -> Result<()> {
        let (flags, fd, place) = arguments(source);
        let addr = self.addr.wrapping_add(offset);
        // SAFETY: the range lies in this reservation, and its addresses are the reservation's own. They are either those that come next in
        // `Reserved::map`, which has just asked `is_whole`, or those of a `Mapped` that is being dropped, which has just asked `is_here`: the
        // parts of others are lost without it.
        let answer = unsafe {
            libc::mmap(
                addr.cast(),
                len,
                protection,
                flags | libc::MAP_FIXED,
                fd,
                place,
            )
        };
        if answer == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Gives the reservation up: nothing in it is unmapped from now on.
    pub(super) fn abandon(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Makes a part that nothing was mapped in memory of this process's own.
    ///
    /// The reservation is what a mapping of `Source::Anonymous` would be, but for what it permits. To permit more unmaps nothing, so that a
    /// refusal (`RLIMIT_DATA`, `vm.overcommit_memory` of 2) loses nothing, and counts nothing twice against `RLIMIT_MEMLOCK` in a process that has
    /// called mlockall(2).
    fn make_accessible(&self, offset: usize, len: usize) -> Result<()> {
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
pub(super) struct TrialMapping {
    addr: *mut u8,
    len: usize,
}

impl TrialMapping {
    pub(super) fn new(len: usize, protection: libc::c_int, source: Source<'_>) -> Result<Self> {
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

impl Drop for TrialMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is its own, and nobody knows of it.
        let _ = unsafe { libc::munmap(self.addr.cast(), self.len) };
    }
}

/// Flags, descriptor and offset of mmap(2).
pub(super) fn arguments(source: Source<'_>) -> (libc::c_int, libc::c_int, libc::off_t) {
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
            reserve,
        } => {
            let kind = if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            };
            let reserve = if reserve { 0 } else { libc::MAP_NORESERVE };
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
        reserve: bool,
    },
}

impl Reserved {
    /// Reserves `len` bytes and a guard of `guard` bytes before and behind. The address of the first byte leaves `rest` when divided by `align`, a
    /// power of two.
    pub(crate) fn new(len: usize, guard: usize, align: usize, rest: usize) -> Result<Self> {
        let with_guards = guard
            .checked_mul(2)
            .and_then(|guards| len.checked_add(guards));
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
            Source::File { .. } => Some(TrialMapping::new(len, READ_WRITE, source)?),
        };
        let trial = trial.filter(|_| matches!(source, Source::File { shared: true, .. }));
        if !self.reservation.is_whole() {
            return Err(Error::from_raw_os_error(libc::ENOMEM));
        }
        match source {
            Source::Anonymous => self.reservation.make_accessible(self.next, len)?,
            Source::File { .. } => self
                .reservation
                .map_fixed(self.next, len, READ_WRITE, source)
                .inspect_err(|_| self.reservation.abandon())?,
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
