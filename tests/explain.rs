//! `explain` names the first byte that an access cannot reach, and the reason.
#![cfg(all(
    feature = "backend-mmap",
    feature = "backend-bitmap",
    feature = "iommu",
))]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, RwLock};

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BS};
use vm_memory::guest_memory::{GuestMemorySliceIterator, Refusal, RefusalReason};
use vm_memory::iommu::{
    self, Iommu, IommuMemory, Iotlb, IotlbIterator, IotlbSnapshot, SharedIotlb,
};
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::region::GuestMemoryRegionBytes;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestMemoryResult, GuestRegionMmap, GuestUsize, MemoryRegionAddress,
    Permissions, VolatileSlice,
};

const PAGE: u64 = 0x1000;

const ALL: [Permissions; 4] = [
    Permissions::No,
    Permissions::Read,
    Permissions::Write,
    Permissions::ReadWrite,
];

/// A page of a region.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Page {
    Plugged,
    Unplugged,
}

/// The description of a region of the test.
#[derive(Clone, Debug)]
struct Plan {
    start: u64,
    pages: Vec<Page>,
    access: Permissions,
    is_ram: bool,
}

/// A region that may be read-only, or not RAM, and may end at 2^64.
struct Region {
    plan: Plan,
    memory: GuestRegionMmap<AtomicBitmap>,
}

impl Region {
    fn new(plan: &Plan) -> Self {
        let size = plan.pages.len() << 12;
        let blocks = PluggedBlocks::new(size, NonZeroUsize::new(0x1000).unwrap()).unwrap();
        for (index, _) in plan
            .pages
            .iter()
            .enumerate()
            .filter(|(_, page)| **page == Page::Plugged)
        {
            blocks.plug(index << 12, 0x1000).unwrap();
        }
        let mapping = MmapRegionBuilder::new(size)
            .with_plugged_blocks(Arc::new(blocks))
            .build()
            .unwrap();
        Region {
            plan: plan.clone(),
            memory: GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap(),
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.memory.len()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.plan.start)
    }

    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        GuestMemoryRegion::bitmap(&self.memory)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, AtomicBitmap>>> {
        if self.plan.is_ram {
            GuestMemoryRegion::get_slice(&self.memory, offset, count)
        } else {
            Err(GuestMemoryError::HostAddressNotAvailable)
        }
    }

    fn allowed_access(&self) -> Permissions {
        self.plan.access
    }

    fn reachable_bytes(&self, addr: MemoryRegionAddress, count: usize) -> usize {
        if self.plan.is_ram {
            self.memory.reachable_bytes(addr, count)
        } else {
            count
        }
    }
}

impl GuestMemoryRegionBytes for Region {}

struct Physical(Vec<Region>);

impl GuestMemoryBackend for Physical {
    type R = Region;

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.0.iter()
    }
}

/// The slow model: the reason for one byte.
#[derive(Default)]
struct Model {
    regions: Vec<Plan>,
    /// For each page of I/O addresses, the page of guest addresses, and the permissions.
    mappings: BTreeMap<u64, (u64, Permissions)>,
    /// The number of bytes that the bitmap by I/O address tracks.
    tracked: u128,
}

impl Model {
    fn physical(&self, at: u128, access: Permissions) -> Option<RefusalReason> {
        let Ok(at) = u64::try_from(at) else {
            return Some(RefusalReason::PastTheEnd);
        };
        let contains = |plan: &&Plan| {
            at.checked_sub(plan.start)
                .is_some_and(|offset| offset >> 12 < plan.pages.len() as u64)
        };
        let Some(plan) = self.regions.iter().find(contains) else {
            return Some(RefusalReason::Hole);
        };
        if !plan.access.allow(access) {
            return Some(RefusalReason::RegionPermits(plan.access));
        }
        if !plan.is_ram {
            return Some(RefusalReason::NoHostMemory);
        }
        let page = plan.pages[((at - plan.start) >> 12) as usize];
        (page == Page::Unplugged).then_some(RefusalReason::Unplugged)
    }

