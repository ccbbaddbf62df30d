//! [`MemoryBuilder`]: from a layout to guest memory.

use std::io;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::ControlFlow;
use std::sync::{Arc, RwLock};

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{NewBitmap, PluggedBlocks, PluggedBlocksError};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

use crate::backing::{self, OpenedBacking};
use crate::error::BuildError;
use crate::machine::Machine;
use crate::mapping::{bytes, HostMapping, Replaced};
use crate::prefault::{self, Progress};
use crate::region::{
    Backing, BackingKind, Lock, NumaPolicy, Region, Sharing, Span, TransparentHugePages, Unplugged,
};
use crate::sys::{self, Advice, Reserved, Source};
use crate::vma::most_areas;

/// What is told of the progress of a prefault, and says whether to go on.
type Callback = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

/// Builds a guest's memory from a list of regions.
///
/// Everything is looked at before anything is mapped, and what cannot be had is an error, with the region, what was asked for, what there is, and what
/// to do; nothing stays mapped then.
///
/// Regions that are adjacent for the guest are adjacent in this process, in one reservation with a guard on both sides that no access gets
/// through. Addresses are chosen so that huge pages of the host can be huge pages of the guest:
///
/// ```text
///   guest   0x0            0x4000_0000      0x1_0000_0000
///           ├── region 1 ──┼── region 2 ──┤       ├── region 3 ──┤
///   host  ▒ ├── region 1 ──┼── region 2 ──┤ ▒   ▒ ├── region 3 ──┤ ▒      ▒ guard, PROT_NONE
/// ```
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{Backing, MemoryBuilder, Region, TransparentHugePages};
///
/// let memory: GuestMemoryMmap = MemoryBuilder::new()
///     .region(Region::new(GuestAddress(0), 32 << 20).backing(Backing::Memfd).name("low"))
///     .region(Region::new(GuestAddress(1 << 32), 64 << 20).transparent_huge_pages(TransparentHugePages::On))
///     .build()?;
/// memory.write_obj(0x55aau16, GuestAddress(0x1fe))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// System calls: `mmap`, `munmap`, `mprotect`; `memfd_create`, `ftruncate`, `fcntl` for memfds; `fstatfs`, `statx` for files; `madvise`, `mbind`, `mlock2`, `prctl` for the
/// options that ask for them; `fallocate` for blocks of huge pages; and those that read files below /sys. `clone3`, `madvise` for prefaulting.
#[derive(Default)]
pub struct MemoryBuilder {
    regions: Vec<Region>,
    prefault: Option<(NonZeroUsize, Callback)>,
}

