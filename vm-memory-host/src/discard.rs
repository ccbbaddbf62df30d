//! [`discard`]: pages that a guest gives back.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::error::ChangeError;
use crate::mapping::{bytes, parts, HostMapping, ZeroedRanges};
use crate::region::{BackingKind, Lock, Sharing};
use crate::residency::known_to_mincore;
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
/// | block device | `fallocate(FALLOC_FL_ZERO_RANGE)` | the device has zeroes then |
/// | hugetlb | overwritten with zeroes | nothing is had by others |
/// | hugetlb that [lets others have its pages](crate::Region::release_huge_pages) | `FALLOC_FL_PUNCH_HOLE` | in whole huge pages |
/// | private file | `mremap` of zeroes into its place | dropping the copies would bring the file's bytes back |
///
/// Huge pages stay with their region unless it says otherwise: a page that has gone to the pool may be somebody else's when the guest uses it again. A
/// private file whose pages are given back in thousands of separate places keeps some, since each costs the kernel two entries in a table that it has for
/// the whole process (`vm.max_map_count`): they are overwritten with zeroes. So are those of a private mapping of huge pages, and those of a private file
/// where the process has no room to map zeroes elsewhere first (`RLIMIT_AS`, and `RLIMIT_MEMLOCK` if they are locked). A part of a transparent huge
/// page costs memory until the kernel has split it.
///
/// The pages are marked dirty, since their bytes are others now. Devices must not be at work in the range, and memory that a device of the
/// host's has pinned (VFIO) must not be given back: it would go on using the old pages.
///
/// Returns how many bytes the region lays no claim to any more, and others can have: the length of the range, as a rule, whether anything was in memory there
/// or not. (The cache of a disk's file has folios of up to 2 MiB; where one reaches over an end of the range, it may stay, as zeroes.)
///
/// System calls: `madvise`, `fallocate`; `mincore` for huge pages; for private files `mmap`, `munmap`, `mprotect`, `mremap` and `mincore`, and `madvise`,
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
    let parts = parts(memory, addr, len, |_, mapping| {
        Ok(("pages", mapping.page_size()))
    })?;
    let mut given_back = 0u64;
    for part in parts {
        let answer = give_back(part.mapping, part.offset, part.len);
        // Even if it failed: a part of it may have gone.
        part.mark_dirty();
        let here = answer.map_err(|source| part.refused("discard", source))?;
        given_back = given_back.saturating_add(here);
    }
    Ok(given_back)
}

/// Gives a part of a mapping back, in whole pages; how many bytes others can have.
fn give_back(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let mut changes = mapping.lock_changes();
    match (&mapping.backing.file, mapping.backing.sharing) {
        (Some((file, start)), Sharing::Shared) if mapping.backing.kind == BackingKind::Hugetlb => {
            if mapping.options.release_huge_pages {
                if mapping.blocks.is_none() {
                    take_promised(mapping, file, *start, offset, len);
                }
                return clear(mapping, offset, len).map(|()| bytes(len));
            }
            // Blocks that are not plugged have no pages that are theirs.
            let kept = match mapping.plugged_blocks() {
                None => vec![(offset, len)],
                Some(blocks) => blocks.runs_in(offset, len).collect(),
            };
            let mut given_back = bytes(len);
            for (at, run) in kept {
                overwrite(mapping, file, at, run)?;
                given_back = given_back.saturating_sub(bytes(run));
            }
            Ok(given_back)
        }
        (Some(_), Sharing::Private) => replace(mapping, &mut changes, offset, len),
        (Some((file, _)), Sharing::Shared)
            if mapping.backing.kind == BackingKind::File
                && file.metadata()?.file_type().is_char_device() =>
        {
            // What a device has behind its mapping is its own affair: /dev/zero, memory that no descriptor leads to.
            mapping.mapped().fill_zeroes(offset, len).map(|()| 0)
        }
        _ => clear(mapping, offset, len).map(|()| bytes(len)),
    }
}

/// The huge pages of a part, one by one: where each begins, and how long it is.
fn huge_pages(
    mapping: &HostMapping,
    offset: usize,
    len: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let page = usize::try_from(mapping.backing.page_size)
        .unwrap_or(usize::MAX)
        .max(1);
    (0..len)
        .step_by(page)
        .map(move |at| (offset.saturating_add(at), page.min(len.saturating_sub(at))))
}

