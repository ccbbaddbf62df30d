//! [`discard`]: pages that a guest gives back.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::error::ChangeError;
use crate::mapping::{parts, HostMapping, Kind};
use crate::region::{Lock, Sharing};
use crate::sys::{self, Advice};

/// How many separate ranges of one private file may have pages of zeroes in their place. Each costs the kernel two entries in a table that has 65 530 for the
/// whole process (`vm.max_map_count`), and a guest chooses what it gives back.
pub(crate) const MOST_REPLACED: usize = 4096;

/// Gives the pages of a range of guest memory back to the system: they cost nothing until they are used again, and read as zeroes.
///
/// For a balloon (virtio 1.2, section 5.5), free page reporting (section 5.5.6.7) and whatever else a guest does not need any more. What is right depends on what
/// is behind the region:
///
/// | backing | by | |
/// |---|---|---|
/// | anonymous | `madvise(MADV_DONTNEED)` | |
/// | memfd, shared file | `fallocate(FALLOC_FL_PUNCH_HOLE)` | gone for all processes that map it |
/// | hugetlb | the same | in whole huge pages |
/// | private file | `mmap` of zeroes in its place | dropping the copies would bring the file's bytes back |
///
/// A private file whose pages are given back in thousands of separate places keeps some: those are overwritten with zeroes. So are those of a private
/// mapping of huge pages.
///
/// The pages are marked dirty, since their bytes are others now. Devices must not be at work in the range, and memory that a device of the
/// host's has pinned (VFIO) must not be given back: it would go on using the old pages.
///
/// Returns how many bytes were given back.
///
/// System calls: `madvise`, `fallocate`; `mmap` and those of the region's options for private files.
///
/// # Errors
///
/// [`ChangeError`]; where the range is not whole pages ([`HostMapping::page_size`]), is not all memory, or is of a region that this crate has not built,
/// nothing was done.
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{discard, Backing, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(7u8, GuestAddress(0x3000))?;
/// assert_eq!(discard(&memory, GuestAddress(0x3000), 0x1000)?, 0x1000);
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000))?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn discard<B, M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let parts = parts(memory, addr, len, |mapping| Ok(("pages", mapping.page_size())))?;
    let mut given_back = 0u64;
    for part in parts {
        let answer = give_back(part.mapping, part.offset, part.len);
        // Even if it failed: a part of it may have gone.
        part.mark_dirty();
        let here = answer.map_err(|source| part.refused("give back", source))?;
        given_back = given_back.saturating_add(here);
    }
    Ok(given_back)
}

/// Gives a part of a mapping back, in whole pages; how many bytes that were.
pub(crate) fn give_back(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let bytes = u64::try_from(len).unwrap_or(u64::MAX);
    match (&mapping.file, mapping.sharing) {
        (None, _) => drop_pages(mapping, offset, len).map(|()| bytes),
        (Some((file, start)), Sharing::Shared) => {
            let at = start.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX));
            sys::punch_hole(file, at, bytes).map(|()| bytes)
        }
        (Some(_), Sharing::Private) => replace(mapping, offset, len),
    }
}

/// Drops the pages that the mapping has for itself.
fn drop_pages(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let advice = match mapping.options.lock {
        Lock::No => Advice::DontNeed,
        Lock::Now | Lock::OnFault => Advice::DontNeedLocked,
    };
    mapping.mapped().advise(offset, len, advice)
}

/// Puts zeroes in the place of a private file's bytes.
fn replace(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let bytes = u64::try_from(len).unwrap_or(u64::MAX);
    let end = offset.saturating_add(len);
    let mut replaced = mapping.changes();
    if replaced.has(offset, end) {
        return drop_pages(mapping, offset, len).map(|()| bytes);
    }
    let more = replaced
        .len()
        .saturating_sub(replaced.touching(offset, end))
        .saturating_add(1);
    if mapping.kind == Kind::Hugetlb || more > MOST_REPLACED {
        return mapping.mapped().zero(offset, len).map(|()| 0);
    }
    mapping.mapped().replace(offset, len)?;
    replaced.add(offset, end);
    // The new pages are to be as those that they replace. A lock is one on use: zeroes that nobody has looked at are worth no memory.
    mapping.apply_options(offset, len).map_err(|(_, source)| source)?;
    let lock = match mapping.options.lock {
        Lock::No => Lock::No,
        Lock::Now | Lock::OnFault => Lock::OnFault,
    };
    mapping.apply_lock(offset, len, lock)?;
    Ok(bytes)
}
