//! Operations without a counterpart in 0.18.0. The other side is the code that its users write
//! instead, or the system call.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use memmap2::MmapMut;
use ours::bitmap::{AtomicBitmap, Bitmap, DirtyPages};
use ours::iommu::SharedIotlb;
use ours::{
    vectored, Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, IommuMemory, Permissions,
};

use crate::comparison::Batch;
use crate::layout::Layout;
use crate::ours_side::kinds::{memory, Plain};
use crate::shared_pages::SharedPages;
use crate::workload_shapes::{pages_in, Dirty, Mappings, BITMAP_LEN, PAGE};

const PAGE_SIZE: NonZeroUsize = match NonZeroUsize::new(PAGE) {
    Some(size) => size,
    None => NonZeroUsize::MIN,
};

/// A guest of 1 TiB, of which one page in 100 000 is dirty.
const LARGE: usize = 1 << 40;
const LARGE_STEP: usize = 100_000 * PAGE;

/// A handle that belongs to one thread, instead of `memory()` in 0.18.0.
pub fn reader(shared: &SharedPages) -> Result<Batch> {
    let atomic = GuestMemoryAtomic::new(memory::<Plain>(shared, Layout::apart(4))?);
    let mut reader = atomic.reader();
    Ok(Batch::of(move |_| {
        black_box(core::ptr::from_ref(black_box(&mut reader).memory()));
    }))
}

/// Writes to a bitmap that is switched off, while writers run or while they are paused.
pub fn mark_switched_off(while_paused: bool) -> Result<Batch> {
    let bitmap = AtomicBitmap::new(BITMAP_LEN, PAGE_SIZE);
    let bitmap = if while_paused {
        bitmap.switched_while_paused()
    } else {
        bitmap
    };
    bitmap.stop_tracking();
    let offsets = pages_in(1);
    Ok(Batch::of(move |number| {
        bitmap.mark_dirty(black_box(offsets.at(number) as usize), black_box(1));
    }))
}

/// Harvests copies of a bitmap into one buffer that is reused. Copying is not timed.
pub fn harvest(dirty: Dirty) -> Result<Batch> {
    let marked = AtomicBitmap::new(dirty.len, PAGE_SIZE);
    dirty.mark(|offset, len| marked.mark_dirty(offset, len));
    let mut pages = DirtyPages::new(dirty.len, PAGE_SIZE);
    Ok(Batch::around(move |iterations| {
        let mut took = Duration::ZERO;
        for _ in 0..iterations {
            let bitmap = marked.clone();
            let start = Instant::now();
            pages.clear();
            bitmap.harvest_into(&mut pages);
            took += start.elapsed();
            let total = pages.total_pages();
            ensure!(total == dirty.pages(), "{total} pages");
        }
        Ok(took)
    }))
}

/// Harvests a large sparse bitmap, into one buffer that is reused.
pub fn harvest_large() -> Result<Batch> {
    let bitmap = AtomicBitmap::new(LARGE, PAGE_SIZE);
    let mut dirty = DirtyPages::new(LARGE, PAGE_SIZE);
    Ok(Batch::around(move |iterations| {
        let mut took = Duration::ZERO;
        for _ in 0..iterations {
            for offset in (0..LARGE).step_by(LARGE_STEP) {
                bitmap.mark_dirty(offset, 1);
            }
            let start = Instant::now();
            dirty.clear();
            bitmap.harvest_into(&mut dirty);
            let runs = black_box(&dirty).runs().count();
            took += start.elapsed();
            ensure!(runs == LARGE.div_ceil(LARGE_STEP), "{runs} runs");
        }
        Ok(took)
    }))
}

/// The harvest of a sparse bitmap on 0.18.0: finds the runs word by word.
pub fn harvest_large_reference() -> Result<Batch> {
    use reference::bitmap::Bitmap;
    let bitmap = reference::bitmap::AtomicBitmap::new(LARGE, PAGE_SIZE);
    Ok(Batch::around(move |iterations| {
        let mut took = Duration::ZERO;
        for _ in 0..iterations {
            for offset in (0..LARGE).step_by(LARGE_STEP) {
                bitmap.mark_dirty(offset, 1);
            }
            let start = Instant::now();
            let words = bitmap.get_and_reset();
            let runs: u32 = black_box(&words)
                .iter()
                .filter(|word| **word != 0)
                .map(|word| word.count_ones())
                .sum();
            took += start.elapsed();
            ensure!(runs as usize == LARGE.div_ceil(LARGE_STEP), "{runs} runs");
        }
        Ok(took)
    }))
}

