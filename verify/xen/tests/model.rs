//! Random accesses to grants that are mapped at each access match a vector of bytes.

use std::ops::Range;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use verify_xen::double::Double;
use verify_xen::environment::{mapped, Access, Environment, Host, PAGE};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestRegionMmap, MmapRange, MmapRegion, VolatileSlice,
};

verify_xen::interpose!();

/// The pages of the region.
const PAGES: usize = 6;

/// The reference of its first page.
const FIRST: u32 = 40;

/// The guest address of the first byte.
const START: u64 = 1 << 63 | (FIRST as u64) << 12;

#[derive(Clone, Debug)]
enum Step {
    /// Grants a page, or takes it back.
    Grant(usize, Option<bool>),
    /// `read` or `read_slice`.
    Read(Range<usize>, bool),
    /// `write` or `write_slice`.
    Write(Range<usize>, bool, u8),
    /// `read_obj` of this number of bytes, or `load` if they are aligned.
    Get(usize, u8, bool),
    /// `write_obj` of this number of bytes, or `store` if they are aligned.
    Put(usize, u8, bool, u64),
    /// `read_volatile_from`, from a slice.
    From(Range<usize>, u8),
    /// `write_volatile_to`, to a vector.
    To(Range<usize>),
    /// `fill_with_byte` of a slice.
    Fill(Range<usize>, u8),
    /// `copy_to_volatile_slice` between two parts.
    Copy(usize, usize, usize),
}

fn ranges() -> impl Strategy<Value = Range<usize>> {
    let lens = prop_oneof![0..40usize, PAGE - 20..PAGE + 20, 0..3 * PAGE];
    let starts = prop_oneof![
        0..PAGES * PAGE,
        (1..PAGES, 0..40usize).prop_map(|(page, at)| page * PAGE + at - 20)
    ];
    (starts, lens).prop_map(|(start, len)| start..(start + len).min(PAGES * PAGE))
}

fn steps() -> impl Strategy<Value = Step> {
    let grant = prop::option::weighted(0.8, prop::bool::weighted(0.8));
    let at = || ranges().prop_map(|range| range.start.min(PAGES * PAGE - 8));
    let size = prop_oneof![Just(1u8), Just(2), Just(4), Just(8)];
    prop_oneof![
        (0..PAGES, grant).prop_map(|(page, grant)| Step::Grant(page, grant)),
        (ranges(), any::<bool>()).prop_map(|(range, all)| Step::Read(range, all)),
        (ranges(), any::<bool>(), any::<u8>())
            .prop_map(|(range, all, seed)| Step::Write(range, all, seed)),
        (at(), size.clone(), any::<bool>())
            .prop_map(|(at, size, atomic)| Step::Get(at, size, atomic)),
        (at(), size, any::<bool>(), any::<u64>())
            .prop_map(|(at, size, atomic, value)| Step::Put(at, size, atomic, value)),
        (ranges(), any::<u8>()).prop_map(|(range, seed)| Step::From(range, seed)),
        ranges().prop_map(Step::To),
        (ranges(), any::<u8>()).prop_map(|(range, byte)| Step::Fill(range, byte)),
        (ranges(), 0..PAGES * PAGE).prop_map(|(from, to)| {
            let count = from.len().min(PAGES * PAGE - to);
            Step::Copy(from.start, to, count)
        }),
    ]
}

/// The memory, and its expected contents.
struct Model {
    env: Double,
    memory: GuestMemoryMmap,
    bytes: Vec<u8>,
    grants: [Option<bool>; PAGES],
}

/// Returns bytes that begin with a seed.
fn bytes_from(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add(at as u8)).collect()
}

/// Returns whether an error is the one of a page that cannot be mapped.
fn is_einval(error: &GuestMemoryError) -> bool {
    match error {
        GuestMemoryError::IOError(error) => error.raw_os_error() == Some(libc::EINVAL),
        _ => false,
    }
}

impl Model {
    fn new(host: Host) -> Self {
        let mut env = Double::new(host);
        let device = env.gntdev().unwrap();
        let file = FileOffset::new(device, 0);
        let start = GuestAddress(START);
        let range = MmapRange::new(PAGES * PAGE, Some(file), start, 10, env.domain());
        let region = MmapRegion::from_range(range).unwrap();
        let region = GuestRegionMmap::new(region, start).unwrap();
        Self {
            memory: GuestMemoryMmap::from_regions(vec![region]).unwrap(),
            bytes: vec![0; PAGES * PAGE],
            grants: [None; PAGES],
            env,
        }
    }

    /// Returns the number of bytes of a range before the first page that refuses the access.
    fn permitted(&self, range: &Range<usize>, writing: bool) -> usize {
        let may = |at: &usize| self.grants[at / PAGE].is_some_and(|grant| grant || !writing);
        range.clone().take_while(may).count()
    }

