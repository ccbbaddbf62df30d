//! One access to a slice, with the result that a model expects.

use super::*;

/// Evaluates `$body` with `$T` as a type of that size.
macro_rules! by_size {
    ($size:expr, [$($n:literal: $t:ty),*], $T:ident => $body:expr) => {
        match $size {
            $($n => { type $T = $t; $body })*
            size => panic!("no type of {size} bytes"),
        }
    };
}
macro_rules! plain_by_size {
    ($size:expr, $T:ident => $body:expr) => {
        by_size!($size, [1: u8, 2: u16, 3: [u8; 3], 4: u32, 8: u64, 16: u128, 24: [u64; 3]], $T => $body)
    };
}
macro_rules! atomic_by_size {
    ($size:expr, $T:ident => $body:expr) => {
        by_size!($size, [1: i8, 2: u16, 4: i32, 8: u64], $T => $body)
    };
}

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
    CopyFrom,
    CopyTo,
    Ref,
    ArrayCopyFrom,
    ArrayCopyTo,
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
    Kind::CopyFrom,
    Kind::CopyTo,
    Kind::Ref,
    Kind::ArrayCopyFrom,
    Kind::ArrayCopyTo,
];

#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) at: usize,
    /// The size of an object or element.
    pub(super) size: usize,
    /// The number of bytes, or of elements in host memory.
    pub(super) count: usize,
    /// The length of an array in the slice.
    pub(super) elements: usize,
}

/// The results of the slice and of the model, as text.
pub(super) struct Outcome {
    pub(super) got: String,
    pub(super) want: String,
    /// The number of bytes written to the slice.
    pub(super) moved: usize,
}

impl Outcome {
    fn of_read(got: impl Debug, want: impl Debug) -> Self {
        Self::of_write(got, want, 0)
    }

    fn of_write(got: impl Debug, want: impl Debug, moved: usize) -> Self {
        Self {
            got: shown(got),
            want: shown(want),
            moved,
        }
    }
}

/// An access to a slice of `len` bytes, whose expected result follows from `rest` and `payload`.
pub(super) struct Access<'a> {
    pub(super) slice: &'a VolatileSlice<'a, ByteMap>,
    /// The address of the slice.
    pub(super) host: usize,
    pub(super) len: usize,
    pub(super) op: Op,
    /// The bytes of the slice that start at the offset of the access.
    pub(super) rest: &'a [u8],
    /// The bytes that a write takes.
    pub(super) payload: &'a [u8],
}

