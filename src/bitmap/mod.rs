//! Dirty tracking: which pages have been written since somebody looked.
//!
//! A [`Bitmap`] has a bit for each page of a region. Every write through this crate marks the pages that it touched, *after* the
//! bytes have been written; live migration then *harvests* the bitmap (reads and clears it) and copies those pages.
//!
//! ```text
//!   region    │ page 0 │ page 1 │ page 2 │ page 3 │ …
//!   bitmap    │    0   │    1   │    1   │    0   │ …           mark_dirty(0x1ff8, 16): two pages
//!                        └── slice_at(0x1000): offset 0 of the slice is offset 0x1000 of the bitmap
//! ```
//!
//! Slices of guest memory carry a [slice](WithBitmapSlice) of the region's bitmap, which begins where they begin. The unit type `()` is a
//! bitmap that tracks nothing and costs nothing; `Option<B>` tracks when it is `Some`. [`AtomicBitmap`] (feature
//! `backend-bitmap`) is the real one.
//!
//! Offsets and lengths are in bytes.

#[cfg(feature = "backend-bitmap")]
mod atomic;
#[cfg(feature = "backend-bitmap")]
pub(crate) mod barrier;
#[cfg(feature = "backend-bitmap")]
mod dirty_pages;
#[cfg(feature = "backend-bitmap")]
mod log;
#[cfg(feature = "backend-bitmap")]
mod log_ranges;
#[cfg(feature = "backend-bitmap")]
mod marks;
#[cfg(feature = "backend-bitmap")]
mod slice;
#[cfg(feature = "backend-bitmap")]
mod sync;

use core::fmt::Debug;

#[cfg(feature = "backend-bitmap")]
pub use atomic::AtomicBitmap;
#[cfg(feature = "backend-bitmap")]
pub use barrier::process_wide_barrier;
#[cfg(feature = "backend-bitmap")]
pub use dirty_pages::{DirtyPages, DirtyRuns};
#[cfg(feature = "backend-bitmap")]
pub use log::DirtyLog;
#[cfg(feature = "backend-bitmap")]
pub(crate) use log_ranges::{log_ranges, skip_words};
#[cfg(feature = "backend-bitmap")]
pub use slice::{ArcSlice, RefSlice};

use crate::guest_memory::GuestMemoryBackend;
use crate::region::GuestMemoryRegion;

/// What can hand out slices of a bitmap that live for `'a`.
pub trait WithBitmapSlice<'a> {
    /// The type of the slices.
    type S: BitmapSlice;
}

/// A part of a bitmap: a bitmap whose own slices have its own type.
pub trait BitmapSlice: Bitmap + Clone + Debug + for<'a> WithBitmapSlice<'a, S = Self> {}

/// What tracks which pages of a range of memory are dirty.
///
/// The reference is not Rust's only mutable one: threads mark at the same time.
pub trait Bitmap: for<'a> WithBitmapSlice<'a> {
    /// Marks the pages of the `len` bytes at `offset` as dirty. Bytes that the bitmap does not track are passed over.
    ///
    /// To be called after the bytes have been written: a harvest that clears the mark must find the new bytes.
    fn mark_dirty(&self, offset: usize, len: usize);

    /// Returns whether the page of the byte at `offset` is marked; `false` if the bitmap does not track it.
    fn dirty_at(&self, offset: usize) -> bool;

    /// Returns the part of the bitmap that begins at `offset`.
    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S;

    /// Returns whether marks of the `len` bytes at `offset` are kept, or are not meant to be.
    ///
    /// `false` says that [`mark_dirty`](Self::mark_dirty) would drop some of them: an
    /// [`IommuMemory`](crate::IommuMemory) refuses such a write. Bitmaps that do not know say `true`.
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        let _ = (offset, len);
        true
    }

    /// Grows the bitmap, if it can grow, until it tracks a range of `len` bytes.
    ///
    /// [`MmapRegionBuilder::build`](crate::mmap::MmapRegionBuilder::build) calls it, so that no mark of the new region is
    /// lost. Bitmaps whose size is not theirs to choose do nothing.
    fn grow_to_track(&mut self, len: usize) {
        let _ = len;
    }
}

/// A bitmap that can be made for a given size of memory.
pub trait NewBitmap: Bitmap + Default {
    /// Makes a bitmap that tracks `len` bytes, with pages of the host's size.
    fn with_len(len: usize) -> Self;
}

