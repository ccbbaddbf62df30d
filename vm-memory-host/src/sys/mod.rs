//! System calls and the addresses that they change.
//!
//! The types here have safe methods only. `Mapped` owns the memory of one region, and each of its
//! methods checks that its range is inside that memory. The names that other modules use on every
//! system are the same in both folders.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub(crate) use linux::*;
#[cfg(windows)]
pub(crate) use windows::*;

use std::io;

use vm_memory::VolatileMemoryError;

/// Converts a length.
pub(crate) use vm_memory::arithmetic::to_u64;

/// Returns the system's error of an access, with its number.
fn system_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}

/// Returns the size of a transparent huge page in bytes, whether or not the kernel supports them.
///
/// This is the size of the memory that one page of page table entries maps. An entry has 8 bytes.
pub(crate) fn huge_page_size() -> u64 {
    page_size_u64().saturating_mul(page_size_u64() / 8)
}

/// Returns the end of a range of whole pages, at least one, inside `size` bytes. Otherwise, returns
/// `None`.
fn end_of_pages(offset: usize, len: usize, size: usize) -> Option<usize> {
    let end = offset.checked_add(len)?;
    let is_whole = (offset | end).is_multiple_of(page_size());
    (len != 0 && end <= size && is_whole).then_some(end)
}

/// Returns [`page_size`] for arithmetic with file offsets and guest addresses.
pub(crate) fn page_size_u64() -> u64 {
    u64::try_from(page_size()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_pages_exists_for_whole_pages_inside_the_size_only() {
        let page = page_size();
        let size = 4 * page;
        for (offset, len, end) in [
            (0, page, Some(page)),
            (page, 3 * page, Some(size)),
            (0, 0, None),
            (1, page, None),
            (0, page - 1, None),
            (page, size, None),
            (size, page, None),
            (usize::MAX - page + 1, page, None),
        ] {
            assert_eq!(end_of_pages(offset, len, size), end, "{offset} {len}");
        }
    }
}
