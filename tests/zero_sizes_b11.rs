//! B11: empty regions and zero-sized types do not cause a panic.

use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress, Permissions,
    VolatileMemory, VolatileSlice,
};

/// An empty region.
#[derive(Debug)]
struct Empty(u64);

impl GuestMemoryRegion for Empty {
    type B = ();
    fn len(&self) -> GuestUsize {
        0
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.0)
    }
    fn bitmap(&self) {}
    fn get_slice(
        &self,
        _: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        match count {
            0 => Ok(VolatileSlice::from([].as_mut_slice())),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }
}
impl GuestMemoryRegionBytes for Empty {}

#[test]
fn b11_empty_region_contains_no_address() {
    for start in [0, 0x1000, u64::MAX] {
        let region = Empty(start);
        for addr in [
            0,
            start.wrapping_sub(1),
            start,
            start.wrapping_add(1),
            u64::MAX,
        ] {
            assert_eq!(region.to_region_addr(GuestAddress(addr)), None);
            assert_eq!(region.check_address(MemoryRegionAddress(addr)), None);
            assert!(!region.address_in_range(MemoryRegionAddress(addr)));
            assert_eq!(region.checked_offset(MemoryRegionAddress(addr), 0), None);
        }
        assert_eq!(region.last_addr(), GuestAddress(start));
        assert!(region.as_volatile_slice().unwrap().is_empty());
        let at = MemoryRegionAddress(0);
        assert!(region.read_obj::<u8>(at).is_err() && region.write_obj(1u8, at).is_err());
        assert!(region.load::<u8>(at, Ordering::SeqCst).is_err());
        assert_eq!(
            (
                region.read(&mut [], at).unwrap(),
                region.write(&[], at).unwrap()
            ),
            (0, 0)
        );

        let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
        let addr = GuestAddress(start);
        assert!(memory.find_region(addr).is_none() && memory.to_region_addr(addr).is_none());
        assert!(!GuestMemoryBackend::check_range(&memory, addr, 1));
        assert!(GuestMemoryBackend::check_range(&memory, addr, 0));
        assert!(!GuestMemory::check_range(
            &memory,
            addr,
            1,
            Permissions::Read
        ));
        assert_eq!(GuestMemoryBackend::get_slices(&memory, addr, 0).count(), 0);
        let read = memory.read_obj::<u8>(addr);
        assert!(
            matches!(read, Err(GuestMemoryError::InvalidGuestAddress(at)) if at == addr),
            "{read:?}"
        );
        assert!(memory.write_obj(1u8, addr).is_err());
        assert!(memory.store(1u8, addr, Ordering::SeqCst).is_err());
        assert_eq!(memory.write(&[], addr).unwrap(), 0);
    }
}

#[test]
fn b11_copies_of_zero_sized_types_return_number_of_elements() {
    type Nothing = [u64; 0];
    let mut memory = [1u8, 2, 3];
    let slice = VolatileSlice::from(memory.as_mut_slice());
    assert_eq!(slice.copy_to::<Nothing>(&mut [[]; 5]), 5);
    slice.copy_from::<Nothing>(&[[]; 5]);
    assert_eq!(slice.offset(3).unwrap().copy_to::<Nothing>(&mut [[]; 2]), 2);
    let array = slice.get_array_ref::<Nothing>(3, 9).unwrap();
    assert_eq!((array.len(), array.element_size()), (9, 0));
    assert_eq!(array.copy_to(&mut [[]; 5]), 5);
    array.copy_from(&[[]; 5]);
    array.store(8, []);
    array.load(8);
    slice.write_obj::<Nothing>([], 3).unwrap();
    slice.read_obj::<Nothing>(3).unwrap();
    slice.get_ref::<Nothing>(3).unwrap().store([]);
    assert_eq!(memory, [1, 2, 3]);
}
