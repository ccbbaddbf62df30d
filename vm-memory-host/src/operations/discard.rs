//! [`discard`]: returns pages to the system.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::residency::mincore_bytes;
use crate::error::ChangeError;
use crate::mapping::{
    parts, span_of, to_u64, unplugged_runs, Changes, HostMapped, HostMapping, Part,
};
use crate::region::{BackingKind, Lock, Sharing};
use crate::sys::{self, Advice, Mapped};

/// Returns the pages of a range of guest memory to the system. They then read as zeroes.
///
/// Use it for free page reporting (virtio 1.2, section 5.5.6.7), or for other memory that the guest
/// no longer needs. A balloon lists single pages: use [`discard_pages`](crate::discard_pages) or
/// [`Balloon`](crate::Balloon). The method depends on the backing:
///
/// | backing | method | effect |
/// |---|---|---|
/// | anonymous | `madvise(MADV_DONTNEED)` | pages are freed |
/// | memfd, [sparse] shared file | `madvise(MADV_REMOVE)` | freed for all processes that map it |
/// | shared file on a disk | `fallocate(FALLOC_FL_ZERO_RANGE)` | pages are freed, disk space stays |
/// | shared file on a tmpfs with a size limit | writes zeroes | nothing is freed |
/// | block device | `fallocate(FALLOC_FL_ZERO_RANGE)` | the device stores zeroes |
/// | character device | writes zeroes | nothing is freed |
/// | hugetlb | writes zeroes | pages stay with the region |
/// | hugetlb with [`release_huge_pages`] | `madvise(MADV_REMOVE)` | pages return to the pool |
/// | private file | `mremap` of zeroes over the range | private copies are freed |
///
/// [sparse]: crate::Region::sparse
/// [`release_huge_pages`]: crate::Region::release_huge_pages
///
/// Overwriting takes host time in proportion to the range, each time. A guest can report a range
/// any number of times: do not offer free page reporting for such a region.
///
/// The pages are marked dirty. Devices must not access the range during the call. Memory that a
/// host device has pinned (VFIO) must not be discarded: the device would keep the old pages.
///
/// Returns the number of bytes freed. This is usually `len`, whether or not pages were resident. It
/// is less where pages are overwritten instead of freed:
///
/// - The build has taken space or huge pages for the whole region, so that no access lacks a page.
///   A discard does not release them, except for [sparse] files, [`release_huge_pages`] and
///   unplugged blocks. On a tmpfs with a size limit, the pages are the space.
/// - Pages of a shared file are overwritten if its file system or device cannot free them. It may
///   not support that, lack the disk space for it, or be claimed by another process.
/// - Each separate range of a private file costs two VMAs. Ranges are overwritten once guests use
///   three eighths of `vm.max_map_count`. Builds can use up to half of it.
/// - Ranges of a private file are also overwritten if `RLIMIT_AS` or `RLIMIT_MEMLOCK` leaves no
///   room to map zeroes.
/// - Private mappings of huge pages are always overwritten.
///
/// A discarded range keeps the options of its region, with one exception. The cpuset of the process
/// may have lost all nodes of the NUMA policy. A range of a private file then has no policy.
///
/// For a shared file, the call waits while another process holds the kernel's lock on the file. An
/// untrusted process can [hold it without limit](crate::Backing::Memfd).
///
/// Some memory may stay in use for a while. The page cache of a disk has folios of up to 2 MiB,
/// which can outlast a hole that covers a part of them. The kernel splits a transparent huge page
/// lazily.
///
/// # Aborts
///
/// For a private file, aborts the process if the kernel has unmapped the range and then fails to
/// map the zeroes. Another thread could get the addresses, and the guest would reach its memory.
/// The kernel fails there only if it lacks memory for page tables, or if `vm.overcommit_memory` is
/// 2 and the commit limit is reached. Do not use that setting with private files of hostile
/// guests: a guest chooses when it discards.
///
/// # Userfaultfd
///
/// A handler of userfaultfd(2) can fill missing pages of the region, for example from a snapshot.
/// With `UFFD_FEATURE_EVENT_REMOVE`, the kernel sends it an event for each discarded range before
/// the call returns. The handler must then fill the missing pages of that range with zeroes. The
/// call waits until the handler has read the event, so the handler needs a separate thread. The
/// same applies to [`plug`](crate::plug()) and [`unplug`](crate::unplug()). There are exceptions:
///
/// - Pages that are overwritten, as listed above, stay in place. There is no event, except for
///   unused huge pages.
/// - Ranges of a private file are replaced by memory that is not registered. It reads as zeroes
///   without the handler. With `UFFD_FEATURE_EVENT_UNMAP`, there is an event.
/// - Before Linux 5.18, there are no events for locked files and for unused huge pages.
/// - Other mappings of the file, in this or another process, get no events. Register the region
///   itself.
///
/// Dropping a region that is adjacent to another one also sends an event. The handler must run
/// until the drop, or its descriptor must be closed before.
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
/// - does not consist of whole pages ([`HostMapping::page_size`]),
/// - touches a [read-only](crate::Region::read_only) region, or
/// - touches a region that this crate did not build, or that the parent process built.
///
/// Returns [`ChangeError::System`] if the system refuses a call. Earlier regions of the range stay
/// discarded.
#[doc(alias = "balloon")]
#[doc(alias = "free page reporting")]
#[doc(alias = "punch hole")]
#[doc(alias = "fallocate")]
#[doc(alias = "FALLOC_FL_PUNCH_HOLE")]
#[doc(alias = "MADV_DONTNEED")]
pub fn discard<M>(memory: &M, addr: GuestAddress, len: u64) -> Result<u64, ChangeError>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let parts = parts(memory, addr, len, |region, mapping| {
        refuse_read_only(region, mapping)?;
        Ok(("pages", mapping.page_size()))
    })?;
    let mut freed = 0u64;
    for part in parts {
        freed = freed.saturating_add(discard_whole(&part)?);
    }
    Ok(freed)
}

