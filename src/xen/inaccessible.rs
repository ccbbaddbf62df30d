//! [`Inaccessible`]: addresses that stand for memory that could not be mapped.

use std::io;
use std::panic::AssertUnwindSafe;

use super::area::Area;

/// Addresses that are not accessible, and the reason.
#[derive(Debug)]
pub(crate) struct Inaccessible {
    reserved: Option<Area>,
    error: AssertUnwindSafe<io::Error>,
}

impl Inaccessible {
    /// Reserves `len` bytes of addresses, for memory that could not be mapped because of `error`.
    #[cold]
    pub(super) fn new(len: usize, error: io::Error) -> Self {
        Self {
            reserved: Area::reserved(len).ok(),
            error: AssertUnwindSafe(error),
        }
    }

    /// Returns the first address.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // The last page of the address space is never mapped: the kernel uses its addresses as
        // error numbers. It is the fallback if no addresses are free.
        const LAST_PAGE: usize = 0usize.wrapping_sub(4096);
        let addr = self.reserved.as_ref().map(Area::as_ptr);
        addr.unwrap_or(core::ptr::without_provenance_mut(LAST_PAGE))
    }

    /// Returns the reason.
    pub(crate) fn error(&self) -> &io::Error {
        &self.error
    }
}