impl Access<'_> {
    pub(super) fn run(&self) -> Outcome {
        match self.op.kind {
            Kind::Write => self.write(),
            Kind::WriteSlice => self.write_slice(),
            Kind::Read => self.read(),
            Kind::ReadSlice => self.read_slice(),
            Kind::WriteObj => self.write_obj(),
            Kind::ReadObj => self.read_obj(),
            Kind::Store => self.store(),
            Kind::Load => self.load(),
            Kind::CopyFrom | Kind::CopyTo if self.op.at > self.len => Outcome::of_read((), ()),
            Kind::CopyFrom => self.copy_from(),
            Kind::CopyTo => self.copy_to(),
            Kind::Ref => self.reference(),
            Kind::ArrayCopyFrom => self.array_copy_from(),
            Kind::ArrayCopyTo => self.array_copy_to(),
        }
    }

    /// Returns the number of bytes that an access to `count` bytes moves, or the expected error.
    fn movable(&self, count: usize) -> Result<usize> {
        movable(self.op.at, count, self.len)
    }

    fn write(&self) -> Outcome {
        let want = self.movable(self.op.count);
        let got = self.slice.write(&self.payload[..self.op.count], self.op.at);
        let moved = *want.as_ref().unwrap_or(&0);
        Outcome::of_write(got, want, moved)
    }

    fn write_slice(&self) -> Outcome {
        let Op { at, count, .. } = self.op;
        let want = self.movable(count);
        let moved = *want.as_ref().unwrap_or(&0);
        let got = self.slice.write_slice(&self.payload[..count], at);
        Outcome::of_write(got, all(count, want), moved)
    }

    fn read(&self) -> Outcome {
        let want = self.movable(self.op.count);
        let mut buf = vec![0xaa; self.op.count];
        let got = self.slice.read(&mut buf, self.op.at);
        let expected = self.buffer_after_read();
        Outcome::of_read((got, buf), (want, expected))
    }

    fn read_slice(&self) -> Outcome {
        let want = all(self.op.count, self.movable(self.op.count));
        let mut buf = vec![0xaa; self.op.count];
        let got = self.slice.read_slice(&mut buf, self.op.at);
        let expected = self.buffer_after_read();
        Outcome::of_read((got, buf), (want, expected))
    }

    /// Returns the contents of a buffer of bytes 0xaa after a read of all bytes that can be moved.
    fn buffer_after_read(&self) -> Vec<u8> {
        let mut buf = vec![0xaa; self.op.count];
        let count = self.movable(self.op.count).unwrap_or(0);
        buf[..count].copy_from_slice(&self.rest[..count]);
        buf
    }

    fn write_obj(&self) -> Outcome {
        let Op { at, size, .. } = self.op;
        let want = self.movable(size);
        let moved = *want.as_ref().unwrap_or(&0);
        let got = plain_by_size!(size, T => self.slice.write_obj(value_of::<T>(self.payload), at));
        Outcome::of_write(got, all(size, want), moved)
    }

    fn read_obj(&self) -> Outcome {
        let Op { at, size, .. } = self.op;
        let want = all(size, self.movable(size)).map(|()| self.rest[..size].to_vec());
        let got = plain_by_size!(size, T => self.slice.read_obj::<T>(at).map(|v| bytes_of(&[v])));
        Outcome::of_read(got, want)
    }

    fn store(&self) -> Outcome {
        let (size, want) = self.word();
        let moved = if want.is_ok() { size } else { 0 };
        let got = atomic_by_size!(size, T => {
            let value = value_of::<T>(self.payload);
            self.slice.store(value, self.op.at, Ordering::Release)
        });
        Outcome::of_write(got, want, moved)
    }

    fn load(&self) -> Outcome {
        let (size, want) = self.word();
        let want = want.map(|()| self.rest[..size].to_vec());
        let got = atomic_by_size!(size, T => {
            let value = self.slice.load::<T>(self.op.at, Ordering::Acquire);
            value.map(|v| v.as_slice().to_vec())
        });
        Outcome::of_read(got, want)
    }

    /// Returns the size of an atomic access, and its expected result.
    fn word(&self) -> (usize, Result<()>) {
        let size = self.op.size.next_power_of_two().min(8);
        let result = end_of(self.op.at, size, self.len).and_then(|_| {
            let addr = self.host + self.op.at;
            match addr % size {
                0 => Ok(()),
                _ => Err(Error::Misaligned {
                    addr,
                    alignment: size,
                }),
            }
        });
        (size, result)
    }

    fn copy_from(&self) -> Outcome {
        let Op { size, count, .. } = self.op;
        let slice = self.slice.offset(self.op.at).unwrap();
        plain_by_size!(size, T => slice.copy_from(&values::<T>(self.payload, count)));
        Outcome::of_write((), (), (self.rest.len() / size).min(count) * size)
    }

    fn copy_to(&self) -> Outcome {
        let Op { size, count, .. } = self.op;
        let slice = self.slice.offset(self.op.at).unwrap();
        let got = plain_by_size!(size, T => {
            let mut buf = vec![T::zeroed(); count];
            (slice.copy_to(&mut buf), bytes_of(&buf))
        });
        let copied = (self.rest.len() / size).min(count);
        Outcome::of_read(got, self.copied(copied))
    }

    /// Returns the result of a copy of `copied` elements to a buffer of zeroes.
    fn copied(&self, copied: usize) -> (usize, Vec<u8>) {
        let mut buf = vec![0u8; self.op.size * self.op.count];
        let len = copied * self.op.size;
        buf[..len].copy_from_slice(&self.rest[..len]);
        (copied, buf)
    }

    fn reference(&self) -> Outcome {
        let Op { at, size, .. } = self.op;
        let want = end_of(at, size, self.len).map(|_| (size, self.payload[..size].to_vec()));
        let moved = want.as_ref().map_or(0, |_| size);
        let got = plain_by_size!(size, T => self.slice.get_ref::<T>(at).map(|r| {
            r.store(value_of::<T>(self.payload));
            (r.len(), bytes_of(&[r.load()]))
        }));
        Outcome::of_write(got, want, moved)
    }

    fn array_copy_from(&self) -> Outcome {
        let (size, count, elements) = (self.op.size, self.op.count, self.op.elements);
        let want = end_of(self.op.at, size * elements, self.len).map(|_| elements);
        let moved = want.as_ref().map_or(0, |_| size * elements.min(count));
        let got = plain_by_size!(size, T => {
            self.slice.get_array_ref::<T>(self.op.at, elements).map(|array| {
                array.copy_from(&values::<T>(self.payload, count));
                array.len()
            })
        });
        Outcome::of_write(got, want, moved)
    }

    fn array_copy_to(&self) -> Outcome {
        let (size, count, elements) = (self.op.size, self.op.count, self.op.elements);
        let want =
            end_of(self.op.at, size * elements, self.len).map(|_| self.copied(elements.min(count)));
        let got = plain_by_size!(size, T => {
            self.slice.get_array_ref::<T>(self.op.at, elements).map(|array| {
                let mut buf = vec![T::zeroed(); count];
                (array.copy_to(&mut buf), bytes_of(&buf))
            })
        });
        Outcome::of_read(got, want)
    }
}

/// Returns the end of a range in memory of `len` bytes, or the expected error.
pub(super) fn end_of(at: usize, count: usize, len: usize) -> Result<usize> {
    match at.checked_add(count) {
        None => Err(Error::Overflow {
            base: at,
            offset: count,
        }),
        Some(end) if end > len => Err(Error::OutOfBounds { addr: end }),
        Some(end) => Ok(end),
    }
}

/// Returns how many of `wanted` bytes an access at `at` moves, or the expected error.
fn movable(at: usize, wanted: usize, len: usize) -> Result<usize> {
    match wanted {
        0 => Ok(0),
        _ if at >= len => Err(Error::OutOfBounds { addr: at }),
        _ => Ok(wanted.min(len - at)),
    }
}

/// Returns the expected result of an exact access.
fn all(expected: usize, movable: Result<usize>) -> Result<()> {
    match movable? {
        completed if completed == expected => Ok(()),
        completed => Err(Error::PartialBuffer {
            expected,
            completed,
        }),
    }
}

fn value_of<T: ByteValued>(bytes: &[u8]) -> T {
    T::read_exact_from(bytes).unwrap()
}

fn values<T: ByteValued>(bytes: &[u8], count: usize) -> Vec<T> {
    bytes
        .chunks(size_of::<T>())
        .take(count)
        .map(value_of)
        .collect()
}

fn bytes_of<T: ByteValued>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|v| v.as_slice().to_vec()).collect()
}
