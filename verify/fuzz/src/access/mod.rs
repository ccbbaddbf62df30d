//! The accesses of devices to regions and the holes between them. The guest chooses addresses and
//! lengths, so all values occur.

mod expected;
mod input;
mod region;

use std::sync::atomic::Ordering;

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend,
    GuestRegionCollection, GuestRegionMmap, Permissions,
};

use self::expected::{all_of, kind, result, Kind};
use self::input::{At, Base, Descriptor, Input, Len, Step};
use self::region::{Region, TopRegion};
use crate::model::{last_of, permissions, Memory, PAGE};
use crate::stream::{ModelStream, Stream, StreamPlan};

/// The maximum length of a buffer.
const LONGEST: usize = 0x3fff;
/// The maximum number of operations of an input.
const MOST_STEPS: usize = 64;
const MOST_REGIONS: usize = 6;

/// Runs an input.
pub fn run(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(input) = Input::arbitrary(&mut bytes) else {
        return;
    };
    match input.base {
        Base::Top => Pair::<TopRegion>::new(&input).run(&input.steps),
        _ => Pair::<GuestRegionMmap<AtomicBitmap>>::new(&input).run(&input.steps),
    }
}

/// The library and the model.
struct Pair<R> {
    guest: GuestRegionCollection<R>,
    model: Memory,
    /// A counter that makes the bytes of each step unique.
    fill: u8,
}

/// Returns the start and the length of each region.
fn layout(input: &Input) -> Vec<(u64, u64)> {
    let plan = input.regions.iter().take(MOST_REGIONS).map(|(hole, len)| {
        // Half of the regions are adjacent to the previous one.
        let hole = u64::from(hole.saturating_sub(0x8000));
        (hole, u64::from(len % 0x2800) + 1)
    });
    let total: u64 = plan.clone().map(|(hole, len)| hole + len).sum();
    let first = match input.base {
        Base::Zero => 0,
        Base::Small(base) => u64::from(base),
        Base::Below4Gib(base) => (1 << 32) - u64::from(base),
        Base::Top => 0u64.wrapping_sub(total),
    };
    let place = |next: &mut u64, (hole, len): (u64, u64)| {
        let start = *next + hole;
        // The last region may end at 2^64.
        *next = start.wrapping_add(len);
        Some((start, len))
    };
    plan.scan(first, place).collect()
}

impl<R: Region> Pair<R> {
    fn new(input: &Input) -> Self {
        let regions = layout(input);
        let made = regions.iter().map(|(at, len)| R::new(*at, *len as usize));
        let guest = match GuestRegionCollection::from_regions(made.collect()) {
            Ok(_) if regions.is_empty() => panic!("a memory without regions was created"),
            Ok(guest) => guest,
            Err(_) if regions.is_empty() => GuestRegionCollection::new(),
            Err(error) => panic!("{regions:x?}: {error}"),
        };
        Pair {
            guest,
            model: Memory::new(regions),
            fill: 0,
        }
    }

