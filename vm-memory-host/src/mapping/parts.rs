//! [`parts`]: splits a range of guest memory at region boundaries.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::listeners::{ListenerError, RegionChanges};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{span_of, to_u64, usable, HostMapped, HostMapping};
use crate::error::ChangeError;

/// The part of a range of guest memory that is in one region.
pub(crate) struct Part<'a, R> {
    pub(crate) region: &'a R,
    pub(crate) mapping: &'a HostMapping,
    /// The offset of the part in the region, in bytes.
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// The number of bytes of the range before this part.
    pub(crate) before: u64,
}

/// Splits `len` bytes at `addr` into one part for each region.
///
/// `granularity` returns the unit that a part of a mapping must consist of: its name and its size.
/// All parts are checked before any is returned, so an error means that nothing was changed. The
/// checks take no lock.
pub(crate) fn parts<M>(
    memory: &M,
    addr: GuestAddress,
    len: u64,
    granularity: impl Fn(&M::R, &HostMapping) -> Result<(&'static str, u64), ChangeError>,
) -> Result<Vec<Part<'_, M::R>>, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let last = len.checked_sub(1);
    if last.is_some_and(|last| addr.0.checked_add(last).is_none()) {
        return Err(ChangeError::PastTop { start: addr.0, len });
    }
    let (mut parts, mut before) = (Vec::new(), 0u64);
    while before < len {
        // Does not saturate: the last byte of the range is below 2^64.
        let at = GuestAddress(addr.0.saturating_add(before));
        let hole = || ChangeError::Hole { addr: at.0 };
        let (region, offset) = memory.to_region_addr(at).ok_or_else(hole)?;
        let mapping: &HostMapping = usable::<_, ChangeError>(region)?;
        // The length of the mapping: a region of another crate may return another one each time.
        let here = to_u64(mapping.mapped.len())
            .saturating_sub(offset.0)
            .min(len.saturating_sub(before));
        let (what, granularity) = granularity(region, mapping)?;
        // Offset and length fit a `usize`, since the region is mapped.
        let size = |n: u64| usize::try_from(n).map_err(|_| hole());
        let part = Part {
            region,
            mapping,
            offset: size(offset.0)?,
            len: size(here)?,
            before,
        };
        if !offset.0.is_multiple_of(granularity) || !here.is_multiple_of(granularity) || here == 0 {
            return Err(part.not_whole(what, granularity));
        }
        parts.push(part);
        before = before.saturating_add(here);
    }
    Ok(parts)
}

impl<R: HostMapped> Part<'_, R> {
    /// Returns the error for an operation that the system refused.
    pub(crate) fn refused(&self, what: &'static str, source: io::Error) -> ChangeError {
        ChangeError::System {
            region: span_of(self.region),
            what,
            start: self.start(),
            len: to_u64(self.len),
            done: self.before,
            source,
        }
    }

    /// Excludes other changes of the region's pages, so that listeners can be told of this one.
    pub(crate) fn begin(&self) -> Result<RegionChanges<'_>, ChangeError> {
        let changes = self.mapping.notifier.begin();
        changes.map_err(|source| self.refused_by_listener(source))
    }

    /// Returns the accessible ranges of the part, as offset and length. Listeners are told of them.
    pub(crate) fn accessible_runs(&self) -> Vec<(u64, u64)> {
        let run = |(offset, len)| (to_u64(offset), to_u64(len));
        match self.mapping.plugged_blocks() {
            Some(record) => record.runs_in(self.offset, self.len).map(run).collect(),
            None => vec![run((self.offset, self.len))],
        }
    }

    /// Returns the error for a change that a listener refused, or that pins prevent.
    pub(crate) fn refused_by_listener(&self, source: ListenerError) -> ChangeError {
        ChangeError::Listener {
            region: span_of(self.region),
            start: self.start(),
            len: to_u64(self.len),
            done: self.before,
            source: Box::new(source),
        }
    }

    /// Returns the error for a part that does not consist of whole pages or blocks.
    pub(crate) fn not_whole(&self, what: &'static str, granularity: u64) -> ChangeError {
        ChangeError::Unaligned {
            region: span_of(self.region),
            start: self.start(),
            len: to_u64(self.len),
            what,
            granularity,
        }
    }

    /// Returns the guest physical address of the first byte.
    pub(crate) fn start(&self) -> u64 {
        self.region
            .start_addr()
            .0
            .saturating_add(to_u64(self.offset))
    }

    /// Marks all pages dirty.
    pub(crate) fn mark_dirty(&self) {
        self.region.bitmap().mark_dirty(self.offset, self.len);
    }
}
