//! The methods that read, change and write an integer in one piece: what they answer, where they refuse, and what they mark.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{self, SeqCst};

use super::super::tests::{failed, out_of_bounds, shown, Memory};
use super::*;
use crate::atomic_integer::AtomicInteger;
use crate::bitmap::BitmapSlice;
use crate::bytes::Bytes;
use crate::value::{AtomicAccess, ByteValued};

const MEMORY: usize = 24;

/// Runs `$check::<T>()` for an integer of each size.
macro_rules! for_each_size {
    ($check:ident) => {
        $check::<u8>();
        $check::<u16>();
        $check::<u32>();
        $check::<u64>();
        $check::<i16>();
    };
}

fn filled<T: ByteValued>(byte: u8) -> T {
    T::read_exact_from(&*vec![byte; size_of::<T>()]).unwrap()
}

/// Each method, on memory that is `was` all through, with an operand of such bytes: the bytes that it leaves.
#[rustfmt::skip]
const CHANGES: [(&str, u8, u8, u8); 4] = [
    ("swap", 0x5a, 0xc3, 0xc3),
    ("add", 0x21, 0x12, 0x33),
    ("and", 0x5a, 0xc3, 0x42),
    ("or", 0x5a, 0xc3, 0xdb),
];

fn change<T: AtomicAccess>(
    slice: &VolatileSlice<'_, impl BitmapSlice>,
    name: &str,
    val: T,
    at: usize,
    order: Ordering,
) -> Result<T> {
    match name {
        "swap" => slice.atomic_swap(val, at, order),
        "add" => slice.atomic_fetch_add(val, at, order),
        "and" => slice.atomic_fetch_and(val, at, order),
        _ => slice.atomic_fetch_or(val, at, order),
    }
}

fn changes_the_integer_and_marks_it<T: AtomicAccess>() {
    let size = size_of::<T>();
    let orders = [
        Ordering::Relaxed,
        Ordering::Acquire,
        Ordering::Release,
        Ordering::AcqRel,
        SeqCst,
    ];
    for (name, was, operand, becomes) in CHANGES {
        for (at, order) in (0..MEMORY).step_by(size).zip(orders.into_iter().cycle()) {
            let memory = Memory::new(MEMORY, 0);
            let slice = memory.slice();
            slice.fill_with_byte(was).unwrap();
            memory.take_marks();
            let previous = change(&slice, name, filled::<T>(operand), at, order).unwrap();
            assert_eq!(previous.as_slice(), vec![was; size], "{name} at {at}");
            let mut expected = vec![was; MEMORY];
            expected[at..at + size].fill(becomes);
            assert_eq!(memory.bytes(), expected, "{name} at {at}");
            assert_eq!(
                memory.take_marks(),
                (at..at + size).collect::<Vec<_>>(),
                "{name} at {at}"
            );
        }
    }
}

#[test]
fn a_change_is_of_its_bytes_and_marks_them() {
    for_each_size!(changes_the_integer_and_marks_it);
}

#[test]
fn a_sum_wraps() {
    let memory = Memory::new(8, 0);
    memory.slice().atomic_swap(u16::MAX, 2, SeqCst).unwrap();
    assert_eq!(
        memory.slice().atomic_fetch_add(2u16, 2, SeqCst).unwrap(),
        u16::MAX
    );
    assert_eq!(memory.slice().atomic_fetch_or(0u16, 2, SeqCst).unwrap(), 1);
    assert_eq!(memory.bytes()[..2], [1, 2]);
    assert_eq!(memory.bytes()[4..], [5, 6, 7, 8]);
}

