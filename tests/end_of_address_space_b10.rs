//! B10: a range of guest memory may end at 2^64, but never wraps around.
#![expect(unsafe_code, reason = "makes slices of its own regions")]

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress, Permissions,
    VolatileMemory, VolatileSlice,
};

/// A region on the heap.
#[derive(Debug)]
struct Ram {
    start: u64,
    words: Vec<AtomicU64>,
}

impl GuestMemoryRegion for Ram {
    type B = ();
    fn len(&self) -> GuestUsize {
        8 * self.words.len() as u64
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }
    fn bitmap(&self) {}
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let ptr = self.words.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: the bytes are atomics that live as long as the region.
        let whole = unsafe { VolatileSlice::new(ptr, 8 * self.words.len()) };
        Ok(whole.subslice(offset.0 as usize, count)?)
    }
}
impl GuestMemoryRegionBytes for Ram {}

fn ram(start: u64, len: usize) -> Ram {
    Ram {
        start,
        words: (0..len / 8).map(|_| AtomicU64::new(0)).collect(),
    }
}

const TOP: GuestAddress = GuestAddress(0xffff_ffff_ffff_fff0);

/// Creates 16 bytes at 0, and the last 16 bytes of the address space.
fn memory() -> GuestRegionCollection<Ram> {
    GuestRegionCollection::from_regions(vec![ram(0, 16), ram(TOP.0, 16)]).unwrap()
}

fn bottom(memory: &GuestRegionCollection<Ram>) -> Vec<u8> {
    let region = memory
        .find_region(GuestAddress(0))
        .unwrap()
        .as_volatile_slice()
        .unwrap();
    assert_eq!(VolatileMemory::len(&region), 16);
    let mut bytes = vec![1; 16];
    region.read_slice(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn b10_access_up_to_end_of_address_space_succeeds() {
    let memory = memory();
    assert_eq!(memory.last_addr(), GuestAddress(u64::MAX));
    assert!(GuestMemoryBackend::check_range(&memory, TOP, 16));
    assert!(GuestMemory::check_range(
        &memory,
        TOP,
        16,
        Permissions::ReadWrite
    ));
    memory.write_slice(&[7; 16], TOP).unwrap();
    assert_eq!(
        memory.read_obj::<u128>(TOP).unwrap(),
        u128::from_ne_bytes([7; 16])
    );
    memory
        .store(5u64, GuestAddress(u64::MAX - 7), Ordering::SeqCst)
        .unwrap();
    assert_eq!(
        memory
            .load::<u64>(GuestAddress(u64::MAX - 7), Ordering::SeqCst)
            .unwrap(),
        5
    );
    assert_eq!(memory.write(&[9], GuestAddress(u64::MAX)).unwrap(), 1);
    memory
        .read_exact_volatile_from(TOP, &mut [3u8; 16].as_slice(), 16)
        .unwrap();
    memory.write_all_volatile_to(TOP, &mut vec![], 16).unwrap();
    let lens: Vec<_> = GuestMemoryBackend::get_slices(&memory, TOP, 16)
        .map(|s| s.unwrap().len())
        .collect();
    assert_eq!(lens, [16]);
    assert_eq!(bottom(&memory), [0; 16]);
}

#[test]
fn b10_access_past_end_of_address_space_does_not_wrap() {
    let memory = memory();
    for count in [17usize, 0x20, usize::MAX] {
        for access in [Permissions::No, Permissions::Read, Permissions::ReadWrite] {
            assert!(!GuestMemory::check_range(&memory, TOP, count, access));
            assert!(memory.contiguous_slice(TOP, count, access).is_none());
        }
        assert!(!GuestMemoryBackend::check_range(&memory, TOP, count));
        let mut slices = GuestMemoryBackend::get_slices(&memory, TOP, count);
        assert_eq!(slices.next().unwrap().unwrap().len(), 16);
        assert!(matches!(
            slices.next(),
            Some(Err(GuestMemoryError::GuestAddressOverflow))
        ));
        assert!(slices.next().is_none());
    }
    let data = [7u8; 0x20];
    assert_eq!(memory.write(&data, TOP).unwrap(), 16);
    assert_eq!(memory.read(&mut [0; 0x20], TOP).unwrap(), 16);
    let partial = |r: Result<(), GuestMemoryError>| {
        assert!(
            matches!(
                r,
                Err(GuestMemoryError::PartialBuffer {
                    expected: 0x20,
                    completed: 16
                })
            ),
            "{r:?}"
        );
    };
    partial(memory.write_slice(&data, TOP));
    partial(memory.write_obj(data, TOP));
    partial(memory.read_slice(&mut [0; 0x20], TOP));
    partial(memory.read_obj::<[u8; 0x20]>(TOP).map(|_| ()));
    assert_eq!(
        memory
            .read_volatile_from(TOP, &mut data.as_slice(), 0x20)
            .unwrap(),
        16
    );
    assert_eq!(
        memory.write_volatile_to(TOP, &mut vec![], 0x20).unwrap(),
        16
    );
    partial(memory.read_exact_volatile_from(TOP, &mut data.as_slice(), 0x20));
    partial(memory.write_all_volatile_to(TOP, &mut vec![], 0x20));
    assert!(memory
        .store(u64::MAX, GuestAddress(u64::MAX - 3), Ordering::SeqCst)
        .is_err());
    assert!(memory
        .load::<u64>(GuestAddress(u64::MAX - 3), Ordering::SeqCst)
        .is_err());
    assert_eq!(bottom(&memory), [0; 16]);
    assert_eq!(memory.checked_offset(TOP, 0x10), None);
}

#[test]
#[expect(
    deprecated,
    reason = "deprecated items are tested until they are removed"
)]
fn b10_try_access_up_to_end_of_address_space_stops() {
    let memory = memory();
    let mut seen = vec![];
    let result = memory.try_access(0x20, TOP, |_, wanted, _, region| {
        seen.push((region.start, wanted));
        Ok(wanted)
    });
    assert_eq!(result.unwrap(), 16);
    assert_eq!(seen, [(TOP.0, 16)]);
    assert_eq!(
        memory
            .try_access(0x10, TOP, |_, wanted, _, _| Ok(wanted))
            .unwrap(),
        16
    );
}

/// The collection may refuse such a region, or cut it.
#[test]
fn b10_region_past_end_of_address_space_does_not_wrap() {
    for below in [None, Some(ram(0x1000, 16))] {
        let regions: Vec<_> = below.into_iter().chain([ram(TOP.0, 0x20)]).collect();
        let Ok(memory) = GuestRegionCollection::from_regions(regions) else {
            continue;
        };
        assert!(!memory.address_in_range(GuestAddress(0)));
        assert!(!GuestMemoryBackend::check_range(&memory, TOP, 0x11));
        assert_eq!(memory.write(&[7; 0x20], TOP).unwrap(), 16);
    }
}

#[test]
fn b10_window_up_to_end_of_address_space_does_not_wrap_around() {
    let memory = memory();
    let window = memory.window(TOP, 16, Permissions::ReadWrite).unwrap();
    window.write_obj(9u8, 15).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::MAX)).unwrap(), 9);
    // Offset 16 has guest address 0 if addresses wrap around.
    assert!(window.write_obj(9u8, 16).is_err());
    assert_eq!(window.write(&[9; 2], 15).unwrap(), 1);
    assert!(window.load::<u64>(16, Ordering::SeqCst).is_err());
    assert_eq!(bottom(&memory), [0; 16]);
    assert!(memory.window(TOP, 17, Permissions::Read).is_err());
}
