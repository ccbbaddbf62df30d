//! Conversions between `usize` and `u64`, which the lints do not permit by `as`.
//!
//! All supported targets have pointers of 64 bits, so both are lossless and compile to nothing.

/// Converts a host size to 64 bits.
#[inline(always)]
pub fn to_u64(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

/// Converts a 64-bit size to a host size.
#[inline(always)]
pub fn to_usize(size: u64) -> usize {
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
