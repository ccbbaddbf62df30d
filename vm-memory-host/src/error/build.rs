//! [`BuildError`]: the reasons for which a build fails.

use std::collections::TryReserveError;
use std::io;

use vm_memory::mmap::{MmapRegionError, PluggedBlocksError};
use vm_memory::GuestRegionCollectionError;

use super::change::is_shortage;
use super::{too_few_huge_pages, PrefaultError};
use crate::host::GroupLimit;
use crate::region::Span;

/// An error of [`MemoryBuilder::build`](crate::MemoryBuilder::build).
///
/// Nothing stays mapped after a failed build.
///
/// The message names the region, the request, the limit and a remedy. If the system or vm-memory
/// has refused something, their reason is the [`source`](std::error::Error::source): print the
/// messages of all causes.
///
/// # Examples
///
/// ```
/// use vm_memory::GuestAddress;
/// use vm_memory_host::{BuildError, MemoryBuilder, Region};
///
/// let region = |start| Region::new(GuestAddress(start), 2 << 20);
/// let builder = MemoryBuilder::new().region(region(0)).region(region(1 << 20));
/// match builder.build::<()>() {
///     Err(BuildError::Overlap { region, other }) => {
///         assert_eq!((region.start, other.start), (1 << 20, 0));
///     }
///     other => panic!("{other:?}"),
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The builder has no regions.
    #[error("guest memory has no regions; add at least one")]
    NoRegion,
    /// A region has size 0.
    #[error("region at {start:#x} has size 0; set a size or leave the region out")]
    Empty {
        /// Its guest physical address.
        start: u64,
    },
    /// A region does not end below 2^64, or does not fit the address space of this process.
    #[error("region at {start:#x}: size {size:#x} {}", past_top(*.start, *.size))]
    PastTop {
        /// Its guest physical address.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Two regions overlap.
    #[error("region {region} overlaps region {other}; move or shrink one of them")]
    Overlap {
        /// The region with the higher address.
        region: Span,
        /// The region with the lower address.
        other: Span,
    },
    /// A number is not a multiple of the page size or the block size.
    #[error(
        "region {region}: {what} {value:#x} is not a multiple of the {unit} size, {unit_size:#x}; \
        align it"
    )]
    Misaligned {
        /// The region.
        region: Span,
        /// The number: `guest address`, `size`, `file offset` or `block size`.
        what: &'static str,
        /// Its value.
        value: u64,
        /// `page` or `block`.
        unit: &'static str,
        /// The size of a page or block in bytes.
        unit_size: u64,
    },
    /// A range of initially plugged blocks does not consist of whole blocks in the region.
    #[error(
        "region {region}: cannot plug {len:#x} bytes at offset {offset:#x}; \
        the range must be whole blocks of {block_size:#x} bytes inside the region"
    )]
    Plugged {
        /// The region.
        region: Span,
        /// The offset of the range in the region, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The size of a block in bytes.
        block_size: u64,
    },
    /// Ranges of initially plugged blocks overlap, or are not in ascending order.
    #[error(
        "region {region}: cannot plug {len:#x} bytes at offset {offset:#x}, before the end of the \
        previous range at {before:#x}; list the ranges in ascending order, each block once"
    )]
    PluggedTwice {
        /// The region.
        region: Span,
        /// The offset of the range in the region, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The offset at which the previous range ends.
        before: u64,
    },
    /// The regions need more VMAs than the guest memory of this process may still have.
    ///
    /// Guest memory may have half of `vm.max_map_count`. Each region needs one VMA, and each run of
    /// adjacent regions needs two more.
    #[error(
        "{count} regions need {vmas} VMAs, but the guest memory of this process may have only \
        {available} more; use fewer and larger regions, or raise vm.max_map_count"
    )]
    TooManyRegions {
        /// The number of regions.
        count: usize,
        /// The number of VMAs that they need.
        vmas: usize,
        /// The number of VMAs that are left for guest memory.
        available: usize,
    },
    /// Two regions map the same bytes of a file, and at least one mapping is shared.
    #[error(
        "region {region} and region {other} map the same bytes of a file at offset {offset:#x}; a \
        write to one changes both, but marks only one dirty; map different bytes, or allow it \
        (MemoryBuilder::allow_shared_bytes)"
    )]
    SharedBytes {
        /// The region with the higher file offset.
        region: Span,
        /// The region with the lower file offset.
        other: Span,
        /// The first common offset in the file, in bytes.
        offset: u64,
    },
    /// The host has less memory than the build must lock or populate.
    #[error(
        "region {region}: {}{wanted:#x} bytes must be resident at startup, but only {available:#x} \
        bytes are available; use less memory, lock on fault (Lock::OnFault), or do not prefault",
        with_others(*.wanted > .region.size)
    )]
    Memory {
        /// The region.
        region: Span,
        /// The number of bytes to lock or populate, for this and the other regions of the build.
        wanted: u64,
        /// The number of available bytes.
        ///
        /// This is the sum of `MemAvailable` and `SwapFree` (proc_meminfo(5)).
        available: u64,
    },
    /// A control group of this process leaves too little memory, or too few huge pages.
    #[error(
        "region {region}: {}{wanted:#x} bytes are required, but {limit}; \
        raise the limit or use less memory",
        with_others(*.wanted > .region.size)
    )]
    ControlGroup {
        /// The region.
        region: Span,
        /// The number of bytes that this and the other regions of the build need.
        wanted: u64,
        /// The limit.
        limit: GroupLimit,
    },
    /// The host has no huge pages of the requested size.
    #[error(
        "region {region}: the host has no huge pages of {page_size:#x} bytes; {}",
        other_sizes(.available)
    )]
    NoSuchHugePage {
        /// The region.
        region: Span,
        /// The requested size in bytes.
        page_size: u64,
        /// The sizes that the host has, in bytes.
        available: Vec<u64>,
    },
    /// The pool has too few huge pages.
    #[error(
        "region {region}: {}{}",
        with_others(.wanted.saturating_mul(*.page_size) > .region.size),
        too_few_huge_pages(*.wanted, *.free, *.page_size, .nodes)
    )]
    HugePages {
        /// The region.
        region: Span,
        /// The size of a huge page in bytes.
        page_size: u64,
        /// The number of pages that this and the other regions of the build need.
        wanted: u64,
        /// The number of free pages when the build checked.
        free: u64,
        /// The NUMA nodes that the pages must come from; empty for any.
        nodes: Vec<u32>,
    },
    /// The file ends before the region does.
    #[error(
        "region {region}: needs a file of {needed:#x} bytes, but the file ends at {length:#x}; \
        extend it (truncate --size={needed}) or make the region smaller"
    )]
    FileTooShort {
        /// The region.
        region: Span,
        /// The file offset at which the region ends, in bytes.
        needed: u64,
        /// The length of the file in bytes.
        length: u64,
    },
    /// The region would end past the largest length of a file.
    #[error(
        "region {region}: file offset {offset:#x} plus the region's size exceeds the largest file \
        length, 0x7fffffffffffffff; use a smaller offset or size"
    )]
    FileOffset {
        /// The region.
        region: Span,
        /// The file offset at which the region begins, in bytes.
        offset: u64,
    },
    /// A NUMA node does not exist or has no memory.
    #[error(
        "region {region}: NUMA node {node} has no memory on this host; \
        use one of the nodes {available:?}"
    )]
    NoSuchNode {
        /// The region.
        region: Span,
        /// The node.
        node: u32,
        /// The nodes that have memory.
        available: Vec<u32>,
    },
    /// The process may not use the memory of a NUMA node.
    #[error(
        "region {region}: the cpuset of this process does not allow memory of NUMA node {node}; \
        use one of the nodes {allowed:?}, or change the cpuset"
    )]
    NodeNotAllowed {
        /// The region.
        region: Span,
        /// The node.
        node: u32,
        /// The nodes that the process may use.
        allowed: Vec<u32>,
    },
    /// A NUMA policy lists a node twice.
    #[error("region {region}: the NUMA policy lists node {node} twice; list each node once")]
    NodeTwice {
        /// The region.
        region: Span,
        /// The node.
        node: u32,
    },
    /// A NUMA policy lists no nodes.
    #[error(
        "region {region}: the NUMA policy lists no nodes; \
        list at least one or use NumaPolicy::Inherit"
    )]
    NoNode {
        /// The region.
        region: Span,
    },
    /// The host has transparent huge pages disabled for this kind of memory.
    #[error(
        "region {region}: transparent huge pages are disabled ({path} is {setting}); \
        write advise or madvise to it, or use TransparentHugePages::Leave"
    )]
    TransparentHugePagesOff {
        /// The region.
        region: Span,
        /// The file that holds the setting.
        path: String,
        /// The setting.
        setting: String,
    },
    /// The file is not of the kind that its description states.
    #[error(
        "region {region}: the description states {described}, but the file is {found}; \
        pass the descriptors in the order of the description"
    )]
    NotAsDescribed {
        /// The region.
        region: Span,
        /// The kind and page size that the description states.
        described: String,
        /// The kind and page size of the file.
        found: String,
    },
    /// The region requires a file that is sealed against shrinking, but the file is not sealed.
    #[error(
        "region {region}: the file is not sealed against shrinking; \
        seal it (F_SEAL_SHRINK) or do not require seals (Region::sealed)"
    )]
    NotSealed {
        /// The region.
        region: Span,
    },
    /// The region's protected blocks could need more VMAs than this process may use for guests.
    #[error(
        "region {region}: its {blocks} protected blocks could need as many VMAs, but the guest \
        memory of this process may have only {limit}; use larger blocks or Unplugged::Mapped"
    )]
    TooManyBlocks {
        /// The region.
        region: Span,
        /// The number of its blocks.
        blocks: u64,
        /// Half of `vm.max_map_count`, for all regions of the process.
        limit: u64,
    },
    /// Two requests exclude each other.
    #[error("region {region}: {what}")]
    Conflict {
        /// The region.
        region: Span,
        /// The conflict, and the remedy.
        what: &'static str,
    },
    /// The kernel does not accept the region's name.
    #[error(
        "region {region}: name {name:?} cannot be shown in /proc/self/maps; \
        use 1 to 79 printable ASCII characters other than \\ ` $ [ ]"
    )]
    Name {
        /// The region.
        region: Span,
        /// The first 80 characters of the name.
        name: String,
    },
    /// The block size does not fit the region.
    #[error(
        "region {region}: cannot divide it into blocks; use larger blocks, whose size is a power \
        of two"
    )]
    Blocks {
        /// The region.
        region: Span,
        /// The error of vm-memory.
        source: PluggedBlocksError,
    },
    /// The system refused a call.
    #[error("region {region}: cannot {what}; {advice}")]
    System {
        /// The region.
        region: Span,
        /// The operation.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
        /// The remedy.
        advice: String,
    },
    /// The dirty bitmap of a region cannot be allocated.
    #[error(
        "region {region}: cannot allocate its dirty bitmap; \
        make the region smaller, raise the limit of the process, or track larger pages \
        (MemoryBuilder::build_regions_with_bitmaps)"
    )]
    Bitmap {
        /// The region.
        region: Span,
        /// The error of the allocator.
        source: TryReserveError,
    },
    /// vm-memory refused the bitmap of a region, or its mapping.
    #[error(
        "region {region}: vm-memory refuses its bitmap; pass one that tracks all of the region (a \
        bitmap that marks in a log needs a larger log first)"
    )]
    Region {
        /// The region.
        region: Span,
        /// The error of vm-memory.
        source: MmapRegionError,
    },
    /// vm-memory refused the collection of regions.
    #[error("cannot combine the regions into a memory map")]
    Collection(#[from] GuestRegionCollectionError),
    /// Prefaulting failed.
    #[error(transparent)]
    Prefault(#[from] PrefaultError),
}

impl BuildError {
    /// Returns whether the build failed because pages, or memory for them, were short.
    ///
    /// The same build may succeed later, for example that of a region that is hotplugged. The
    /// variants are [`Memory`](Self::Memory), [`ControlGroup`](Self::ControlGroup),
    /// [`HugePages`](Self::HugePages) and [`Bitmap`](Self::Bitmap), [`System`](Self::System) with
    /// the errors that [`ChangeError::is_shortage`](crate::ChangeError::is_shortage) lists, and
    /// [`Prefault`](Self::Prefault) with a shortage.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestRegionMmap};
    /// use vm_memory_host::{BuildError, Region};
    ///
    /// /// Returns `None` if the host lacks memory for the region now.
    /// fn hotplug(region: Region) -> Result<Option<GuestRegionMmap>, BuildError> {
    ///     match region.build() {
    ///         Ok(region) => Ok(Some(region)),
    ///         Err(error) if error.is_shortage() => Ok(None),
    ///         Err(error) => Err(error),
    ///     }
    /// }
    /// assert!(hotplug(Region::new(GuestAddress(0), 1 << 20))?.is_some());
    /// assert!(hotplug(Region::new(GuestAddress(0), 0)).is_err());
    /// # Ok::<(), BuildError>(())
    /// ```
    #[must_use]
    pub fn is_shortage(&self) -> bool {
        match self {
            BuildError::Memory { .. }
            | BuildError::ControlGroup { .. }
            | BuildError::HugePages { .. }
            | BuildError::Bitmap { .. } => true,
            BuildError::System { source, .. } => is_shortage(source),
            BuildError::Prefault(error) => error.is_shortage(),
            _ => false,
        }
    }

    /// Creates a [`System`](Self::System) error.
    pub(crate) fn system(
        region: Span,
        what: &'static str,
        source: io::Error,
        advice: &str,
    ) -> Self {
        Self::System {
            region,
            what,
            source,
            advice: advice.to_owned(),
        }
    }
}

/// Names the limit that a region exceeds.
fn past_top(start: u64, size: u64) -> &'static str {
    match start.checked_add(size) {
        None => {
            "reaches past the last usable guest address, 0xfffffffffffffffe; \
            move the region down or make it smaller"
        }
        Some(_) => "exceeds the address space of this process; make the region smaller",
    }
}

