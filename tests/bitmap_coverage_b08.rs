//! B8: a bitmap that does not cover a region is grown, or the write is refused.
#![cfg(all(
    feature = "backend-mmap",
    feature = "backend-bitmap",
    feature = "iommu"
))]

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use vm_memory::bitmap::{ArcSlice, AtomicBitmap, Bitmap};
use vm_memory::dirty::DirtyMemory;
use vm_memory::iommu::{Error, Iommu, Iotlb, IotlbIterator};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, IommuMemory, Permissions,
};
use Permissions::{No, Read, ReadWrite, Write};

const PAGE: NonZeroUsize = NonZeroUsize::new(0x1000).unwrap();

/// Returns a bitmap that is too small for every region.
fn small() -> AtomicBitmap {
    AtomicBitmap::new(1, PAGE)
}

#[test]
fn b08_builder_grows_bitmap_to_size_of_region() {
    for builder in [
        MmapRegionBuilder::<AtomicBitmap>::new(0x5001),
        MmapRegionBuilder::new_with_bitmap(0x5001, AtomicBitmap::default()),
        MmapRegionBuilder::new_with_bitmap(0x5001, small()),
    ] {
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0x1000)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let bitmap = memory.iter().next().unwrap().bitmap();
        assert!(bitmap.byte_size() >= 0x5001);
        for at in (0..0x5001).step_by(0x1000).chain([0x5000]) {
            memory
                .write_obj(1u8, GuestAddress(0x1000 + at as u64))
                .unwrap();
            assert!(bitmap.dirty_at(at), "{at:#x}");
        }
    }
}

#[test]
fn b08_builder_grows_optional_bitmap() {
    let optional = MmapRegionBuilder::new_with_bitmap(0x3000, Some(small()))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(optional, GuestAddress(0)).unwrap();
    region
        .write_obj(1u8, vm_memory::MemoryRegionAddress(0x2fff))
        .unwrap();
    assert!(region.bitmap().dirty_at(0x2fff));
}

/// Returns a bitmap of two pages, and a slice of it that begins at the second one.
fn bitmap_and_slice() -> (Arc<AtomicBitmap>, ArcSlice<AtomicBitmap>) {
    let bitmap = Arc::new(AtomicBitmap::new(0x2000, PAGE));
    let slice = ArcSlice::new(Arc::clone(&bitmap), 0x1000);
    (bitmap, slice)
}

#[test]
fn b08_builder_with_slice_of_bitmap_grows_bitmap() {
    let (bitmap, slice) = bitmap_and_slice();
    let region = MmapRegionBuilder::new_with_bitmap(0x4000, slice);
    let region = GuestRegionMmap::new(region.build().unwrap(), GuestAddress(0)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();
    let mut dirty = DirtyMemory::new();
    dirty.harvest(&memory);
    let runs: Vec<_> = dirty.runs().collect();
    assert_eq!(runs, [(GuestAddress(0x3000), 0x1000)]);
    assert_eq!(bitmap.byte_size(), 0x5000);
}

#[test]
fn b08_builder_with_pair_of_bitmaps_grows_both() {
    let (bitmap, slice) = bitmap_and_slice();
    let nested = ArcSlice::new(Arc::new(slice.clone()), 0x5000);
    let pair = (slice.clone(), Some(nested.clone()));
    MmapRegionBuilder::new_with_bitmap(0x4000, pair)
        .build()
        .unwrap();
    assert!(slice.tracks_range(0, 0x4000));
    assert!(nested.tracks_range(0, 0x4000));
    assert_eq!(bitmap.byte_size(), 0x1000 + 0x5000 + 0x4000);
}

#[test]
fn b08_builder_with_borrowed_slice_grows_bitmap() {
    let bitmap = AtomicBitmap::new(0x2000, PAGE);
    let region = MmapRegionBuilder::new_with_bitmap(0x4000, bitmap.slice_at(0xb000)).build();
    assert!(region.unwrap().bitmap().tracks_range(0, 0x4000));
}

#[test]
fn b08_builder_with_bitmap_that_cannot_grow_returns_error() {
    let bitmap = Arc::new(AtomicBitmap::new(0x2000, PAGE));
    let past_all = ArcSlice::new(bitmap, usize::MAX - 0xfff);
    let refused = MmapRegionBuilder::new_with_bitmap(0x4000, past_all).build();
    let error = refused.unwrap_err();
    #[cfg(unix)]
    let vm_memory::mmap::MmapRegionError::Mmap(reason) = &error
    else {
        panic!("{error}");
    };
    #[cfg(windows)]
    let reason = &error;
    assert_eq!(reason.kind(), std::io::ErrorKind::InvalidInput, "{error}");
}

#[test]
fn b08_builder_with_bitmap_that_tracks_nothing_succeeds() {
    assert!(MmapRegionBuilder::new_with_bitmap(0x4000, ())
        .build()
        .is_ok());
    let none = None::<ArcSlice<AtomicBitmap>>;
    assert!(MmapRegionBuilder::new_with_bitmap(0x4000, none)
        .build()
        .is_ok());
}

/// An IOMMU that maps the first 0x8000 addresses to themselves.
#[derive(Debug)]
struct Identity(Iotlb);

impl Iommu for Identity {
    type IotlbGuard<'a> = &'a Iotlb;
    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<&Iotlb>, Error> {
        Iotlb::lookup(&self.0, iova, length, access).map_err(|fails| Error::IommuMisconfigured {
            reason: format!("access outside the mapping of the test: {fails:?}"),
        })
    }
}

/// Returns memory of 0x8000 bytes. The IOMMU's bitmap tracks the first `tracked` of them.
fn memory(tracked: usize) -> IommuMemory<GuestMemoryMmap<AtomicBitmap>, Identity> {
    let physical =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)])
            .unwrap();
    let mut iotlb = Iotlb::new();
    iotlb
        .set_mapping(GuestAddress(0), GuestAddress(0), 0x8000, ReadWrite)
        .unwrap();
    IommuMemory::new(
        physical,
        Identity(iotlb),
        true,
        AtomicBitmap::new(tracked, PAGE),
    )
}

