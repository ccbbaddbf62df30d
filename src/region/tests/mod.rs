//! Tests of region types of third parties, correct and not, and of collections.

use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use std::sync::Mutex;

use super::*;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::value::AtomicAccess;

mod collection;
#[cfg(feature = "backend-mmap")]
mod ram;

/// The registers of a device: not RAM, so they implement [`Bytes`] themselves.
#[derive(Debug)]
struct Registers {
    start: u64,
    bytes: Mutex<Vec<u8>>,
}

fn registers(start: u64, len: usize) -> Registers {
    Registers {
        start,
        bytes: vec![0; len].into(),
    }
}

impl GuestMemoryRegion for Registers {
    type B = ();
    fn len(&self) -> GuestUsize {
        self.bytes.lock().unwrap().len() as u64
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }
    fn bitmap(&self) {}
}

impl Bytes<MemoryRegionAddress> for Registers {
    type E = Error;
    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        self.write_slice(buf, addr).map(|()| buf.len())
    }
    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        self.read_slice(buf, addr).map(|()| buf.len())
    }
    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        let at = addr.0 as usize;
        let mut bytes = self.bytes.lock().unwrap();
        let place = bytes
            .get_mut(at..at + buf.len())
            .ok_or(Error::InvalidBackendAddress)?;
        place.copy_from_slice(buf);
        Ok(())
    }
    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        let at = addr.0 as usize;
        let bytes = self.bytes.lock().unwrap();
        buf.copy_from_slice(
            bytes
                .get(at..at + buf.len())
                .ok_or(Error::InvalidBackendAddress)?,
        );
        Ok(())
    }
    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<()> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn write_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<()> {
        Err(Error::IOError(ErrorKind::Unsupported.into()))
    }
    fn store<T: AtomicAccess>(&self, val: T, addr: MemoryRegionAddress, _: Ordering) -> Result<()> {
        self.write_slice(crate::ByteValued::as_slice(&val), addr)
    }
    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, _: Ordering) -> Result<T> {
        self.read_obj(addr)
    }
}

type Collection = GuestRegionCollection<Registers>;

fn collection(
    places: &[(u64, usize)],
) -> std::result::Result<Collection, GuestRegionCollectionError> {
    Collection::from_regions(
        places
            .iter()
            .map(|&(start, len)| registers(start, len))
            .collect(),
    )
}

#[test]
fn non_ram_region_is_accessible_only_through_its_own_bytes() {
    let memory = collection(&[(0x100, 0x10), (0x110, 0x10)]).unwrap();
    let (region, at) = memory.to_region_addr(GuestAddress(0x118)).unwrap();
    assert_eq!((region.start, at), (0x110, MemoryRegionAddress(8)));
    region.write_obj(0x1234u16, at).unwrap();
    assert_eq!(region.read_obj::<u16>(at).unwrap(), 0x1234);
    region.store(7u32, at, Ordering::SeqCst).unwrap();
    assert_eq!(region.load::<u32>(at, Ordering::SeqCst).unwrap(), 7);

    let no_host = |r: Result<()>| matches!(r, Err(Error::HostAddressNotAvailable));
    assert!(no_host(region.get_slice(at, 1).map(|_| ())));
    assert!(no_host(region.as_volatile_slice().map(|_| ())));
    assert!(no_host(region.get_host_address(at).map(|_| ())));
    assert!(no_host(
        memory.get_host_address(GuestAddress(0x118)).map(|_| ())
    ));
    assert!(no_host(
        memory.get_slice(GuestAddress(0x118), 1).map(|_| ())
    ));
    assert!(no_host(
        memory.read_obj::<u8>(GuestAddress(0x118)).map(|_| ())
    ));
    assert!(no_host(memory.write_obj(1u8, GuestAddress(0x118))));
    assert!(no_host(memory.store(
        1u8,
        GuestAddress(0x118),
        Ordering::SeqCst
    )));
    assert!(no_host(
        memory
            .read_volatile_from(GuestAddress(0x118), &mut [1u8].as_slice(), 1)
            .map(|_| ())
    ));
    assert!(!GuestMemory::check_range(
        &memory,
        GuestAddress(0x118),
        1,
        Permissions::No
    ));
    let mut slices = GuestMemoryBackend::get_slices(&memory, GuestAddress(0x118), 16);
    assert!(no_host(slices.next().unwrap().map(|_| ())));
    assert!(slices.next().is_none());
    assert_eq!(region.read_obj::<u32>(at).unwrap(), 7);

    // The provided methods.
    assert_eq!(region.allowed_access(), Permissions::ReadWrite);
    assert!(region.file_offset().is_none());
    #[cfg(target_os = "linux")]
    assert_eq!(region.is_hugetlbfs(), None);
}

