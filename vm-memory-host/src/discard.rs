//! [`discard`]: pages that a guest gives back.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::error::ChangeError;
use crate::mapping::{bytes, parts, HostMapping, Kind, Replaced};
use crate::region::{Lock, Sharing};
use crate::sys::{self, Advice, Mapped};

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
/// | private file | `mremap` of zeroes into its place | dropping the copies would bring the file's bytes back |
///
/// Huge pages stay promised to their region, so that an access never finds the pool empty; a region may [let others have them](crate::Region::release_huge_pages). A
/// private file whose pages are given back in thousands of separate places keeps some, since each costs the kernel two entries in a table that it has for
/// the whole process (`vm.max_map_count`): they are overwritten with zeroes. So are those of a private mapping of huge pages, and those of a private file
/// where the process has no room to map zeroes elsewhere first (`RLIMIT_AS`, and `RLIMIT_MEMLOCK` if they are locked). A part of a transparent huge
/// page costs memory until the kernel has split it.
///
/// The pages are marked dirty, since their bytes are others now. Devices must not be at work in the range, and memory that a device of the
/// host's has pinned (VFIO) must not be given back: it would go on using the old pages.
///
/// Returns how many bytes others can have now.
///
/// System calls: `madvise`, `fallocate`; `mmap`, `munmap` for huge pages; for private files `mmap`, `munmap`, `mprotect`, `mremap` and `mincore`, and `madvise`,
/// `mbind`, `munlock` and `mlock2`, as the region's options and mlockall(2) have it.
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
    let parts = parts(memory, addr, len, |_, mapping| Ok(("pages", mapping.page_size())))?;
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

/// Gives a part of a mapping back, in whole pages; how many bytes others can have.
fn give_back(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let mut changes = mapping.change();
    match (&mapping.file, mapping.sharing) {
        (Some((file, start)), Sharing::Shared) if mapping.kind == Kind::Hugetlb => {
            clear(mapping, offset, len)?;
            if mapping.options.release_huge_pages {
                return Ok(bytes(len));
            }
            // Blocks that are not plugged have been promised nothing.
            let promised = match mapping.plugged_blocks() {
                None => vec![(offset, len)],
                Some(blocks) => blocks.runs_in(offset, len).collect(),
            };
            let mut given_back = bytes(len);
            for (at, run) in promised {
                sys::promise_huge_pages(file, start.saturating_add(bytes(at)), run)?;
                given_back = given_back.saturating_sub(bytes(run));
            }
            Ok(given_back)
        }
        (Some(_), Sharing::Private) => replace(mapping, &mut changes, offset, len),
        _ => clear(mapping, offset, len).map(|()| bytes(len)),
    }
}

/// Makes a part of memory that is no private file zeroes that cost nothing. The pages of a pool go to the pool.
pub(crate) fn clear(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match &mapping.file {
        None => drop_pages(mapping, offset, len),
        Some((file, start)) => sys::punch_hole(file, start.saturating_add(bytes(offset)), bytes(len)),
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
fn replace(mapping: &HostMapping, replaced: &mut Replaced, offset: usize, len: usize) -> io::Result<u64> {
    let end = offset.saturating_add(len);
    if replaced.has(offset, end) {
        return drop_pages(mapping, offset, len).map(|()| bytes(len));
    }
    let overwrite = || mapping.mapped().zero(offset, len).map(|()| 0);
    if mapping.kind == Kind::Hugetlb {
        return overwrite();
    }
    match replaced.replace(offset, end, || put_zeroes(mapping, offset, len)) {
        None => overwrite(),
        Some(Ok(())) => Ok(bytes(len)),
        // There is no room for another mapping, or for one that is locked (`RLIMIT_AS`, `RLIMIT_MEMLOCK`, `vm.max_map_count`).
        Some(Err(error)) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN)) => overwrite(),
        Some(Err(error)) => Err(error),
    }
}

/// Maps zeroes in the place of a part. They are as the pages that they replace from the first moment on: what a guest brings in is of the nodes that it
/// is to be of, and locked. A lock is one on use: zeroes that nobody has looked at are worth no memory.
fn put_zeroes(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let (zeroes, locked) = Mapped::zeroes(len)?;
    mapping
        .apply_options_to(&zeroes, 0, len)
        .map_err(|(_, source)| source)?;
    if mapping.options.lock != Lock::No && !locked {
        zeroes.lock(0, len, true)?;
    }
    mapping.mapped().put(offset, zeroes)
}
