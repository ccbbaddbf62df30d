//! A panic in the code of a user leaves a buffer unchanged, and loses no mark of other bitmaps.

use core::iter::FusedIterator;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

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
    let split = catch_unwind(AssertUnwindSafe(|| buffer.split_to(PAGE / 2)));
    assert!(split.is_err());
    let completed = catch_unwind(AssertUnwindSafe(|| buffer.cancel_front(PAGE / 2)));
    assert!(completed.is_err());
    assert_eq!((buffer.len(), named(&buffer)), (2 * PAGE, 2 * PAGE));
    assert_eq!(buffer.split_off(PAGE).unwrap().len(), PAGE);
}

/// A bitmap of one bit, or one that panics: always, or only when it is sliced past its start.
#[derive(Clone, Debug, Default)]
struct Breakable(Arc<State>);

#[derive(Debug, Default)]
struct State {
    panics_to_mark: AtomicBool,
    panics_to_slice: AtomicBool,
    marked: AtomicBool,
}

impl WithBitmapSlice<'_> for Breakable {
    type S = Self;
}
impl BitmapSlice for Breakable {}
impl Bitmap for Breakable {
    fn mark_dirty(&self, _: usize, len: usize) {
        assert!(!self.0.panics_to_mark.load(SeqCst), "the bitmap panics");
        self.0.marked.fetch_or(len != 0, SeqCst);
    }
    fn dirty_at(&self, _: usize) -> bool {
        self.0.marked.load(SeqCst)
    }
    fn slice_at(&self, offset: usize) -> Self {
        let panics = offset != 0 && self.0.panics_to_slice.load(SeqCst);
        assert!(!panics, "the bitmap panics");
        self.clone()
    }
}
impl NewBitmap for Breakable {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

/// Runs `write`, which writes all bytes of three regions. Returns which regions are marked if the
/// bitmap of the first one panics.
fn marked_by(
    write: impl Fn(&Arc<GuestMemoryMmap<Breakable>>),
    breaks: impl Fn(&State) -> &AtomicBool,
) -> [bool; 3] {
    let page = |number: u64| (GuestAddress(number * PAGE as u64), PAGE);
    let memory = GuestMemoryMmap::<Breakable>::from_ranges(&[page(0), page(1), page(2)]).unwrap();
    let bitmaps: Vec<_> = memory.iter().map(GuestMemoryRegion::bitmap).collect();
    breaks(&bitmaps[0].0).store(true, SeqCst);
    let memory = Arc::new(memory);
    assert!(catch_unwind(AssertUnwindSafe(|| write(&memory))).is_err());
    [0, 1, 2].map(|region: usize| bitmaps[region].dirty_at(0))
}

/// Returns a buffer of all bytes, after its vectors were lent.
fn lent(memory: &Arc<GuestMemoryMmap<Breakable>>) -> IoBuffer<GuestMemoryMmap<Breakable>> {
    let mut buffer = IoBuffer::new(Arc::clone(memory), Permissions::Write);
    buffer.push(GuestAddress(0), 3 * PAGE).unwrap();
    assert_eq!(buffer.vectors().len(), 3);
    buffer
}

#[test]
fn write_to_several_regions_marks_the_others_if_one_bitmap_panics() {
    type Write = fn(&Arc<GuestMemoryMmap<Breakable>>);
    let cases: [(&str, Write); 8] = [
        ("read_from_at", |memory| {
            let file = test_support::temp_file(&[7; 3 * PAGE]);
            let _ = read_from_at(&**memory, GuestAddress(0), 3 * PAGE, &file, 0);
        }),
        ("read_exact_from_at", |memory| {
            let file = test_support::temp_file(&[7; 3 * PAGE]);
            let _ = read_exact_from_at(&**memory, GuestAddress(0), 3 * PAGE, &file, 0);
        }),
        // The kernel was given all bytes, and returns a short count.
        ("read_exact_from_at of a short file", |memory| {
            let file = test_support::temp_file(&[7; 10]);
            let _ = read_exact_from_at(&**memory, GuestAddress(0), 3 * PAGE, &file, 0);
        }),
        ("IoBuffer::complete", |memory| {
            lent(memory).complete(3 * PAGE);
        }),
        ("drop of an IoBuffer", |memory| drop(lent(memory))),
        ("unwinding with an IoBuffer", |memory| {
            let _buffer = lent(memory);
            panic!("expected by the test");
        }),
        ("IoVectors::mark_dirty", |memory| {
            let vectors = io_vectors(&**memory, GuestAddress(0), 3 * PAGE, Permissions::Write);
            let vectors = vectors.unwrap();
            assert_eq!(vectors.vectors().len(), 3);
            vectors.mark_dirty(1, 3 * PAGE);
        }),
        ("Window::mark_dirty", |memory| {
            let window = memory.window(GuestAddress(0), 3 * PAGE, Permissions::Write);
            window.unwrap().mark_dirty(1, 3 * PAGE);
        }),
    ];
    for (name, write) in cases {
        let marked = marked_by(write, |state| &state.panics_to_mark);
        assert_eq!(marked, [false, true, true], "{name}");
    }
    // The bitmap is sliced for the rest of the vectors, after the kernel has written.
    let (name, write) = cases[2];
    let marked = marked_by(write, |state| &state.panics_to_slice);
    assert_eq!(marked, [true, true, true], "{name}");
}
