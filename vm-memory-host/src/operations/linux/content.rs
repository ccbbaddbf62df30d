//! [`content`]: finds the parts of guest memory that have content.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::GuestMemoryBackend;

use super::pages::{reads_as_zeroes, READ_LEN};
use crate::error::{NotProvisioned, OtherProcess};
use crate::mapping::{provisioned, span_of, to_u64, unplugged_runs, HostMapped, HostMapping};
use crate::operations::ResidencyError;
use crate::region::{BackingKind, Sharing, Span};
use crate::sys;

/// Returns the ranges of guest memory that have content, in ascending order.
///
/// Use it to save a guest, or for the first round of a migration: other pages are zeroes and need
/// not be read. Reading them would also populate them.
///
/// - A page with content is never left out.
/// - A range can include pages of zeroes. They were only read, are parts of a larger page, or were
///   discarded during the iteration or by writing zeroes.
/// - A region counts as a whole if its parts are not known. Examples are a device, and all regions
///   in a jail without /proc. Another example is a private mapping of a file that has huge pages.
///   On file systems other than tmpfs, ext4, XFS and Btrfs, files also count as a whole. Their
///   `SEEK_DATA` may leave out pages that are not written back yet. So do some of many regions of
///   one file, if the order of their offsets in the file is not that of their addresses.
/// - Unplugged blocks are left out.
/// - Pages that a userfaultfd handler has not filled are left out.
///
/// Ranges consist of whole pages. They are disjoint, and none is adjacent to another one of its
/// region. Pages that are written during the iteration may be missed: start dirty tracking first.
/// The iterator uses less than 1 MiB of memory, whatever the size of the guest.
///
/// The method depends on the backing: `pagemap` of proc(5) for anonymous memory, `SEEK_DATA` of
/// lseek(2) for shared files, and both for private files. The file is opened again, so that its
/// position does not change. hugetlbfs has no `SEEK_DATA`: shared huge pages that this process has
/// not mapped are read from the file, unless the file has no pages. This populates no page.
///
/// For a shared file, the iterator may [wait for another process](crate::Backing::Memfd) that has
/// it.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// use vm_memory_host::{content, Backing, MemoryBuilder, Region};
///
/// let region = Region::new(GuestAddress(0), 64 << 20).backing(Backing::Memfd);
/// let memory: GuestMemoryMmap = MemoryBuilder::new().region(region).build()?;
/// memory.write_obj(7u8, GuestAddress(0x3000))?;
/// let ranges = content(&memory)?.collect::<Result<Vec<_>, _>>()?;
/// assert_eq!((ranges[0].start, ranges[0].size), (0x3000, 0x1000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// Returns [`NotProvisioned`] if a region was not built by this crate. An item is an error if the
/// parent process built the region, or if a system call fails. No item follows an error.
#[doc(alias = "SEEK_DATA")]
#[doc(alias = "pagemap")]
#[doc(alias = "sparse")]
pub fn content<M>(memory: &M) -> Result<Content<'_>, NotProvisioned>
where
    M: GuestMemoryBackend,
    M::R: HostMapped,
{
    let known = |region| Ok((span_of(region), provisioned(region)?));
    let regions = memory.iter().map(known);
    let regions: VecDeque<_> = regions.collect::<Result<_, NotProvisioned>>()?;
    Ok(Content {
        regions,
        source: None,
        walks: BTreeMap::new(),
        next: 0,
        ready: VecDeque::new(),
    })
}

/// The number of bytes that are examined at a time.
const WINDOW: usize = 64 << 20;

/// An iterator over the ranges that have content. Returned by [`content`].
#[derive(Debug)]
#[must_use = "iterators do nothing unless they are consumed"]
pub struct Content<'a> {
    /// The regions that are not finished.
    regions: VecDeque<(Span, &'a HostMapping)>,
    /// The sources for the first of these regions, or `None` before its first window.
    source: Option<ContentSource>,
    /// The walks over the files of all regions so far, by [`FileId`].
    walks: BTreeMap<FileId, Walk>,
    /// The offset in the first region at which the next window begins.
    next: usize,
    /// Ranges of the first region. The last one may grow while the region is not finished.
    ready: VecDeque<Span>,
}

/// The sources of information about which pages of a region have content.
#[derive(Debug)]
struct ContentSource {
    /// Whether all pages count.
    all: bool,
    /// The region's file, if its data counts.
    file: Option<(FileId, File)>,
    /// /proc/thread-self/pagemap, if pages of this process count.
    pagemap: Option<File>,
    /// Whether the pages that mincore(2) reports also count.
    in_core: bool,
    /// Whether all other pages of the file are read, and count if they are not zeroes.
    reads: bool,
}