/// Names the sizes of huge pages that the host has.
fn other_sizes(available: &[u64]) -> String {
    if available.is_empty() {
        return "use a size that it has, which /sys would list, or Backing::Memfd".to_owned();
    }
    let sizes: Vec<String> = available.iter().map(|size| format!("{size:#x}")).collect();
    format!("use one of its sizes: {}", sizes.join(", "))
}

fn with_others(others: bool) -> &'static str {
    if others {
        "together with the other regions, "
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that the message of an error contains each part.
    fn assert_names(error: &BuildError, parts: &[&str]) {
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "{message}\nlacks\n{part}");
        }
    }

    #[test]
    fn past_top_names_the_limit_that_is_exceeded() {
        for (start, place, limit) in [
            (
                u64::MAX - 0xfff,
                "region at 0xfffffffffffff000",
                "last usable guest address, 0xfffffffffffffffe",
            ),
            // A host with 32-bit addresses refuses a region whose length does not fit `usize`.
            (
                u64::MAX - 0x1000,
                "region at 0xffffffffffffefff",
                "the address space of this process",
            ),
        ] {
            let size = 0x1000;
            let error = BuildError::PastTop { start, size };
            assert_names(&error, &[place, "size 0x1000", limit]);
        }
    }

    #[test]
    fn no_such_huge_page_names_a_remedy() {
        for (available, remedy) in [
            (
                vec![1 << 16, 1 << 30],
                "use one of its sizes: 0x10000, 0x40000000",
            ),
            (Vec::new(), "which /sys would list, or Backing::Memfd"),
        ] {
            let error = BuildError::NoSuchHugePage {
                region: Span {
                    start: 0,
                    size: 4 << 20,
                },
                page_size: 2 << 20,
                available,
            };
            assert_names(&error, &["region 0x0-0x3fffff", "0x200000 bytes", remedy]);
        }
    }
}
