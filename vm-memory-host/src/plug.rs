//! [`plug`] and [`unplug`]: blocks of a region that come and go.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::PluggedBlocks;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::discard::give_back;
use crate::error::ChangeError;
use crate::machine::Machine;
use crate::mapping::{parts, HostMapping, Kind, Part};
use crate::region::Unplugged;
use crate::sys;

/// Lets a guest have the blocks of a range: accesses reach them from now on. What was plugged stays as it is.
///
/// The guest drives this (virtio-mem, virtio 1.2 section 5.15): no map is copied, and nobody who uses the memory takes notice. Blocks read as zeroes when
/// they come. The huge pages of blocks are taken now, so that an access never finds the pool empty.
///
/// System calls: `fallocate` for blocks of huge pages, `mprotect` for those that are [protected](Unplugged::Protected).
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
        plug_part(part.mapping, part.offset, part.len).map_err(|source| not_plugged(&part, source))?;
    }
    Ok(())
}

/// Takes the blocks of a range from a guest: accesses that begin from now on do not reach them ([`PluggedBlocks`] says more), and their pages are
/// given back. What was not plugged stays so, and is given back all the same.
///
/// The pages are marked dirty.
///
/// System calls: those of [`discard`](crate::discard()), and `mprotect` for blocks that are [protected](Unplugged::Protected).
///
/// # Errors
///
/// [`ChangeError`]; where the range is not whole blocks, is not all memory, or is of a region without blocks, nothing was done. Where the system
/// refuses to take the pages back, the blocks are unplugged all the same.
pub fn unplug<B, M>(memory: &M, addr: GuestAddress, len: u64) -> Result<(), ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    for part in parts(memory, addr, len, blocks_of)? {
        let answer = unplug_part(part.mapping, part.offset, part.len);
        part.mark_dirty();
        answer.map_err(|source| part.refused("take back the pages of", source))?;
    }
    Ok(())
}

/// What the range must be whole parts of.
fn blocks_of(mapping: &HostMapping) -> Result<(&'static str, u64), ChangeError> {
    let region = mapping.span();
    let (blocks, _) = mapping.blocks.as_ref().ok_or(ChangeError::NoBlocks { region })?;
    Ok(("blocks", blocks.size.get()))
}

/// Plugs the first blocks of a region that has just been mapped, and protects the others.
pub(crate) fn begin(mapping: &HostMapping, plugged: &[(u64, u64)]) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return match plugged {
            [] => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
    };
    if blocks.unplugged == Unplugged::Protected {
        mapping.mapped().protect(0, mapping.mapped().len(), false)?;
    }
    for &(offset, len) in plugged {
        let number = |n: u64| usize::try_from(n).map_err(io::Error::other);
        let (offset, len) = (number(offset)?, number(len)?);
        let (size, block) = (bits.size(), bits.block_size());
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        if !inside || !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        plug_part(mapping, offset, len)?;
    }
    Ok(())
}

fn plug_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return Ok(());
    };
    // Until all is done no other change comes between.
    let changes = mapping.changes();
    if mapping.kind == Kind::Hugetlb {
        if let Some((file, start)) = &mapping.file {
            let at = start.saturating_add(bytes(offset));
            if let Err(error) = sys::take_pages(file, at, bytes(len)) {
                // What came before there were no more goes back, but for blocks that were there.
                give_back_unplugged(mapping, bits, offset, len);
                return Err(error);
            }
        }
    }
    if blocks.unplugged == Unplugged::Protected {
        mapping.mapped().protect(offset, len, true)?;
    }
    let plugged = bits.plug(offset, len).map_err(io::Error::other);
    drop(changes);
    plugged
}

/// Gives back the pages of blocks that are not plugged, after some were taken for them in vain.
fn give_back_unplugged(mapping: &HostMapping, bits: &PluggedBlocks, offset: usize, len: usize) {
    let block = bits.block_size();
    for at in (offset..offset.saturating_add(len)).step_by(block) {
        if bits.is_unplugged(at, block) {
            // There is another error to report already.
            let _ = give_back(mapping, at, block);
        }
    }
}

fn unplug_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let Some((blocks, bits)) = &mapping.blocks else {
        return Ok(());
    };
    {
        // The bits first: an access that begins later must find nothing. What comes between them and the discard is a plug of the same blocks,
        // which the lock keeps out.
        let _changes = mapping.changes();
        bits.unplug(offset, len).map_err(io::Error::other)?;
        if blocks.unplugged == Unplugged::Protected {
            mapping.mapped().protect(offset, len, false)?;
        }
    }
    give_back(mapping, offset, len).map(|_| ())
}

fn not_plugged<B: Bitmap>(part: &Part<'_, B>, source: io::Error) -> ChangeError {
    let page_size = part.mapping.page_size();
    if part.mapping.kind() != Kind::Hugetlb || source.raw_os_error() != Some(libc::ENOSPC) {
        return part.refused("plug", source);
    }
    let pools = Machine::here().pools();
    let pool = pools.into_iter().find(|pool| pool.page_size == page_size);
    ChangeError::NoPages {
        region: part.mapping.span(),
        start: part.start(),
        len: bytes(part.len),
        free: pool.map_or(0, |pool| pool.free),
        page_size,
        done: part.before,
        source,
    }
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
