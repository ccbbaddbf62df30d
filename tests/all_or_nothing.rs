//! An access through `all_or_nothing` moves all bytes of its range, or none.
#![cfg(all(feature = "backend-mmap", feature = "backend-bitmap"))]

use std::io::Cursor;

use test_support::PAGE;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    Permissions,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two adjacent regions of a page, a hole of a page, and another region.
fn memory() -> Memory {
    Memory::from_ranges(&[0, 0x1000, 0x3000].map(|start| (GuestAddress(start), PAGE))).unwrap()
}

/// Returns all bytes of memory, and whether a page is marked. Removes the marks.
fn state(memory: &Memory) -> (Vec<u8>, bool) {
    let mut bytes = vec![0; 3 * PAGE];
    let (low, high) = bytes.split_at_mut(2 * PAGE);
    memory.read_slice(low, GuestAddress(0)).unwrap();
    memory.read_slice(high, GuestAddress(0x3000)).unwrap();
    let marks = memory.iter().map(|region| region.bitmap().get_and_reset());
    (bytes, marks.filter(|words| words[..] != [0]).count() != 0)
}

/// Makes each kind of access to the `len` bytes at `addr`. Returns whether each one succeeded.
fn access(memory: &impl GuestMemory, addr: u64, len: usize) -> Vec<bool> {
    let (addr, source) = (GuestAddress(addr), vec![0xa5; len]);
    let view = memory.all_or_nothing();
    let mut read = vec![0x5a; len];
    let results = [
        view.write(&source, addr)
            .map(|moved| assert_eq!(moved, len)),
        view.write_slice(&source, addr),
        view.read_exact_volatile_from(addr, &mut &source[..], len),
        view.read_volatile_from(addr, &mut Cursor::new(&source), len)
            .map(|moved| assert_eq!(moved, len)),
        view.read_slice(&mut read, addr),
        view.read(&mut read, addr)
            .map(|moved| assert_eq!(moved, len)),
    ];
    let mut target = Vec::new();
    let written = view.write_all_volatile_to(addr, &mut target, len);
    match &written {
        Ok(()) => assert_eq!((&target, &read), (&source, &source)),
        Err(_) => assert!(target.is_empty() && read == vec![0x5a; len]),
    }
    let all = results.into_iter().chain([written]);
    all.map(|result| match result {
        Ok(()) => true,
        Err(GuestMemoryError::PartialBuffer { .. }) => panic!("bytes were moved"),
        Err(_) => false,
    })
    .collect()
}

#[test]
fn all_or_nothing_over_hole_moves_nothing() {
    let memory = memory();
    let before = (vec![0; 3 * PAGE], false);
    for (addr, len) in [(0x1ff8, 9), (0, 4 * PAGE), (0x1800, 2 * PAGE), (0x3fff, 2)] {
        assert_eq!(access(&memory, addr, len), [false; 7], "{addr:#x}");
        assert_eq!(state(&memory), before, "{addr:#x}");
        // Without the view, the first bytes are moved.
        assert!(memory.write(&vec![0; len], GuestAddress(addr)).unwrap() > 0);
        state(&memory);
    }
    let hole = memory
        .all_or_nothing()
        .write_slice(&[1; 16], GuestAddress(0x1ff8));
    assert!(matches!(
        hole.unwrap_err(),
        GuestMemoryError::InvalidGuestAddress(GuestAddress(0x2000))
    ));
    for (addr, len) in [(0x2000, 1), (0x2fff, 2), (0x4000, 1), (u64::MAX, 2)] {
        assert_eq!(access(&memory, addr, len), [false; 7], "{addr:#x}");
        assert_eq!(state(&memory), before);
    }
}

#[test]
fn all_or_nothing_over_existing_range_moves_all() {
    let memory = memory();
    for (addr, len) in [
        (0, 2 * PAGE),
        (0xffc, 8),
        (0x800, 0x1800),
        (0x3000, PAGE),
        (8, 8),
    ] {
        assert_eq!(access(&memory, addr, len), [true; 7], "{addr:#x}");
        assert!(state(&memory).1);
    }
    assert_eq!(access(&memory, 0x2000, 0), [true; 7]);
    let view = memory.all_or_nothing();
    view.write_obj(7u32, GuestAddress(0xffe)).unwrap();
    assert_eq!(view.read_obj::<u32>(GuestAddress(0xffe)).unwrap(), 7);
    assert!(view.check_range(GuestAddress(0), 2 * PAGE, Permissions::ReadWrite));
    assert!(!view.check_range(GuestAddress(0), 3 * PAGE, Permissions::ReadWrite));
}

#[cfg(feature = "rawfd")]
#[test]
fn all_or_nothing_vectored_transfer_over_hole_moves_nothing() {
    use vm_memory::vectored::{read_exact_from_at, write_all_to_at};
    let (memory, file) = (memory(), test_support::temp_file(&[7; 3 * PAGE]));
    let view = memory.all_or_nothing();
    read_exact_from_at(&view, GuestAddress(0), 2 * PAGE + 1, &file, 0).unwrap_err();
    assert_eq!(state(&memory), (vec![0; 3 * PAGE], false));
    write_all_to_at(&view, GuestAddress(0), 2 * PAGE + 1, &file, 0).unwrap_err();
    read_exact_from_at(&view, GuestAddress(0), 2 * PAGE, &file, 0).unwrap();
    assert_eq!(state(&memory).0[..2 * PAGE], [7; 2 * PAGE]);
}

#[cfg(feature = "iommu")]
#[test]
fn all_or_nothing_behind_iommu_checks_mappings_and_physical_memory() {
    use std::num::NonZeroUsize;
    use std::sync::RwLock;
    use vm_memory::{IommuMemory, Iotlb};
    let mut iotlb = Iotlb::new();
    let page = |number: u64| GuestAddress(number * 0x1000);
    // The third page is a hole of the physical memory. The fifth permits reads only.
    for (iova, to, access) in [
        (0x10, 3, Permissions::ReadWrite),
        (0x11, 0, Permissions::ReadWrite),
        (0x12, 2, Permissions::ReadWrite),
        (0x14, 1, Permissions::ReadWrite),
        (0x15, 0, Permissions::Read),
    ] {
        iotlb
            .set_mapping(page(iova), page(to), PAGE, access)
            .unwrap();
    }
    let bitmap = AtomicBitmap::new(32 * PAGE, NonZeroUsize::new(PAGE).unwrap());
    let memory = IommuMemory::new(memory(), RwLock::new(iotlb), true, bitmap);
    let before = state(memory.get_backend());
    for (addr, len) in [(0x1_1800, PAGE), (0x1_0000, 4 * PAGE), (0x1_3fff, 2)] {
        assert_eq!(access(&memory, addr, len), [false; 7], "{addr:#x}");
    }
    let view = memory.all_or_nothing();
    view.write_slice(&[1; 16], GuestAddress(0x1_4ff8))
        .unwrap_err();
    view.read_slice(&mut [1; 16], GuestAddress(0x1_4ff8))
        .unwrap();
    assert_eq!(state(memory.get_backend()), before);
    assert_eq!(access(&memory, 0x1_0800, PAGE), [true; 7]);
}
