//! [`discard`]: returns pages to the system.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::error::ChangeError;
use crate::mapping::{bytes, parts, HostMapping, ZeroedRanges};
use crate::region::{BackingKind, Lock, Sharing};
use crate::residency::mincore_bytes;
use crate::sys::{self, Advice, Mapped};

/// Returns the pages of a range of guest memory to the system. They then read as zeroes.
///
/// Use it for a balloon (virtio 1.2, section 5.5), for free page reporting (section 5.5.6.7), or
/// for other memory that the guest no longer needs. The method depends on the backing:
///
/// | backing | method | effect |
/// |---|---|---|
/// | anonymous | `madvise(MADV_DONTNEED)` | pages are freed |
/// | memfd, shared file | `fallocate(FALLOC_FL_PUNCH_HOLE)` | freed for all processes that map it |
/// | block device | `fallocate(FALLOC_FL_ZERO_RANGE)` | the device stores zeroes |
/// | character device | writes zeroes | nothing is freed |
/// | hugetlb | writes zeroes | pages stay with the region |
/// | hugetlb with [`release_huge_pages`] | `fallocate(FALLOC_FL_PUNCH_HOLE)` | pages return to the pool |
/// | private file | `mremap` of zeroes over the range | private copies are freed |
///
/// [`release_huge_pages`]: crate::Region::release_huge_pages
///
/// The pages are marked dirty. Devices must not access the range during the call. Memory that a
/// host device has pinned (VFIO) must not be discarded: the device would keep the old pages.
///
/// Returns the number of bytes that the region no longer claims. This is usually `len`, whether or
/// not pages were resident. It is less where pages are overwritten instead of freed:
///
/// - Each separate range of a private file costs two VMAs. Ranges are overwritten once guests use
///   half of `vm.max_map_count`.
/// - Ranges of a private file are also overwritten if `RLIMIT_AS` or `RLIMIT_MEMLOCK` leaves no
///   room to map zeroes.
/// - Private mappings of huge pages are always overwritten.
///
/// Some memory may stay in use for a while. The page cache of a disk has folios of up to 2 MiB,
/// which can outlast a hole that covers a part of them. The kernel splits a transparent huge page
/// lazily.
///
/// # System calls
///
/// - `madvise`, `fallocate`, `statx`, `getpid`; for huge pages also `mincore`.
/// - For private files also `mmap`, `munmap`, `mprotect`, `mremap` and `mincore`, and `mbind`,
///   `munlock` and `mlock2` as the region's options and mlockall(2) require.
///
/// # Examples
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
///
/// # Errors
///
/// Returns a [`ChangeError`] and changes nothing if the range
///
/// - passes 2^64 or has holes,
/// - does not consist of whole pages ([`HostMapping::page_size`]), or
/// - touches a region that this crate did not build.
///
/// Returns [`ChangeError::System`] if the system refuses a call. Earlier regions of the range stay
/// discarded.
#[doc(alias = "balloon")]
#[doc(alias = "free page reporting")]
#[doc(alias = "punch hole")]
#[doc(alias = "fallocate")]
#[doc(alias = "FALLOC_FL_PUNCH_HOLE")]
#[doc(alias = "MADV_DONTNEED")]
#[doc(alias = "deflate")]
pub fn discard<B, M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let parts = parts(memory, addr, len, |_, mapping| {
        Ok(("pages", mapping.page_size()))
    })?;
    let mut freed = 0u64;
    for part in parts {
        let result = discard_part(part.mapping, part.offset, part.len);
        // Even after an error: some of its bytes may have changed.
        part.mark_dirty();
        let here = result.map_err(|source| part.refused("discard", source))?;
        freed = freed.saturating_add(here);
    }
    Ok(freed)
}

/// Discards whole pages of a mapping, and returns the number of bytes that it no longer claims.
fn discard_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let mut zeroed = mapping.lock_changes();
    let all = |()| bytes(len);
    match (&mapping.backing.file, mapping.backing.sharing) {
        (Some((file, start)), Sharing::Shared) if mapping.kind() == BackingKind::Hugetlb => {
            if !mapping.options.release_huge_pages {
                return overwrite_plugged(mapping, file, offset, len);
            }
            if mapping.blocks.is_none() {
                allocate_reserved(mapping, file, *start, offset, len);
            }
            free_pages(mapping, offset, len).map(all)
        }
        (Some(_), Sharing::Private) => replace_with_zeroes(mapping, &mut zeroed, offset, len),
        (Some((file, _)), Sharing::Shared)
            if mapping.kind() == BackingKind::File
                && file.metadata()?.file_type().is_char_device() =>
        {
            // The driver owns the memory of a character device, which cannot have holes.
            mapping.mapped().fill_zeroes(offset, len).map(|()| 0)
        }
        _ => free_pages(mapping, offset, len).map(all),
    }
}

