//! Maps the checked regions of a build.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, RwLock};

use super::files::transparent_huge_page;
use crate::builder::blocks::{initial_blocks, new_blocks};
use crate::error::BuildError;
use crate::host::process_limits::{self, Need};
use crate::host::{vma_limit, HostResources, VmaBudget};
use crate::mapping::{to_u64, HostMapping, MappingId, OpenedBacking, PageState};
use crate::operations::plug_initial;
use crate::region::{BackingKind, Lock, NumaPolicy, Region, Span, Unplugged};
use crate::sys::{self, Advice, Mapped, Reserved, Source};

/// Maps adjacent regions in one reservation, and appends their mappings to `mappings`.
///
/// The mappings keep their share of `vmas` together: after a region is dropped, its addresses stay
/// reserved as long as one of the others exists.
pub(super) fn adjacent(
    regions: &[(Region, OpenedBacking)],
    vmas: &mut VmaBudget,
    host: &HostResources,
    mappings: &mut Vec<Arc<HostMapping>>,
) -> Result<(), BuildError> {
    let (mut total, mut align) = (0u64, sys::page_size_u64());
    for (region, backing) in regions {
        total = total.saturating_add(region.size);
        align = align.max(alignment(region, backing));
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
        let otherwise = "use less memory";
        let len = total.saturating_add(align);
        // After mlockall(2), addresses count as locked memory.
        let need = match source.raw_os_error() {
            Some(libc::EAGAIN) => Need::Locked,
            _ => Need::Addresses,
        };
        let remedy = process_limits::remedy(host, need, len, &source, otherwise);
        BuildError::system(span, "reserve host addresses", source, &remedy)
    };
    let too_large = |_| no_addresses(io::Error::from_raw_os_error(libc::ENOMEM));
    let size = |n: u64| usize::try_from(n).map_err(too_large);
    let reserved = Reserved::new(size(total)?, sys::page_size(), size(align)?, size(rest)?);
    let mut reserved = reserved.map_err(no_addresses)?;
    let run_vmas = Arc::new(vmas.split(super::check::GUARDS.saturating_add(regions.len())));
    for (region, backing) in regions {
        mappings.push(map_region(region, backing, &mut reserved, &run_vmas, host)?);
    }
    Ok(())
}

/// Returns the alignment of a region's host address relative to its guest address.
///
/// This is the size of the largest page that the region can have.
fn alignment(region: &Region, backing: &OpenedBacking) -> u64 {
    match backing.kind {
        BackingKind::Hugetlb => backing.page_size,
        _ => transparent_huge_page(region).unwrap_or(backing.page_size),
    }
}

/// Maps the next region of a reservation, and applies its options.
fn map_region(
    region: &Region,
    backing: &OpenedBacking,
    reserved: &mut Reserved,
    run_vmas: &Arc<VmaBudget>,
    host: &HostResources,
) -> Result<Arc<HostMapping>, BuildError> {
    let span = region.span();
    let mapped = map_source(region, backing, reserved, host)?;
    let len = mapped.len();
    let blocks = match region.blocks {
        None => None,
        Some(blocks) => {
            let plugged = new_blocks(region, backing, blocks.size)?;
            Some((blocks, Arc::new(plugged)))
        }
    };
    let mapping = HostMapping {
        id: MappingId::new(),
        mapped,
        start: region.start,
        backing: backing.clone(),
        options: region.options.clone(),
        blocks,
        plugs: AtomicU64::new(0),
        notifier: Arc::default(),
        changes: RwLock::new(PageState::new(
            count_protected_blocks(region)?,
            Arc::clone(run_vmas),
        )),
    };
    mapping.apply_options(0, len).map_err(|(what, source)| {
        let otherwise = "do not request it, or use a kernel that supports it";
        let remedy = process_limits::remedy(host, Need::Addresses, 0, &source, otherwise);
        BuildError::system(span, what, source, &remedy)
    })?;
    match mapping.apply_name(0, len) {
        Err(error) if !region.options.require_name && is_unsupported(&error) => {
            log_warning!("region {span}: the kernel does not support its name: {error}");
        }
        result => result.map_err(|source| {
            let advice = "do not require a name, or use a kernel with CONFIG_ANON_VMA_NAME";
            BuildError::system(span, "set its name", source, advice)
        })?,
    }
    if !super::check::releases_huge_pages(region) {
        bind_huge_pages(&mapping, host)?;
    }
    plug_initial_blocks(region, &mapping, host)?;
    log_debug!(
        "region {span}: mapped {} memory with pages of {:#x} bytes at host address {:#x}",
        mapping.kind(),
        mapping.page_size(),
        mapping.host_address()
    );
    Ok(Arc::new(mapping))
}