fn exchanges_if_it_is_there<T: AtomicAccess + core::fmt::Debug>() {
    let size = size_of::<T>();
    for at in (0..MEMORY).step_by(size) {
        let memory = Memory::new(MEMORY, 0);
        let slice = memory.slice();
        slice.fill_with_byte(7).unwrap();
        memory.take_marks();
        // Something else is there: nothing is written, and nothing marked.
        let answer = slice
            .atomic_compare_exchange(filled::<T>(8), filled(9), at, SeqCst, SeqCst)
            .unwrap();
        assert_eq!(answer.unwrap_err().as_slice(), vec![7; size]);
        assert_eq!(memory.bytes(), [7; MEMORY]);
        assert_eq!(memory.take_marks(), [] as [usize; 0]);
        // It differs in its last byte only.
        let mut nearly = vec![7; size];
        nearly[size - 1] = 6;
        let nearly = T::read_exact_from(&*nearly).unwrap();
        let answer = slice
            .atomic_compare_exchange(nearly, filled(9), at, SeqCst, Ordering::Relaxed)
            .unwrap();
        assert_eq!(answer.unwrap_err().as_slice(), vec![7; size]);
        assert_eq!(memory.take_marks(), [] as [usize; 0]);

        let answer = slice
            .atomic_compare_exchange(
                filled::<T>(7),
                filled(9),
                at,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .unwrap();
        assert_eq!(answer.map_err(drop).unwrap().as_slice(), vec![7; size]);
        let mut expected = vec![7; MEMORY];
        expected[at..at + size].fill(9);
        assert_eq!(memory.bytes(), expected);
        assert_eq!(memory.take_marks(), (at..at + size).collect::<Vec<_>>());
    }
}

#[test]
fn an_exchange_that_fails_writes_and_marks_nothing() {
    for_each_size!(exchanges_if_it_is_there);
}

/// The answer of every method at a place that is refused.
fn refusals<T: AtomicAccess>(memory: &Memory, at: usize) -> Vec<String> {
    let slice = memory.slice();
    let value = T::zeroed();
    let changes = CHANGES.map(|(name, ..)| failed(change(&slice, name, value, at, SeqCst)));
    let exchange = failed(slice.atomic_compare_exchange(value, value, at, SeqCst, SeqCst));
    changes.into_iter().chain([exchange]).collect()
}

fn refuses_places_that_are_not_its_own<T: AtomicAccess>() {
    let size = size_of::<T>();
    for shift in 0..8 {
        let memory = Memory::new(MEMORY, shift);
        let host = memory.ptr().addr();
        for at in (0..MEMORY + 9).chain([usize::MAX - 7, usize::MAX]) {
            let expected = match at.checked_add(size) {
                None => shown(Error::Overflow {
                    base: at,
                    offset: size,
                }),
                Some(end) if end > MEMORY => out_of_bounds(end),
                Some(_) if !(host + at).is_multiple_of(size) => shown(Error::Misaligned {
                    addr: host + at,
                    alignment: size,
                }),
                Some(_) => continue,
            };
            assert_eq!(
                refusals::<T>(&memory, at),
                vec![expected; 5],
                "{size} bytes at {at}, {shift} off"
            );
        }
        assert_eq!(memory.bytes(), (1..=MEMORY as u8).collect::<Vec<_>>());
        assert_eq!(memory.take_marks(), [] as [usize; 0]);
    }
}

#[test]
fn places_out_of_bounds_or_misaligned_are_refused() {
    for_each_size!(refuses_places_that_are_not_its_own);
}

/// Two words that a user calls one integer: no processor changes them in one piece here.
#[derive(Clone, Copy, Default)]
struct Pair([u64; 2]);

// SAFETY: two integers, without padding; any bytes are one.
unsafe impl ByteValued for Pair {}

struct AtomicPair([AtomicU64; 2]);

// SAFETY: consists of atomic integers and nothing else, without padding.
unsafe impl AtomicInteger for AtomicPair {
    type V = [u64; 2];

    fn new(v: [u64; 2]) -> Self {
        Self(v.map(AtomicU64::new))
    }

    fn load(&self, order: Ordering) -> [u64; 2] {
        self.0.each_ref().map(|word| word.load(order))
    }

    fn store(&self, val: [u64; 2], order: Ordering) {
        for (word, val) in self.0.iter().zip(val) {
            word.store(val, order);
        }
    }
}

impl From<[u64; 2]> for Pair {
    fn from(v: [u64; 2]) -> Self {
        Self(v)
    }
}

impl From<Pair> for [u64; 2] {
    fn from(pair: Pair) -> Self {
        pair.0
    }
}

impl AtomicAccess for Pair {
    type A = AtomicPair;
}

#[test]
fn what_is_no_register_is_too_big() {
    let memory = Memory::new(MEMORY, 0);
    let too_big = shown(Error::TooBig {
        nelements: 1,
        size: 16,
    });
    // Before anything else is looked at: 64 is out of bounds.
    for at in [0, 64] {
        assert_eq!(refusals::<Pair>(&memory, at), vec![too_big.clone(); 5]);
    }
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
    // Plain loads and stores of it go by its own methods.
    memory.slice().store(Pair([1, 2]), 8, SeqCst).unwrap();
    assert_eq!(memory.slice().load::<Pair>(8, SeqCst).unwrap().0, [1, 2]);
}
