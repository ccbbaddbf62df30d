//! [`HostMapping`]: what this crate knows of the memory behind a region.

#[expect(
    unsafe_code,
    reason = "makes regions of vm-memory over memory that it keeps mapped"
)]
mod guest_region;
mod parts;
mod zeroed_ranges;

pub use guest_region::provisioned;
pub(crate) use guest_region::span_of;
pub(crate) use parts::{parts, Part};
pub(crate) use zeroed_ranges::ZeroedRanges;

use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::mmap::PluggedBlocks;
use vm_memory::GuestAddress;

use crate::backing::OpenedBacking;
use crate::region::{BackingKind, Blocks, Lock, NumaPolicy, Options, Span, TransparentHugePages};
use crate::resources::HostResources;
use crate::sys::{Advice, Mapped, NodePolicy};

/// The memory behind a region that this crate has built.
///
/// A region keeps it, and [`provisioned`] finds it. When the last map that has the region is dropped, its pages are given back (`munmap`, or `madvise`,
/// `munlock`, `mmap` and `munmap` while regions that were built next to it are there).
#[derive(Debug)]
pub struct HostMapping {
    pub(crate) mapped: Mapped,
    pub(crate) start: GuestAddress,
    pub(crate) backing: OpenedBacking,
    pub(crate) options: Options,
    pub(crate) blocks: Option<(Blocks, Arc<PluggedBlocks>)>,
    /// Written while pages are given back or blocks change, so that one is over before the next begins; read while pages are brought in.
    pub(crate) changes: RwLock<ZeroedRanges>,
}

impl HostMapping {
    /// Returns what its bytes are kept in.
    pub fn kind(&self) -> BackingKind {
        self.backing.kind
    }

    /// Returns where in the guest's memory it was built to be. A map may have it elsewhere.
    pub fn span(&self) -> Span {
        Span {
            start: self.start.0,
            size: bytes(self.mapped.len()),
        }
    }

    /// Returns the size of its pages in bytes: pages are given back and blocks are plugged in multiples of this.
    pub fn page_size(&self) -> u64 {
        self.backing.page_size
    }

    /// Returns its address in this process. It leaves the same rest as the guest's address when divided by the size of a huge page, so that KVM can
    /// map huge pages for the guest.
    ///
    /// A vhost-user front end tells its back end of each region where it is here, and with which descriptor it can be mapped (vhost-user specification,
    /// section "Memory region description"):
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
    ///     let (file, offset) = mapping.file().ok_or("no other process can map this")?;
    ///     println!(
    ///         "guest address {:#x}, size {:#x}, user address {:#x}, mmap offset {offset:#x} of {file:?}",
    ///         span.start,
    ///         span.size,
    ///         mapping.host_address()
    ///     );
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn host_address(&self) -> usize {
        self.mapped.host_address()
    }

    /// Returns its file, and where in the file it begins, in bytes.
    pub fn file(&self) -> Option<(&File, u64)> {
        self.backing
            .file
            .as_ref()
            .map(|(file, offset)| (file.as_ref(), *offset))
    }

    /// Returns what was asked for when it was built.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Returns its blocks, if it has some that come and go.
    pub fn plugged_blocks(&self) -> Option<&Arc<PluggedBlocks>> {
        self.blocks.as_ref().map(|(_, blocks)| blocks)
    }

    pub(crate) fn mapped(&self) -> &Mapped {
        &self.mapped
    }

    /// To change blocks or give pages back. What panics while it holds this (nothing here does) has noted what it had done.
    pub(crate) fn lock_changes(&self) -> RwLockWriteGuard<'_, ZeroedRanges> {
        self.changes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// To keep blocks as they are.
    pub(crate) fn hold_blocks(&self) -> RwLockReadGuard<'_, ZeroedRanges> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel all options of a part but locking. The error comes with what could not be done.
    pub(crate) fn apply_options(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        self.apply_options_to(&self.mapped, offset, len)
    }

    /// Tells the kernel the same of a part of other memory, which is to be a part of this.
    pub(crate) fn apply_options_to(
        &self,
        memory: &Mapped,
        offset: usize,
        len: usize,
    ) -> Result<(), (&'static str, io::Error)> {
        let advise = |wanted: bool, advice: Advice, what: &'static str| match wanted {
            true => memory
                .advise(offset, len, advice)
                .map_err(|error| (what, error)),
            false => Ok(()),
        };
        let huge = self.options.transparent_huge_pages;
        advise(
            huge == TransparentHugePages::On,
            Advice::HugePages,
            "enable transparent huge pages",
        )?;
        // A kernel without them needs not be told.
        let some = HostResources::current().transparent_huge_page().is_some();
        advise(
            huge == TransparentHugePages::Off && some,
            Advice::NoHugePages,
            "disable transparent huge pages",
        )?;
        advise(
            self.options.mergeable,
            Advice::Mergeable,
            "enable merging of its pages",
        )?;
        advise(
            !self.options.core_dump,
            Advice::NoDump,
            "exclude it from core dumps",
        )?;
        advise(
            !self.options.forked,
            Advice::NoFork,
            "exclude it from child processes",
        )?;
        if let Some((policy, mask)) = node_mask(&self.options.numa) {
            let bound = memory.bind(offset, len, policy, &mask);
            bound.map_err(|error| ("set its NUMA policy", error))?;
        }
        Ok(())
    }

    /// Locks a part, as its options say.
    pub(crate) fn apply_lock(&self, offset: usize, len: usize, lock: Lock) -> io::Result<()> {
        match lock {
            Lock::No => Ok(()),
            Lock::Now => self.mapped.lock(offset, len, false),
            Lock::OnFault => self.mapped.lock(offset, len, true),
        }
    }

    /// Names a part in /proc/self/maps, where the kernel has no other name for it.
    pub(crate) fn apply_name(&self, offset: usize, len: usize) -> io::Result<()> {
        match &self.options.name {
            Some(name) if self.backing.file.is_none() => {
                let name = std::ffi::CString::new(name.as_str())?;
                self.mapped.name(offset, len, &name)
            }
            _ => Ok(()),
        }
    }
}

/// The policy of the kernel, and a bit for each node; nothing if the process's own holds.
pub(crate) fn node_mask(policy: &NumaPolicy) -> Option<(NodePolicy, Vec<u64>)> {
    let (policy, nodes) = match policy {
        NumaPolicy::Inherit => return None,
        NumaPolicy::Bind(nodes) => (NodePolicy::Bind, nodes.as_slice()),
        NumaPolicy::Preferred(node) => (NodePolicy::Preferred, std::slice::from_ref(node)),
        NumaPolicy::Interleave(nodes) => (NodePolicy::Interleave, nodes.as_slice()),
    };
    let mut mask: Vec<u64> = Vec::new();
    for node in nodes {
        // Nodes have been looked up among those that there are: a few thousand at most.
        let word = usize::try_from(node / 64).unwrap_or(0);
        if mask.len() <= word {
            mask.resize(word.saturating_add(1), 0);
        }
        if let Some(bits) = mask.get_mut(word) {
            *bits |= 1u64 << (node % 64);
        }
    }
    Some((policy, mask))
}

/// A number of bytes of this process, as the kernel and the guest count: no `usize` is wider than 64 bits on any target.
pub(crate) fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_bits() {
        assert_eq!(node_mask(&NumaPolicy::Inherit), None);
        let bind = node_mask(&NumaPolicy::Bind(vec![0, 65])).unwrap();
        assert_eq!(bind, (NodePolicy::Bind, vec![1, 2]));
        assert_eq!(node_mask(&NumaPolicy::Preferred(3)).unwrap().1, [8]);
    }
}
