//! The size of a page of the host.

use core::num::NonZeroUsize;

/// The page size if the caller gives none and the system cannot be queried: 4 KiB.
pub(crate) const DEFAULT_PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Returns the size in bytes of a page of the host, by `sysconf(3)`, which makes no system call.
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
    DEFAULT_PAGE_SIZE
}
