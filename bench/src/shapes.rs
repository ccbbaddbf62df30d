//! Bitmaps, mappings and queues of the workloads: what both sides and the limit must agree on.

use crate::layout::{Addresses, Random};
use crate::stage::GUEST_LEN;

/// Bytes that one dirty bit, or one mapping, covers.
pub const PAGE: usize = 4096;

/// Bytes that bitmaps cover.
pub const BITMAP_LEN: usize = 1 << 30;

/// Where the destination of copies inside the guest starts.
pub const SECOND_SLICE: usize = (1 << 20) + crate::stage::HOST_OFFSET;

/// Starts of pages, each with `len` bytes of the bitmap after it.
pub fn pages_in(len: usize) -> Addresses {
    let pages = (BITMAP_LEN - len) / PAGE + 1;
    let mut random = Random::new();
    Addresses::collect(1024, |_| random.below(pages as u64) * PAGE as u64)
}

/// Where the first mapping is.
const FIRST_IOVA: u64 = 1 << 32;

/// Mappings of one page each, one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Mappings {
    pub count: u64,
    /// Neighbours lead to places that are no neighbours, so that no two can become one.
    pub fragmented: bool,
    /// Pages from one mapping to the next; more than one leaves holes.
    distance: u64,
}

impl Mappings {
    pub const fn fragmented(count: u64) -> Self {
        Self {
            count,
            fragmented: true,
            distance: 1,
        }
    }

    pub const fn contiguous(count: u64) -> Self {
        Self {
            count,
            fragmented: false,
            distance: 1,
        }
    }

    pub const fn with_holes(count: u64) -> Self {
        Self {
            count,
            fragmented: true,
            distance: 2,
        }
    }

    fn iova(&self, number: u64) -> u64 {
        FIRST_IOVA + number * self.distance * PAGE as u64
    }

    /// I/O virtual and guest physical address of each page. Fragmented ones share 256 pages, so that what is behind them stays in
    /// the caches.
    pub fn pages(self) -> impl Iterator<Item = (u64, u64)> {
        (0..self.count).map(move |number| {
            let page = if self.fragmented {
                number * 7 % 256
            } else {
                number
            };
            (self.iova(number), page * PAGE as u64)
        })
    }

    /// As many addresses as it takes that a large table does not fit into the caches.
    fn how_many(&self) -> usize {
        if self.count > 100_000 {
            1 << 16
        } else {
            1 << 10
        }
    }

    /// Addresses of accesses of `len` bytes, all of them mapped.
    pub fn addresses(&self, len: usize) -> Addresses {
        let mut random = Random::new();
        let pages = len.div_ceil(PAGE) as u64;
        let within = (pages as usize * PAGE - len) / 8 + 1;
        Addresses::collect(self.how_many(), |_| {
            self.iova(random.below(self.count - pages + 1)) + random.below(within as u64) * 8
        })
    }

    /// Addresses that are not mapped: in the holes, or behind a lone mapping.
    pub fn holes(&self) -> Addresses {
        let mut random = Random::new();
        Addresses::collect(self.how_many(), |_| {
            self.iova(random.below(self.count)) + PAGE as u64 + random.below(PAGE as u64 / 8) * 8
        })
    }

    /// The flat table that the limit looks into: the page behind each page from the first on, if there is one.
    pub fn table(self) -> FlatTable {
        let mut entries = vec![u64::MAX; (self.count * self.distance) as usize];
        for (iova, physical) in self.pages() {
            entries[(iova - FIRST_IOVA) as usize / PAGE] = physical;
        }
        FlatTable { entries }
    }
}

/// The fastest table there can be, if I/O virtual addresses were few.
#[derive(Debug)]
pub struct FlatTable {
    entries: Vec<u64>,
}

impl FlatTable {
    #[inline(always)]
    pub fn lookup(&self, iova: u64) -> Option<u64> {
        let page = iova.wrapping_sub(FIRST_IOVA) / PAGE as u64;
        match self.entries.get(page as usize) {
            Some(&base) if base != u64::MAX => Some(base + iova % PAGE as u64),
            _ => None,
        }
    }
}

/// A virtqueue in guest memory.
pub mod ring {
    use crate::values::S16;

    pub const SIZE: u16 = 256;
    pub const DESCRIPTORS: u64 = 0;
    pub const AVAILABLE: u64 = 0x1000;
    pub const USED: u64 = 0x2000;
    /// Chains of one descriptor.
    pub const SINGLES: u32 = 128;

    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;

    pub fn singles() -> Vec<S16> {
        let single = |number: u32| S16 {
            address: 0x1_0000 + u64::from(number) * 64,
            len: 64,
            flags: 0,
            next: 0,
        };
        (0..SINGLES).map(single).collect()
    }
}

/// Requests of virtio-blk: 4 KiB read from the disk.
pub mod blk {
    use super::ring;
    use crate::values::S16;

    pub const REQUESTS: u32 = 16;
    pub const DATA_LEN: usize = 4096;

    /// Header, data and status of each; the data of four requests stays in the caches.
    pub fn descriptors() -> Vec<S16> {
        let mut descriptors = Vec::new();
        for request in 0..REQUESTS {
            let header = 0x4000 + u64::from(request) * 64;
            let first = descriptors.len() as u16;
            descriptors.push(S16 {
                address: header,
                len: 16,
                flags: ring::NEXT,
                next: first + 1,
            });
            descriptors.push(S16 {
                address: 0x1_0000 + u64::from(request % 4) * DATA_LEN as u64,
                len: DATA_LEN as u32,
                flags: ring::NEXT | ring::WRITE,
                next: first + 2,
            });
            descriptors.push(S16 {
                address: header + 32,
                len: 1,
                flags: ring::WRITE,
                next: 0,
            });
        }
        descriptors
    }
}

// Fragmented mappings lead into guest memory.
const _: () = assert!(256 * PAGE <= GUEST_LEN);

#[cfg(test)]
mod tests {
    use super::{Mappings, PAGE};

    #[test]
    fn addresses_are_mapped_and_holes_are_not() {
        for mappings in [
            Mappings::fragmented(1),
            Mappings::fragmented(10_000),
            Mappings::contiguous(100),
            Mappings::with_holes(1),
            Mappings::with_holes(1000),
        ] {
            let table = mappings.table();
            let (addresses, holes) = (mappings.addresses(8), mappings.holes());
            for number in 0..1024 {
                assert!(table.lookup(addresses.at(number)).is_some(), "{mappings:?}");
                if mappings.count == 1 || mappings.distance == 2 {
                    assert!(table.lookup(holes.at(number)).is_none(), "{mappings:?}");
                }
            }
        }
    }

    #[test]
    fn neighbours_lead_elsewhere() {
        let pages: Vec<_> = Mappings::fragmented(1000).pages().collect();
        for pair in pages.windows(2) {
            assert_eq!(pair[0].0 + PAGE as u64, pair[1].0);
            assert_ne!(pair[0].1 + PAGE as u64, pair[1].1);
        }
    }
}
