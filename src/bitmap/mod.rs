//! Dirty tracking of one region: the pages that have been written since the last harvest.
//!
//! A [`Bitmap`] has one bit for each page of a region. Every write through this crate marks the
//! pages that it changed, after the bytes were written. Live migration then *harvests* the bitmap
//! (it reads and clears the marks) and copies those pages.
//!
//! ```text
//!   region    │ page 0 │ page 1 │ page 2 │ page 3 │ …
//!   bitmap    │    0   │    1   │    1   │    0   │ …      mark_dirty(0x1ff8, 16): two pages
//!                      └── slice_at(0x1000): offset 0 of the slice is offset 0x1000 of the bitmap
//! ```
//!
//! | type | use |
//! |---|---|
//! | [`AtomicBitmap`] | the bitmap, with one bit per page; feature `backend-bitmap` |
//! | `()` | tracks nothing and costs nothing |
//! | `Option<B>` | tracks if it is `Some` |
//! | `(A, B)` | marks in both |
//! | [`RefSlice`], [`ArcSlice`] | a part of a bitmap, which starts at an offset |
//! | [`DirtyLog`] | the trait by which a bitmap of any type is harvested |
//! | [`DirtyPages`] | the result of a harvest: a set of pages as plain data |
//! | [`DirtyMemory`](crate::dirty::DirtyMemory) | harvests of all regions of a memory |
//!
//! Each slice of guest memory carries a [slice](WithBitmapSlice) of the region's bitmap that begins
//! at the same byte. Offsets and lengths are in bytes.
//!
//! # Examples
//!
//! ```
//! # #[cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))] {
//! use vm_memory::bitmap::{AtomicBitmap, Bitmap};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryBackend, GuestMemoryRegion};
//!
//! let memory: GuestMemoryMmap<AtomicBitmap> =
//!     GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)])?;
//! memory.write_slice(&[1; 0x20], GuestAddress(0x1ff0))?;
//!
//! let region = memory.find_region(GuestAddress(0)).unwrap();
//! assert!(region.bitmap().dirty_at(0x1ff0) && region.bitmap().dirty_at(0x2000));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The program `examples/migration.rs` migrates a guest by its dirty pages.
//!
//! This module makes no system calls.

#[cfg(feature = "backend-bitmap")]
mod atomic;
#[cfg(feature = "backend-bitmap")]
mod dirty_log;
#[cfg(feature = "backend-bitmap")]
mod dirty_pages;
#[cfg(feature = "backend-bitmap")]
mod external_log;
#[cfg(feature = "backend-bitmap")]
mod marks;
mod on_panic;
#[cfg(feature = "backend-bitmap")]
mod pair;
#[cfg(feature = "backend-bitmap")]
mod slice;
#[cfg(feature = "backend-bitmap")]
mod sync;
#[cfg(feature = "backend-bitmap")]
mod tracking;

use core::fmt::Debug;
use std::collections::TryReserveError;

#[cfg(feature = "backend-bitmap")]
pub use atomic::AtomicBitmap;
#[cfg(feature = "backend-bitmap")]
pub use dirty_log::DirtyLog;
#[cfg(feature = "backend-bitmap")]
pub use dirty_pages::{DirtyPages, DirtyRuns};
#[cfg(feature = "backend-bitmap")]
pub(crate) use external_log::{log_ranges, skip_words};
pub(crate) use on_panic::{mark_each, OnPanic};
#[cfg(feature = "backend-bitmap")]
pub use slice::{ArcSlice, RefSlice};

use crate::guest_memory::GuestMemoryBackend;
use crate::region::GuestMemoryRegion;

/// A bitmap whose slices live for `'a`.
pub trait WithBitmapSlice<'a> {
    /// The type of the slices.
    type S: BitmapSlice;
}

/// A slice of a bitmap: a bitmap whose slices have its own type.
pub trait BitmapSlice: Bitmap + Clone + Debug + for<'a> WithBitmapSlice<'a, S = Self> {}

