//! [`BoundedSlices`]: the slices of a range, with a bound on their number.

use core::iter::FusedIterator;

use super::{Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions, Result};
use crate::bitmap::{BitmapSlice, BS};
use crate::volatile_memory::VolatileSlice;

/// The slices of a range of guest memory. Together they have at most as many bytes as the range. No
/// slice is empty.
///
/// The memory may be of another crate, whose iterator may not keep its contract. An empty slice
/// becomes an error, as in the buffer accesses of 0.18.0, and bytes past the range are left out. So
/// every loop over the slices ends. The iterators of this crate are not checked again.
#[derive(Debug)]
pub(crate) struct BoundedSlices<S> {
    slices: S,
    /// The number of bytes left. 0 after an error.
    left: usize,
}

/// Returns the slices of [`GuestMemory::get_slices`], bounded by the range.
#[inline(always)]
pub(crate) fn bounded_slices<'a, M: GuestMemory + ?Sized>(
    memory: &'a M,
    addr: GuestAddress,
    count: usize,
    access: Permissions,
) -> Result<BoundedSlices<impl GuestMemorySliceIterator<'a, BS<'a, M::Bitmap>>>> {
    Ok(BoundedSlices {
        slices: memory.get_slices(addr, count, access)?,
        left: count,
    })
}

/// Returns the part of a slice that lies in the range, of which `left` bytes are left.
#[inline(always)]
fn part_of<'a, B: BitmapSlice>(
    slice: VolatileSlice<'a, B>,
    left: &mut usize,
) -> Result<VolatileSlice<'a, B>> {
    if slice.is_empty() {
        return Err(Error::InvalidBackendAddress);
    }
    match left.checked_sub(slice.len()) {
        Some(rest) => {
            *left = rest;
            Ok(slice)
        }
        None => first_bytes(&slice, core::mem::take(left)),
    }
}

#[cold]
fn first_bytes<'a, B: BitmapSlice>(
    slice: &VolatileSlice<'a, B>,
    count: usize,
) -> Result<VolatileSlice<'a, B>> {
    Ok(slice.subslice(0, count)?)
}

impl<'a, B, S> Iterator for BoundedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
    type Item = Result<VolatileSlice<'a, B>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.slices.is_bounded_by_range() {
            return self.slices.next();
        }
        if self.left == 0 {
            return None;
        }
        let left = &mut self.left;
        let part = self.slices.next()?.and_then(|slice| part_of(slice, left));
        if part.is_err() {
            self.left = 0;
        }
        Some(part)
    }
}

impl<'a, B, S> FusedIterator for BoundedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
}

impl<'a, B, S> GuestMemorySliceIterator<'a, B> for BoundedSlices<S>
where
    B: BitmapSlice,
    S: GuestMemorySliceIterator<'a, B> + Iterator<Item = Result<VolatileSlice<'a, B>>>,
{
    #[inline(always)]
    fn is_bounded_by_range(&self) -> bool {
        true
    }

    #[inline]
    fn try_for_each_slice(
        &mut self,
        mut take: impl FnMut(VolatileSlice<'a, B>) -> Result<()>,
    ) -> Result<()> {
        if self.slices.is_bounded_by_range() {
            return self.slices.try_for_each_slice(take);
        }
        let left = &mut self.left;
        let mut complete = false;
        let result = self.slices.try_for_each_slice(|slice| {
            if *left == 0 {
                complete = true;
                // Ends the walk. The value is not used.
                return Err(Error::InvalidBackendAddress);
            }
            take(part_of(slice, left)?)
        });
        if result.is_ok() || complete {
            return Ok(());
        }
        self.left = 0;
        result
    }
}
