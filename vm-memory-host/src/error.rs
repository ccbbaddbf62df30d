//! Why memory cannot be had, or not be changed.

use std::io;

use vm_memory::mmap::{MmapRegionError, PluggedBlocksError};
use vm_memory::GuestRegionCollectionError;

use crate::region::Span;

/// Why guest memory was not built. Nothing of it stays mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// There is nothing to build.
    #[error("guest memory without a region: add one")]
    NoRegion,
    /// A region has no bytes.
    #[error("region at {start:#x}: its size is 0; leave it out")]
    Empty {
        /// Its guest physical address.
        start: u64,
    },
    /// A region reaches past the greatest guest physical address.
    #[error("region at {start:#x}: {size:#x} bytes do not end below 2^64 (no region may have the last page of the address space: its end would be no address)")]
    PastTop {
        /// Its guest physical address.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Two regions have addresses in common.
    #[error("region {region}: overlaps region {other}")]
    Overlap {
        /// The one that begins further up.
        region: Span,
        /// The other one.
        other: Span,
    },
    /// A number that must be a multiple of the size of a page, or of a block, is none.
    #[error(
        "region {region}: its {what}, {value:#x}, is not a multiple of its {unit}' {unit_size:#x} bytes"
    )]
    Misaligned {
        /// The region.
        region: Span,
        /// Which number: its guest address, its size, its offset in the file, the size of its blocks.
        what: &'static str,
        /// The number.
        value: u64,
        /// `pages` or `blocks`.
        unit: &'static str,
        /// Their size in bytes.
        unit_size: u64,
    },
    /// A range that is to be plugged from the start is not whole blocks of the region.
    #[error(
        "region {region}: {len:#x} bytes at offset {offset:#x}, which are to be plugged, are not whole blocks of {block_size:#x} bytes in it"
    )]
    Plugged {
        /// The region.
        region: Span,
        /// Where the range begins in the region, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The size of a block in bytes.
        block_size: u64,
    },
    /// The machine has not as much memory as is to be there from the start: locked, or brought in.
    #[error(
        "region {region}: {}{wanted:#x} bytes are to be in memory from the start, and {available:#x} are to be had; \
        take less, lock what is used (Lock::OnFault), or bring in nothing",
        with_the_others(*.wanted > .region.size)
    )]
    Memory {
        /// The region.
        region: Span,
        /// How many bytes are to be there, of this region and others that are built with it.
        wanted: u64,
        /// How many the system can give, by what it says (`MemAvailable` and `SwapFree`, proc_meminfo(5)) and by the limits of the process's control groups.
        available: u64,
    },
    /// The machine has no huge pages of that size.
    #[error("region {region}: the machine has no huge pages of {page_size:#x} bytes, but of {}", sizes(.there))]
    NoSuchHugePage {
        /// The region.
        region: Span,
        /// The size that was asked for, in bytes.
        page_size: u64,
        /// The sizes that there are, in bytes.
        there: Vec<u64>,
    },
    /// There are too few huge pages.
    #[error(
        "region {region}: {}{}",
        with_the_others(.wanted.saturating_mul(*.page_size) > .region.size),
        too_few_huge_pages(*.wanted, *.free, *.page_size, .nodes)
    )]
    HugePages {
        /// The region.
        region: Span,
        /// The size of a huge page in bytes.
        page_size: u64,
        /// How many are wanted, for this region and others that are built with it.
        wanted: u64,
        /// How many were free when they were asked for; others may have taken some since.
        free: u64,
        /// The NUMA nodes that they were to come from; empty for any.
        nodes: Vec<u32>,
    },
    /// The file ends before the region does.
    #[error(
        "region {region}: needs a file of {needed:#x} bytes, and it has {length:#x}; \
        make it longer (truncate --size={needed}), or the region smaller"
    )]
    FileTooShort {
        /// The region.
        region: Span,
        /// Where it ends in the file, in bytes.
        needed: u64,
        /// The length of the file in bytes.
        length: u64,
    },
    /// The region reaches past the greatest offset that a file can have.
    #[error(
        "region {region}: offset {offset:#x} and its size are past the greatest length of a file"
    )]
    FileOffset {
        /// The region.
        region: Span,
        /// Where it was to begin in the file, in bytes.
        offset: u64,
    },
    /// There is no such NUMA node, or it has no memory.
    #[error("region {region}: the machine has no memory on NUMA node {node}, but on {there:?}")]
    NoSuchNode {
        /// The region.
        region: Span,
        /// The node.
        node: u32,
        /// The nodes that there are.
        there: Vec<u32>,
    },
    /// A policy names no node.
    #[error(
        "region {region}: its NUMA policy names no node; name one, or let it inherit that of the process"
    )]
    NoNode {
        /// The region.
        region: Span,
    },
    /// The machine is set to have no transparent huge pages there.
    #[error("region {region}: transparent huge pages are off: {path} says {setting}; write advise or madvise there, or leave them")]
    TransparentHugePagesOff {
        /// The region.
        region: Span,
        /// The file that the setting is in.
        path: String,
        /// What it says.
        setting: String,
    },
    /// The file is not what its description says.
    #[error("region {region}: its description says {described}, and its file is {found}; send the descriptors in their order")]
    NotAsDescribed {
        /// The region.
        region: Span,
        /// What the description says.
        described: String,
        /// What the file is.
        found: String,
    },
    /// The file can be cut off by others.
    #[error("region {region}: its file is not sealed against shrinking; take one that is (F_SEAL_SHRINK), or do without")]
    NotSealed {
        /// The region.
        region: Span,
    },
    /// The guest could make the kernel keep more areas of addresses than a process may have.
    #[error(
        "region {region}: its {blocks} protected blocks could take that many areas of addresses, and {most} are for \
        all such regions of the process; take larger blocks, or leave them mapped"
    )]
    TooManyBlocks {
        /// The region.
        region: Span,
        /// How many blocks it has.
        blocks: u64,
        /// Half of `vm.max_map_count`.
        most: u64,
    },
    /// Two things that were asked for exclude each other.
    #[error("region {region}: {what}")]
    Conflict {
        /// The region.
        region: Span,
        /// What they are, and what to do.
        what: &'static str,
    },
    /// A name that the kernel does not take.
    #[error(
        "region {region}: the name {name:?} cannot be shown in /proc/self/maps; \
        take up to 79 printable ASCII characters other than \\ ` $ [ ]"
    )]
    Name {
        /// The region.
        region: Span,
        /// The name.
        name: String,
    },
    /// Blocks do not fit their region.
    #[error("region {region}: {source}")]
    Blocks {
        /// The region.
        region: Span,
        /// Why.
        source: PluggedBlocksError,
    },
    /// The system refused something.
    #[error("region {region}: cannot {what}: {source}; {advice}")]
    System {
        /// The region.
        region: Span,
        /// What was to be done.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
        /// What to do about it.
        advice: String,
    },
    /// The regions could not be made ones of vm-memory.
    #[error("region {region}: {source}")]
    Region {
        /// The region.
        region: Span,
        /// Why.
        source: MmapRegionError,
    },
    /// The regions do not go together.
    #[error("the regions do not make a guest memory: {0}")]
    Collection(#[from] GuestRegionCollectionError),
    /// The pages could not be brought in.
    #[error(transparent)]
    Prefault(#[from] PrefaultError),
}

/// Why pages were not brought in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrefaultError {
    /// The callback said so.
    #[error("cancelled after {done:#x} of {total:#x} bytes")]
    Cancelled {
        /// How many bytes had been brought in.
        done: u64,
        /// How many there were to bring in.
        total: u64,
    },
    /// The region was not made by this crate.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The machine has not as much memory.
    #[error("{wanted:#x} bytes are to be brought in, and {available:#x} are to be had; take less, or bring in nothing")]
    Memory {
        /// How many bytes are not in memory yet; if they are more than machine and swap have in all, how many there are to bring in.
        wanted: u64,
        /// How many the system can give; as in [`BuildError::Memory`].
        available: u64,
    },
    /// The system refused some.
    #[error("region {region}: cannot bring in {len:#x} bytes at guest address {start:#x}: {source}; {done:#x} bytes of {total:#x} had been")]
    System {
        /// The region.
        region: Span,
        /// The guest physical address of the first byte that was asked for.
        start: u64,
        /// How many bytes were asked for.
        len: u64,
        /// How many bytes had been brought in by then.
        done: u64,
        /// How many there were to bring in.
        total: u64,
        /// What the system answered: `EFAULT` or `ENOMEM` if there is no memory, `EHWPOISON` if some is broken, `EINVAL` from a kernel before 5.14.
        source: io::Error,
    },
}