/// A record of the dirty pages of a range of memory.
///
/// The methods take `&self`, so that threads can mark at the same time.
///
/// # Examples
///
/// A bitmap of one bit, for memory that is always sent as a whole:
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
/// use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
///
/// #[derive(Debug, Default)]
/// struct Touched(AtomicBool);
///
/// #[derive(Clone, Debug)]
/// struct TouchedSlice<'a>(&'a Touched);
///
/// impl<'a> WithBitmapSlice<'a> for Touched {
///     type S = TouchedSlice<'a>;
/// }
///
/// impl Bitmap for Touched {
///     fn mark_dirty(&self, _offset: usize, len: usize) {
///         if len != 0 {
///             self.0.store(true, Ordering::Release);
///         }
///     }
///     fn dirty_at(&self, _offset: usize) -> bool {
///         self.0.load(Ordering::Acquire)
///     }
///     fn slice_at(&self, _offset: usize) -> TouchedSlice<'_> {
///         TouchedSlice(self)
///     }
/// }
///
/// impl<'b> WithBitmapSlice<'b> for TouchedSlice<'_> {
///     type S = Self;
/// }
///
/// impl BitmapSlice for TouchedSlice<'_> {}
///
/// impl Bitmap for TouchedSlice<'_> {
///     fn mark_dirty(&self, offset: usize, len: usize) {
///         self.0.mark_dirty(offset, len);
///     }
///     fn dirty_at(&self, offset: usize) -> bool {
///         self.0.dirty_at(offset)
///     }
///     fn slice_at(&self, _offset: usize) -> Self {
///         self.clone()
///     }
/// }
///
/// let bitmap = Touched::default();
/// bitmap.slice_at(0x1000).mark_dirty(0, 1);
/// assert!(bitmap.dirty_at(0));
/// ```
pub trait Bitmap: for<'a> WithBitmapSlice<'a> {
    /// Marks the pages of the `len` bytes at `offset`.
    ///
    /// Bytes that the bitmap does not track are ignored.
    ///
    /// Call it after the bytes have been written: a harvest that clears the mark must read the new
    /// bytes. Another component, such as a vhost-user front end, may harvest the bitmap. Such a
    /// bitmap must set each bit by a read-modify-write, even if it is set. A bitmap may skip the
    /// read-modify-write only if its harvest has a full fence.
    fn mark_dirty(&self, offset: usize, len: usize);

    /// Returns whether the page of the byte at `offset` is dirty.
    ///
    /// Returns `false` if the bitmap does not track it.
    fn dirty_at(&self, offset: usize) -> bool;

    /// Returns the slice of the bitmap that begins at `offset`.
    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S;

    /// Returns whether the bitmap tracks all of the `len` bytes at `offset`.
    ///
    /// `false` means that [`mark_dirty`](Self::mark_dirty) would ignore some of them. An
    /// [`IommuMemory`](crate::IommuMemory) refuses such a write. A bitmap that tracks nothing on
    /// purpose returns `true`, as the default does.
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        let _ = (offset, len);
        true
    }

    /// Grows the bitmap until it tracks the first `len` bytes.
    ///
    /// The default calls [`grow_shared`](Self::grow_shared).
    ///
    /// [`MmapRegionBuilder::build`](crate::mmap::MmapRegionBuilder::build) calls it, so that the
    /// bitmap tracks the whole region. After the call, it refuses a bitmap that does not
    /// [track](Self::tracks_range) the region.
    fn grow_to_track(&mut self, len: usize) {
        self.grow_shared(len);
    }

    /// Grows the bitmap as [`grow_to_track`](Self::grow_to_track) does, while others use it.
    ///
    /// The default does nothing.
    ///
    /// A slice, such as an `ArcSlice`, grows its bitmap by this method. If the words of the new
    /// pages cannot be allocated, nothing changes.
    fn grow_shared(&self, len: usize) {
        let _ = len;
    }
}

/// A bitmap that can be created for a given number of bytes.
pub trait NewBitmap: Bitmap + Default {
    /// Creates a bitmap that tracks `len` bytes, in pages of the host's page size.
    fn with_len(len: usize) -> Self;

    /// Creates a bitmap like [`with_len`](Self::with_len), but returns an error if memory runs out.
    ///
    /// A region creates its bitmap by this method. The default calls `with_len`.
    ///
    /// # Errors
    ///
    /// Returns an error if memory runs out.
    fn try_with_len(len: usize) -> Result<Self, TryReserveError> {
        Ok(Self::with_len(len))
    }
}

