//! A panic in the code of a user leaves a buffer as it was.

use core::iter::FusedIterator;
use std::panic::{catch_unwind, AssertUnwindSafe};

use super::*;
use crate::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice, BS};
use crate::guest_memory::{GuestMemorySliceIterator, TranslationHold};

/// Returns the bytes that the vectors name.
fn named<M: GuestMemory>(buffer: &IoBuffer<M>) -> usize {
    buffer.vectors().iter().map(|vector| vector.iov_len).sum()
}

/// A memory whose iterator panics before the fourth slice.
struct Panicking(Memory);

struct Slices<I>(I, usize);

impl<I: Iterator> Iterator for Slices<I> {
    type Item = I::Item;
    fn next(&mut self) -> Option<I::Item> {
        self.1 += 1;
        assert_ne!(self.1, 4, "the iterator panics");
        self.0.next()
    }
}

impl<I: FusedIterator> FusedIterator for Slices<I> {}
impl<'a, B: BitmapSlice, I: GuestMemorySliceIterator<'a, B>> GuestMemorySliceIterator<'a, B>
    for Slices<I>
{
}

impl GuestMemory for Panicking {
    type PhysicalMemory = Memory;
    type Bitmap = AtomicBitmap;
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.0, addr, count, access)
    }
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>>> {
        GuestMemory::get_slices(&self.0, addr, count, access).map(|slices| Slices(slices, 0))
    }
    fn hold_translation(&self) -> Option<TranslationHold> {
        Some(TranslationHold::nothing())
    }
}

#[test]
fn io_buffer_push_with_panicking_iterator_leaves_buffer_unchanged() {
    let mut buffer = IoBuffer::new(Arc::new(Panicking(regions(6))), Permissions::Read);
    buffer.push(GuestAddress(8), PAGE).unwrap();
    let push = |buffer: &mut IoBuffer<_>| buffer.push(GuestAddress(0), 6 * PAGE);
    assert!(catch_unwind(AssertUnwindSafe(|| push(&mut buffer))).is_err());
    assert_eq!((buffer.len(), named(&buffer)), (PAGE, PAGE));
    buffer.push(GuestAddress(0), 2 * PAGE).unwrap();
    assert_eq!((buffer.len(), named(&buffer)), (3 * PAGE, 3 * PAGE));
}

#[test]
fn io_buffer_extended_by_panicking_iterator_is_unchanged() {
    let memory = Arc::new(regions(6));
    let start = (GuestAddress(8), PAGE);
    let mut buffer = IoBuffer::from_ranges(&memory, [start], Permissions::Read).unwrap();
    let ranges = [0u64, 1, 2, 3].map(|page| (GuestAddress(page << 12), PAGE));
    let extend = |buffer: &mut IoBuffer<_>| {
        buffer.try_extend(
            ranges
                .into_iter()
                .inspect(|range| assert_ne!(range.0 .0, 0x3000)),
        )
    };
    assert!(catch_unwind(AssertUnwindSafe(|| extend(&mut buffer))).is_err());
    assert_eq!((buffer.len(), named(&buffer)), (PAGE, PAGE));
}

/// A bitmap that panics when it is sliced in the middle of a page.
#[derive(Clone, Debug, Default)]
struct Fragile;

impl WithBitmapSlice<'_> for Fragile {
    type S = Self;
}
impl BitmapSlice for Fragile {}
impl Bitmap for Fragile {
    fn mark_dirty(&self, _: usize, _: usize) {}
    fn dirty_at(&self, _: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> Self {
        assert_ne!(offset, PAGE / 2, "the bitmap panics");
        Self
    }
}
impl NewBitmap for Fragile {
    fn with_len(_: usize) -> Self {
        Self
    }
}

#[test]
fn io_buffer_split_with_panicking_bitmap_leaves_buffer_unchanged() {
    let ranges = [(GuestAddress(0), 2 * PAGE)];
    let memory = GuestMemoryMmap::<Fragile>::from_ranges(&ranges).unwrap();
    let mut buffer = IoBuffer::new(Arc::new(memory), Permissions::Read);
    buffer.push(GuestAddress(0), 2 * PAGE).unwrap();
    let split = catch_unwind(AssertUnwindSafe(|| buffer.split_off(PAGE / 2)));
    assert!(split.is_err());
    let completed = catch_unwind(AssertUnwindSafe(|| buffer.cancel_front(PAGE / 2)));
    assert!(completed.is_err());
    assert_eq!((buffer.len(), named(&buffer)), (2 * PAGE, 2 * PAGE));
    assert_eq!(buffer.split_off(PAGE).unwrap().len(), PAGE);
}
