//! Guest RAM: two regions on both sides of the 32-bit hole, each with a dirty bitmap.
//!
//! ```text
//!  0            low           c000_0000   1_0000_0000            high
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//!  | System RAM   |    nothing    | devices |       System RAM        |
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//! ```

use std::fs::{File, OpenOptions};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vm_memory_host::{
    describe, BackingDescription, BackingKind, BuildError, MemoryBuilder, Region,
    RegionDescription, Residency, Sharing, Unplugged,
};

use crate::args::human;
use crate::error::Error;
use crate::pages::PageMap;

/// Guest memory of a microvm: mapped, with one bit per 4 KiB page.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;
/// One region of it.
pub type GuestRegion = GuestRegionMmap<AtomicBitmap>;

/// Bytes of a page: what a bit of KVM's dirty log stands for, and so of ours.
pub const PAGE: u64 = 4096;
/// The smallest `--mem`: each region holds the areas of [`crate::plan`].
pub const MIN_MEM: u64 = 16 << 20;
/// The largest `--mem`: page tables for it fit below 640 KiB.
pub const MAX_MEM: u64 = 64 << 30;
/// Where the 32-bit hole starts; devices live in it.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on behind the hole.
pub const HIGH_START: u64 = 1 << 32;

/// The huge pages of `--backing hugetlb`.
const HUGE_PAGE: u64 = 2 << 20;
/// What memfds are called below /proc/self/fd.
const NAME: &str = "microvm-ram";

/// What guest memory is kept in (`--backing`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous pages.
    Anonymous,
    /// A memfd per region, which can be mapped a second time.
    Memfd,
    /// The same of huge pages.
    Hugetlb,
    /// Parts of one file.
    File(PathBuf),
}

impl Backing {
    /// Parses what follows `--backing`.
    ///
    /// # Errors
    ///
    /// A line for the user.
    pub fn parse(given: &str) -> Result<Self, String> {
        match (given, given.strip_prefix("file:")) {
            ("anon", _) => Ok(Self::Anonymous),
            ("memfd", _) => Ok(Self::Memfd),
            ("hugetlb", _) => Ok(Self::Hugetlb),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("give memfd, anon, hugetlb or file:PATH".to_owned()),
        }
    }

    /// Whether a region that was described is kept in this.
    pub fn is(&self, described: &BackingDescription) -> bool {
        match described {
            BackingDescription::Anonymous => *self == Self::Anonymous,
            BackingDescription::Descriptor { kind, sharing, .. } => {
                // A file may be one of tmpfs or hugetlbfs.
                let matches = match self {
                    Self::Anonymous => false,
                    Self::Memfd => *kind == BackingKind::Memfd,
                    Self::Hugetlb => *kind == BackingKind::Hugetlb,
                    Self::File(_) => true,
                };
                matches && *sharing == Sharing::Shared
            }
            _ => false,
        }
    }
}

/// Where the regions of a guest come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// What they are kept in.
    pub backing: Backing,
    mem: u64,
    /// The file that they are parts of.
    file: Option<Arc<File>>,
    /// Where it was made, if it was not there.
    made: Option<PathBuf>,
}

impl Source {
    /// Makes ready to map `mem` bytes of guest memory. A file that is not there is made, as long as that.
    ///
    /// # Errors
    ///
    /// [`Error::OpenFile`] for a file that cannot be had.
    pub fn open(backing: Backing, mem: u64) -> Result<Self, Error> {
        let (mut file, mut made) = (None, None);
        if let Backing::File(path) = &backing {
            let (opened, is_new) = open_file(path, mem)?;
            file = Some(Arc::new(opened));
            made = is_new.then(|| path.clone());
        }
        Ok(Self {
            backing,
            mem,
            file,
            made,
        })
    }

