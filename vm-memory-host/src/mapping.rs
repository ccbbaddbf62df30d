//! [`HostMapping`]: what this crate knows of the memory behind a region.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::PluggedBlocks;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::error::{ChangeError, NotProvisioned};
use crate::machine::{Areas, Machine};
use crate::region::{Blocks, Lock, NumaPolicy, Options, Sharing, Span, TransparentHugePages};
use crate::sys::{Advice, Mapped, NodePolicy};

/// What a region's bytes are kept in, as it was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Private pages of this process.
    Anonymous,
    /// A memfd, or another file of tmpfs.
    Memfd,
    /// A file of hugetlbfs, or a memfd of huge pages.
    Hugetlb,
    /// A file on a disk, or a device.
    File,
}

/// The memory behind a region that this crate has built.
///
/// A region keeps it, and [`provisioned`] finds it. When the last map that has the region is dropped, its pages are given back.
#[derive(Debug)]
pub struct HostMapping {
    pub(crate) mapped: Mapped,
    pub(crate) start: GuestAddress,
    pub(crate) kind: Kind,
    pub(crate) file: Option<(Arc<File>, u64)>,
    pub(crate) sharing: Sharing,
    pub(crate) page_size: u64,
    pub(crate) options: Options,
    /// Whether its file has room for all of the region, or for all plugged blocks: its file system may have none later.
    pub(crate) allocated: bool,
    pub(crate) blocks: Option<(Blocks, Arc<PluggedBlocks>)>,
    /// Written while pages are given back or blocks change, so that one is over before the next begins; read while pages are brought in.
    pub(crate) changes: RwLock<Replaced>,
}

/// Ranges of the mapping of a private file in whose place pages of zeroes were mapped: where they begin, and where they end.
#[derive(Debug, Default)]
pub(crate) struct Replaced {
    ranges: BTreeMap<usize, usize>,
    /// The areas that these ranges and protected blocks can be.
    pub(crate) areas: Areas,
}

impl Replaced {
    /// Makes room for a range in what a process may have; false if there is none. Ranges that it joins with give theirs to it.
    pub(crate) fn has_room(&mut self, start: usize, end: usize) -> bool {
        // Each is an area, and so is what comes behind it.
        self.touching(start, end) != 0 || self.areas.take(2)
    }

