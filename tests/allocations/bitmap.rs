//! A dirty bitmap allocates one bit per page and at most 1 % more, and writes none of it.

use std::num::NonZeroUsize;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, DirtyPages};

/// Returns the number of bytes that `make` allocates and does not free.
fn taken_by<T>(make: impl FnOnce() -> T) -> (isize, T) {
    let (taken, made) = crate::counting_allocator::taken_by(make);
    (taken.bytes, made)
}

#[test]
fn atomic_bitmap_of_1_tib_takes_32_mib_and_at_most_1_percent_more() {
    const PAGES: usize = 1 << 28;
    let page_size = NonZeroUsize::new(4096).unwrap();
    let allowed = 32 << 20..=(32 << 20) + (32 << 20) / 100;

    let (bytes, bitmap) = taken_by(|| AtomicBitmap::new(PAGES * 4096, page_size));
    assert_eq!(bitmap.len(), PAGES);
    assert!(allowed.contains(&bytes), "{bytes} bytes");

    let (bytes, mut dirty) = taken_by(|| DirtyPages::new(PAGES * 4096, page_size));
    assert!(allowed.contains(&bytes), "{bytes} bytes");

    // Marking and harvesting allocate nothing.
    let (bytes, ()) = taken_by(|| {
        bitmap.mark_dirty(12345 * 4096, 1 << 30);
        bitmap.harvest_into(&mut dirty);
        bitmap.put_back(&dirty);
        assert_eq!(dirty.total_pages(), 1 << 18);
        dirty.clear();
    });
    assert_eq!(bytes, 0);
}

#[test]
fn bitmaps_of_16_tib_write_none_of_their_memory() {
    const LEN: usize = 1 << 44;
    let page = NonZeroUsize::new(4096).unwrap();
    let grow = |bitmap: AtomicBitmap| {
        bitmap.grow(LEN).unwrap();
        bitmap
    };
    let not_zeroed = [
        written_by(|| AtomicBitmap::new(LEN, page)),
        written_by(|| AtomicBitmap::try_new(LEN, page).unwrap()),
        written_by(|| grow(AtomicBitmap::new(0, page))),
        written_by(|| DirtyPages::new(LEN, page)),
        written_by(|| DirtyPages::try_new(LEN, page).unwrap()),
        #[cfg(all(unix, feature = "backend-mmap"))]
        written_by(|| vm_memory::mmap::PluggedBlocks::new(LEN, page).unwrap()),
    ];
    // `grow` also allocates a small header for the part that it adds.
    assert!(
        not_zeroed.iter().all(|bytes| *bytes < 1024),
        "{not_zeroed:?}"
    );
}

/// Returns the number of bytes that `make` allocates and has to write.
fn written_by<T>(make: impl FnOnce() -> T) -> usize {
    crate::counting_allocator::taken_by(make).0.not_zeroed
}