impl std::fmt::Debug for MemoryBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryBuilder")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl MemoryBuilder {
    /// Begins without a region.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region. The order does not matter.
    pub fn region(mut self, region: Region) -> Self {
        self.regions.push(region);
        self
    }

    /// Brings all pages in before the memory is handed out, with so many threads. `progress` is told from time to time, and ends the build when it
    /// answers [`ControlFlow::Break`]. See [`prefault`](crate::prefault()).
    ///
    /// ```
    /// use std::num::NonZeroUsize;
    /// use std::ops::ControlFlow;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_memory_host::{residency, MemoryBuilder, Region};
    ///
    /// let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new()
    ///     .region(Region::new(GuestAddress(0), 64 << 20))
    ///     .prefault(threads, |progress| {
    ///         eprint!("\r{} of {} MiB", progress.done >> 20, progress.total >> 20);
    ///         ControlFlow::Continue(())
    ///     })
    ///     .build()?;
    /// assert_eq!(residency(&memory)?[0].1.resident, 64 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn prefault<F>(self, threads: NonZeroUsize, progress: F) -> Self
    where
        F: FnMut(Progress) -> ControlFlow<()> + Send + 'static,
    {
        Self {
            prefault: Some((threads, Box::new(progress))),
            ..self
        }
    }

    /// Builds the memory, with a bitmap of the machine's pages for each region.
    ///
    /// # Errors
    ///
    /// [`BuildError`], with the region that cannot be had.
    pub fn build<B: NewBitmap>(self) -> Result<GuestMemoryMmap<B>, BuildError> {
        self.build_with_bitmaps(B::with_len)
    }

    /// Builds the memory, with bitmaps that `bitmap` makes for regions of a size in bytes.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build).
    pub fn build_with_bitmaps<B: Bitmap>(
        self,
        mut bitmap: impl FnMut(usize) -> B,
    ) -> Result<GuestMemoryMmap<B>, BuildError> {
        let machine = Machine::here();
        let regions = sorted(self.regions)?;
        check_pools(&regions, &machine)?;
        let mut opened = Vec::with_capacity(regions.len());
        for region in regions {
            let behind = backing::open(&region, &machine)?;
            check_options(&region, &behind, &machine)?;
            opened.push((region, behind));
        }
        check_memory(&opened, self.prefault.is_some(), &machine)?;
        let mut mappings = Vec::with_capacity(opened.len());
        for together in opened.chunk_by(|(one, _), (next, _)| end(one) == Some(next.start.0)) {
            map_together(together, &machine, &mut mappings)?;
        }
        if let Some((threads, mut progress)) = self.prefault {
            let mappings: Vec<&HostMapping> = mappings.iter().map(Arc::as_ref).collect();
            prefault::run(&mappings, threads, &mut progress)?;
        }
        for mapping in &mappings {
            lock(mapping)?;
        }
        let regions = mappings.iter().map(|mapping| region(mapping, &mut bitmap));
        Ok(GuestMemoryMmap::from_regions(
            regions.collect::<Result<_, _>>()?,
        )?)
    }
}

/// Where a region ends; nothing if that is not below 2^64.
fn end(region: &Region) -> Option<u64> {
    region.start.0.checked_add(region.size)
}