    fn address(at: usize) -> GuestAddress {
        GuestAddress(START + at as u64)
    }

    /// Checks the result of an access that moves as much as it can.
    fn check_count(
        &self,
        result: Result<usize, GuestMemoryError>,
        range: &Range<usize>,
        writing: bool,
    ) -> usize {
        let permitted = self.permitted(range, writing);
        match result {
            Ok(count) => assert_eq!(count, permitted, "{range:x?}"),
            Err(error) => assert!(
                is_einval(&error) && permitted == 0,
                "{error:?}, {permitted}"
            ),
        }
        permitted
    }

    /// Checks the result of an access that moves all or fails. Returns whether it moved all.
    fn check_all<T>(
        &self,
        result: &Result<T, GuestMemoryError>,
        range: &Range<usize>,
        writing: bool,
    ) -> bool {
        let permitted = self.permitted(range, writing);
        match result {
            Ok(_) => assert_eq!(permitted, range.len(), "{range:x?}"),
            Err(GuestMemoryError::PartialBuffer {
                completed,
                expected,
            }) => {
                assert_eq!(
                    (*completed, *expected),
                    (permitted, range.len()),
                    "{range:x?}"
                );
                assert!(permitted < range.len());
            }
            Err(error) => assert!(is_einval(error) && permitted < range.len(), "{error:?}"),
        }
        result.is_ok()
    }

    /// Updates the model after an access that failed: each byte of the range is old or new.
    fn take_over(&mut self, range: &Range<usize>, new: &[u8]) {
        let mut seen = vec![0; range.len()];
        self.env.read(0, range.start, &mut seen);
        for ((old, new), seen) in self.bytes[range.clone()].iter_mut().zip(new).zip(seen) {
            assert!(seen == *old || seen == *new);
            *old = seen;
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Grant(page, grant) => self.grant(page, grant),
            Step::Read(range, all) => self.read(&range, all),
            Step::Write(range, all, seed) => self.write(&range, all, seed),
            Step::Get(at, size, atomic) => self.get(at, size, atomic),
            Step::Put(at, size, atomic, value) => self.put(at, size, atomic, value),
            Step::From(range, seed) => {
                let new = bytes_from(seed, range.len());
                let at = Self::address(range.start);
                let result = self
                    .memory
                    .read_volatile_from(at, &mut &new[..], range.len());
                if range.is_empty() {
                    return;
                }
                let count = self.check_count(result, &range, true);
                self.bytes[range.start..range.start + count].copy_from_slice(&new[..count]);
            }
            Step::To(range) => {
                let mut sink = Vec::new();
                let at = Self::address(range.start);
                let result = self.memory.write_volatile_to(at, &mut sink, range.len());
                if range.is_empty() {
                    return;
                }
                let count = self.check_count(result, &range, false);
                assert_eq!(sink, self.bytes[range.start..range.start + count]);
            }
            Step::Fill(range, byte) => {
                let Ok(slice) = self
                    .memory
                    .get_slice(Self::address(range.start), range.len())
                else {
                    return assert!(range.is_empty());
                };
                let result = slice.fill_with_byte(byte).map_err(GuestMemoryError::from);
                let new = vec![byte; range.len()];
                if self.check_all(&result, &range, true) {
                    self.bytes[range].copy_from_slice(&new);
                } else {
                    self.take_over(&range, &new);
                }
            }
            Step::Copy(from, to, count) => self.copy(from, to, count),
        }
    }

    fn grant(&mut self, page: usize, grant: Option<bool>) {
        let reference = FIRST + page as u32;
        self.grants[page] = grant;
        match grant {
            None => self.env.revoke(reference),
            Some(true) => self.env.grant(reference, page, Access::ReadWrite),
            Some(false) => self.env.grant(reference, page, Access::ReadOnly),
        }
    }

    fn read(&mut self, range: &Range<usize>, all: bool) {
        let at = Self::address(range.start);
        let mut buf = vec![0; range.len()];
        let count = if all {
            let result = self.memory.read_slice(&mut buf, at);
            if range.is_empty() || !self.check_all(&result, range, false) {
                return;
            }
            range.len()
        } else {
            let result = self.memory.read(&mut buf, at);
            if range.is_empty() {
                return;
            }
            self.check_count(result, range, false)
        };
        assert_eq!(buf[..count], self.bytes[range.start..range.start + count]);
    }

    fn write(&mut self, range: &Range<usize>, all: bool, seed: u8) {
        let at = Self::address(range.start);
        let new = bytes_from(seed, range.len());
        if all {
            let result = self.memory.write_slice(&new, at);
            if range.is_empty() {
                return;
            }
            if !self.check_all(&result, range, true) {
                self.take_over(range, &new);
                return;
            }
            self.bytes[range.clone()].copy_from_slice(&new);
        } else {
            let result = self.memory.write(&new, at);
            if range.is_empty() {
                return;
            }
            let count = self.check_count(result, range, true);
            self.bytes[range.start..range.start + count].copy_from_slice(&new[..count]);
        }
    }

