//! The steps of a build on Linux.

mod check;
pub(super) mod files;
mod map;
mod needed;
mod received_files;

pub(crate) use check::layout as check_layout;
pub(crate) use received_files::ReceivedFiles;
pub(super) use received_files::Requested;

use std::sync::Arc;

use super::check::sort;
use super::{shared_bytes, MemoryBuilder};
use crate::error::BuildError;
use crate::host::HostResources;
use crate::mapping::HostMapping;
use crate::operations::prefault_mappings;
use crate::region::Span;
use crate::sys;

/// The memory of all regions, in the order of their addresses.
pub(super) struct Built {
    pub(super) mappings: Vec<Arc<HostMapping>>,
    /// Dropped after the mappings that use the files.
    _received: ReceivedFiles,
}

impl MemoryBuilder {
    /// Sets the resources of the host, which the build then does not read. Linux only.
    ///
    /// Use it for a build in a jail without /sys and /proc. [`HostResources`] has an example.
    pub fn host_resources(self, host: HostResources) -> Self {
        Self {
            host: Some(host),
            ..self
        }
    }
}

/// Maps all regions of a builder.
pub(super) fn build(mut builder: MemoryBuilder) -> Result<Built, BuildError> {
    let host = builder.host.unwrap_or_else(HostResources::current);
    let regions = std::mem::take(&mut builder.regions.0);
    // Dropped after the regions that use the files.
    let received = ReceivedFiles::of_sealed(&regions);
    let regions = sort(regions)?;
    let mut vmas = check::vmas(&regions, &host)?;
    regions.iter().try_for_each(files::check_seals)?;
    check::pools(&regions, &host)?;
    let mut opened = Vec::with_capacity(regions.len());
    for region in regions {
        let backing = files::open(&region, &host)?;
        check::options(&region, &backing, &host)?;
        opened.push((region, backing));
    }
    if !builder.allows_shared_bytes {
        shared_bytes::check(&opened)?;
    }
    check::huge_page_groups(&opened, &host)?;
    let populates = sys::populates_mappings();
    check::memory(&opened, builder.prefault.is_some(), populates, &host)?;
    opened
        .iter()
        .try_for_each(|(region, backing)| files::allocate(region, backing))?;
    let mut mappings = Vec::with_capacity(opened.len());
    for run in opened.chunk_by(|(one, _), (next, _)| check::is_adjacent(one, next)) {
        map::adjacent(run, &mut vmas, &host, &mut mappings)?;
    }
    if let Some((threads, mut progress)) = builder.prefault {
        let mappings = mappings
            .iter()
            .map(|mapping| (mapping.span(), mapping.as_ref()));
        let mappings: Vec<(Span, &HostMapping)> = mappings.collect();
        prefault_mappings(&mappings, threads, &mut progress, &host)?;
    }
    for mapping in &mappings {
        map::lock(mapping, &host)?;
    }
    Ok(Built {
        mappings,
        _received: received,
    })
}
