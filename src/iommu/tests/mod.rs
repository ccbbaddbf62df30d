//! Guest memory behind an IOMMU, and its IOTLBs.

mod asking;
mod bound;
mod competing;
mod kinds;
mod mappings;
mod marks;
mod memory;
mod retries;
mod shared;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{RwLock, RwLockReadGuard};

use super::*;
use crate::bitmap::AtomicBitmap;
use crate::guest_memory::{Error as MemoryError, Result as MemoryResult};
use crate::mmap::MmapRegionBuilder;
use crate::{GuestMemoryMmap, GuestRegionMmap};
use test_support::PAGE_U64 as PAGE;
use Permissions::*;

/// An IOMMU that counts its translations, and translates no more than `at_most` bytes of a range.
#[derive(Debug)]
struct Partial {
    iotlb: RwLock<Iotlb>,
    at_most: usize,
    translations: AtomicUsize,
}

impl Partial {
    fn new(at_most: usize) -> Self {
        Partial {
            iotlb: RwLock::default(),
            at_most,
            translations: AtomicUsize::new(0),
        }
    }
}

impl Iommu for Partial {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        self.translations.fetch_add(1, Ordering::Relaxed);
        self.iotlb.translate(iova, length.min(self.at_most), access)
    }
}

type Physical = GuestMemoryMmap<AtomicBitmap>;
type Memory = IommuMemory<Physical, RwLock<Iotlb>>;

/// Creates a bitmap with one bit per byte.
fn bytewise(len: usize) -> AtomicBitmap {
    AtomicBitmap::new(len, NonZeroUsize::MIN)
}

fn physical(regions: &[(u64, usize, Permissions)]) -> Physical {
    let regions = regions.iter().map(|&(start, len, permissions)| {
        let builder =
            MmapRegionBuilder::new_with_bitmap(len, bytewise(len)).with_permissions(permissions);
        GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(start)).unwrap()
    });
    Physical::from_regions(regions.collect()).unwrap()
}

/// Creates 64 bytes at 0 and 64 bytes at 0x100. The IOMMU is on, and its bitmap tracks 0x200 bytes.
fn memory(mappings: &[(u64, u64, usize, Permissions)]) -> Memory {
    let memory = IommuMemory::new(
        physical(&[(0, 64, ReadWrite), (0x100, 64, ReadWrite)]),
        RwLock::<Iotlb>::default(),
        true,
        bytewise(0x200),
    );
    map(memory.iommu(), mappings);
    memory
}

fn map(iotlb: &RwLock<Iotlb>, mappings: &[(u64, u64, usize, Permissions)]) {
    let mut iotlb = iotlb.write().unwrap();
    for &(iova, to, length, permissions) in mappings {
        iotlb
            .set_mapping(GuestAddress(iova), GuestAddress(to), length, permissions)
            .unwrap();
    }
}

fn marked(bitmap: &AtomicBitmap) -> Vec<usize> {
    (0..bitmap.len())
        .filter(|&i| bitmap.is_bit_set(i))
        .collect()
}

fn unresolved<T: Debug>(result: MemoryResult<T>) -> bool {
    matches!(
        result,
        Err(MemoryError::IommuError(Error::CannotResolve { .. }))
    )
}
