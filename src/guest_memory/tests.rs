//! Compares accesses to several regions, with and without holes, with a map of bytes.
#![cfg(feature = "backend-bitmap")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use crate::bitmap::AtomicBitmap;
use crate::bytes::Bytes;
use crate::io::{ReadVolatile, WriteVolatile};
use crate::mmap::MmapRegionBuilder;
use crate::region::GuestMemoryRegion;
use crate::value::{AtomicAccess, ByteValued};
use crate::volatile_memory::Error as VolatileError;
use crate::{GuestMemoryMmap, GuestRegionMmap};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const EIO: i32 = libc::EIO;
const EAGAIN: i32 = libc::EAGAIN;

/// Makes regions at these addresses, with one dirty bit per `page` bytes.
fn memory(places: &[(u64, usize)], page: usize) -> Memory {
    let regions = places.iter().map(|&(start, len)| {
        let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(page).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    });
    Memory::from_regions(regions.collect()).unwrap()
}

fn shown(value: impl core::fmt::Debug) -> String {
    format!("{value:?}")
}

fn system_error(number: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(number)
}

/// A source or sink of `left` bytes. It moves a few at a time, and may be interrupted before that.
/// Then it returns the error number `end`, or the end of the stream if that is 0.
#[derive(Clone, Debug)]
struct Stream {
    left: usize,
    steps: Vec<usize>,
    interrupts: Vec<bool>,
    end: i32,
    moved: Vec<u8>,
    calls: usize,
    reads: usize,
}

impl Stream {
    fn new(left: usize, steps: Vec<usize>, interrupts: Vec<bool>, end: i32) -> Self {
        Self {
            left,
            steps,
            interrupts,
            end,
            moved: vec![],
            calls: 0,
            reads: 0,
        }
    }

    /// Returns the number of bytes to move into `room`. Never interrupts twice in a row.
    fn next(&mut self, room: usize) -> std::result::Result<usize, VolatileError> {
        self.calls += 1;
        if self.calls % 2 == 1 && self.interrupts[self.calls / 2 % self.interrupts.len()] {
            return Err(VolatileError::IOError(ErrorKind::Interrupted.into()));
        }
        self.calls += self.calls % 2;
        match (self.left, self.end) {
            (0, 0) => Ok(0),
            (0, number) => Err(VolatileError::IOError(system_error(number))),
            _ => Ok(self.step(room)),
        }
    }

    /// Returns the number of bytes of a read that is not interrupted.
    fn step(&mut self, room: usize) -> usize {
        let step = self.steps[self.reads % self.steps.len()];
        self.reads += 1;
        let count = step.min(room).min(self.left);
        self.left -= count;
        count
    }

    /// Returns the next bytes of the stream.
    fn bytes(&self, count: usize) -> Vec<u8> {
        let from = self.moved.len();
        (from..from + count).map(|i| i as u8 ^ 0x5a).collect()
    }
}

impl ReadVolatile for Stream {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileError> {
        let count = self.next(buf.len())?;
        let bytes = self.bytes(count);
        buf.copy_from(&bytes);
        self.moved.extend(bytes);
        Ok(count)
    }
}

impl WriteVolatile for Stream {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        buf: &VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileError> {
        let mut bytes = vec![0; self.next(buf.len())?];
        buf.copy_to(&mut bytes);
        self.moved.extend(&bytes);
        Ok(bytes.len())
    }
}

/// A slow model: every byte of the memory, its regions, and the dirty bytes.
struct Model {
    bytes: BTreeMap<u64, u8>,
    regions: Vec<(u64, usize)>,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn new(regions: Vec<(u64, usize)>) -> Self {
        let bytes = regions
            .iter()
            .flat_map(|&(start, len)| (0..len as u64).map(move |i| (start + i, 0)));
        Self {
            bytes: bytes.collect(),
            regions,
            dirty: BTreeSet::new(),
        }
    }

    /// Returns the bytes at `addr` before the first hole.
    fn reach(&self, addr: u64, count: usize) -> Vec<u8> {
        (0..count as u64)
            .map_while(|i| self.bytes.get(&addr.checked_add(i)?).copied())
            .collect()
    }

    /// Returns the number of bytes that an access moves, or the expected error.
    fn movable(&self, addr: u64, count: usize) -> Result<usize> {
        match self.reach(addr, count).len() {
            0 if count != 0 => Err(Error::InvalidGuestAddress(GuestAddress(addr))),
            n => Ok(n),
        }
    }

