//! The accesses of devices to regions and the holes between them. The guest chooses addresses and
//! lengths, so all values occur.

mod input;

use std::io;
use std::sync::atomic::Ordering;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, GuestMemoryResult, Permissions,
};

use self::input::{At, Base, Descriptor, Input, Len, Step};
use crate::model::{last_of, permissions, Memory, PAGE};
use crate::stream::{ModelStream, Stream, StreamPlan};

/// The maximum length of a buffer.
const LONGEST: usize = 0x3fff;
/// The maximum number of operations of an input.
const MOST_STEPS: usize = 64;
const MOST_REGIONS: usize = 6;

type Guest = GuestMemoryMmap<AtomicBitmap>;

/// Runs an input.
pub fn run(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(input) = Input::arbitrary(&mut bytes) else {
        return;
    };
    if let Some(mut pair) = Pair::new(&input) {
        for (number, step) in input.steps.iter().take(MOST_STEPS).enumerate() {
            pair.fill = number as u8;
            pair.step(step);
        }
        pair.compare();
    }
}

/// The library and the model.
struct Pair {
    guest: Guest,
    model: Memory,
    /// A counter that makes the bytes of each step unique.
    fill: u8,
}

/// The kind of an error, without the region and the path of the access.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Kind {
    NoMemory(u64),
    LeavesRegion,
    Overflow,
    Partial(usize, usize),
    Io(io::ErrorKind),
    Other(String),
}

fn kind(error: GuestMemoryError) -> Kind {
    match error {
        GuestMemoryError::InvalidGuestAddress(at) => Kind::NoMemory(at.0),
        GuestMemoryError::InvalidBackendAddress => Kind::LeavesRegion,
        GuestMemoryError::GuestAddressOverflow => Kind::Overflow,
        GuestMemoryError::PartialBuffer {
            expected,
            completed,
        } => Kind::Partial(expected, completed),
        GuestMemoryError::IOError(error) => Kind::Io(error.kind()),
        other => Kind::Other(format!("{other:?}")),
    }
}

fn result<T>(outcome: GuestMemoryResult<T>) -> Result<T, Kind> {
    outcome.map_err(kind)
}

impl Pair {
    fn new(input: &Input) -> Option<Self> {
        let lens = input.regions.iter().take(MOST_REGIONS);
        let plan: Vec<(u64, u64)> = lens
            // Half of the regions are adjacent to the previous one.
            .map(|(hole, len)| {
                (
                    u64::from(hole.saturating_sub(0x8000)),
                    u64::from(len % 0x2800) + 1,
                )
            })
            .collect();
        let total: u64 = plan.iter().map(|(hole, len)| hole + len).sum();
        let mut next = match input.base {
            Base::Zero => 0,
            Base::Small(base) => u64::from(base),
            Base::Below4Gib(base) => (1 << 32) - u64::from(base),
            // The highest position that `GuestRegionMmap` accepts.
            Base::Top => u64::MAX - total,
        };
        let mut regions = Vec::new();
        for (hole, len) in plan {
            regions.push((next + hole, len));
            next += hole + len;
        }
        let ranges: Vec<_> = regions
            .iter()
            .map(|(at, len)| (GuestAddress(*at), *len as usize))
            .collect();
        let guest = match (Guest::from_ranges(&ranges), ranges.is_empty()) {
            (Ok(guest), false) => guest,
            (Err(_), true) => Guest::new(),
            (Ok(_), true) => panic!("a memory without regions was made"),
            (Err(error), false) => panic!("{regions:x?}: {error}"),
        };
        Some(Pair {
            guest,
            model: Memory::new(regions),
            fill: 0,
        })
    }

    fn addr(&self, at: At) -> u64 {
        match at {
            At::Anywhere(at) => at,
            At::Top(by) => u64::MAX - u64::from(by),
            At::Near { region, end, by } => {
                let number = usize::from(region) % self.model.regions.len().max(1);
                let (start, len) = self.model.regions.get(number).copied().unwrap_or((0, 0));
                let edge = if end { start.wrapping_add(len) } else { start };
                edge.wrapping_add_signed(i64::from(by))
            }
        }
    }