#[test]
fn region_address_methods_end_with_region() {
    let region = registers(u64::MAX - 0xf, 0x10);
    assert_eq!(region.last_addr(), GuestAddress(u64::MAX));
    let at = |offset| Some(MemoryRegionAddress(offset));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX)), at(0xf));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX - 0xf)), at(0));
    assert_eq!(region.to_region_addr(GuestAddress(u64::MAX - 0x10)), None);
    assert_eq!(region.to_region_addr(GuestAddress(0)), None);
    assert_eq!(region.check_address(MemoryRegionAddress(0xf)), at(0xf));
    assert_eq!(region.check_address(MemoryRegionAddress(0x10)), None);
    assert!(region.address_in_range(MemoryRegionAddress(0xf)));
    assert!(!region.address_in_range(MemoryRegionAddress(u64::MAX)));
    assert_eq!(region.checked_offset(MemoryRegionAddress(8), 7), at(0xf));
    assert_eq!(region.checked_offset(MemoryRegionAddress(8), 8), None);
    assert_eq!(
        region.checked_offset(MemoryRegionAddress(8), usize::MAX),
        None
    );

    let memory = Collection::from_regions(vec![region]).unwrap();
    assert_eq!(memory.last_addr(), GuestAddress(u64::MAX));
    assert!(memory.address_in_range(GuestAddress(u64::MAX)));
    assert!(memory.find_region(GuestAddress(0)).is_none());
    assert_eq!(memory.checked_offset(GuestAddress(u64::MAX), 1), None);
    assert_eq!(
        memory.checked_offset(GuestAddress(u64::MAX - 0xf), 0xf),
        Some(GuestAddress(u64::MAX))
    );
}

#[test]
fn empty_region_contains_no_address() {
    let region = registers(0x1000, 0);
    assert_eq!(region.to_region_addr(GuestAddress(0x1000)), None);
    assert_eq!(region.to_region_addr(GuestAddress(0)), None);
    assert_eq!(region.last_addr(), GuestAddress(0x1000));
    assert_eq!(region.check_address(MemoryRegionAddress(0)), None);
    assert_eq!(region.checked_offset(MemoryRegionAddress(0), 0), None);
    let memory = collection(&[(0xff0, 0x10), (0x1000, 0), (0x1001, 0x10)]).unwrap();
    assert!(memory.find_region(GuestAddress(0x1000)).is_none());
    assert_eq!(
        memory.find_region(GuestAddress(0xfff)).unwrap().start,
        0xff0
    );
    assert_eq!(
        memory.find_region(GuestAddress(0x1001)).unwrap().start,
        0x1001
    );
    assert!(!GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0xff0),
        0x11
    ));
    assert!(GuestMemoryBackend::check_range(
        &memory,
        GuestAddress(0x1000),
        0
    ));
    assert!(memory.read_obj::<u8>(GuestAddress(0x1000)).is_err());
}

/// A region that is not mapped in this process.
#[derive(Debug)]
struct Unmapped;

impl GuestMemoryRegion for Unmapped {
    type B = ();
    fn len(&self) -> GuestUsize {
        0x1000
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(0)
    }
    fn bitmap(&self) {}
}

impl GuestMemoryRegionBytes for Unmapped {}

#[test]
fn access_to_unmapped_region_reports_missing_host_address_before_bounds() {
    let mut bytes = [0; 4];
    for addr in [0, 0xffe, 0x1000, u64::MAX] {
        let error = Unmapped
            .read(&mut bytes, MemoryRegionAddress(addr))
            .unwrap_err();
        assert!(
            matches!(error, Error::HostAddressNotAvailable),
            "{addr:#x}: {error}"
        );
        let error = Unmapped
            .write_obj(1u8, MemoryRegionAddress(addr))
            .unwrap_err();
        assert!(
            matches!(error, Error::HostAddressNotAvailable),
            "{addr:#x}: {error}"
        );
    }
}
