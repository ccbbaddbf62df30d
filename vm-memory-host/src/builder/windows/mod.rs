//! The steps of a build on Windows.

mod check;

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, RwLock};

use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_COMMITMENT_LIMIT, ERROR_INVALID_PARAMETER, ERROR_PRIVILEGE_NOT_HELD,
    ERROR_WORKING_SET_QUOTA,
};

use super::blocks::{initial_blocks, new_blocks};
use super::check::{check_alignment, check_multiple, end_in_file, sort};
use super::{shared_bytes, MemoryBuilder};
use crate::error::BuildError;
use crate::host::HostResources;
use crate::mapping::{HostMapping, MappingId, OpenedBacking, PageState};
use crate::operations::{plug_initial, prefault_mappings};
use crate::region::{Backing, BackingKind, Lock, Region, Sharing, Span};
use crate::sys::{self, Mapped, Placement};

/// The regions of a builder.
#[derive(Debug, Default)]
pub(super) struct Requested(pub(super) Vec<Region>);

/// The memory of all regions, in the order of their addresses.
pub(super) struct Built {
    pub(super) mappings: Vec<Arc<HostMapping>>,
}

/// Maps all regions of a builder.
pub(super) fn build(builder: MemoryBuilder) -> Result<Built, BuildError> {
    let regions = sort(builder.regions.0)?;
    let mut opened = Vec::with_capacity(regions.len());
    for region in regions {
        check::options(&region)?;
        let backing = open(&region)?;
        check_alignment(&region, backing.page_size)?;
        opened.push((region, backing));
    }
    if !builder.allows_shared_bytes {
        shared_bytes::check(&opened)?;
    }
    let mappings = opened.iter().map(|(region, backing)| map(region, backing));
    let mappings = mappings.collect::<Result<Vec<_>, BuildError>>()?;
    if let Some((threads, mut progress)) = builder.prefault {
        let mappings = mappings.iter().map(|mapping| (mapping.span(), &**mapping));
        let mappings: Vec<(Span, &HostMapping)> = mappings.collect();
        let host = builder.host.unwrap_or_else(HostResources::current);
        prefault_mappings(&mappings, threads, &mut progress, &host)?;
    }
    mappings.iter().try_for_each(|mapping| lock(mapping))?;
    Ok(Built { mappings })
}

/// Checks the backing of a region.
fn open(region: &Region) -> Result<OpenedBacking, BuildError> {
    let private = |kind, page_size| OpenedBacking {
        kind,
        file: None,
        sharing: Sharing::Private,
        identity: None,
        page_size,
    };
    match &region.backing {
        Backing::Hugetlb { page_size } if sys::large_page_size() == Some(*page_size) => {
            Ok(private(BackingKind::Hugetlb, *page_size))
        }
        Backing::Hugetlb { page_size } => Err(BuildError::NoSuchHugePage {
            region: region.span(),
            page_size: *page_size,
            available: sys::large_page_size().into_iter().collect(),
        }),
        Backing::File { file, offset, .. } => open_file(region, file, *offset),
        _ => Ok(private(BackingKind::Anonymous, sys::page_size_u64())),
    }
}

/// Checks the file of a region.
fn open_file(region: &Region, file: &Arc<File>, offset: u64) -> Result<OpenedBacking, BuildError> {
    let span = region.span();
    let page_size = sys::page_size_u64();
    check_multiple(region, "file offset", offset, page_size)?;
    let needed = end_in_file(region, offset)?;
    let refused = |source| BuildError::system(span, "examine its file", source, "pass a file");
    let metadata = file.metadata().map_err(refused)?;
    if metadata.len() < needed {
        return Err(BuildError::FileTooShort {
            region: span,
            needed,
            length: metadata.len(),
        });
    }
    if !region.options.sparse && !region.options.read_only && sys::has_holes(&metadata) {
        return Err(BuildError::Conflict {
            region: span,
            what: "the file is sparse or compressed, and its volume may lack space when a page is \
                written; use another file or allow holes (Region::sparse)",
        });
    }
    let identity = sys::file_identity(file).map_err(refused)?;
    Ok(OpenedBacking {
        kind: BackingKind::File,
        file: Some((Arc::clone(file), offset)),
        sharing: Sharing::Shared,
        identity,
        page_size,
    })
}

