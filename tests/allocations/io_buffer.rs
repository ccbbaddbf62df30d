//! An `IoBuffer` of up to eight segments allocates nothing.

use std::fs::File;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::vectored::{self, IoBuffer};
use vm_memory::{GuestAddress, GuestMemoryMmap, Permissions};

use crate::counting_allocator::taken_by;

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Creates sixteen adjacent regions of one page each.
fn memory() -> Arc<Memory> {
    let ranges: Vec<_> = (0..16)
        .map(|n| (GuestAddress(n * 0x1000), 0x1000))
        .collect();
    Arc::new(Memory::from_ranges(&ranges).unwrap())
}

#[test]
fn io_buffer_of_eight_segments_allocates_nothing() {
    let memory = memory();
    let (taken, ()) = taken_by(|| {
        let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::ReadWrite);
        // The second descriptor is in three regions, each of the others in one.
        buffer.push(GuestAddress(0x10), 0x20).unwrap();
        buffer.push(GuestAddress(0x2ff0), 0x1020).unwrap();
        for n in 8..12 {
            buffer.push(GuestAddress(n * 0x1000), 0x200).unwrap();
        }
        assert_eq!(buffer.vectors().len(), 8);
        buffer.copy_from(0x18, &[7; 0x40]).unwrap();
        buffer.copy_to(0x18, &mut [0; 0x40]).unwrap();
        let status = buffer.split_off(0x1800).unwrap();
        buffer.truncate(0x1000);
        assert_eq!((buffer.complete(0x1000), status.complete(1)), (0x1000, 1));
    });
    assert_eq!((taken.allocations, taken.bytes), (0, 0));

    // A ninth segment allocates.
    let (taken, buffer) = taken_by(|| {
        let mut buffer = IoBuffer::new(Arc::clone(&memory), Permissions::Read);
        buffer.push(GuestAddress(0), 9 * 0x1000).unwrap();
        buffer
    });
    assert_eq!(buffer.vectors().len(), 9);
    assert!(taken.allocations > 0);
}

#[test]
fn io_buffer_used_again_allocates_nothing() {
    let (memory, zeroes) = (memory(), File::open("/dev/zero").unwrap());
    let mut buffer = IoBuffer::new(&memory, Permissions::Write);
    // The first request makes room for sixteen segments.
    buffer.push(GuestAddress(0), 16 * 0x1000).unwrap();
    let (taken, ()) = taken_by(|| {
        for start in 0..8 {
            buffer.clear();
            let pages = (start..16).map(|page| (GuestAddress(page * 0x1000), 0x1000));
            buffer.try_extend(pages).unwrap();
            let len = buffer.len();
            assert_eq!(buffer.read_from(&zeroes).unwrap(), len);
            buffer.complete_front(0x1800);
            buffer.cancel_front(0x800);
            assert_eq!(buffer.read_from_at(&zeroes, 0).unwrap(), len - 0x2000);
            buffer.set_memory(&memory);
        }
    });
    assert_eq!((taken.allocations, taken.bytes), (0, 0));
}

#[test]
fn header_split_from_buffer_of_sixteen_segments_allocates_nothing() {
    let memory = memory();
    let mut chains = IoBuffer::new(&memory, Permissions::Write);
    chains.push(GuestAddress(0), 16 * 0x1000).unwrap();
    let (taken, ()) = taken_by(|| {
        for _ in 0..20 {
            let header = chains.split_to(0x808).unwrap();
            header.write_obj([7u8; 12], 0x7fc).unwrap();
            assert_eq!(header.complete(0x808), 0x808);
            chains.complete_front(8);
        }
    });
    assert_eq!((taken.allocations, taken.bytes), (0, 0));
    assert_eq!(chains.len(), 16 * 0x1000 - 20 * 0x810);
}

#[test]
fn read_from_at_over_eight_regions_allocates_nothing() {
    let (memory, zeroes) = (memory(), File::open("/dev/zero").unwrap());
    let (taken, moved) = taken_by(|| {
        vectored::read_from_at(&*memory, GuestAddress(0), 8 * 0x1000, &zeroes, 0).unwrap()
    });
    assert_eq!((taken.allocations, moved), (0, 8 * 0x1000));
}
