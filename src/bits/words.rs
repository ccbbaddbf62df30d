//! Masks and ranges of bits in words.

use core::ops::Range;

/// The number of bits in a word.
pub const WORD_BITS: usize = 64;

/// Converts the number or the count of bits in a word.
#[inline]
pub fn bit_number(number: u32) -> usize {
    usize::try_from(number).unwrap_or(WORD_BITS)
}

/// Returns the bits `first..end` of a word. Either bound may be past the end of the word.
#[cfg(feature = "backend-bitmap")]
#[inline]
pub(crate) fn mask(first: usize, end: usize) -> u64 {
    let below = |bit: usize| match u32::try_from(bit)
        .ok()
        .and_then(|bit| 1u64.checked_shl(bit))
    {
        Some(bit) => bit.wrapping_sub(1),
        None => u64::MAX,
    };
    below(end) & !below(first)
}

/// Returns the words that have bits of the range, ascending, each with a mask of those bits.
#[inline]
pub fn words_of(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = range;
    let last_bit = end.saturating_sub(1);
    let (first, last) = (start / WORD_BITS, last_bit / WORD_BITS);
    let head = u64::MAX << (start % WORD_BITS);
    let tail = u64::MAX >> (WORD_BITS - 1).saturating_sub(last_bit % WORD_BITS);
    let words = if start < end {
        first..last.saturating_add(1)
    } else {
        0..0
    };
    words.map(move |word| {
        let head = if word == first { head } else { u64::MAX };
        let tail = if word == last { tail } else { u64::MAX };
        (word, head & tail)
    })
}

/// Calls `update` for each word that has bits of the ranges, with a mask of those bits.
///
/// If the ranges ascend, it calls `update` once per word.
#[cfg(feature = "backend-bitmap")]
#[inline]
pub(crate) fn for_each_word(
    ranges: impl Iterator<Item = Range<usize>>,
    mut update: impl FnMut(usize, u64),
) {
    let (mut current, mut gathered) = (0, 0);
    for range in ranges {
        for (word, bits) in words_of(range) {
            if word != current && gathered != 0 {
                update(current, core::mem::take(&mut gathered));
            }
            current = word;
            gathered |= bits;
        }
    }
    if gathered != 0 {
        update(current, gathered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "backend-bitmap")]
    #[test]
    fn mask_with_bounds_past_the_word_is_clipped() {
        assert_eq!((mask(0, 64), mask(0, usize::MAX)), (u64::MAX, u64::MAX));
        assert_eq!(mask(3, 5), 0b11000);
        assert_eq!(
            (mask(64, 64), mask(5, 3), mask(70, 200), mask(0, 0)),
            (0, 0, 0, 0)
        );
    }

    #[test]
    fn words_of_range_have_masks_of_its_bits() {
        let words = |range| words_of(range).collect::<Vec<_>>();
        assert!(words(5..5).is_empty());
        assert_eq!(words(63..66), [(0, 1 << 63), (1, 0b11)]);
        assert_eq!(words(64..128), [(1, u64::MAX)]);
        let last = usize::MAX / WORD_BITS;
        assert_eq!(words(usize::MAX - 1..usize::MAX), [(last, 1 << 62)]);
    }

    #[cfg(feature = "backend-bitmap")]
    #[test]
    fn for_each_word_joins_ranges_of_one_word() {
        let words = |ranges: &[Range<usize>]| {
            let mut words = Vec::new();
            for_each_word(ranges.iter().cloned(), |word, bits| {
                words.push((word, bits))
            });
            words
        };
        assert!(words(&[]).is_empty());
        assert!(words(&[5..5, 70..70]).is_empty());
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
