//! B7: mappings past the end of a file are refused, and so are accesses that a mapping forbids.
#![cfg(all(unix, feature = "backend-mmap"))]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use test_support::{page_size, temp_file_of_len};
use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
    Permissions, VolatileMemory,
};
use Permissions::{No, Read, ReadWrite, Write};

/// Returns the offset `start` in a new file of `len` bytes.
fn place(len: usize, start: usize) -> FileOffset {
    FileOffset::new(temp_file_of_len(len as u64), start as u64)
}

/// Maps `size` bytes at `place` by every constructor, which must agree.
///
/// Returns `false` if the file is too short.
fn can_map(place: &FileOffset, size: usize) -> bool {
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let of_ranges = |error| match error {
        FromRangesError::MmapRegion(error) => error,
        other => panic!("{other}"),
    };
    let ranges = [(GuestAddress(0), size, Some(place.clone()))];
    let results = [
        MmapRegion::<()>::from_file(place.clone(), size).map(|_| ()),
        MmapRegion::<()>::build(Some(place.clone()), size, both, libc::MAP_SHARED).map(|_| ()),
        MmapRegion::<()>::build(
            Some(place.clone()),
            size,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
        )
        .map(|_| ()),
        MmapRegionBuilder::<()>::new(size)
            .with_file_offset(place.clone())
            .build()
            .map(|_| ()),
        GuestRegionMmap::<()>::from_range(GuestAddress(0), size, Some(place.clone()))
            .map(|_| ())
            .map_err(of_ranges),
        GuestMemoryMmap::<()>::from_ranges_with_files(ranges)
            .map(|_| ())
            .map_err(of_ranges),
    ];
    let mapped = results.iter().filter(|a| a.is_ok()).count();
    let past_end = results
        .iter()
        .filter(|a| matches!(a, Err(MmapRegionError::MappingPastEof)))
        .count();
    assert!(
        mapped == results.len() || past_end == results.len(),
        "{results:?}"
    );
    mapped != 0
}

#[test]
fn b07_mapping_past_last_page_of_file_is_refused() {
    let page = page_size();
    assert!(!can_map(&place(0, 0), 1));
    assert!(!can_map(&place(page, 0), page + 1));
    assert!(!can_map(&place(page, 0), 2 * page));
    assert!(!can_map(&place(page, page), 1));
    assert!(!can_map(&place(3 * page, page), 2 * page + 1));
    assert!(!can_map(&place(3 * page - 1, 2 * page), page + 1));
    assert!(can_map(&place(3 * page, page), 2 * page));
    assert!(can_map(&place(3 * page, 2 * page), page));
    assert!(can_map(&place(9 * page, 0), 2 * page));
}

#[test]
fn b07_mapping_of_file_that_ends_inside_last_page_succeeds() {
    let page = page_size();
    assert!(can_map(&place(page + 1, 0), 2 * page));
    assert!(can_map(&place(1, 0), page));
    assert!(can_map(&place(2 * page + 7, page), 2 * page));
    let place = place(page + 3, 0);
    place.file().write_all_at(b"end", page as u64).unwrap();
    let region = MmapRegion::<()>::from_file(place, 2 * page).unwrap();
    let slice = region.as_volatile_slice();
    assert_eq!(&slice.read_obj::<[u8; 4]>(page).unwrap(), b"end\0");
    slice.write_obj(1u8, 2 * page - 1).unwrap();
    assert_eq!(slice.read_obj::<u8>(2 * page - 1).unwrap(), 1);
}

#[test]
fn b07_mapping_of_device_has_no_length_check() {
    let zero = FileOffset::new(
        File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .unwrap(),
        0,
    );
    let region = MmapRegion::<()>::from_file(zero, 4 * page_size()).unwrap();
    assert_eq!(
        region
            .as_volatile_slice()
            .read_obj::<u64>(3 * page_size())
            .unwrap(),
        0
    );
}

fn memory(prot: i32) -> GuestMemoryMmap {
    let region = |start: usize, prot| {
        let mapping = MmapRegionBuilder::new(page_size())
            .with_mmap_prot(prot)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start as u64)).unwrap()
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    GuestMemoryMmap::from_regions(vec![region(0, both), region(page_size(), prot)]).unwrap()
}

fn refused<T: std::fmt::Debug>(result: Result<T, GuestMemoryError>) {
    assert!(
        matches!(result, Err(GuestMemoryError::HostAddressNotAvailable)),
        "{result:?}"
    );
}

