//! Frees pages, or overwrites them where they cannot be freed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use super::usage::mincore_bytes;
use crate::mapping::{to_u64, unplugged_runs, Changes, HostMapping};
use crate::region::{BackingKind, Lock, Sharing};
use crate::sys::{self, Advice, Mapped};

/// Discards whole pages of a mapping, and returns the number of bytes freed.
pub(in crate::operations) fn discard_part(
    mapping: &HostMapping,
    offset: usize,
    len: usize,
) -> io::Result<u64> {
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
    let overwritten = mapping.mapped().fill_zeroes(offset, len);
    overwritten.map(|()| 0).map_err(|_| refused)
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
        let is_reserved = !changes.state.released.contains(&at);
        let exists = is_reserved
            && sys::allocate_range(file, start.saturating_add(to_u64(at)), to_u64(page)).is_ok();
        free_pages(changes, at, page)?;
        if exists {
            changes.state.released.insert(at);
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
pub(super) fn free_pages(mapping: &Changes<'_>, offset: usize, len: usize) -> io::Result<()> {
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
///
/// It also removes the entry that a memory error leaves in the page table. `MADV_REMOVE` does not:
/// the page would stay inaccessible.
fn punch_hole(
    mapping: &Changes<'_>,
    offset: usize,
    len: usize,
    fallocate: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    match mapping.mapped().advise(offset, len, Advice::Remove) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) => {
            // Notifies the handlers. Linux before 5.18 refuses it for locked memory, too.
            let _ = free_private_pages(mapping, offset, len);
            fallocate()
        }
        // A signal has interrupted it.
        Err(error) if error.raw_os_error() == Some(libc::EINTR) => fallocate(),
        result => result,
    }?;
    // Linux before 5.18 refuses this for huge pages.
    let _ = free_private_pages(mapping, offset, len);
    Ok(())
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
    if changes.state.contains(offset, end) {
        return free_private_pages(changes, offset, len).map(|()| to_u64(len));
    }
    let mapping = changes.mapping;
    let overwrite = || mapping.mapped().fill_zeroes(offset, len).map(|()| 0);
    if mapping.kind() == BackingKind::Hugetlb {
        return overwrite();
    }
    let splice = || splice_zeroes(mapping, offset, len);
    match changes.state.replace(offset, end, splice) {
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