/// The regions in the order of their addresses, none of which overlap.
fn sorted(mut regions: Vec<Region>) -> Result<Vec<Region>, BuildError> {
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

/// Whether the machine has huge pages enough for all regions together: one error, and not one for each region. Others may take some meanwhile; what counts is
/// that they are set aside when a region is mapped.
fn check_pools(regions: &[Region], machine: &Machine) -> Result<(), BuildError> {
    for pool in machine.pools() {
        let size = pool.page_size;
        let mut set_aside = regions.iter().filter(|region| {
            matches!(region.backing, Backing::Hugetlb { page_size } if page_size == size)
                && region.blocks.is_none()
                && (region.size | region.start.0).is_multiple_of(size)
        });
        let pages = |region: &Region| region.size.checked_div(size).unwrap_or(0);
        let wanted = set_aside
            .clone()
            .fold(0u64, |sum, region| sum.saturating_add(pages(region)));
        if wanted > pool.free.saturating_add(pool.overcommit) {
            if let Some(region) = set_aside.next_back() {
                return Err(BuildError::HugePages {
                    region: region.span(),
                    page_size: size,
                    wanted,
                    free: pool.free,
                    nodes: Vec::new(),
                });
            }
        }
    }
    Ok(())
}

/// Whether the machine has memory enough for what is to be there from the start. Asked for more, the kernel ends processes, of which this is likely to be the first.
fn check_memory(
    regions: &[(Region, OpenedBacking)],
    prefault: bool,
    machine: &Machine,
) -> Result<(), BuildError> {
    let Some(available) = machine.available_memory() else {
        return Ok(());
    };
    let mut wanted = 0u64;
    for (region, behind) in regions {
        // Huge pages are counted by their pool, the cache of a file is memory to be had unless it is locked, and what another process has made may
        // have its pages.
        let own = matches!(region.backing, Backing::Anonymous | Backing::Memfd);
        let locked = region.options.lock == Lock::Now && behind.kind != BackingKind::Hugetlb;
        let plugged = region
            .plugged
            .iter()
            .fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
        let now = if region.blocks.is_some() {
            plugged
        } else {
            region.size
        };
        if locked || (own && prefault) {
            wanted = wanted.saturating_add(now);
        }
        if wanted > available {
            return Err(BuildError::Memory {
                region: region.span(),
                wanted,
                available,
            });
        }
    }
    Ok(())
}

/// Maps regions that are adjacent, in one reservation.
fn map_together(
    regions: &[(Region, OpenedBacking)],
    machine: &Machine,
    mappings: &mut Vec<Arc<HostMapping>>,
) -> Result<(), BuildError> {
    let (mut total, mut align) = (0u64, sys::page_size_u64());
    for (region, behind) in regions {
        total = total.saturating_add(region.size);
        align = align.max(alignment(region, behind, machine));
    }
    let Some((first, _)) = regions.first() else {
        return Ok(());
    };
    let rest = first.start.0 & align.wrapping_sub(1);
    let no_addresses = |source: io::Error| BuildError::System {
        region: Span {
            start: first.start.0,
            size: total,
        },
        what: "reserve addresses of this process",
        source,
        advice: "take less memory, or let the process have more of it (ulimit -v)".to_owned(),
    };
    let too_large = |_| no_addresses(io::Error::from_raw_os_error(libc::ENOMEM));
    let size = |n: u64| usize::try_from(n).map_err(too_large);
    let guard = sys::page_size();
    let reserved = Reserved::new(size(total)?, guard, size(align)?, size(rest)?);
    let mut reserved = reserved.map_err(no_addresses)?;
    for (region, behind) in regions {
        mappings.push(map_one(region, behind, &mut reserved, machine)?);
    }
    Ok(())
}

/// What the address of a region must be a multiple of, apart from where the guest has it: the size of the largest pages that it can have.
fn alignment(region: &Region, behind: &OpenedBacking, machine: &Machine) -> u64 {
    if region.options.transparent_huge_pages == TransparentHugePages::Off
        || behind.kind == BackingKind::Hugetlb
    {
        return behind.page_size;
    }
    let huge = machine.transparent_huge_page().unwrap_or(behind.page_size);
    if region.size < huge {
        behind.page_size
    } else {
        huge
    }
}

/// What can be known to be impossible before anything is mapped.
fn check_options(
    region: &Region,
    behind: &OpenedBacking,
    machine: &Machine,
) -> Result<(), BuildError> {
    let options = &region.options;
    let span = region.span();
    let conflict = |what: &'static str| Err(BuildError::Conflict { region: span, what });
    if options.transparent_huge_pages == TransparentHugePages::On {
        let private = behind.sharing == Sharing::Private;
        match behind.kind {
            BackingKind::Hugetlb => {
                return conflict("its pages are huge ones already; leave the transparent ones")
            }
            BackingKind::File => {
                return conflict("transparent huge pages are for anonymous memory and memfds only")
            }
            BackingKind::Memfd if private => {
                return conflict(
                    "copies of a memfd's pages are never huge; leave transparent huge pages",
                )
            }
            BackingKind::Anonymous | BackingKind::Memfd => {}
        }
        let shared = behind.kind == BackingKind::Memfd;
        // A tmpfs that somebody has mounted has a setting of its own (tmpfs(5), "huge").
        let refused = (!behind.own_tmpfs).then(|| machine.transparent_huge_pages_refused(shared));
        if let Some((path, setting)) = refused.flatten() {
            return Err(BuildError::TransparentHugePagesOff {
                region: span,
                path,
                setting,
            });
        }
    }
    if options.mergeable
        && (behind.kind == BackingKind::Hugetlb || behind.sharing == Sharing::Shared)
    {
        return conflict("only private memory can have its pages merged; take anonymous memory");
    }
    let shared_file = behind.kind == BackingKind::File && behind.sharing == Sharing::Shared;
    if shared_file && options.numa != NumaPolicy::Inherit {
        return conflict(
            "the cache of a file on a disk follows no NUMA policy of a mapping; leave it, or take a memfd",
        );
    }
    let private_file = behind.file.is_some() && behind.sharing == Sharing::Private;
    if region.blocks.is_some() && (behind.kind == BackingKind::File || private_file) {
        return conflict("blocks are for anonymous memory, memfds and shared huge pages; a file's pages cannot be made zeroes for nothing");
    }
    if region.blocks.is_some() && options.lock == Lock::Now {
        return conflict(
            "blocks that are not plugged cannot be locked now; lock them as they come (OnFault)",
        );
    }
    if options.name.is_some() && behind.kind == BackingKind::File {
        return conflict("a file is called by its path in /proc/self/maps; leave the name");
    }
    let nodes = match &options.numa {
        NumaPolicy::Inherit => return Ok(()),
        NumaPolicy::Bind(nodes) | NumaPolicy::Interleave(nodes) => nodes.as_slice(),
        NumaPolicy::Preferred(node) => std::slice::from_ref(node),
    };
    if nodes.is_empty() {
        return Err(BuildError::NoNode { region: span });
    }
    let there = machine.nodes();
    match nodes.iter().find(|node| !there.contains(node)) {
        Some(node) => Err(BuildError::NoSuchNode {
            region: span,
            node: *node,
            there,
        }),
        None => Ok(()),
    }
}

/// Maps one region in its place, with its options.
fn map_one(
    region: &Region,
    behind: &OpenedBacking,
    reserved: &mut Reserved,
    machine: &Machine,
) -> Result<Arc<HostMapping>, BuildError> {
    let span = region.span();
    let refused = |what: &'static str, source: io::Error, advice: &str| {
        system(span, what, source, advice.to_owned())
    };
    let len = usize::try_from(region.size).map_err(|_| BuildError::PastTop {
        start: span.start,
        size: span.size,
    })?;
    let huge = behind.kind == BackingKind::Hugetlb;
    // The pages of blocks are taken when they are plugged; and what another process gives back to the pool is not taken back from it.
    let given_back = region.described.is_some() && region.options.release_huge_pages;
    let set_aside = huge && region.blocks.is_none() && !given_back;
    let source = match &behind.file {
        None => Source::Anonymous,
        Some((file, offset)) => Source::File {
            file,
            offset: *offset,
            shared: behind.sharing == Sharing::Shared,
            set_aside,
        },
    };
    let free = free_huge_pages(behind.page_size, &[], machine);
    let mut mapped = reserved
        .map(len, source)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOMEM) if set_aside && region.size.checked_div(behind.page_size).is_some_and(|wanted| free < wanted) => {
                huge_pages(span, behind.page_size, &[], free)
            }
            Some(libc::ENOMEM) if set_aside => refused(
                "have huge pages set aside",
                source,
                "take less memory, let the process have more of it (ulimit -v), or mount the hugetlbfs of its file with more room (size=)",
            ),
            Some(libc::EACCES) => refused("be mapped", source, "open the file for reading"),
            _ => refused("be mapped", source, "take less memory, or another file"),
        })?;
    mapped.forked = region.options.forked;
    let blocks = match region.blocks {
        None => None,
        Some(blocks) => {
            let plugged = make_blocks(region, behind, blocks.size)?;
            Some((blocks, Arc::new(plugged)))
        }
    };
    let mut changes = Replaced::default();
    if region
        .blocks
        .is_some_and(|blocks| blocks.unplugged == Unplugged::Protected)
    {
        let blocks = region
            .blocks
            .and_then(|blocks| region.size.checked_div(blocks.size.get()));
        let blocks = blocks.unwrap_or(u64::MAX);
        if !usize::try_from(blocks).is_ok_and(|blocks| changes.areas.take(blocks)) {
            return Err(BuildError::TooManyBlocks {
                region: span,
                blocks,
                most: u64::try_from(most_areas()).unwrap_or(u64::MAX),
            });
        }
    }
    let mapping = HostMapping {
        mapped,
        start: region.start,
        backing: behind.clone(),
        options: region.options.clone(),
        blocks,
        changes: RwLock::new(changes),
    };
    mapping.apply_options(0, len).map_err(|(what, source)| {
        refused(
            what,
            source,
            "leave that option, or take a kernel that is built with it",
        )
    })?;
    mapping.apply_name(0, len).map_err(|source| {
        refused(
            "have a name",
            source,
            "leave the name: the kernel has no names (CONFIG_ANON_VMA_NAME)",
        )
    })?;
    bind_huge_pages(&mapping, machine)?;
    let plugged = first_blocks(region)?;
    crate::plug::begin(&mapping, &plugged).map_err(|source| match source.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM) if huge => {
            let len = plugged
                .iter()
                .fold(0u64, |sum, (_, len)| sum.saturating_add(bytes(*len)));
            BuildError::HugePages {
                region: span,
                page_size: mapping.backing.page_size,
                wanted: len.checked_div(mapping.backing.page_size).unwrap_or(0),
                free,
                nodes: Vec::new(),
            }
        }
        _ => refused("have its first blocks plugged", source, "plug fewer blocks"),
    })?;
    Ok(Arc::new(mapping))
}