/// The device and the number of a file.
type FileId = (u64, u64);

/// A walk over the data of a file, for all regions of the file in turn.
///
/// lseek(2) takes a time in proportion to the pages up to the place that it finds. This place can
/// be many windows and regions ahead. If each of them looked for it again, a file would take
/// quadratic time.
#[derive(Debug, Default)]
struct Walk {
    /// The offset from which the last call looked for data.
    from: u64,
    /// The data that it found, which is the first one at `from` or after it.
    data: Range<u64>,
    /// The number of bytes that all calls have passed.
    passed: u64,
}

/// The number of times that all of a file may be passed, by regions that go back in it.
const MOST_PASSES: u64 = 32;

impl Walk {
    /// Returns the first data of a file at `at`, or after it.
    ///
    /// Returns `None` if looking for it would take too long.
    fn data_after(&mut self, file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
        if !(self.from..self.data.end).contains(&at) {
            let len = file.metadata()?.len();
            if self.passed > len.saturating_mul(MOST_PASSES) {
                return Ok(None);
            }
            (self.from, self.data) = (at, sys::next_data(file, at));
            let passed = self.data.end.min(len).saturating_sub(at);
            self.passed = self.passed.saturating_add(passed);
        }
        Ok(Some(self.data.start.max(at)..self.data.end))
    }
}

impl Iterator for Content<'_> {
    type Item = Result<Span, ResidencyError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.ready.len() > 1 {
                return self.ready.pop_front().map(Ok);
            }
            let Some(&(span, mapping)) = self.regions.front() else {
                return self.ready.pop_front().map(Ok);
            };
            if self.next >= mapping.mapped().len() {
                self.regions.pop_front();
                (self.source, self.next) = (None, 0);
                if let Some(last) = self.ready.pop_front() {
                    return Some(Ok(last));
                }
            } else if let Err(source) = self.examine(span, mapping) {
                self.regions.clear();
                self.ready.clear();
                let region = span;
                // A child of fork(2) can also have been created since the previous item.
                let error = match mapping.mapped().check_here() {
                    Ok(()) => ResidencyError::System { region, source },
                    Err(_) => OtherProcess { region }.into(),
                };
                return Some(Err(error));
            }
        }
    }
}

impl Content<'_> {
    /// Examines the next window of a region.
    fn examine(&mut self, span: Span, mapping: &HostMapping) -> io::Result<()> {
        let source = match &mut self.source {
            Some(source) => source,
            None => self.source.insert(ContentSource::of(mapping)?),
        };
        let rest = mapping.mapped().len().saturating_sub(self.next);
        let window = self.next..self.next.saturating_add(rest.min(WINDOW));
        self.next = window.end;
        let page = sys::page_size();
        let mut marked = vec![false; window.len().div_ceil(page)];
        source.mark(mapping, &window, &mut self.walks, &mut marked)?;
        let start = span.start.saturating_add(to_u64(window.start));
        for (page_number, _) in marked.iter().enumerate().filter(|(_, has)| **has) {
            let at = start.saturating_add(to_u64(page_number.saturating_mul(page)));
            match self.ready.back_mut() {
                Some(last) if last.start.saturating_add(last.size) == at => {
                    last.size = last.size.saturating_add(to_u64(page));
                }
                _ => self.ready.push_back(Span {
                    start: at,
                    size: to_u64(page),
                }),
            }
        }
        Ok(())
    }
}

impl ContentSource {
    /// Finds the source for a region.
    fn of(mapping: &HostMapping) -> io::Result<Self> {
        mapping.mapped().check_here()?;
        // Without /proc, the pages of this process are not known. /proc/self/pagemap is empty after
        // the main thread has ended.
        let pagemap = File::open("/proc/thread-self/pagemap");
        let is_private = mapping.backing.sharing == Sharing::Private;
        let Some((file, _)) = mapping.file() else {
            return Ok(match pagemap {
                Ok(pagemap) => Self::new(None, Some(pagemap)),
                Err(_) => Self::all(),
            });
        };
        if mapping.kind() == BackingKind::Hugetlb {
            // hugetlbfs has no `SEEK_DATA`. The size of the file does not show which pages it has,
            // even if this process maps as many: it can map other pages meanwhile.
            let is_unused = file.metadata()?.blocks() == 0;
            return Ok(match pagemap {
                Ok(pagemap) if is_unused => Self::of_huge_pages(pagemap),
                Ok(pagemap) if !is_private => Self::of_shared_huge_pages(pagemap),
                _ => Self::all(),
            });
        }
        let Some(file) = reopen(file)? else {
            return Ok(Self::all());
        };
        Ok(match (is_private, pagemap) {
            (false, _) => Self::new(Some(file), None),
            (true, Ok(pagemap)) => Self::new(Some(file), Some(pagemap)),
            (true, Err(_)) => Self::all(),
        })
    }