    /// Returns the lengths of the segments of a range before the first hole.
    fn segments(&self, addr: u64, count: usize) -> Vec<usize> {
        let (mut segments, mut last) = (vec![], None);
        for i in 0..self.reach(addr, count).len() as u64 {
            let region = self.region_of(addr + i);
            if region != last {
                segments.push(0);
            }
            *segments.last_mut().unwrap() += 1;
            last = region;
        }
        segments
    }

    fn region_of(&self, addr: u64) -> Option<(u64, usize)> {
        self.regions
            .iter()
            .copied()
            .find(|&(start, len)| (start..start + len as u64).contains(&addr))
    }

    fn write(&mut self, addr: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            *self.bytes.get_mut(&(addr + i as u64)).unwrap() = *byte;
            self.dirty.insert(addr + i as u64);
        }
    }

    /// Returns the expected result of an atomic access. Host memory is aligned to pages.
    fn atomic(&self, addr: u64, size: usize) -> Result<()> {
        let (start, len) = self
            .region_of(addr)
            .ok_or(Error::InvalidGuestAddress(GuestAddress(addr)))?;
        let offset = (addr - start) as usize;
        if offset + size > len || !offset.is_multiple_of(size) {
            return Err(Error::InvalidBackendAddress);
        }
        Ok(())
    }

    /// Returns the bytes that a transfer moves that stops at the first short read.
    fn transfer(&self, addr: u64, count: usize, stream: &mut Stream) -> Result<usize> {
        self.movable(addr, count)?;
        let mut done = 0;
        for segment in self.segments(addr, count) {
            if stream.left == 0 {
                return match stream.end {
                    number if number != 0 && done == 0 => Err(Error::IOError(system_error(number))),
                    _ => Ok(done),
                };
            }
            let moved = stream.step(segment);
            done += moved;
            if moved < segment {
                break;
            }
        }
        Ok(done)
    }

    /// Returns the bytes that an exact transfer moves, and its result.
    fn whole_transfer(
        &self,
        addr: u64,
        count: usize,
        stream: &Stream,
        reading: bool,
    ) -> (usize, Result<()>) {
        let done = match self.movable(addr, count) {
            Err(error) => return (0, Err(error)),
            Ok(movable) => movable.min(stream.left),
        };
        let result = match (done, stream.end) {
            _ if done == count => Ok(()),
            (0, 0) if !reading => Err(Error::IOError(ErrorKind::WriteZero.into())),
            (0, number @ 1..) => Err(Error::IOError(system_error(number))),
            _ => Err(Error::PartialBuffer {
                expected: count,
                completed: done,
            }),
        };
        (done, result)
    }
}

/// The method that an access calls.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Write,
    WriteSlice,
    Read,
    ReadSlice,
    WriteObj,
    ReadObj,
    Store,
    Load,
    ReadVolatileFrom,
    ReadExactVolatileFrom,
    WriteVolatileTo,
    WriteAllVolatileTo,
    Ranges,
}

const KINDS: [Kind; 13] = [
    Kind::Write,
    Kind::WriteSlice,
    Kind::Read,
    Kind::ReadSlice,
    Kind::WriteObj,
    Kind::ReadObj,
    Kind::Store,
    Kind::Load,
    Kind::ReadVolatileFrom,
    Kind::ReadExactVolatileFrom,
    Kind::WriteVolatileTo,
    Kind::WriteAllVolatileTo,
    Kind::Ranges,
];

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    /// The address, relative to 4 bytes before the first region.
    at: u64,
    count: usize,
    /// The seed of the bytes written.
    seed: u8,
    stream: Stream,
}

fn op() -> impl Strategy<Value = Op> {
    let stream = (
        0usize..60,
        prop::collection::vec(prop_oneof![1usize..8, Just(100)], 1..4),
        prop::collection::vec(any::<bool>(), 1..4),
        prop::sample::select(vec![0, EIO, EAGAIN]),
    )
        .prop_map(|(left, steps, interrupts, end)| Stream::new(left, steps, interrupts, end));
    let kind = prop::sample::select(KINDS.to_vec());
    (kind, 0u64..90, 0usize..70, any::<u8>(), stream).prop_map(|(kind, at, count, seed, stream)| {
        Op {
            kind,
            at,
            count,
            seed,
            stream,
        }
    })
}

/// Returns the result as text, of an `io::Error` only the kind and the number.
fn outcome<T: core::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::IOError(error)) => {
            format!("IOError({:?}, {:?})", error.kind(), error.raw_os_error())
        }
        other => shown(other),
    }
}

