//! [`parts`]: a range of guest memory, region by region.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{bytes, provisioned, span_of, HostMapping};
use crate::error::ChangeError;

/// A part of a range of guest memory that lies in one region.
pub(crate) struct Part<'a, B> {
    pub(crate) region: &'a GuestRegionMmap<B>,
    pub(crate) mapping: &'a HostMapping,
    /// Where it begins, in bytes from the start of the region.
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// How many bytes of the range come before it.
    pub(crate) before: u64,
}

/// The parts of `len` bytes at `addr`, if this crate has made the regions of all of them. `aligned` says what part of which mapping must be whole pages or blocks of
/// which size.
pub(crate) fn parts<'a, B, M>(
    memory: &'a M,
    addr: GuestAddress,
    len: u64,
    granularity: impl Fn(&GuestRegionMmap<B>, &HostMapping) -> Result<(&'static str, u64), ChangeError>,
) -> Result<Vec<Part<'a, B>>, ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let past_top = ChangeError::PastTop { start: addr.0, len };
    if len
        .checked_sub(1)
        .is_some_and(|more| addr.0.checked_add(more).is_none())
    {
        return Err(past_top);
    }
    let (mut parts, mut before) = (Vec::new(), 0u64);
    while before < len {
        // Below 2^64, by the check above.
        let at = GuestAddress(addr.0.saturating_add(before));
        let hole = || ChangeError::Hole { addr: at.0 };
        let (region, offset) = memory.to_region_addr(at).ok_or_else(hole)?;
        let mapping = provisioned(region)?;
        let here = region
            .len()
            .saturating_sub(offset.0)
            .min(len.saturating_sub(before));
        let (what, granularity) = granularity(region, mapping)?;
        if !offset.0.is_multiple_of(granularity) || !here.is_multiple_of(granularity) || here == 0 {
            return Err(ChangeError::Unaligned {
                region: span_of(region),
                start: at.0,
                len: here,
                what,
                granularity,
            });
        }
        // Both are inside a mapping of this process.
        let whole = |n: u64| usize::try_from(n).map_err(|_| hole());
        parts.push(Part {
            region,
            mapping,
            offset: whole(offset.0)?,
            len: whole(here)?,
            before,
        });
        before = before.saturating_add(here);
    }
    Ok(parts)
}

impl<B: Bitmap> Part<'_, B> {
    /// The error of a call that the system refused for this part.
    pub(crate) fn refused(&self, what: &'static str, source: io::Error) -> ChangeError {
        ChangeError::System {
            region: span_of(self.region),
            what,
            start: self.start(),
            len: bytes(self.len),
            done: self.before,
            source,
        }
    }

    /// The guest physical address of its first byte.
    pub(crate) fn start(&self) -> u64 {
        self.region
            .start_addr()
            .0
            .saturating_add(bytes(self.offset))
    }

    /// Marks its pages dirty: their bytes are others now.
    pub(crate) fn mark_dirty(&self) {
        self.region.bitmap().mark_dirty(self.offset, self.len);
    }
}