/// Checks that `check_range` and `get_slices` permit the accesses in `granted`, inside the region
/// and across its start.
fn ranges_agree(memory: &impl GuestMemory, granted: Permissions) {
    let (inside, across) = (
        GuestAddress(page_size() as u64 + 8),
        GuestAddress(page_size() as u64 - 8),
    );
    for wanted in [No, Read, Write, ReadWrite] {
        let allowed = granted.allow(wanted);
        for (addr, good) in [(inside, 0), (across, 8)] {
            assert_eq!(memory.check_range(addr, 16, wanted), allowed, "{wanted:?}");
            let mut slices = memory.get_slices(addr, 16, wanted).unwrap();
            let moved: usize = slices.by_ref().map_while(|s| s.ok().map(|s| s.len())).sum();
            assert_eq!(moved, if allowed { 16 } else { good }, "{wanted:?}");
            assert!(slices.next().is_none());
        }
        let first = memory
            .get_slices(inside, 16, wanted)
            .unwrap()
            .next()
            .unwrap()
            .map(|s| s.len());
        if allowed {
            assert_eq!(first.unwrap(), 16);
        } else {
            refused(first);
        }
        assert_eq!(
            memory.contiguous_slice(inside, 16, wanted).is_some(),
            allowed
        );
    }
}

fn writes_fail(memory: &impl GuestMemory) {
    let (inside, across) = (
        GuestAddress(page_size() as u64 + 8),
        GuestAddress(page_size() as u64 - 8),
    );
    refused(memory.write(&[1; 4], inside));
    refused(memory.write_slice(&[1; 4], inside));
    refused(memory.write_obj(1u64, inside));
    refused(memory.store(1u64, inside, Ordering::SeqCst));
    refused(memory.read_volatile_from(inside, &mut [1u8; 4].as_slice(), 4));
    refused(memory.read_exact_volatile_from(inside, &mut [1u8; 4].as_slice(), 4));
    // The bytes before the region are written and counted.
    assert_eq!(memory.write(&[1; 16], across).unwrap(), 8);
    assert_eq!(
        memory
            .read_volatile_from(across, &mut [1u8; 16].as_slice(), 16)
            .unwrap(),
        8
    );
    let partial = memory.write_slice(&[1; 16], across);
    assert!(
        matches!(
            partial,
            Err(GuestMemoryError::PartialBuffer {
                expected: 16,
                completed: 8
            })
        ),
        "{partial:?}"
    );
}

#[test]
fn b07_read_only_region_refuses_writes_and_permits_reads() {
    let memory = memory(libc::PROT_READ);
    let inside = GuestAddress(page_size() as u64 + 8);
    ranges_agree(&memory, Read);
    writes_fail(&memory);
    assert_eq!(memory.read_obj::<u64>(inside).unwrap(), 0);
    assert_eq!(memory.load::<u64>(inside, Ordering::SeqCst).unwrap(), 0);
    let mut copied = vec![];
    memory
        .write_all_volatile_to(inside, &mut copied, 16)
        .unwrap();
    assert_eq!(copied, [0; 16]);

    let region = memory.find_region(inside).unwrap();
    let at = MemoryRegionAddress(0);
    assert_eq!(region.allowed_access(), Read);
    refused(region.write(&[1], at));
    refused(region.write_slice(&[1], at));
    refused(region.write_obj(1u8, at));
    refused(region.store(1u8, at, Ordering::SeqCst));
    refused(region.read_volatile_from(at, &mut [1u8].as_slice(), 1));
    refused(region.read_exact_volatile_from(at, &mut [1u8].as_slice(), 1));
    assert_eq!(region.read_obj::<u8>(at).unwrap(), 0);
    assert_eq!(region.load::<u8>(at, Ordering::SeqCst).unwrap(), 0);
}

#[test]
fn b07_region_with_prot_none_refuses_all_accesses() {
    let memory = memory(libc::PROT_NONE);
    let inside = GuestAddress(page_size() as u64 + 8);
    ranges_agree(&memory, No);
    writes_fail(&memory);
    refused(memory.read(&mut [0; 4], inside));
    refused(memory.read_slice(&mut [0; 4], inside));
    refused(memory.read_obj::<u64>(inside));
    refused(memory.load::<u64>(inside, Ordering::SeqCst));
    refused(memory.write_volatile_to(inside, &mut vec![], 4));
    refused(memory.write_all_volatile_to(inside, &mut vec![], 4));
    let region = memory.find_region(inside).unwrap();
    let at = MemoryRegionAddress(0);
    refused(region.read(&mut [0], at));
    refused(region.read_slice(&mut [0], at));
    refused(region.read_obj::<u8>(at));
    refused(region.load::<u8>(at, Ordering::SeqCst));
    refused(region.write_volatile_to(at, &mut vec![], 1));
    refused(region.write_all_volatile_to(at, &mut vec![], 1));
}

#[test]
fn b07_builder_default_permits_reads_and_writes() {
    let region = MmapRegionBuilder::<()>::new(page_size()).build().unwrap();
    assert_eq!(region.prot(), libc::PROT_READ | libc::PROT_WRITE);
    region
        .as_volatile_slice()
        .write_obj(5u8, page_size() - 1)
        .unwrap();
    assert_eq!(
        region
            .as_volatile_slice()
            .read_obj::<u8>(page_size() - 1)
            .unwrap(),
        5
    );
    let guest = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    assert_eq!(guest.allowed_access(), ReadWrite);
    ranges_agree(&memory(libc::PROT_READ | libc::PROT_WRITE), ReadWrite);
}