/// Maps a region.
fn map(region: &Region, backing: &OpenedBacking) -> Result<Arc<HostMapping>, BuildError> {
    let blocks = match region.blocks {
        None => None,
        Some(blocks) => Some((blocks, Arc::new(new_blocks(region, backing, blocks.size)?))),
    };
    let plugged = initial_blocks(region)?;
    let refused = |source: io::Error| {
        let advice = advice(backing.kind, &source);
        BuildError::system(region.span(), "map it", source, advice)
    };
    let mapping = HostMapping {
        id: MappingId::new(),
        mapped: map_source(region, backing)?.map_err(refused)?,
        start: region.start,
        backing: backing.clone(),
        options: region.options.clone(),
        blocks,
        plugs: AtomicU64::new(0),
        notifier: Arc::default(),
        changes: RwLock::new(PageState),
    };
    plug_initial(&mapping, &plugged).map_err(refused)?;
    log_debug!(
        "region {}: mapped {} memory with pages of {:#x} bytes at host address {:#x}",
        region.span(),
        mapping.kind(),
        mapping.page_size(),
        mapping.host_address()
    );
    Ok(Arc::new(mapping))
}

/// Maps the memory of a region, which is committed unless the region has blocks.
fn map_source(region: &Region, backing: &OpenedBacking) -> Result<io::Result<Mapped>, BuildError> {
    let size = |size: u64| {
        usize::try_from(size).map_err(|_| BuildError::PastTop {
            start: region.start.0,
            size: region.size,
        })
    };
    let (len, node) = (size(region.size)?, check::preferred_node(region));
    if let Some((file, offset)) = &backing.file {
        let is_written = !region.options.read_only;
        return Ok(Mapped::view(file, *offset, len, is_written));
    }
    if backing.kind == BackingKind::Hugetlb {
        return Ok(Mapped::large(len, node));
    }
    // The hypervisor can then map large pages for the guest.
    let large = Some(sys::huge_page_size()).filter(|large| region.size >= *large);
    let align = large.unwrap_or(backing.page_size);
    let place = Placement {
        align: size(align)?,
        rest: size(region.start.0 & align.wrapping_sub(1))?,
        node,
    };
    Ok(Mapped::reserve(len, place).and_then(|mapped| {
        if region.blocks.is_none() {
            mapped.commit(0, len)?;
        }
        Ok(mapped)
    }))
}

/// Returns the remedy for memory that the system refuses.
fn advice(kind: BackingKind, source: &io::Error) -> &'static str {
    const PRIVILEGE: i32 = ERROR_PRIVILEGE_NOT_HELD.cast_signed();
    const COMMIT: i32 = ERROR_COMMITMENT_LIMIT.cast_signed();
    const ACCESS: i32 = ERROR_ACCESS_DENIED.cast_signed();
    const PARAMETER: i32 = ERROR_INVALID_PARAMETER.cast_signed();
    match (kind, source.raw_os_error()) {
        (BackingKind::Hugetlb, Some(PRIVILEGE)) => {
            "grant the user the right to lock pages in memory (SeLockMemoryPrivilege) and enable \
            it in the token of the process, or use Backing::Anonymous"
        }
        (BackingKind::Hugetlb, Some(PARAMETER)) => {
            "this system does not support large pages; use Backing::Anonymous"
        }
        (BackingKind::Hugetlb, _) => {
            "memory may be too fragmented; build the region after a restart of the system, or use \
            Backing::Anonymous"
        }
        (BackingKind::File, Some(ACCESS)) => {
            "open the file for reading and writing, or use Region::read_only"
        }
        (_, Some(COMMIT)) => {
            "enlarge the page file, use less memory, or commit it in parts (Region::blocks)"
        }
        (BackingKind::File, _) => "use another file or a smaller region",
        _ => "use less memory",
    }
}

/// Locks the pages of a mapping as its options require.
fn lock(mapping: &HostMapping) -> Result<(), BuildError> {
    // Large pages are always in memory.
    if mapping.options.lock == Lock::No || mapping.kind() == BackingKind::Hugetlb {
        return Ok(());
    }
    let locked = mapping.mapped().lock(0, mapping.mapped().len());
    locked.map_err(|source| {
        const QUOTA: i32 = ERROR_WORKING_SET_QUOTA.cast_signed();
        let advice = match source.raw_os_error() {
            Some(QUOTA) => {
                "raise the minimum working set of the process (SetProcessWorkingSetSize), or use \
                Lock::No"
            }
            _ => "free memory or use Lock::No",
        };
        BuildError::system(mapping.span(), "lock it in memory", source, advice)
    })
}
