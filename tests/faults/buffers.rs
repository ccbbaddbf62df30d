//! A scattered copy moves no byte after an inaccessible page.

use std::num::NonZeroUsize;

use test_support::temp_file;

use super::*;
use vm_memory::mmap::{MmapRegionBuilder, PluggedBlocks};
use vm_memory::vectored::{self, IoBuffer};
use vm_memory::{fault, Bytes, GuestMemory, GuestRegionMmap};
use vm_memory::{MemoryRegionAddress, Permissions};

/// The first byte of the tested ranges, which cross three pages. The second page is missing.
const START: GuestAddress = GuestAddress(BASE.0 + PAGE as u64 - 4);
const LEN: usize = 4 + PAGE + 8;

/// Returns two pages from `file`, and one page of their own after them.
fn two_regions(file: &Arc<File>) -> Memory {
    let backing = FileOffset::from_arc(Arc::clone(file), 0);
    let after = GuestAddress(BASE.0 + 2 * PAGE as u64);
    Memory::from_ranges_with_files([(BASE, 2 * PAGE, Some(backing)), (after, PAGE, None)]).unwrap()
}

fn buffer<M: GuestMemory + 'static>(memory: &Arc<M>, ranges: &[(u64, usize)]) -> IoBuffer<M> {
    let mut buffer = IoBuffer::new(Arc::clone(memory), Permissions::ReadWrite);
    for (addr, len) in ranges {
        buffer.push(GuestAddress(*addr), *len).unwrap();
    }
    assert_eq!(buffer.len(), LEN);
    buffer
}

/// Checks that copies of `buffer` end after four bytes. `last` reads its last eight bytes.
fn check<M: GuestMemory>(name: &str, buffer: &IoBuffer<M>, last: impl Fn() -> [u8; 8]) {
    assert_eq!(buffer.copy_from(0, &[0xee; LEN]).unwrap(), 4, "{name}");
    assert_eq!(last(), [0; 8], "{name}: bytes after the fault were written");
    let mut seen = [0x11; LEN];
    assert_eq!(buffer.copy_to(0, &mut seen).unwrap(), 4, "{name}");
    assert_eq!((seen[3], seen[4]), (0xee, 0x11), "{name}");
    assert_eq!(seen[LEN - 8..], [0x11; 8], "{name}");
    // The exact forms report the count, and move no byte after the fault either.
    let moved = |expected| {
        let completed = 4;
        format!(
            "{:?}",
            GuestMemoryError::PartialBuffer {
                expected,
                completed
            }
        )
    };
    let error = buffer.write_slice(&[0xdd; LEN], 0).unwrap_err();
    assert_eq!(format!("{error:?}"), moved(LEN), "{name}");
    let error = buffer.write_obj([0xcc_u8; 8], 0).unwrap_err();
    assert_eq!(format!("{error:?}"), moved(8), "{name}");
    let error = buffer.read_slice(&mut seen, 0).unwrap_err();
    assert_eq!(format!("{error:?}"), moved(LEN), "{name}");
    assert_eq!((seen[3], seen[4]), (0xcc, 0x11), "{name}");
    let error = buffer.read_obj::<[u8; 8]>(0).unwrap_err();
    assert_eq!(format!("{error:?}"), moved(8), "{name}");
    assert!(is_efault(&buffer.read_obj::<u64>(4).unwrap_err()), "{name}");
    assert!(is_efault(&buffer.write_obj(1u64, 4).unwrap_err()), "{name}");
    // The range begins inside the missing page.
    for offset in [4, 5, PAGE] {
        assert!(is_efault(&buffer.copy_from(offset, &[1; LEN]).unwrap_err()));
        assert!(is_efault(&buffer.copy_to(offset, &mut seen).unwrap_err()));
    }
    assert_eq!(last(), [0; 8], "{name}");
    assert_eq!(buffer.copy_to(PAGE + 4, &mut seen).unwrap(), 8);
}

#[test]
fn io_buffer_copy_across_truncated_page_stops_there() {
    fault::install().unwrap();
    for touched in [false, true] {
        let file = memfd(2);
        let memory = Arc::new(two_regions(&file));
        let edge = GuestAddress(BASE.0 + 2 * PAGE as u64);
        if touched {
            memory.write_slice(&[0; 2 * PAGE], BASE).unwrap();
        }
        let lists: [&[(u64, usize)]; 3] = [
            &[(START.0, LEN)],
            &[(START.0, 4), (START.0 + 4, PAGE), (edge.0, 8)],
            &[(START.0, 100), (START.0 + 100, LEN - 100)],
        ];
        let buffers = lists.map(|list| buffer(&memory, list));
        file.set_len(PAGE as u64).unwrap();
        for buffer in &buffers {
            check("regions", buffer, || memory.read_obj(edge).unwrap());
        }
    }
}

