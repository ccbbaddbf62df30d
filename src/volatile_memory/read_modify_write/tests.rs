//! Results, errors and marks of the atomic read-modify-write methods.

use core::sync::atomic::Ordering::{self, SeqCst};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

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

/// The name of each method, and the byte of the memory, of the operand and of the result.
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

fn check_change<T: AtomicAccess>() {
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
fn atomic_change_of_each_size_writes_and_marks_only_its_bytes() {
    for_each_size!(check_change);
}

#[test]
fn atomic_fetch_add_of_maximum_wraps() {
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

fn check_exchange<T: AtomicAccess + core::fmt::Debug>() {
    let size = size_of::<T>();
    for at in (0..MEMORY).step_by(size) {
        let memory = Memory::new(MEMORY, 0);
        let slice = memory.slice();
        slice.fill_with_byte(7).unwrap();
        memory.take_marks();
        let result = slice
            .atomic_compare_exchange(filled::<T>(8), filled(9), at, SeqCst, SeqCst)
            .unwrap();
        assert_eq!(result.unwrap_err().as_slice(), vec![7; size]);
        assert_eq!(memory.bytes(), [7; MEMORY]);
        assert_eq!(memory.take_marks(), [] as [usize; 0]);
        // Differs only in the last byte.
        let mut nearly = vec![7; size];
        nearly[size - 1] = 6;
        let nearly = T::read_exact_from(&*nearly).unwrap();
        let result = slice
            .atomic_compare_exchange(nearly, filled(9), at, SeqCst, Ordering::Relaxed)
            .unwrap();
        assert_eq!(result.unwrap_err().as_slice(), vec![7; size]);
        assert_eq!(memory.take_marks(), [] as [usize; 0]);

        let result = slice
            .atomic_compare_exchange(
                filled::<T>(7),
                filled(9),
                at,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .unwrap();
        assert_eq!(result.map_err(drop).unwrap().as_slice(), vec![7; size]);
        let mut expected = vec![7; MEMORY];
        expected[at..at + size].fill(9);
        assert_eq!(memory.bytes(), expected);
        assert_eq!(memory.take_marks(), (at..at + size).collect::<Vec<_>>());
    }
}

#[test]
fn atomic_compare_exchange_that_fails_neither_writes_nor_marks() {
    for_each_size!(check_exchange);
}

/// Returns the error of each method.
fn errors<T: AtomicAccess>(memory: &Memory, at: usize) -> Vec<String> {
    let slice = memory.slice();
    let value = T::zeroed();
    let changes = CHANGES.map(|(name, ..)| failed(change(&slice, name, value, at, SeqCst)));
    let exchange = failed(slice.atomic_compare_exchange(value, value, at, SeqCst, SeqCst));
    changes.into_iter().chain([exchange]).collect()
}

fn check_errors<T: AtomicAccess>() {
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
                errors::<T>(&memory, at),
                vec![expected; 5],
                "{size} bytes at {at}, {shift} off"
            );
        }
        assert_eq!(memory.bytes(), (1..=MEMORY as u8).collect::<Vec<_>>());
        assert_eq!(memory.take_marks(), [] as [usize; 0]);
    }
}

#[test]
fn atomic_change_out_of_bounds_or_misaligned_returns_error() {
    for_each_size!(check_errors);
}

/// A type of another crate that is too large for a register.
#[derive(Clone, Copy, Default)]
struct Pair([u64; 2]);

// SAFETY: two integers have no padding and no invalid bit pattern.
unsafe impl ByteValued for Pair {}

struct AtomicPair([AtomicU64; 2]);

// SAFETY: two atomic integers, without padding.
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

/// Types of another crate whose atomic integer has another size.
macro_rules! misfits {
    ($($name:ident: $bytes:ty, $atomic:ty;)*) => {
        $(
            #[derive(Clone, Copy, Default)]
            #[repr(transparent)]
            struct $name($bytes);
            // SAFETY: the field is a plain value.
            unsafe impl ByteValued for $name {}
            impl From<<$atomic as AtomicInteger>::V> for $name {
                fn from(_: <$atomic as AtomicInteger>::V) -> Self {
                    Self::default()
                }
            }
            impl From<$name> for <$atomic as AtomicInteger>::V {
                fn from(_: $name) -> Self {
                    Self::default()
                }
            }
            impl AtomicAccess for $name {
                type A = $atomic;
            }
        )*
    };
}
misfits! {
    Narrow: u16, AtomicU64;
    Wide: u64, AtomicU16;
    NoBytes: [u8; 0], AtomicU64;
    Odd: [u8; 3], AtomicU32;
    Large: [u64; 2], AtomicU64;
    Small: u64, AtomicPair;
}

