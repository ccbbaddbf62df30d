//! All ways to walk a range over several regions agree: the iterator, `try_for_each_slice`, and
//! `regions_from`.
#![cfg(feature = "backend-mmap")]

use std::sync::Arc;

use proptest::prelude::*;
use test_support::PAGE;
use vm_memory::bitmap::{Bitmap, BS};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress, MmapRegion,
    Permissions, VolatileSlice,
};

/// The behaviour of a test region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Memory,
    /// Permits only reads.
    ReadOnly,
    /// The second half is an unplugged block.
    HalfPlugged,
    /// Returns slices that are one byte too short.
    ShortSlices,
    /// Not mapped in this process.
    Device,
}

/// A region of two pages at any address, including the end of the address space.
struct Region {
    start: u64,
    kind: Kind,
    mapping: MmapRegion<()>,
}

impl Region {
    fn new(start: u64, kind: Kind) -> Self {
        let builder = MmapRegionBuilder::new(2 * PAGE);
        let builder = if kind == Kind::HalfPlugged {
            let blocks = PluggedBlocks::new(2 * PAGE, PAGE.try_into().unwrap()).unwrap();
            blocks.plug(0, PAGE).unwrap();
            builder.with_plugged_blocks(Arc::new(blocks))
        } else {
            builder
        };
        let mapping = builder.build().unwrap();
        Self {
            start,
            kind,
            mapping,
        }
    }
}

impl GuestMemoryRegionBytes for Region {}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        2 * PAGE as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, ()> {
        ().slice_at(0)
    }

    fn allowed_access(&self) -> Permissions {
        match self.kind {
            Kind::ReadOnly => Permissions::Read,
            _ => Permissions::ReadWrite,
        }
    }

    fn get_slice(
        &self,
        addr: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        use vm_memory::VolatileMemory;
        let offset = addr.0 as usize;
        match self.kind {
            Kind::Device => Err(GuestMemoryError::HostAddressNotAvailable),
            Kind::ShortSlices => Ok(self.mapping.get_slice(offset, count.saturating_sub(1))?),
            _ => Ok(self.mapping.get_slice(offset, count)?),
        }
    }

    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        match self.kind {
            Kind::HalfPlugged => count.min(PAGE.saturating_sub(addr.0 as usize)),
            _ => count,
        }
    }
}

/// The same regions in a backend that has only the required methods.
struct OneByOne(GuestRegionCollection<Region>);

impl GuestMemoryBackend for OneByOne {
    type R = Region;

    fn find_region(&self, addr: GuestAddress) -> Option<&Region> {
        self.0.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.0.iter()
    }
}

/// The slices of a range as (host address, length), and the error that ended the walk.
type Walk = (Vec<(usize, usize)>, Option<String>);

fn place(slice: &VolatileSlice<'_>) -> (usize, usize) {
    (slice.ptr_guard().as_ptr() as usize, slice.len())
}

fn by_iterator(
    memory: &impl GuestMemory<Bitmap = ()>,
    addr: u64,
    count: usize,
    access: Permissions,
) -> Walk {
    let mut walk = (Vec::new(), None);
    for slice in memory
        .get_slices(GuestAddress(addr), count, access)
        .unwrap()
    {
        assert_eq!(walk.1, None, "the iterator continues after an error");
        match slice {
            Ok(slice) => walk.0.push(place(&slice)),
            Err(error) => walk.1 = Some(format!("{error:?}")),
        }
    }
    walk
}

fn by_callback(
    memory: &impl GuestMemory<Bitmap = ()>,
    addr: u64,
    count: usize,
    access: Permissions,
) -> Walk {
    let mut slices = memory
        .get_slices(GuestAddress(addr), count, access)
        .unwrap();
    let mut places = Vec::new();
    let end = slices.try_for_each_slice(|slice| {
        places.push(place(&slice));
        Ok(())
    });
    assert!(slices.next().is_none(), "slices remain");
    (places, end.err().map(|error| format!("{error:?}")))
}

