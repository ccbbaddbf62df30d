//! A [`Window`] behaves as a vector of its bytes: it is resolved once and accessed by offset.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use std::collections::BTreeSet;
use std::io::{Cursor, ErrorKind};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use proptest::prelude::*;
use test_support::PAGE;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::guest_memory::{GuestMemorySliceIterator, Window};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, Permissions, VolatileSlice,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Creates three adjacent regions of a page, and another one after a hole of a page.
fn memory() -> Memory {
    let starts = [0, 0x1000, 0x2000, 0x4000];
    Memory::from_ranges(&starts.map(|start| (GuestAddress(start), PAGE))).unwrap()
}

fn is_dirty(memory: &Memory, addr: u64) -> bool {
    use vm_memory::bitmap::Bitmap;
    let region = memory.find_region(GuestAddress(addr)).unwrap();
    region
        .bitmap()
        .dirty_at((addr - region.start_addr().0) as usize)
}

/// Returns the reason why a window refused an access.
fn refusal<T>(result: Result<T, GuestMemoryError>) -> String {
    match result {
        Err(GuestMemoryError::IOError(e)) if e.kind() == ErrorKind::PermissionDenied => {
            e.to_string()
        }
        result => format!("not refused: {:?}", result.map(drop)),
    }
}

#[test]
fn window_of_one_region_reads_writes_and_marks() {
    let memory = memory();
    let window = memory
        .window(GuestAddress(0x1800), 0x100, Permissions::ReadWrite)
        .unwrap();
    assert_eq!((window.addr().0, window.len()), (0x1800, 0x100));
    assert!(!is_dirty(&memory, 0x1800));
    window.write_obj(0x1234_5678u32, 0x10).unwrap();
    window.store(7u16, 0xfe, Ordering::Release).unwrap();
    assert_eq!(window.load::<u16>(0xfe, Ordering::Acquire).unwrap(), 7);
    assert_eq!(window.read_obj::<u32>(0x10).unwrap(), 0x1234_5678);
    assert_eq!(
        memory.read_obj::<u32>(GuestAddress(0x1810)).unwrap(),
        0x1234_5678
    );
    assert!(is_dirty(&memory, 0x1800) && !is_dirty(&memory, 0x800));
}

#[test]
fn window_access_past_end_moves_only_bytes_before_it() {
    let memory = memory();
    let window = memory
        .window(GuestAddress(0x1ff0), 0x20, Permissions::ReadWrite)
        .unwrap();
    assert_eq!(window.write(&[1; 0x10], 0x18).unwrap(), 8);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2010)).unwrap(), 0);
    assert!(matches!(
        window.write_slice(&[1; 0x10], 0x18),
        Err(GuestMemoryError::PartialBuffer {
            expected: 0x10,
            completed: 8
        })
    ));
    for offset in [0x20, 0x21, PAGE, usize::MAX - 0x1ff0, usize::MAX] {
        let error = window.read_obj::<u8>(offset).unwrap_err();
        assert!(matches!(error, GuestMemoryError::InvalidBackendAddress));
        assert!(window.write(&[1], offset).is_err());
        assert!(window.load::<u8>(offset, Ordering::Relaxed).is_err());
        assert_eq!(window.write(&[], offset).unwrap(), 0);
    }
    // An atomic access that is not contiguous.
    assert!(window.load::<u64>(0xc, Ordering::Relaxed).is_err());
}

#[test]
fn window_with_inaccessible_byte_returns_its_error() {
    let memory = memory();
    for (addr, len) in [(0x2fff, 2), (0x3000, 1), (0, 5 * PAGE), (u64::MAX, 2)] {
        let result = memory.window(GuestAddress(addr), len, Permissions::Read);
        assert!(result.is_err(), "{addr:#x}");
    }
    assert!(matches!(
        memory.window(GuestAddress(0x2fff), 2, Permissions::Read),
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(0x3000)))
    ));
    assert_eq!(
        refusal(memory.window(GuestAddress(0), 1, Permissions::No)),
        "a window with Permissions::No permits no access; create it with Permissions::Read, Write \
         or ReadWrite"
    );
}

