//! Compares slices, references and arrays with plain vectors, and marks with single bytes.

use core::fmt::Debug;
use core::sync::atomic::{AtomicI16, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::cell::RefCell;
use std::io::ErrorKind;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::bitmap::{BitmapSlice, WithBitmapSlice};
use crate::bytes::Bytes;
use crate::io::ReadVolatile;

/// A dirty bitmap with one bit per byte. A mark outside the memory panics.
#[derive(Clone, Debug)]
pub(super) struct ByteMap(Rc<RefCell<Vec<bool>>>, usize);

impl WithBitmapSlice<'_> for ByteMap {
    type S = Self;
}
impl BitmapSlice for ByteMap {}
impl Bitmap for ByteMap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.borrow_mut()[self.1 + offset..][..len].fill(true);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.0.borrow()[self.1 + offset]
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self(self.0.clone(), self.1 + offset)
    }
}

/// Memory at a known alignment, between fences that must not change.
pub(super) struct Memory {
    words: Vec<AtomicU64>,
    start: usize,
    len: usize,
    bitmap: ByteMap,
}

const FENCE: u8 = 0xee;

impl Memory {
    /// Makes memory of the bytes 1, 2, 3, ..., that starts `shift` bytes after a multiple of 8.
    pub(super) fn new(len: usize, shift: usize) -> Self {
        let start = 8 + shift;
        let mut bytes = vec![FENCE; (start + len + 8).next_multiple_of(8)];
        bytes[start..start + len].copy_from_slice(&numbered(len, 1));
        let word = |c: &[u8]| AtomicU64::new(u64::from_ne_bytes(c.try_into().unwrap()));
        let words = bytes.chunks(8).map(word).collect();
        let bitmap = ByteMap(Rc::new(RefCell::new(vec![false; len])), 0);
        Self {
            words,
            start,
            len,
            bitmap,
        }
    }

    pub(super) fn ptr(&self) -> *mut u8 {
        let first = self.words.as_ptr().cast_mut();
        first.cast::<u8>().wrapping_add(self.start)
    }

    pub(super) fn slice(&self) -> VolatileSlice<'_, ByteMap> {
        // SAFETY: These `len` bytes are atomics that outlive the slice.
        unsafe { VolatileSlice::with_bitmap(self.ptr(), self.len, self.bitmap.clone(), None) }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let bytes = |w: &AtomicU64| w.load(Ordering::Relaxed).to_ne_bytes();
        let all: Vec<u8> = self.words.iter().flat_map(bytes).collect();
        let end = self.start + self.len;
        assert!(all[..self.start]
            .iter()
            .chain(&all[end..])
            .all(|&b| b == FENCE));
        all[self.start..end].to_vec()
    }

    /// Returns the offsets of the marked bytes, and clears the marks.
    pub(super) fn take_marks(&self) -> Vec<usize> {
        let mut marks = self.bitmap.0.borrow_mut();
        let marked = (0..self.len).filter(|&i| marks[i]).collect();
        marks.fill(false);
        marked
    }
}

fn numbered(len: usize, first: usize) -> Vec<u8> {
    (first..first + len).map(|i| i as u8).collect()
}

pub(super) fn shown(value: impl Debug) -> String {
    format!("{value:?}")
}

/// Returns the error of `result` as text.
pub(super) fn failed<T>(result: Result<T>) -> String {
    shown(result.map(|_| "no error").unwrap_err())
}

pub(super) fn out_of_bounds(addr: usize) -> String {
    shown(Error::OutOfBounds { addr })
}

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
    CopyFrom,
    CopyTo,
    Ref,
    ArrayCopyFrom,
    ArrayCopyTo,
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
    Kind::CopyFrom,
    Kind::CopyTo,
    Kind::Ref,
    Kind::ArrayCopyFrom,
    Kind::ArrayCopyTo,
];

#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    at: usize,
    /// The size of an object or element.
    size: usize,
    /// The number of bytes, or of elements in host memory.
    count: usize,
    /// The length of an array in the slice.
    elements: usize,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop::sample::select(KINDS.to_vec());
    let at = prop_oneof![12 => 0usize..70, 1 => (usize::MAX - 70)..=usize::MAX];
    let size = prop::sample::select(vec![1usize, 2, 3, 4, 8, 16, 24]);
    (kind, at, size, 0usize..80, 0usize..40).prop_map(|(kind, at, size, count, elements)| Op {
        kind,
        at,
        size,
        count,
        elements,
    })
}