/// The kernel returns a short count at the missing page, or `EFAULT` if it is the first.
#[test]
fn io_buffer_read_across_truncated_page_marks_what_the_call_reached() {
    let file = memfd(2);
    let backing = FileOffset::from_arc(Arc::clone(&file), 0);
    let ranges = [(BASE, 2 * PAGE, Some(backing))];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(ranges).unwrap();
    let memory = Arc::new(memory);
    file.set_len(PAGE as u64).unwrap();
    let dirty = || {
        memory
            .find_region(BASE)
            .unwrap()
            .get_mmap()
            .bitmap()
            .get_and_reset()
    };
    let zeroes = File::open("/dev/zero").unwrap();
    let (wire, tap) = std::os::unix::net::UnixDatagram::pair().unwrap();

    let ranges = [(START, 4), (GuestAddress(START.0 + 4), 8)];
    let mut buffer = IoBuffer::from_ranges(&memory, ranges, Permissions::ReadWrite).unwrap();
    assert_eq!(buffer.read_from(&zeroes).unwrap(), 4);
    assert_eq!(dirty(), [0b11]);
    assert_eq!(buffer.read_from_at(&zeroes, 0).unwrap(), 4);
    assert_eq!(dirty(), [0b11]);
    assert_eq!(buffer.write_to(&temp_file(&[])).unwrap(), 4);
    // A packet that ends before the page is received, and marks only its own page.
    wire.send(&[7; 4]).unwrap();
    assert_eq!(buffer.read_packet_from(&tap).unwrap(), 4);
    assert_eq!(dirty(), [0b01]);
    // The kernel drops a whole datagram after it has copied a part of it.
    for read in [IoBuffer::read_from, IoBuffer::read_packet_from] {
        wire.send(&[7; 12]).unwrap();
        assert!(is_efault(&read(&buffer, &tap).unwrap_err()));
        assert_eq!(dirty(), [0b11]);
    }

    buffer.cancel_front(4);
    assert!(is_efault(&buffer.read_from(&zeroes).unwrap_err()));
    assert!(is_efault(
        &buffer.write_to_at(&temp_file(&[]), 0).unwrap_err()
    ));
    assert_eq!(dirty(), [0b10]);
}

#[test]
fn io_buffer_copy_across_protected_page_stops_there() {
    fault::install().unwrap();
    let (memory, _file) = shared(3);
    let memory = Arc::new(memory);
    let edge = GuestAddress(BASE.0 + 2 * PAGE as u64);
    let list = [(START.0, LEN - 8), (edge.0, 8)];
    let buffer = buffer(&memory, &list);
    protect(&memory, 1, libc::PROT_NONE);
    check("one region", &buffer, || memory.read_obj(edge).unwrap());
}

#[cfg(feature = "iommu")]
#[test]
fn io_buffer_copy_behind_iommu_stops_at_truncated_page() {
    use vm_memory::iommu::{IommuMemory, SharedIotlb};
    fault::install().unwrap();
    let file = memfd(2);
    let physical = two_regions(&file);
    let iotlb = SharedIotlb::new();
    // One mapping whose second page is missing, and one of the page after it.
    for (iova, page) in [(10, 0), (11, 1), (20, 2)] {
        let iova = GuestAddress(iova * PAGE as u64);
        let to = GuestAddress(BASE.0 + page * PAGE as u64);
        let access = Permissions::ReadWrite;
        iotlb.set_mapping(iova, to, PAGE, access).unwrap();
    }
    let marks = AtomicBitmap::new(32 * PAGE, NonZeroUsize::new(PAGE).unwrap());
    let memory = Arc::new(IommuMemory::new(physical, iotlb, true, marks));
    let (start, edge) = (11 * PAGE as u64 - 4, GuestAddress(20 * PAGE as u64));
    let buffer = buffer(&memory, &[(start, LEN - 8), (edge.0, 8)]);
    file.set_len(PAGE as u64).unwrap();
    check("IOMMU", &buffer, || memory.read_obj(edge).unwrap());
}

#[test]
fn io_buffer_copy_across_block_unplugged_later_stops_there() {
    fault::install().unwrap();
    let page = NonZeroUsize::new(PAGE).unwrap();
    let blocks = Arc::new(PluggedBlocks::new(3 * PAGE, page).unwrap());
    blocks.plug(0, 3 * PAGE).unwrap();
    let mapping = MmapRegionBuilder::new(3 * PAGE)
        .with_plugged_blocks(Arc::clone(&blocks))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(mapping, BASE).unwrap();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let memory = Arc::new(memory);
    let list = [(START.0, LEN - 8), (BASE.0 + 2 * PAGE as u64, 8)];
    let buffer = buffer(&memory, &list);
    blocks.unplug(PAGE, PAGE).unwrap();
    let host = memory.get_host_address(BASE).unwrap().wrapping_add(PAGE);
    // SAFETY: a page of the mapping, which only accesses of the crate use.
    let status = unsafe { libc::mprotect(host.cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(status, 0);
    let edge = GuestAddress(BASE.0 + 2 * PAGE as u64);
    check("blocks", &buffer, || memory.read_obj(edge).unwrap());
    assert!(vectored::io_vectors(&*memory, START, LEN, Permissions::Read).is_err());
}

/// A source that knows its length must not report bytes that a fault kept from guest memory.
#[test]
fn read_exact_from_byte_slice_across_truncated_page_returns_error() {
    fault::install().unwrap();
    let (memory, file) = shared(2);
    file.set_len(PAGE as u64).unwrap();
    let region = memory.find_region(BASE).unwrap();
    let slice = memory.get_slice(START, 100).unwrap();
    let bytes = [7; 100];
    slice
        .read_exact_volatile_from(0, &mut &bytes[..], 100)
        .unwrap_err();
    let mut cursor = std::io::Cursor::new(bytes);
    slice
        .read_exact_volatile_from(0, &mut cursor, 100)
        .unwrap_err();
    let at = MemoryRegionAddress(PAGE as u64 - 4);
    let error = region.read_exact_volatile_from(at, &mut &bytes[..], 100);
    assert!(is_efault(&error.unwrap_err()));
    let error = memory.read_exact_volatile_from(START, &mut &bytes[..], 100);
    let moved = GuestMemoryError::PartialBuffer {
        expected: 100,
        completed: 4,
    };
    assert_eq!(format!("{:?}", error.unwrap_err()), format!("{moved:?}"));
    // A read that ends at the end of the page succeeds.
    let mut source = &bytes[..];
    memory
        .read_exact_volatile_from(START, &mut source, 4)
        .unwrap();
    assert_eq!(source.len(), 96);
}
