//! [`plug`] and [`unplug`]: blocks of a region that come and go.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::PluggedBlocks;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::discard::clear;
use crate::error::ChangeError;
use crate::mapping::{bytes, parts, span_of, HostMapping, Part};
use crate::region::{BackingKind, Blocks, Unplugged};
use crate::resources::HostResources;
use crate::sys::{self, Advice};

/// Lets a guest have the blocks of a range: accesses reach them from now on. What was plugged stays as it is.
///
/// The guest drives this (virtio-mem, virtio 1.2 section 5.15): no map is copied, and nobody who uses the memory takes notice. Blocks read as zeroes when
/// they come, and are not marked dirty for it: they were when they went, and what a vCPU writes to a block that it does not have is nobody's. The huge pages of blocks are taken now, so that an access never finds the pool empty; so are the pages of a
/// file on a tmpfs that has an end, unless it may be [sparse](crate::Region::sparse).
///
/// System calls: `madvise` or `fallocate`; `mprotect` for blocks that are [protected](Unplugged::Protected).
///
/// # Errors
///
/// [`ChangeError`]; where the range is not whole blocks, is not all memory, or is of a region without blocks, nothing was done. What was plugged before the system
/// refused some stays plugged, and is told.
///
/// ```
/// use std::num::NonZeroU64;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{plug, unplug, MemoryBuilder, Region, Unplugged};
///
/// let block = NonZeroU64::new(2 << 20).unwrap();
/// let region = Region::new(GuestAddress(1 << 32), 64 << 20).blocks(block, Unplugged::Mapped);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
///
/// let addr = GuestAddress((1 << 32) + (4 << 20));
/// assert!(memory.write_obj(1u64, addr).is_err());
/// plug(&memory, addr, 2 << 20)?;
/// memory.write_obj(1u64, addr)?;
/// unplug(&memory, addr, 2 << 20)?;
/// assert!(memory.read_obj::<u64>(addr).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn plug<B, M>(memory: &M, addr: GuestAddress, len: u64) -> Result<(), ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    for part in parts(memory, addr, len, blocks_of)? {
        let plugged = plug_part(part.mapping, part.offset, part.len);
        plugged.map_err(|source| not_plugged(&part, source))?;
    }
    Ok(())
}

/// Takes the blocks of a range from a guest: accesses that begin from now on do not reach them ([`PluggedBlocks`] says more), and their pages are
/// given back. What was not plugged stays so, and is given back all the same.
///
/// The pages are marked dirty. Huge pages go to the pool.
///
/// System calls: `madvise` or `fallocate`; `mprotect` for blocks that are [protected](Unplugged::Protected).
///
/// # Errors
///
/// [`ChangeError`]; where the range is not whole blocks, is not all memory, or is of a region without blocks, nothing was done. Where the system
/// refuses to take pages back, all blocks of the range are unplugged all the same, and the first refusal is told.
pub fn unplug<B, M>(memory: &M, addr: GuestAddress, len: u64) -> Result<(), ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let mut first = Ok(());
    for part in parts(memory, addr, len, blocks_of)? {
        let answer = unplug_part(part.mapping, part.offset, part.len);
        part.mark_dirty();
        first = first.and(answer.map_err(|source| part.refused("discard the pages of", source)));
    }
    first
}

/// What the range must be whole parts of.
fn blocks_of<B: Bitmap>(
    region: &GuestRegionMmap<B>,
    mapping: &HostMapping,
) -> Result<(&'static str, u64), ChangeError> {
    let no_blocks = || ChangeError::NoBlocks {
        region: span_of(region),
    };
    let (blocks, _) = mapping.blocks.as_ref().ok_or_else(no_blocks)?;
    Ok(("blocks", blocks.size.get()))
}

/// Plugs the first blocks of a region that has just been mapped, which are whole blocks in it, with the bytes that they have, and protects the others.
pub(crate) fn begin(mapping: &HostMapping, plugged: &[(usize, usize)]) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return Ok(());
    };
    if blocks.unplugged == Unplugged::Protected {
        mapping.mapped().protect(0, mapping.mapped().len(), false)?;
    }
    for &(offset, len) in plugged {
        make_ready(mapping, blocks, offset, len)?;
        bits.plug(offset, len).map_err(io::Error::other)?;
    }
    Ok(())
}