fn atomic_round<T: AtomicAccess>(
    memory: &Memory,
    addr: GuestAddress,
    data: Option<&[u8]>,
) -> Result<Vec<u8>> {
    match data {
        Some(data) => {
            let value = T::read_exact_from(data).unwrap();
            memory
                .store(value, addr, Ordering::Release)
                .map(|()| vec![])
        }
        None => memory
            .load::<T>(addr, Ordering::Acquire)
            .map(|v| v.as_slice().to_vec()),
    }
}

fn plain_round<T: ByteValued>(
    memory: &Memory,
    addr: GuestAddress,
    data: Option<&[u8]>,
) -> Result<Vec<u8>> {
    match data {
        Some(data) => memory
            .write_obj(T::read_exact_from(data).unwrap(), addr)
            .map(|()| vec![]),
        None => memory.read_obj::<T>(addr).map(|v| v.as_slice().to_vec()),
    }
}

/// Returns the number of bytes moved; 0 after an error.
fn moved(result: &Result<usize>) -> usize {
    *result.as_ref().unwrap_or(&0)
}

/// Returns the expected result of an access that must move `expected` bytes.
fn all(expected: usize, movable: Result<usize>) -> Result<()> {
    match movable? {
        completed if completed == expected => Ok(()),
        completed => Err(Error::PartialBuffer {
            expected,
            completed,
        }),
    }
}

/// The results of the memory and of the model, as text.
type Results = std::result::Result<(String, String), TestCaseError>;

/// An access to the memory and to its model.
struct Access<'a> {
    memory: &'a Memory,
    model: &'a mut Model,
    addr: u64,
    count: usize,
    /// The bytes that a write takes, at least 24.
    data: Vec<u8>,
    stream: Stream,
}

