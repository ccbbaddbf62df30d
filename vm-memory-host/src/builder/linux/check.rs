//! The checks of a request that depend on Linux and on this host.

use std::collections::BTreeMap;

use vm_memory::fault;

use super::files::check_name;
use super::needed::Needed;
use crate::builder::blocks::{block_size, initial_blocks};
use crate::builder::check::{distinct_nodes, end, sort};
use crate::error::BuildError;
use crate::host::{read_vma_limit, GroupLimit, HostResources, VmaBudget};
use crate::mapping::OpenedBacking;
use crate::region::{
    Backing, BackingKind, Lock, NumaPolicy, Region, Sharing, Span, TransparentHugePages, Unplugged,
};

/// Checks everything in a request that depends neither on the host nor on files.
pub(crate) fn layout(regions: Vec<Region>) -> Result<(), BuildError> {
    for region in sort(regions)? {
        block_size(&region)?;
        initial_blocks(&region)?;
        distinct_nodes(&region.options.numa, region.span())?;
        check_name(&region)?;
    }
    Ok(())
}

/// Returns whether a region begins where another one ends. Such regions share a reservation.
pub(super) fn is_adjacent(one: &Region, next: &Region) -> bool {
    end(one).is_some_and(|end| end == next.start.0)
}

/// The VMAs of a reservation beside those of its regions: two guards.
pub(super) const GUARDS: usize = 2;

/// Takes the VMAs of sorted regions from the budget of this process.
///
/// The kernel may merge some of them. Protected blocks need more. This reads the limit, which
/// discards may not read under a seccomp filter.
pub(super) fn vmas(regions: &[Region], host: &HostResources) -> Result<VmaBudget, BuildError> {
    read_vma_limit(host);
    let reservations = regions.chunk_by(is_adjacent).count();
    let vmas = reservations
        .saturating_mul(GUARDS)
        .saturating_add(regions.len());
    let mut budget = VmaBudget::default();
    if budget.try_take(vmas) {
        return Ok(budget);
    }
    Err(BuildError::TooManyRegions {
        count: regions.len(),
        vmas,
        available: VmaBudget::available(),
    })
}

/// Checks that the host has enough huge pages for all regions together.
///
/// Another process may take pages after this check. mmap(2), which reserves the pages, then fails.
pub(super) fn pools(regions: &[Region], host: &HostResources) -> Result<(), BuildError> {
    for pool in host.huge_page_pools() {
        let size = pool.page_size;
        // Blocks take their pages when they are plugged. Misaligned regions are refused later.
        let mut reserved = regions.iter().filter(|region| {
            matches!(region.backing, Backing::Hugetlb { page_size } if page_size == size)
                && region.blocks.is_none()
                && (region.size | region.start.0).is_multiple_of(size)
        });
        let pages = |region: &Region| region.size.checked_div(size).unwrap_or(0);
        let wanted = reserved
            .clone()
            .fold(0u64, |sum, region| sum.saturating_add(pages(region)));
        let Some(free) = host.free_huge_pages(size, &[]) else {
            continue;
        };
        if wanted > free.saturating_add(pool.overcommit) {
            if let Some(region) = reserved.next_back() {
                return Err(BuildError::HugePages {
                    region: region.span(),
                    page_size: size,
                    wanted,
                    free,
                    nodes: Vec::new(),
                });
            }
        }
    }
    Ok(())
}