    fn get(&mut self, at: usize, size: u8, atomic: bool) {
        let len = usize::from(size);
        let range = at..at + len;
        let address = Self::address(at);
        let atomic = atomic && at.is_multiple_of(len);
        let order = Ordering::Relaxed;
        let result = match (size, atomic) {
            (1, true) => self.memory.load::<u8>(address, order).map(u64::from),
            (2, true) => self.memory.load::<u16>(address, order).map(u64::from),
            (4, true) => self.memory.load::<u32>(address, order).map(u64::from),
            (_, true) => self.memory.load::<u64>(address, order),
            (1, _) => self.memory.read_obj::<u8>(address).map(u64::from),
            (2, _) => self.memory.read_obj::<u16>(address).map(u64::from),
            (4, _) => self.memory.read_obj::<u32>(address).map(u64::from),
            _ => self.memory.read_obj::<u64>(address),
        };
        if self.check_all(&result, &range, false) {
            assert_eq!(result.unwrap().to_le_bytes()[..len], self.bytes[range]);
        }
    }

    fn put(&mut self, at: usize, size: u8, atomic: bool, value: u64) {
        let len = usize::from(size);
        let range = at..at + len;
        let address = Self::address(at);
        let atomic = atomic && at.is_multiple_of(len);
        let order = Ordering::Relaxed;
        let result = match (size, atomic) {
            (1, true) => self.memory.store(value as u8, address, order),
            (2, true) => self.memory.store(value as u16, address, order),
            (4, true) => self.memory.store(value as u32, address, order),
            (_, true) => self.memory.store(value, address, order),
            (1, _) => self.memory.write_obj(value as u8, address),
            (2, _) => self.memory.write_obj(value as u16, address),
            (4, _) => self.memory.write_obj(value as u32, address),
            _ => self.memory.write_obj(value, address),
        };
        let new = &value.to_le_bytes()[..len];
        if self.check_all(&result, &range, true) {
            self.bytes[range].copy_from_slice(new);
        } else {
            self.take_over(&range, new);
        }
    }

    fn copy(&mut self, from: usize, to: usize, count: usize) {
        let slice = |at: usize| self.memory.get_slice(Self::address(at), count);
        let (Ok(source), Ok(sink)) = (slice(from), slice(to)) else {
            return assert_eq!(count, 0);
        };
        source.copy_to_volatile_slice(sink);
        let whole = self.permitted(&(from..from + count), false) == count
            && self.permitted(&(to..to + count), true) == count;
        let mut seen = vec![0; count];
        self.env.read(0, to, &mut seen);
        let new = self.bytes[from..from + count].to_vec();
        if whole {
            assert_eq!(seen, new);
        }
        // A copy that fails in part leaves each byte old or new, if the two do not overlap.
        if from.abs_diff(to) >= count {
            let old = &self.bytes[to..to + count];
            for ((old, new), seen) in old.iter().zip(&new).zip(&seen) {
                assert!(seen == old || seen == new);
            }
        }
        self.bytes[to..to + count].copy_from_slice(&seen);
    }

    fn check(&mut self) {
        let mut seen = vec![0; self.bytes.len()];
        self.env.read(0, 0, &mut seen);
        assert!(seen == self.bytes, "bytes outside the access changed");
        assert_eq!(mapped(&self.env), Vec::<u32>::new());
        assert_eq!(self.env.audit(), Vec::<String>::new());
    }
}

fn run(host: Host, steps: Vec<Step>) {
    let mut model = Model::new(host);
    for page in 0..PAGES {
        model.grant(page, Some(true));
    }
    for step in steps {
        model.step(step);
        model.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_accesses_on_paravirtualized_host_match_a_vector(
        steps in prop::collection::vec(steps(), 1..60)
    ) {
        run(Host::Pv, steps);
    }

    #[test]
    fn random_accesses_on_auto_translated_host_match_a_vector(
        steps in prop::collection::vec(steps(), 1..60)
    ) {
        run(Host::AutoTranslated, steps);
    }
}

/// The random accesses copy between granted pages only. This copy begins in ordinary memory.
#[test]
fn copy_from_plain_memory_reaches_the_domain() {
    let mut model = Model::new(Host::Pv);
    model.grant(0, Some(true));
    let mut local = [7u8; 16];
    let slice = model.memory.get_slice(Model::address(4), 16).unwrap();
    VolatileSlice::from(local.as_mut_slice()).copy_to_volatile_slice(slice);
    let mut seen = [0; 16];
    model.env.read(0, 4, &mut seen);
    assert_eq!(seen, local);
    assert_eq!(slice.len(), 16);
}
