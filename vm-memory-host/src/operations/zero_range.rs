//! [`zero_range`]: discards the whole pages of a range, and writes zeroes to the rest.

use std::io;

use vm_memory::arithmetic::to_usize;
use vm_memory::listeners::ListenerError;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::discard::{discard_whole, refuse_read_only};
use crate::error::ChangeError;
use crate::mapping::{parts, to_u64, HostMapped, Part};

/// Makes any range of guest memory read as zeroes.
///
/// [Discards](crate::discard()) the whole pages of the range, and writes zeroes to the parts of
/// pages at its ends. Use it at the destination of a migration, for pages of zeroes
/// (`DirtyMemory::take_zero_pages`) and of unplugged blocks (`DirtyMemory::unreadable_runs`). These
/// are often smaller than the huge pages of the destination, which `discard` refuses.
///
/// The pages are marked dirty. Zeroes that are written to a part of a page populate this page.
/// In an unplugged block, whole pages are discarded, and parts of pages stay as they are. A block
/// reads as zeroes once it is plugged.
///
/// Returns the number of bytes freed, as `discard` does.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{zero_range, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_slice(&[7; 0x3000], GuestAddress(0x1000))?;
///
/// let freed = zero_range(&memory, GuestAddress(0x1800), 0x2000)?;
/// assert_eq!(freed, 0x1000); // the page at 0x2000
/// assert_eq!(memory.read_obj::<u16>(GuestAddress(0x17ff))?, 7);
/// assert_eq!(memory.read_obj::<[u8; 0x2000]>(GuestAddress(0x1800))?, [0; 0x2000]);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3800))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns a [`ChangeError`] and changes nothing if the range
///
/// - passes 2^64 or has holes,
/// - touches a [read-only](crate::Region::read_only) region, or
/// - touches a region that this crate did not build, or that the parent process built.
///
/// Returns [`ChangeError::System`] if the system refuses a call. Earlier bytes of the range stay
/// zeroed.
///
/// The same error means that a page for the zeroes is not available. On Windows, before Linux 5.14,
/// or if another process removes the page during the call, the error needs the
/// [fault handler](vm_memory::fault). Without it, the fault ends the process.
#[doc(alias = "migration")]
#[doc(alias = "memset")]
#[doc(alias = "fill")]
pub fn zero_range<M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let parts = parts(memory, addr, len, |region, mapping| {
        refuse_read_only(region, mapping)?;
        Ok(("bytes", 1))
    })?;
    let mut freed = 0u64;
    for part in parts {
        let page = to_usize(part.mapping.page_size());
        let (start, end) = (part.offset, part.offset.saturating_add(part.len));
        let first = start.checked_next_multiple_of(page).unwrap_or(end).min(end);
        let rest = end.checked_rem(page).unwrap_or(0);
        let last = end.saturating_sub(rest).max(first);
        overwrite(&piece(&part, start, first))?;
        if first < last {
            let pages = piece(&part, first, last);
            freed = freed.saturating_add(match discard_whole(&pages) {
                // The device must find the zeroes in the same pages.
                Err(ChangeError::Listener { source, .. })
                    if matches!(*source, ListenerError::Pinned { .. }) =>
                {
                    overwrite(&pages).map(|()| 0)?
                }
                freed => freed?,
            });
        }
        overwrite(&piece(&part, last, end))?;
    }
    Ok(freed)
}

/// Returns the piece of a part between two offsets in its region.
fn piece<'a, R>(part: &Part<'a, R>, from: usize, to: usize) -> Part<'a, R> {
    let before = to_u64(from.saturating_sub(part.offset));
    Part {
        region: part.region,
        mapping: part.mapping,
        offset: from,
        len: to.saturating_sub(from),
        before: part.before.saturating_add(before),
    }
}

/// Writes zeroes to the bytes of a piece that are not in unplugged blocks, and marks them dirty.
fn overwrite<R: HostMapped>(piece: &Part<'_, R>) -> Result<(), ChangeError> {
    if piece.len == 0 {
        return Ok(());
    }
    let result = fill(piece);
    // Even after an error: some of its bytes may have changed.
    piece.mark_dirty();
    result.map_err(|source| piece.refused("zero", source))
}

fn fill<R>(piece: &Part<'_, R>) -> io::Result<()> {
    // Held while the zeroes are written, so no block is unplugged during the write.
    let changes = piece.mapping.lock_changes()?;
    let Some(blocks) = changes.plugged_blocks() else {
        return changes.mapped().fill_zeroes(piece.offset, piece.len);
    };
    let mut plugged = blocks.runs_in(piece.offset, piece.len);
    plugged.try_for_each(|(at, len)| changes.mapped().fill_zeroes(at, len))
}