/// The slice type of the bitmap `B`.
pub type BS<'a, B> = <B as WithBitmapSlice<'a>>::S;

/// The slice type of the bitmaps in the memory `M`.
///
/// `vm-memory` 0.18.0 publishes this alias here. It is the only item of this module that names
/// modules of a later layer.
pub type MS<'a, M> = BS<'a, <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B>;

impl WithBitmapSlice<'_> for () {
    type S = Self;
}

impl BitmapSlice for () {}

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

impl NewBitmap for () {
    fn with_len(_len: usize) -> Self {}
}

impl<'a, A, B> WithBitmapSlice<'a> for (A, B)
where
    A: WithBitmapSlice<'a>,
    B: WithBitmapSlice<'a>,
{
    type S = (A::S, B::S);
}

impl<A: BitmapSlice, B: BitmapSlice> BitmapSlice for (A, B) {}

/// Marks in both. A page is dirty if it is dirty in either.
impl<A: Bitmap, B: Bitmap> Bitmap for (A, B) {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        let second = OnPanic(|| self.1.mark_dirty(offset, len));
        self.0.mark_dirty(offset, len);
        core::mem::forget(second);
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

    fn grow_shared(&self, len: usize) {
        self.0.grow_shared(len);
        self.1.grow_shared(len);
    }
}

impl<'a, B> WithBitmapSlice<'a> for Option<B>
where
    B: WithBitmapSlice<'a>,
{
    type S = Option<B::S>;
}

impl<B: BitmapSlice> BitmapSlice for Option<B> {}

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

    fn grow_shared(&self, len: usize) {
        if let Some(bitmap) = self {
            bitmap.grow_shared(len);
        }
    }
}

#[cfg(all(test, feature = "backend-bitmap"))]
mod tests {
    use super::*;
    use std::num::NonZeroUsize;
    use std::sync::Arc;

    #[test]
    fn unit_bitmap_tracks_nothing_and_has_no_size() {
        <()>::with_len(0x1000);
        let unit = ();
        unit.mark_dirty(0, 1);
        assert!(!unit.dirty_at(0));
        assert!(unit.tracks_range(usize::MAX, usize::MAX));
        assert_eq!(size_of_val(&unit.slice_at(7)), 0);
    }

    #[test]
    fn option_bitmap_tracks_if_some() {
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

    #[test]
    fn pair_marks_second_bitmap_after_panic_of_first() {
        /// A bitmap whose marks panic.
        #[derive(Clone, Debug)]
        struct Panics;
        impl WithBitmapSlice<'_> for Panics {
            type S = Self;
        }
        impl BitmapSlice for Panics {}
        impl Bitmap for Panics {
            fn mark_dirty(&self, _: usize, _: usize) {
                panic!("the first bitmap panics");
            }
            fn dirty_at(&self, _: usize) -> bool {
                false
            }
            fn slice_at(&self, _: usize) -> Self {
                Self
            }
        }
        let bitmap = AtomicBitmap::new(0x2000, NonZeroUsize::new(0x1000).unwrap());
        let pair = (Panics, bitmap);
        let marked = std::panic::catch_unwind(|| pair.mark_dirty(0x1000, 1));
        assert!(marked.is_err() && pair.dirty_at(0x1000) && !pair.dirty_at(0));
        // Both panic. The first panic is returned, and the process does not abort.
        let both = (Panics, (Panics, pair.1));
        assert!(std::panic::catch_unwind(|| both.mark_dirty(0, 1)).is_err());
        assert!(both.dirty_at(0));
    }

    #[test]
    fn ref_slice_and_arc_slice_mark_the_same_bitmap() {
        let bitmap = Arc::new(AtomicBitmap::new(
            0x8000,
            NonZeroUsize::new(0x1000).unwrap(),
        ));
        let by_reference = bitmap.slice_at(0x1000);
        let by_arc = ArcSlice::new(bitmap.clone(), 0x1000);
        by_reference.slice_at(0x1000).mark_dirty(0, 1);
        by_arc.slice_at(0x2000).mark_dirty(0, 1);
        assert_eq!(bitmap.get_and_reset(), [0b1100]);
        assert!(by_arc.tracks_range(0, 0x7000) && !by_arc.tracks_range(0, 0x7001));
        assert!(!by_reference.tracks_range(usize::MAX, 1));
    }
}