    fn count(&self, len: Len) -> usize {
        match len {
            Len::Short(len) => usize::from(len),
            Len::Medium(len) => usize::from(len) & LONGEST,
            Len::Huge(less) => usize::MAX - usize::from(less),
        }
    }

    fn data(&self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i as u8).wrapping_mul(31) ^ self.fill.wrapping_add(1))
            .collect()
    }

    /// Returns the expected result of `write` and `read`.
    fn moved(&self, addr: u64, count: usize) -> Result<usize, Kind> {
        match self.model.reachable(addr, count) {
            0 if count != 0 => Err(Kind::NoMemory(addr)),
            moved => Ok(moved),
        }
    }

    /// Returns the expected result of `write_slice` and `read_slice`.
    fn moved_all(&self, addr: u64, count: usize) -> Result<(), Kind> {
        match self.moved(addr, count)? {
            moved if moved == count => Ok(()),
            moved => Err(Kind::Partial(count, moved)),
        }
    }

    /// Returns the expected result of `load` and `store`.
    fn moved_at_once(&self, addr: u64, width: usize) -> Result<(), Kind> {
        let (number, offset) = self.model.find(addr).ok_or(Kind::NoMemory(addr))?;
        let fits = self.model.regions[number].1 - offset >= width as u64;
        // A mapping starts on a page, so the offset in the region decides the alignment.
        if fits && offset % width as u64 == 0 {
            Ok(())
        } else {
            Err(Kind::LeavesRegion)
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(at, len) => {
                let addr = self.addr(at);
                let data = self.data(self.count(len).min(LONGEST));
                let outcome = result(self.guest.write(&data, GuestAddress(addr)));
                self.wrote(addr, &data, outcome);
            }
            Step::WriteSlice(at, len) => {
                let addr = self.addr(at);
                let data = self.data(self.count(len).min(LONGEST));
                let outcome = result(self.guest.write_slice(&data, GuestAddress(addr)));
                self.wrote_all(addr, &data, outcome);
            }
            Step::Read(at, len) => {
                let (addr, count) = (self.addr(at), self.count(len).min(LONGEST));
                let mut buf = vec![0xee; count];
                let outcome = result(self.guest.read(&mut buf, GuestAddress(addr)));
                assert_eq!(outcome, self.moved(addr, count));
                self.has_read(addr, &buf);
            }
            Step::ReadSlice(at, len) => {
                let (addr, count) = (self.addr(at), self.count(len).min(LONGEST));
                let mut buf = vec![0xee; count];
                let outcome = result(self.guest.read_slice(&mut buf, GuestAddress(addr)));
                assert_eq!(outcome, self.moved_all(addr, count));
                self.has_read(addr, &buf);
            }
            Step::WriteObj(at, width) => match width % 5 {
                0 => self.write_obj::<u8>(at),
                1 => self.write_obj::<u16>(at),
                2 => self.write_obj::<u32>(at),
                3 => self.write_obj::<u64>(at),
                _ => self.write_obj::<u128>(at),
            },
            Step::ReadObj(at, width) => match width % 5 {
                0 => self.read_obj::<u8>(at),
                1 => self.read_obj::<u16>(at),
                2 => self.read_obj::<u32>(at),
                3 => self.read_obj::<u64>(at),
                _ => self.read_obj::<u128>(at),
            },
            Step::Store(at, width) => match width % 4 {
                0 => self.store::<u8>(at),
                1 => self.store::<u16>(at),
                2 => self.store::<u32>(at),
                _ => self.store::<u64>(at),
            },
            Step::Load(at, width) => match width % 4 {
                0 => self.load::<u8>(at),
                1 => self.load::<u16>(at),
                2 => self.load::<u32>(at),
                _ => self.load::<u64>(at),
            },
            Step::ReadFrom(at, len, plan) => self.read_from(self.addr(at), self.count(len), plan),
            Step::ReadExactFrom(at, len, plan) => {
                self.read_exact_from(self.addr(at), self.count(len), plan)
            }
            Step::WriteTo(at, len, plan) => self.write_to(self.addr(at), self.count(len), plan),
            Step::WriteAllTo(at, len, plan) => {
                self.write_all_to(self.addr(at), self.count(len), plan)
            }
            Step::Check(at, len, access) => {
                let (addr, count) = (self.addr(at), self.count(len));
                let expected = self.model.reachable(addr, count) == count;
                let at = GuestAddress(addr);
                assert_eq!(
                    GuestMemory::check_range(&self.guest, at, count, permissions(access)),
                    expected
                );
                assert_eq!(
                    GuestMemoryBackend::check_range(&self.guest, at, count),
                    expected
                );
            }
            Step::Slices(at, len, access) => {
                self.slices(self.addr(at), self.count(len), permissions(access))
            }
            Step::Offset(at, len) => {
                let (addr, count) = (self.addr(at), self.count(len));
                let to = addr.checked_add(count as u64);
                let expected = to.filter(|to| self.model.find(*to).is_some());
                let outcome = self.guest.checked_offset(GuestAddress(addr), count);
                assert_eq!(outcome.map(|at| at.0), expected);
                let found = self.guest.to_region_addr(GuestAddress(addr));
                let found = found.map(|(region, offset)| (region.start_addr().0, offset.0));
                let expected = self.model.find(addr);
                assert_eq!(
                    found,
                    expected.map(|(number, offset)| (self.model.regions[number].0, offset))
                );
            }
            Step::Chain(ref descriptors) => self.chain(descriptors),
            Step::Harvest => self.harvest(),
        }
    }

    fn wrote(&mut self, addr: u64, data: &[u8], outcome: Result<usize, Kind>) {
        assert_eq!(outcome, self.moved(addr, data.len()));
        let moved = self.model.reachable(addr, data.len());
        self.model.write(addr, &data[..moved]);
    }

    fn wrote_all(&mut self, addr: u64, data: &[u8], outcome: Result<(), Kind>) {
        assert_eq!(outcome, self.moved_all(addr, data.len()));
        let moved = self.model.reachable(addr, data.len());
        self.model.write(addr, &data[..moved]);
    }

    /// Checks the bytes that a read left in a buffer, regardless of its result.
    fn has_read(&self, addr: u64, buf: &[u8]) {
        let moved = self.model.reachable(addr, buf.len());
        assert_eq!(buf[..moved], self.model.read(addr, moved));
        assert!(buf[moved..].iter().all(|byte| *byte == 0xee));
    }

    fn write_obj<T: ByteValued>(&mut self, at: At) {
        let (addr, mut value) = (self.addr(at), T::zeroed());
        let data = self.data(size_of::<T>());
        value.as_mut_slice().copy_from_slice(&data);
        let outcome = result(self.guest.write_obj(value, GuestAddress(addr)));
        self.wrote_all(addr, &data, outcome);
    }

    fn read_obj<T: ByteValued>(&self, at: At) {
        let addr = self.addr(at);
        let outcome = result(self.guest.read_obj::<T>(GuestAddress(addr)));
        let expected = self.moved_all(addr, size_of::<T>());
        let bytes = outcome.map(|value| value.as_slice().to_vec());
        assert_eq!(
            bytes,
            expected.map(|()| self.model.read(addr, size_of::<T>()))
        );
    }

    fn store<T: AtomicAccess + ByteValued>(&mut self, at: At) {
        let (addr, mut value) = (self.addr(at), T::zeroed());
        let data = self.data(size_of::<T>());
        value.as_mut_slice().copy_from_slice(&data);
        let outcome = result(
            self.guest
                .store(value, GuestAddress(addr), Ordering::Release),
        );
        assert_eq!(outcome, self.moved_at_once(addr, size_of::<T>()));
        if outcome.is_ok() {
            self.model.write(addr, &data);
        }
    }

    fn load<T: AtomicAccess + ByteValued>(&self, at: At) {
        let addr = self.addr(at);
        let outcome = result(self.guest.load::<T>(GuestAddress(addr), Ordering::Acquire));
        let bytes = outcome.map(|value| value.as_slice().to_vec());
        let expected = self.moved_at_once(addr, size_of::<T>());
        assert_eq!(
            bytes,
            expected.map(|()| self.model.read(addr, size_of::<T>()))
        );
    }

    /// Returns the number of bytes that one call moves between a range and a stream of the model.
    fn one_call(&self, addr: u64, count: usize, stream: &mut ModelStream) -> Result<usize, Kind> {
        let segments = self.model.segments(addr, count);
        if segments.is_empty() && count != 0 {
            return Err(Kind::NoMemory(addr));
        }
        let mut done = 0;
        for (_, len) in segments {
            match stream.transfer(len) {
                Some(moved) => {
                    done += moved;
                    if moved < len {
                        break;
                    }
                }
                None if done == 0 => return Err(Kind::Io(io::ErrorKind::Other)),
                None => break,
            }
        }
        Ok(done)
    }

    /// Returns the number of bytes that are moved when each segment is retried until it is
    /// complete.
    fn whole_segments(
        &self,
        addr: u64,
        count: usize,
        stream: &mut ModelStream,
        nothing: Option<io::ErrorKind>,
    ) -> Result<usize, Kind> {
        let segments = self.model.segments(addr, count);
        if segments.is_empty() && count != 0 {
            return Err(Kind::NoMemory(addr));
        }
        let mut done = 0;
        for (_, len) in segments {
            let mut left = len;
            while left != 0 {
                let error = match stream.transfer(left) {
                    None => io::ErrorKind::Other,
                    Some(0) => match nothing {
                        Some(error) => error,
                        None => return Ok(done),
                    },
                    Some(moved) => {
                        (done, left) = (done + moved, left - moved);
                        continue;
                    }
                };
                return if done == 0 {
                    Err(Kind::Io(error))
                } else {
                    Ok(done)
                };
            }
        }
        Ok(done)
    }

    fn read_from(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut source = Stream::source(plan, self.data(usize::from(plan.has)));
        let at = GuestAddress(addr);
        let outcome = result(self.guest.read_volatile_from(at, &mut source, count));
        let expected = self.one_call(addr, count, &mut ModelStream::of(plan));
        assert_eq!(outcome, expected);
        self.model
            .write(addr, &source.data[..expected.unwrap_or(0)]);
    }

    fn read_exact_from(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut source = Stream::source(plan, self.data(usize::from(plan.has)));
        let at = GuestAddress(addr);
        let outcome = result(self.guest.read_exact_volatile_from(at, &mut source, count));
        let moved = self.whole_segments(addr, count, &mut ModelStream::of(plan), None);
        assert_eq!(outcome, all_of(count, &moved));
        self.model.write(addr, &source.data[..moved.unwrap_or(0)]);
    }

    fn write_to(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut target = Stream::target(plan);
        let at = GuestAddress(addr);
        let outcome = result(self.guest.write_volatile_to(at, &mut target, count));
        let moved = self.written(addr, count, plan);
        assert_eq!(outcome, moved);
        assert_eq!(target.data, self.model.read(addr, moved.unwrap_or(0)));
    }

    fn write_all_to(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut target = Stream::target(plan);
        let at = GuestAddress(addr);
        let outcome = result(self.guest.write_all_volatile_to(at, &mut target, count));
        let moved = self.written(addr, count, plan);
        assert_eq!(outcome, all_of(count, &moved));
        assert_eq!(target.data, self.model.read(addr, moved.unwrap_or(0)));
    }

    /// Returns the expected result of a write into a stream.
    fn written(&self, addr: u64, count: usize, plan: StreamPlan) -> Result<usize, Kind> {
        self.whole_segments(
            addr,
            count,
            &mut ModelStream::of(plan),
            Some(io::ErrorKind::WriteZero),
        )
    }

    fn slices(&mut self, addr: u64, count: usize, access: Permissions) {
        let segments = self.model.segments(addr, count);
        let mut done = 0;
        let mut expected = segments.iter();
        let mut failed = false;
        let mut written = Vec::new();
        for slice in
            GuestMemory::get_slices(&self.guest, GuestAddress(addr), count, access).unwrap()
        {
            assert!(!failed, "a slice after an error");
            match slice {
                Ok(slice) => {
                    let (at, len) = *expected.next().expect("a slice too many");
                    assert_eq!(slice.len(), len);
                    let mut bytes = vec![0; len];
                    slice.copy_to(&mut bytes);
                    assert_eq!(bytes, self.model.read(at, len));
                    if access.has_write() {
                        let data = vec![self.fill; len];
                        slice.copy_from(&data);
                        written.push((at, data));
                    }
                    done += len;
                }
                Err(error) => {
                    failed = true;
                    let at = addr.checked_add(done as u64);
                    assert_eq!(kind(error), at.map_or(Kind::Overflow, Kind::NoMemory));
                }
            }
        }
        assert_eq!(expected.next(), None);
        assert_eq!(failed, done != count);
        assert_eq!(done == count && last_of(addr, count).is_none(), count == 0);
        for (at, data) in written {
            self.model.write(at, &data);
        }
    }

    /// Acts as a device that gathers the readable descriptors, and scatters their bytes over the
    /// writable ones.
    fn chain(&mut self, descriptors: &[Descriptor]) {
        let descriptors = &descriptors[..descriptors.len().min(8)];
        let mut gathered = Vec::new();
        for part in descriptors.iter().filter(|part| !part.device_writes) {
            let (addr, count) = (self.addr(part.at), usize::from(part.len) & LONGEST);
            let before = gathered.len();
            let outcome = result(self.guest.write_volatile_to(
                GuestAddress(addr),
                &mut gathered,
                count,
            ));
            assert_eq!(outcome, self.moved(addr, count));
            assert_eq!(
                gathered[before..],
                self.model.read(addr, gathered.len() - before)
            );
        }
        let mut rest = &gathered[..];
        for part in descriptors.iter().filter(|part| part.device_writes) {
            let addr = self.addr(part.at);
            let count = (usize::from(part.len) & LONGEST).min(rest.len());
            let data = &rest[..count];
            let outcome = result(self.guest.read_volatile_from(
                GuestAddress(addr),
                &mut rest,
                count,
            ));
            self.wrote(addr, data, outcome);
        }
    }

    /// Checks that a harvest returns exactly the marks, and leaves none.
    fn harvest(&mut self) {
        for (number, region) in self.guest.iter().enumerate() {
            let words = GuestBitmap::get_and_reset(region);
            let pages = (0u64..).take(words.len() * 64);
            let marked: Vec<u64> = pages
                .filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0)
                .collect();
            let expected = self
                .model
                .dirty
                .iter()
                .filter(|(region, _)| *region == number);
            let expected: Vec<u64> = expected.map(|(_, page)| *page).collect();
            assert_eq!(marked, expected, "dirty pages of region {number}");
            assert!((0..region.len())
                .step_by(PAGE as usize)
                .all(|at| !region.bitmap().dirty_at(at as usize)));
        }
        self.model.dirty.clear();
    }

    /// Checks all bytes of the memory.
    fn compare(&mut self) {
        self.harvest();
        for (start, len) in self.model.regions.clone() {
            let mut buf = vec![0; len as usize];
            self.guest
                .read_slice(&mut buf, GuestAddress(start))
                .unwrap();
            assert_eq!(
                buf,
                self.model.read(start, buf.len()),
                "region at {start:#x}"
            );
        }
    }
}

/// Harvests the bitmap of a region; `GuestMemoryRegion::bitmap` returns only slices of it.
trait GuestBitmap {
    fn get_and_reset(&self) -> Vec<u64>;
}

impl GuestBitmap for vm_memory::GuestRegionMmap<AtomicBitmap> {
    fn get_and_reset(&self) -> Vec<u64> {
        vm_memory::MmapRegion::bitmap(self).get_and_reset()
    }
}

/// Returns the expected result of a method that moves all bytes or fails.
fn all_of(count: usize, moved: &Result<usize, Kind>) -> Result<(), Kind> {
    match moved {
        Ok(moved) if *moved == count => Ok(()),
        Ok(moved) => Err(Kind::Partial(count, *moved)),
        Err(error) => Err(error.clone()),
    }
}
