//! Regions that get their slices from a mapping.

use super::*;
use crate::bitmap::BitmapSlice;
use crate::mmap::MmapRegion;
use crate::volatile_memory::{Error as VolatileMemoryError, VolatileMemory};

/// RAM that returns slices of `given` bytes, or of the requested length if that is `None`.
#[derive(Debug)]
struct Ram {
    start: u64,
    len: u64,
    given: Option<usize>,
    allowed: Permissions,
    mapping: MmapRegion,
}

fn ram(start: u64, len: u64, given: Option<usize>) -> Ram {
    Ram {
        start,
        len,
        given,
        allowed: Permissions::ReadWrite,
        mapping: MmapRegion::new(0x1000).unwrap(),
    }
}

impl GuestMemoryRegion for Ram {
    type B = ();
    fn len(&self) -> GuestUsize {
        self.len
    }
    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }
    fn bitmap(&self) {}
    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>> {
        if offset
            .0
            .checked_add(count as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(Error::InvalidBackendAddress);
        }
        Ok(VolatileMemory::get_slice(
            &self.mapping,
            offset.0 as usize,
            self.given.unwrap_or(count),
        )?)
    }
    fn allowed_access(&self) -> Permissions {
        self.allowed
    }
}
impl GuestMemoryRegionBytes for Ram {}

fn whole(region: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; region.len as usize];
    VolatileMemory::as_volatile_slice(&region.mapping)
        .read_slice(&mut bytes, 0)
        .unwrap();
    bytes
}

/// An access must not loop, must not shift the bytes that follow, and must count correctly.
#[test]
fn access_to_region_with_slices_of_wrong_length_returns_error() {
    for given in [0, 1, 7, 9, 0x100] {
        let memory = GuestRegionCollection::from_regions(vec![
            ram(0, 8, None),
            ram(8, 8, Some(given)),
            ram(16, 8, None),
        ])
        .unwrap();
        let lengths: Vec<_> = GuestMemoryBackend::get_slices(&memory, GuestAddress(4), 20)
            .map(|s| s.map(|s| s.len()).ok())
            .collect();
        assert_eq!(lengths, [Some(4), None]);
        assert_eq!(memory.write(&[1; 20], GuestAddress(4)).unwrap(), 4);
        assert_eq!(memory.read(&mut [0; 20], GuestAddress(4)).unwrap(), 4);
        assert_eq!(
            memory
                .read_volatile_from(GuestAddress(4), &mut [2u8; 20].as_slice(), 20)
                .unwrap(),
            4
        );
        let results = [
            memory.write_slice(&[3; 8], GuestAddress(8)),
            memory.read_slice(&mut [0; 8], GuestAddress(8)),
            memory.read_obj::<u64>(GuestAddress(8)).map(|_| ()),
            memory.write_obj(1u64, GuestAddress(8)),
            memory.store(1u64, GuestAddress(8), Ordering::SeqCst),
            memory.read_exact_volatile_from(GuestAddress(8), &mut [3u8; 8].as_slice(), 8),
            memory.write_all_volatile_to(GuestAddress(8), &mut vec![], 8),
        ];
        assert!(
            !GuestMemory::check_range(&memory, GuestAddress(8), 8, Permissions::Read),
            "{given}"
        );
        let regions: Vec<_> = memory.iter().collect();
        assert_eq!(whole(regions[0]), [0, 0, 0, 0, 2, 2, 2, 2]);
        assert_eq!(whole(regions[1]), [0; 8]);
        assert_eq!(whole(regions[2]), [0; 8]);
        for (i, result) in results.into_iter().enumerate() {
            let error = result.unwrap_err();
            let counts = matches!(error, Error::PartialBuffer { completed: 1.., .. });
            assert!(
                !counts,
                "result {i} for slices of {given} bytes counts bytes that were not moved: {error:?}"
            );
        }
    }
}

#[test]
fn allowed_access_of_region_is_enforced() {
    for allowed in [
        Permissions::No,
        Permissions::Read,
        Permissions::Write,
        Permissions::ReadWrite,
    ] {
        let region = Ram {
            allowed,
            ..ram(0x10, 0x10, None)
        };
        let at = MemoryRegionAddress(0);
        assert_eq!(region.write_obj(1u8, at).is_ok(), allowed.has_write());
        assert_eq!(
            region.read_obj::<u8>(at).is_ok(),
            allowed.allow(Permissions::Read)
        );
        let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
        for access in [
            Permissions::No,
            Permissions::Read,
            Permissions::Write,
            Permissions::ReadWrite,
        ] {
            let granted = allowed.allow(access);
            let at = GuestAddress(0x18);
            assert_eq!(GuestMemory::check_range(&memory, at, 8, access), granted);
            assert_eq!(memory.contiguous_slice(at, 8, access).is_some(), granted);
            let first = GuestMemory::get_slices(&memory, at, 8, access)
                .unwrap()
                .next()
                .unwrap();
            assert_eq!(first.is_ok(), granted);
        }
        // These methods do not check permissions.
        assert!(GuestMemoryBackend::check_range(
            &memory,
            GuestAddress(0x18),
            8
        ));
        assert!(memory.get_slice(GuestAddress(0x18), 8).is_ok());
    }
}