/// A region that this crate did not make, so that it does not know what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("region {region}: was not built by vm-memory-host")]
pub struct NotProvisioned {
    /// The region.
    pub region: Span,
}

/// Why a range of guest memory was not given back, or not plugged or unplugged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A part of the range is in no region. Nothing was changed.
    #[error("no region has guest address {addr:#x}")]
    Hole {
        /// The first guest physical address that is in none.
        addr: u64,
    },
    /// The range passes the greatest guest physical address. Nothing was changed.
    #[error("{len:#x} bytes at {start:#x} pass 2^64")]
    PastTop {
        /// The first guest physical address.
        start: u64,
        /// The number of bytes.
        len: u64,
    },
    /// The region was not made by this crate. Nothing was changed.
    #[error(transparent)]
    NotProvisioned(#[from] NotProvisioned),
    /// The range does not begin and end where pages do, or blocks. Nothing was changed.
    #[error("region {region}: {len:#x} bytes at {start:#x} are not whole {what} of {granularity:#x} bytes")]
    Unaligned {
        /// The region.
        region: Span,
        /// The first guest physical address of the range there.
        start: u64,
        /// The number of bytes there.
        len: u64,
        /// `pages` or `blocks`.
        what: &'static str,
        /// Their size in bytes.
        granularity: u64,
    },
    /// The region has no blocks that could be plugged. Nothing was changed.
    #[error("region {region}: has no blocks (Region::blocks)")]
    NoBlocks {
        /// The region.
        region: Span,
    },
    /// There are no pages for a block. It was not plugged.
    #[error(
        "region {region}: no pages for {len:#x} bytes at {start:#x}: {}; {done:#x} bytes had been plugged",
        too_few_huge_pages(*.wanted, *.free, *.page_size, &[])
    )]
    NoPages {
        /// The region.
        region: Span,
        /// The first guest physical address that pages were wanted for.
        start: u64,
        /// The number of bytes that they were wanted for.
        len: u64,
        /// How many huge pages were wanted.
        wanted: u64,
        /// How many huge pages are free.
        free: u64,
        /// Their size in bytes.
        page_size: u64,
        /// How many bytes of the range, from its start, were plugged before.
        done: u64,
        /// What the system answered.
        source: io::Error,
    },
    /// The system refused a change. What comes before it was changed.
    #[error(
        "region {region}: cannot {what} {len:#x} bytes at {start:#x}: {source}; {done:#x} bytes had been"
    )]
    System {
        /// The region.
        region: Span,
        /// What was to be done.
        what: &'static str,
        /// The first guest physical address of what was refused.
        start: u64,
        /// The number of its bytes.
        len: u64,
        /// How many bytes of the range, from its start, were changed before.
        done: u64,
        /// What the system answered.
        source: io::Error,
    },
}

fn sizes(there: &[u64]) -> String {
    if there.is_empty() {
        return "none at all".to_owned();
    }
    let sizes: Vec<String> = there.iter().map(|size| format!("{size:#x}")).collect();
    sizes.join(", ")
}

fn with_the_others(others: bool) -> &'static str {
    if others {
        "with the others, "
    } else {
        ""
    }
}

/// What there is, and what to do about it.
fn too_few_huge_pages(wanted: u64, free: u64, page_size: u64, nodes: &[u32]) -> String {
    let on_nodes = match nodes {
        [] => String::new(),
        nodes => format!(" on NUMA nodes {nodes:?}"),
    };
    format!(
        "{wanted} huge pages of {page_size:#x} bytes are wanted, {free} are free{on_nodes}; add {} to {}/hugepages-{}kB/nr_hugepages",
        wanted.saturating_sub(free).max(1),
        directory_of(nodes),
        page_size / 1024
    )
}

/// Where the kernel is told how many huge pages there shall be.
fn directory_of(nodes: &[u32]) -> String {
    match nodes.first() {
        None => "/sys/kernel/mm/hugepages".to_owned(),
        Some(node) => format!("/sys/devices/system/node/node{node}/hugepages"),
    }
}
