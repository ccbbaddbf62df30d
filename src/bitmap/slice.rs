//! A bitmap seen from an offset.

use core::fmt::{self, Debug};
use core::ops::Deref;
use std::sync::Arc;

use super::{Bitmap, BitmapSlice, WithBitmapSlice};

/// A slice that borrows its bitmap.
pub type RefSlice<'a, B> = BaseSlice<&'a B>;

/// A slice that keeps its bitmap alive.
pub type ArcSlice<B> = BaseSlice<Arc<B>>;

/// The part of a bitmap from an offset on.
///
/// Reached as [`RefSlice`] and [`ArcSlice`].
#[derive(Clone, Copy)]
pub struct BaseSlice<B> {
    inner: B,
    base_offset: usize,
}

impl<B> BaseSlice<B> {
    /// Makes the slice of `inner` that begins `offset` bytes in.
    pub fn new(inner: B, offset: usize) -> Self {
        BaseSlice {
            inner,
            base_offset: offset,
        }
    }
}

impl<B: Deref> BaseSlice<B> {
    /// Returns the bitmap that it is a part of.
    pub fn bitmap(&self) -> &B::Target {
        &self.inner
    }

    /// Returns where in the bitmap it begins, in bytes.
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

/// Sums of offsets wrap, as in 0.18.0: nothing in this crate hands out offsets that could, and where other code does, a mark in
/// the wrong place is one page too many, while a mark left out would be one too few.
impl<B> Bitmap for BaseSlice<B>
where
    B: Clone + Deref,
    B::Target: Bitmap,
{
    #[inline]
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