/// Returns the end of a range in memory of `len` bytes, or the expected error.
fn end_of(at: usize, count: usize, len: usize) -> Result<usize> {
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

/// The results of the slice and of the model, as text.
struct Outcome {
    got: String,
    want: String,
    /// The number of bytes written to the slice.
    moved: usize,
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
struct Access<'a> {
    slice: &'a VolatileSlice<'a, ByteMap>,
    /// The address of the slice.
    host: usize,
    len: usize,
    op: Op,
    /// The bytes of the slice from the offset of the access on.
    rest: &'a [u8],
    /// The bytes that a write takes.
    payload: &'a [u8],
}

impl Access<'_> {
    fn run(&self) -> Outcome {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 512 }))]

    /// Compares values, counts, errors, bytes and marks, at every alignment.
    #[test]
    fn accesses_agree_with_vector(
        len in 0usize..64,
        shift in 0usize..8,
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let memory = Memory::new(len, shift);
        let slice = memory.slice();
        let mut model = memory.bytes();
        let payload = numbered(80 * 24, 101);
        for op in ops {
            let start = op.at.min(len);
            let access = Access {
                slice: &slice,
                host: memory.ptr() as usize,
                len,
                op,
                rest: &model[start..],
                payload: &payload,
            };
            let Outcome { got, want, moved } = access.run();
            prop_assert_eq!(got, want, "{:?}", op);
            let touched = start..start + moved;
            model[touched.clone()].copy_from_slice(&payload[..moved]);
            prop_assert_eq!(memory.bytes(), &*model, "{:?}", op);
            prop_assert_eq!(memory.take_marks(), touched.collect::<Vec<_>>(), "{:?}", op);
        }
    }

    /// Compares start, length, bitmap offset and errors.
    #[test]
    fn subslice_offset_and_split_at_agree_with_arithmetic(
        len in 0usize..40,
        a in prop_oneof![4 => 0usize..50, 1 => any::<usize>(), 1 => Just(usize::MAX)],
        b in prop_oneof![4 => 0usize..50, 1 => any::<usize>(), 1 => Just(usize::MAX)],
    ) {
        let memory = Memory::new(len, 0);
        let slice = memory.slice();
        let host = memory.ptr() as usize;
        let describe = |s: VolatileSlice<'_, ByteMap>| {
            prop_assert_eq!(s.is_empty(), matches!(s.len(), 0));
            prop_assert_eq!((s.ptr_guard().len(), s.ptr_guard_mut().len()), (s.len(), s.len()));
            prop_assert_eq!(s.ptr_guard().as_ptr(), s.ptr_guard_mut().as_ptr().cast_const());
            Ok((s.ptr_guard().as_ptr() as usize - host, s.len(), s.bitmap().1))
        };
        let want = end_of(a, b, len).map(|_| (a, b, a));
        for got in [slice.subslice(a, b), slice.get_slice(a, b)] {
            prop_assert_eq!(shown(got.map(|s| describe(s).unwrap())), shown(&want));
        }
        prop_assert_eq!(shown(slice.compute_end_offset(a, b)), shown(end_of(a, b, len)));

        let offset_error = match host.checked_add(a) {
            None => Error::Overflow { base: host, offset: a },
            Some(addr) => Error::OutOfBounds { addr },
        };
        let (offset, split) = (slice.offset(a), slice.split_at(a));
        if a <= len {
            prop_assert_eq!(describe(offset.unwrap())?, (a, len - a, a));
            let (head, tail) = split.unwrap();
            prop_assert_eq!(describe(head)?, (0, a, 0));
            prop_assert_eq!(describe(tail)?, (a, len - a, a));
        } else {
            prop_assert_eq!(shown(offset.unwrap_err()), shown(&offset_error));
            prop_assert_eq!(shown(split.unwrap_err()), shown(&offset_error));
        }
    }

    /// Compares with a copy through a vector. Only the target may be marked.
    #[test]
    fn copy_to_volatile_slice_with_overlap_copies_original_bytes(
        (from, from_len) in (0usize..600, 0usize..600),
        (to, to_len) in (0usize..600, 0usize..600),
    ) {
        let memory = Memory::new(600, 3);
        let part = |at: usize, n: usize| memory.slice().subslice(at, n.min(600 - at)).unwrap();
        let (source, target) = (part(from, from_len), part(to, to_len));
        let count = source.len().min(target.len());
        let mut model = memory.bytes();
        let through: Vec<u8> = model[from..from + count].to_vec();
        model[to..to + count].copy_from_slice(&through);
        source.copy_to_volatile_slice(target);
        prop_assert_eq!(memory.bytes(), model);
        prop_assert_eq!(memory.take_marks(), (to..to + count).collect::<Vec<_>>());
    }
}