    fn new(file: Option<(FileId, File)>, pagemap: Option<File>) -> Self {
        Self {
            all: false,
            file,
            pagemap,
            in_core: false,
            reads: false,
        }
    }

    /// Also asks mincore(2): while the kernel migrates a huge page, `pagemap` shows none there.
    fn of_huge_pages(pagemap: File) -> Self {
        Self {
            in_core: true,
            ..Self::new(None, Some(pagemap))
        }
    }

    /// Also reads the pages that only other processes map, or that the kernel migrates.
    ///
    /// mincore(2) would report all pages as present in a file that this process may not write.
    fn of_shared_huge_pages(pagemap: File) -> Self {
        Self {
            reads: true,
            ..Self::new(None, Some(pagemap))
        }
    }

    fn all() -> Self {
        Self {
            all: true,
            ..Self::new(None, None)
        }
    }

    /// Marks the pages of a window that have content.
    fn mark(
        &self,
        mapping: &HostMapping,
        window: &Range<usize>,
        walks: &mut BTreeMap<FileId, Walk>,
        marked: &mut [bool],
    ) -> io::Result<()> {
        // Blocks and zeroed ranges do not change meanwhile.
        let zeroed = mapping.hold_blocks()?;
        if self.all {
            set(marked, window, window.clone(), true);
        }
        if let (Some((id, file)), Some((_, start))) = (&self.file, mapping.file()) {
            let walk = walks.entry(*id).or_default();
            let end = start.saturating_add(to_u64(window.end));
            let mut at = start.saturating_add(to_u64(window.start));
            while at < end {
                let data = walk.data_after(file, at)?.unwrap_or(at..end);
                if data.start >= end {
                    break;
                }
                let until = data.end.min(end);
                let offset = |at: u64| usize::try_from(at.saturating_sub(start));
                if let (Ok(from), Ok(to)) = (offset(data.start), offset(until)) {
                    set(marked, window, from..to, true);
                }
                at = until.max(at.saturating_add(1));
            }
            // Discarded ranges hide the file.
            for range in zeroed.ranges_in(window) {
                set(marked, window, range, false);
            }
        }
        if let Some(pagemap) = &self.pagemap {
            mark_private(pagemap, mapping, window, self.file.is_some(), marked)?;
        }
        if self.in_core {
            let mut pages = vec![0; marked.len()];
            let mapped = mapping.mapped();
            mapped.resident(window.start, window.len(), &mut pages)?;
            for (mark, page) in marked.iter_mut().zip(pages) {
                *mark |= page & 1 != 0;
            }
        }
        if self.reads {
            mark_unmapped(mapping, window, marked);
        }
        if let Some(blocks) = mapping.plugged_blocks() {
            for (at, run) in unplugged_runs(blocks, window.start, window.len()) {
                set(marked, window, at..at.saturating_add(run), false);
            }
        }
        Ok(())
    }
}

/// Opens a file again, with a separate position, if its `SEEK_DATA` finds all data.
///
/// Returns `None` if a page with content could be left out. On overlayfs, for example, the new
/// descriptor can refer to a copy of the file that is mapped.
fn reopen(file: &File) -> io::Result<Option<(FileId, File)>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || !sys::file_system(file)?.reports_data() {
        return Ok(None);
    }
    let Ok(opened) = File::open(format!("/proc/thread-self/fd/{}", file.as_raw_fd())) else {
        return Ok(None);
    };
    let identity = |metadata: &Metadata| (metadata.dev(), metadata.ino());
    let id = identity(&metadata);
    let is_same = id == identity(&opened.metadata()?);
    Ok(is_same.then_some((id, opened)))
}

/// Sets the marks of the pages of a range, which is inside of the window.
fn set(marked: &mut [bool], window: &Range<usize>, range: Range<usize>, has: bool) {
    let pages = pages_of(&range, window.start);
    let marks = marked.iter_mut().skip(pages.start).take(pages.len());
    marks.for_each(|mark| *mark = has);
}