/// The blocks of a part that are not plugged, in runs.
fn missing(bits: &PluggedBlocks, offset: usize, len: usize) -> Vec<(usize, usize)> {
    let end = offset.saturating_add(len);
    let (mut missing, mut at) = (Vec::new(), offset);
    for (start, run) in bits.runs_in(offset, len) {
        if at < start {
            missing.push((at, start.saturating_sub(at)));
        }
        at = start.saturating_add(run);
    }
    if at < end {
        missing.push((at, end.saturating_sub(at)));
    }
    missing
}

fn plug_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return Ok(());
    };
    // Until all is done no other change comes between.
    let _changes = mapping.lock_changes();
    let missing = missing(bits, offset, len);
    let ready = missing.iter().try_for_each(|&(at, run)| {
        // A vCPU may have written there, or the file have had bytes.
        clear(mapping, at, run)?;
        make_ready(mapping, blocks, at, run)
    });
    if ready.is_err() {
        for (at, run) in missing {
            // There is an error to report already; what cannot be given back now is given back when it is plugged or unplugged.
            let _ = put_away(mapping, blocks, at, run);
        }
        return ready;
    }
    bits.plug(offset, len).map_err(io::Error::other)
}

fn unplug_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return Ok(());
    };
    let _changes = mapping.lock_changes();
    // The bits before the pages: an access that begins later must find nothing.
    bits.unplug(offset, len).map_err(io::Error::other)?;
    put_away(mapping, blocks, offset, len)
}

/// Makes blocks ready to be used: they can be accessed, and have their huge pages, on the nodes that they are to be on.
fn make_ready(mapping: &HostMapping, blocks: &Blocks, offset: usize, len: usize) -> io::Result<()> {
    if blocks.unplugged == Unplugged::Protected {
        mapping.mapped().protect(offset, len, true)?;
    }
    if mapping.backing.kind == BackingKind::Hugetlb {
        mapping
            .mapped()
            .advise(offset, len, Advice::PopulateWrite)?;
    }
    match &mapping.backing.file {
        Some((file, start)) if mapping.backing.allocated => {
            sys::allocate_range(file, start.saturating_add(bytes(offset)), bytes(len))
        }
        _ => Ok(()),
    }
}

/// Takes blocks out of use: their pages go, and they cannot be accessed.
fn put_away(mapping: &HostMapping, blocks: &Blocks, offset: usize, len: usize) -> io::Result<()> {
    let protected = match blocks.unplugged {
        Unplugged::Protected => mapping.mapped().protect(offset, len, false),
        Unplugged::Mapped => Ok(()),
    };
    clear(mapping, offset, len).and(protected)
}

fn not_plugged<B: Bitmap>(part: &Part<'_, B>, source: io::Error) -> ChangeError {
    let page_size = part.mapping.page_size();
    let exhausted = matches!(source.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM));
    let pools = HostResources::current().pools();
    let pool = pools.into_iter().find(|pool| pool.page_size == page_size);
    let missing = part
        .mapping
        .plugged_blocks()
        .map(|bits| missing(bits, part.offset, part.len));
    let wanted = missing
        .into_iter()
        .flatten()
        .fold(0u64, |sum, (_, len)| sum.saturating_add(bytes(len)));
    let wanted = wanted.checked_div(page_size).unwrap_or(0);
    let free = pool.map_or(0, |pool| pool.free);
    // (ENOMEM is also what a process is told that has too many areas of addresses.)
    if part.mapping.kind() != BackingKind::Hugetlb || !exhausted || free >= wanted {
        return part.refused("plug", source);
    }
    ChangeError::NoPages {
        region: span_of(part.region),
        start: part.start(),
        len: bytes(part.len),
        wanted,
        free,
        page_size,
        done: part.before,
        source,
    }
}
