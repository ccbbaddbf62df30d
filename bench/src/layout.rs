//! The positions of regions, and the addresses of accesses.

use crate::shared_pages::GUEST_LEN;

/// The size of each of many regions.
pub const MANY_LEN: usize = 64 << 10;

/// Regions of equal size, at equal distances.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub regions: usize,
    pub region_len: usize,
    pub stride: u64,
}

impl Layout {
    /// Regions with holes between them. A single region contains all of the memory.
    pub fn apart(regions: usize) -> Self {
        let region_len = if regions == 1 { GUEST_LEN } else { MANY_LEN };
        assert!(
            regions * region_len <= GUEST_LEN,
            "{regions} regions are too many"
        );
        Self {
            regions,
            region_len,
            stride: 2 * region_len as u64,
        }
    }

    /// Regions without holes.
    pub fn adjacent(regions: usize) -> Self {
        Self {
            stride: MANY_LEN as u64,
            ..Self::apart(regions)
        }
    }

    /// Returns the guest address of each region, and its offset in the file.
    pub fn starts(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Self {
            region_len, stride, ..
        } = *self;
        (0..self.regions as u64).map(move |number| (number * stride, number * region_len as u64))
    }

    /// Returns addresses of accesses of `size` bytes in random order.
    ///
    /// They are within 16 KiB of one region, or within one page of each region, so that all bytes
    /// stay cached.
    pub fn addresses(&self, size: usize, align: usize) -> Addresses {
        let window = if self.regions == 1 { 16 << 10 } else { 4 << 10 };
        let places = (window.max(size) - size) / align + 1;
        let mut random = Random::new();
        Addresses::collect(1024, |_| {
            let region = random.below(self.regions as u64);
            region * self.stride + random.below(places as u64) * align as u64
        })
    }

    /// Returns addresses of accesses that are half in one region and half in the next.
    pub fn crossings(&self, size: usize) -> Addresses {
        let mut random = Random::new();
        Addresses::collect(1024, |_| {
            (1 + random.below(self.regions as u64 - 1)) * self.stride - size as u64 / 2
        })
    }
}

/// A power-of-two number of addresses, used in a cycle.
#[derive(Debug)]
pub struct Addresses {
    values: Vec<u64>,
    mask: usize,
}

impl Addresses {
    pub fn collect(count: usize, address: impl FnMut(u64) -> u64) -> Self {
        assert!(count.is_power_of_two(), "{count} addresses");
        Self {
            values: (0..count as u64).map(address).collect(),
            mask: count - 1,
        }
    }

    #[inline(always)]
    pub fn at(&self, number: u64) -> u64 {
        self.values[number as usize & self.mask]
    }
}

/// A generator with the same numbers in every run (xorshift64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::{Layout, MANY_LEN};

    #[test]
    fn layout_addresses_are_in_regions() {
        for regions in [1, 4, 64, 1024] {
            let layout = Layout::apart(regions);
            for (size, align) in [(1, 1), (8, 8), (64, 64), (512, 64), (4096, 4096)] {
                let addresses = layout.addresses(size, align);
                for number in 0..1024 {
                    let address = addresses.at(number);
                    let offset = address % layout.stride;
                    assert!(address / layout.stride < regions as u64);
                    assert!(offset + size as u64 <= layout.region_len as u64);
                    assert_eq!(offset % align as u64, 0);
                }
            }
        }
    }

    #[test]
    fn layout_crossings_span_two_regions() {
        let layout = Layout::adjacent(64);
        let addresses = layout.crossings(16);
        for number in 0..1024 {
            let address = addresses.at(number);
            assert_ne!(address / MANY_LEN as u64, (address + 15) / MANY_LEN as u64);
            assert!(address + 16 <= 64 * MANY_LEN as u64);
        }
    }
}