/// Returns whether the kernel, or a seccomp filter, does not support the names of anonymous memory.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EPERM | libc::ENOSYS)
    )
}

/// Maps the memory of a region.
fn map_source(
    region: &Region,
    backing: &OpenedBacking,
    reserved: &mut Reserved,
    host: &HostResources,
) -> Result<Mapped, BuildError> {
    let span = region.span();
    let len = usize::try_from(region.size).map_err(|_| BuildError::PastTop {
        start: span.start,
        size: span.size,
    })?;
    // Blocks take their huge pages when they are plugged.
    let reserves_huge_pages = backing.kind == BackingKind::Hugetlb
        && region.blocks.is_none()
        && !super::check::releases_huge_pages(region);
    let source = match &backing.file {
        None if region.options.reserve => Source::Accounted,
        None => Source::Anonymous,
        Some((file, offset)) => Source::File {
            file,
            offset: *offset,
            shared: backing.is_shared(),
            writable: !region.options.read_only,
            reserve: reserves_huge_pages,
        },
    };
    let wanted = backing.missing(region.size);
    reserved.map(len, source).map_err(|source| {
        if reserves_huge_pages && source.raw_os_error() == Some(libc::ENOMEM) {
            // A mapping that was refused has taken no page.
            let free = host.again().free_huge_pages(backing.page_size, &[]);
            if let Some(error) =
                huge_page_shortage(span, backing.page_size, wanted, free, &[], host)
            {
                return error;
            }
        }
        not_mapped(region, backing, source, host)
    })
}

/// Returns the error for a mapping that the kernel refused for another reason than huge pages.
fn not_mapped(
    region: &Region,
    backing: &OpenedBacking,
    source: io::Error,
    host: &HostResources,
) -> BuildError {
    let (mut need, mut otherwise) = (Need::Addresses, "use less memory or another file");
    match source.raw_os_error() {
        Some(libc::EACCES) => otherwise = "open the file for reading",
        Some(libc::EPERM) => otherwise = "the file is sealed; use Backing::private_file",
        Some(libc::ENODEV) => otherwise = "use a file that supports mmap(2)",
        Some(libc::ENOMEM) if is_full(backing, region.size) => {
            otherwise = "mount the file's hugetlbfs with more space (size=)";
        }
        Some(libc::ENOMEM) if backing.kind == BackingKind::Hugetlb => {
            otherwise = "add huge pages of its size (nr_hugepages), or use less memory";
        }
        Some(libc::EAGAIN) => need = Need::Locked,
        _ if backing.file.is_none() => {
            need = Need::Private {
                reserve: region.options.reserve,
            };
            otherwise = "use less memory";
        }
        _ => {}
    }
    let remedy = process_limits::remedy(host, need, region.size, &source, otherwise);
    BuildError::system(region.span(), "map it", source, &remedy)
}

/// Returns whether the file system of a backing lacks space for `size` bytes of the file.
fn is_full(backing: &OpenedBacking, size: u64) -> bool {
    let Some((file, _)) = &backing.file else {
        return false;
    };
    let system = sys::file_system(file);
    system.is_ok_and(|system| system.is_limited && system.free < backing.missing(size))
}

/// Returns the error for huge pages that the pool or a control group lacks, if one of them does.
fn huge_page_shortage(
    region: Span,
    page_size: u64,
    wanted: u64,
    free: Option<u64>,
    nodes: &[u32],
    host: &HostResources,
) -> Option<BuildError> {
    // Pages that were populated before the failure count as used, so it suffices to ask for one
    // more page.
    match host.again().huge_page_limit(page_size, false) {
        Some(limit) if limit.available < page_size.min(wanted) => {
            return Some(BuildError::ControlGroup {
                region,
                wanted,
                limit,
            });
        }
        _ => {}
    }
    let wanted = wanted.checked_div(page_size).unwrap_or(0);
    let free = free?;
    (free < wanted).then(|| BuildError::HugePages {
        region,
        page_size,
        wanted,
        free,
        nodes: nodes.to_vec(),
    })
}

