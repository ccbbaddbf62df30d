//! Bits in words.

use core::ops::Range;

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
    let below = |bit: usize| match u32::try_from(bit)
        .ok()
        .and_then(|bit| 1u64.checked_shl(bit))
    {
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

/// Calls `update` for each word that has bits of the ranges, with those bits: once a word, if the ranges ascend.
pub(super) fn each_word(
    ranges: impl Iterator<Item = Range<usize>>,
    mut update: impl FnMut(usize, u64),
) {
    let (mut at, mut gathered) = (0, 0);
    for range in ranges {
        for word in range.start / WORD_BITS..range.end.div_ceil(WORD_BITS) {
            let start = word.saturating_mul(WORD_BITS);
            let bits = mask(
                range.start.saturating_sub(start),
                range.end.saturating_sub(start),
            );
            if word != at && gathered != 0 {
                update(at, core::mem::take(&mut gathered));
            }
            at = word;
            gathered |= bits;
        }
    }
    if gathered != 0 {
        update(at, gathered);
    }
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

    #[test]
    fn ranges_of_a_word_come_together() {
        let words = |ranges: &[Range<usize>]| {
            let mut words = Vec::new();
            each_word(ranges.iter().cloned(), |word, bits| {
                words.push((word, bits))
            });
            words
        };
        assert_eq!(words(&[]), []);
        assert_eq!(words(&[5..5, 70..70]), []);
        assert_eq!(
            words(&[1..2, 3..5, 63..65, 66..67, 64 * 5..64 * 6]),
            [(0, 1 << 63 | 0b11010), (1, 0b101), (5, u64::MAX)]
        );
        assert_eq!(
            words(&[60..199, 199..200]),
            [(0, 0xf << 60), (1, u64::MAX), (2, u64::MAX), (3, 0xff)]
        );
        // Ranges that do not ascend are not lost.
        assert_eq!(words(&[64..65, 0..1, 1..2]), [(1, 1), (0, 0b11)]);
    }
}
