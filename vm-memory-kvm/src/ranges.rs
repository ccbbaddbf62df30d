//! [`Ranges`]: a set of guest addresses.

use std::collections::BTreeMap;

/// A set of guest addresses, as ranges that neither overlap nor touch.
///
/// Its size depends on the number of ranges, not on their length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// The last address of each range, by the first one.
    lasts: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds the addresses `first..=last`.
    pub(crate) fn insert(&mut self, first: u64, last: u64) {
        let (mut first, mut last) = (first, last);
        // Ranges that overlap the new one, or touch it. The last of them is found first.
        while let Some((&known, &known_last)) = self
            .lasts
            .range(..=last.saturating_add(1))
            .next_back()
            .filter(|(_, known_last)| known_last.saturating_add(1) >= first)
        {
            self.lasts.remove(&known);
            first = first.min(known);
            last = last.max(known_last);
        }
        self.lasts.insert(first, last);
    }

    /// Removes all ranges, and returns them as first and last addresses, ascending.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (u64, u64)> + use<> {
        std::mem::take(&mut self.lasts).into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::Ranges;

    fn taken(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut set = Ranges::default();
        for (first, last) in ranges {
            set.insert(*first, *last);
        }
        set.take().collect()
    }

    #[test]
    fn insert_of_ranges_that_touch_joins_them() {
        assert_eq!(taken(&[(0, 9), (20, 29), (10, 19)]), [(0, 29)]);
        assert_eq!(taken(&[(20, 29), (0, 9)]), [(0, 9), (20, 29)]);
    }

    #[test]
    fn insert_of_a_range_that_covers_others_replaces_them() {
        assert_eq!(taken(&[(2, 3), (5, 6), (9, 20), (0, 10)]), [(0, 20)]);
        assert_eq!(taken(&[(0, 20), (5, 6)]), [(0, 20)]);
    }

    #[test]
    fn insert_at_the_end_of_the_addresses_keeps_the_last_one() {
        let end = u64::MAX;
        assert_eq!(
            taken(&[(end, end), (end - 1, end - 1), (0, 0)]),
            [(0, 0), (end - 1, end)]
        );
    }
}
