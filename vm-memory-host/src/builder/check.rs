//! The checks of a request that depend neither on the system nor on this host.

use std::collections::BTreeSet;

use crate::error::BuildError;
use crate::region::{NumaPolicy, Region, Span};

/// The largest length of a file in bytes: the maximum of the signed `off_t`, and of Windows.
pub(crate) const MAX_FILE_LENGTH: u64 = u64::MAX >> 1;

/// Returns the end of a region, or `None` if it is not below 2^64.
pub(super) fn end(region: &Region) -> Option<u64> {
    region.start.0.checked_add(region.size)
}

/// Sorts regions by address, and checks that they fit the address space and do not overlap.
pub(super) fn sort(mut regions: Vec<Region>) -> Result<Vec<Region>, BuildError> {
    if regions.is_empty() {
        return Err(BuildError::NoRegion);
    }
    regions.sort_by_key(|region| region.start);
    let mut before: Option<&Region> = None;
    for region in &regions {
        let (start, size) = (region.start.0, region.size);
        if size == 0 {
            return Err(BuildError::Empty { start });
        }
        if end(region).is_none() || usize::try_from(size).is_err() {
            return Err(BuildError::PastTop { start, size });
        }
        if let Some(before) = before.filter(|before| end(before).is_none_or(|end| end > start)) {
            return Err(BuildError::Overlap {
                region: region.span(),
                other: before.span(),
            });
        }
        before = Some(region);
    }
    Ok(regions)
}

/// Checks that a policy that lists nodes has at least one, and each of them once.
pub(super) fn distinct_nodes(policy: &NumaPolicy, region: Span) -> Result<(), BuildError> {
    if *policy != NumaPolicy::Inherit && policy.nodes().is_empty() {
        return Err(BuildError::NoNode { region });
    }
    let mut seen = BTreeSet::new();
    match policy.nodes().iter().find(|node| !seen.insert(**node)) {
        Some(&node) => Err(BuildError::NodeTwice { region, node }),
        None => Ok(()),
    }
}

/// Checks that guest address and size are multiples of the page size.
pub(super) fn check_alignment(region: &Region, page_size: u64) -> Result<(), BuildError> {
    check_multiple(region, "size", region.size, page_size)?;
    check_multiple(region, "guest address", region.start.0, page_size)
}

/// Checks that `value` is a multiple of the page size. `what` names it in the error.
pub(super) fn check_multiple(
    region: &Region,
    what: &'static str,
    value: u64,
    page_size: u64,
) -> Result<(), BuildError> {
    if value.is_multiple_of(page_size) {
        return Ok(());
    }
    Err(BuildError::Misaligned {
        region: region.span(),
        what,
        value,
        unit: "page",
        unit_size: page_size,
    })
}

/// Returns the end of a region that begins at `offset` in a file.
pub(super) fn end_in_file(region: &Region, offset: u64) -> Result<u64, BuildError> {
    let end = offset.checked_add(region.size);
    end.filter(|end| *end <= MAX_FILE_LENGTH)
        .ok_or(BuildError::FileOffset {
            region: region.span(),
            offset,
        })
}
