//! Guest RAM: two regions on both sides of the 32-bit hole, each with a dirty bitmap.
//!
//! ```text
//!  0            low           c000_0000   1_0000_0000            high
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//!  | System RAM   |    nothing    | devices |       System RAM        |
//!  +--------------+ . . . . . . . + . . . . +-------------------------+
//! ```

use std::num::NonZeroUsize;
use std::sync::Arc;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use vm_memory::bitmap::{AtomicBitmap, DirtyMemory};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::args::human;
use crate::error::Error;
use crate::pages::PageMap;

/// Guest memory of a microvm: mapped, with one bit per 4 KiB page.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

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

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous pages.
    Anonymous,
    /// A memfd per region, which can be mapped a second time.
    Memfd,
}

/// The two regions of a guest with `mem` bytes, as (guest address, length).
///
/// `mem` has been checked by [`crate::args::parse_mem`].
pub fn layout(mem: u64) -> [(u64, u64); 2] {
    // The low region ends on 2 MiB, so that it can be mapped with large pages throughout.
    let low = (mem / 2).min(HOLE_START) & !((2 << 20) - 1);
    [(0, low), (HIGH_START, mem - low)]
}

/// Maps guest memory of `mem` bytes.
///
/// # Errors
///
/// [`Error::MapMemory`] when the host has not that much, or the size does not fit its addresses.
pub fn map(mem: u64, backing: Backing) -> Result<GuestRam, Error> {
    let mut regions = Vec::new();
    for (start, len) in layout(mem) {
        let file = match backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(memfd(len).map_err(|why| cannot_map(mem, why))?),
        };
        regions.push(region(start, len, file).map_err(|why| cannot_map(mem, why))?);
    }
    GuestRam::from_regions(regions).map_err(|why| cannot_map(mem, why))
}

/// The same memory and one more region of `len` bytes at `start`, which is a file's.
///
/// # Errors
///
/// [`Error::MapMemory`] when it cannot be mapped, or another region is there.
pub fn with_file_region(ram: &GuestRam, start: u64, len: u64) -> Result<GuestRam, Error> {
    let file = memfd(len).map_err(|why| cannot_map(len, why))?;
    let region = region(start, len, Some(file)).map_err(|why| cannot_map(len, why))?;
    ram.insert_region(Arc::new(region))
        .map_err(|why| cannot_map(len, why))
}

/// Maps the same memory a second time, with dirty bitmaps of its own: what a vCPU's accesses are to
/// KVM's log, a driver thread's accesses are to these.
///
/// # Errors
///
/// [`Error::MapMemory`] when `ram` has no files behind it, or they cannot be mapped again.
pub fn second_view(ram: &GuestRam) -> Result<GuestRam, Error> {
    let total = ram.iter().map(GuestMemoryRegion::len).sum();
    let mut regions = Vec::new();
    for r in ram.iter() {
        let file = GuestMemoryRegion::file_offset(r).cloned();
        let file = file.ok_or_else(|| cannot_map(total, "the region has no file behind it"))?;
        let again = region(r.start_addr().0, r.len(), Some(file));
        regions.push(again.map_err(|why| cannot_map(total, why))?);
    }
    GuestRam::from_regions(regions).map_err(|why| cannot_map(total, why))
}

/// Takes the dirty bitmap of every region, and leaves them clean.
pub fn harvest(ram: &GuestRam) -> PageMap {
    let mut dirty = DirtyMemory::new();
    dirty.harvest(ram);
    let mut pages = PageMap::new(ram);
    for (start, len) in dirty.runs() {
        pages.add(start.0, len as u64);
    }
    pages
}

fn region(start: u64, len: u64, file: Option<FileOffset>) -> Result<GuestRegionMmap<AtomicBitmap>, String> {
    let len = usize::try_from(len).map_err(|e| e.to_string())?;
    let page = NonZeroUsize::new(PAGE as usize).ok_or("no page size")?;
    // Not from_ranges: its bitmap counts host pages, which need not be KVM's.
    let mut builder = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::new(len, page))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    builder = match file {
        Some(file) => builder
            .with_file_offset(file)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
        None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
    };
    let mapping: MmapRegion<AtomicBitmap> = builder.build().map_err(|e| e.to_string())?;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| format!("{len:#x} bytes at {start:#x} pass the end of the address space"))
}

fn memfd(len: u64) -> Result<FileOffset, rustix::io::Errno> {
    let fd = memfd_create("microvm-ram", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, len)?;
    Ok(FileOffset::new(fd.into(), 0))
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
        assert!(second_view(&ram).is_err());
    }
}
