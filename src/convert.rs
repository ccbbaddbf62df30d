//! Saturating conversions between host sizes (`usize`) and 64-bit sizes.
//!
//! Guest addresses and file positions have 64 bits on every target. A saturated result never
//! passes a bounds check, because no object is larger than `isize::MAX`. On 64-bit targets, both
//! conversions are lossless and compile to nothing.

/// Converts a host size to 64 bits.
#[inline(always)]
pub(crate) fn to_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

/// Converts a 64-bit size to a host size. A size that does not fit becomes `usize::MAX`.
#[inline(always)]
pub(crate) fn to_usize(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_u64_and_to_usize_of_extremes_are_lossless_or_saturate() {
        assert_eq!(to_u64(0), 0);
        assert_eq!(to_usize(to_u64(usize::MAX)), usize::MAX);
        assert_eq!(to_usize(u64::MAX), usize::MAX);
    }
}