/// The bits of a region's blocks.
fn make_blocks(
    region: &Region,
    behind: &OpenedBacking,
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
        ("size of a block", size.get(), "pages", behind.page_size),
        ("size", region.size, "blocks", size.get()),
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

/// The ranges of a region's blocks that are to be plugged from the start, as offset and length.
fn first_blocks(region: &Region) -> Result<Vec<(usize, usize)>, BuildError> {
    let block_size = region.blocks.map_or(0, |blocks| blocks.size.get());
    let whole = |&(offset, len): &(u64, u64)| {
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= region.size);
        let whole = block_size != 0 && (offset | len).is_multiple_of(block_size);
        let numbers = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
        numbers
            .filter(|_| inside && whole)
            .ok_or_else(|| BuildError::Plugged {
                region: region.span(),
                offset,
                len,
                block_size,
            })
    };
    region.plugged.iter().map(whole).collect()
}

/// Takes the huge pages of a region that is bound to nodes now: they were set aside on any node, and one that has none left would answer a later
/// access with SIGBUS. Those of blocks are taken when they are plugged.
fn bind_huge_pages(mapping: &HostMapping, machine: &Machine) -> Result<(), BuildError> {
    let (NumaPolicy::Bind(nodes) | NumaPolicy::Interleave(nodes)) = &mapping.options.numa else {
        return Ok(());
    };
    if mapping.backing.kind != BackingKind::Hugetlb || mapping.blocks.is_some() {
        return Ok(());
    }
    let free = free_huge_pages(mapping.backing.page_size, nodes, machine);
    let all = mapping.mapped.len();
    let populated = mapping.mapped.advise(0, all, Advice::PopulateWrite);
    populated.map_err(|source| match source.raw_os_error() {
        Some(libc::EFAULT | libc::ENOMEM) => {
            huge_pages(mapping.span(), mapping.backing.page_size, nodes, free)
        }
        _ => system(
            mapping.span(),
            "take its huge pages from its NUMA nodes",
            source,
            "take a kernel of 5.14 or later, or leave the policy".to_owned(),
        ),
    })
}

