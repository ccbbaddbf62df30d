//! The calls of libkrun, which builds on Windows, macOS and Linux with the feature `backend-mmap`
//! only.
#![cfg(feature = "backend-mmap")]

use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[expect(unsafe_code, reason = "the trait is unsafe to implement")]
// SAFETY: the struct consists of integers, without padding.
unsafe impl ByteValued for Descriptor {}

/// 3 MiB of RAM below a hole, and 1 MiB above it.
fn ram() -> GuestMemoryMmap {
    let ranges = [(GuestAddress(0), 3 << 20), (GuestAddress(1 << 32), 1 << 20)];
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

/// It maps RAM into the virtual machine by host addresses and lengths, which are whole pages.
#[test]
fn libkrun_registers_ram_by_host_address_and_length() {
    let memory = ram();
    let mut total = 0;
    for region in memory.iter() {
        let host = memory.get_host_address(region.start_addr()).unwrap();
        assert!(host.addr().is_multiple_of(test_support::page_size()));
        assert!(region.len().is_multiple_of(test_support::PAGE_U64));
        let last = memory.get_host_address(region.last_addr()).unwrap();
        assert_eq!(last.addr() - host.addr() + 1, region.len() as usize);
        total += region.len();
    }
    assert_eq!((total, memory.num_regions()), (4 << 20, 2));
    assert_eq!(memory.last_addr(), GuestAddress((1 << 32) + (1 << 20) - 1));
    assert!(memory.get_host_address(GuestAddress(3 << 20)).is_err());
}

#[test]
fn libkrun_devices_access_descriptors_and_buffers() {
    let memory = ram();
    let descriptor = Descriptor {
        addr: (1 << 32) + 0x100,
        len: 13,
        flags: 2,
        next: 1,
    };
    memory.write_obj(descriptor, GuestAddress(0x1000)).unwrap();
    let read: Descriptor = memory.read_obj(GuestAddress(0x1000)).unwrap();
    assert_eq!(read, descriptor);
    memory
        .write_slice(b"console=hvc0\0", GuestAddress(read.addr))
        .unwrap();
    let slice = memory
        .get_slice(GuestAddress(read.addr), read.len as usize)
        .unwrap();
    assert_eq!((slice.len(), slice.read_obj::<u8>(0).unwrap()), (13, b'c'));
    // The pointers go to `readv` and `writev`, or to what stands for them.
    let (reader, writer) = (slice.ptr_guard(), slice.ptr_guard_mut());
    let host = memory.get_host_address(GuestAddress(read.addr)).unwrap();
    assert_eq!(reader.as_ptr(), host.cast_const());
    assert_eq!((writer.as_ptr(), writer.len()), (host, 13));
    let end = GuestAddress(read.addr).checked_add(13).unwrap();
    assert!(memory.check_range(GuestAddress(read.addr), 13) && memory.address_in_range(end));
    assert!(memory
        .write_slice(&[0; 16], GuestAddress((3 << 20) - 8))
        .is_err());
}