    /// Returns the reason and the guest address that an I/O address is mapped to.
    fn translated(&self, at: u128, access: Permissions) -> Option<(Option<u64>, RefusalReason)> {
        let Ok(iova) = u64::try_from(at) else {
            return Some((None, RefusalReason::PastTheEnd));
        };
        if access.has_write() && at >= self.tracked {
            return Some((None, RefusalReason::NotTracked));
        }
        let Some((target, granted)) = self.mappings.get(&(iova >> 12)) else {
            return Some((None, RefusalReason::NotMapped));
        };
        if !granted.allow(access) {
            return Some((None, RefusalReason::MappingPermits(*granted)));
        }
        let target = (target << 12) + iova % PAGE;
        let reason = self.physical(target.into(), access)?;
        Some((Some(target), reason))
    }

    /// Returns the first byte of a range for which `reason` has one.
    fn first<T>(addr: u64, count: usize, reason: impl Fn(u128) -> Option<T>) -> Option<(usize, T)> {
        (0..count).find_map(|offset| {
            let reason = reason(u128::from(addr) + offset as u128)?;
            Some((offset, reason))
        })
    }
}

/// Compares an explanation with the model, and with what accesses do.
fn check<M: GuestMemory>(
    memory: &M,
    addr: u64,
    count: usize,
    access: Permissions,
    expected: Option<(usize, (Option<u64>, RefusalReason))>,
) -> TestCaseResult {
    let start = GuestAddress(addr);
    let refusal = memory.explain(start, count, access);
    let seen = refusal.map(|refusal| {
        let physical = refusal.physical.map(|addr| addr.0);
        (refusal.offset, (physical, refusal.reason))
    });
    prop_assert_eq!(seen, expected);
    prop_assert_eq!(refusal.is_none(), memory.check_range(start, count, access));
    prop_assert_eq!(memory.held().explain(start, count, access), refusal);
    prop_assert_eq!(
        memory.all_or_nothing().explain(start, count, access),
        refusal
    );
    if let Some(refusal) = refusal {
        prop_assert!(memory.check_range(start, refusal.offset, access));
        let end = refusal.reason == RefusalReason::PastTheEnd;
        let byte = addr.wrapping_add(refusal.offset as u64);
        prop_assert_eq!(refusal.addr.0, if end { u64::MAX } else { byte });
        prop_assert_eq!(end, refusal.offset != 0 && byte == 0);
        prop_assert!(end || !memory.check_range(refusal.addr, 1, access));
    }
    Ok(())
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop_oneof![
        4 => Just(Permissions::ReadWrite),
        1 => prop::sample::select(&ALL[..]),
    ]
}

/// Regions in the first 16 pages, with at most one hole between two, and perhaps one at the top.
fn regions() -> impl Strategy<Value = Vec<Plan>> {
    let page = prop_oneof![4 => Just(Page::Plugged), 1 => Just(Page::Unplugged)];
    let pages = prop::collection::vec(page, 1..5);
    let is_ram = prop_oneof![4 => Just(true), 1 => Just(false)];
    let region = (0u64..2, pages, permissions(), is_ram);
    (prop::collection::vec(region, 1..5), any::<bool>()).prop_map(|(regions, at_the_top)| {
        let (mut next, count) = (0, regions.len());
        let regions = regions.into_iter().enumerate();
        let plans = regions.map(|(index, (hole, pages, access, is_ram))| {
            let size = (pages.len() as u64) << 12;
            let mut start = next + hole * PAGE;
            next = start + size;
            if at_the_top && index + 1 == count {
                start = 0u64.wrapping_sub(size);
            }
            Plan {
                start,
                pages,
                access,
                is_ram,
            }
        });
        plans.collect()
    })
}

fn ranges() -> impl Strategy<Value = Vec<(u64, usize, Permissions)>> {
    let near = 0u64..0x1_4000;
    let top = (0u64..0x6000).prop_map(|before| 0u64.wrapping_sub(before));
    let edge = (0u64..0x14, 0u64..3)
        .prop_map(|(page, more)| (page << 12).wrapping_sub(1).wrapping_add(more));
    let addr = prop_oneof![2 => near, 2 => top, 1 => edge];
    let count = prop_oneof![2 => 0usize..0x20, 2 => 0usize..0x6000];
    let access = prop::sample::select(&ALL[..]);
    prop::collection::vec((addr, count, access), 1..8)
}