#[test]
fn get_array_ref_larger_than_address_space_returns_too_big() {
    let memory = Memory::new(16, 0);
    let (nelements, size) = (usize::MAX / 2, 4);
    let too_big = shown(Error::TooBig { nelements, size });
    assert_eq!(
        failed(memory.slice().get_array_ref::<u32>(0, nelements)),
        too_big
    );
}

#[test]
fn volatile_ref_accesses_only_its_value() {
    let memory = Memory::new(16, 1);
    let slice = memory.slice();
    let value = slice.get_ref::<u32>(5).unwrap();
    assert_eq!(value.len(), 4);
    assert_eq!(
        (value.ptr_guard().len(), value.ptr_guard_mut().len()),
        (4, 4)
    );
    assert_eq!(value.ptr_guard().as_ptr(), memory.ptr().wrapping_add(5));
    assert_eq!(value.ptr_guard_mut().as_ptr(), memory.ptr().wrapping_add(5));
    assert_eq!(value.bitmap().1, 5);
    let inside = value.to_slice().subslice(1, 2).unwrap();
    inside.copy_from(&[0xa1u8, 0xa2]);
    assert_eq!(memory.take_marks(), [6, 7]);
    assert_eq!(value.load().to_ne_bytes(), [6, 0xa1, 0xa2, 9]);
    value.clone().store(0);
    assert_eq!(value.load(), 0);

    // SAFETY: The four bytes are in the memory, which outlives the reference.
    let bare = unsafe { VolatileRef::<u32>::new(memory.ptr()) };
    memory.take_marks();
    bare.store(u32::MAX);
    assert_eq!(memory.bytes()[..5], [0xff, 0xff, 0xff, 0xff, 5]);
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
}

#[test]
fn volatile_array_ref_accesses_only_its_elements() {
    let memory = Memory::new(40, 0);
    let slice = memory.slice();
    let array = slice.get_array_ref::<u16>(3, 5).unwrap();
    assert_eq!((array.len(), array.element_size()), (5, 2));
    assert_eq!(
        (array.ptr_guard().len(), array.ptr_guard_mut().len()),
        (10, 10)
    );
    assert_eq!(array.ptr_guard().as_ptr(), memory.ptr().wrapping_add(3));
    assert_eq!(array.bitmap().1, 3);
    array.store(4, 0xabab);
    assert_eq!(memory.take_marks(), [11, 12]);
    assert_eq!(array.load(4), 0xabab);
    assert_eq!(array.ref_at(1).load().to_ne_bytes(), [6, 7]);
    assert_eq!(array.to_slice().len(), 10);

    let target = memory.slice().subslice(30, 7).unwrap();
    array.copy_to_volatile_slice(target);
    assert_eq!(memory.bytes()[30..38], [4, 5, 6, 7, 8, 9, 10, 38]);
    assert_eq!(memory.take_marks(), (30..37).collect::<Vec<_>>());

    let bytes = VolatileArrayRef::from(memory.slice().subslice(2, 4).unwrap());
    assert_eq!((bytes.len(), bytes.element_size()), (4, 1));
    bytes.store(3, 0);
    assert_eq!(memory.take_marks(), [5]);
    // SAFETY: The eight bytes are in the memory, which outlives the reference.
    let bare = unsafe { VolatileArrayRef::<u32>::new(memory.ptr(), 2) };
    bare.copy_from(&[0, 0, 0]);
    assert_eq!(memory.bytes()[..9], [0, 0, 0, 0, 0, 0, 0, 0, 9]);
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
    assert!(memory
        .slice()
        .get_array_ref::<u64>(40, 0)
        .unwrap()
        .is_empty());
}

#[test]
#[should_panic(expected = "index 2 is out of bounds of an array of length 2")]
fn volatile_array_ref_load_past_end_panics() {
    let memory = Memory::new(8, 0);
    memory.slice().get_array_ref::<u16>(0, 2).unwrap().load(2);
}

