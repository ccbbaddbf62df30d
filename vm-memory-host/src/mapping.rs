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
/// A region keeps it, and [`provisioned`] finds it. When the last map that has the region is dropped, its pages are given back (`munmap`, or `madvise`,
/// `munlock`, `mmap` and `munmap` while regions that were built next to it are there).
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

/// Ranges of the mapping of a private file in whose place pages of zeroes were mapped, by where they begin.
///
/// How many areas of addresses the kernel keeps for them is up to what the guest does with its pages, and is not asked for: what is counted is what it can
/// be at most. What is put in its place untouched (`Mapped::put`) becomes one with a range that it touches, whatever has been done to that; two ranges
/// that it touches may have pages each of its own, and stay apart. All ranges of a mapping have the same options.
#[derive(Debug, Default)]
pub(crate) struct Replaced {
    ranges: BTreeMap<usize, Range>,
    /// The areas that these ranges and protected blocks can be.
    pub(crate) areas: Areas,
}

/// A range of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    /// Where it ends.
    end: usize,
    /// How many areas it can be.
    pieces: usize,
}

impl Range {
    /// The areas that it can be, and what comes behind it.
    fn areas(self) -> usize {
        self.pieces.saturating_add(1)
    }
}

impl Replaced {
    /// Puts zeroes in a range by `put`, if a process may have so many areas; nothing is done if it may not. A range that is [in one](Self::has) must not be
    /// put there again.
    pub(crate) fn replace<E>(
        &mut self,
        start: usize,
        end: usize,
        put: impl FnOnce() -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        // Those that it touches or overlaps become one with it.
        let up_to = self.ranges.range(..=end).rev();
        let touched: Vec<(usize, Range)> = up_to
            .take_while(|(_, range)| range.end >= start)
            .map(|(&at, &range)| (at, range))
            .collect();
        let (mut from, mut to, mut pieces, mut before) = (start, end, 0usize, 0usize);
        for (at, range) in &touched {
            before = before.saturating_add(range.areas());
            // Of those that it covers nothing stays.
            if *at < start || range.end > end {
                pieces = pieces.saturating_add(range.pieces);
            }
            from = from.min(*at);
            to = to.max(range.end);
        }
        let joined = Range {
            end: to,
            pieces: pieces.max(1),
        };
        let more = joined.areas().saturating_sub(before);
        if !self.areas.take(more) {
            return None;
        }
        let answer = put();
        if answer.is_err() {
            self.areas.release(more);
            return Some(answer);
        }
        for (at, _) in &touched {
            self.ranges.remove(at);
        }
        self.ranges.insert(from, joined);
        self.areas.release(before.saturating_sub(joined.areas()));
        Some(answer)
    }

    /// Whether all of a range is in one of them.
    pub(crate) fn has(&self, start: usize, end: usize) -> bool {
        self.ranges
            .range(..=start)
            .next_back()
            .is_some_and(|(_, range)| range.end >= end)
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
        self.file
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
        advise(
            !self.options.forked,
            Advice::NoFork,
            "be kept from children",
        )?;
        if let Some((policy, mask)) = node_mask(&self.options.numa) {
            let bound = memory.bind(offset, len, policy, &mask);
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
        self.region
            .start_addr()
            .0
            .saturating_add(bytes(self.offset))
    }

    /// Marks its pages dirty: their bytes are others now.
    pub(crate) fn mark_dirty(&self) {
        self.region.bitmap().mark_dirty(self.offset, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(replaced: &mut Replaced, start: usize, end: usize) -> usize {
        assert_eq!(
            replaced.replace(start, end, || Ok::<(), ()>(())),
            Some(Ok(()))
        );
        replaced.areas.count()
    }

    #[test]
    fn ranges_that_touch_are_one() {
        let mut replaced = Replaced::default();
        assert_eq!(put(&mut replaced, 10, 20), 2);
        assert_eq!(put(&mut replaced, 40, 50), 4);
        assert_eq!(put(&mut replaced, 30, 35), 6);
        // What touches two leaves their areas apart, and takes the one between them.
        assert_eq!(put(&mut replaced, 20, 30), 5);
        assert_eq!(replaced.ranges.len(), 2);
        assert!(replaced.has(10, 35) && !replaced.has(10, 36) && !replaced.has(9, 11));
        // What touches one takes nothing of what a process may have.
        assert_eq!(put(&mut replaced, 35, 36), 5);
        assert_eq!(put(&mut replaced, 9, 12), 5);
        // What is covered is nothing any more, and what is covered in part may be all that it was.
        assert_eq!(put(&mut replaced, 30, 60), 3);
        assert_eq!(put(&mut replaced, 0, 100), 2);
        assert_eq!((replaced.ranges.len(), replaced.has(0, 100)), (1, true));
    }

    #[test]
    fn what_is_refused_takes_no_areas() {
        let mut replaced = Replaced::default();
        assert_eq!(replaced.replace(10, 20, || Err(())), Some(Err(())));
        assert_eq!((replaced.ranges.len(), replaced.areas.count()), (0, 0));
        put(&mut replaced, 10, 20);
        assert_eq!(replaced.replace(15, 30, || Err(())), Some(Err(())));
        assert!(replaced.has(10, 20) && !replaced.has(10, 30) && replaced.areas.count() == 2);
    }

    /// Whatever a guest gives back and writes to, and in whatever order: the kernel keeps no more areas for it than are counted.
    #[test]
    fn areas_are_never_more_than_are_counted() {
        const PAGES: u64 = 64;
        const PAGE: u64 = 4096;
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut most = 0;
        for _ in 0..40 {
            let backing = crate::Backing::private_file(file.try_clone().unwrap(), 0);
            let region = crate::Region::new(GuestAddress(0), PAGES * PAGE).backing(backing);
            let memory: vm_memory::GuestMemoryMmap =
                crate::MemoryBuilder::new().region(region).build().unwrap();
            let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
            let first = mapping.host_address();
            let inside = first..first + mapping.mapped().len();
            for _ in 0..80 {
                let page = random(PAGES);
                let len = match random(4) {
                    0 => 1 + random(PAGES - page),
                    _ => 1,
                };
                crate::discard(&memory, GuestAddress(page * PAGE), len * PAGE).unwrap();
                if random(2) == 0 {
                    let touched = GuestAddress(random(PAGES) * PAGE);
                    vm_memory::Bytes::write_obj(&memory, 1u8, touched).unwrap();
                    vm_memory::Bytes::write_obj(&memory, 1u8, GuestAddress(page * PAGE)).unwrap();
                }
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let starts = maps.lines().filter_map(|line| line.split_once('-'));
                let starts = starts.filter_map(|(start, _)| usize::from_str_radix(start, 16).ok());
                let areas = starts.filter(|start| inside.contains(start)).count();
                let counted = mapping.hold().areas.count();
                assert!(areas <= counted + 1, "{areas} areas, {counted} are counted");
                most = most.max(areas);
            }
        }
        assert!(most > 10, "{most}");
    }

    #[test]
    fn nodes_are_bits() {
        assert_eq!(node_mask(&NumaPolicy::Inherit), None);
        let bind = node_mask(&NumaPolicy::Bind(vec![0, 65])).unwrap();
        assert_eq!(bind, (NodePolicy::Bind, vec![1, 2]));
        assert_eq!(node_mask(&NumaPolicy::Preferred(3)).unwrap().1, [8]);
    }
}