impl Access<'_> {
    fn run(mut self, kind: Kind) -> Results {
        match kind {
            Kind::Write => self.write(),
            Kind::WriteSlice => self.write_slice(),
            Kind::Read => self.read(),
            Kind::ReadSlice => self.read_slice(),
            Kind::WriteObj => self.write_obj(),
            Kind::ReadObj => self.read_obj(),
            Kind::Store => self.store(),
            Kind::Load => self.load(),
            Kind::ReadVolatileFrom => self.read_volatile_from(),
            Kind::ReadExactVolatileFrom => self.read_exact_volatile_from(),
            Kind::WriteVolatileTo => self.write_volatile_to(),
            Kind::WriteAllVolatileTo => self.write_all_volatile_to(),
            Kind::Ranges => self.ranges(),
        }
    }

    fn guest(&self) -> GuestAddress {
        GuestAddress(self.addr)
    }

    /// Writes the first bytes of `data` in the model, as far as an access of `count` bytes moves
    /// them. Returns that number, or the expected error.
    fn write_model(&mut self, count: usize) -> Result<usize> {
        let movable = self.model.movable(self.addr, count);
        self.model.write(self.addr, &self.data[..moved(&movable)]);
        movable
    }

    fn write(&mut self) -> Results {
        let want = self.write_model(self.count);
        let got = self.memory.write(&self.data[..self.count], self.guest());
        Ok((outcome(got), outcome(want)))
    }

    fn write_slice(&mut self) -> Results {
        let want = all(self.count, self.write_model(self.count));
        let got = self
            .memory
            .write_slice(&self.data[..self.count], self.guest());
        Ok((outcome(got), outcome(want)))
    }

    fn read(&self) -> Results {
        let want = self.model.movable(self.addr, self.count);
        let mut buf = vec![0x77; self.count];
        let got = self.memory.read(&mut buf, self.guest());
        self.check_buffer(&buf)?;
        Ok((outcome(got), outcome(want)))
    }

    fn read_slice(&self) -> Results {
        let want = all(self.count, self.model.movable(self.addr, self.count));
        let mut buf = vec![0x77; self.count];
        let got = self.memory.read_slice(&mut buf, self.guest());
        self.check_buffer(&buf)?;
        Ok((outcome(got), outcome(want)))
    }

    /// Checks that a read has filled `buf` up to the first hole, and not changed the rest.
    fn check_buffer(&self, buf: &[u8]) -> std::result::Result<(), TestCaseError> {
        let reach = self.model.reach(self.addr, self.count);
        let (read, rest) = buf.split_at(reach.len());
        prop_assert_eq!(read, &*reach);
        prop_assert!(rest.iter().all(|&b| b == 0x77));
        Ok(())
    }

    fn write_obj(&mut self) -> Results {
        let size = self.object_size();
        let want = all(size, self.write_model(size)).map(|()| Vec::<u8>::new());
        let got = self.object(size, Some(&self.data[..size]));
        Ok((outcome(got), outcome(want)))
    }

    fn read_obj(&self) -> Results {
        let size = self.object_size();
        let want = all(size, self.model.movable(self.addr, size))
            .map(|()| self.model.reach(self.addr, size));
        Ok((outcome(self.object(size, None)), outcome(want)))
    }

    fn object_size(&self) -> usize {
        [1, 2, 3, 4, 8, 16, 24][self.count % 7]
    }

    /// Writes `data` as an object of `size` bytes, or reads one.
    fn object(&self, size: usize, data: Option<&[u8]>) -> Result<Vec<u8>> {
        let (memory, guest) = (self.memory, self.guest());
        match size {
            1 => plain_round::<u8>(memory, guest, data),
            2 => plain_round::<u16>(memory, guest, data),
            3 => plain_round::<[u8; 3]>(memory, guest, data),
            4 => plain_round::<u32>(memory, guest, data),
            8 => plain_round::<u64>(memory, guest, data),
            16 => plain_round::<u128>(memory, guest, data),
            _ => plain_round::<[u64; 3]>(memory, guest, data),
        }
    }

    fn store(&mut self) -> Results {
        let size = self.word_size();
        let want = self
            .model
            .atomic(self.addr, size)
            .map(|()| Vec::<u8>::new());
        if want.is_ok() {
            self.model.write(self.addr, &self.data[..size]);
        }
        let got = self.word(size, Some(&self.data[..size]));
        Ok((outcome(got), outcome(want)))
    }

    fn load(&self) -> Results {
        let size = self.word_size();
        let want = self
            .model
            .atomic(self.addr, size)
            .map(|()| self.model.reach(self.addr, size));
        Ok((outcome(self.word(size, None)), outcome(want)))
    }

    fn word_size(&self) -> usize {
        1 << (self.count % 4)
    }

    /// Stores `data` as a word of `size` bytes, or loads one.
    fn word(&self, size: usize, data: Option<&[u8]>) -> Result<Vec<u8>> {
        let (memory, guest) = (self.memory, self.guest());
        match size {
            1 => atomic_round::<i8>(memory, guest, data),
            2 => atomic_round::<u16>(memory, guest, data),
            4 => atomic_round::<u32>(memory, guest, data),
            _ => atomic_round::<i64>(memory, guest, data),
        }
    }

    fn read_volatile_from(&mut self) -> Results {
        let mut expected = self.stream.clone();
        let want = self.model.transfer(self.addr, self.count, &mut expected);
        self.model.write(self.addr, &expected.bytes(moved(&want)));
        let (guest, stream) = (self.guest(), &mut self.stream);
        let got = self.memory.read_volatile_from(guest, stream, self.count);
        prop_assert_eq!((stream.left, stream.reads), (expected.left, expected.reads));
        Ok((outcome(got), outcome(want)))
    }

    fn read_exact_volatile_from(&mut self) -> Results {
        let given = self.stream.clone();
        let (moved, want) = self
            .model
            .whole_transfer(self.addr, self.count, &given, true);
        self.model.write(self.addr, &given.bytes(moved));
        let (guest, stream) = (self.guest(), &mut self.stream);
        let got = self
            .memory
            .read_exact_volatile_from(guest, stream, self.count);
        prop_assert_eq!(stream.left, given.left - moved);
        Ok((outcome(got), outcome(want)))
    }

    fn write_volatile_to(&mut self) -> Results {
        let given = self.stream.clone();
        // Each segment is written whole.
        let want = match self
            .model
            .whole_transfer(self.addr, self.count, &given, false)
        {
            (0, Err(error)) => Err(error),
            (moved, _) => Ok(moved),
        };
        let reach = self.model.reach(self.addr, self.count);
        let (guest, stream) = (self.guest(), &mut self.stream);
        let got = self.memory.write_volatile_to(guest, stream, self.count);
        prop_assert_eq!(&stream.moved, &reach[..given.left - stream.left]);
        Ok((outcome(got), outcome(want)))
    }

    fn write_all_volatile_to(&mut self) -> Results {
        let given = self.stream.clone();
        let (moved, want) = self
            .model
            .whole_transfer(self.addr, self.count, &given, false);
        let reach = self.model.reach(self.addr, self.count);
        let (guest, stream) = (self.guest(), &mut self.stream);
        let got = self.memory.write_all_volatile_to(guest, stream, self.count);
        prop_assert_eq!(&stream.moved, &reach[..moved]);
        prop_assert_eq!(stream.left, given.left - moved);
        Ok((outcome(got), outcome(want)))
    }

    /// Compares `check_range`, `find_region` and `get_slices`.
    fn ranges(&self) -> Results {
        let (memory, guest, count) = (self.memory, self.guest(), self.count);
        let whole = self.model.reach(self.addr, count).len() == count;
        let is_mapped = self.model.bytes.contains_key(&self.addr);
        let checked = GuestMemory::check_range(memory, guest, count, Permissions::ReadWrite);
        prop_assert_eq!(checked, whole);
        prop_assert_eq!(GuestMemoryBackend::check_range(memory, guest, count), whole);
        prop_assert_eq!(memory.address_in_range(guest), is_mapped);
        prop_assert_eq!(memory.find_region(guest).is_some(), is_mapped);
        let mut slices = GuestMemory::get_slices(memory, guest, count, Permissions::Read).unwrap();
        let lens = slices.by_ref().map_while(|s| s.ok().map(|s| s.len()));
        let lens: Vec<usize> = lens.collect();
        prop_assert!(slices.next().is_none());
        Ok((shown(lens), shown(self.model.segments(self.addr, count))))
    }
}

