//! [`HostRun`]: guest memory that is contiguous in this process, over several regions.

use super::{Error, GuestAddress, GuestMemorySliceIterator, Result};
use crate::bitmap::BitmapSlice;
use crate::convert::to_u64;
use crate::volatile_memory::VolatileSlice;

/// A range of guest memory that is one run of host memory. It may span several regions.
///
/// [`GuestMemory::host_runs`](super::GuestMemory::host_runs) returns it, and has an example.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct HostRun {
    /// The guest address of the first byte.
    pub addr: GuestAddress,
    /// The host address of the first byte.
    pub host: *mut u8,
    /// The length in bytes.
    pub len: usize,
}

impl HostRun {
    /// Appends a slice if it begins where the run ends. Returns whether it does.
    fn append<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) -> bool {
        let end = self.host.addr().checked_add(self.len);
        let begin = slice.host_address().map(<*mut u8>::addr);
        match self.len.checked_add(slice.len()) {
            Some(len) if end.is_some() && end == begin => {
                self.len = len;
                true
            }
            _ => false,
        }
    }
}

/// Joins the slices of a range at `addr` that follow each other in host memory.
pub(super) fn host_runs<'a, B: BitmapSlice>(
    slices: impl GuestMemorySliceIterator<'a, B>,
    addr: GuestAddress,
) -> impl Iterator<Item = Result<HostRun>> {
    let mut slices = slices.peekable();
    let mut next = addr;
    let mut ended = false;
    core::iter::from_fn(move || {
        if ended {
            return None;
        }
        let first = match slices.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let Some(host) = first.host_address() else {
            ended = true;
            return Some(Err(Error::HostAddressNotAvailable));
        };
        let mut run = HostRun {
            addr: next,
            host,
            len: first.len(),
        };
        while slices
            .next_if(|slice| slice.as_ref().is_ok_and(|slice| run.append(slice)))
            .is_some()
        {}
        // Wraps only after the last run of a range that ends at 2^64.
        let len = to_u64(run.len);
        next = GuestAddress(next.0.wrapping_add(len));
        Some(Ok(run))
    })
}
