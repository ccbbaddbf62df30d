//! The regions of maps: what differs between two maps, and what can be accessed.

use std::collections::HashSet;
use std::ptr;
use std::sync::Arc;

use crate::convert::{to_u64, to_usize};
use crate::guest_memory::GuestMemoryBackend;
use crate::listeners::{ChangeKind, MemoryChange, RegionNotifier};
use crate::region::GuestMemoryRegion;
use crate::MemoryRegionAddress;

/// Returns a change of a range of a region.
pub(super) fn change<R: GuestMemoryRegion>(
    kind: ChangeKind,
    region: &R,
    offset: u64,
    len: u64,
) -> MemoryChange<'_, R> {
    MemoryChange::new(kind, region, region.start_addr(), offset, len)
}

/// Returns a change of a whole region.
pub(super) fn whole<R: GuestMemoryRegion>(kind: ChangeKind, region: &R) -> MemoryChange<'_, R> {
    change(kind, region, 0, region.len())
}

/// Returns the same change of each accessible range of a region.
pub(super) fn runs_of<R: GuestMemoryRegion>(
    kind: ChangeKind,
    region: &R,
) -> impl Iterator<Item = MemoryChange<'_, R>> {
    let runs = plugged_runs(region).into_iter();
    runs.map(move |(offset, len)| change(kind, region, offset, len))
}

/// Returns the accessible ranges of a region, as offset and length.
fn plugged_runs<R: GuestMemoryRegion>(region: &R) -> Vec<(u64, u64)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < region.len() {
        let left = to_usize(region.len().saturating_sub(at));
        let run = region.reachable_range(MemoryRegionAddress(at), left);
        if run.is_empty() {
            break;
        }
        let len = run.end.saturating_sub(run.start);
        runs.push((at.saturating_add(to_u64(run.start)), to_u64(len)));
        at = at.saturating_add(to_u64(run.end));
    }
    runs
}

/// Returns the notifiers of regions, each once, in the order in which their turns are taken.
pub(super) fn notifiers<'a, R: GuestMemoryRegion + 'a>(
    regions: impl Iterator<Item = &'a R>,
) -> Vec<&'a RegionNotifier> {
    let mut notifiers: Vec<_> = regions
        .filter_map(|region| region.notifier().map(Arc::as_ref))
        .collect();
    notifiers.sort_unstable_by_key(|notifier| notifier.id());
    notifiers.dedup_by_key(|notifier| notifier.id());
    notifiers
}

/// Returns the regions of a map that another one does not have. Maps share regions, so a region is
/// known by its place in memory.
pub(in crate::atomic) fn regions_without<'a, M: GuestMemoryBackend>(
    map: &'a M,
    other: &M,
) -> Vec<&'a M::R> {
    let known: HashSet<*const M::R> = other.iter().map(ptr::from_ref).collect();
    let unknown = map
        .iter()
        .filter(|region| !known.contains(&ptr::from_ref(*region)));
    unknown.collect()
}