/// Compares the bytes and the dirty pages of all regions with the model, and clears the marks.
fn check_regions(
    memory: &Memory,
    model: &mut Model,
    page: usize,
    op: &Op,
) -> std::result::Result<(), TestCaseError> {
    let dirty = std::mem::take(&mut model.dirty);
    for region in memory.iter() {
        let start = region.start_addr().0;
        let mut bytes = vec![0; region.size()];
        let slice = region.as_volatile_slice().unwrap();
        slice.read_slice(&mut bytes, 0).unwrap();
        prop_assert_eq!(&bytes, &model.reach(start, bytes.len()), "{:?}", op);
        let bitmap = (**region).bitmap();
        let offsets: Vec<usize> = (0..bytes.len()).collect();
        for (number, of_page) in offsets.chunks(page).enumerate() {
            let expected = of_page.iter().any(|&i| dirty.contains(&(start + i as u64)));
            let marked = bitmap.is_bit_set(number);
            prop_assert_eq!(marked, expected, "page {} after {:?}", number, op);
        }
        bitmap.reset();
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Compares values, counts, errors, bytes and dirty bits, also at the end of the address space.
    #[test]
    fn accesses_agree_with_map_of_bytes(
        layout in prop::collection::vec((0u64..3, 1usize..24), 1..5),
        at_top in any::<bool>(),
        page in prop::sample::select(vec![1usize, 4, 7]),
        ops in prop::collection::vec(op(), 1..16),
    ) {
        let total: u64 = layout.iter().map(|&(gap, len)| gap + len as u64).sum();
        let first = if at_top { u64::MAX - total } else { 4 };
        let mut next = first;
        let mut places = vec![];
        for (gap, len) in layout {
            places.push((next + gap, len));
            next += gap + len as u64;
        }
        let memory = memory(&places, page);
        let mut model = Model::new(places);
        for op in ops {
            let addr = (first - 4).saturating_add(op.at);
            let byte = |i: usize| (i as u8).wrapping_mul(7) ^ op.seed;
            let access = Access {
                memory: &memory,
                model: &mut model,
                addr,
                count: op.count,
                data: (0..op.count.max(24)).map(byte).collect(),
                stream: op.stream.clone(),
            };
            let (got, want) = access.run(op.kind)?;
            prop_assert_eq!(got, want, "{:?} at {:#x}", op, addr);
            check_regions(&memory, &mut model, page, &op)?;
        }
    }
}

/// A third-party memory with only the required methods. It swaps pages of 16 bytes.
struct Swapped(Memory);

impl GuestMemory for Swapped {
    type PhysicalMemory = Memory;
    type Bitmap = AtomicBitmap;
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::get_slices(self, addr, count, access).is_ok_and(|mut s| s.all(|s| s.is_ok()))
    }
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>>> {
        if addr.0 == 0x666 {
            return Err(Error::HostAddressNotAvailable);
        }
        Ok(SwappedSlices {
            memory: &self.0,
            addr: addr.0,
            left: count,
        })
    }
}

struct SwappedSlices<'a> {
    memory: &'a Memory,
    addr: u64,
    left: usize,
}