/// The slice type of the bitmap `B`.
pub type BS<'a, B> = <B as WithBitmapSlice<'a>>::S;

/// The slice type of the bitmaps in the memory `M`.
///
/// `vm-memory` 0.18.0 publishes this alias here. It is the only item of this module that names a layer above it.
pub type MS<'a, M> = BS<'a, <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B>;

/// Tracks nothing.
impl WithBitmapSlice<'_> for () {
    type S = Self;
}

/// Tracks nothing.
impl BitmapSlice for () {}

/// Tracks nothing.
impl Bitmap for () {
    #[inline]
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    #[inline]
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    #[inline]
    fn slice_at(&self, _offset: usize) -> Self {}
}

/// Tracks nothing.
impl NewBitmap for () {
    fn with_len(_len: usize) -> Self {}
}

/// Marks in both.
impl<'a, A, B> WithBitmapSlice<'a> for (A, B)
where
    A: WithBitmapSlice<'a>,
    B: WithBitmapSlice<'a>,
{
    type S = (A::S, B::S);
}

/// Marks in both.
impl<A: BitmapSlice, B: BitmapSlice> BitmapSlice for (A, B) {}

/// Marks in both; a page is dirty that one of them has marked.
impl<A: Bitmap, B: Bitmap> Bitmap for (A, B) {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
        self.1.mark_dirty(offset, len);
    }

    #[inline]
    fn dirty_at(&self, offset: usize) -> bool {
        self.0.dirty_at(offset) || self.1.dirty_at(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> (BS<'_, A>, BS<'_, B>) {
        (self.0.slice_at(offset), self.1.slice_at(offset))
    }

    #[inline]
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        self.0.tracks_range(offset, len) && self.1.tracks_range(offset, len)
    }

    fn grow_to_track(&mut self, len: usize) {
        self.0.grow_to_track(len);
        self.1.grow_to_track(len);
    }
}

/// Tracks when it is `Some`.
impl<'a, B> WithBitmapSlice<'a> for Option<B>
where
    B: WithBitmapSlice<'a>,
{
    type S = Option<B::S>;
}

/// Tracks when it is `Some`.
impl<B: BitmapSlice> BitmapSlice for Option<B> {}

/// Tracks when it is `Some`.
impl<B: Bitmap> Bitmap for Option<B> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(bitmap) = self {
            bitmap.mark_dirty(offset, len);
        }
    }

    #[inline]
    fn dirty_at(&self, offset: usize) -> bool {
        self.as_ref().is_some_and(|bitmap| bitmap.dirty_at(offset))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Option<<B as WithBitmapSlice<'_>>::S> {
        self.as_ref().map(|bitmap| bitmap.slice_at(offset))
    }

    #[inline]
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        self.as_ref()
            .is_none_or(|bitmap| bitmap.tracks_range(offset, len))
    }

    fn grow_to_track(&mut self, len: usize) {
        if let Some(bitmap) = self {
            bitmap.grow_to_track(len);
        }
    }
}

