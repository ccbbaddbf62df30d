//! Turning SIGBUS and SIGSEGV inside guest accesses into errors.
//!
//! A page can go away under a mapping: its file is truncated, the page is poisoned by a memory error, the pool of huge pages is empty, a
//! userfaultfd answers with SIGBUS, somebody calls `mprotect`. Touching it kills the process. After [`install`], an access of this
//! crate's that touches it returns an error instead:
//!
//! - `read`, `write` and their kin return the bytes done before it, and the error when there are none;
//! - everything else returns an `IOError` whose `raw_os_error()` is `EFAULT`, and what has no error (`VolatileRef::load`, `copy_to`) reads
//!   zeroes or stops early;
//! - [`last`] tells the thread what happened.
//!
//! ```no_run
//! vm_memory::fault::install()?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # What the handler does
//!
//! It acts when all of this is so: the signal was raised by an access (`si_code`); the program counter is at an instruction of this crate's that
//! moves guest bytes; and the faulting address lies in the guest operand of it. A host buffer on a guard page, a null pointer elsewhere,
//! `kill -BUS`, a memory error in other memory: all go where they went before, to the handlers that were installed when `install` was called
//! (Rust's own message about a stack overflow, a crash reporter) or to the default action.
//!
//! It runs on the alternate stack where the thread has one. It reads the table of instructions and changes two registers: no allocation, no
//! lock, no thread-local state.
//!
//! # What cannot work
//!
//! - A handler for SIGBUS or SIGSEGV that is installed later and does not call the one before: it gets the signals, and these are deadly again.
//! - A thread that blocks SIGBUS or SIGSEGV: the kernel kills a process that faults with the signal blocked.
//! - Pointers that were handed out (`ptr_guard`, `get_host_address`), and references (`aligned_as_ref`, `get_atomic_ref`): accesses through
//!   them are not this crate's. System calls through them answer `EFAULT` by themselves.
//! - Accesses in another shared object than the one that `install` is in (`dylib`, `prefer-dynamic`): each has a table of its own, and the
//!   handler knows one. For the same reason, an object that called `install` must not be unloaded.
//! - Targets other than Linux on x86_64 and (little-endian) aarch64: [`install`] answers `Unsupported` there.
//!
//! System calls: `sigaction(2)` when installed, and again with `raise(3)` when a signal that is not ours meets the default action.

#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_pointer_width = "64",
    target_endian = "little",
    not(miri),
    not(vm_memory_portable),
    any(
        feature = "rawfd",
        feature = "backend-mmap",
        feature = "backend-bitmap"
    )
))]
#[path = "fault/linux.rs"]
mod handler;
#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_pointer_width = "64",
    target_endian = "little",
    not(miri),
    not(vm_memory_portable),
    any(
        feature = "rawfd",
        feature = "backend-mmap",
        feature = "backend-bitmap"
    )
)))]
#[path = "fault/unsupported.rs"]
mod handler;

use core::cell::Cell;

use crate::address::GuestAddress;

/// Which way the bytes were going.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// Out of guest memory.
    Read,
    /// Into guest memory.
    Write,
}

/// An access that met a page which is not there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LastFault {
    /// The guest address (an IOVA where an IOMMU is on) of the byte that faulted, if the access was by guest address.
    pub guest_address: Option<GuestAddress>,
    /// The address of that byte in this process.
    pub host_address: usize,
    /// Which way the bytes were going.
    pub direction: Direction,
    /// How many bytes the piece of the access that lies in one region had moved before, from the first on. 0 for a copy within guest memory to a place
    /// that overlaps and is higher, or lower by less than 16 bytes: what such a copy has moved cannot be told.
    pub completed: usize,
}

std::thread_local! {
    /// Set by accesses, after the handler has returned: the handler itself touches none of this.
    static LAST: Cell<Option<LastFault>> = const { Cell::new(None) };
    /// How many there were. It wraps.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Returns the last fault that an access of this thread has met, if it has met one.
pub fn last() -> Option<LastFault> {
    LAST.get()
}

/// How many faults this thread has noted, for telling whether one came in between. It wraps.
#[inline]
pub(crate) fn count() -> u64 {
    COUNT.get()
}

/// Notes a fault of this thread's.
#[cold]
pub(super) fn note(host_address: usize, direction: Direction, completed: usize) {
    COUNT.set(COUNT.get().wrapping_add(1));
    LAST.set(Some(LastFault {
        guest_address: None,
        host_address,
        direction,
        completed,
    }));
}

/// Adds the bytes that a larger access had moved before the part that has met the last fault.
#[cold]
pub(super) fn add_completed(before: usize) {
    if let Some(fault) = LAST.get() {
        LAST.set(Some(LastFault {
            completed: fault.completed.saturating_add(before),
            ..fault
        }));
    }
}

/// Adds the guest address to the last fault, for an access to `len` bytes that lie at `guest` for the guest and at `host` here.
#[cold]
pub(crate) fn note_guest_address(guest: GuestAddress, host: *const u8, len: usize) {
    if let Some(fault) = LAST.get() {
        let offset = fault.host_address.wrapping_sub(host.addr());
        if let (true, Ok(offset)) = (offset < len, u64::try_from(offset)) {
            let guest_address = guest.0.checked_add(offset).map(GuestAddress);
            LAST.set(Some(LastFault {
                guest_address,
                ..fault
            }));
        }
    }
}

/// Installs the handler, for the whole process. Calling it again does nothing.
///
/// # Errors
///
/// `ErrorKind::Unsupported` where this cannot be had; otherwise what `sigaction(2)` answers.
pub fn install() -> std::io::Result<()> {
    handler::install()
}