#[test]
fn window_of_no_bytes_is_empty_at_any_address() {
    let memory = memory();
    for addr in [0, 0x1000, 0x3000, u64::MAX] {
        let window = memory
            .window(GuestAddress(addr), 0, Permissions::Write)
            .unwrap();
        assert!(window.is_empty() && window.slices().next().is_none());
        assert_eq!(window.write(&[], 0).unwrap(), 0);
        assert!(window.write_obj(0u8, 0).is_err());
        window.mark_dirty(0, usize::MAX);
    }
}

#[test]
fn window_access_without_its_permission_is_refused() {
    let memory = memory();
    let read = memory
        .window(GuestAddress(0xff8), 0x10, Permissions::Read)
        .unwrap();
    let write = memory
        .window(GuestAddress(0xff8), 0x10, Permissions::Write)
        .unwrap();
    let refused = |result| refusal(result).starts_with("the window was created with ");
    for offset in [0, 4, 8] {
        // The second one is not contiguous.
        assert!(refused(read.write_obj(1u64, offset)));
        assert!(refused(read.read_exact_volatile_from(
            offset,
            &mut Cursor::new([1; 8]),
            8
        )));
        assert!(refused(write.read_obj::<u64>(offset).map(drop)));
        assert!(refused(write.write_all_volatile_to(
            offset,
            &mut Vec::new(),
            8
        )));
    }
    assert!(refused(read.store(1u8, 0, Ordering::Relaxed)));
    assert!(refused(write.load::<u8>(0, Ordering::Relaxed).map(drop)));
    assert!(!is_dirty(&memory, 0xff8) && !is_dirty(&memory, 0x1000));
    read.read_obj::<u64>(4).unwrap();
    write.write_obj(1u64, 4).unwrap();
}

#[test]
fn window_from_arc_outlives_other_owners_and_moves_to_threads() {
    let memory = Arc::new(memory());
    let window = Window::from_arc(
        Arc::clone(&memory),
        GuestAddress(0xff8),
        0x10,
        Permissions::ReadWrite,
    )
    .unwrap();
    let region = memory.find_region(GuestAddress(0)).unwrap().as_ptr().addr();
    let map = Arc::downgrade(&memory);
    drop(memory);
    assert!(map.upgrade().is_some(), "the window owns the map");
    let thread = std::thread::spawn(move || {
        window.write_obj(0x1122_3344_5566_7788u64, 4).unwrap();
        let first = window.slices().next().unwrap().ptr_guard().as_ptr();
        assert_eq!(first.addr(), region + 0xff8);
        window.read_obj::<u64>(4).unwrap()
    });
    assert_eq!(thread.join().unwrap(), 0x1122_3344_5566_7788);
    assert!(map.upgrade().is_none());
}

#[test]
fn window_slices_are_untracked_and_mark_dirty_marks_a_part() {
    let memory = memory();
    let window = memory
        .window(GuestAddress(0x800), 0x2000, Permissions::Write)
        .unwrap();
    let slices: Vec<VolatileSlice<'_>> = window.slices().collect();
    let lengths: Vec<_> = slices.iter().map(VolatileSlice::len).collect();
    assert_eq!(lengths, [0x800, 0x1000, 0x800]);
    slices[1].write_obj(3u8, 5).unwrap();
    assert!(!is_dirty(&memory, 0x1005));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1005)).unwrap(), 3);
    window.mark_dirty(0x7ff, 2);
    assert!(is_dirty(&memory, 0xfff) && is_dirty(&memory, 0x1000));
    assert!(!is_dirty(&memory, 0x2000));
    window.mark_dirty(0x1fff, usize::MAX);
    assert!(is_dirty(&memory, 0x27ff));
}