    fn run(mut self, steps: &[Step]) {
        for (number, step) in steps.iter().take(MOST_STEPS).enumerate() {
            self.fill = number as u8;
            self.step(step);
        }
        self.compare();
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

    fn buffer_len(&self, len: Len) -> usize {
        self.count(len).min(LONGEST)
    }

    fn data(&self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i as u8).wrapping_mul(31) ^ self.fill.wrapping_add(1))
            .collect()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(at, len) => self.write(self.addr(at), self.buffer_len(len)),
            Step::WriteSlice(at, len) => self.write_slice(self.addr(at), self.buffer_len(len)),
            Step::Read(at, len) => self.read(self.addr(at), self.buffer_len(len)),
            Step::ReadSlice(at, len) => self.read_slice(self.addr(at), self.buffer_len(len)),
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
                self.check(self.addr(at), self.count(len), permissions(access))
            }
            Step::Slices(at, len, access) => {
                self.slices(self.addr(at), self.count(len), permissions(access))
            }
            Step::Offset(at, len) => self.offset(self.addr(at), self.count(len)),
            Step::Chain(ref descriptors) => self.chain(descriptors),
            Step::Harvest => self.harvest(),
        }
    }

    fn write(&mut self, addr: u64, count: usize) {
        let data = self.data(count);
        let outcome = result(self.guest.write(&data, GuestAddress(addr)));
        self.wrote(addr, &data, outcome);
    }

    fn write_slice(&mut self, addr: u64, count: usize) {
        let data = self.data(count);
        let outcome = result(self.guest.write_slice(&data, GuestAddress(addr)));
        self.wrote_all(addr, &data, outcome);
    }

    fn read(&self, addr: u64, count: usize) {
        let mut buf = vec![0xee; count];
        let outcome = result(self.guest.read(&mut buf, GuestAddress(addr)));
        assert_eq!(outcome, self.model.moved(addr, count));
        self.has_read(addr, &buf);
    }

    fn read_slice(&self, addr: u64, count: usize) {
        let mut buf = vec![0xee; count];
        let outcome = result(self.guest.read_slice(&mut buf, GuestAddress(addr)));
        assert_eq!(outcome, self.model.moved_all(addr, count));
        self.has_read(addr, &buf);
    }

    fn check(&self, addr: u64, count: usize, access: Permissions) {
        let expected = self.model.reachable(addr, count) == count;
        let at = GuestAddress(addr);
        let outcome = GuestMemory::check_range(&self.guest, at, count, access);
        assert_eq!(outcome, expected);
        let outcome = GuestMemoryBackend::check_range(&self.guest, at, count);
        assert_eq!(outcome, expected);
    }

    fn offset(&self, addr: u64, count: usize) {
        let to = addr.checked_add(count as u64);
        let expected = to.filter(|to| self.model.find(*to).is_some());
        let outcome = self.guest.checked_offset(GuestAddress(addr), count);
        assert_eq!(outcome.map(|at| at.0), expected);
        let found = self.guest.to_region_addr(GuestAddress(addr));
        let found = found.map(|(region, offset)| (region.start_addr().0, offset.0));
        let expected = self.model.find(addr);
        let expected = expected.map(|(number, offset)| (self.model.regions[number].0, offset));
        assert_eq!(found, expected);
    }

    fn wrote(&mut self, addr: u64, data: &[u8], outcome: Result<usize, Kind>) {
        assert_eq!(outcome, self.model.moved(addr, data.len()));
        let moved = self.model.reachable(addr, data.len());
        self.model.write(addr, &data[..moved]);
    }

    fn wrote_all(&mut self, addr: u64, data: &[u8], outcome: Result<(), Kind>) {
        assert_eq!(outcome, self.model.moved_all(addr, data.len()));
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
        let expected = self.model.moved_all(addr, size_of::<T>());
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
        assert_eq!(outcome, self.model.moved_at_once(addr, size_of::<T>()));
        if outcome.is_ok() {
            self.model.write(addr, &data);
        }
    }

    fn load<T: AtomicAccess + ByteValued>(&self, at: At) {
        let addr = self.addr(at);
        let outcome = result(self.guest.load::<T>(GuestAddress(addr), Ordering::Acquire));
        let bytes = outcome.map(|value| value.as_slice().to_vec());
        let expected = self.model.moved_at_once(addr, size_of::<T>());
        assert_eq!(
            bytes,
            expected.map(|()| self.model.read(addr, size_of::<T>()))
        );
    }

    fn read_from(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut source = Stream::source(plan, self.data(usize::from(plan.has)));
        let at = GuestAddress(addr);
        let outcome = result(self.guest.read_volatile_from(at, &mut source, count));
        let expected = self.model.one_call(addr, count, &mut ModelStream::of(plan));
        assert_eq!(outcome, expected);
        self.model
            .write(addr, &source.data[..expected.unwrap_or(0)]);
    }

    fn read_exact_from(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut source = Stream::source(plan, self.data(usize::from(plan.has)));
        let at = GuestAddress(addr);
        let outcome = result(self.guest.read_exact_volatile_from(at, &mut source, count));
        let moved = self
            .model
            .whole_segments(addr, count, &mut ModelStream::of(plan), None);
        assert_eq!(outcome, all_of(count, &moved));
        self.model.write(addr, &source.data[..moved.unwrap_or(0)]);
    }

    fn write_to(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut target = Stream::target(plan);
        let at = GuestAddress(addr);
        let outcome = result(self.guest.write_volatile_to(at, &mut target, count));
        let moved = self.model.written(addr, count, plan);
        assert_eq!(outcome, moved);
        assert_eq!(target.data, self.model.read(addr, moved.unwrap_or(0)));
    }

    fn write_all_to(&mut self, addr: u64, count: usize, plan: StreamPlan) {
        let mut target = Stream::target(plan);
        let at = GuestAddress(addr);
        let outcome = result(self.guest.write_all_volatile_to(at, &mut target, count));
        let moved = self.model.written(addr, count, plan);
        assert_eq!(outcome, all_of(count, &moved));
        assert_eq!(target.data, self.model.read(addr, moved.unwrap_or(0)));
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
                    let (at, len) = *expected.next().expect("an unexpected slice");
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
            assert_eq!(outcome, self.model.moved(addr, count));
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
            let words = region.harvest();
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

#[test]
fn accesses_that_reach_or_cross_2_64_match_the_model() {
    let plan = StreamPlan {
        has: 64,
        at_a_time: 7,
        fails: false,
        interrupted: true,
    };
    // Two regions; the last ends at 2^64.
    let regions = vec![(0, 0x1fff), (0, 0x0fff)];
    let mut steps = vec![];
    for by in 0..20 {
        let at = At::Top(by);
        for len in [1, 2, 8, 16, 21] {
            let len = Len::Short(len);
            steps.push(Step::Write(at, len));
            steps.push(Step::ReadSlice(at, len));
            steps.push(Step::ReadExactFrom(at, len, plan));
            steps.push(Step::WriteTo(at, len, plan));
            steps.push(Step::Slices(at, len, 3));
            steps.push(Step::Check(at, len, 3));
            steps.push(Step::Offset(at, len));
        }
        steps.push(Step::WriteObj(at, 3));
        steps.push(Step::ReadObj(at, 4));
        steps.push(Step::Store(at, 3));
    }
    let base = Base::Top;
    let input = Input {
        base,
        regions,
        steps: vec![],
    };
    let pair = Pair::<TopRegion>::new(&input);
    assert_eq!(pair.guest.last_addr(), GuestAddress(u64::MAX));
    for steps in steps.chunks(MOST_STEPS) {
        Pair::<TopRegion>::new(&input).run(steps);
    }
}