/// Returns the number of accessible bytes, by testing each page.
fn reach(regions: &[(u64, Kind)], addr: u64, count: usize, access: Permissions) -> usize {
    let end = u128::from(addr) + count as u128;
    let mut next = u128::from(addr);
    while next < end {
        let page = next / PAGE as u128 * PAGE as u128;
        let can = regions
            .iter()
            .any(|&(start, kind)| match page.checked_sub(start.into()) {
                Some(0) => match kind {
                    Kind::Memory | Kind::HalfPlugged => true,
                    Kind::ReadOnly => access != Permissions::Write,
                    Kind::ShortSlices | Kind::Device => false,
                },
                Some(offset) if offset == PAGE as u128 => match kind {
                    Kind::Memory => true,
                    Kind::ReadOnly => access != Permissions::Write,
                    Kind::HalfPlugged | Kind::ShortSlices | Kind::Device => false,
                },
                _ => false,
            });
        if !can {
            break;
        }
        next = end.min(page + PAGE as u128);
    }
    (next - u128::from(addr)) as usize
}

/// Returns the run of regions that starts at `addr`, by linear search.
fn by_linear_search(regions: &[u64], addr: u64) -> Vec<u64> {
    let has = |addr: u128| {
        let has = |start: &&u64| {
            (u128::from(**start)..u128::from(**start) + 2 * PAGE as u128).contains(&addr)
        };
        regions.iter().find(has).copied()
    };
    let mut found = Vec::new();
    let mut next = u128::from(addr);
    while let Some(start) = has(next) {
        found.push(start);
        next = u128::from(start) + 2 * PAGE as u128;
    }
    found
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => Just(Kind::Memory),
        1 => Just(Kind::ReadOnly),
        1 => Just(Kind::HalfPlugged),
        1 => Just(Kind::ShortSlices),
        1 => Just(Kind::Device),
    ]
}

fn starts(memory: &impl GuestMemoryBackend<R = Region>, addr: u64) -> Vec<u64> {
    memory
        .regions_from(GuestAddress(addr))
        .map(|region| region.start)
        .collect()
}

proptest! {
    #[test]
    fn get_slices_of_any_range_agrees_with_callback_and_model(
        regions in prop::collection::vec(
            (prop_oneof![5 => Just(0u64), 1 => 1u64..3], kind()),
            1..12,
        ),
        at_top in any::<bool>(),
        ranges in prop::collection::vec(
            (0usize..26, -2i64..3, 0usize..12 * 2 * PAGE, 0usize..3),
            20,
        ),
    ) {
        let pages: u64 = regions.iter().map(|(gap, _)| gap + 2).sum();
        // With `at_top`, the last region ends at 2^64.
        let first = if at_top { 0u64.wrapping_sub(pages * PAGE as u64) } else { 0 };
        let mut next = first;
        let regions: Vec<_> = regions
            .into_iter()
            .map(|(gap, kind)| {
                let start = next + gap * PAGE as u64;
                next = start.wrapping_add(2 * PAGE as u64);
                Region::new(start, kind)
            })
            .collect();
        let places: Vec<u64> = regions.iter().map(|region| region.start).collect();
        let kinds: Vec<_> = regions.iter().map(|region| (region.start, region.kind)).collect();
        let memory = GuestRegionCollection::from_regions(regions).unwrap();
        let other = OneByOne(memory.clone());

        for (page, beside, count, access) in ranges {
            let addr = first.wrapping_add((page * PAGE) as u64).wrapping_add_signed(beside);
            let access = [Permissions::No, Permissions::Read, Permissions::Write][access];

            let model = by_linear_search(&places, addr);
            prop_assert_eq!(starts(&memory, addr), &model[..], "from {:#x}", addr);
            prop_assert_eq!(starts(&other, addr), model, "from {:#x}", addr);

            // Repeat with a count of whole pages: most ranges end at a page boundary.
            for count in [count, count / PAGE * PAGE] {
                let walk = by_iterator(&memory, addr, count, access);
                let sum: usize = walk.0.iter().map(|(_, len)| len).sum();
                prop_assert_eq!(sum, reach(&kinds, addr, count, access), "{:?}", walk);
                prop_assert_eq!(walk.1.is_none(), sum == count, "{:?}", walk);
                prop_assert_eq!(
                    GuestMemory::check_range(&memory, GuestAddress(addr), count, access),
                    walk.1.is_none()
                );
                let once = by_callback(&memory, addr, count, access);
                prop_assert_eq!(&by_iterator(&other, addr, count, access), &walk);
                prop_assert_eq!(&by_callback(&other, addr, count, access), &walk);
                prop_assert_eq!(once, walk);
            }
        }
    }
}

