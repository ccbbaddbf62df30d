//! Maps the checked regions of a build.

use std::io;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::{Arc, RwLock};

use vm_memory::mmap::{PluggedBlocks, PluggedBlocksError};

use crate::backing::OpenedBacking;
use crate::error::BuildError;
use crate::mapping::{bytes, HostMapping, ZeroedRanges};
use crate::region::{BackingKind, NumaPolicy, Region, Span, TransparentHugePages, Unplugged};
use crate::resources::HostResources;
use crate::sys::{self, Advice, Mapped, Reserved, Source};
use crate::vma::vma_limit;

/// Maps adjacent regions in one reservation, and appends their mappings to `mappings`.
pub(super) fn adjacent(
    regions: &[(Region, OpenedBacking)],
    host: &HostResources,
    mappings: &mut Vec<Arc<HostMapping>>,
) -> Result<(), BuildError> {
    let (mut total, mut align) = (0u64, sys::page_size_u64());
    for (region, backing) in regions {
        total = total.saturating_add(region.size);
        align = align.max(alignment(region, backing, host));
    }
    let Some((first, _)) = regions.first() else {
        return Ok(());
    };
    let rest = first.start.0 & align.wrapping_sub(1);
    let span = Span {
        start: first.start.0,
        size: total,
    };
    let no_addresses = |source: io::Error| {
        let advice = "use less memory, or raise the address space limit (ulimit -v)";
        BuildError::system(span, "reserve host addresses", source, advice)
    };
    let too_large = |_| no_addresses(io::Error::from_raw_os_error(libc::ENOMEM));
    let size = |n: u64| usize::try_from(n).map_err(too_large);
    let reserved = Reserved::new(size(total)?, sys::page_size(), size(align)?, size(rest)?);
    let mut reserved = reserved.map_err(no_addresses)?;
    for (region, backing) in regions {
        mappings.push(map_region(region, backing, &mut reserved, host)?);
    }
    Ok(())
}

/// Returns the alignment of a region's host address relative to its guest address.
///
/// This is the size of the largest page that the region can have.
fn alignment(region: &Region, backing: &OpenedBacking, host: &HostResources) -> u64 {
    if region.options.transparent_huge_pages == TransparentHugePages::Off
        || backing.kind == BackingKind::Hugetlb
    {
        return backing.page_size;
    }
    let huge = host.transparent_huge_page();
    huge.filter(|huge| region.size >= *huge)
        .unwrap_or(backing.page_size)
}

/// Maps the next region of a reservation, and applies its options.
fn map_region(
    region: &Region,
    backing: &OpenedBacking,
    reserved: &mut Reserved,
    host: &HostResources,
) -> Result<Arc<HostMapping>, BuildError> {
    let span = region.span();
    let free = free_huge_pages(backing.page_size, &[], host);
    let mapped = map_source(region, backing, reserved, free)?;
    let len = mapped.len();
    let blocks = match region.blocks {
        None => None,
        Some(blocks) => {
            let plugged = new_blocks(region, backing, blocks.size)?;
            Some((blocks, Arc::new(plugged)))
        }
    };
    let turns_huge_pages_off = region.options.transparent_huge_pages == TransparentHugePages::Off;
    if backing.file.is_some() && !backing.is_shared() {
        // Discards need the limit, and may run under a seccomp filter that forbids reading it.
        vma_limit();
    }
    let mapping = HostMapping {
        mapped,
        start: region.start,
        backing: backing.clone(),
        options: region.options.clone(),
        blocks,
        no_huge_pages: turns_huge_pages_off && host.transparent_huge_page().is_some(),
        changes: RwLock::new(count_protected_blocks(region)?),
    };
    mapping.apply_options(0, len).map_err(|(what, source)| {
        let advice = "do not request it, or use a kernel that supports it";
        BuildError::system(span, what, source, advice)
    })?;
    mapping.apply_name(0, len).map_err(|source| {
        let advice = "do not set a name, or use a kernel with CONFIG_ANON_VMA_NAME";
        BuildError::system(span, "set its name", source, advice)
    })?;
    bind_huge_pages(&mapping, host)?;
    plug_initial_blocks(region, &mapping, free)?;
    Ok(Arc::new(mapping))
}

