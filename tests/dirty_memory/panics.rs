//! A panic in a user's code loses no dirty page of a [`DirtyMemory`].

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use test_support::PAGE;
use vm_memory::bitmap::{
    AtomicBitmap, Bitmap, BitmapSlice, DirtyLog, DirtyPages, NewBitmap, RefSlice, WithBitmapSlice,
};
use vm_memory::dirty::DirtyMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

thread_local! {
    /// The number of calls of the user's code before the one that panics.
    static CALLS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A call of the user's code, which may panic.
fn call() {
    let left = CALLS_LEFT.get();
    CALLS_LEFT.set(left.and_then(|left| left.checked_sub(1)));
    assert_ne!(left, Some(0), "the user's code panics");
}

/// A bitmap of a user.
#[derive(Debug, Default)]
struct Own(AtomicBitmap);

#[derive(Clone, Debug)]
struct OwnSlice<'a>(RefSlice<'a, AtomicBitmap>);

impl<'a> WithBitmapSlice<'a> for Own {
    type S = OwnSlice<'a>;
}

impl<'a> WithBitmapSlice<'_> for OwnSlice<'a> {
    type S = OwnSlice<'a>;
}

impl BitmapSlice for OwnSlice<'_> {}

impl Bitmap for Own {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }
    fn slice_at(&self, offset: usize) -> OwnSlice<'_> {
        call();
        OwnSlice(self.0.slice_at(offset))
    }
}

impl<'a> Bitmap for OwnSlice<'a> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset)
    }
    fn slice_at(&self, offset: usize) -> OwnSlice<'a> {
        OwnSlice(self.0.slice_at(offset))
    }
}

impl NewBitmap for Own {
    fn with_len(len: usize) -> Self {
        Own(AtomicBitmap::with_len(len))
    }
}

impl DirtyLog for OwnSlice<'_> {
    fn page_size(&self) -> NonZeroUsize {
        call();
        self.0.page_size()
    }
    fn bitmap_and_offset(&self) -> Option<(usize, usize)> {
        call();
        self.0.bitmap_and_offset()
    }
    fn harvest_into(&self, dirty: &mut DirtyPages) {
        call();
        self.0.harvest_into(dirty);
        call();
    }
    fn put_back(&self, ranges: &mut dyn Iterator<Item = Range<usize>>) {
        self.0.put_back(ranges);
    }
}

type Memory = GuestMemoryMmap<Own>;

fn region(start: u64) -> GuestRegionMmap<Own> {
    GuestRegionMmap::from_range(GuestAddress(start), 4 * PAGE, None).unwrap()
}

/// Harvests twice, and returns whether the first call panicked, and the dirty pages.
///
/// A page was harvested before, and others were written since. Then a region was added. The user's
/// code panics after `calls` calls.
fn harvest_with_panic_after(calls: usize, is_shared: bool) -> (bool, Vec<(GuestAddress, usize)>) {
    let first = region(0);
    let mapping = first.get_mmap();
    let mut regions = vec![first];
    if is_shared {
        regions.extend(GuestRegionMmap::with_arc(mapping, GuestAddress(0x8000)));
    }
    regions.push(region(0x1_0000));
    let memory = Memory::from_regions(regions).unwrap();
    let mut dirty = DirtyMemory::new();
    memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
    dirty.harvest(&memory);
    for addr in [0x3000, 0x1_1000] {
        memory.write_obj(1u8, GuestAddress(addr)).unwrap();
    }
    let memory = memory.insert_region(Arc::new(region(0x2_0000))).unwrap();
    CALLS_LEFT.set(Some(calls));
    let panicked = catch_unwind(AssertUnwindSafe(|| dirty.harvest(&memory))).is_err();
    CALLS_LEFT.set(None);
    if calls.is_multiple_of(2) {
        // The regions change once more.
        let (memory, _) = memory
            .remove_region(GuestAddress(0x2_0000), 4 * PAGE as u64)
            .unwrap();
        dirty.harvest(&memory);
    } else {
        dirty.harvest(&memory);
    }
    (panicked, dirty.runs().collect())
}

#[test]
fn harvest_after_panic_of_log_reports_all_pages() {
    for is_shared in [false, true] {
        let addresses: &[u64] = if is_shared {
            &[0x1000, 0x3000, 0x9000, 0xb000, 0x1_1000]
        } else {
            &[0x1000, 0x3000, 0x1_1000]
        };
        let expected: Vec<_> = addresses
            .iter()
            .map(|it| (GuestAddress(*it), PAGE))
            .collect();
        let mut panics = 0;
        for calls in 0.. {
            let (panicked, pages) = harvest_with_panic_after(calls, is_shared);
            assert_eq!(pages, expected, "panic after {calls} calls, {is_shared}");
            if !panicked {
                break;
            }
            panics += 1;
        }
        // Each region makes at least five calls: one each for its slice, its page size and its
        // place, and two in its harvest.
        assert!(panics > 15, "{panics}");
    }
}
