//! Populates pages, and finds the reason if that fails.

use std::collections::BTreeMap;
use std::io;

use super::usage::known_resident;
use crate::error::PrefaultError;
use crate::host::HostResources;
use crate::mapping::{to_u64, FileIdentity, FileRanges, HostMapping};
use crate::operations::prefault::accessible;
use crate::region::{BackingKind, Lock, Sharing, Span};
use crate::sys::{Advice, Cpus};

/// Populates the pages of a range that is accessible.
pub(in crate::operations) fn populate_pages(
    mapping: &HostMapping,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    mapping.mapped().advise(offset, len, advice(mapping))
}

/// Returns the CPUs to populate memory of `nodes` on: those of the nodes, or all that are allowed.
///
/// Returns `None` if threads must not move.
pub(in crate::operations) fn cpus_of(
    nodes: &[u32],
    allowed: Option<&Cpus>,
    host: &HostResources,
) -> Option<Cpus> {
    let allowed = allowed?;
    let of_nodes = match nodes {
        [] => None,
        nodes => host.cpus_of_nodes(nodes),
    };
    let among = of_nodes.and_then(|list| allowed.among(&list));
    Some(among.unwrap_or_else(|| allowed.clone()))
}

/// Checks that the host has enough memory.
///
/// Counting resident pages takes time, so they are counted only if that can change the outcome.
pub(in crate::operations) fn check_memory(
    mappings: &[(Span, &HostMapping)],
    host: &HostResources,
) -> Result<(), PrefaultError> {
    let limit = host.memory_limit();
    let of_groups = limit.as_ref().map(|limit| limit.available);
    let of_host = host.available_memory();
    let Some(available) = of_host.into_iter().chain(of_groups).min() else {
        return Ok(());
    };
    let all = host.total_memory().unwrap_or(u64::MAX);
    let parts = parts_to_check(mappings);
    let lengths = parts.iter().flat_map(|(_, ranges)| ranges);
    let mut wanted = lengths.fold(0u64, |sum, (_, len)| sum.saturating_add(to_u64(*len)));
    if wanted <= available.saturating_add(all) {
        for (mapping, ranges) in &parts {
            if wanted <= available {
                return Ok(());
            }
            wanted = wanted.saturating_sub(known_resident(mapping, ranges).unwrap_or(0));
        }
    }
    if wanted <= available {
        return Ok(());
    }
    Err(match limit {
        Some(limit) if of_host.is_none_or(|of_host| wanted <= of_host) => {
            let done = 0;
            PrefaultError::ControlGroup {
                wanted,
                limit,
                done,
            }
        }
        _ => PrefaultError::Memory { wanted, available },
    })
}

/// Returns the ranges of each mapping whose pages may have to be allocated.
///
/// Bytes of a file that several mappings have are in the ranges of the first one only.
fn parts_to_check<'a>(
    mappings: &[(Span, &'a HostMapping)],
) -> Vec<(&'a HostMapping, Vec<(usize, usize)>)> {
    let mut files: BTreeMap<FileIdentity, FileRanges> = BTreeMap::new();
    let mut parts = Vec::new();
    for &(_, mapping) in mappings {
        let backing = &mapping.backing;
        // Huge pages come from a pool. The page cache of files is reclaimable unless it is locked.
        // The build, or a plug, has allocated the pages of a limited tmpfs, and mincore(2) does not
        // report those that were never written.
        let may_take_memory = match backing.kind {
            BackingKind::Anonymous => true,
            BackingKind::Memfd => !(backing.own_tmpfs && backing.allocated),
            BackingKind::File => mapping.options.lock != Lock::No,
            BackingKind::Hugetlb => false,
        };
        if !may_take_memory {
            continue;
        }
        let mut ranges = accessible(mapping);
        if let (Some(identity), Some((_, start))) = (backing.identity, &backing.file) {
            let file = files.entry(identity).or_default();
            let in_file = ranges.into_iter().flat_map(|(offset, len)| {
                file.insert(start.saturating_add(to_u64(offset)), to_u64(len))
            });
            // The offsets and lengths of a mapping fit, because it has these addresses.
            let in_mapping = in_file.filter_map(|range| {
                let offset = usize::try_from(range.start.saturating_sub(*start)).ok()?;
                let len = usize::try_from(range.end.saturating_sub(range.start)).ok()?;
                Some((offset, len))
            });
            ranges = in_mapping.collect();
        }
        parts.push((mapping, ranges));
    }
    parts
}

/// Replaces an error by a more specific one, if a file is too short or a control group allows no
/// more huge pages.
pub(in crate::operations) fn cause_of(
    error: PrefaultError,
    mappings: &[(Span, &HostMapping)],
    host: &HostResources,
) -> PrefaultError {
    let PrefaultError::System {
        region,
        done,
        total,
        source,
        ..
    } = &error
    else {
        return error;
    };
    let may_lack_pages = matches!(source.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM));
    let mut mappings = mappings.iter();
    let Some((_, mapping)) = mappings.find(|(span, _)| span == region) else {
        return error;
    };
    // A page past the end of its file.
    if let (Some(libc::EFAULT), Some((needed, length))) =
        (source.raw_os_error(), too_short(mapping))
    {
        return PrefaultError::FileTooShort {
            region: *region,
            needed,
            length,
            done: *done,
            total: *total,
        };
    }
    if mapping.kind() != BackingKind::Hugetlb {
        return error;
    }
    match host.again().huge_page_limit(mapping.page_size(), false) {
        Some(limit) if may_lack_pages && limit.available < mapping.page_size() => {
            PrefaultError::ControlGroup {
                wanted: *total,
                limit,
                done: *done,
            }
        }
        _ => error,
    }
}

