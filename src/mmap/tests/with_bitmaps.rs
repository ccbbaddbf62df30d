//! The bitmap of a mapping covers the whole mapping.

use super::*;
use crate::bitmap::{AtomicBitmap, Bitmap};
use std::num::NonZeroUsize;

fn keeps_marks(region: &MmapRegion<AtomicBitmap>) {
    for at in [0, region.size() / 2, region.size() - 1] {
        region.as_volatile_slice().write_obj(1u8, at).unwrap();
        assert!(region.bitmap().dirty_at(at), "{at:#x} of {region:?}");
    }
}

#[test]
fn build_grows_bitmap_to_size_of_region() {
    let len = 3 * page() + 1;
    let small = || AtomicBitmap::new(0x10, NonZeroUsize::new(8).unwrap());
    keeps_marks(&MmapRegion::new(len).unwrap());
    keeps_marks(&MmapRegionBuilder::new(len).build().unwrap());
    keeps_marks(
        &MmapRegionBuilder::new_with_bitmap(len, small())
            .build()
            .unwrap(),
    );
    keeps_marks(&MmapRegion::from_file(FileOffset::new(file(len as u64), 0), len).unwrap());
    let place = FileOffset::new(file(len as u64), 0);
    keeps_marks(
        &MmapRegionBuilder::new(len)
            .with_file_offset(place)
            .build()
            .unwrap(),
    );
    let host = MmapRegion::<()>::new(len).unwrap();
    // SAFETY: 1. `host` has `len` readable and writable bytes. 2. It outlives the region. 3. No
    // reference to its bytes exists.
    #[cfg(unix)]
    keeps_marks(&unsafe { MmapRegion::build_raw(host.as_ptr(), len, BOTH, 0) }.unwrap());
    // SAFETY: 1. `host` has `len` readable and writable bytes. 2. It outlives the region. 3. No
    // reference to its bytes exists.
    let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(host.as_ptr()) };
    keeps_marks(&builder.build().unwrap());

    let marked = small();
    marked.mark_dirty(9, 1);
    let region = MmapRegionBuilder::new_with_bitmap(0x20, marked)
        .build()
        .unwrap();
    assert_eq!(region.bitmap().get_and_reset(), [2]);
    assert_eq!(
        (region.bitmap().len(), region.bitmap().byte_size()),
        (4, 0x20)
    );
}

#[test]
fn build_keeps_larger_bitmap_and_allocates_none_for_failed_mapping() {
    let large = AtomicBitmap::new(0x100, NonZeroUsize::new(8).unwrap());
    let region = MmapRegionBuilder::new_with_bitmap(0x20, large)
        .build()
        .unwrap();
    assert_eq!(region.bitmap().len(), 32);
    assert!(MmapRegion::<AtomicBitmap>::new(usize::MAX).is_err());
    assert!(MmapRegionBuilder::<AtomicBitmap>::new(usize::MAX)
        .build()
        .is_err());
    let guest = GuestRegionMmap::new(
        MmapRegion::<AtomicBitmap>::new(0x2000).unwrap(),
        GuestAddress(0x1000),
    )
    .unwrap();
    guest.write_obj(1u8, MemoryRegionAddress(0x1fff)).unwrap();
    let marks = GuestMemoryRegion::bitmap(&guest);
    assert!(marks.dirty_at(0x1fff) && !marks.dirty_at(0));
}
