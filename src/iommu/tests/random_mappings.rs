//! [`IommuMemory`] against a map of single IOVAs.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::RwLock;

use proptest::prelude::*;

use super::*;
use crate::bytes::Bytes;
use crate::guest_memory::{GuestMemory, GuestMemoryBackend};
use crate::region::GuestMemoryRegion;
use crate::VolatileMemory;

/// The method that writes.
#[derive(Clone, Copy, Debug)]
enum WriteMethod {
    Write,
    WriteSlice,
    ReadExactVolatileFrom,
    Store,
}

fn write_method() -> impl Strategy<Value = WriteMethod> {
    prop::sample::select(vec![
        WriteMethod::Write,
        WriteMethod::WriteSlice,
        WriteMethod::ReadExactVolatileFrom,
        WriteMethod::Store,
    ])
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop::sample::select(vec![No, Read, Write, ReadWrite, ReadWrite, ReadWrite])
}

/// A slow model: the translation of each IOVA, and the bytes of the physical memory.
struct Model {
    /// The guest address and the permissions of each mapped IOVA.
    table: BTreeMap<u64, (u64, Permissions)>,
    /// The start, length and protection of each region.
    regions: [(u64, usize, Permissions); 3],
    bytes: [u8; 64],
    /// The number of IOVAs that the bitmap tracks.
    tracked: usize,
}

/// A range of IOVAs.
#[derive(Clone, Copy)]
struct Range {
    iova: u64,
    count: usize,
}

impl Range {
    fn addr(self) -> GuestAddress {
        GuestAddress(self.iova)
    }

    fn iovas(self) -> impl Iterator<Item = u64> {
        (0..self.count as u64).map(move |i| self.iova + i)
    }
}

impl Model {
    /// Returns the start of the region and the guest address of an IOVA.
    fn place(&self, iova: u64, access: Permissions) -> Option<(u64, u64)> {
        let gpa = self.table.get(&iova)?.0;
        let contains = |&&(start, len, _): &&(u64, usize, Permissions)| {
            (start..start + len as u64).contains(&gpa)
        };
        let &(start, _, granted) = self.regions.iter().find(contains)?;
        (granted == ReadWrite || !access.has_write()).then_some((start, gpa))
    }

    /// Returns whether the IOMMU allows the access to the whole range, and the bitmap tracks it.
    fn translates(&self, range: Range, access: Permissions) -> bool {
        let allows = |iova| {
            self.table
                .get(&iova)
                .is_some_and(|entry| entry.1.allow(access))
        };
        range.iovas().all(allows)
            && (!access.has_write()
                || range.count == 0
                || range.iova as usize + range.count <= self.tracked)
    }

    /// Returns the number of bytes that an access moves: up to the first hole in physical memory.
    fn reach(&self, range: Range, access: Permissions) -> usize {
        if !self.translates(range, access) {
            return 0;
        }
        range
            .iovas()
            .map_while(|iova| self.place(iova, access))
            .count()
    }

    fn reaches_end(&self, range: Range, access: Permissions) -> bool {
        self.translates(range, access) && self.reach(range, access) == range.count
    }

    /// Returns the expected result of a short read or write.
    fn moved(&self, range: Range, access: Permissions) -> Option<usize> {
        let moved = self.reach(range, access);
        (moved != 0 || range.count == 0).then_some(moved)
    }

    /// Returns whether two bytes can be stored atomically: they are contiguous and aligned.
    fn stores_word(&self, iova: u64) -> bool {
        let word = Range { iova, count: 2 };
        let permissions = |iova| self.table.get(&iova).map(|entry| entry.1);
        let places: Vec<_> = word
            .iovas()
            .filter_map(|iova| self.place(iova, Write))
            .collect();
        self.translates(word, Write)
            // Adjacent mappings with different permissions are two segments.
            && permissions(iova) == permissions(iova + 1)
            && matches!(places[..], [(r, a), (s, b)] if r == s && b == a + 1 && (a - r) % 2 == 0)
    }

    fn read(&self, range: Range, count: usize) -> Vec<u8> {
        let byte = |iova| self.bytes[self.table[&iova].0 as usize];
        range.iovas().take(count).map(byte).collect()
    }

    fn write(&mut self, range: Range, data: &[u8]) {
        for (iova, byte) in range.iovas().zip(data) {
            self.bytes[self.table[&iova].0 as usize] = *byte;
        }
    }
}

type Checked<T = ()> = std::result::Result<T, TestCaseError>;