/// Maps the memory of a region. `free` is the number of free huge pages, for the error.
fn map_source(
    region: &Region,
    backing: &OpenedBacking,
    reserved: &mut Reserved,
    free: u64,
) -> Result<Mapped, BuildError> {
    let span = region.span();
    let len = usize::try_from(region.size).map_err(|_| BuildError::PastTop {
        start: span.start,
        size: span.size,
    })?;
    // Blocks take their huge pages when they are plugged. A described region must not reserve
    // again the pages that the other process has released to the pool.
    let is_released = region.described.is_some() && region.options.release_huge_pages;
    let reserves_huge_pages =
        backing.kind == BackingKind::Hugetlb && region.blocks.is_none() && !is_released;
    let source = match &backing.file {
        None => Source::Anonymous,
        Some((file, offset)) => Source::File {
            file,
            offset: *offset,
            shared: backing.is_shared(),
            reserve: reserves_huge_pages,
        },
    };
    reserved
        .map(len, source)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOMEM) if reserves_huge_pages => {
                let wanted = region.size.checked_div(backing.page_size);
                if wanted.is_some_and(|wanted| free < wanted) {
                    return huge_pages(span, backing.page_size, &[], free);
                }
                let advice = "use less memory, raise the address space limit (ulimit -v), \
                    or mount the file's hugetlbfs with more space (size=)";
                BuildError::system(span, "reserve its huge pages", source, advice)
            }
            Some(libc::EACCES) => {
                BuildError::system(span, "map it", source, "open the file for reading")
            }
            _ => BuildError::system(span, "map it", source, "use less memory or another file"),
        })
}

/// Counts the VMAs that a region's protected blocks can need.
fn count_protected_blocks(region: &Region) -> Result<ZeroedRanges, BuildError> {
    let mut changes = ZeroedRanges::default();
    let protected = region
        .blocks
        .filter(|blocks| blocks.unplugged == Unplugged::Protected);
    let Some(protected) = protected else {
        return Ok(changes);
    };
    let blocks = region.size.checked_div(protected.size.get());
    let blocks = blocks.unwrap_or(u64::MAX);
    let is_counted = usize::try_from(blocks).is_ok_and(|blocks| changes.vmas.try_take(blocks));
    if !is_counted {
        return Err(BuildError::TooManyBlocks {
            region: region.span(),
            blocks,
            limit: bytes(vma_limit()),
        });
    }
    Ok(changes)
}

/// Creates the record of a region's plugged blocks, all of them unplugged.
fn new_blocks(
    region: &Region,
    backing: &OpenedBacking,
    size: NonZeroU64,
) -> Result<PluggedBlocks, BuildError> {
    let span = region.span();
    let fail = |source| BuildError::Blocks {
        region: span,
        source,
    };
    let wrong_size = |_| PluggedBlocksError::BlockSize {
        block_size: usize::MAX,
    };
    let block_size = NonZeroUsize::try_from(size).map_err(|e| fail(wrong_size(e)))?;
    if !size.is_power_of_two() {
        return Err(fail(PluggedBlocksError::BlockSize {
            block_size: block_size.get(),
        }));
    }
    for (what, value, unit, unit_size) in [
        ("block size", size.get(), "page", backing.page_size),
        ("size", region.size, "block", size.get()),
    ] {
        if !value.is_multiple_of(unit_size) {
            return Err(BuildError::Misaligned {
                region: span,
                what,
                value,
                unit,
                unit_size,
            });
        }
    }
    let len = usize::try_from(region.size).map_err(|e| fail(wrong_size(e)))?;
    PluggedBlocks::new(len, block_size).map_err(fail)
}