#[test]
fn plain_references_out_of_bounds_or_misaligned_return_error() {
    let memory = Memory::new(16, 2);
    let slice = memory.slice();
    let half = slice.get_atomic_ref::<AtomicU16>(2).unwrap();
    assert_eq!(half.load(Ordering::Relaxed).to_ne_bytes(), [3, 4]);
    let word = slice.get_atomic_ref::<AtomicU32>(6).unwrap();
    word.store(0, Ordering::Relaxed);
    assert_eq!(memory.bytes()[5..11], [6, 0, 0, 0, 0, 11]);
    let (addr, alignment) = (memory.ptr() as usize + 1, 2);
    let misaligned = shown(Error::Misaligned { addr, alignment });
    assert_eq!(failed(slice.get_atomic_ref::<AtomicI16>(1)), misaligned);
    assert_eq!(
        failed(slice.get_atomic_ref::<AtomicI16>(15)),
        out_of_bounds(17)
    );
    // SAFETY: Only this thread accesses the memory, through one reference at a time.
    unsafe {
        assert_eq!(slice.aligned_as_ref::<[u8; 2]>(0).unwrap(), &[1, 2]);
        *slice.aligned_as_mut::<u16>(0).unwrap() = 0;
        assert_eq!(failed(slice.aligned_as_ref::<u16>(1)), misaligned);
        assert_eq!(failed(slice.aligned_as_mut::<u16>(1)), misaligned);
        assert_eq!(failed(slice.aligned_as_ref::<u64>(14)), out_of_bounds(22));
        assert_eq!(failed(slice.aligned_as_mut::<u64>(14)), out_of_bounds(22));
    }
    assert_eq!(memory.bytes()[..3], [0, 0, 3]);
}

#[test]
fn every_write_method_marks_after_the_write() {
    /// A bitmap that records the current byte on each mark.
    #[derive(Clone, Debug)]
    struct Witness(Rc<RefCell<Vec<u8>>>, *const AtomicU64);
    impl WithBitmapSlice<'_> for Witness {
        type S = Self;
    }
    impl BitmapSlice for Witness {}
    impl Bitmap for Witness {
        fn mark_dirty(&self, _offset: usize, _len: usize) {
            // SAFETY: The test declares the word before the bitmap, so the word outlives it.
            let word = unsafe { &*self.1 };
            let now = word.load(Ordering::Relaxed).to_ne_bytes()[0];
            self.0.borrow_mut().push(now);
        }
        fn dirty_at(&self, _offset: usize) -> bool {
            false
        }
        fn slice_at(&self, _offset: usize) -> Self {
            self.clone()
        }
    }
    let word = AtomicU64::new(0);
    let seen = Rc::new(RefCell::new(vec![]));
    let witness = Witness(seen.clone(), &word);
    // SAFETY: The eight bytes are an atomic that outlives the slice.
    let slice = unsafe { VolatileSlice::with_bitmap(word.as_ptr().cast::<u8>(), 8, witness, None) };
    slice.write(&[1], 0).unwrap();
    slice.write_slice(&[2], 0).unwrap();
    slice.write_obj(3u8, 0).unwrap();
    slice.store(4u8, 0, Ordering::SeqCst).unwrap();
    slice.copy_from(&[5u8]);
    slice.get_ref::<u8>(0).unwrap().store(6);
    slice.get_array_ref::<u8>(0, 1).unwrap().copy_from(&[7]);
    slice
        .read_volatile_from(0, &mut [8u8].as_slice(), 1)
        .unwrap();
    VolatileSlice::from([9u8].as_mut_slice()).copy_to_volatile_slice(slice.clone());
    slice.fill_with_byte(10).unwrap();
    let order = Ordering::SeqCst;
    slice.atomic_swap(11u8, 0, order).unwrap();
    slice.atomic_fetch_add(1u8, 0, order).unwrap();
    slice.atomic_fetch_or(1u8, 0, order).unwrap();
    slice.atomic_fetch_and(0xfeu8, 0, order).unwrap();
    slice.atomic_fetch_or(3u8, 0, order).unwrap();
    slice
        .atomic_compare_exchange(15u8, 16, 0, order, order)
        .unwrap()
        .unwrap();
    assert_eq!(
        *seen.borrow(),
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 12, 15, 16]
    );
}