fn check_slices(memory: &Memory, model: &Model, range: Range, access: Permissions) -> Checked {
    let whole = model.reaches_end(range, access);
    prop_assert_eq!(memory.check_range(range.addr(), range.count, access), whole);
    match memory.get_slices(range.addr(), range.count, access) {
        Ok(mut slices) => {
            prop_assert!(model.translates(range, access));
            let good: usize = slices.by_ref().map_while(|s| s.ok().map(|s| s.len())).sum();
            prop_assert_eq!(good, model.reach(range, access));
            prop_assert!(slices.next().is_none());
        }
        Err(error) => prop_assert!(!model.translates(range, access), "{}", error),
    }
    if let Some(slice) = memory.contiguous_slice(range.addr(), range.count, access) {
        prop_assert!(whole && slice.len() == range.count);
    }
    Ok(())
}

fn check_read(memory: &Memory, model: &Model, range: Range) -> Checked {
    let mut buf = vec![0; range.count];
    let read = memory.read(&mut buf, range.addr()).ok();
    prop_assert_eq!(read, model.moved(range, Read));
    let reach = model.reach(range, Read);
    prop_assert_eq!(&buf[..reach], &*model.read(range, reach));
    Ok(())
}

/// Writes `data`, and returns the number of bytes that the memory must now have taken.
fn check_write(
    memory: &Memory,
    model: &Model,
    range: Range,
    method: WriteMethod,
    data: &[u8],
) -> Checked<usize> {
    let (addr, whole) = (range.addr(), model.reaches_end(range, Write));
    match method {
        WriteMethod::Write => {
            prop_assert_eq!(memory.write(data, addr).ok(), model.moved(range, Write));
        }
        WriteMethod::WriteSlice => {
            prop_assert_eq!(memory.write_slice(data, addr).is_ok(), whole);
        }
        WriteMethod::ReadExactVolatileFrom => {
            let mut source = data;
            let read = memory.read_exact_volatile_from(addr, &mut source, range.count);
            prop_assert_eq!(read.is_ok(), whole);
        }
        WriteMethod::Store => {
            let Some(word) = data.first_chunk() else {
                return Ok(0);
            };
            let stored = memory.store(u16::from_ne_bytes(*word), addr, Ordering::SeqCst);
            let expected = model.stores_word(range.iova);
            prop_assert_eq!(stored.is_ok(), expected);
            return Ok(if expected { 2 } else { 0 });
        }
    }
    Ok(model.reach(range, Write))
}

/// Compares the marks with the IOVAs of a write, and the bytes of all regions with the model.
fn check_memory(memory: &Memory, model: &Model, written: Range) -> Checked {
    let expected: Vec<_> = written.iovas().map(|iova| iova as usize).collect();
    prop_assert_eq!(marked(memory.bitmap()), expected);
    memory.bitmap().reset();
    for region in memory.get_backend().iter() {
        let start = region.start_addr().0 as usize;
        let mut now = vec![0; region.size()];
        let slice = VolatileMemory::as_volatile_slice(&**region);
        slice.read_slice(&mut now, 0).unwrap();
        prop_assert_eq!(&*now, &model.bytes[start..start + region.size()]);
        prop_assert!(marked((**region).bitmap()).is_empty());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn accesses_to_random_mappings_agree_with_model(
        mappings in prop::collection::vec((0u64..80, 0u64..70, 1usize..24, permissions()), 0..8),
        tracked in 40usize..100,
        read_only in any::<bool>(),
        accesses in prop::collection::vec(
            (0u64..100, 0usize..30, permissions(), write_method(), 3u8..7),
            1..20,
        ),
    ) {
        // Two adjacent regions, a hole, and a region that may be read-only.
        let granted = if read_only { Read } else { ReadWrite };
        let regions = [(0, 20, ReadWrite), (20, 10, ReadWrite), (36, 24, granted)];
        let iotlb = RwLock::<Iotlb>::default();
        let memory = IommuMemory::new(physical(&regions), iotlb, true, bytewise(tracked));
        map(memory.iommu(), &mappings);
        let mut model = Model { table: BTreeMap::new(), regions, bytes: [0; 64], tracked };
        for (iova, to, length, permissions) in mappings {
            let entries = (0..length as u64).map(|i| (iova + i, (to + i, permissions)));
            model.table.extend(entries);
        }
        for (iova, count, access, method, factor) in accesses {
            let range = Range { iova, count };
            check_slices(&memory, &model, range, access)?;
            check_read(&memory, &model, range)?;
            let data: Vec<u8> = range.iovas().map(|a| (a as u8).wrapping_mul(factor)).collect();
            let count = check_write(&memory, &model, range, method, &data)?;
            let written = Range { iova, count };
            model.write(written, &data);
            check_memory(&memory, &model, written)?;
        }
    }
}