    /// Maps guest memory.
    ///
    /// # Errors
    ///
    /// [`Error::Build`] when it cannot be had.
    pub fn map(&self) -> Result<GuestRam, Error> {
        let mut builder = MemoryBuilder::new();
        let mut offset = 0;
        for (start, len) in layout(self.mem) {
            builder = builder.region(self.region(start, len, offset));
            offset += len;
        }
        build(builder).map_err(|error| {
            // There is an error to report already, and it is not that a file stays behind.
            let _ = self.made.as_ref().map(std::fs::remove_file);
            error.into()
        })
    }

    /// What regions that are plugged are kept in. A file has no blocks that come and go, and a memfd has.
    pub fn plugged(&self) -> Backing {
        match &self.backing {
            Backing::File(_) => Backing::Memfd,
            other => other.clone(),
        }
    }

    /// Maps a region of blocks that a guest plugs, none of which is there in the beginning.
    ///
    /// # Errors
    ///
    /// [`BuildError`] when it cannot be had.
    pub fn map_blocks(
        &self,
        start: u64,
        len: u64,
        block: NonZeroU64,
    ) -> Result<GuestRam, BuildError> {
        let plugged = Self {
            backing: self.plugged(),
            ..self.clone()
        };
        let region = plugged.region(start, len, 0);
        build(MemoryBuilder::new().region(region.blocks(block, Unplugged::Mapped)))
    }

    /// A region, which begins at `offset` if there is one file for all.
    fn region(&self, start: u64, len: u64, offset: u64) -> Region {
        let region = Region::new(GuestAddress(start), len);
        match (&self.backing, &self.file) {
            (Backing::Anonymous, _) | (Backing::File(_), None) => region,
            (Backing::Memfd, _) => region.backing(vm_memory_host::Backing::Memfd).name(NAME),
            (Backing::Hugetlb, _) => {
                let page_size = HUGE_PAGE;
                region
                    .backing(vm_memory_host::Backing::Hugetlb { page_size })
                    .name(NAME)
            }
            (Backing::File(_), Some(file)) => region.backing(vm_memory_host::Backing::File {
                file: Arc::clone(file),
                offset,
                sharing: Sharing::Shared,
            }),
        }
    }
}

/// Opens a file, or makes one of `mem` bytes; whether it was made.
fn open_file(path: &Path, mem: u64) -> Result<(File, bool), Error> {
    let fail = |why| Error::OpenFile {
        option: "--backing",
        path: path.to_owned(),
        why,
    };
    // Looked at before it is opened: opening a FIFO waits for its other end.
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            return Err(fail(std::io::Error::other("not a regular file")))
        }
        _ => {}
    }
    let new = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    match new {
        Ok(file) => {
            // Past its limit (ulimit -f), the process would be sent SIGXFSZ.
            let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize);
            let set = match limit.current.is_some_and(|limit| mem > limit) {
                true => Err(rustix::io::Errno::FBIG.into()),
                false => file.set_len(mem),
            };
            set.map_err(|why| {
                let _ = std::fs::remove_file(path);
                fail(why)
            })?;
            Ok((file, true))
        }
        Err(why) if why.kind() == std::io::ErrorKind::AlreadyExists => {
            // One that is too short is the builder's to tell.
            let opened = OpenOptions::new().read(true).write(true).open(path);
            opened.map(|file| (file, false)).map_err(fail)
        }
        Err(why) => Err(fail(why)),
    }
}

/// Builds memory with a bit for each of KVM's pages, which need not be the host's.
fn build(builder: MemoryBuilder) -> Result<GuestRam, BuildError> {
    let page = NonZeroUsize::MIN.saturating_add(PAGE as usize - 1);
    builder.build_with_bitmaps(|len| AtomicBitmap::new(len, page))
}

/// The two regions of a guest with `mem` bytes, as (guest address, length).
///
/// `mem` has been checked by [`crate::args::parse_mem`].
pub fn layout(mem: u64) -> [(u64, u64); 2] {
    // The low region ends on 2 MiB, so that it can be mapped with large pages throughout.
    let low = (mem / 2).min(HOLE_START) & !((2 << 20) - 1);
    [(0, low), (HIGH_START, mem - low)]
}

