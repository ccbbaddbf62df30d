//! Zeroed memory, whose allocation may fail and touches none of it.

use core::sync::atomic::AtomicU64;
use std::alloc::{alloc_zeroed, Layout};
use std::collections::TryReserveError;

/// A type for which zeroed bytes are a valid value.
///
/// # Safety
///
/// Zeroes in all bytes must be a valid value of the type, equal to `T::default()`.
pub(crate) unsafe trait Zeroed: Default {}

// SAFETY: every pattern of bits is a `u64`. Zeroes are 0, the default.
unsafe impl Zeroed for u64 {}

// SAFETY: `AtomicU64` has the size and the valid bits of `u64`. Zeroes are 0, the default.
unsafe impl Zeroed for AtomicU64 {}

/// Creates `count` values of zeroes, or returns an error if memory runs out.
///
/// The allocator usually gets fresh pages from the system, which are populated when they are used.
pub(crate) fn try_zeroed<T: Zeroed>(count: usize) -> Result<Vec<T>, TryReserveError> {
    let layout = Layout::array::<T>(count).ok();
    if let Some(layout) = layout.filter(|layout| layout.size() != 0) {
        // SAFETY: the size of `layout` is not 0, as checked in the line before.
        let block = unsafe { alloc_zeroed(layout) }.cast::<T>();
        if !block.is_null() {
            // SAFETY: the global allocator allocated `block` with the layout of `count` values.
            // `Zeroed` states that its bytes are `count` valid values. Nothing else owns it.
            return Ok(unsafe { Vec::from_raw_parts(block, count, count) });
        }
    }
    // An allocation by `Vec`, because only `Vec` can make the error.
    let mut values = Vec::new();
    values.try_reserve_exact(count)?;
    values.resize_with(count, T::default);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::Ordering::Relaxed;

    #[test]
    fn try_zeroed_of_any_count_returns_zeroes() {
        for count in [0, 1, 7, 1000] {
            assert_eq!(try_zeroed::<u64>(count).unwrap(), vec![0; count]);
        }
        let words = try_zeroed::<AtomicU64>(3).unwrap();
        assert!(words.iter().all(|word| word.load(Relaxed) == 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri ends if memory runs out")]
    fn try_zeroed_past_memory_returns_error() {
        for count in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8] {
            assert!(try_zeroed::<u64>(count).is_err());
        }
    }
}
