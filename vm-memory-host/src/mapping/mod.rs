//! [`HostMapping`]: the memory of a region, with its backing and options.
//!
//! A vm-memory region keeps its `HostMapping` as owner, so every operation works on any map that
//! contains the region:
//!
//! ```text
//!   GuestMemoryMmap ── GuestRegionMmap ── MmapRegion ── owner: Arc<HostMapping>
//!                                             │                    │
//!                                             └── address ──► Mapped (unmaps when dropped)
//! ```

#[expect(
    unsafe_code,
    reason = "makes vm-memory regions over memory that the owner keeps mapped"
)]
mod guest_region;
#[cfg(target_os = "linux")]
mod linux;
mod parts;
#[cfg(windows)]
mod windows;

pub use guest_region::{provisioned, HostMapped};
pub(crate) use guest_region::{span_of, usable};
pub(crate) use parts::{parts, Part};
#[cfg(target_os = "linux")]
pub(crate) use system::FileRanges;
pub(crate) use system::{FileIdentity, OpenedBacking, PageState};

/// The state of a mapping that only this system has.
#[cfg(target_os = "linux")]
use linux as system;
#[cfg(windows)]
use windows as system;

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::listeners::RegionNotifier;
use vm_memory::mmap::{BlockStates, PluggedBlocks};
use vm_memory::GuestAddress;

use crate::region::{BackingKind, Blocks, Options, Span};
pub(crate) use crate::sys::to_u64;
use crate::sys::Mapped;

/// The memory of a region that this crate has built.
///
/// [`provisioned`] returns it for a region. It is unmapped when the last map that contains the
/// region is dropped.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
/// use vm_memory_host::{provisioned, BackingKind, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// let mapping = provisioned(memory.iter().next().ok_or("no region")?)?;
/// assert_eq!(mapping.kind(), BackingKind::Anonymous);
/// assert_eq!(mapping.page_size(), 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct HostMapping {
    pub(crate) id: MappingId,
    pub(crate) mapped: Mapped,
    pub(crate) start: GuestAddress,
    pub(crate) backing: OpenedBacking,
    pub(crate) options: Options,
    pub(crate) blocks: Option<(Blocks, Arc<PluggedBlocks>)>,
    /// The number of calls that have plugged unplugged blocks.
    pub(crate) plugs: AtomicU64,
    /// Tells memories with the region of changes of its pages. Its turn is taken before `changes`.
    pub(crate) notifier: Arc<RegionNotifier>,
    /// The state of the pages, and the lock that orders changes of the mapping.
    ///
    /// `discard`, `zero_range`, `plug` and `unplug` write-lock it, which serialises them.
    /// `prefault`, `content`, and `residency` on Windows read-lock it, so none of these runs
    /// meanwhile. Only [`lock_changes`](Self::lock_changes) and [`hold_blocks`](Self::hold_blocks)
    /// lock it.
    pub(crate) changes: RwLock<PageState>,
}

impl HostMapping {
    /// Returns the kind of memory.
    pub fn kind(&self) -> BackingKind {
        self.backing.kind
    }

    /// Returns the guest addresses that it was built for. A map may contain it at other addresses.
    pub fn span(&self) -> Span {
        Span {
            start: self.start.0,
            size: to_u64(self.mapped.len()),
        }
    }

    /// Returns the page size in bytes: the granularity of [`discard`](crate::discard()).
    pub fn page_size(&self) -> u64 {
        self.backing.page_size
    }