#[cfg(all(test, feature = "backend-bitmap"))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::num::NonZeroUsize;
    use std::sync::Arc;

    #[test]
    fn the_unit_bitmap_tracks_nothing_and_takes_no_room() {
        <()>::with_len(0x1000);
        let unit = ();
        unit.mark_dirty(0, 1);
        assert!(!unit.dirty_at(0));
        assert!(unit.tracks_range(usize::MAX, usize::MAX));
        assert_eq!(size_of_val(&unit.slice_at(7)), 0);
    }

    #[test]
    fn an_option_tracks_when_it_is_some() {
        let bitmap = AtomicBitmap::new(0x4000, NonZeroUsize::new(0x1000).unwrap());
        let on = Some(bitmap);
        on.slice_at(0x1000).mark_dirty(0x1000, 1);
        assert!(on.dirty_at(0x2000) && !on.dirty_at(0x1000));
        assert!(!on.tracks_range(0x3000, 0x1001));
        let off: Option<AtomicBitmap> = None;
        off.mark_dirty(0, 1);
        assert!(!off.dirty_at(0) && !off.slice_at(0).dirty_at(0));
        assert!(off.tracks_range(0, usize::MAX));
        let mut grown = on;
        grown.grow_to_track(0x5001);
        assert!(grown.tracks_range(0, 0x5001));
    }

    /// A mark, or the clearing of marks, of a range.
    #[derive(Clone, Debug)]
    enum Step {
        Mark {
            slice: usize,
            offset: usize,
            len: usize,
        },
        Set {
            offset: usize,
            len: usize,
        },
        Reset {
            offset: usize,
            len: usize,
        },
        Enlarge(usize),
        Harvest,
    }

    fn number() -> impl Strategy<Value = usize> {
        prop_oneof![4 => 0usize..0x400, 1 => Just(usize::MAX), 1 => (usize::MAX - 0x100)..usize::MAX, 2 => any::<usize>()]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (number(), number(), number()).prop_map(|(slice, offset, len)| Step::Mark {
                slice,
                offset,
                len
            }),
            (number(), number()).prop_map(|(offset, len)| Step::Set { offset, len }),
            (number(), number()).prop_map(|(offset, len)| Step::Reset { offset, len }),
            (0usize..0x100).prop_map(Step::Enlarge),
            Just(Step::Harvest),
        ]
    }

    proptest! {
        /// Against a set of pages: any page size, any range, slices of slices, growth.
        #[test]
        fn marks_agree_with_a_set_of_pages(
            bytes in 0usize..0x300,
            page in prop_oneof![(0u32..8).prop_map(|s| 1usize << s), 1usize..40, Just(usize::MAX)],
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let mut bitmap = AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap());
            let mut bytes = bytes;
            let mut model = BTreeSet::new();
            // Every page, asked whether it has one of the bytes: wide numbers, no shifts, no words.
            let pages_of = |offset: usize, len: usize, bytes: usize| {
                let (first, end) = (offset as u128, offset as u128 + len as u128);
                let has_one = move |index: usize| {
                    let start = index as u128 * page as u128;
                    first < end && start < end && first < start + page as u128
                };
                (0..bytes.div_ceil(page)).filter(move |index| has_one(*index))
            };
            for step in steps {
                match step {
                    Step::Mark { slice, offset, len } => {
                        bitmap.slice_at(slice).mark_dirty(offset, len);
                        model.extend(pages_of(slice.wrapping_add(offset), len, bytes));
                    }
                    Step::Set { offset, len } => {
                        bitmap.set_addr_range(offset, len);
                        model.extend(pages_of(offset, len, bytes));
                    }
                    Step::Reset { offset, len } => {
                        bitmap.reset_addr_range(offset, len);
                        for cleared in pages_of(offset, len, bytes) {
                            model.remove(&cleared);
                        }
                    }
                    Step::Enlarge(more) => {
                        bitmap.enlarge(more);
                        bytes += more;
                    }
                    Step::Harvest => {
                        let words = bitmap.get_and_reset();
                        let found: BTreeSet<usize> = (0..words.len() * 64)
                            .filter(|bit| words[bit / 64] & (1 << (bit % 64)) != 0)
                            .collect();
                        prop_assert_eq!(&found, &model);
                        model.clear();
                    }
                }
                let pages = bytes.div_ceil(page);
                prop_assert_eq!(bitmap.len(), pages);
                prop_assert_eq!(bitmap.byte_size(), bytes);
                for index in 0..pages + 70 {
                    prop_assert_eq!(bitmap.is_bit_set(index), model.contains(&index));
                    if let Some(offset) = index.checked_mul(page) {
                        prop_assert_eq!(bitmap.dirty_at(offset), model.contains(&index));
                        prop_assert_eq!(bitmap.is_addr_set(offset), model.contains(&index));
                    }
                }
            }
        }
    }

    #[test]
    fn slices_of_both_kinds_reach_the_same_bitmap() {
        let bitmap = Arc::new(AtomicBitmap::new(
            0x8000,
            NonZeroUsize::new(0x1000).unwrap(),
        ));
        let by_reference = bitmap.slice_at(0x1000);
        let by_count = ArcSlice::new(bitmap.clone(), 0x1000);
        by_reference.slice_at(0x1000).mark_dirty(0, 1);
        by_count.slice_at(0x2000).mark_dirty(0, 1);
        assert_eq!(bitmap.get_and_reset(), [0b1100]);
        assert!(by_count.tracks_range(0, 0x7000) && !by_count.tracks_range(0, 0x7001));
        assert!(!by_reference.tracks_range(usize::MAX, 1));
    }
}