fn check_misfit<T: AtomicAccess>() {
    let memory = Memory::new(MEMORY, 0);
    let size = size_of::<T::A>();
    let too_big = shown(Error::TooBig { nelements: 1, size });
    // Offset 1 is misaligned, and 64 is out of bounds: the size is checked first.
    for at in [0, 1, 64] {
        let slice = memory.slice();
        assert_eq!(failed(slice.load::<T>(at, SeqCst).map(drop)), too_big);
        assert_eq!(failed(slice.store(T::zeroed(), at, SeqCst)), too_big);
        assert_eq!(errors::<T>(&memory, at), vec![too_big.clone(); 5]);
    }
    assert_eq!(memory.bytes(), (1..=MEMORY as u8).collect::<Vec<_>>());
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
}

#[test]
fn atomic_access_to_type_of_other_size_than_its_atomic_returns_too_big() {
    check_misfit::<Narrow>();
    check_misfit::<Wide>();
    check_misfit::<NoBytes>();
    check_misfit::<Odd>();
    check_misfit::<Large>();
    check_misfit::<Small>();
}

/// The access needs the alignment of the atomic integer, not of the type.
#[test]
fn atomic_access_to_type_of_smaller_alignment_succeeds() {
    #[derive(Clone, Copy, Default)]
    #[repr(C, packed)]
    struct Packed(u32);
    // SAFETY: an integer, without padding.
    unsafe impl ByteValued for Packed {}
    impl From<u32> for Packed {
        fn from(v: u32) -> Self {
            Self(v)
        }
    }
    impl From<Packed> for u32 {
        fn from(packed: Packed) -> Self {
            packed.0
        }
    }
    impl AtomicAccess for Packed {
        type A = AtomicU32;
    }
    let memory = Memory::new(MEMORY, 0);
    let slice = memory.slice();
    slice.store(Packed(7), 4, SeqCst).unwrap();
    assert_eq!(u32::from(slice.load::<Packed>(4, SeqCst).unwrap()), 7);
    let misaligned = shown(Error::Misaligned {
        addr: memory.ptr().addr() + 2,
        alignment: 4,
    });
    assert_eq!(
        failed(slice.load::<Packed>(2, SeqCst).map(drop)),
        misaligned
    );
}

#[test]
fn atomic_change_of_type_larger_than_register_returns_too_big() {
    let memory = Memory::new(MEMORY, 0);
    let too_big = shown(Error::TooBig {
        nelements: 1,
        size: 16,
    });
    // Offset 64 is out of bounds: the size is checked first.
    for at in [0, 64] {
        assert_eq!(errors::<Pair>(&memory, at), vec![too_big.clone(); 5]);
    }
    assert_eq!(memory.take_marks(), [] as [usize; 0]);
    // Loads and stores use the type's own methods.
    memory.slice().store(Pair([1, 2]), 8, SeqCst).unwrap();
    assert_eq!(memory.slice().load::<Pair>(8, SeqCst).unwrap().0, [1, 2]);
}

/// An integer whose conversion from the word in memory panics.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
struct Refused(u32);

// SAFETY: has the bytes of an integer.
unsafe impl ByteValued for Refused {}

impl From<u32> for Refused {
    fn from(_: u32) -> Self {
        panic!("the conversion panics")
    }
}

impl From<Refused> for u32 {
    fn from(value: Refused) -> u32 {
        value.0
    }
}

impl AtomicAccess for Refused {
    type A = AtomicU32;
}

#[test]
fn read_modify_write_with_panicking_conversion_marks_its_write() {
    let memory = Memory::new(MEMORY, 0);
    let slice = memory.slice();
    let run = |access: &dyn Fn()| {
        memory.take_marks();
        let ran = std::panic::catch_unwind(core::panic::AssertUnwindSafe(access));
        assert!(ran.is_err());
        assert_eq!(memory.take_marks(), [4, 5, 6, 7]);
    };
    for (name, ..) in CHANGES {
        run(&|| drop(change(&slice, name, Refused(1), 4, SeqCst)));
    }
    slice.write_obj(1u32, 4).unwrap();
    run(&|| drop(slice.atomic_compare_exchange(Refused(1), Refused(2), 4, SeqCst, SeqCst)));
    assert_eq!(slice.read_obj::<u32>(4).unwrap(), 2);
}