fn refused<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>, case: &str) {
    match result {
        Err(GuestMemoryError::IommuError(Error::IommuMisconfigured { reason })) => {
            assert!(reason.contains("dirty bitmap"), "{case}: {reason}");
        }
        other => panic!("{case}: {other:?}"),
    }
}

fn all_zero(memory: &IommuMemory<GuestMemoryMmap<AtomicBitmap>, Identity>) {
    let mut all = vec![1; 0x8000];
    memory
        .get_backend()
        .read_slice(&mut all, GuestAddress(0))
        .unwrap();
    assert!(all.iter().all(|&b| b == 0));
    assert!(memory
        .bitmap()
        .get_and_reset()
        .iter()
        .all(|&word| word == 0));
}

#[test]
fn b08_write_outside_bitmap_is_refused_and_changes_nothing() {
    for (case, tracked, addr) in [
        ("starts at the end of the bitmap", 0x2000, 0x2000),
        ("crosses the end of the bitmap", 0x2000, 0x1ffc),
        ("the bitmap is empty", 0, 0),
        ("crosses its end in the second region", 0x5000, 0x4ffc),
        ("ends at the end of memory", 0x2000, 0x7ff8),
    ] {
        let memory = memory(tracked);
        let at = GuestAddress(addr);
        refused(memory.write(&[1; 8], at), case);
        refused(memory.write_slice(&[1; 8], at), case);
        refused(memory.write_obj([1u8; 8], at), case);
        refused(
            memory.read_volatile_from(at, &mut [1u8; 8].as_slice(), 8),
            case,
        );
        refused(
            memory.read_exact_volatile_from(at, &mut [1u8; 8].as_slice(), 8),
            case,
        );
        refused(
            memory
                .store(1u64, GuestAddress(addr + 4), Ordering::SeqCst)
                .and(memory.write(&[1; 8], at)),
            case,
        );
        all_zero(&memory);
        assert_eq!(memory.read_obj::<[u8; 8]>(at).unwrap(), [0; 8], "{case}");
    }
    let memory = memory(0x2000);
    refused(
        memory.store(1u64, GuestAddress(0x2000), Ordering::SeqCst),
        "an aligned store",
    );
    all_zero(&memory);
}

#[test]
fn b08_check_range_and_get_slices_refuse_write_outside_bitmap() {
    let memory = memory(0x2800);
    // The bitmap tracks the whole last page.
    for (case, addr, count, kept) in [
        ("the tracked pages", 0, 0x3000, true),
        ("a byte more", 0, 0x3001, false),
        ("the last tracked byte", 0x2fff, 1, true),
        ("the first byte after it", 0x3000, 1, false),
        ("both bytes", 0x2fff, 2, false),
        ("no byte", 0x3000, 0, true),
    ] {
        let at = GuestAddress(addr);
        for access in [No, Read, Write, ReadWrite] {
            let allowed = kept || !access.has_write();
            assert_eq!(
                memory.check_range(at, count, access),
                allowed,
                "{case}, {access:?}"
            );
            let slices = memory.get_slices(at, count, access);
            assert_eq!(slices.is_ok(), allowed, "{case}, {access:?}");
        }
        let written = memory.write_slice(&vec![0; count], at);
        assert_eq!(written.is_ok(), kept, "{case}");
    }
}

#[test]
fn b08_write_inside_bitmap_is_marked_by_iova() {
    let memory = memory(0x8000);
    memory
        .write_slice(&[1; 0x1002], GuestAddress(0x3fff))
        .unwrap();
    assert_eq!(memory.bitmap().get_and_reset(), [0b11_1000]);
    memory
        .store(1u64, GuestAddress(0x7ff8), Ordering::SeqCst)
        .unwrap();
    assert_eq!(memory.bitmap().get_and_reset(), [0b1000_0000]);
    // With the IOMMU disabled, the bitmaps of the regions are marked.
    let mut memory = memory.clone();
    memory.set_iommu_enabled(false);
    memory.write_slice(&[1; 2], GuestAddress(0x3fff)).unwrap();
    let marks: Vec<_> = memory
        .get_backend()
        .iter()
        .map(|r| r.bitmap().get_and_reset())
        .collect();
    assert_eq!(marks, [[0b1000], [1]]);
    assert_eq!(memory.bitmap().get_and_reset(), [0]);
}

#[test]
fn b08_write_without_bitmap_succeeds() {
    let physical = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let mut iotlb = Iotlb::new();
    iotlb
        .set_mapping(GuestAddress(0x10_0000), GuestAddress(0), 0x1000, ReadWrite)
        .unwrap();
    let memory = IommuMemory::new(physical, Identity(iotlb), true, ());
    memory.write_obj(1u8, GuestAddress(0x10_0fff)).unwrap();
    assert!(memory.check_range(GuestAddress(0x10_0000), 0x1000, Write));
}