/// Returns the length that a mapping needs and the length of its file, if the file is shorter.
fn too_short(mapping: &HostMapping) -> Option<(u64, u64)> {
    let (file, start) = mapping.file()?;
    let file = file.metadata().ok().filter(|file| file.is_file())?;
    let needed = start.saturating_add(to_u64(mapping.mapped().len()));
    (file.len() < needed).then_some((needed, file.len()))
}

/// Returns the advice that populates a mapping without copying pages of a private file.
fn advice(mapping: &HostMapping) -> Advice {
    let is_private = mapping.file().is_some() && mapping.backing.sharing == Sharing::Private;
    let is_not_copied = is_private && mapping.kind() != BackingKind::Hugetlb;
    if mapping.options.read_only || is_not_copied {
        Advice::PopulateRead
    } else {
        Advice::PopulateWrite
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::provisioned;
    use crate::mapping::span_of;
    use crate::operations::prefault::{queues, steps, Queue};
    use crate::{sys, MemoryBuilder, NumaPolicy, Region, Unplugged};
    use std::num::NonZeroU64;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, HostResources) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join("devices/system/node").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let host = HostResources::at(directory.path());
        (directory, host)
    }

    #[test]
    fn queues_have_the_allowed_cpus_of_their_nodes() {
        let build = |numa: [NumaPolicy; 3]| -> GuestMemoryMmap {
            let mut builder = MemoryBuilder::new();
            for (start, numa) in (0u64..).zip(numa) {
                let region = Region::new(GuestAddress(start << 32), 64 << 20);
                builder = builder.region(region.numa(numa));
            }
            builder.build().unwrap()
        };
        let of = |memory: &GuestMemoryMmap, host: &HostResources, allowed: Option<&Cpus>| {
            let one = |region| (span_of(region), provisioned(region).unwrap());
            let mappings: Vec<_> = memory.iter().map(one).collect();
            let steps = mappings.iter().flat_map(steps).collect();
            let queues = queues(steps, allowed, host);
            let show = |queue: Queue<'_>| (queue.steps.len(), queue.cpus);
            queues.into_iter().map(show).collect::<Vec<_>>()
        };
        // This machine may have one node only, so a mapping gets the policy of another.
        let allowed = Cpus::allowed().unwrap();
        let (_keep, unknown) = host(&[]);
        let inherit = || NumaPolicy::Inherit;
        let memory = build([inherit(), inherit(), inherit()]);
        assert_eq!(of(&memory, &unknown, None), [(6, None)]);
        let memory = build([
            NumaPolicy::Preferred(0),
            inherit(),
            NumaPolicy::Bind(vec![0]),
        ]);
        // Unreadable: no change.
        let all = Some(allowed.clone());
        let expected = [(2, all.clone()), (4, all.clone())];
        assert_eq!(of(&memory, &unknown, Some(&allowed)), expected);
        assert_eq!(of(&memory, &unknown, None), [(2, None), (4, None)]);
        let (_keep, known) = host(&[("node0/cpulist", "0\n")]);
        let only = allowed.among(&[0]).or_else(|| all.clone());
        let expected = [(2, all), (4, only)];
        assert_eq!(of(&memory, &known, Some(&allowed)), expected);
    }

    /// The sender of a memfd can hide which pages it has. They may be holes.
    #[test]
    fn check_memory_counts_pages_of_memfd_that_the_kernel_hides() {
        let test = "check_memory_counts_pages_of_memfd_that_the_kernel_hides";
        const SIZE: u64 = 16 << 20;
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("proc")).unwrap();
        let meminfo = "MemTotal: 65536 kB\nMemAvailable: 8192 kB\n";
        std::fs::write(directory.path().join("proc/meminfo"), meminfo).unwrap();
        let host = HostResources::at(directory.path());
        assert_eq!(host.available_memory(), Some(8 << 20));
        let file = sys::memfd(c"hidden", SIZE, None).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        file.set_permissions(mode).unwrap();
        let is_refused = || {
            let backing = crate::Backing::private_file(file.try_clone().unwrap(), 0);
            let region = Region::new(GuestAddress(0), SIZE).backing(backing);
            let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
            let region = memory.iter().next().unwrap();
            let mappings = [(span_of(region), provisioned(region).unwrap())];
            let checked = check_memory(&mappings, &host);
            matches!(checked, Err(PrefaultError::Memory { wanted: SIZE, .. }))
        };
        assert!(is_refused());
        let other = rustix::process::Uid::from_raw(65_534);
        let is_other = || rustix::thread::set_thread_res_uid(other, other, other).is_ok();
        if !sys::in_child(is_other) {
            return test_support::skipped(test, "needs root, to become another user");
        }
        assert!(sys::in_child(|| is_other() && is_refused()));
    }

    #[test]
    fn check_memory_counts_bytes_of_two_regions_once() {
        const SIZE: u64 = 16 << 20;
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("proc")).unwrap();
        let meminfo = "MemTotal: 65536 kB\nMemAvailable: 8192 kB\n";
        std::fs::write(directory.path().join("proc/meminfo"), meminfo).unwrap();
        let host = HostResources::at(directory.path());
        let file = sys::memfd(c"twice", SIZE, None).unwrap();
        // The regions overlap in 8 MiB, of which 4 MiB are present.
        let region = |start: u64, offset| {
            let backing = crate::Backing::shared_file(file.try_clone().unwrap(), offset);
            Region::new(GuestAddress(start), SIZE - offset).backing(backing)
        };
        let memory: GuestMemoryMmap = MemoryBuilder::new()
            .region(region(0, 0))
            .region(region(1 << 32, SIZE / 2))
            .allow_shared_bytes(true)
            .build()
            .unwrap();
        let mappings: Vec<_> = memory
            .iter()
            .map(|region| (span_of(region), provisioned(region).unwrap()))
            .collect();
        let wanted = || match check_memory(&mappings, &host) {
            Err(PrefaultError::Memory { wanted, .. }) => Some(wanted),
            _ => None,
        };
        assert_eq!(wanted(), Some(SIZE));
        let populate = |offset| {
            let mapped = mappings[1].1.mapped();
            mapped
                .advise(offset, 4 << 20, Advice::PopulateWrite)
                .unwrap();
        };
        populate(0);
        assert_eq!(wanted(), Some(SIZE - (4 << 20)));
        populate(4 << 20);
        assert_eq!(wanted(), None);
    }

    /// The pages of a block stay if the guest touches it after an unplug.
    #[test]
    fn check_memory_does_not_count_pages_of_unplugged_blocks() {
        const BLOCK: NonZeroU64 = NonZeroU64::new(8 << 20).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("proc")).unwrap();
        let meminfo = "MemTotal: 65536 kB\nMemAvailable: 4096 kB\n";
        std::fs::write(directory.path().join("proc/meminfo"), meminfo).unwrap();
        let host = HostResources::at(directory.path());
        let region = Region::new(GuestAddress(0), 16 << 20).blocks(BLOCK, Unplugged::Mapped);
        let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build().unwrap();
        crate::plug(&memory, GuestAddress(0), BLOCK.get()).unwrap();
        let region = memory.iter().next().unwrap();
        let mapping = provisioned(region).unwrap();
        let check = || check_memory(&[(span_of(region), mapping)], &host);
        let populate = |offset| {
            let len = 8 << 20;
            mapping
                .mapped()
                .advise(offset, len, Advice::PopulateWrite)
                .unwrap();
        };
        populate(8 << 20);
        let wanted = BLOCK.get();
        assert!(matches!(check(), Err(PrefaultError::Memory { wanted: w, .. }) if w == wanted));
        populate(0);
        assert!(check().is_ok());
    }
}