proptest! {
    #[test]
    fn explain_of_physical_memory_agrees_with_model(plans in regions(), ranges in ranges()) {
        let memory = Physical(plans.iter().map(Region::new).collect());
        let model = Model { regions: plans, ..Model::default() };
        for (addr, count, access) in ranges {
            let reason = |at| model.physical(at, access).map(|reason| (None, reason));
            check(&memory, addr, count, access, Model::first(addr, count, reason))?;
        }
    }

    #[test]
    fn explain_behind_iommu_agrees_with_model(
        plans in regions(),
        mappings in prop::collection::vec((0u64..0x14, 0u64..0x14, permissions()), 0..24),
        at_the_top in any::<bool>(),
        tracked in prop_oneof![Just(usize::MAX >> 1), 0usize..0x1_4000],
        ranges in ranges(),
    ) {
        let memory = Physical(plans.iter().map(Region::new).collect());
        let mut model = Model { regions: plans, ..Model::default() };
        let iotlb = SharedIotlb::new();
        iotlb.count_lookups();
        let top = at_the_top.then_some((u64::MAX >> 12, 1, Permissions::ReadWrite));
        for (page, target, access) in mappings.into_iter().chain(top) {
            let (iova, to) = (GuestAddress(page << 12), GuestAddress(target << 12));
            let mapped = iotlb.set_mapping(iova, to, 0x1000, access).unwrap();
            prop_assert!(mapped.is_done());
            model.mappings.insert(page, (target, access));
        }
        let bitmap = Limited(tracked);
        model.tracked = if tracked < 0x1_4000 { tracked as u128 } else { u128::MAX };
        let memory = iommu::MarkedIommuMemory::by_both(memory, iotlb.clone(), true, bitmap);
        for (addr, count, access) in ranges {
            let before = iotlb.counters();
            memory.explain(GuestAddress(addr), count, access);
            prop_assert_eq!(iotlb.counters(), before);
            let reason = |at| model.translated(at, access);
            check(&memory, addr, count, access, Model::first(addr, count, reason))?;
        }
    }
}

/// A bitmap that tracks only the first bytes.
#[derive(Clone, Debug)]
struct Limited(usize);

impl vm_memory::bitmap::WithBitmapSlice<'_> for Limited {
    type S = Self;
}

impl vm_memory::bitmap::BitmapSlice for Limited {}

impl Bitmap for Limited {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, _: usize) -> Self {
        self.clone()
    }

    fn tracks_range(&self, offset: usize, len: usize) -> bool {
        self.0 >= 0x1_4000 || len == 0 || offset.checked_add(len).is_some_and(|end| end <= self.0)
    }
}

fn mapped() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
}

/// An IOMMU that must not be asked.
#[derive(Debug)]
struct Asking {
    iotlb: SharedIotlb,
    shows_iotlb: bool,
}

impl Iommu for Asking {
    type IotlbGuard<'a> = IotlbSnapshot;

    fn translate(
        &self,
        _: GuestAddress,
        _: usize,
        _: Permissions,
    ) -> Result<IotlbIterator<IotlbSnapshot>, iommu::Error> {
        panic!("the IOMMU asks its front end");
    }

    fn current_iotlb(&self) -> Option<IotlbSnapshot> {
        self.shows_iotlb.then(|| self.iotlb.snapshot())
    }
}