/// Takes the VMAs that a region's protected blocks can add.
fn count_protected_blocks(region: &Region) -> Result<VmaBudget, BuildError> {
    let mut vmas = VmaBudget::default();
    let protected = region
        .blocks
        .filter(|blocks| blocks.unplugged == Unplugged::Protected);
    let Some(protected) = protected else {
        return Ok(vmas);
    };
    let blocks = region.size.checked_div(protected.size.get());
    let blocks = blocks.unwrap_or(u64::MAX);
    let is_counted = usize::try_from(blocks).is_ok_and(|blocks| vmas.try_take(blocks));
    if !is_counted {
        return Err(BuildError::TooManyBlocks {
            region: region.span(),
            blocks,
            limit: to_u64(vma_limit()),
        });
    }
    Ok(vmas)
}

/// Plugs the blocks that a description lists as plugged.
fn plug_initial_blocks(
    region: &Region,
    mapping: &HostMapping,
    host: &HostResources,
) -> Result<(), BuildError> {
    let plugged = initial_blocks(region)?;
    if plugged.is_empty() {
        return plug_initial(mapping, &plugged).map_err(|source| not_plugged(region, source, host));
    }
    let lengths = plugged.iter().map(|(_, len)| to_u64(*len));
    let wanted = mapping
        .backing
        .missing(lengths.fold(0, u64::saturating_add));
    let page_size = mapping.page_size();
    let free = match mapping.kind() {
        BackingKind::Hugetlb => host.again().free_huge_pages(page_size, &[]),
        _ => None,
    };
    plug_initial(mapping, &plugged).map_err(|source| {
        let may_lack_pages = matches!(source.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM));
        let shortage = (may_lack_pages && mapping.kind() == BackingKind::Hugetlb)
            .then(|| huge_page_shortage(region.span(), page_size, wanted, free, &[], host));
        shortage
            .flatten()
            .unwrap_or_else(|| not_plugged(region, source, host))
    })
}

fn not_plugged(region: &Region, source: io::Error, host: &HostResources) -> BuildError {
    // Only changes of the protection add VMAs.
    let remedy = process_limits::remedy(host, Need::Addresses, 0, &source, "plug fewer blocks");
    BuildError::system(region.span(), "plug its initial blocks", source, &remedy)
}

/// Populates the huge pages of a region that is bound to NUMA nodes.
///
/// `mmap(2)` reserves huge pages of any node. A node without free pages would cause a SIGBUS on a
/// later access. Blocks are populated when they are plugged. The caller excludes a region whose
/// pages another process may have released.
fn bind_huge_pages(mapping: &HostMapping, host: &HostResources) -> Result<(), BuildError> {
    let (NumaPolicy::Bind(nodes) | NumaPolicy::Interleave(nodes)) = &mapping.options.numa else {
        return Ok(());
    };
    if mapping.kind() != BackingKind::Hugetlb || mapping.blocks.is_some() {
        return Ok(());
    }
    let (page_size, all) = (mapping.page_size(), mapping.mapped().len());
    // Before the pages are populated.
    let free = host.again().free_huge_pages(page_size, nodes);
    let advice = if mapping.options.read_only {
        Advice::PopulateRead
    } else {
        Advice::PopulateWrite
    };
    let populated = mapping.mapped().advise(0, all, advice);
    populated.map_err(|source| {
        let what = "populate its huge pages on its NUMA nodes";
        let error = source.raw_os_error();
        if matches!(error, Some(libc::EFAULT | libc::ENOMEM)) {
            let wanted = mapping.backing.missing(to_u64(all));
            let shortage = huge_page_shortage(mapping.span(), page_size, wanted, free, nodes, host);
            // The mapping has already reserved its pages. Other reservations take pages of any
            // node.
            return shortage.unwrap_or_else(|| {
                let advice = "pages of these nodes may be reserved for other mappings; \
                    add pages to the nodes, or use NumaPolicy::Inherit";
                BuildError::system(mapping.span(), what, source, advice)
            });
        }
        let advice = match error {
            Some(libc::EINVAL) => "use Linux 5.14 or later, or NumaPolicy::Inherit",
            _ => "use NumaPolicy::Inherit",
        };
        BuildError::system(mapping.span(), what, source, advice)
    })
}

