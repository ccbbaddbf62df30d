//! The meaning of the system's errors for guest memory.

use std::io;

use windows_sys::Win32::Foundation::{
    ERROR_COMMITMENT_LIMIT, ERROR_NOT_ENOUGH_MEMORY, ERROR_NO_SYSTEM_RESOURCES, ERROR_OUTOFMEMORY,
    ERROR_WORKING_SET_QUOTA,
};

/// The system's errors for too few pages.
pub(crate) const SHORTAGES: [i32; 5] = [
    ERROR_COMMITMENT_LIMIT.cast_signed(),
    ERROR_NOT_ENOUGH_MEMORY.cast_signed(),
    ERROR_NO_SYSTEM_RESOURCES.cast_signed(),
    ERROR_OUTOFMEMORY.cast_signed(),
    ERROR_WORKING_SET_QUOTA.cast_signed(),
];

/// The remedy for an arena that may use no more VMAs.
pub(crate) const VMA_REMEDY: &str = "unmap some";

/// Returns a remedy for blocks that cannot be plugged, to append to a message.
pub(crate) fn plug_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(number) if SHORTAGES.contains(&number) => {
            "; enlarge the page file, or plug fewer blocks"
        }
        _ => "",
    }
}

/// Returns a remedy for pages that cannot be populated.
pub(crate) fn populate_remedy(_source: &io::Error) -> &'static str {
    "check that the file of the region can be read, or do not prefault"
}