/// Takes the huge pages that the region was promised when it was built and has not used: a promise goes to the pool with its page only.
fn take_promised(mapping: &HostMapping, file: &File, start: u64, offset: usize, len: usize) {
    for (at, page) in huge_pages(mapping, offset, len) {
        // A page that has gone to the pool before cannot be had, maybe, and need not be.
        let _ = sys::allocate_range(file, start.saturating_add(bytes(at)), bytes(page));
    }
}

/// Makes huge pages zeroes that stay with the region. Those that nobody has used are zeroes already.
fn overwrite(mapping: &HostMapping, file: &File, offset: usize, len: usize) -> io::Result<()> {
    let mut others = None;
    for (at, page) in huge_pages(mapping, offset, len) {
        if known_to_mincore(mapping, at, page)? == 0 {
            // Not mapped here: another process that has the file may have written to it.
            let others = match others {
                Some(others) => others,
                None => *others.insert(file_has_more(mapping, file)?),
            };
            if !others {
                continue;
            }
        }
        mapping.mapped().fill_zeroes(at, page)?;
    }
    Ok(())
}

/// Whether a file of huge pages has pages that the mapping has not.
fn file_has_more(mapping: &HostMapping, file: &File) -> io::Result<bool> {
    let here = known_to_mincore(mapping, 0, mapping.mapped().len())?;
    Ok(file.metadata()?.blocks().saturating_mul(512) != here)
}

/// Makes a part of memory that is no private file zeroes that cost nothing. The pages of a pool go to the pool.
pub(crate) fn clear(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match &mapping.backing.file {
        None => drop_pages(mapping, offset, len),
        Some((file, start)) => {
            let (start, len) = (start.saturating_add(bytes(offset)), bytes(len));
            // A hole in a device may have any bytes, or be refused when its cache has been dropped.
            match mapping.backing.kind == BackingKind::File
                && file.metadata()?.file_type().is_block_device()
            {
                true => sys::zero_range(file, start, len),
                false => sys::punch_hole(file, start, len),
            }
        }
    }
}

/// Drops the pages that the mapping has for itself.
fn drop_pages(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match mapping.mapped().advise(offset, len, Advice::DontNeed) {
        // Locked: by the region's own options, or by a process that locks all that it has (mlockall(2)).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            mapping.mapped().advise(offset, len, Advice::DontNeedLocked)
        }
        answer => answer,
    }
}

/// Puts zeroes in the place of a private file's bytes.
fn replace(
    mapping: &HostMapping,
    replaced: &mut ZeroedRanges,
    offset: usize,
    len: usize,
) -> io::Result<u64> {
    let end = offset.saturating_add(len);
    if replaced.has(offset, end) {
        return drop_pages(mapping, offset, len).map(|()| bytes(len));
    }
    let overwrite = || mapping.mapped().fill_zeroes(offset, len).map(|()| 0);
    if mapping.backing.kind == BackingKind::Hugetlb {
        return overwrite();
    }
    match replaced.replace(offset, end, || put_zeroes(mapping, offset, len)) {
        None => overwrite(),
        Some(Ok(())) => Ok(bytes(len)),
        // There is no room for another mapping, or for one that is locked (`RLIMIT_AS`, `RLIMIT_MEMLOCK`, `vm.max_map_count`), or nothing may be
        // locked any more (a process that has given its privileges up).
        Some(Err(error))
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM)
            ) =>
        {
            overwrite()
        }
        Some(Err(error)) => Err(error),
    }
}

/// Maps zeroes in the place of a part. They are as the pages that they replace from the first moment on: what a guest brings in is of the nodes that it
/// is to be of, and locked. A lock is one on use: zeroes that nobody has looked at are worth no memory.
fn put_zeroes(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let (zeroes, locked) = Mapped::detached_zeroed(len)?;
    mapping
        .apply_options_to(&zeroes, 0, len)
        .map_err(|(_, source)| source)?;
    if mapping.options.lock != Lock::No && !locked {
        zeroes.lock(0, len, true)?;
    }
    mapping.mapped().splice_over(offset, zeroes)
}
