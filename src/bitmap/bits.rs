//! Bits in words.

/// Bits in a word.
pub(super) const WORD_BITS: usize = 64;

/// The word of a bit, and what it is in there.
#[inline(always)]
pub(super) fn position(bit: usize) -> (usize, u64) {
    (bit / WORD_BITS, 1u64 << (bit % WORD_BITS))
}

/// The bits of a word from number `first` to before number `end`, either of which may be past its end.
#[inline]
pub(super) fn mask(first: usize, end: usize) -> u64 {
    let below = |bit: usize| match u32::try_from(bit).ok().and_then(|bit| 1u64.checked_shl(bit)) {
        Some(bit) => bit.wrapping_sub(1),
        None => u64::MAX,
    };
    below(end) & !below(first)
}

/// The numbers of the bits that are set, ascending.
#[inline]
pub(super) fn each_bit(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let lowest = usize::try_from(bits.trailing_zeros()).ok()?;
        bits = bits.checked_sub(1).map(|less| bits & less)?;
        Some(lowest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_end_where_a_word_does() {
        assert_eq!((mask(0, 64), mask(0, usize::MAX)), (u64::MAX, u64::MAX));
        assert_eq!(mask(3, 5), 0b11000);
        assert_eq!(
            (mask(64, 64), mask(5, 3), mask(70, 200), mask(0, 0)),
            (0, 0, 0, 0)
        );
    }

    #[test]
    fn each_bit_comes_once_and_in_order() {
        assert_eq!(each_bit((1 << 63) | 0b1001).collect::<Vec<_>>(), [0, 3, 63]);
        assert_eq!(each_bit(0).count(), 0);
        assert_eq!(each_bit(u64::MAX).count(), 64);
    }
}