/// Locks the pages of a mapping as its options require.
pub(super) fn lock(mapping: &HostMapping, host: &HostResources) -> Result<(), BuildError> {
    let len = mapping.mapped().len();
    let locked = mapping.apply_lock(0, len, mapping.options.lock);
    locked.map_err(|source| {
        let otherwise = match source.raw_os_error() {
            _ if is_full(&mapping.backing, to_u64(len)) => {
                "its file system has no space for holes of the file; free space there, or do not \
                use Region::sparse"
            }
            Some(libc::EPERM) => "grant CAP_IPC_LOCK, or set a limit of locked memory (ulimit -l)",
            _ if mapping.options.lock == Lock::OnFault => {
                "no limit of this process explains it; use Lock::No"
            }
            _ => "no limit of this process explains it; free memory or use Lock::OnFault",
        };
        let remedy = process_limits::remedy(host, Need::Locked, to_u64(len), &source, otherwise);
        BuildError::system(mapping.span(), "lock it in memory", source, &remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::linux::files::open;
    use crate::host::tree;
    use crate::mapping::provisioned;
    use crate::region::TransparentHugePages;
    use crate::{Backing, MemoryBuilder};
    use test_support::{refuse_calls, skipped, HugePages};
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    #[test]
    fn alignment_is_the_largest_page_that_fits_the_region() {
        let host = HostResources::current();
        let huge = sys::huge_page_size();
        let of = |size, policy| {
            let region = Region::new(GuestAddress(0), size).transparent_huge_pages(policy);
            alignment(&region, &open(&region, &host).unwrap())
        };
        assert_eq!(of(2 * huge, TransparentHugePages::On), huge);
        assert_eq!(of(2 * huge, TransparentHugePages::Leave), huge);
        assert_eq!(of(huge / 2, TransparentHugePages::On), sys::page_size_u64());
        assert_eq!(
            of(2 * huge, TransparentHugePages::Off),
            sys::page_size_u64()
        );
    }
    /// The other nodes have enough pages, which the region may not use.
    #[test]
    fn bind_huge_pages_without_pages_on_nodes_names_nodes() {
        let test = "bind_huge_pages_without_pages_on_nodes_names_nodes";
        const HUGE: u64 = 2 << 20;
        let Some(_pages) = HugePages::reserve(8, test) else {
            return;
        };
        let backing = Backing::Hugetlb { page_size: HUGE };
        let region = Region::new(GuestAddress(0), 8 * HUGE).backing(backing);
        let region = region.numa(NumaPolicy::Bind(vec![0]));
        let memory = match MemoryBuilder::new().region(region).build::<()>() {
            Ok(memory) => memory,
            Err(error) => return skipped(test, format!("no mbind(2) or seccomp filters: {error}")),
        };
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let error_with = |free_on_node: &str| {
            let pool = "hugepages/hugepages-2048kB";
            let node = |number: u32| format!("devices/system/node/node{number}/{pool}");
            let files = [
                (format!("kernel/mm/{pool}/nr_hugepages"), "20"),
                (format!("kernel/mm/{pool}/free_hugepages"), "18"),
                (format!("kernel/mm/{pool}/resv_hugepages"), "8"),
                ("devices/system/node/has_memory".to_owned(), "0-1"),
                (format!("{}/nr_hugepages", node(0)), "10"),
                (format!("{}/free_hugepages", node(0)), free_on_node),
                (format!("{}/nr_hugepages", node(1)), "10"),
                (format!("{}/free_hugepages", node(1)), "10"),
            ];
            let files: Vec<_> = files
                .iter()
                .map(|(path, text)| (path.as_str(), *text))
                .collect();
            let (_keep, host) = tree(&files);
            let bound = refuse_calls(libc::SYS_madvise, libc::EFAULT, || {
                bind_huge_pages(mapping, &host)
            });
            bound.map(|bound| bound.unwrap_err().to_string())
        };
        let (short, enough) = match (error_with("3"), error_with("8")) {
            (Ok(short), Ok(enough)) => (short, enough),
            other => return skipped(test, format!("no seccomp filters: {other:?}")),
        };
        assert!(
            short.contains("only 3 are free on NUMA nodes [0]; add 5"),
            "{short}"
        );
        assert!(
            enough.contains("may be reserved for other mappings"),
            "{enough}"
        );
    }
}
