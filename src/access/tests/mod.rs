//! One set of tests for each set of routines.
//!
//! The tests run on the set in use. The module of an architecture adds the sets of its other
//! processors. With `--cfg vm_memory_portable`, the set in use is the portable one.

use core::mem::{size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::arch::Routines;
use super::routine_set::{FaultAddress, Fetch, GuestSide::*, Register, RoutineSet, Word};
use super::{read_value, write_value, Plain};

/// Instantiates tests of a file for a set of routines.
macro_rules! instantiate {
    ($file:ident, $routines:ty: $($test:ident),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                $crate::access::tests::$file::$test::<$routines>();
            }
        )*
    };
}

#[macro_use]
pub(super) mod bulk;
#[macro_use]
pub(super) mod single;
#[cfg(all(any(target_os = "linux", windows), not(miri)))]
#[macro_use]
pub(super) mod guard_pages;
#[cfg(all(any(target_os = "linux", windows), not(miri)))]
#[macro_use]
pub(super) mod faults;
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[macro_use]
pub(super) mod order;

#[cfg(not(all(any(target_os = "linux", windows), not(miri))))]
macro_rules! guard_page_tests {
    ($routines:ty) => {};
}
#[cfg(not(all(any(target_os = "linux", windows), not(miri))))]
macro_rules! fault_tests {
    ($routines:ty) => {};
}
/// Only x86_64 guarantees the order in which another thread sees a copy of elements.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
macro_rules! order_tests {
    ($routines:ty) => {};
}

mod chosen {
    use super::*;
    bulk_tests!(Routines);
    single_tests!(Routines);
    guard_page_tests!(Routines);
    order_tests!(Routines);
    fault_tests!(Routines);
}

/// A [`RoutineSet`] whose accesses take the size as a parameter.
pub(super) trait TestedSet: RoutineSet {
    /// # Safety
    ///
    /// `src` is a guest operand of `size` bytes.
    unsafe fn load(src: *const u8, size: usize) -> Result<u128, FaultAddress>;

    /// # Safety
    ///
    /// `dst` is a guest operand of `size` bytes.
    unsafe fn store(dst: *mut u8, value: u128, size: usize) -> Result<(), FaultAddress>;

    /// # Safety
    ///
    /// `src` is a guest operand of `size` bytes, aligned to that size.
    unsafe fn load_ordered(
        src: *const u8,
        size: usize,
        order: Ordering,
    ) -> Result<u64, FaultAddress>;

    /// # Safety
    ///
    /// `dst` is a guest operand of `size` bytes, aligned to that size.
    unsafe fn store_ordered(
        dst: *mut u8,
        value: u64,
        size: usize,
        order: Ordering,
    ) -> Result<(), FaultAddress>;

    /// # Safety
    ///
    /// `dst` is a guest operand of `size` bytes, aligned to that size.
    unsafe fn fetch(
        dst: *mut u8,
        change: Fetch,
        operand: u64,
        size: usize,
        order: Ordering,
    ) -> Result<u64, FaultAddress>;

    /// # Safety
    ///
    /// `dst` is a guest operand of `size` bytes, aligned to that size.
    unsafe fn compare_exchange(
        dst: *mut u8,
        current: u64,
        new: u64,
        size: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, FaultAddress>;
}

/// Evaluates to `$access` with `$word` as the integer of `$size` bytes.
macro_rules! by_size {
    ($size:expr, $word:ident in [$($integer:ty),*] => $access:expr) => {
        match $size {
            $(size if size == size_of::<$integer>() => {
                type $word = $integer;
                // SAFETY: the operand is guest memory of `size` bytes, the size of the integer. For
                // a `Word` it is aligned to that size (contract of the calling method).
                unsafe { $access }
            })*
            size => panic!(
                "no access of {size} bytes; use 1, 2, 4, 8 or, with `load` or `store`, 16"
            ),
        }
    };
}

fn widen<W, V: From<W>>(value: W) -> V {
    V::from(value)
}

impl<R: RoutineSet> TestedSet for R
where
    u8: Word<R>,
    u16: Word<R>,
    u32: Word<R>,
    u64: Word<R>,
    u128: Register<R>,
{
    unsafe fn load(src: *const u8, size: usize) -> Result<u128, FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64, u128] => {
            <W as Register<R>>::load(src).map(widen)
        })
    }

    unsafe fn store(dst: *mut u8, value: u128, size: usize) -> Result<(), FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64, u128] => {
            <W as Register<R>>::store(dst, value as W)
        })
    }

    unsafe fn load_ordered(
        src: *const u8,
        size: usize,
        order: Ordering,
    ) -> Result<u64, FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64] => {
            <W as Word<R>>::load_ordered(src, order).map(widen)
        })
    }

    unsafe fn store_ordered(
        dst: *mut u8,
        value: u64,
        size: usize,
        order: Ordering,
    ) -> Result<(), FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64] => {
            <W as Word<R>>::store_ordered(dst, value as W, order)
        })
    }

    unsafe fn fetch(
        dst: *mut u8,
        change: Fetch,
        operand: u64,
        size: usize,
        order: Ordering,
    ) -> Result<u64, FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64] => {
            <W as Word<R>>::fetch(dst, change, operand as W, order).map(widen)
        })
    }

    unsafe fn compare_exchange(
        dst: *mut u8,
        current: u64,
        new: u64,
        size: usize,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, FaultAddress> {
        by_size!(size, W in [u8, u16, u32, u64] => {
            <W as Word<R>>::compare_exchange(dst, current as W, new as W, success, failure)
                .map(widen)
        })
    }
}

/// The length of the longest copy tested at each offset.
const MAX_LEN: usize = if cfg!(miri) { 18 } else { 300 };

/// Returns `len` bytes, each computed from its index.
fn numbered(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ 0x5a).collect()
}

/// At least the number of bytes that a routine moves by one instruction.
const WIDEST: usize = if cfg!(vm_memory_portable) {
    16
} else if cfg!(target_arch = "x86_64") {
    64
} else if cfg!(target_arch = "aarch64") {
    32
} else {
    16
};

/// Returns the tested offsets of an operand. They include each alignment to [`WIDEST`] bytes.
fn alignments() -> impl Iterator<Item = usize> {
    (0..WIDEST).step_by(if cfg!(miri) { 21 } else { 1 })
}

#[repr(C, align(64))]
struct Aligned<const LEN: usize>([u8; LEN]);

#[test]
fn read_value_after_write_value_of_each_size_returns_same_value() {
    fn check<T: Plain + PartialEq + core::fmt::Debug>(value: T) {
        let mut memory = [0u8; 64];
        for at in 0..16 {
            let ptr = memory[at..].as_mut_ptr();
            // SAFETY: at least 48 bytes follow `ptr`, and no value here is larger.
            unsafe {
                write_value(ptr, &value).unwrap();
                assert_eq!(
                    *read_value(&mut MaybeUninit::<T>::uninit(), ptr).unwrap(),
                    value
                );
            }
        }
    }
    check([0u8; 0]);
    check(0xa1u8);
    check(0xa1a2u16);
    check([1u8, 2, 3]);
    check(0xa1a2_a3a4u32);
    check(0xa1a2_a3a4_a5a6_a7a8u64);
    check(u128::MAX / 7);
    check([0x1234_5678u32; 12]);
}
