//! The system calls, and the only `unsafe` of this crate.
//!
//! What is handed out is safe to use: a [`Reserved`] owns a range of this process's addresses, a [`Mapped`] owns a part of it that memory is
//! mapped in, and every call on a part is checked to stay inside.

mod files;
mod mapped;
mod reservation;

pub(crate) use files::{
    allocate_range, cannot_shrink, file_system, is_open_for_writing, memfd, punch_hole,
    seal_length, zero_range, FileSystem, HUGETLBFS, TMPFS,
};
pub(crate) use mapped::{Advice, Mapped, NodePolicy};
pub(crate) use reservation::{Reserved, Source};

use std::io::{Error, Result};

/// Protection of memory that a guest has.
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Returns the size of an ordinary page in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: `sysconf(3)` takes any number and touches no memory of the caller.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// Returns [`page_size`] for arithmetic with file offsets and guest addresses.
pub(crate) fn page_size_u64() -> u64 {
    u64::try_from(page_size()).unwrap_or(4096)
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