/// Iterates over the huge pages of a range, as offset and length.
fn huge_pages(
    mapping: &HostMapping,
    offset: usize,
    len: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let page = usize::try_from(mapping.page_size())
        .unwrap_or(usize::MAX)
        .max(1);
    (0..len)
        .step_by(page)
        .map(move |at| (offset.saturating_add(at), page.min(len.saturating_sub(at))))
}

/// Allocates the huge pages that a region has reserved and not used.
///
/// A reservation returns to the pool only with its page, so the page must exist before a hole is
/// punched. Errors are ignored: a page that was released before need not exist.
fn allocate_reserved(mapping: &HostMapping, file: &File, start: u64, offset: usize, len: usize) {
    for (at, page) in huge_pages(mapping, offset, len) {
        let _ = sys::allocate_range(file, start.saturating_add(bytes(at)), bytes(page));
    }
}

/// Overwrites the huge pages that a region keeps.
///
/// Returns the number of bytes in unplugged blocks, which the region does not claim.
fn overwrite_plugged(
    mapping: &HostMapping,
    file: &File,
    offset: usize,
    len: usize,
) -> io::Result<u64> {
    let kept = match mapping.plugged_blocks() {
        None => vec![(offset, len)],
        Some(blocks) => blocks.runs_in(offset, len).collect(),
    };
    let mut freed = bytes(len);
    for (at, run) in kept {
        overwrite(mapping, file, at, run)?;
        freed = freed.saturating_sub(bytes(run));
    }
    Ok(freed)
}

/// Writes zeroes to the huge pages of a range, but does not populate unused ones.
fn overwrite(mapping: &HostMapping, file: &File, offset: usize, len: usize) -> io::Result<()> {
    let mut others = None;
    for (at, page) in huge_pages(mapping, offset, len) {
        if mincore_bytes(mapping, at, page)? == 0 {
            // This process does not map the page, but another one may have written to it.
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

/// Returns whether a file has huge pages that this mapping does not.
fn file_has_more(mapping: &HostMapping, file: &File) -> io::Result<bool> {
    let here = mincore_bytes(mapping, 0, mapping.mapped().len())?;
    Ok(file.metadata()?.blocks().saturating_mul(512) != here)
}

/// Frees the pages of a range, which then reads as zeroes. Not for private files.
pub(crate) fn free_pages(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match &mapping.backing.file {
        None => free_private_pages(mapping, offset, len),
        Some((file, start)) => {
            let (start, len) = (start.saturating_add(bytes(offset)), bytes(len));
            // Punching a hole in a block device may fail, or leave any contents.
            let is_block_device = mapping.kind() == BackingKind::File
                && file.metadata()?.file_type().is_block_device();
            match is_block_device {
                true => sys::zero_range(file, start, len),
                false => sys::punch_hole(file, start, len),
            }
        }
    }
}

/// Frees the private pages of a range.
fn free_private_pages(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    match mapping.mapped().advise(offset, len, Advice::DontNeed) {
        // The range is locked, by the region's options or by mlockall(2).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            mapping.mapped().advise(offset, len, Advice::DontNeedLocked)
        }
        result => result,
    }
}

/// Replaces a range of a private file by zeroes, or overwrites it if that is not possible.
///
/// `MADV_DONTNEED` would restore the bytes of the file instead.
fn replace_with_zeroes(
    mapping: &HostMapping,
    zeroed: &mut ZeroedRanges,
    offset: usize,
    len: usize,
) -> io::Result<u64> {
    let end = offset.saturating_add(len);
    if zeroed.contains(offset, end) {
        return free_private_pages(mapping, offset, len).map(|()| bytes(len));
    }
    let overwrite = || mapping.mapped().fill_zeroes(offset, len).map(|()| 0);
    if mapping.kind() == BackingKind::Hugetlb {
        return overwrite();
    }
    match zeroed.replace(offset, end, || splice_zeroes(mapping, offset, len)) {
        None => overwrite(),
        Some(Ok(())) => Ok(bytes(len)),
        // A limit leaves no room for another mapping or another locked one (`RLIMIT_AS`,
        // `RLIMIT_MEMLOCK`, `vm.max_map_count`), or the process has lost the privilege to lock.
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

/// Maps zeroes over a range. They have all options of the mapping from the first access on.
///
/// Locked memory is locked on fault, because unused zeroes need no page.
fn splice_zeroes(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let (zeroes, locked) = Mapped::detached_zeroed(len)?;
    mapping
        .apply_options_to(&zeroes, 0, len)
        .map_err(|(_, source)| source)?;
    if mapping.options.lock != Lock::No && !locked {
        zeroes.lock(0, len, true)?;
    }
    mapping.mapped().splice_over(offset, zeroes)
}