/// A source that is interrupted before each read, reads a few bytes, and fails at its end.
struct Halting {
    bytes: Vec<u8>,
    interrupted: bool,
}

impl ReadVolatile for Halting {
    fn read_volatile<B: BitmapSlice>(&mut self, buf: &mut VolatileSlice<B>) -> Result<usize> {
        self.interrupted = !self.interrupted;
        match self.bytes.len().min(3).min(buf.len()) {
            _ if self.interrupted => Err(Error::IOError(ErrorKind::Interrupted.into())),
            0 => Err(Error::IOError(ErrorKind::WouldBlock.into())),
            count => {
                buf.copy_from(&self.bytes[..count]);
                self.bytes.drain(..count);
                Ok(count)
            }
        }
    }
}

#[test]
fn stream_methods_mark_only_moved_bytes() {
    let memory = Memory::new(20, 0);
    let slice = memory.slice();
    let stream = |count| Halting {
        bytes: numbered(count, 201),
        interrupted: false,
    };
    assert_eq!(slice.read_volatile_from(4, &mut stream(10), 8).unwrap(), 3);
    assert_eq!(memory.take_marks(), [4, 5, 6]);
    assert_eq!(slice.read_volatile_from(18, &mut stream(10), 8).unwrap(), 2);
    assert_eq!(memory.take_marks(), [18, 19]);
    slice
        .read_exact_volatile_from(0, &mut stream(10), 10)
        .unwrap();
    assert_eq!(memory.bytes()[..10], numbered(10, 201));
    assert_eq!(memory.take_marks(), (0..10).collect::<Vec<_>>());
    let would_block = shown(Error::IOError(ErrorKind::WouldBlock.into()));
    let nothing = slice.read_volatile_from(0, &mut stream(0), 8);
    assert_eq!(failed(nothing), would_block);
    assert!(memory.take_marks().is_empty());
    let some = slice.read_exact_volatile_from(0, &mut stream(4), 8);
    assert_eq!(failed(some), would_block);
    assert_eq!(memory.take_marks(), [0, 1, 2, 3]);

    // An access out of bounds does not touch the stream.
    let (mut source, mut target) = (stream(10), vec![]);
    let past_end = out_of_bounds(memory.ptr() as usize + 21);
    assert_eq!(
        failed(slice.read_volatile_from(21, &mut source, 1)),
        past_end
    );
    assert_eq!(
        failed(slice.write_volatile_to(21, &mut target, 1)),
        past_end
    );
    let past_end = out_of_bounds(21);
    assert_eq!(
        failed(slice.read_exact_volatile_from(13, &mut source, 8)),
        past_end
    );
    assert_eq!(
        failed(slice.write_all_volatile_to(13, &mut target, 8)),
        past_end
    );
    assert!(source.bytes.len() == 10 && !source.interrupted && target.is_empty());
}

/// A third-party memory may return slices of another length.
#[test]
fn references_from_slice_of_wrong_length_return_error() {
    struct OtherLength<'a>(VolatileSlice<'a>, usize);
    impl VolatileMemory for OtherLength<'_> {
        type B = ();
        fn len(&self) -> usize {
            self.0.len()
        }
        fn get_slice(&self, _offset: usize, _count: usize) -> Result<VolatileSlice<'_>> {
            self.0.subslice(0, self.1)
        }
    }
    let mut bytes = [0u64; 2];
    for given in [0, 1, 3, 5, 16] {
        let memory = OtherLength(bytes.as_bytes(), given);
        assert!(!memory.is_empty());
        let (expected, completed) = (4, given);
        let partial = shown(Error::PartialBuffer {
            expected,
            completed,
        });
        assert_eq!(failed(memory.get_ref::<u32>(0)), partial);
        assert_eq!(failed(memory.get_array_ref::<u16>(0, 2)), partial);
        assert_eq!(failed(memory.get_atomic_ref::<AtomicU32>(0)), partial);
        // SAFETY: Only this thread accesses the memory, through one reference at a time.
        unsafe {
            assert_eq!(failed(memory.aligned_as_ref::<u32>(0)), partial);
            assert_eq!(failed(memory.aligned_as_mut::<u32>(0)), partial);
        }
    }
    let whole = OtherLength(bytes.as_bytes(), 16);
    assert_eq!(whole.as_volatile_slice().len(), 16);
}