#[test]
fn window_of_too_many_slices_returns_error() {
    let starts = (0..1025u64).map(|page| (GuestAddress(page * 0x1000), PAGE));
    let memory = Memory::from_ranges(&starts.collect::<Vec<_>>()).unwrap();
    let window = |pages| memory.window(GuestAddress(0), pages * PAGE, Permissions::Read);
    assert_eq!(window(1024).unwrap().slices().count(), 1024);
    let refused = window(1025).unwrap_err();
    assert!(
        matches!(&refused, GuestMemoryError::IOError(error) if error.kind() == ErrorKind::InvalidInput),
        "{refused:?}"
    );
}

#[cfg(feature = "iommu")]
mod behind_iommu {
    use std::num::NonZeroUsize;
    use std::sync::RwLock;

    use super::*;
    use vm_memory::iommu::{IommuMemory, Iotlb, SharedIotlb};

    /// Tracks the I/O virtual addresses below 0x20000.
    fn bitmap() -> AtomicBitmap {
        AtomicBitmap::new(0x2_0000, NonZeroUsize::new(PAGE).unwrap())
    }

    /// Maps two scattered pages at 0x10000: to 0x2000, and to 0x4000.
    fn mapped() -> IommuMemory<Memory, SharedIotlb> {
        let iotlb = SharedIotlb::new();
        for (iova, addr) in [(0x1_0000, 0x2000), (0x1_1000, 0x4000)] {
            let access = Permissions::ReadWrite;
            iotlb
                .set_mapping(GuestAddress(iova), GuestAddress(addr), PAGE, access)
                .unwrap();
        }
        IommuMemory::new(memory(), iotlb, true, bitmap())
    }

    #[test]
    fn window_behind_iommu_holds_its_translation_until_dropped() {
        let memory = mapped();
        let iova = GuestAddress(0x1_0ffc);
        let window = memory.window(iova, 8, Permissions::ReadWrite).unwrap();
        let invalidation = memory
            .iommu()
            .invalidate_mapping(GuestAddress(0x1_0000), 2 * PAGE);
        assert!(!invalidation.is_done());
        // The window continues with the old translation. Accesses by address do not.
        window.write_obj(0x1122_3344_5566_7788u64, 0).unwrap();
        assert!(memory.write_obj(0u8, iova).is_err());
        assert!(memory.window(iova, 8, Permissions::Read).is_err());
        let physical = memory.get_backend();
        let halves = [0x2ffc, 0x4000].map(|addr| physical.read_obj::<[u8; 4]>(GuestAddress(addr)));
        let halves = halves.map(Result::unwrap).concat();
        assert_eq!(halves, 0x1122_3344_5566_7788u64.to_ne_bytes());
        assert!(!invalidation.is_done());
        drop(window);
        assert!(invalidation.is_done());
    }

    #[test]
    fn window_behind_iommu_without_holds_returns_unsupported() {
        let mut iotlb = Iotlb::new();
        let (iova, access) = (GuestAddress(0x1_0000), Permissions::ReadWrite);
        iotlb
            .set_mapping(iova, GuestAddress(0), PAGE, access)
            .unwrap();
        let memory = IommuMemory::new(memory(), RwLock::new(iotlb), true, bitmap());
        memory.write_obj(1u8, iova).unwrap();
        let refused = memory.window(iova, 8, access).unwrap_err();
        assert!(
            matches!(&refused, GuestMemoryError::IOError(error) if error.kind() == ErrorKind::Unsupported),
            "{refused:?}"
        );
    }
}

/// A memory whose `get_slices` returns slices of another length than it should.
struct Wrong {
    memory: Memory,
    len: usize,
}

impl GuestMemory for Wrong {
    type PhysicalMemory = Memory;
    type Bitmap = AtomicBitmap;