/// How many huge pages are free: on these nodes, or on any.
fn free_huge_pages(page_size: u64, nodes: &[u32], machine: &Machine) -> u64 {
    if nodes.is_empty() {
        let pools = machine.pools();
        let pool = pools.iter().find(|pool| pool.page_size == page_size);
        return pool.map_or(0, |pool| pool.free);
    }
    let pools = nodes
        .iter()
        .filter_map(|node| machine.pool_of_node(*node, page_size));
    pools.fold(0, |sum, pool| sum.saturating_add(pool.free))
}

/// The error of too few huge pages.
fn huge_pages(region: Span, page_size: u64, nodes: &[u32], free: u64) -> BuildError {
    BuildError::HugePages {
        region,
        page_size,
        wanted: region.size.checked_div(page_size).unwrap_or(0),
        free,
        nodes: nodes.to_vec(),
    }
}

fn lock(mapping: &HostMapping) -> Result<(), BuildError> {
    let locked = mapping.apply_lock(0, mapping.mapped.len(), mapping.options.lock);
    locked.map_err(|source| {
        let limit =
            sys::lock_limit().map_or_else(|| "any number of".to_owned(), |limit| limit.to_string());
        let advice = format!(
            "{} bytes are wanted, and this process may lock {limit} (ulimit -l, CAP_IPC_LOCK)",
            mapping.mapped.len()
        );
        system(mapping.span(), "be locked in memory", source, advice)
    })
}

