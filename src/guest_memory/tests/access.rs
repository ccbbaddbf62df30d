//! One access to the memory and to its model.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::model::Model;
use super::stream::Stream;
use super::*;
use crate::value::{AtomicAccess, ByteValued};

/// The method that an access calls.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
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

pub(super) const KINDS: [Kind; 13] = [
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

/// The results of the memory and of the model, as text.
pub(super) type Results = std::result::Result<(String, String), TestCaseError>;

/// An access to the memory and to its model.
pub(super) struct Access<'a> {
    pub(super) memory: &'a Memory,
    pub(super) model: &'a mut Model,
    pub(super) addr: u64,
    pub(super) count: usize,
    /// The bytes that a write takes, at least 24.
    pub(super) data: Vec<u8>,
    pub(super) stream: Stream,
}

impl Access<'_> {
    pub(super) fn run(mut self, kind: Kind) -> Results {
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
    /// them.
    ///
    /// Returns the number of these bytes, or the expected error.
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

/// Returns the result as text. For an `io::Error`, it has only the kind and the number.
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
