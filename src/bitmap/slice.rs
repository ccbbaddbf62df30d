//! [`BaseSlice`]: a part of a bitmap, which starts at an offset.

use core::fmt::{self, Debug};
use core::ops::Deref;
use std::sync::Arc;

use super::{Bitmap, BitmapSlice, WithBitmapSlice};

/// A slice that borrows its bitmap.
pub type RefSlice<'a, B> = BaseSlice<&'a B>;

/// A slice that keeps its bitmap alive.
///
/// Regions whose memory is one allocation can share one bitmap by such slices.
///
/// # Examples
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::sync::Arc;
/// use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap};
///
/// let bitmap = Arc::new(AtomicBitmap::new(0x8000, NonZeroUsize::new(0x1000).unwrap()));
/// let second_half = ArcSlice::new(Arc::clone(&bitmap), 0x4000);
/// second_half.mark_dirty(0, 1);
/// assert!(bitmap.dirty_at(0x4000));
/// ```
pub type ArcSlice<B> = BaseSlice<Arc<B>>;

/// A part of a bitmap. Offset 0 of the slice is its [base offset](Self::base_offset) in the bitmap.
///
/// Its two forms are [`RefSlice`] and [`ArcSlice`].
///
/// Sums of offsets wrap, as in 0.18.0. Offsets of slices that this crate creates never wrap. If a
/// caller passes an offset past the bitmap, the wrong page may be marked.
#[derive(Clone, Copy)]
pub struct BaseSlice<B> {
    inner: B,
    base_offset: usize,
}

impl<B> BaseSlice<B> {
    /// Creates the slice of `inner` that begins at `offset`.
    pub fn new(inner: B, offset: usize) -> Self {
        BaseSlice {
            inner,
            base_offset: offset,
        }
    }
}

impl<B: Deref> BaseSlice<B> {
    /// Returns the bitmap that this is a slice of.
    pub fn bitmap(&self) -> &B::Target {
        &self.inner
    }

    /// Returns the offset in the bitmap at which the slice begins, in bytes.
    pub fn base_offset(&self) -> usize {
        self.base_offset
    }
}

impl<B> WithBitmapSlice<'_> for BaseSlice<B>
where
    B: Clone + Deref,
    B::Target: Bitmap,
{
    type S = Self;
}

impl<B> BitmapSlice for BaseSlice<B>
where
    B: Clone + Deref,
    B::Target: Bitmap,
{
}

impl<B> Bitmap for BaseSlice<B>
where
    B: Clone + Deref,
    B::Target: Bitmap,
{
    #[inline(always)]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.inner
            .mark_dirty(self.base_offset.wrapping_add(offset), len);
    }

    #[inline]
    fn dirty_at(&self, offset: usize) -> bool {
        self.inner.dirty_at(self.base_offset.wrapping_add(offset))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        BaseSlice {
            inner: self.inner.clone(),
            base_offset: self.base_offset.wrapping_add(offset),
        }
    }

    #[inline]
    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        self.base_offset
            .checked_add(offset)
            .is_some_and(|offset| self.inner.tracks_range(offset, len))
    }

    fn grow_shared(&self, len: usize) {
        // A sum that overflows is past the end of any bitmap: `tracks_range` reports it.
        if let Some(end) = self.base_offset.checked_add(len) {
            self.inner.grow_shared(end);
        }
    }
}

impl<B> Debug for BaseSlice<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BaseSlice")
            .field("base_offset", &self.base_offset)
            .finish_non_exhaustive()
    }
}

impl<B: Default> Default for BaseSlice<B> {
    fn default() -> Self {
        BaseSlice {
            inner: B::default(),
            base_offset: 0,
        }
    }
}