fn system(region: Span, what: &'static str, source: io::Error, advice: String) -> BuildError {
    BuildError::System {
        region,
        what,
        source,
        advice,
    }
}

/// The region of vm-memory that a mapping is.
fn region<B: Bitmap>(
    mapping: &Arc<HostMapping>,
    bitmap: &mut impl FnMut(usize) -> B,
) -> Result<GuestRegionMmap<B>, BuildError> {
    let span = mapping.span();
    let bitmap = bitmap(mapping.mapped().len());
    let region = mapping
        .mmap_region(bitmap)
        .map_err(|source| BuildError::Region {
            region: span,
            source,
        })?;
    GuestRegionMmap::new(region, mapping.start).ok_or(BuildError::PastTop {
        start: span.start,
        size: span.size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    /// What the machine is set to have none of is refused, whatever the kernel would say.
    #[test]
    fn transparent_huge_pages_that_are_off_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("kernel/mm/transparent_hugepage");
        std::fs::create_dir_all(&settings).unwrap();
        std::fs::write(settings.join("hpage_pmd_size"), "2097152").unwrap();
        std::fs::write(settings.join("enabled"), "always [madvise] never").unwrap();
        std::fs::write(settings.join("shmem_enabled"), "always advise [never]").unwrap();
        let machine = Machine::at(directory.path());
        let region =
            Region::new(GuestAddress(0), 4 << 20).transparent_huge_pages(TransparentHugePages::On);
        let behind = backing::open(&region, &machine).unwrap();
        assert!(check_options(&region, &behind, &machine).is_ok());
        assert_eq!(alignment(&region, &behind, &machine), 2 << 20);
        let region = region.backing(crate::Backing::Memfd);
        let behind = backing::open(&region, &machine).unwrap();
        let error = check_options(&region, &behind, &machine).unwrap_err();
        assert!(
            error.to_string().contains("shmem_enabled says never"),
            "{error}"
        );
    }

    /// What is locked or brought in must be there; huge pages are in their pool, whoever made their file.
    #[test]
    fn memory_is_wanted_of_the_machine_or_of_a_pool() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("proc")).unwrap();
        std::fs::write(
            directory.path().join("proc/meminfo"),
            "MemAvailable: 8192 kB\n",
        )
        .unwrap();
        let machine = Machine::at(directory.path());
        let region = |start| Region::new(GuestAddress(start), 6 << 20);
        let refused = |regions: [Region; 2], kind, prefault| {
            let opened = regions.map(|region| {
                let behind =
                    backing::open(&Region::new(GuestAddress(0), 0x1000), &machine).unwrap();
                (region, OpenedBacking { kind, ..behind })
            });
            match check_memory(&opened, prefault, &machine) {
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

    /// Policies are of the nodes that there are.
    #[test]
    fn nodes_are_those_of_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let nodes = directory.path().join("devices/system/node");
        std::fs::create_dir_all(&nodes).unwrap();
        std::fs::write(nodes.join("has_memory"), "0,2-3").unwrap();
        let machine = Machine::at(directory.path());
        for (nodes, missing) in [(vec![0, 3], None), (vec![2, 1], Some(1))] {
            let region = Region::new(GuestAddress(0), 4 << 20).numa(NumaPolicy::Bind(nodes));
            let behind = backing::open(&region, &machine).unwrap();
            let told = match check_options(&region, &behind, &machine) {
                Ok(()) => None,
                Err(BuildError::NoSuchNode { node, there, .. }) => {
                    assert_eq!(there, [0, 2, 3]);
                    Some(node)
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(told, missing);
        }
    }
}
