//! Dirty bitmaps.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::vm_memory::bitmap::{AtomicBitmap, Bitmap};
use crate::comparison::Batch;
use crate::workload_shapes::{pages_in, Dirty, BITMAP_LEN, PAGE};

fn bitmap() -> Result<AtomicBitmap> {
    Ok(AtomicBitmap::new(
        BITMAP_LEN,
        NonZeroUsize::new(PAGE).context("pages have a size")?,
    ))
}

/// Marks pages that are already dirty, as devices do between two harvests.
pub fn mark_dirty(len: usize) -> Result<Batch> {
    let bitmap = bitmap()?;
    bitmap.mark_dirty(0, BITMAP_LEN);
    ensure!(
        bitmap.dirty_at(BITMAP_LEN - 1),
        "the last page is not dirty"
    );
    let offsets = pages_in(len);
    Ok(Batch::of(move |number| {
        bitmap.mark_dirty(black_box(offsets.at(number) as usize), black_box(len));
    }))
}

/// Marks pages that are clean, each once. Clearing them again is not timed.
pub fn mark_clean() -> Result<Batch> {
    let bitmap = bitmap()?;
    let pages = BITMAP_LEN / PAGE;
    Ok(Batch::around(move |iterations| {
        let mut took = Duration::ZERO;
        let mut left = usize::try_from(iterations)?;
        while left > 0 {
            bitmap.reset();
            let count = left.min(pages);
            let start = Instant::now();
            for page in 0..count {
                bitmap.mark_dirty(black_box(page * PAGE), black_box(1));
            }
            took += start.elapsed();
            left -= count;
        }
        Ok(took)
    }))
}

pub fn dirty_at() -> Result<Batch> {
    let bitmap = bitmap()?;
    bitmap.mark_dirty(0, BITMAP_LEN);
    let offsets = pages_in(1);
    Ok(Batch::of(move |number| {
        bitmap.dirty_at(black_box(offsets.at(number) as usize))
    }))
}

/// Harvests copies of a bitmap into new vectors. Copying is not timed.
pub fn get_and_reset(dirty: Dirty) -> Result<Batch> {
    let page_size = NonZeroUsize::new(PAGE).context("pages have a size")?;
    let marked = AtomicBitmap::new(dirty.len, page_size);
    dirty.mark(|offset, len| marked.mark_dirty(offset, len));
    Ok(Batch::around(move |iterations| {
        let mut took = Duration::ZERO;
        for _ in 0..iterations {
            let bitmap = marked.clone();
            let start = Instant::now();
            let words = black_box(bitmap.get_and_reset());
            took += start.elapsed();
            let pages: usize = words.iter().map(|word| word.count_ones() as usize).sum();
            ensure!(pages == dirty.pages(), "{pages} pages");
        }
        Ok(took)
    }))
}