    fn check_range(&self, _: GuestAddress, _: usize, _: Permissions) -> bool {
        true
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        _: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>>, GuestMemoryError> {
        GuestMemory::get_slices(&self.memory, addr, self.len, access)
    }

    fn physical_memory(&self) -> Option<&Memory> {
        Some(&self.memory)
    }
}

#[test]
fn window_of_memory_that_returns_wrong_length_returns_error() {
    for (len, succeeds) in [
        (0, false),
        (15, false),
        (16, true),
        (17, false),
        (0x1001, false),
    ] {
        let wrong = Wrong {
            memory: memory(),
            len,
        };
        let window = wrong.window(GuestAddress(0xff0), 16, Permissions::Read);
        assert_eq!(window.is_ok(), succeeds, "{len} bytes");
    }
}

/// An access to a window.
#[derive(Clone, Debug)]
enum Access {
    Write(Vec<u8>),
    WriteSlice(Vec<u8>),
    Read(usize),
    ReadSlice(usize),
    ReadFrom(Vec<u8>),
    WriteTo(usize),
    WriteObj([u8; 16]),
    ReadObj,
    Store(u32),
    Load,
}

fn accesses() -> impl Strategy<Value = Vec<(usize, Access)>> {
    let data = || proptest::collection::vec(any::<u8>(), 0..40);
    let access = prop_oneof![
        data().prop_map(Access::Write),
        data().prop_map(Access::WriteSlice),
        (0usize..40).prop_map(Access::Read),
        (0usize..40).prop_map(Access::ReadSlice),
        data().prop_map(Access::ReadFrom),
        (0usize..40).prop_map(Access::WriteTo),
        any::<[u8; 16]>().prop_map(Access::WriteObj),
        Just(Access::ReadObj),
        any::<u32>().prop_map(Access::Store),
        Just(Access::Load),
    ];
    proptest::collection::vec((0usize..120, access), 1..40)
}

/// Makes an access, and returns the moved bytes and whether the access succeeded.
fn run(window: &Window<'_, Memory>, offset: usize, access: &Access) -> (Vec<u8>, Result<(), ()>) {
    let mut buf = vec![];
    let result = match access {
        Access::Write(data) => window
            .write(data, offset)
            .map(|moved| buf = data[..moved].to_vec()),
        Access::WriteSlice(data) => window.write_slice(data, offset),
        Access::Read(count) => {
            buf = vec![0; *count];
            window
                .read(&mut buf, offset)
                .map(|moved| buf.truncate(moved))
        }
        Access::ReadSlice(count) => {
            buf = vec![0; *count];
            window.read_slice(&mut buf, offset)
        }
        Access::ReadFrom(data) => {
            window.read_exact_volatile_from(offset, &mut &data[..], data.len())
        }
        Access::WriteTo(count) => window.write_all_volatile_to(offset, &mut buf, *count),
        Access::WriteObj(value) => window.write_obj(*value, offset),
        Access::ReadObj => window
            .read_obj::<[u8; 16]>(offset)
            .map(|value| buf = value.to_vec()),
        Access::Store(value) => window.store(*value, offset, Ordering::Relaxed),
        Access::Load => window
            .load::<u32>(offset, Ordering::Relaxed)
            .map(|value| buf = value.to_ne_bytes().to_vec()),
    };
    (buf, result.map_err(drop))
}

/// The window: its bytes, the ends of its slices, and its dirty cells.
struct Model {
    bytes: Vec<u8>,
    boundaries: [usize; 2],
    dirty: BTreeSet<usize>,
}

/// The number of bytes of a dirty bit.
const CELL: usize = 16;

/// Performs the access on the model.
fn expected(model: &mut Model, offset: usize, access: &Access) -> (Vec<u8>, Result<(), ()>) {
    let Model {
        bytes,
        boundaries,
        dirty,
    } = model;
    let len = bytes.len();
    let mut mark = |range: Range<usize>| {
        dirty.extend(range.map(|byte| (START + byte) / CELL));
    };
    let contiguous = |count: usize| {
        let crosses = boundaries.iter().any(|&b| offset < b && b < offset + count);
        offset + count <= len && !crosses && (offset + START).is_multiple_of(count)
    };
    let part = |count: usize| offset.min(len)..offset.saturating_add(count).min(len);
    let whole = |count: usize| {
        if count == 0 || offset + count <= len {
            Ok(())
        } else {
            Err(())
        }
    };
    match access {
        Access::Write(data) => {
            let range = part(data.len());
            let moved = &data[..range.len()];
            bytes[range.clone()].copy_from_slice(moved);
            mark(range);
            let none = moved.is_empty() && !data.is_empty();
            (moved.to_vec(), if none { Err(()) } else { Ok(()) })
        }
        Access::WriteSlice(data) | Access::ReadFrom(data) => {
            let range = part(data.len());
            bytes[range.clone()].copy_from_slice(&data[..range.len()]);
            mark(range);
            (vec![], whole(data.len()))
        }
        Access::WriteObj(value) => {
            let range = part(value.len());
            bytes[range.clone()].copy_from_slice(&value[..range.len()]);
            mark(range);
            (vec![], whole(value.len()))
        }
        Access::ReadObj => match whole(16) {
            Ok(()) => (bytes[part(16)].to_vec(), Ok(())),
            Err(()) => (vec![], Err(())),
        },
        Access::Read(count) => {
            let moved = bytes[part(*count)].to_vec();
            let none = moved.is_empty() && *count != 0;
            let buf = if none { vec![0; *count] } else { moved };
            (buf, if none { Err(()) } else { Ok(()) })
        }
        Access::ReadSlice(count) => {
            let mut buf = bytes[part(*count)].to_vec();
            buf.resize(*count, 0);
            (buf, whole(*count))
        }
        Access::WriteTo(count) => (bytes[part(*count)].to_vec(), whole(*count)),
        Access::Store(value) => {
            if !contiguous(4) {
                return (vec![], Err(()));
            }
            bytes[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
            mark(offset..offset + 4);
            (vec![], Ok(()))
        }
        Access::Load if contiguous(4) => (bytes[part(4)].to_vec(), Ok(())),
        Access::Load => (vec![], Err(())),
    }
}

/// The offset of the model's window in its first region, which ends 48 bytes later.
const START: usize = PAGE - 48;

/// A region whose dirty bits cover [`CELL`] bytes each.
fn region(start: usize, len: usize) -> GuestRegionMmap<AtomicBitmap> {
    let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(CELL).unwrap());
    let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap);
    GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(start as u64)).unwrap()
}