impl<'a> Iterator for SwappedSlices<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, AtomicBitmap>>>;
    fn next(&mut self) -> Option<Self::Item> {
        let count = self.left.min(0x10 - (self.addr % 0x10) as usize);
        if count == 0 {
            return None;
        }
        let slice = self.memory.get_slice(GuestAddress(self.addr ^ 0x10), count);
        self.left = if slice.is_ok() { self.left - count } else { 0 };
        self.addr += count as u64;
        Some(slice)
    }
}
impl core::iter::FusedIterator for SwappedSlices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, BS<'a, AtomicBitmap>> for SwappedSlices<'a> {}

#[test]
fn bytes_of_memory_with_only_required_methods_work() {
    let memory = Swapped(memory(&[(0, 0x40)], 1));
    assert!(memory
        .contiguous_slice(GuestAddress(4), 8, Permissions::Read)
        .is_none());
    assert!(memory.physical_memory().is_none());
    let bytes: Vec<u8> = (0..0x40).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let mut all = [0; 0x40];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    assert_eq!(all, *bytes);
    memory.0.read_slice(&mut all, GuestAddress(0)).unwrap();
    assert_eq!(
        [all[0], all[0xf], all[0x10], all[0x3f]],
        [0x10, 0x1f, 0, 0x2f]
    );
    let (at, order) = (GuestAddress(4), Ordering::SeqCst);
    memory.store(u32::MAX, at, order).unwrap();
    assert_eq!(memory.load::<u32>(at, order).unwrap(), u32::MAX);
    assert_eq!(
        memory.0.read_obj::<u32>(GuestAddress(0x14)).unwrap(),
        u32::MAX
    );
    let across: [u8; 4] = memory.read_obj(GuestAddress(0xe)).unwrap();
    assert_eq!(across, [14, 15, 16, 17]);
    assert!(matches!(
        memory.load::<u64>(GuestAddress(0x666), Ordering::SeqCst),
        Err(Error::HostAddressNotAvailable)
    ));
    assert!(matches!(
        memory.write_obj(1u64, GuestAddress(0x3c)),
        Err(Error::PartialBuffer {
            expected: 8,
            completed: 4
        })
    ));
    assert!(memory.check_range(GuestAddress(0), 0x40, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(0), 0x41, Permissions::Read));
    let mut source: &[u8] = &[9; 0x20];
    let moved = memory.read_volatile_from(GuestAddress(8), &mut source, 0x20);
    assert_eq!(moved.unwrap(), 0x20);
    memory
        .write_all_volatile_to(GuestAddress(8), &mut Vec::new(), 0x20)
        .unwrap();
}

#[test]
fn read_volatile_from_with_excessive_count_counts_segment_length() {
    struct Excessive(usize);
    impl ReadVolatile for Excessive {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buf: &mut VolatileSlice<B>,
        ) -> std::result::Result<usize, VolatileError> {
            self.0 += 1;
            buf.copy_from(&[self.0 as u8; 8]);
            Ok(usize::MAX)
        }
    }
    let memory = memory(&[(0, 8), (8, 8)], 1);
    assert_eq!(
        memory
            .read_volatile_from(GuestAddress(4), &mut Excessive(0), 8)
            .unwrap(),
        8
    );
    memory
        .read_exact_volatile_from(GuestAddress(0), &mut Excessive(4), 16)
        .unwrap();
    assert_eq!(
        memory.read_obj::<[u8; 16]>(GuestAddress(0)).unwrap(),
        [[5; 8], [6; 8]].concat()[..]
    );
}

#[test]
fn error_from_volatile_memory_error_keeps_details() {
    let of = |error: VolatileError| shown(Error::from(error));
    let (addr, base, offset, size) = (1, 2, 3, 4);
    let (nelements, alignment, expected, completed) = (5, 6, 7, 8);
    assert_eq!(
        of(VolatileError::OutOfBounds { addr }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::Overflow { base, offset }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::TooBig { nelements, size }),
        "InvalidBackendAddress"
    );
    assert_eq!(
        of(VolatileError::Misaligned { addr, alignment }),
        "InvalidBackendAddress"
    );
    let partial = shown(Error::PartialBuffer {
        expected,
        completed,
    });
    assert_eq!(
        of(VolatileError::PartialBuffer {
            expected,
            completed
        }),
        partial
    );
    let system = Error::from(VolatileError::IOError(system_error(EIO)));
    assert!(matches!(system, Error::IOError(e) if e.raw_os_error() == Some(EIO)));
}
