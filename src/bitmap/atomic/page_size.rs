//! [`PageSize`]: a page size that divides fast.

use core::num::NonZeroUsize;

/// A page size, prepared for divisions by it.
#[derive(Clone, Copy, Debug)]
pub(super) enum PageSize {
    /// A power of two, given by its exponent.
    Shift(u32),
    /// Any other number of bytes, which 0.18.0 allows.
    Odd(NonZeroUsize),
}

impl PageSize {
    pub(super) fn new(bytes: NonZeroUsize) -> Self {
        if bytes.is_power_of_two() {
            Self::Shift(bytes.trailing_zeros())
        } else {
            Self::Odd(bytes)
        }
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(self) -> NonZeroUsize {
        match self {
            Self::Shift(shift) => {
                NonZeroUsize::new(1usize.wrapping_shl(shift)).unwrap_or(NonZeroUsize::MIN)
            }
            Self::Odd(size) => size,
        }
    }

    /// Returns the page that contains the byte at `offset`.
    #[inline(always)]
    pub(super) fn page_of(self, offset: usize) -> usize {
        match self {
            Self::Shift(shift) => offset >> shift,
            Self::Odd(size) => offset / size,
        }
    }

    /// Returns the number of pages that hold `bytes` bytes.
    pub(super) fn pages_for(self, bytes: usize) -> usize {
        match bytes.checked_sub(1) {
            // Cannot overflow: with pages of 1 byte the sum is `bytes`, and with larger pages the
            // quotient is less than `usize::MAX`.
            Some(last) => self.page_of(last).saturating_add(1),
            None => 0,
        }
    }
}