/// Checks that the control groups of this process leave enough huge pages for all regions.
///
/// The kernel charges a page to a group on its first use. A page above the limit raises SIGBUS.
pub(super) fn huge_page_groups(
    regions: &[(Region, OpenedBacking)],
    host: &HostResources,
) -> Result<(), BuildError> {
    let mut sizes: BTreeMap<u64, (Needed, Option<GroupLimit>)> = BTreeMap::new();
    for (region, backing) in regions {
        let size = backing.page_size;
        if backing.kind != BackingKind::Hugetlb || releases_huge_pages(region) {
            continue;
        }
        let (needed, limit) = sizes
            .entry(size)
            .or_insert_with(|| (Needed::default(), host.huge_page_limit(size, true)));
        if needed.add(region, backing, true) == 0 {
            continue;
        }
        match limit {
            Some(limit) if limit.available < needed.total() => {
                return Err(BuildError::ControlGroup {
                    region: region.span(),
                    wanted: needed.total(),
                    limit: limit.clone(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns whether the huge pages of a region may be in the pool.
///
/// A described region must not reserve again the pages that the other process has released. A
/// private mapping always reserves its own copies, which are never released.
pub(super) fn releases_huge_pages(region: &Region) -> bool {
    let is_shared = matches!(
        region.backing,
        Backing::File {
            sharing: Sharing::Shared,
            ..
        }
    );
    is_shared && region.described.is_some() && region.options.release_huge_pages
}

/// Returns the number of bytes of a region that are accessible after the build.
pub(super) fn initial_size(region: &Region) -> u64 {
    if region.blocks.is_none() {
        return region.size;
    }
    let lengths = region.plugged.iter().map(|(_, len)| *len);
    lengths.fold(0, u64::saturating_add)
}

/// Checks that the host has enough memory for all pages that must be resident after the build.
///
/// Without this check the OOM killer could end this process. `populates` is whether the kernel
/// populates new mappings at once (mlockall(2)). It then also populates unplugged blocks.
pub(super) fn memory(
    regions: &[(Region, OpenedBacking)],
    prefault: bool,
    populates: bool,
    host: &HostResources,
) -> Result<(), BuildError> {
    let mut limits = None;
    let mut needed = Needed::default();
    for (region, backing) in regions {
        // A prefault of a file fills the page cache, which is reclaimable unless it is locked.
        // Pools account for huge pages.
        let in_memory = matches!(backing.kind, BackingKind::Anonymous | BackingKind::Memfd);
        let locks_all = match region.options.lock {
            Lock::No => populates,
            Lock::Now => true,
            Lock::OnFault => prefault || populates,
        };
        let locked = locks_all && backing.kind != BackingKind::Hugetlb;
        let allocated = backing.own_tmpfs && backing.allocated;
        if !(locked || allocated || (in_memory && prefault)) {
            continue;
        }
        let mut counted = region.clone();
        if populates {
            counted.blocks = None;
        }
        // A lock of private memory copies its pages, and a prefault reads them.
        let copies = (populates || region.options.lock == Lock::Now) && !region.options.read_only;
        needed.add(&counted, backing, copies);
        let (wanted, region) = (needed.total(), region.span());
        let (available, limit) =
            limits.get_or_insert_with(|| (host.available_memory(), host.memory_limit()));
        match *available {
            Some(available) if wanted > available => {
                return Err(BuildError::Memory {
                    region,
                    wanted,
                    available,
                });
            }
            _ => {}
        }
        match limit {
            Some(limit) if wanted > limit.available => {
                return Err(BuildError::ControlGroup {
                    region,
                    wanted,
                    limit: limit.clone(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Checks that a region's options fit its backing and the host.
pub(super) fn options(
    region: &Region,
    backing: &OpenedBacking,
    host: &HostResources,
) -> Result<(), BuildError> {
    transparent_huge_pages(region, backing, host)?;
    conflicts(region, backing)?;
    initial_blocks(region)?;
    nodes(&region.options.numa, region.span(), host)
}

fn transparent_huge_pages(
    region: &Region,
    backing: &OpenedBacking,
    host: &HostResources,
) -> Result<(), BuildError> {
    if region.options.transparent_huge_pages != TransparentHugePages::On {
        return Ok(());
    }
    let conflict = match backing.kind {
        BackingKind::Hugetlb => Some(
            "transparent huge pages do not apply to hugetlb pages; use TransparentHugePages::Leave",
        ),
        BackingKind::File => Some(
            "transparent huge pages need anonymous memory or a memfd, not a file; \
            use TransparentHugePages::Leave",
        ),
        BackingKind::Memfd if backing.sharing == Sharing::Private => Some(
            "private copies of a memfd's pages are never transparent huge pages; \
            share the memfd or use TransparentHugePages::Leave",
        ),
        BackingKind::Anonymous | BackingKind::Memfd => None,
    };
    if let Some(what) = conflict {
        return Err(BuildError::Conflict {
            region: region.span(),
            what,
        });
    }
    // A mounted tmpfs has its own setting (tmpfs(5), "huge").
    if backing.own_tmpfs {
        return Ok(());
    }
    let shared = backing.kind == BackingKind::Memfd;
    match host.transparent_huge_pages_refused(shared) {
        Some((path, setting)) => Err(BuildError::TransparentHugePagesOff {
            region: region.span(),
            path,
            setting,
        }),
        None => Ok(()),
    }
}

/// Returns whether an access that is in progress when its block is unplugged can raise a signal.
///
/// A protected block raises SIGSEGV. The page of a limited pool or tmpfs can be gone, which raises
/// SIGBUS.
fn unplug_can_raise_signal(region: &Region, backing: &OpenedBacking) -> bool {
    region.blocks.is_some_and(|blocks| {
        blocks.unplugged == Unplugged::Protected
            || backing.kind == BackingKind::Hugetlb
            || backing.own_tmpfs
    })
}

/// Checks that the options do not contradict the backing or each other.
fn conflicts(region: &Region, backing: &OpenedBacking) -> Result<(), BuildError> {
    let options = &region.options;
    let shared = backing.sharing == Sharing::Shared;
    let private_file = backing.file.is_some() && !shared;
    let conflicts = [
        (
            options.read_only && !matches!(region.backing, Backing::File { .. }),
            "read-only memory needs a file that has its bytes; \
            use Backing::shared_file or Backing::private_file",
        ),
        (
            options.read_only && region.blocks.is_some(),
            "blocks that are plugged must be writable; do not use Region::read_only",
        ),
        (
            options.mergeable && (backing.kind == BackingKind::Hugetlb || shared),
            "only private pages can be merged; use anonymous memory or do not set mergeable",
        ),
        (
            backing.kind == BackingKind::File && shared && options.numa != NumaPolicy::Inherit,
            "a NUMA policy has no effect on the page cache of a shared file; \
            use a memfd or NumaPolicy::Inherit",
        ),
        (
            region.blocks.is_some() && (backing.kind == BackingKind::File || private_file),
            "blocks need anonymous memory, a shared memfd or shared huge pages, \
            whose pages can be freed; use one of these",
        ),
        (
            region.blocks.is_some() && options.lock == Lock::Now,
            "unplugged blocks cannot be locked; use Lock::OnFault",
        ),
        (
            options.reserve && (backing.kind != BackingKind::Anonymous || region.blocks.is_some()),
            "only anonymous memory without blocks can be reserved; \
            prefault the region, or do not reserve it",
        ),
        (
            options.name.is_some() && backing.kind == BackingKind::File,
            "/proc/self/maps shows a file by its path; do not set a name",
        ),
        (
            unplug_can_raise_signal(region, backing) && !fault::is_installed(),
            "a device that accesses a block while the guest unplugs it could end the process; \
            call vm_memory::fault::install first, or use Unplugged::Mapped with anonymous memory \
            or a memfd of ordinary pages",
        ),
    ];
    match conflicts.into_iter().find(|(is_conflict, _)| *is_conflict) {
        Some((_, what)) => Err(BuildError::Conflict {
            region: region.span(),
            what,
        }),
        None => Ok(()),
    }
}

/// Checks that a policy names nodes that have memory, and names each of them once.
fn nodes(policy: &NumaPolicy, region: Span, host: &HostResources) -> Result<(), BuildError> {
    distinct_nodes(policy, region)?;
    if *policy == NumaPolicy::Inherit {
        return Ok(());
    }
    let available = host.nodes();
    let allowed = host.allowed_nodes();
    for &node in policy.nodes() {
        // mbind(2) refuses a node if its memory is not known here.
        if let Some(available) = available.as_ref().filter(|nodes| !nodes.contains(&node)) {
            return Err(BuildError::NoSuchNode {
                region,
                node,
                available: available.clone(),
            });
        }
        if let Some(allowed) = allowed.as_ref().filter(|allowed| !allowed.contains(&node)) {
            return Err(BuildError::NodeNotAllowed {
                region,
                node,
                allowed: allowed.clone(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::files::open;
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn options_with_transparent_huge_pages_disabled_returns_error() {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("kernel/mm/transparent_hugepage");
        std::fs::create_dir_all(&settings).unwrap();
        std::fs::write(settings.join("hpage_pmd_size"), "2097152").unwrap();
        std::fs::write(settings.join("enabled"), "always [madvise] never").unwrap();
        std::fs::write(settings.join("shmem_enabled"), "always advise [never]").unwrap();
        let host = HostResources::at(directory.path());
        let region =
            Region::new(GuestAddress(0), 4 << 20).transparent_huge_pages(TransparentHugePages::On);
        let opened = open(&region, &host).unwrap();
        assert!(options(&region, &opened, &host).is_ok());
        let region = region.backing(Backing::Memfd);
        let opened = open(&region, &host).unwrap();
        let error = options(&region, &opened, &host).unwrap_err();
        assert!(
            error.to_string().contains("shmem_enabled is never"),
            "{error}"
        );
    }

    #[test]
    fn memory_counts_locked_and_prefaulted_pages_but_not_pools() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("proc")).unwrap();
        std::fs::write(
            directory.path().join("proc/meminfo"),
            "MemAvailable: 8192 kB\n",
        )
        .unwrap();
        let host = HostResources::at(directory.path());
        let region = |start| Region::new(GuestAddress(start), 6 << 20);
        let refused = |regions: [Region; 2], kind, prefault| {
            let opened = regions.map(|region| {
                let backing = open(&Region::new(GuestAddress(0), 0x1000), &host).unwrap();
                (region, OpenedBacking { kind, ..backing })
            });
            match memory(&opened, prefault, false, &host) {
                Ok(()) => None,
                Err(BuildError::Memory {
                    wanted, available, ..
                }) => Some((wanted, available)),
                Err(error) => panic!("{error}"),
            }
        };
        let locked = |start| region(start).lock(Lock::Now);
        let too_much = Some((12 << 20, 8 << 20));
        assert_eq!(
            refused([region(0), region(1 << 32)], BackingKind::Anonymous, false),
            None
        );
        assert_eq!(
            refused([region(0), region(1 << 32)], BackingKind::Anonymous, true),
            too_much
        );
        assert_eq!(
            refused([region(0), locked(1 << 32)], BackingKind::Anonymous, false),
            None
        );
        assert_eq!(
            refused([locked(0), locked(1 << 32)], BackingKind::File, false),
            too_much
        );
        assert_eq!(
            refused([locked(0), locked(1 << 32)], BackingKind::Hugetlb, false),
            None
        );
    }

    #[test]
    fn options_with_numa_node_outside_of_cpuset_returns_error() {
        let directory = tempfile::tempdir().unwrap();
        let write = |path: &str, text| {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("devices/system/node/has_memory", "0-1");
        write(
            "proc/thread-self/status",
            "Name:\ta\nMems_allowed_list:\t1\n",
        );
        let host = HostResources::at(directory.path());
        let refused = |node| {
            let policy = NumaPolicy::Bind(vec![node]);
            let region = Region::new(GuestAddress(0), 4 << 20).numa(policy);
            let opened = open(&region, &host).unwrap();
            options(&region, &opened, &host).err()
        };
        assert!(refused(1).is_none());
        let error = refused(0).unwrap().to_string();
        assert!(
            error.contains("does not allow memory of NUMA node 0"),
            "{error}"
        );
    }

    #[test]
    fn options_with_numa_node_without_sys_leave_it_to_kernel() {
        let directory = tempfile::tempdir().unwrap();
        let host = HostResources::at(directory.path());
        for node in [0, 1, 77] {
            let policy = NumaPolicy::Bind(vec![node]);
            let region = Region::new(GuestAddress(0), 4 << 20).numa(policy);
            let opened = open(&region, &host).unwrap();
            assert!(options(&region, &opened, &host).is_ok(), "node {node}");
        }
    }

    #[test]
    fn options_with_numa_node_without_memory_returns_error() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = directory.path().join("devices/system/node");
        std::fs::create_dir_all(&nodes).unwrap();
        std::fs::write(nodes.join("has_memory"), "0,2-3").unwrap();
        let host = HostResources::at(directory.path());
        for (nodes, missing) in [(vec![0, 3], None), (vec![2, 1], Some(1))] {
            let region = Region::new(GuestAddress(0), 4 << 20).numa(NumaPolicy::Bind(nodes));
            let opened = open(&region, &host).unwrap();
            let found = match options(&region, &opened, &host) {
                Ok(()) => None,
                Err(BuildError::NoSuchNode {
                    node, available, ..
                }) => {
                    assert_eq!(available, [0, 2, 3]);
                    Some(node)
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(found, missing);
        }
    }
}