/// Returns the numbers of the pages of a range, counted from `start`.
fn pages_of(range: &Range<usize>, start: usize) -> Range<usize> {
    let page = sys::page_size();
    let first = range.start.saturating_sub(start).checked_div(page);
    first.unwrap_or(0)..range.end.saturating_sub(start).div_ceil(page)
}

/// The bits of an entry of /proc/thread-self/pagemap (Linux, "Examining Process Page Tables").
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page belongs to a file.
const OF_FILE: u64 = 1 << 61;

/// Marks the pages of a window that this process has, in memory or in swap.
///
/// For a private file, these are only its private copies.
fn mark_private(
    pagemap: &File,
    mapping: &HostMapping,
    window: &Range<usize>,
    is_private_file: bool,
    marked: &mut [bool],
) -> io::Result<()> {
    let entries = entries(pagemap, mapping, window)?;
    for (entry, mark) in entries.into_iter().zip(marked) {
        let is_copy = !is_private_file || entry & OF_FILE == 0;
        *mark |= entry & SWAPPED != 0 || (entry & PRESENT != 0 && is_copy);
    }
    Ok(())
}

/// Marks the pages of a window that are not marked, but whose file has bytes other than zero.
///
/// A read of the file populates no page.
fn mark_unmapped(mapping: &HostMapping, window: &Range<usize>, marked: &mut [bool]) {
    let Some((file, start)) = mapping.file() else {
        return;
    };
    let plugged = match mapping.plugged_blocks() {
        Some(blocks) => blocks.runs_in(window.start, window.len()).collect(),
        None => vec![(window.start, window.len())],
    };
    // A window can be a part of a huge page.
    let step = usize::try_from(mapping.page_size()).map_or(WINDOW, |page| page.min(WINDOW));
    let mut buffer = vec![0; READ_LEN];
    for (first, len) in plugged {
        let end = first.saturating_add(len);
        for at in (first..end).step_by(step) {
            let part = at..at.saturating_add(step).min(end);
            let pages = pages_of(&part, window.start);
            let mut marks = marked.iter().skip(pages.start).take(pages.len());
            let from = start.saturating_add(to_u64(at));
            if !marks.all(|mark| *mark) && !reads_as_zeroes(file, from, part.len(), &mut buffer) {
                set(marked, window, part, true);
            }
        }
    }
}

/// Reads the entries of the pages of a window.
fn entries(pagemap: &File, mapping: &HostMapping, window: &Range<usize>) -> io::Result<Vec<u64>> {
    const ENTRY: usize = size_of::<u64>();
    let pages = window.len().div_ceil(sys::page_size());
    let mut text = vec![0u8; pages.saturating_mul(ENTRY)];
    let address = mapping.host_address().saturating_add(window.start);
    let number = address.checked_div(sys::page_size()).unwrap_or(0);
    pagemap.read_exact_at(&mut text, to_u64(number.saturating_mul(ENTRY)))?;
    let (entries, _) = text.as_chunks::<ENTRY>();
    Ok(entries
        .iter()
        .map(|entry| u64::from_ne_bytes(*entry))
        .collect())
}

#[cfg(test)]
mod tests {
    use test_support::HugePages;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;
    use crate::{Backing, MemoryBuilder, Region};

    #[test]
    fn content_of_huge_pages_includes_a_page_that_is_being_migrated() {
        const HUGE: u64 = 2 << 20;
        let test = "content_of_huge_pages_includes_a_page_that_is_being_migrated";
        let Some(_pages) = HugePages::reserve(4, test) else {
            return;
        };
        let backing = Backing::Hugetlb { page_size: HUGE };
        let region = Region::new(GuestAddress(0), 4 * HUGE).backing(backing);
        let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
        memory.write_obj(1u8, GuestAddress(HUGE)).unwrap();
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        // During the migration, the entries are 0.
        let pagemap = tempfile::tempfile().unwrap();
        pagemap.set_len(1 << 39).unwrap();
        let source = ContentSource::of_huge_pages(pagemap);
        let pages = mapping.mapped().len() / sys::page_size();
        let mut marked = vec![false; pages];
        let window = 0..mapping.mapped().len();
        source
            .mark(mapping, &window, &mut BTreeMap::new(), &mut marked)
            .unwrap();
        for (number, mark) in marked.iter().enumerate() {
            assert_eq!(*mark, number / (pages / 4) == 1, "page {number}");
        }
    }

    /// Returns the ranges of a memory with content, and the walk over its only file.
    fn ranges_and_walk(memory: &GuestMemoryMmap) -> (Vec<Span>, Walk) {
        let mut content = content(memory).unwrap();
        let ranges = content.by_ref().map(Result::unwrap).collect();
        let mut walks = content.walks.into_values();
        let walk = walks.next().unwrap();
        assert!(walks.next().is_none());
        (ranges, walk)
    }