proptest! {
    #[test]
    fn window_over_regions_behaves_as_vector(len in 1usize..110, accesses in accesses()) {
        // A region of 32 bytes in the middle: the windows of more than 80 bytes have three slices.
        let regions = [(0, PAGE), (PAGE, 32), (PAGE + 32, PAGE)];
        let regions = regions.map(|(start, len)| region(start, len));
        let memory = Memory::from_regions(regions.into()).unwrap();
        let addr = GuestAddress(START as u64);
        let window = memory.window(addr, len, Permissions::ReadWrite).unwrap();
        let mut model = Model {
            bytes: vec![0; len],
            boundaries: [48, 80],
            dirty: BTreeSet::new(),
        };
        for (offset, access) in accesses {
            let outcome = run(&window, offset, &access);
            let expected = expected(&mut model, offset, &access);
            prop_assert_eq!(outcome, expected, "{:?} at {}", access, offset);
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, addr).unwrap();
            prop_assert_eq!(&bytes, &model.bytes, "{:?} at {}", access, offset);
            let cells = START / CELL - 2..(START + 160) / CELL;
            let dirty = cells.filter(|cell| is_dirty(&memory, (cell * CELL) as u64));
            let dirty: BTreeSet<usize> = dirty.collect();
            prop_assert_eq!(&dirty, &model.dirty, "{:?} at {}", access, offset);
        }
        // The bytes after the window are not written.
        let mut after = [0; 32];
        memory.read_slice(&mut after, GuestAddress((START + len) as u64)).unwrap();
        prop_assert_eq!(after, [0; 32]);
    }
}
