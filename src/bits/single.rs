//! Single bits of words.

use super::{bit_number, WORD_BITS};

/// Returns the position of a bit: the number of its word, and a value with that bit set.
#[inline(always)]
pub(crate) fn position(bit: usize) -> (usize, u64) {
    (bit / WORD_BITS, 1u64 << (bit % WORD_BITS))
}

/// Returns the bits from `first` to `last`, both inclusive, each given as a value with that bit
/// set.
#[inline(always)]
pub(crate) fn bits_between(first: u64, last: u64) -> u64 {
    // `bit - 1` is the bits below `bit`, and `bit | (bit - 1)` those up to it; `bit` is never 0.
    (last | last.wrapping_sub(1)) & !first.wrapping_sub(1)
}

/// Returns the numbers of the bits that are set, ascending.
#[inline]
pub(crate) fn each_bit(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let lowest = bit_number(bits.trailing_zeros());
        bits = bits.checked_sub(1).map(|less| bits & less)?;
        Some(lowest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_between_includes_both_ends() {
        assert_eq!(bits_between(1 << 2, 1 << 4), 0b11100);
        assert_eq!(bits_between(1, 1 << 63), u64::MAX);
        assert_eq!(bits_between(1 << 63, 1 << 63), 1 << 63);
    }

    #[test]
    fn each_bit_returns_set_bits_in_order() {
        assert_eq!(each_bit((1 << 63) | 0b1001).collect::<Vec<_>>(), [0, 3, 63]);
        assert_eq!(each_bit(0).count(), 0);
        assert_eq!(each_bit(u64::MAX).count(), 64);
    }
}
