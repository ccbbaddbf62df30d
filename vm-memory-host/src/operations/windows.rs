//! The operations on Windows: what differs from other systems.

use std::io;

use vm_memory::fault;

use super::{Residency, ResidencyError};
use crate::error::{ChangeError, PrefaultError, PLUG};
use crate::host::HostResources;
use crate::mapping::{to_u64, Changes, HostMapped, HostMapping, Part};
use crate::region::{BackingKind, Blocks, Lock, Span};
use crate::sys::{Cpus, Mapped};

/// The number of bytes that a discard makes inaccessible at a time.
const DISCARD_STEP: usize = 2 << 20;

/// Discards whole pages of a mapping, and returns the number of bytes freed.
///
/// Only decommitted pages read as zeroes for certain once they are committed again. The contents of
/// pages are undefined after `DiscardVirtualMemory`, and zeroes that are written populate them.
pub(super) fn discard_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let changes = mapping.lock_changes()?;
    let memory = changes.mapped();
    // Pages are inaccessible until they are committed again. With the fault handler, an access
    // before that returns an error.
    let frees = mapping.kind() == BackingKind::Anonymous
        && mapping.options.lock == Lock::No
        && fault::is_installed();
    let discard = |(at, len)| {
        if frees {
            replace_pages(memory, at, len)
        } else {
            memory.fill_zeroes(at, len)
        }
    };
    committed(&changes, offset, len)
        .into_iter()
        .try_for_each(discard)?;
    Ok(if frees { to_u64(len) } else { 0 })
}

/// Decommits a range and commits it again, in steps.
///
/// Each page is therefore inaccessible only during its step, and a failure leaves at most one step
/// inaccessible.
fn replace_pages(memory: &Mapped, offset: usize, len: usize) -> io::Result<()> {
    (0..len).step_by(DISCARD_STEP).try_for_each(|done| {
        let at = offset.saturating_add(done);
        let len = len.saturating_sub(done).min(DISCARD_STEP);
        memory.decommit(at, len)?;
        memory.commit(at, len)
    })
}

/// Returns the committed parts of a range, as offset and length.
fn committed(mapping: &HostMapping, offset: usize, len: usize) -> Vec<(usize, usize)> {
    match mapping.plugged_blocks() {
        Some(blocks) => blocks.runs_in(offset, len).collect(),
        None => vec![(offset, len)],
    }
}

/// Makes all blocks of a new mapping inaccessible. They are not committed yet.
pub(super) fn close_all(_mapping: &HostMapping, _blocks: &Blocks) -> io::Result<()> {
    Ok(())
}

/// Makes blocks accessible. Pages that were committed keep their bytes, and others are zeroes.
pub(super) fn prepare(
    mapping: &Changes<'_>,
    _blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    mapping.mapped().commit(offset, len)
}

/// Frees pages of an earlier plug, whose decommit may have failed, and then prepares the blocks.
pub(super) fn prepare_empty(
    mapping: &Changes<'_>,
    blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    withdraw(mapping, blocks, offset, len)?;
    prepare(mapping, blocks, offset, len)
}

/// Makes blocks inaccessible, and returns their memory to the system.
pub(super) fn withdraw(
    mapping: &Changes<'_>,
    _blocks: &Blocks,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    mapping.mapped().decommit(offset, len)
}

/// Checks nothing: the system refuses to commit more than it can have.
pub(super) fn check_memory_of_blocks<R: HostMapped>(
    _part: &Part<'_, R>,
) -> Result<(), ChangeError> {
    Ok(())
}

/// Returns the error for a part that was not plugged.
pub(super) fn not_plugged<R: HostMapped>(part: &Part<'_, R>, source: io::Error) -> ChangeError {
    part.refused(PLUG, source)
}

/// Populates the pages of a range that is accessible.
pub(super) fn populate_pages(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match mapping.kind() {
        // Large pages are always in memory.
        BackingKind::Hugetlb => Ok(()),
        _ => mapping.mapped().populate(offset, len),
    }
}

/// Checks nothing: the memory is committed, so there is a place for each page.
pub(super) fn check_memory(
    _mappings: &[(Span, &HostMapping)],
    _host: &HostResources,
) -> Result<(), PrefaultError> {
    Ok(())
}

/// Returns the error unchanged: its number already names the cause.
pub(super) fn cause_of(
    error: PrefaultError,
    _mappings: &[(Span, &HostMapping)],
    _host: &HostResources,
) -> PrefaultError {
    error
}

/// Returns `None`: threads do not move. Pages come from the preferred node of their region.
pub(super) fn cpus_of(
    _nodes: &[u32],
    _allowed: Option<&Cpus>,
    _host: &HostResources,
) -> Option<Cpus> {
    None
}

/// Returns the memory that each mapping uses, beside the guest addresses of its region.
pub(super) fn usages(
    mappings: &[(Span, &HostMapping)],
) -> Result<Vec<(Span, Residency)>, ResidencyError> {
    let mappings = mappings.iter();
    let usages = mappings.map(|(region, mapping)| {
        let usage = usage(mapping);
        let region = *region;
        let usage = usage.map_err(|source| ResidencyError::System { region, source })?;
        Ok((region, usage))
    });
    usages.collect()
}

fn usage(mapping: &HostMapping) -> io::Result<Residency> {
    // Blocks are not plugged or unplugged meanwhile.
    let _held = mapping.hold_blocks()?;
    let parts = committed(mapping, 0, mapping.mapped().len()).into_iter();
    let usages = parts.map(|(at, len)| {
        let pages = mapping.mapped().working_set(at, len)?;
        let is_file = mapping.kind() == BackingKind::File;
        Ok(Residency {
            resident: pages.resident,
            private: if is_file { 0 } else { pages.private },
            file: if is_file { pages.resident } else { 0 },
            mapped: pages.resident,
            huge: pages.large,
            locked: pages.locked,
            ..Residency::default()
        })
    });
    let usages: io::Result<Vec<Residency>> = usages.collect();
    Ok(usages?.into_iter().sum())
}

/// Returns a remedy if the usage of memory cannot be read.
pub(super) fn unknown_usage(_source: &io::Error) -> &'static str {
    "check that this process may query its working set"
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use vm_memory::{fault, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use crate::{plug, provisioned, MemoryBuilder, Region, Unplugged};

    #[test]
    fn plug_after_refused_decommit_reads_as_zeroes() {
        const BLOCK: usize = 1 << 20;
        const LEN: u64 = 1 << 20;
        fault::install().unwrap();
        let size = NonZeroU64::new(LEN).unwrap();
        let region = Region::new(GuestAddress(0), LEN).blocks(size, Unplugged::Protected);
        let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
        plug(&memory, GuestAddress(0), LEN).unwrap();
        memory.write_slice(&[7; BLOCK], GuestAddress(0)).unwrap();

        // An unplug whose decommit is refused changes only the record.
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let (_, record) = mapping.blocks.as_ref().unwrap();
        record.unplug(0, BLOCK).unwrap();
        assert!(memory.read_obj::<u8>(GuestAddress(0)).is_err());

        assert_eq!(plug(&memory, GuestAddress(0), LEN).unwrap(), LEN);
        let mut bytes = [1; BLOCK];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
