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

#[cfg(test)]
mod child_tests;
#[expect(
    unsafe_code,
    reason = "makes vm-memory regions over memory that the owner keeps mapped"
)]
mod guest_region;
mod opened_backing;
mod parts;
mod zeroed_ranges;

pub use guest_region::{provisioned, HostMapped};
pub(crate) use guest_region::{span_of, usable};
pub(crate) use opened_backing::{FileIdentity, OpenedBacking};
pub(crate) use parts::{parts, Part};
pub(crate) use zeroed_ranges::ZeroedRanges;

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::mmap::{BlockStates, PluggedBlocks};
use vm_memory::GuestAddress;

use crate::host::VmaBudget;
use crate::region::{BackingKind, Blocks, Lock, NumaPolicy, Options, Span, TransparentHugePages};
pub(crate) use crate::sys::to_u64;
use crate::sys::{Advice, Mapped, NodePolicy};

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
    /// The zeroed ranges, and the lock that orders changes of the mapping.
    ///
    /// `discard`, `plug` and `unplug` write-lock it, which serialises them. `prefault` read-locks
    /// it, so that blocks do not change meanwhile. Only [`lock_changes`](Self::lock_changes) and
    /// [`hold_blocks`](Self::hold_blocks) lock it.
    pub(crate) changes: RwLock<ZeroedRanges>,
    /// The VMAs of the reservation, whose regions share it: one for each region, and the guards.
    pub(crate) _run_vmas: Arc<VmaBudget>,
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
    /// Returns `None` for anonymous memory.
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
        // plug before the guest's later requests, of which a device calls this function.
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
            zeroed: self.changes.write().unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// Keeps blocks from being plugged or unplugged.
    ///
    /// Fails in a child of fork(2) before it locks, as [`lock_changes`](Self::lock_changes) does.
    pub(crate) fn hold_blocks(&self) -> io::Result<RwLockReadGuard<'_, ZeroedRanges>> {
        self.mapped.check_here()?;
        Ok(self.changes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Applies all options except locking and the name to a range. An error names the operation.
    pub(crate) fn apply_options(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        self.apply_advice_to(&self.mapped, offset, len)?;
        let bound = self.apply_numa_to(&self.mapped, offset, len);
        bound.map_err(|error| ("set its NUMA policy", error))
    }

    /// Applies the same advice to a range of `memory`, which will become a part of this mapping.
    pub(crate) fn apply_advice_to(
        &self,
        memory: &Mapped,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        let options = &self.options;
        let all_advice = [
            (
                options.transparent_huge_pages == TransparentHugePages::On,
                Advice::HugePages,
                "enable transparent huge pages",
            ),
            (
                options.transparent_huge_pages == TransparentHugePages::Off,
                Advice::NoHugePages,
                "disable transparent huge pages",
            ),
            (
                options.mergeable,
                Advice::Mergeable,
                "enable merging of its pages",
            ),
            (
                !options.core_dump,
                Advice::NoDump,
                "exclude it from core dumps",
            ),
            (
                !options.forked,
                Advice::NoFork,
                "exclude it from child processes",
            ),
        ];
        for (_, advice, what) in all_advice.into_iter().filter(|(wanted, ..)| *wanted) {
            match memory.advise(offset, len, advice) {
                // The kernel has no transparent huge pages. A jail without /sys cannot find out.
                Err(error)
                    if advice == Advice::NoHugePages
                        && error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result.map_err(|error| (what, error))?,
            }
        }
        Ok(())
    }

    /// Applies the NUMA policy of this mapping to a range of `memory`.
    pub(crate) fn apply_numa_to(
        &self,
        memory: &Mapped,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        match node_mask(&self.options.numa)? {
            Some((policy, mask)) => memory.bind(offset, len, policy, &mask),
            None => Ok(()),
        }
    }

    /// Locks a range in memory.
    ///
    /// The kernel does not swap huge pages. `MLOCK_ONFAULT` would populate them instead, also in
    /// unplugged blocks.
    pub(crate) fn apply_lock(&self, offset: usize, len: usize, lock: Lock) -> io::Result<()> {
        match lock {
            Lock::No => Ok(()),
            Lock::OnFault if self.kind() == BackingKind::Hugetlb => Ok(()),
            Lock::Now => self.mapped.lock(offset, len, false),
            Lock::OnFault => self.mapped.lock(offset, len, true),
        }
    }

    /// Names a range in /proc/self/maps, unless the kernel shows its file there.
    pub(crate) fn apply_name(&self, offset: usize, len: usize) -> io::Result<()> {
        match &self.options.name {
            Some(name) if self.backing.file.is_none() => {
                let name = std::ffi::CString::new(name.as_str())?;
                self.mapped.set_name(offset, len, &name)
            }
            _ => Ok(()),
        }
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
    pub(crate) zeroed: RwLockWriteGuard<'a, ZeroedRanges>,
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
/// limit of locked memory after mlockall(2).
///
/// munmap(2) fails if it must split a VMA and the process has `vm.max_map_count` of them. A dropped
/// region that is adjacent to others can be a part of such a VMA. Its private pages are freed
/// nevertheless. Its addresses, and the reference to its file, stay until the adjacent regions are
/// dropped. Memory that is still mapped then stays mapped until the process ends.
///
/// The result is 0 in a process that is not at this limit. Makes no system call.
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

/// The number of nodes that a mask can have. mbind(2) refuses a mask of more than a page.
const MAX_NODES: u32 = 8 * 4096;

/// Returns the kernel's policy and a mask of nodes, or `None` for [`NumaPolicy::Inherit`].
///
/// Fails with `EINVAL` for a node that no kernel has. Without /sys and /proc, the builder does not
/// know the nodes, and an untrusted description may name any.
fn node_mask(policy: &NumaPolicy) -> io::Result<Option<(NodePolicy, Vec<u64>)>> {
    let (policy, nodes) = match policy {
        NumaPolicy::Inherit => return Ok(None),
        NumaPolicy::Bind(nodes) => (NodePolicy::Bind, nodes.as_slice()),
        NumaPolicy::Preferred(node) => (NodePolicy::Preferred, std::slice::from_ref(node)),
        NumaPolicy::Interleave(nodes) => (NodePolicy::Interleave, nodes.as_slice()),
    };
    let mut mask: Vec<u64> = Vec::new();
    for node in nodes {
        if *node >= MAX_NODES {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let word = usize::try_from(node / 64).unwrap_or(0);
        if mask.len() <= word {
            mask.resize(word.saturating_add(1), 0);
        }
        if let Some(bits) = mask.get_mut(word) {
            *bits |= 1u64 << (node % 64);
        }
    }
    Ok(Some((policy, mask)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_mask_has_a_bit_for_each_node() {
        let mask = |policy| node_mask(&policy).unwrap();
        assert_eq!(mask(NumaPolicy::Inherit), None);
        let bind = mask(NumaPolicy::Bind(vec![0, 65]));
        assert_eq!(bind, Some((NodePolicy::Bind, vec![1, 2])));
        let preferred = mask(NumaPolicy::Preferred(3));
        assert_eq!(preferred, Some((NodePolicy::Preferred, vec![8])));
    }

    #[test]
    fn node_mask_of_node_above_all_kernels_returns_error() {
        for node in [MAX_NODES, u32::MAX] {
            let error = node_mask(&NumaPolicy::Interleave(vec![0, node])).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
        let last = node_mask(&NumaPolicy::Preferred(MAX_NODES - 1)).unwrap();
        assert_eq!(last.unwrap().1.len(), 512);
    }
}
