//! The size of a page of the host.

use core::num::NonZeroUsize;

#[cfg(windows)]
use windows_sys::Win32::System::SystemInformation::{GetSystemInfo, SYSTEM_INFO};

/// The page size if the caller gives none and the system cannot be queried: 4 KiB.
pub(crate) const DEFAULT_PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Returns the size in bytes of a page of the host, by `sysconf(3)`, which makes no system call, or
/// by `GetSystemInfo`.
pub(crate) fn host_page_size() -> NonZeroUsize {
    #[cfg(all(unix, not(miri)))]
    {
        #[expect(unsafe_code, reason = "libc declares sysconf(3) unsafe")]
        // SAFETY: sysconf(3) takes a number, returns a number and accesses no memory of the caller.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if let Some(size) = usize::try_from(size).ok().and_then(NonZeroUsize::new) {
            return size;
        }
    }
    #[cfg(all(windows, not(miri)))]
    if let Some(size) = usize::try_from(system_info().dwPageSize)
        .ok()
        .and_then(NonZeroUsize::new)
    {
        return size;
    }
    DEFAULT_PAGE_SIZE
}

/// Returns the page size, the allocation granularity and the addresses of a process.
#[cfg(windows)]
pub(crate) fn system_info() -> SYSTEM_INFO {
    let mut info = SYSTEM_INFO::default();
    #[expect(unsafe_code, reason = "windows-sys declares all functions unsafe")]
    // SAFETY: `info` is valid for writes. The function fills it, and cannot fail.
    unsafe {
        GetSystemInfo(&mut info);
    }
    info
}