/// Maps guest memory of `mem` bytes, for tests.
#[cfg(test)]
pub fn map(mem: u64, backing: Backing) -> Result<GuestRam, Error> {
    Source::open(backing, mem)?.map()
}

/// The same memory and one more region of `len` bytes at `start`, which is a file's of its own: one that can be cut off, as no memfd of
/// [`Backing::Memfd`] can.
///
/// # Errors
///
/// [`Error::MapMemory`] when there is no file, or another region is there; [`Error::Build`] when it cannot be mapped.
pub fn with_file_region(ram: &GuestRam, start: u64, len: u64) -> Result<GuestRam, Error> {
    let file = memfd(len).map_err(|why| cannot_map(len, why))?;
    let region = Region::new(GuestAddress(start), len);
    let one = build(MemoryBuilder::new().region(region.backing(file)))?;
    let region = only_region(&one).ok_or_else(|| cannot_map(len, "it was not built"))?;
    ram.insert_region(region)
        .map_err(|why| cannot_map(len, why))
}

/// The region of a memory that has one.
pub fn only_region(one: &GuestRam) -> Option<Arc<GuestRegion>> {
    let region = one.iter().next()?;
    let removed = one.remove_region(region.start_addr(), region.len());
    removed.ok().map(|(_, region)| region)
}

/// Maps the same memory a second time, with dirty bitmaps of its own: what a vCPU's accesses are to
/// KVM's log, a driver thread's accesses are to these.
///
/// # Errors
///
/// [`Error::NoSecondView`] when a region of `ram` has no file behind it, [`Error::Build`] when they cannot be mapped again.
pub fn second_view(ram: &GuestRam) -> Result<GuestRam, Error> {
    let total = ram.iter().map(GuestMemoryRegion::len).sum();
    let (description, files) = describe(ram).map_err(|why| cannot_map(total, why))?;
    let mut regions = description.regions.iter();
    if regions.any(|region| region.backing == BackingDescription::Anonymous) {
        return Err(Error::NoSecondView);
    }
    let files = files.iter().map(|file| file.try_clone().map(Into::into));
    let files = files
        .collect::<Result<Vec<_>, _>>()
        .map_err(|why| cannot_map(total, why))?;
    let builder = description
        .builder(files)
        .map_err(|why| cannot_map(total, why))?;
    Ok(build(builder)?)
}

/// What is known of the memory behind each region; nothing if this program did not build it.
pub fn described(ram: &GuestRam) -> Vec<RegionDescription> {
    describe(ram).map_or_else(|_| Vec::new(), |(description, _)| description.regions)
}

/// What each region takes, in the order of their addresses.
///
/// # Errors
///
/// Why that cannot be told, in words.
pub fn residency(ram: &GuestRam) -> Result<Vec<Residency>, String> {
    let takes = vm_memory_host::residency(ram).map_err(|e| e.to_string())?;
    Ok(takes.into_iter().map(|(_, takes)| takes).collect())
}

/// Takes the dirty bitmap of every region, and leaves them clean.
pub fn harvest(ram: &GuestRam) -> PageMap {
    let mut pages = PageMap::new(ram);
    harvest_into(ram, &mut pages);
    pages
}

/// The same, added to a set that may be over more memory.
pub fn harvest_into(ram: &GuestRam, pages: &mut PageMap) {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(ram);
    for (start, len) in dirty.runs() {
        pages.add(start.0, len as u64);
    }
}

fn memfd(len: u64) -> Result<vm_memory_host::Backing, rustix::io::Errno> {
    let fd = memfd_create(NAME, MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, len)?;
    Ok(vm_memory_host::Backing::shared_file(fd, 0))
}