/// Regions of 8 KiB, and the bytes that one read spreads over them.
const SEGMENT: usize = 8 << 10;
const SEGMENTS: usize = 8;

/// Reads 64 KiB of a file over eight regions.
pub fn read_over_regions(shared: &SharedPages) -> Result<Batch> {
    let file = shared.file.try_clone()?;
    let ranges: Vec<_> = (0..SEGMENTS)
        .map(|number| (GuestAddress((number * SEGMENT) as u64), SEGMENT))
        .collect();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges)?;
    Ok(Batch::of(move |_| {
        vectored::read_from_at(
            black_box(&memory),
            GuestAddress(0),
            SEGMENT * SEGMENTS,
            &file,
            0,
        )
        .ok()
    }))
}

/// Reads 64 KiB of a file by one `preadv(2)` into eight mappings, with new vectors for each call.
pub fn read_by_hand(shared: &SharedPages) -> Result<Batch> {
    let file = shared.file.try_clone()?;
    let maps: Result<Vec<_>, _> = (0..SEGMENTS).map(|_| MmapMut::map_anon(SEGMENT)).collect();
    let maps = RefCell::new(maps?);
    Ok(Batch::of(move |_| {
        let mut maps = maps.borrow_mut();
        let mut vectors = black_box(&mut *maps)
            .iter_mut()
            .map(|map| IoSliceMut::new(map));
        let mut vectors: [IoSliceMut<'_>; SEGMENTS] =
            core::array::from_fn(|_| vectors.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
        rustix::io::preadv(&file, &mut vectors, 0).ok()
    }))
}

pub fn shared_iotlb(mappings: Mappings) -> Result<SharedIotlb> {
    let iotlb = SharedIotlb::new();
    for (iova, to) in mappings.pages() {
        iotlb.set_mapping(
            GuestAddress(iova),
            GuestAddress(to),
            PAGE,
            Permissions::ReadWrite,
        )?;
    }
    Ok(iotlb)
}

/// Unmaps a page of a shared IOTLB and maps it again.
pub fn remap_shared(mappings: Mappings) -> Result<Batch> {
    let iotlb = shared_iotlb(mappings)?;
    let pages: Vec<_> = mappings.pages().collect();
    let addresses = mappings.addresses(8);
    let first = pages.first().context("no page")?.0;
    Ok(Batch::of(move |number| {
        let page = (addresses.at(number) - first) as usize / PAGE;
        let (iova, to) = *pages.get(page)?;
        let gone = iotlb.invalidate_mapping(GuestAddress(iova), PAGE);
        black_box(gone);
        iotlb
            .set_mapping(
                GuestAddress(iova),
                GuestAddress(to),
                PAGE,
                Permissions::ReadWrite,
            )
            .ok()
    }))
}

/// Unmaps a page of a shared IOTLB and maps it again, while requests hold snapshots. Each iteration
/// completes one request and begins another.
pub fn remap_shared_held(mappings: Mappings, held: usize) -> Result<Batch> {
    let iotlb = shared_iotlb(mappings)?;
    let pages: Vec<_> = mappings.pages().collect();
    let addresses = mappings.addresses(8);
    let first = pages.first().context("no page")?.0;
    let requests = RefCell::new(VecDeque::with_capacity(held + 1));
    Ok(Batch::of(move |number| {
        let page = (addresses.at(number) - first) as usize / PAGE;
        let (iova, to) = *pages.get(page)?;
        let mut requests = requests.borrow_mut();
        if requests.len() >= held {
            requests.pop_front();
        }
        let gone = iotlb.invalidate_mapping(GuestAddress(iova), PAGE);
        black_box(gone);
        let done = iotlb
            .set_mapping(
                GuestAddress(iova),
                GuestAddress(to),
                PAGE,
                Permissions::ReadWrite,
            )
            .ok();
        requests.push_back(iotlb.snapshot());
        done
    }))
}

/// A read through a shared IOTLB.
pub fn read_obj_shared(shared: &SharedPages, mappings: Mappings) -> Result<Batch> {
    let physical = memory::<Plain>(shared, Layout::apart(1))?;
    let memory = IommuMemory::new(physical, shared_iotlb(mappings)?, true, ());
    let addresses = mappings.addresses(8);
    Ok(Batch::of(move |number| {
        memory
            .read_obj::<u64>(black_box(GuestAddress(addresses.at(number))))
            .ok()
    }))
}