/// Returns an error for a read-only region, whose pages cannot be discarded.
pub(super) fn refuse_read_only<R: HostMapped>(
    region: &R,
    mapping: &HostMapping,
) -> Result<(), ChangeError> {
    if mapping.options.read_only {
        let region = span_of(region);
        return Err(ChangeError::ReadOnly { region });
    }
    Ok(())
}

/// Discards a part that consists of whole pages, and marks them dirty.
///
/// Returns the number of bytes freed.
pub(super) fn discard_whole<R: HostMapped>(part: &Part<'_, R>) -> Result<u64, ChangeError> {
    let result = discard_part(part.mapping, part.offset, part.len);
    // Even after an error: some of its bytes may have changed.
    part.mark_dirty();
    result.map_err(|source| part.refused("discard", source))
}

/// Discards whole pages of a mapping, and returns the number of bytes freed.
fn discard_part(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<u64> {
    let mut changes = mapping.lock_changes()?;
    let all = |()| to_u64(len);
    let Some((file, start)) = &mapping.backing.file else {
        return free_pages(&changes, offset, len).map(all);
    };
    if mapping.backing.sharing == Sharing::Private {
        return replace_with_zeroes(&mut changes, offset, len);
    }
    match mapping.kind() {
        BackingKind::Hugetlb if mapping.keeps_huge_pages() => {
            overwrite_plugged(&changes, offset, len, |at, len| {
                overwrite_huge_pages(&changes, file, *start, at, len)
            })
        }
        BackingKind::Hugetlb if mapping.blocks.is_none() => {
            release_huge_pages(&mut changes, file, *start, offset, len).map(all)
        }
        // The space on a tmpfs is the pages themselves.
        BackingKind::Memfd if mapping.backing.allocated => {
            overwrite_plugged(&changes, offset, len, |at, len| {
                mapping.mapped().fill_zeroes(at, len)
            })
        }
        BackingKind::File => {
            let freed = if mapping.backing.allocated {
                sys::zero_range(file, start.saturating_add(to_u64(offset)), to_u64(len))
            } else if file.metadata()?.file_type().is_char_device() {
                // The driver owns the memory of a character device, which cannot have holes.
                return mapping.mapped().fill_zeroes(offset, len).map(|()| 0);
            } else {
                free_pages(&changes, offset, len)
            };
            freed
                .map(all)
                .or_else(|refused| overwrite_file(&changes, offset, len, refused))
        }
        _ => free_pages(&changes, offset, len).map(all),
    }
}

/// Overwrites a range of a file whose pages cannot be freed, for the reason `refused`.
///
/// Returns `refused` if it has another cause, or if a page of the range cannot be written.
fn overwrite_file(
    mapping: &Changes<'_>,
    offset: usize,
    len: usize,
    refused: io::Error,
) -> io::Result<u64> {
    let can_be_written = matches!(
        refused.raw_os_error(),
        // The file system cannot free pages or needs disk space to do so, or another process has
        // claimed the block device.
        Some(libc::EOPNOTSUPP | libc::ENOSPC | libc::EDQUOT | libc::EBUSY)
    );
    if !can_be_written {
        return Err(refused);
    }
    // A write would raise SIGBUS where the file system has no space for a page.
    match mapping.mapped().advise(offset, len, Advice::PopulateWrite) {
        // Before Linux 5.14, pages cannot be populated for writing.
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(refused),
        _ => mapping.mapped().fill_zeroes(offset, len).map(|()| 0),
    }
}

/// Returns the huge pages of a range, as offset and length.
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

/// Frees the huge pages of a range, and those that the region has reserved for it and not used.
///
/// A reservation returns to the pool only with its page, so the page must exist before a hole is
/// punched. If the system refuses to allocate it, the reservation stays.
///
/// The kernel fills a page that it allocates, and a guest can have the same page discarded any
/// number of times. This function therefore allocates each page once.
fn release_huge_pages(
    changes: &mut Changes<'_>,
    file: &File,
    start: u64,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    for (at, page) in huge_pages(changes.mapping, offset, len) {
        let is_reserved = !changes.zeroed.released.contains(&at);
        let exists = is_reserved
            && sys::allocate_range(file, start.saturating_add(to_u64(at)), to_u64(page)).is_ok();
        free_pages(changes, at, page)?;
        if exists {
            changes.zeroed.released.insert(at);
        }
    }
    Ok(())
}

/// Overwrites the pages that a region keeps, and frees those of unplugged blocks.
///
/// Returns the number of bytes in unplugged blocks, which the region does not claim.
fn overwrite_plugged(
    mapping: &Changes<'_>,
    offset: usize,
    len: usize,
    overwrite: impl Fn(usize, usize) -> io::Result<()>,
) -> io::Result<u64> {
    let Some(blocks) = mapping.plugged_blocks() else {
        return overwrite(offset, len).map(|()| 0);
    };
    let mut freed = 0u64;
    for (at, run) in unplugged_runs(blocks, offset, len) {
        free_pages(mapping, at, run)?;
        freed = freed.saturating_add(to_u64(run));
    }
    for (at, run) in blocks.runs_in(offset, len) {
        overwrite(at, run)?;
    }
    Ok(freed)
}

/// Writes zeroes to the huge pages of a range, but does not populate unused ones.
///
/// The cost grows with the range, not with the region.
fn overwrite_huge_pages(
    mapping: &Changes<'_>,
    file: &File,
    start: u64,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    let mut bytes_of_file = Vec::new();
    for (at, page) in huge_pages(mapping, offset, len) {
        if mincore_bytes(mapping, at, page)? == 0 {
            // This process maps no page here, so the call only notifies a handler of
            // userfaultfd(2), which then does not fill it. Linux before 5.18 refuses it.
            let _ = free_private_pages(mapping, at, page);
            // Another process, or that handler before it was told, may have filled it. A read of
            // the file does not populate a hole.
            bytes_of_file.resize(READ_LEN.min(page), 0);
            if reads_as_zeroes(
                file,
                start.saturating_add(to_u64(at)),
                page,
                &mut bytes_of_file,
            ) {
                continue;
            }
        }
        mapping.mapped().fill_zeroes(at, page)?;
    }
    Ok(())
}

/// The maximum number of bytes that [`reads_as_zeroes`] reads at a time.
pub(super) const READ_LEN: usize = 64 << 10;

/// Returns whether a range of a file can be read and consists of zeroes.
pub(super) fn reads_as_zeroes(file: &File, start: u64, len: usize, buffer: &mut [u8]) -> bool {
    let step = buffer.len().max(1);
    (0..len).step_by(step).all(|done| {
        let here = len.saturating_sub(done).min(step);
        let part = buffer.get_mut(..here).unwrap_or_default();
        let read = file.read_exact_at(part, start.saturating_add(to_u64(done)));
        read.is_ok() && part.iter().all(|byte| *byte == 0)
    })
}

/// Frees the pages of a range, which then reads as zeroes. The mapping is not of a private file.
pub(crate) fn free_pages(mapping: &Changes<'_>, offset: usize, len: usize) -> io::Result<()> {
    match &mapping.backing.file {
        None => free_private_pages(mapping, offset, len),
        Some((file, start)) => {
            let (start, count) = (start.saturating_add(to_u64(offset)), to_u64(len));
            // Punching a hole in a block device may fail, or leave any contents.
            let is_block_device = mapping.kind() == BackingKind::File
                && file.metadata()?.file_type().is_block_device();
            if is_block_device {
                sys::zero_range(file, start, count)
            } else {
                punch_hole(mapping, offset, len, || sys::punch_hole(file, start, count))
            }
        }
    }
}

/// Punches a hole in a file, after notifying the handlers of userfaultfd(2) of the mapping.
///
/// `fallocate(2)`, which `fallocate` calls, does not notify them. `MADV_REMOVE` notifies them and
/// then does the same. It is refused for locked memory, and before Linux 6.7 for protected memory.
/// `MADV_DONTNEED` notifies them as well, and leaves the pages in the file.
fn punch_hole(
    mapping: &Changes<'_>,
    offset: usize,
    len: usize,
    fallocate: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    match mapping.mapped().advise(offset, len, Advice::Remove) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) => {
            // Linux before 5.18 refuses this for locked memory and for huge pages.
            let _ = free_private_pages(mapping, offset, len);
            fallocate()
        }
        // A signal has interrupted it.
        Err(error) if error.raw_os_error() == Some(libc::EINTR) => fallocate(),
        result => result,
    }
}

