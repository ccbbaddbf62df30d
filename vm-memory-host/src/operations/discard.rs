//! [`discard`]: returns pages to the system.

use vm_memory::listeners::ChangeKind;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::system::discard_part;
use crate::error::ChangeError;
use crate::mapping::{parts, span_of, to_u64, HostMapped, HostMapping, Part};

/// Returns the pages of a range of guest memory to the system. They then read as zeroes.
///
/// Use it for free page reporting (virtio 1.2, section 5.5.6.7), or for other memory that the guest
/// no longer needs. A balloon lists single pages: use [`discard_pages`](crate::discard_pages) or
/// [`Balloon`](crate::Balloon).
///
/// On Linux, the method depends on the backing, as listed here. [Windows](#windows) has others.
///
/// | backing | method | effect |
/// |---|---|---|
/// | anonymous | `madvise(MADV_DONTNEED)` | pages are freed |
/// | memfd, [sparse] shared file | `MADV_REMOVE`, `MADV_DONTNEED` | freed for all processes |
/// | shared file on a disk | `fallocate(FALLOC_FL_ZERO_RANGE)` | pages are freed, disk space stays |
/// | shared file on a tmpfs with a size limit | writes zeroes | nothing is freed |
/// | block device | `fallocate(FALLOC_FL_ZERO_RANGE)` | the device stores zeroes |
/// | character device | writes zeroes | nothing is freed |
/// | hugetlb | writes zeroes | pages stay with the region |
/// | hugetlb, [`release_huge_pages`] | `MADV_REMOVE`, `MADV_DONTNEED` | pages return to the pool |
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
/// Pages that are overwritten are populated by the kernel first, for which it asks no handler that
/// is open with `UFFD_USER_MODE_ONLY`. The call then returns `EFAULT`, unless
/// [`vm_memory::fault::install`] was called.
///
/// Dropping a region that is adjacent to another one also sends an event. The handler must run
/// until the drop, or its descriptor must be closed before.
///
/// # Windows
///
/// Anonymous memory is decommitted and committed again, up to 2 MiB at a time, and an access
/// meanwhile returns an error. If the system refuses to commit these pages, they stay inaccessible
/// until another discard of them succeeds. Large pages, files and locked memory are overwritten,
/// and so is all memory of a process without the [fault handler](vm_memory::fault). The front page
/// lists [what devices must observe](crate#windows).
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
/// Returns [`ChangeError::System`] if the system refuses a call, and [`ChangeError::Listener`] if a
/// listener refuses the discard or pages are pinned. Earlier regions of the range stay discarded.
///
/// The same error means that a page to overwrite is not available. For example, another process
/// has truncated the file, or has removed the page and the file system is full. Before Linux 5.14,
/// or if this happens during the call, the error needs the [fault handler](vm_memory::fault).
/// Without it, SIGBUS ends the process.
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
    let mut told = part.begin()?;
    let whole = [(to_u64(part.offset), to_u64(part.len))];
    let announced = told
        .check_unpinned(ChangeKind::Discarded, &whole)
        .and_then(|()| told.announce(ChangeKind::Discarded, &part.accessible_runs()));
    announced.map_err(|source| part.refused_by_listener(source))?;
    let result = discard_part(part.mapping, part.offset, part.len);
    // Even after an error: some of its bytes may have changed.
    part.mark_dirty();
    result.map_err(|source| part.refused("discard", source))
}
