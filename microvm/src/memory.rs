//! Guest RAM: one region on each side of the 32-bit hole, each with a dirty bitmap.
//!
//! ```text
//!  0            low           c000_0000   1_0000_0000            high
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//!  |     RAM      |    nothing    | devices |           RAM           |
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//! ```

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::dirty::DirtyMemory;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vm_memory_host::{BuildError, MemoryBuilder, Region};

use crate::Error;

/// Guest memory with one dirty bit for each page of 4 KiB.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;
/// A region of [`GuestRam`].
pub type GuestRegion = GuestRegionMmap<AtomicBitmap>;

/// The page size of KVM's dirty log, and so of the bitmaps.
pub const PAGE: u64 = 4096;
/// [`PAGE`], in the type that bitmaps and logs take.
const PAGE_SIZE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(PAGE as usize - 1);
/// The start of the 32-bit hole, which contains the devices.
pub const HOLE_START: u64 = 0xc000_0000;
/// The start of the region above the hole.
pub const HIGH_START: u64 = 1 << 32;
/// The sizes of RAM that the built-in guest and the page tables can handle.
pub const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=64 << 30;

const HUGE_PAGE: u64 = 2 << 20;

/// The kind of host memory that backs guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous pages.
    Anonymous,
    /// One memfd for each region.
    Memfd,
    /// One memfd of 2 MiB huge pages for each region.
    Hugetlb,
    /// A shared mapping of one file for all regions.
    File(PathBuf),
}

impl FromStr for Backing {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.strip_prefix("file:")) {
            ("anon", _) => Ok(Self::Anonymous),
            ("memfd", _) => Ok(Self::Memfd),
            ("hugetlb", _) => Ok(Self::Hugetlb),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("expected anon, memfd, hugetlb, or file:PATH"),
        }
    }
}

/// Splits `size` bytes of RAM into the two regions: guest address and length of each.
pub fn layout(size: u64) -> [(u64, u64); 2] {
    // The low region ends at a multiple of 2 MiB, so that large pages can map all of it.
    let low = (size / 2).min(HOLE_START) & !(HUGE_PAGE - 1);
    [(0, low), (HIGH_START, size - low)]
}

/// Maps `size` bytes of guest RAM.
///
/// # Errors
///
/// Returns an error if the file cannot be opened or the system cannot provide the memory.
pub fn build(size: u64, backing: &Backing) -> Result<GuestRam, Error> {
    let mut builder = MemoryBuilder::new();
    let mut offset = 0;
    for (start, len) in layout(size) {
        let region = Region::new(GuestAddress(start), len);
        builder = builder.region(region.backing(host_backing(backing, size, offset)?));
        offset += len;
    }
    Ok(build_with_bitmaps(builder)?)
}

/// Builds memory whose bitmaps have one bit for each page of [`PAGE`] bytes.
///
/// # Errors
///
/// Returns an error if the system cannot provide the memory.
pub fn build_with_bitmaps(builder: MemoryBuilder) -> Result<GuestRam, BuildError> {
    let regions = builder.build_regions_with_bitmaps(|_, len| AtomicBitmap::new(len, PAGE_SIZE))?;
    Ok(GuestRam::from_regions(regions)?)
}

fn host_backing(
    backing: &Backing,
    size: u64,
    offset: u64,
) -> Result<vm_memory_host::Backing, Error> {
    Ok(match backing {
        Backing::Anonymous => vm_memory_host::Backing::Anonymous,
        Backing::Memfd => vm_memory_host::Backing::Memfd,
        Backing::Hugetlb => vm_memory_host::Backing::Hugetlb {
            page_size: HUGE_PAGE,
        },
        Backing::File(path) => {
            let fail = Error::file("--backing", path);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(path).map_err(&fail)?;
            if file.metadata().map_err(&fail)?.len() == 0 {
                file.set_len(size).map_err(&fail)?;
            }
            vm_memory_host::Backing::shared_file(file, offset)
        }
    })
}

/// Returns the dirty pages of `ram` and clears its bitmaps.
pub fn harvest(ram: &GuestRam) -> DirtyMemory {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(ram);
    dirty
}

/// Returns the guest addresses of all dirty pages, including pages that were unplugged since.
pub fn pages(dirty: &DirtyMemory) -> BTreeSet<u64> {
    let runs = dirty.runs().chain(dirty.unreadable_runs());
    runs.flat_map(|(start, len)| pages_of(start.0, len as u64))
        .collect()
}

/// Returns the guest addresses of the pages that contain the `len` bytes at `start`.
pub fn pages_of(start: u64, len: u64) -> impl Iterator<Item = u64> {
    let (first, end) = (start & !(PAGE - 1), start.saturating_add(len));
    (first..end)
        .step_by(PAGE as usize)
        .filter(move |_| len != 0)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn layout_of_any_size_has_ram_on_both_sides_of_the_hole() {
        for size in [16 << 20, (16 << 20) + PAGE, 256 << 20, 6 << 30, 64 << 30] {
            let [(low, low_len), (high, high_len)] = layout(size);
            assert_eq!(low_len + high_len, size);
            assert_eq!((low, high), (0, HIGH_START));
            assert!((8 << 20..=HOLE_START).contains(&low_len) && high_len >= 8 << 20);
        }
    }

    #[test]
    fn backing_from_str_accepts_four_kinds() {
        assert_eq!("anon".parse(), Ok(Backing::Anonymous));
        assert_eq!("memfd".parse(), Ok(Backing::Memfd));
        assert_eq!("hugetlb".parse(), Ok(Backing::Hugetlb));
        assert_eq!("file:a:b".parse(), Ok(Backing::File("a:b".into())));
        for wrong in ["", "file", "file:", "ANON", "memfd:x"] {
            assert!(wrong.parse::<Backing>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn build_with_file_maps_regions_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let backing = Backing::File(path.clone());
        let ram = build(16 << 20, &backing).unwrap();
        ram.write_obj(0x11_u8, GuestAddress(0x123)).unwrap();
        ram.write_obj(0x22_u8, GuestAddress(HIGH_START + 5))
            .unwrap();
        drop(ram);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 16 << 20);
        assert_eq!((bytes[0x123], bytes[(8 << 20) + 5]), (0x11, 0x22));

        // The existing file is long enough for the same guest, and too short for a larger one.
        build(16 << 20, &backing).unwrap();
        assert!(matches!(build(32 << 20, &backing), Err(Error::Build(_))));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn build_with_hugetlb_and_partial_huge_page_returns_error() {
        let odd = build((16 << 20) + PAGE, &Backing::Hugetlb);
        assert!(matches!(odd, Err(Error::Build(_))), "{odd:?}");
    }

    #[test]
    fn harvest_after_write_returns_its_pages_once() {
        let ram = build(16 << 20, &Backing::Anonymous).unwrap();
        assert_eq!(ram.num_regions(), 2);
        ram.write_obj(u64::MAX, GuestAddress(HIGH_START + PAGE - 4))
            .unwrap();
        let want: BTreeSet<_> = pages_of(HIGH_START + PAGE - 4, 8).collect();
        assert_eq!(want, [HIGH_START, HIGH_START + PAGE].into());
        assert_eq!(pages_of(5, 0).count(), 0);
        assert_eq!(pages(&harvest(&ram)), want);
        assert!(pages(&harvest(&ram)).is_empty());
    }
}