    #[test]
    fn content_of_file_with_hole_before_data_looks_for_it_once() {
        let (page, size) = (to_u64(sys::page_size()), to_u64(8 * WINDOW));
        let region = Region::new(GuestAddress(0), size).backing(Backing::Memfd);
        let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
        let start = to_u64(7 * WINDOW);
        for at in (start..start + 64 * page).step_by(sys::page_size()) {
            memory.write_obj(1u8, GuestAddress(at)).unwrap();
        }
        let (ranges, walk) = ranges_and_walk(&memory);
        let data = Span {
            start,
            size: 64 * page,
        };
        assert_eq!(ranges, [data]);
        assert_eq!(walk.passed, size);
    }

    #[test]
    fn content_of_full_file_looks_for_its_end_once() {
        let size = 2 * WINDOW;
        let region = Region::new(GuestAddress(0), to_u64(size)).backing(Backing::Memfd);
        let memory = MemoryBuilder::new().region(region).build::<()>().unwrap();
        for page in (0..size).step_by(sys::page_size()) {
            memory.write_obj(1u8, GuestAddress(to_u64(page))).unwrap();
        }
        let all = Span {
            start: 0,
            size: to_u64(size),
        };
        let (ranges, walk) = ranges_and_walk(&memory);
        assert_eq!(ranges, [all]);
        assert_eq!(walk.passed, to_u64(size));
        // A hole in the second window: the data before it and after it is found.
        let mapping = provisioned(memory.iter().next().unwrap()).unwrap();
        let (file, _) = mapping.file().unwrap();
        let (page, hole) = (to_u64(sys::page_size()), to_u64(WINDOW) + 0x10_0000);
        sys::punch_hole(file, hole, page).unwrap();
        let (ranges, walk) = ranges_and_walk(&memory);
        let after = hole + page;
        let expected = [(0, hole), (after, to_u64(size) - after)];
        let expected = expected.map(|(start, size)| Span { start, size });
        assert_eq!(ranges, expected);
        assert_eq!(walk.passed, to_u64(size));
    }

    const REGIONS: u64 = 400;

    /// Creates regions over the pages of one file, which are written if `written`. `page_of` is the
    /// number of the file's page for a region.
    fn regions_of_one_file(written: bool, page_of: impl Fn(u64) -> u64) -> GuestMemoryMmap {
        let page = to_u64(sys::page_size());
        let len = REGIONS * page;
        let file = sys::memfd(c"content", len, None).unwrap();
        sys::allocate_range(&file, 0, len).unwrap();
        let mut builder = MemoryBuilder::new();
        for number in 0..REGIONS {
            let file = file.try_clone().unwrap();
            let backing = Backing::shared_file(file, page_of(number) * page);
            let region = Region::new(GuestAddress(number * 2 * page), page);
            builder = builder.region(region.backing(backing));
        }
        let memory = builder.build::<()>().unwrap();
        if written {
            for number in 0..REGIONS {
                let at = GuestAddress(number * 2 * page);
                memory.write_obj(1u8, at).unwrap();
            }
        }
        memory
    }

    #[test]
    fn content_of_many_regions_of_one_file_passes_each_page_once() {
        let len = REGIONS * to_u64(sys::page_size());
        for written in [true, false] {
            let memory = regions_of_one_file(written, |number| number);
            let (ranges, walk) = ranges_and_walk(&memory);
            assert_eq!(ranges.len(), if written { 400 } else { 0 });
            assert_eq!(walk.passed, len, "written: {written}");
        }
    }

    #[test]
    fn content_of_regions_that_go_back_in_one_file_passes_it_few_times() {
        let len = REGIONS * to_u64(sys::page_size());
        let memory = regions_of_one_file(true, |number| REGIONS - 1 - number);
        let (ranges, walk) = ranges_and_walk(&memory);
        assert_eq!(ranges.len(), 400);
        assert!(walk.passed <= (MOST_PASSES + 1) * len, "{}", walk.passed);
        // The last regions count as a whole.
        let memory = regions_of_one_file(false, |number| REGIONS - 1 - number);
        let (ranges, walk) = ranges_and_walk(&memory);
        assert!((1..400).contains(&ranges.len()), "{}", ranges.len());
        assert!(walk.passed <= (MOST_PASSES + 1) * len, "{}", walk.passed);
    }
}
