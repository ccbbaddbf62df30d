//! The meaning of the system's errors for guest memory.

use std::io;

/// The system's errors for too few pages.
pub(crate) const SHORTAGES: [i32; 4] = [libc::EFAULT, libc::ENOMEM, libc::ENOSPC, libc::EDQUOT];

/// The remedy for an arena that may use no more VMAs.
pub(crate) const VMA_REMEDY: &str = "unmap some, or raise vm.max_map_count";

/// Returns a remedy for blocks that cannot be plugged, to append to a message.
pub(crate) fn plug_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EFAULT) => "; add huge pages to the pool (nr_hugepages), or plug fewer blocks",
        _ => "",
    }
}

/// Returns a remedy for pages that cannot be populated.
pub(crate) fn populate_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EINVAL) => "use Linux 5.14 or later, or do not prefault",
        Some(libc::EFAULT) => "add pages to its pool, or free space on its file system",
        Some(libc::EHWPOISON) => {
            "build the region again; the memory module may have to be replaced"
        }
        _ => "free memory, use less of it, or do not prefault",
    }
}