/// The backend finds the empty region at its own end, which could loop forever.
#[test]
fn regions_from_empty_region_ends() {
    struct Empty(Region);
    struct Backend(Empty);

    impl GuestMemoryRegionBytes for Empty {}
    impl GuestMemoryRegion for Empty {
        type B = ();

        fn len(&self) -> GuestUsize {
            0
        }

        fn start_addr(&self) -> GuestAddress {
            self.0.start_addr()
        }

        fn bitmap(&self) -> BS<'_, ()> {
            ().slice_at(0)
        }
    }
    impl GuestMemoryBackend for Backend {
        type R = Empty;

        fn find_region(&self, _: GuestAddress) -> Option<&Empty> {
            Some(&self.0)
        }

        fn iter(&self) -> impl Iterator<Item = &Empty> {
            core::iter::once(&self.0)
        }
    }

    let memory = Backend(Empty(Region::new(0x1000, Kind::Memory)));
    assert_eq!(memory.regions_from(GuestAddress(0x1000)).count(), 1);
    assert!(!GuestMemory::check_range(
        &memory,
        GuestAddress(0x1000),
        1,
        Permissions::Read
    ));
}

#[test]
fn try_for_each_slice_with_failing_callback_returns_its_error() {
    let regions = (0..3).map(|number| Region::new(number * 2 * PAGE as u64, Kind::Memory));
    let memory = GuestRegionCollection::from_regions(regions.collect()).unwrap();
    let mut slices =
        GuestMemory::get_slices(&memory, GuestAddress(0), 6 * PAGE, Permissions::Read).unwrap();
    let mut seen = 0;
    let end = slices.try_for_each_slice(|slice| {
        seen += slice.len();
        match seen {
            seen if seen > 2 * PAGE => Err(GuestMemoryError::InvalidBackendAddress),
            _ => Ok(()),
        }
    });
    assert!(matches!(end, Err(GuestMemoryError::InvalidBackendAddress)));
    assert_eq!(seen, 4 * PAGE);
    assert!(slices.next().is_none());
}

#[test]
fn reachable_range_by_default_follows_reachable_bytes() {
    struct Alternating;
    impl GuestMemoryRegionBytes for Alternating {}
    impl GuestMemoryRegion for Alternating {
        type B = ();
        fn len(&self) -> GuestUsize {
            8 * PAGE as u64
        }
        fn start_addr(&self) -> GuestAddress {
            GuestAddress(0)
        }
        fn bitmap(&self) {}
        // Pages 2 and 3 are accessible, and so are pages 6 and 7.
        fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
            let in_four = addr.0 as usize % (4 * PAGE);
            let reachable = if in_four < 2 * PAGE {
                0
            } else {
                4 * PAGE - in_four
            };
            reachable.min(count)
        }
    }
    let range = |addr: usize, pages| {
        let range = Alternating.reachable_range(MemoryRegionAddress(addr as u64), pages * PAGE);
        (range.start, range.end)
    };
    assert_eq!(range(0, 8), (2 * PAGE, 4 * PAGE));
    assert_eq!(range(5, 3), (2 * PAGE - 5, 3 * PAGE));
    assert_eq!(range(3 * PAGE + 1, 5), (0, PAGE - 1));
    assert_eq!(range(4 * PAGE, 2), (2 * PAGE, 2 * PAGE), "none");
    assert_eq!(range(0, 0), (0, 0));
}