#[test]
fn explain_behind_asking_iommu_does_not_ask() {
    for shows_iotlb in [true, false] {
        let iotlb = SharedIotlb::new();
        let (iova, access) = (GuestAddress(0x8000), Permissions::Read);
        iotlb
            .set_mapping(iova, GuestAddress(0), 0x1000, access)
            .unwrap();
        let iommu = Asking {
            iotlb: iotlb.clone(),
            shows_iotlb,
        };
        let mut memory = IommuMemory::new(mapped(), iommu, true, ());
        let why = |count| {
            memory
                .explain(iova, count, access)
                .map(|refusal| refusal.reason)
        };
        assert_eq!(why(0), None);
        if shows_iotlb {
            assert_eq!(
                (why(0x1000), why(0x1001)),
                (None, Some(RefusalReason::NotMapped))
            );
        } else {
            assert_eq!(why(1), Some(RefusalReason::Unknown));
        }
        // The explanation has kept no snapshot.
        assert!(iotlb.invalidate_all().is_done());
        memory.set_iommu_enabled(false);
        let refusal = memory.explain(GuestAddress(0x1ff0), 0x20, access).unwrap();
        assert_eq!(
            (refusal.offset, refusal.reason),
            (0x10, RefusalReason::Hole)
        );
    }
}

#[test]
fn explain_of_write_names_first_byte_that_is_not_tracked() {
    let iotlb = SharedIotlb::new();
    let (zero, access) = (GuestAddress(0), Permissions::ReadWrite);
    iotlb.set_mapping(zero, zero, 0x2000, access).unwrap();
    let bitmap = Limited(0x1000);
    let memory = iommu::MarkedIommuMemory::by_both(mapped(), iotlb, true, bitmap);
    for start in 0xff0..0x1000 {
        for count in 1..0x20 {
            let refusal = memory.explain(GuestAddress(start), count, Permissions::Write);
            let seen = refusal.map(|refusal| (refusal.addr.0, refusal.reason));
            let passes = start + count as u64 > 0x1000;
            assert_eq!(seen, passes.then_some((0x1000, RefusalReason::NotTracked)));
        }
        assert_eq!(
            memory.explain(GuestAddress(start), 0x20, Permissions::Read),
            None
        );
    }
}

#[test]
fn explain_behind_rwlock_iotlb_names_the_mapping() {
    let mut iotlb = Iotlb::new();
    let iova = GuestAddress(0x8000);
    iotlb
        .set_mapping(iova, GuestAddress(0), 0x1000, Permissions::Write)
        .unwrap();
    let memory = IommuMemory::new(mapped(), RwLock::new(iotlb), true, ());
    let refusal = memory.explain(iova, 1, Permissions::Read).unwrap();
    assert_eq!(
        refusal.reason,
        RefusalReason::MappingPermits(Permissions::Write)
    );
    assert!(memory.iommu().try_write().is_ok());
}

/// A memory of another crate, with the methods that 0.18.0 requires.
struct Other(GuestMemoryMmap);

impl GuestMemory for Other {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.0, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        GuestMemory::get_slices(&self.0, addr, count, access)
    }
}

#[test]
fn explain_of_memory_of_another_crate_has_no_reason() {
    let memory = Other(mapped());
    let why = |addr, count| memory.explain(GuestAddress(addr), count, Permissions::Read);
    assert_eq!(why(0x1000, 0x1000), None);
    let refusal = why(0x1000, 0x1001).unwrap();
    assert_eq!(
        (refusal.offset, refusal.reason),
        (0, RefusalReason::Unknown)
    );
}

#[test]
fn refusal_display_names_byte_address_and_reason() {
    let mut refusal: Refusal = mapped()
        .explain(GuestAddress(0x1ff0), 0x20, Permissions::Read)
        .unwrap();
    let at = "byte 0x10 of the range, at 0x2000";
    for (reason, text) in [
        (RefusalReason::Hole, "no region of guest memory contains it"),
        (
            RefusalReason::RegionPermits(Permissions::No),
            "its region permits no access",
        ),
        (
            RefusalReason::MappingPermits(Permissions::Write),
            "its mapping in the IOMMU permits only write access",
        ),
    ] {
        refusal.reason = reason;
        assert_eq!(refusal.to_string(), format!("{at}: {text}"));
    }
    refusal.physical = Some(GuestAddress(0x70));
    refusal.reason = RefusalReason::Unplugged;
    assert_eq!(
        refusal.to_string(),
        format!("{at}, which the IOMMU maps to 0x70: it is in a block that is not plugged")
    );
}