#[test]
fn bytes_of_region_end_with_region() {
    let region = ram(0x1000, 0x10, None);
    assert_eq!(region.write(&[1; 8], MemoryRegionAddress(0xc)).unwrap(), 4);
    assert_eq!(
        region.read(&mut [0; 8], MemoryRegionAddress(0xc)).unwrap(),
        4
    );
    let past_end = |r: Result<()>| matches!(r, Err(Error::InvalidBackendAddress));
    assert!(past_end(
        region.write(&[1], MemoryRegionAddress(0x10)).map(|_| ())
    ));
    assert!(past_end(
        region
            .read_obj::<u8>(MemoryRegionAddress(u64::MAX))
            .map(|_| ())
    ));
    assert!(past_end(
        region
            .load::<u32>(MemoryRegionAddress(2), Ordering::SeqCst)
            .map(|_| ())
    ));
    let partial = region
        .write_obj(1u64, MemoryRegionAddress(0xc))
        .unwrap_err();
    assert!(matches!(
        partial,
        Error::PartialBuffer {
            expected: 8,
            completed: 4
        }
    ));
    let mut source: &[u8] = &[7; 3];
    assert_eq!(
        region
            .read_volatile_from(MemoryRegionAddress(0), &mut source, 9)
            .unwrap(),
        3
    );
    let mut target = vec![];
    region
        .write_all_volatile_to(MemoryRegionAddress(1), &mut target, 4)
        .unwrap();
    assert_eq!(target, [7, 7, 0, 0]);
}

#[test]
fn access_with_empty_buffer_to_region_without_permission_succeeds() {
    let region = Ram {
        allowed: Permissions::No,
        ..ram(0, 0x10, None)
    };
    for at in [0, 0x10, 0x11, u64::MAX].map(MemoryRegionAddress) {
        assert_eq!(region.write(&[], at).unwrap(), 0);
        assert_eq!(region.read(&mut [], at).unwrap(), 0);
        region.write_slice(&[], at).unwrap();
        region.read_slice(&mut [], at).unwrap();
    }
    let at = MemoryRegionAddress(0);
    let mut source: &[u8] = &[7];
    assert_eq!(region.read_volatile_from(at, &mut source, 0).unwrap(), 0);
    region.read_exact_volatile_from(at, &mut source, 0).unwrap();
    let mut target = vec![];
    assert_eq!(region.write_volatile_to(at, &mut target, 0).unwrap(), 0);
    region.write_all_volatile_to(at, &mut target, 0).unwrap();
    assert_eq!((source, target), ([7].as_slice(), vec![]));
}

/// A stream that claims to move more bytes than it was given.
struct Excessive;

impl ReadVolatile for Excessive {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        _: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        Ok(1_000_000)
    }
}

impl WriteVolatile for Excessive {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        _: &VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        Ok(1_000_000)
    }
}

#[test]
fn stream_with_excessive_count_counts_bytes_of_slice_region_and_memory() {
    let region = ram(0, 0x20, None);
    let slice = region.as_volatile_slice().unwrap();
    let at = MemoryRegionAddress(0x10);
    for (count, moved) in [(8, 8), (0x20, 0x10)] {
        assert_eq!(
            slice
                .read_volatile_from(0x10, &mut Excessive, count)
                .unwrap(),
            moved
        );
        assert_eq!(
            slice
                .write_volatile_to(0x10, &mut Excessive, count)
                .unwrap(),
            moved
        );
        assert_eq!(
            region
                .read_volatile_from(at, &mut Excessive, count)
                .unwrap(),
            moved
        );
        assert_eq!(
            region.write_volatile_to(at, &mut Excessive, count).unwrap(),
            moved
        );
    }
    let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
    let at = GuestAddress(0x10);
    for (count, moved) in [(8, 8), (0x20, 0x10)] {
        assert_eq!(
            memory
                .read_volatile_from(at, &mut Excessive, count)
                .unwrap(),
            moved
        );
        assert_eq!(
            memory.write_volatile_to(at, &mut Excessive, count).unwrap(),
            moved
        );
    }
}
