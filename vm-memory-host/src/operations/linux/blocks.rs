//! Makes blocks accessible and inaccessible, and finds the reason if that fails.

use std::io;

use super::pages::free_pages;
use crate::error::{ChangeError, PLUG};
use crate::host::{GroupLimit, HostResources};
use crate::mapping::{span_of, to_u64, unplugged_runs, Changes, HostMapped, HostMapping, Part};
use crate::operations::plug::total;
use crate::region::{BackingKind, Blocks, Unplugged};
use crate::sys::{self, Advice};

/// Makes all blocks of a new mapping inaccessible, if the region requires it.
pub(in crate::operations) fn close_all(mapping: &HostMapping, blocks: &Blocks) -> io::Result<()> {
    match blocks.unplugged {
        Unplugged::Protected => mapping.mapped().protect(0, mapping.mapped().len(), false),
        Unplugged::Mapped => Ok(()),
    }
}

/// Frees the old pages of blocks, and prepares the blocks.
///
/// A vCPU may have written to an unplugged block, or the file may have had bytes there.
pub(in crate::operations) fn prepare_empty(
    mapping: &Changes<'_>,
    blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    free_pages(mapping, offset, len)?;
    prepare(mapping, blocks, offset, len)
}

/// Makes blocks accessible to the guest, and allocates the pages that could be missing later.
pub(in crate::operations) fn prepare(
    mapping: &Changes<'_>,
    blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    let mapped = mapping.mapped();
    if blocks.unplugged == Unplugged::Protected {
        mapped.protect(offset, len, true)?;
    }
    if mapping.kind() == BackingKind::Hugetlb {
        mapped.advise(offset, len, Advice::PopulateWrite)?;
    }
    match &mapping.backing.file {
        Some((file, start)) if mapping.backing.allocated => {
            sys::allocate_range(file, start.saturating_add(to_u64(offset)), to_u64(len))
        }
        _ => Ok(()),
    }
}

/// Frees the pages of blocks, and protects the blocks if the region requires it.
pub(in crate::operations) fn withdraw(
    mapping: &Changes<'_>,
    blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    let protected = match blocks.unplugged {
        Unplugged::Protected => mapping.mapped().protect(offset, len, false),
        Unplugged::Mapped => Ok(()),
    };
    free_pages(mapping, offset, len).and(protected)
}

/// Returns the number of bytes of a part that are in unplugged blocks.
fn unplugged_bytes<R: HostMapped>(part: &Part<'_, R>) -> u64 {
    let record = part.mapping.plugged_blocks();
    let unplugged = record.map(|record| unplugged_runs(record, part.offset, part.len));
    total(unplugged.unwrap_or_default())
}

/// Checks that the host and the control groups of this process have the memory that a plug must
/// allocate.
///
/// The kernel ends a process that needs more. Huge pages above their limit are refused.
///
/// If memory is short, this frees the pages that the file has in the unplugged blocks, as the plug
/// would do first, and checks again. The kernel does not report how many these are: mincore(2)
/// omits pages that were allocated and never written.
pub(in crate::operations) fn check_memory<R: HostMapped>(
    part: &Part<'_, R>,
) -> Result<(), ChangeError> {
    let mapping = part.mapping;
    if !mapping.backing.own_tmpfs || !mapping.backing.allocated {
        return Ok(());
    }
    if has_memory(part).is_ok() {
        return Ok(());
    }
    let refused = |source| part.refused(PLUG, source);
    let changes = mapping.lock_changes().map_err(refused)?;
    if let Some(record) = mapping.plugged_blocks() {
        for (offset, len) in unplugged_runs(record, part.offset, part.len) {
            free_pages(&changes, offset, len).map_err(refused)?;
        }
    }
    drop(changes);
    has_memory(part)
}

/// Compares the bytes of the unplugged blocks with the memory that is available.
fn has_memory<R: HostMapped>(part: &Part<'_, R>) -> Result<(), ChangeError> {
    let (wanted, host) = (unplugged_bytes(part), HostResources::current());
    match host.available_memory() {
        Some(available) if available < wanted => {
            return Err(ChangeError::Memory {
                region: span_of(part.region),
                start: part.start(),
                len: to_u64(part.len),
                wanted,
                available,
                done: part.before,
            });
        }
        _ => {}
    }
    match host.memory_limit() {
        Some(limit) if limit.available < wanted => Err(over_limit(part, wanted, limit)),
        _ => Ok(()),
    }
}

fn over_limit<R: HostMapped>(part: &Part<'_, R>, wanted: u64, limit: GroupLimit) -> ChangeError {
    ChangeError::ControlGroup {
        region: span_of(part.region),
        start: part.start(),
        len: to_u64(part.len),
        wanted,
        limit,
        done: part.before,
    }
}

/// Returns the error for a part that was not plugged.
pub(in crate::operations) fn not_plugged<R: HostMapped>(
    part: &Part<'_, R>,
    source: io::Error,
) -> ChangeError {
    let may_lack_pages = matches!(source.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM));
    if part.mapping.kind() != BackingKind::Hugetlb || !may_lack_pages {
        return part.refused(PLUG, source);
    }
    let (page_size, wanted) = (part.mapping.page_size(), unplugged_bytes(part));
    let host = HostResources::current();
    match host.huge_page_limit(page_size, false) {
        Some(limit) if limit.available < wanted => return over_limit(part, wanted, limit),
        _ => {}
    }
    let wanted = wanted.checked_div(page_size).unwrap_or(0);
    // Too many VMAs cause ENOMEM as well.
    let free = host.free_huge_pages(page_size, &[]);
    let Some(free) = free.filter(|free| *free < wanted) else {
        return part.refused(PLUG, source);
    };
    ChangeError::NoPages {
        region: span_of(part.region),
        start: part.start(),
        len: to_u64(part.len),
        wanted,
        free,
        page_size,
        done: part.before,
        source,
    }
}
