//! The checks of a request that depend neither on the system nor on this host.

use std::collections::BTreeSet;

use crate::error::BuildError;
use crate::region::{NumaPolicy, Region, Span};

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
    for (what, value) in [("size", region.size), ("guest address", region.start.0)] {
        if !value.is_multiple_of(page_size) {
            return Err(BuildError::Misaligned {
                region: region.span(),
                what,
                value,
                unit: "page",
                unit_size: page_size,
            });
        }
    }
    Ok(())
}
