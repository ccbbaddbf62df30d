//! System calls of Windows.

mod arena;
mod files;
mod memory;
mod placeholders;
mod remedies;
mod threads;

pub(crate) use arena::{page_size_of, ReservedArena, MAPPINGS_ARE_WHOLE};
pub(crate) use files::{file_identity, has_holes};
pub(crate) use memory::{large_page_size, still_mapped, Mapped, Placement};
pub(crate) use remedies::{plug_remedy, populate_remedy, SHORTAGES, VMA_REMEDY};
pub(crate) use threads::{run_on_threads, Cpus};

/// An open file, in the signatures of this crate.
pub(crate) use std::os::windows::io::OwnedHandle as OwnedFile;

use std::io::{Error, Result};
use std::mem::MaybeUninit;

use windows_sys::Win32::Foundation::{ERROR_INVALID_PARAMETER, HANDLE};
use windows_sys::Win32::System::SystemInformation::{GetSystemInfo, SYSTEM_INFO};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, GetNumaHighestNodeNumber};

/// Returns the size of an ordinary page in bytes.
pub(crate) fn page_size() -> usize {
    let mut info = MaybeUninit::<SYSTEM_INFO>::uninit();
    // SAFETY: the call writes one `SYSTEM_INFO` to its argument, which has room for it.
    unsafe { GetSystemInfo(info.as_mut_ptr()) };
    // SAFETY: the call has written all of it, and cannot fail.
    let info = unsafe { info.assume_init() };
    usize::try_from(info.dwPageSize).unwrap_or(4096)
}

/// Returns the highest number of a NUMA node, or 0 if the system does not tell.
pub(crate) fn highest_node() -> u32 {
    let mut highest = 0;
    // SAFETY: the call writes one number to its argument, a live reference to one.
    match unsafe { GetNumaHighestNodeNumber(&mut highest) } {
        0 => 0,
        _ => highest,
    }
}

/// Returns the handle that stands for this process. Nobody has to close it.
fn this_process() -> HANDLE {
    // SAFETY: the call takes no argument, and returns a constant.
    unsafe { GetCurrentProcess() }
}

/// Turns the result of a system call into an error if it is `FALSE`.
fn check(succeeded: i32) -> Result<()> {
    match succeeded {
        0 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}

fn invalid() -> Error {
    Error::from_raw_os_error(ERROR_INVALID_PARAMETER.cast_signed())
}
