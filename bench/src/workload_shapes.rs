//! The bitmaps, mappings and queues of the workloads, which all sides share.

use crate::layout::{Addresses, Random};
use crate::shared_pages::GUEST_LEN;

/// The number of bytes that one dirty bit or one mapping covers.
pub const PAGE: usize = 4096;

/// The number of bytes that a bitmap covers.
pub const BITMAP_LEN: usize = 1 << 30;

/// The start of the destination of copies within the guest.
pub const SECOND_SLICE: usize = (1 << 20) + crate::shared_pages::HOST_OFFSET;

/// Starts of pages that are followed by `len` bytes of the bitmap.
pub fn pages_in(len: usize) -> Addresses {
    let pages = (BITMAP_LEN - len) / PAGE + 1;
    let mut random = Random::new();
    Addresses::collect(1024, |_| random.below(pages as u64) * PAGE as u64)
}

/// The dirty pages of a bitmap that is harvested.
#[derive(Debug, Clone, Copy)]
pub struct Dirty {
    /// The number of bytes that the bitmap covers.
    pub len: usize,
    /// The distance between dirty pages, in pages; 0 if none is dirty.
    pub one_in: usize,
}

impl Dirty {
    /// Returns the number of dirty pages.
    pub fn pages(self) -> usize {
        match self.one_in {
            0 => 0,
            one_in => (self.len / PAGE).div_ceil(one_in),
        }
    }

    /// Calls `mark` with the offset and the length of each range of dirty pages.
    pub fn mark(self, mut mark: impl FnMut(usize, usize)) {
        match self.one_in {
            0 => {}
            1 => mark(0, self.len),
            one_in => (0..self.len)
                .step_by(one_in * PAGE)
                .for_each(|offset| mark(offset, 1)),
        }
    }
}

/// The address of the first mapping.
const FIRST_IOVA: u64 = 1 << 32;

/// Mappings of one page each, at equal distances.
#[derive(Debug, Clone, Copy)]
pub struct Mappings {
    pub count: u64,
    /// Whether no two consecutive mappings can be merged, since their targets are not adjacent.
    pub fragmented: bool,
    /// The distance between mappings in pages; more than one leaves holes.
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

    /// Returns the IOVA and the guest physical address of each page. Fragmented mappings share 256
    /// pages, so that the memory they map to stays in the caches.
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

    /// Returns the number of addresses. The mappings of those of a large table do not fit into the
    /// caches.
    fn address_count(&self) -> usize {
        if self.count > 100_000 {
            1 << 16
        } else {
            1 << 10
        }
    }

    /// Returns addresses at which `len` bytes are mapped.
    pub fn addresses(&self, len: usize) -> Addresses {
        let mut random = Random::new();
        let pages = len.div_ceil(PAGE) as u64;
        let within = (pages as usize * PAGE - len) / 8 + 1;
        Addresses::collect(self.address_count(), |_| {
            self.iova(random.below(self.count - pages + 1)) + random.below(within as u64) * 8
        })
    }

    /// Returns unmapped addresses: in the holes, or after a single mapping.
    pub fn holes(&self) -> Addresses {
        let mut random = Random::new();
        Addresses::collect(self.address_count(), |_| {
            self.iova(random.below(self.count)) + PAGE as u64 + random.below(PAGE as u64 / 8) * 8
        })
    }

    /// Returns the flat table of the limit: the target of each page, starting at the first mapping,
    /// if the page is mapped.
    pub fn table(self) -> FlatTable {
        let mut entries = vec![u64::MAX; (self.count * self.distance) as usize];
        for (iova, physical) in self.pages() {
            entries[(iova - FIRST_IOVA) as usize / PAGE] = physical;
        }
        FlatTable { entries }
    }
}

/// A flat table: the fastest one for a small range of IOVAs.
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

/// virtio-blk requests that read 4 KiB.
pub mod blk {
    use super::ring;
    use crate::values::S16;

    pub const REQUESTS: u32 = 16;
    pub const DATA_LEN: usize = 4096;

    /// Returns the header, data and status descriptors of each request. The data of four requests
    /// stays in the caches.
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

// The targets of fragmented mappings are in guest memory.
const _: () = assert!(256 * PAGE <= GUEST_LEN);

#[cfg(test)]
mod tests {
    use super::{Dirty, Mappings, PAGE};

    #[test]
    fn dirty_marks_as_many_pages_as_it_has() {
        for one_in in [0, 1, 2, 100] {
            let dirty = Dirty {
                len: 1000 * PAGE,
                one_in,
            };
            let mut pages = 0;
            dirty.mark(|offset, len| {
                assert!(offset + len <= dirty.len);
                pages += len.div_ceil(PAGE);
            });
            assert_eq!(pages, dirty.pages(), "{one_in}");
        }
    }

    #[test]
    fn mappings_addresses_are_mapped_and_holes_are_not() {
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
    fn fragmented_mappings_have_no_adjacent_targets() {
        let pages: Vec<_> = Mappings::fragmented(1000).pages().collect();
        for pair in pages.windows(2) {
            assert_eq!(pair[0].0 + PAGE as u64, pair[1].0);
            assert_ne!(pair[0].1 + PAGE as u64, pair[1].1);
        }
    }
}