    /// Returns the host address of the first byte.
    ///
    /// It equals the guest address modulo the size of the largest page that the region, or an
    /// adjacent region of its build, can have:
    ///
    /// - For hugetlb, that is the size of its huge pages.
    /// - For other regions of at least a transparent huge page, it is that size, also on hosts
    ///   without transparent huge pages. The exception is
    ///   [`TransparentHugePages::Off`](crate::TransparentHugePages::Off).
    /// - Otherwise it is the size of an ordinary page.
    ///
    /// On Windows, this does not hold for files: their address is a multiple of 64 KiB plus the
    /// remainder of the offset.
    ///
    /// KVM can therefore map huge pages for the guest. For a file, its offset must also be equal to
    /// the guest address modulo that size. The builder chooses such an offset in a new memfd. For
    /// a [`Backing::File`](crate::Backing::File), the caller chooses it.
    ///
    /// # Examples
    ///
    /// A vhost-user front end sends this address and the file to its back end (vhost-user
    /// specification, "Memory region description"):
    ///
    /// ```
    /// use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    /// use vm_memory_host::{provisioned, Backing, MemoryBuilder, Region};
    ///
    /// let region = Region::new(GuestAddress(1 << 32), 16 << 20).backing(Backing::Memfd);
    /// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
    /// for region in memory.iter() {
    ///     let mapping = provisioned(region)?;
    ///     let span = mapping.span();
    ///     let (file, offset) = mapping.file().ok_or("other processes cannot map this")?;
    ///     println!(
    ///         "guest {:#x}, size {:#x}, user address {:#x}, mmap offset {offset:#x}, {file:?}",
    ///         span.start,
    ///         span.size,
    ///         mapping.host_address()
    ///     );
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "vhost-user")]
    pub fn host_address(&self) -> usize {
        self.mapped.host_address()
    }

    /// Returns the file, and the offset in bytes at which the region begins in it.
    ///
    /// Returns `None` for anonymous memory, and for large pages of Windows.
    pub fn file(&self) -> Option<(&File, u64)> {
        let file = self.backing.file.as_ref();
        file.map(|(file, offset)| (file.as_ref(), *offset))
    }

    /// Returns the options that the region was built with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Returns the record of plugged blocks, or `None` if the region has no blocks.
    ///
    /// Only [`plug`](crate::plug()) and [`unplug`](crate::unplug()) change it.
    pub fn plugged_blocks(&self) -> Option<&BlockStates> {
        self.blocks.as_ref().map(|(_, blocks)| &***blocks)
    }

    /// Returns the notifier, which tells listeners of plugs, unplugs and discards, and pins pages.
    ///
    /// A region type of a VMM returns it from `GuestMemoryRegion::notifier`.
    pub fn notifier(&self) -> &Arc<RegionNotifier> {
        &self.notifier
    }

    /// Returns whether a discard overwrites its huge pages, which stay with the region.
    pub(crate) fn keeps_huge_pages(&self) -> bool {
        let is_released = self.backing.is_shared() && self.options.release_huge_pages;
        self.kind() == BackingKind::Hugetlb && !is_released
    }

    pub(crate) fn id(&self) -> MappingId {
        self.id
    }

    /// Returns the number of calls that have plugged unplugged blocks.
    pub(crate) fn plugs(&self) -> u64 {
        // Relaxed: a guest uses a block after its device has acknowledged the plug. That orders the
        // plug before the guest's later requests, and a device calls this function for those.
        self.plugs.load(Ordering::Relaxed)
    }

    pub(crate) fn mapped(&self) -> &Mapped {
        &self.mapped
    }

    /// Locks the mapping for a change of its pages. Only the result can change them.
    ///
    /// Fails in a child of fork(2) before it locks. A thread of the parent may have held the lock,
    /// and the child's copy would then stay locked. Poisoning is ignored: no code panics while it
    /// holds this lock.
    pub(crate) fn lock_changes(&self) -> io::Result<Changes<'_>> {
        self.mapped.check_here()?;
        Ok(Changes {
            mapping: self,
            state: self.changes.write().unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// Keeps blocks from being plugged or unplugged.
    ///
    /// Fails in a child of fork(2) before it locks, as [`lock_changes`](Self::lock_changes) does.
    pub(crate) fn hold_blocks(&self) -> io::Result<RwLockReadGuard<'_, PageState>> {
        self.mapped.check_here()?;
        Ok(self.changes.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A number that no other mapping of this process has, or has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MappingId(u64);

impl MappingId {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: the numbers differ in any order.
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A mapping that is locked for a change of its pages, in the process that built it.
///
/// System calls that change the file of a mapping have no address that `Mapped` could check. The
/// functions that make them take this instead of a [`HostMapping`].
pub(crate) struct Changes<'a> {
    pub(crate) mapping: &'a HostMapping,
    #[cfg_attr(windows, expect(dead_code, reason = "locked until it is dropped"))]
    pub(crate) state: RwLockWriteGuard<'a, PageState>,
}

impl Deref for Changes<'_> {
    type Target = HostMapping;

    fn deref(&self) -> &HostMapping {
        self.mapping
    }
}

/// Returns the number of bytes of dropped regions that are still mapped.
///
/// Also counts addresses that a failed build or [`Arena::map`](crate::Arena::map) had to leave
/// reserved. This happens if the kernel lacks memory for its tables, or if huge pages exceed the
/// limit of locked memory after mlockall(2). If the process has `vm.max_map_count` VMAs, a build of
/// a region that can have huge pages also leaves up to the size of one. An
/// [`Arena`](crate::Arena) then leaves up to its alignment.
///
/// munmap(2) fails if it must split a VMA and the process has `vm.max_map_count` of them. A dropped
/// region that is adjacent to others can be a part of such a VMA. Its private pages are freed
/// nevertheless. Its addresses, and the reference to its file, stay until the adjacent regions are
/// dropped. Memory that is still mapped then stays mapped until the process ends.
///
/// The result is 0 unless one of these has happened. Makes no system call.
///
/// On Windows, it counts the addresses of private memory and of arenas that the system has refused
/// to release. It does not count files of regions.
///
/// # Examples
///
/// ```
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{still_mapped, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 1 << 20);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// drop(memory);
/// if still_mapped() != 0 {
///     eprintln!("raise vm.max_map_count: {} bytes are still mapped", still_mapped());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "munmap")]
#[doc(alias = "leak")]
pub fn still_mapped() -> u64 {
    crate::sys::still_mapped()
}

/// Returns the unplugged runs of a range, as offset and length.
pub(crate) fn unplugged_runs(
    record: &BlockStates,
    offset: usize,
    len: usize,
) -> Vec<(usize, usize)> {
    let end = offset.saturating_add(len);
    let (mut unplugged, mut at) = (Vec::new(), offset);
    for (start, run) in record.runs_in(offset, len) {
        if at < start {
            unplugged.push((at, start.saturating_sub(at)));
        }
        at = start.saturating_add(run);
    }
    if at < end {
        unplugged.push((at, end.saturating_sub(at)));
    }
    unplugged
}