/// Plugs the blocks that a description lists as plugged. `free` is as in [`map_source`].
fn plug_initial_blocks(
    region: &Region,
    mapping: &HostMapping,
    free: u64,
) -> Result<(), BuildError> {
    let plugged = super::check::initial_blocks(region)?;
    let result = crate::plug::plug_initial(mapping, &plugged);
    result.map_err(|source| match source.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM) if mapping.kind() == BackingKind::Hugetlb => {
            let len = plugged
                .iter()
                .fold(0u64, |sum, (_, len)| sum.saturating_add(bytes(*len)));
            BuildError::HugePages {
                region: region.span(),
                page_size: mapping.page_size(),
                wanted: len.checked_div(mapping.page_size()).unwrap_or(0),
                free,
                nodes: Vec::new(),
            }
        }
        _ => BuildError::system(
            region.span(),
            "plug its initial blocks",
            source,
            "plug fewer blocks",
        ),
    })
}

/// Populates the huge pages of a region that is bound to NUMA nodes.
///
/// `mmap(2)` reserves huge pages of any node. A node without free pages would cause a SIGBUS on a
/// later access. Blocks are populated when they are plugged.
fn bind_huge_pages(mapping: &HostMapping, host: &HostResources) -> Result<(), BuildError> {
    let (NumaPolicy::Bind(nodes) | NumaPolicy::Interleave(nodes)) = &mapping.options.numa else {
        return Ok(());
    };
    if mapping.kind() != BackingKind::Hugetlb || mapping.blocks.is_some() {
        return Ok(());
    }
    let page_size = mapping.page_size();
    let free = free_huge_pages(page_size, nodes, host);
    let all = mapping.mapped().len();
    let populated = mapping.mapped().advise(0, all, Advice::PopulateWrite);
    populated.map_err(|source| match source.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM) => huge_pages(mapping.span(), page_size, nodes, free),
        _ => BuildError::system(
            mapping.span(),
            "populate its huge pages on its NUMA nodes",
            source,
            "use Linux 5.14 or later, or NumaPolicy::Inherit",
        ),
    })
}

/// Returns the number of free huge pages on `nodes`, or on the host if `nodes` is empty.
fn free_huge_pages(page_size: u64, nodes: &[u32], host: &HostResources) -> u64 {
    if nodes.is_empty() {
        let pools = host.pools();
        let pool = pools.iter().find(|pool| pool.page_size == page_size);
        return pool.map_or(0, |pool| pool.free);
    }
    let pools = nodes
        .iter()
        .filter_map(|node| host.pool_of_node(*node, page_size));
    pools.fold(0, |sum, pool| sum.saturating_add(pool.free))
}

/// Locks the pages of a mapping as its options require.
pub(super) fn lock(mapping: &HostMapping) -> Result<(), BuildError> {
    let len = mapping.mapped().len();
    let locked = mapping.apply_lock(0, len, mapping.options.lock);
    locked.map_err(|source| {
        let limit = match sys::lock_limit() {
            Some(limit) => format!("{limit:#x}"),
            None => "unlimited".to_owned(),
        };
        let advice = format!(
            "it needs {len:#x} bytes and the limit is {limit}; \
            raise the limit (ulimit -l) or grant CAP_IPC_LOCK"
        );
        BuildError::system(mapping.span(), "lock it in memory", source, &advice)
    })
}

fn huge_pages(region: Span, page_size: u64, nodes: &[u32], free: u64) -> BuildError {
    BuildError::HugePages {
        region,
        page_size,
        wanted: region.size.checked_div(page_size).unwrap_or(0),
        free,
        nodes: nodes.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing;
    use vm_memory::GuestAddress;

    #[test]
    fn alignment_is_the_largest_page_that_fits_the_region() {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("kernel/mm/transparent_hugepage");
        std::fs::create_dir_all(&settings).unwrap();
        std::fs::write(settings.join("hpage_pmd_size"), "2097152").unwrap();
        let host = HostResources::at(directory.path());
        let of = |size, policy| {
            let region = Region::new(GuestAddress(0), size).transparent_huge_pages(policy);
            alignment(&region, &backing::open(&region, &host).unwrap(), &host)
        };
        assert_eq!(of(4 << 20, TransparentHugePages::On), 2 << 20);
        assert_eq!(of(4 << 20, TransparentHugePages::Leave), 2 << 20);
        assert_eq!(of(1 << 20, TransparentHugePages::On), 0x1000);
        assert_eq!(of(4 << 20, TransparentHugePages::Off), 0x1000);
    }
}