    /// Adds a range, and joins it with what it touches.
    pub(crate) fn add(&mut self, start: usize, end: usize) {
        let (mut start, mut end) = (start, end);
        while let Some((&other, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
    }

    /// How many of them touch or overlap a range, which would join them.
    fn touching(&self, start: usize, end: usize) -> usize {
        let up_to = self.ranges.range(..=end).rev();
        up_to.take_while(|(_, other_end)| **other_end >= start).count()
    }

    /// Whether all of a range is in one of them.
    pub(crate) fn has(&self, start: usize, end: usize) -> bool {
        self.ranges
            .range(..=start)
            .next_back()
            .is_some_and(|(_, other_end)| *other_end >= end)
    }
}

/// Returns what is known of the memory behind a region.
///
/// # Errors
///
/// If this crate did not make it.
pub fn provisioned<B: Bitmap>(region: &GuestRegionMmap<B>) -> Result<&HostMapping, NotProvisioned> {
    let span = span_of(region);
    region.owner().ok_or(NotProvisioned { region: span })
}

impl HostMapping {
    /// Returns what its bytes are kept in.
    pub fn kind(&self) -> Kind {
        self.kind
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
        self.page_size
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
        self.file.as_ref().map(|(file, offset)| (file.as_ref(), *offset))
    }

    /// Returns what was asked for when it was built.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Returns its blocks, if it has some that come and go.
    pub fn plugged_blocks(&self) -> Option<&Arc<PluggedBlocks>> {
        self.blocks.as_ref().map(|(_, blocks)| blocks)
    }

    /// Whether what is written is seen by others.
    pub(crate) fn is_shared(&self) -> bool {
        self.file.is_some() && self.sharing == Sharing::Shared
    }

    pub(crate) fn mapped(&self) -> &Mapped {
        &self.mapped
    }

    /// To change blocks or give pages back. What panics while it holds this (nothing here does) has noted what it had done.
    pub(crate) fn change(&self) -> RwLockWriteGuard<'_, Replaced> {
        self.changes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// To keep blocks as they are.
    pub(crate) fn hold(&self) -> RwLockReadGuard<'_, Replaced> {
        self.changes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel all options of a part but locking: when the part is built, and again when it was replaced. The error comes with what could
    /// not be done.
    pub(crate) fn apply_options(&self, offset: usize, len: usize) -> Result<(), (&'static str, io::Error)> {
        let advise = |wanted: bool, advice: Advice, what: &'static str| match wanted {
            true => self
                .mapped
                .advise(offset, len, advice)
                .map_err(|error| (what, error)),
            false => Ok(()),
        };
        let huge = self.options.transparent_huge_pages;
        advise(
            huge == TransparentHugePages::On,
            Advice::HugePages,
            "have transparent huge pages",
        )?;
        // A kernel without them needs not be told.
        let some = Machine::here().transparent_huge_page().is_some();
        advise(
            huge == TransparentHugePages::Off && some,
            Advice::NoHugePages,
            "do without transparent huge pages",
        )?;
        advise(
            self.options.mergeable,
            Advice::Mergeable,
            "let equal pages be merged",
        )?;
        advise(
            !self.options.core_dump,
            Advice::NoDump,
            "be left out of core dumps",
        )?;
        advise(!self.options.forked, Advice::NoFork, "be kept from children")?;
        if let Some((policy, mask)) = node_mask(&self.options.numa) {
            let bound = self.mapped.bind(offset, len, policy, &mask);
            bound.map_err(|error| ("take pages from its NUMA nodes", error))?;
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
            Some(name) if self.file.is_none() => {
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

/// Where a region is in the map that has it.
pub(crate) fn span_of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Span {
    Span {
        start: region.start_addr().0,
        size: region.len(),
    }
}

/// A part of a range of guest memory that lies in one region.
pub(crate) struct Part<'a, B> {
    pub(crate) region: &'a GuestRegionMmap<B>,
    pub(crate) mapping: &'a HostMapping,
    /// Where it begins, in bytes from the start of the region.
    pub(crate) offset: usize,
    pub(crate) len: usize,
    /// How many bytes of the range come before it.
    pub(crate) before: u64,
}

/// The parts of `len` bytes at `addr`, if this crate has made the regions of all of them. `aligned` says what part of which mapping must be whole pages or blocks of
/// which size.
pub(crate) fn parts<'a, B, M>(
    memory: &'a M,
    addr: GuestAddress,
    len: u64,
    granularity: impl Fn(&GuestRegionMmap<B>, &HostMapping) -> Result<(&'static str, u64), ChangeError>,
) -> Result<Vec<Part<'a, B>>, ChangeError>
where
    B: Bitmap,
    M: GuestMemoryBackend<R = GuestRegionMmap<B>>,
{
    let past_top = ChangeError::PastTop { start: addr.0, len };
    if len
        .checked_sub(1)
        .is_some_and(|more| addr.0.checked_add(more).is_none())
    {
        return Err(past_top);
    }
    let (mut parts, mut before) = (Vec::new(), 0u64);
    while before < len {
        // Below 2^64, by the check above.
        let at = GuestAddress(addr.0.saturating_add(before));
        let hole = || ChangeError::Hole { addr: at.0 };
        let (region, offset) = memory.to_region_addr(at).ok_or_else(hole)?;
        let mapping = provisioned(region)?;
        let here = region
            .len()
            .saturating_sub(offset.0)
            .min(len.saturating_sub(before));
        let (what, granularity) = granularity(region, mapping)?;
        if !offset.0.is_multiple_of(granularity) || !here.is_multiple_of(granularity) || here == 0 {
            return Err(ChangeError::Unaligned {
                region: span_of(region),
                start: at.0,
                len: here,
                what,
                granularity,
            });
        }
        // Both are inside a mapping of this process.
        let whole = |n: u64| usize::try_from(n).map_err(|_| hole());
        parts.push(Part {
            region,
            mapping,
            offset: whole(offset.0)?,
            len: whole(here)?,
            before,
        });
        before = before.saturating_add(here);
    }
    Ok(parts)
}

impl<B: Bitmap> Part<'_, B> {
    /// The error of a call that the system refused for this part.
    pub(crate) fn refused(&self, what: &'static str, source: io::Error) -> ChangeError {
        ChangeError::System {
            region: span_of(self.region),
            what,
            start: self.start(),
            len: bytes(self.len),
            done: self.before,
            source,
        }
    }

    /// The guest physical address of its first byte.
    pub(crate) fn start(&self) -> u64 {
        self.region.start_addr().0.saturating_add(bytes(self.offset))
    }

    /// Marks its pages dirty: their bytes are others now.
    pub(crate) fn mark_dirty(&self) {
        self.region.bitmap().mark_dirty(self.offset, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        let mut replaced = Replaced::default();
        for (start, end) in [(10, 20), (40, 50), (30, 35), (20, 30)] {
            replaced.add(start, end);
        }
        assert_eq!(replaced.ranges.len(), 2);
        assert!(replaced.has(10, 35) && !replaced.has(10, 36) && !replaced.has(9, 11));
        assert_eq!(
            (
                replaced.touching(35, 40),
                replaced.touching(36, 39),
                replaced.touching(0, 100)
            ),
            (2, 0, 2)
        );
        // What joins takes nothing of what a process may have.
        assert!(replaced.has_room(35, 36) && replaced.areas == Areas::default());
        assert!(replaced.has_room(60, 70) && replaced.areas != Areas::default());
        replaced.add(0, 100);
        assert_eq!((replaced.ranges.len(), replaced.has(0, 100)), (1, true));
        replaced.add(20, 30);
        assert_eq!(replaced.ranges.len(), 1);
    }

    #[test]
    fn nodes_are_bits() {
        assert_eq!(node_mask(&NumaPolicy::Inherit), None);
        let bind = node_mask(&NumaPolicy::Bind(vec![0, 65])).unwrap();
        assert_eq!(bind, (NodePolicy::Bind, vec![1, 2]));
        assert_eq!(node_mask(&NumaPolicy::Preferred(3)).unwrap().1, [8]);
    }
}
