//! System calls and the addresses that they change.
//!
//! The types here have safe methods only. [`Reserved`] owns a range of this process's addresses,
//! and [`Mapped`] owns the part for one region. Each method of `Mapped` checks that its range is
//! inside that part.
//!
//! Calls that take only descriptors and numbers use `rustix`, whose functions for them are safe.
//! All others use `libc` (decision 31).

mod arena;
mod files;
mod mapped;
mod process;
mod remedies;
mod reservation;
mod signals;
mod threads;

pub(crate) use arena::{page_size_of, ReservedArena, MAPPINGS_ARE_WHOLE};
pub(crate) use files::{
    allocate_own_range, allocate_range, block_device_length, can_be_sealed, cannot_shrink,
    file_system, is_open_for_writing, memfd, next_data, punch_hole, seal_length, zero_range,
    FileSystem, HUGETLBFS, TMPFS,
};
pub(crate) use mapped::{Advice, Mapped, NodePolicy};
#[cfg(test)]
pub(crate) use process::{in_child, in_child_without_main_thread};
pub(crate) use remedies::{plug_remedy, populate_remedy, SHORTAGES, VMA_REMEDY};
pub(crate) use reservation::{
    populates_mappings, resident_of_file, still_mapped, Reserved, Source,
};
pub(crate) use threads::{run_detached, run_on_threads, Cpus};

use std::io::{Error, Result};
/// An open file, in the signatures of this crate.
pub(crate) use std::os::fd::OwnedFd as OwnedFile;

use super::to_u64;

/// The protection of guest memory.
pub(crate) const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Returns the size of an ordinary page in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: `sysconf(3)` takes any number and touches no memory of the caller.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// Returns the number of bytes that this process may lock, or `None` if it is not limited.
pub(crate) fn lock_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_MEMLOCK)
}

/// Returns the number of bytes of addresses that this process may map, or `None` if unlimited.
pub(crate) fn address_space_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_AS)
}

/// Returns the number of bytes of private memory that may be written, or `None` if unlimited.
pub(crate) fn data_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_DATA)
}

/// Returns the length to which this process may extend a file, or `None` if it is not limited.
pub(crate) fn file_size_limit() -> Option<u64> {
    soft_limit(libc::RLIMIT_FSIZE)
}

/// The type of the names of limits, which differs between C libraries.
#[cfg(target_env = "gnu")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_env = "gnu"))]
type Resource = libc::c_int;

/// Returns a soft limit, or `None` if there is none or if a seccomp filter refuses the call.
fn soft_limit(resource: Resource) -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit(2) writes one `rlimit` to its argument, a live reference to one.
    let result = unsafe { libc::getrlimit(resource, &mut limit) };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Turns the result of a system call into an error if it is negative.
fn check(result: libc::c_int) -> Result<()> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}
