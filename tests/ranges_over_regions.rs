//! A range over several regions is the same by whichever way it is walked: slice by slice, all slices at once, or region by region.
#![cfg(all(feature = "backend-mmap", unix))]

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::bitmap::{Bitmap, BS};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress, MmapRegion,
    Permissions, VolatileSlice,
};

const PAGE: usize = 0x1000;

/// What a region is, or claims to be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Memory,
    /// May not be written to.
    ReadOnly,
    /// The second half is a block that is not plugged.
    HalfPlugged,
    /// Gives out a byte less than it was asked for.
    Stingy,
    /// Has no memory of this process.
    Device,
}

/// Two pages, wherever they are said to be: at the very top, too.
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
            Kind::Stingy => Ok(self.mapping.get_slice(offset, count.saturating_sub(1))?),
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

/// The same regions, found one by one: what is provided for a backend that says no more.
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

/// The slices of a range, as host address and length, and the error at its end.
type Walk = (Vec<(usize, usize)>, Option<String>);

fn place(slice: &VolatileSlice<'_>) -> (usize, usize) {
    (slice.ptr_guard().as_ptr() as usize, slice.len())
}

fn slice_by_slice(
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
        assert_eq!(walk.1, None, "something comes behind an error");
        match slice {
            Ok(slice) => walk.0.push(place(&slice)),
            Err(error) => walk.1 = Some(format!("{error:?}")),
        }
    }
    walk
}

fn all_at_once(
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
    assert!(slices.next().is_none(), "something is left");
    (places, end.err().map(|error| format!("{error:?}")))
}

/// How many bytes can be accessed so before the first one that cannot, page by page.
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
                    Kind::Stingy | Kind::Device => false,
                },
                Some(offset) if offset == PAGE as u128 => match kind {
                    Kind::Memory => true,
                    Kind::ReadOnly => access != Permissions::Write,
                    Kind::HalfPlugged | Kind::Stingy | Kind::Device => false,
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

/// By a look at every region for every byte: those that follow each other without a hole from the one that has the address.
fn by_looking(regions: &[u64], addr: u64) -> Vec<u64> {
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
        1 => Just(Kind::Stingy),
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
    fn all_walks_are_one(
        regions in prop::collection::vec((prop_oneof![5 => Just(0u64), 1 => 1u64..3], kind()), 1..12),
        at_top in any::<bool>(),
        ranges in prop::collection::vec((0usize..26, -2i64..3, 0usize..12 * 2 * PAGE, 0usize..3), 20),
    ) {
        let pages: u64 = regions.iter().map(|(gap, _)| gap + 2).sum();
        // The last region may end at 2^64.
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

            let model = by_looking(&places, addr);
            prop_assert_eq!(starts(&memory, addr), &model[..], "from {:#x}", addr);
            prop_assert_eq!(starts(&other, addr), model, "from {:#x}", addr);

            // To the next edge, too: most ranges end there.
            for count in [count, count / PAGE * PAGE] {
                let walk = slice_by_slice(&memory, addr, count, access);
                let sum: usize = walk.0.iter().map(|(_, len)| len).sum();
                prop_assert_eq!(sum, reach(&kinds, addr, count, access), "{:?}", walk);
                prop_assert_eq!(walk.1.is_none(), sum == count, "{:?}", walk);
                prop_assert_eq!(
                    GuestMemory::check_range(&memory, GuestAddress(addr), count, access),
                    walk.1.is_none()
                );
                let once = all_at_once(&memory, addr, count, access);
                prop_assert_eq!(&slice_by_slice(&other, addr, count, access), &walk);
                prop_assert_eq!(&all_at_once(&other, addr, count, access), &walk);
                prop_assert_eq!(once, walk);
            }
        }
    }
}

/// A backend that finds the same region at its end, without end, keeps nobody: nothing is behind a region without bytes.
#[test]
fn a_region_without_bytes_ends_the_walk() {
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

/// What is handed the slices may end the walk: it gets no more of them, and its error is the answer.
#[test]
fn the_walk_ends_where_it_is_told_to() {
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