fn cannot_map(mem: u64, why: impl std::fmt::Display) -> Error {
    Error::MapMemory {
        size: human(mem),
        why: why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_lies_on_both_sides_of_the_hole() {
        for mem in [MIN_MEM, MIN_MEM + PAGE, 256 << 20, 6 << 30, MAX_MEM] {
            let [(low, low_len), (high, high_len)] = layout(mem);
            assert_eq!(low_len + high_len, mem);
            assert_eq!((low, high), (0, HIGH_START));
            assert!((8 << 20..=HOLE_START).contains(&low_len) && high_len >= 8 << 20);
        }
    }

    #[test]
    fn two_views_of_one_memory_mark_apart() {
        let ram = map(MIN_MEM, Backing::Memfd).unwrap();
        let view = second_view(&ram).unwrap();
        let at = GuestAddress(HIGH_START + 5 * PAGE);
        view.write_obj(0x1234_u64, at).unwrap();
        assert_eq!(ram.read_obj::<u64>(at).unwrap(), 0x1234);
        assert_eq!(harvest(&ram).count(), 0);
        let seen = harvest(&view);
        assert_eq!((seen.count(), seen.first()), (1, Some(at.0)));
        assert_eq!(harvest(&view).count(), 0);
    }

    #[test]
    fn anonymous_memory_has_no_second_view() {
        let ram = map(MIN_MEM, Backing::Anonymous).unwrap();
        let refused = second_view(&ram).unwrap_err().to_string();
        assert!(refused.contains("--backing memfd"), "{refused}");
    }

    #[test]
    fn a_file_holds_both_regions_one_behind_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let backing = Backing::parse(&format!("file:{}", path.display())).unwrap();
        let ram = map(MIN_MEM, backing.clone()).unwrap();
        let view = second_view(&ram).unwrap();
        ram.write_obj(0x11_u8, GuestAddress(0x123)).unwrap();
        view.write_obj(0x22_u8, GuestAddress(HIGH_START + 5))
            .unwrap();
        assert!(described(&ram)
            .iter()
            .all(|region| backing.is(&region.backing)));
        drop((ram, view));
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, MIN_MEM);
        assert_eq!((bytes[0x123], bytes[(8 << 20) + 5]), (0x11, 0x22));

        // It is there now: long enough for this, and not for a larger guest.
        map(MIN_MEM, backing.clone()).unwrap();
        let refused = map(2 * MIN_MEM, backing).unwrap_err().to_string();
        assert!(refused.contains("needs a file of"), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_backing_is_one_of_four() {
        assert_eq!(Backing::parse("anon"), Ok(Backing::Anonymous));
        assert_eq!(Backing::parse("memfd"), Ok(Backing::Memfd));
        assert_eq!(Backing::parse("hugetlb"), Ok(Backing::Hugetlb));
        assert_eq!(Backing::parse("file:a:b"), Ok(Backing::File("a:b".into())));
        for wrong in ["", "file", "file:", "ANON", "memfd:x"] {
            assert!(Backing::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_mapped_is_what_was_asked_for() {
        let [anonymous, memfd] =
            [Backing::Anonymous, Backing::Memfd].map(|backing| map(MIN_MEM, backing).unwrap());
        for (ram, right, wrong) in [
            (&anonymous, Backing::Anonymous, Backing::Memfd),
            (&memfd, Backing::Memfd, Backing::Hugetlb),
        ] {
            assert_eq!(described(ram).len(), 2);
            assert!(described(ram)
                .iter()
                .all(|region| right.is(&region.backing) && !wrong.is(&region.backing)));
        }
    }

    #[test]
    fn huge_pages_need_whole_ones() {
        let refused = map(MIN_MEM + PAGE, Backing::Hugetlb)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("is not a multiple of its pages' 0x200000 bytes")
                || refused.contains("has no huge pages")
                || refused.contains("huge pages of 0x200000 bytes"),
            "{refused}"
        );
    }
}