/// Frees the private pages of a range, and unmaps those of a file from this process.
fn free_private_pages(mapping: &Changes<'_>, offset: usize, len: usize) -> io::Result<()> {
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
fn replace_with_zeroes(changes: &mut Changes<'_>, offset: usize, len: usize) -> io::Result<u64> {
    let end = offset.saturating_add(len);
    if changes.zeroed.contains(offset, end) {
        return free_private_pages(changes, offset, len).map(|()| to_u64(len));
    }
    let mapping = changes.mapping;
    let overwrite = || mapping.mapped().fill_zeroes(offset, len).map(|()| 0);
    if mapping.kind() == BackingKind::Hugetlb {
        return overwrite();
    }
    let splice = || splice_zeroes(mapping, offset, len);
    match changes.zeroed.replace(offset, end, splice) {
        None => overwrite(),
        Some(Ok(())) => Ok(to_u64(len)),
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

/// Maps zeroes over a range. They have all options of the mapping before the first access.
///
/// Locked memory is locked on fault, because unused zeroes need no page.
fn splice_zeroes(mapping: &HostMapping, offset: usize, len: usize) -> io::Result<()> {
    let (zeroes, locked) = Mapped::detached_zeroed(len)?;
    mapping
        .apply_advice_to(&zeroes, 0, len)
        .map_err(|(_, source)| source)?;
    match mapping.apply_numa_to(&zeroes, 0, len) {
        // The build has set the same policy. The cpuset of the process has lost its nodes since.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        result => result?,
    }
    if mapping.options.lock != Lock::No && !locked {
        zeroes.lock(0, len, true)?;
    }
    mapping.mapped().splice_over(offset, zeroes)
}
