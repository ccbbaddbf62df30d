//! Reads and writes of one value.

use core::mem::{size_of, transmute, MaybeUninit};

use super::copy::{copy_below_fault, copy_from_guest, copy_to_guest};
use super::routine_set::{FaultAddress, GuestSide, Register};
use super::{Fault, Plain};

/// The largest value that is moved by inlined instructions, in bytes.
///
/// It covers virtqueue descriptors and request headers.
const IN_LINE_MAX: usize = 64;

/// Reads a value. A naturally aligned value of 1, 2, 4 or 8 bytes is not torn.
///
/// The value is written to `value` and not returned: each layer above would copy a large one again.
///
/// # Safety
///
/// `src` is a guest operand (see [`access`](super)) of `size_of::<T>()` bytes.
#[inline(always)]
pub(crate) unsafe fn read_value<T: Plain>(
    value: &mut MaybeUninit<T>,
    src: *const u8,
) -> Result<&mut T, Fault> {
    let size = size_of::<T>();
    let dst = value.as_mut_ptr().cast();
    if size > IN_LINE_MAX {
        // SAFETY: `src` is a guest operand of `size` bytes, by this function's contract. `dst` is
        // `size` bytes that `value` borrows exclusively, so the two do not overlap.
        unsafe { copy_from_guest(dst, src, size) }?;
    // SAFETY: `src` is a guest operand of `size` bytes, by this function's contract. `dst` is
    // `size` bytes that `value` borrows exclusively.
    } else if let Err(address) = unsafe { read_in_line(dst, src, size) } {
        // SAFETY: `src` is a guest operand of `size` bytes, by this function's contract, and `size`
        // is at most `IN_LINE_MAX` (just checked).
        return Err(unsafe { count_faulted_read(address, src, size) });
    }
    // SAFETY: the copy returned `Ok`, so all `size` bytes are written. Any bytes are a valid `T`
    // (contract of `Plain`).
    Ok(unsafe { value.assume_init_mut() })
}

/// Counts the bytes that a faulted in-line read moved.
///
/// The bytes are read again to a buffer of this function. If the caller's value were passed here,
/// it would have to live in memory rather than in registers.
///
/// # Safety
///
/// `src` is a guest operand of `size` bytes, which is at most [`IN_LINE_MAX`].
#[cold]
#[inline(never)]
unsafe fn count_faulted_read(address: FaultAddress, src: *const u8, size: usize) -> Fault {
    let mut scratch = [0u8; IN_LINE_MAX];
    let dst = scratch.as_mut_ptr();
    // SAFETY: `src` is a guest operand of `size` bytes, which is at most `IN_LINE_MAX` (this
    // function's contract). `scratch` is a local variable of that length, so the two do not
    // overlap.
    unsafe { copy_below_fault(address, GuestSide::Source, dst, src, size) }
}

/// Writes a value. A naturally aligned value of 1, 2, 4 or 8 bytes is not torn.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`](super)) of `size_of::<T>()` bytes.
#[inline(always)]
pub(crate) unsafe fn write_value<T: Plain>(dst: *mut u8, value: &T) -> Result<(), Fault> {
    let size = size_of::<T>();
    let src = core::ptr::from_ref(value).cast();
    if size > IN_LINE_MAX {
        // SAFETY: `dst` is a guest operand of `size` bytes, by this function's contract. `src` is
        // `size` initialised bytes (contract of `Plain`). No reference covers a guest operand, so
        // it does not overlap `value`.
        return unsafe { copy_to_guest(dst, src, size) };
    }
    // SAFETY: `dst` is a guest operand of `size` bytes, by this function's contract. `src` is
    // `size` initialised bytes (contract of `Plain`).
    match unsafe { write_in_line(dst, src, size) } {
        Ok(()) => Ok(()),
        // SAFETY: `dst` is a guest operand of a `T`, by this function's contract.
        Err(address) => Err(unsafe { count_faulted_write(address, dst, *value) }),
    }
}

/// Counts the bytes that a faulted in-line write moved.
///
/// `value` is passed by value for the reason given at [`count_faulted_read`].
///
/// # Safety
///
/// `dst` is a guest operand of `size_of::<T>()` bytes.
#[cold]
#[inline(never)]
unsafe fn count_faulted_write<T: Plain>(address: FaultAddress, dst: *mut u8, value: T) -> Fault {
    let src = core::ptr::from_ref(&value).cast();
    // SAFETY: `dst` is a guest operand of a `T`, by this function's contract. `src` is a local
    // variable of that type, all of whose bytes are initialised (contract of `Plain`). So the two
    // do not overlap.
    unsafe { copy_below_fault(address, GuestSide::Destination, dst, src, size_of::<T>()) }
}

/// Calls `$move` for parts of a value, in ascending order.
///
/// The parts have 16 bytes each, and then at most one each has 8, 4, 2 and 1. They do not overlap.
///
/// There is no loop: built for size, it would stay one, and its index would keep the value in
/// memory.
macro_rules! for_each_part {
    ($size:ident, $offset:ident, $move:ident) => {
        const { assert!(IN_LINE_MAX == 64, "four parts of 16 bytes") };
        if $size >= 16 {
            $move!(u128);
        }
        if $size >= 32 {
            $move!(u128);
        }
        if $size >= 48 {
            $move!(u128);
        }
        if $size == 64 {
            $move!(u128);
        }
        if $size & 8 != 0 {
            $move!(u64);
        }
        if $size & 4 != 0 {
            $move!(u32);
        }
        if $size & 2 != 0 {
            $move!(u16);
        }
        if $size & 1 != 0 {
            $move!(u8);
        }
        debug_assert!($offset == $size);
    };
}

/// Reads a value of at most [`IN_LINE_MAX`] bytes, in ascending order.
///
/// # Safety
///
/// `src` is a guest operand of `size` bytes. `dst` is valid for writes of `size` bytes.
#[inline(always)]
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn read_in_line(dst: *mut u8, src: *const u8, size: usize) -> Result<(), FaultAddress> {
    let mut offset = 0usize;
    macro_rules! read_part {
        ($integer:ty) => {
            // SAFETY: the bytes of this part are within the guest operand: `for_each_part` keeps
            // the offset plus the size of the part at or below `size`.
            let part = unsafe { <$integer as Register>::load(src.wrapping_add(offset)) }?;
            // SAFETY: the bytes of this part are within the host operand: `for_each_part` keeps
            // the offset plus the size of the part at or below `size`.
            unsafe {
                dst.wrapping_add(offset)
                    .cast::<$integer>()
                    .write_unaligned(part)
            };
            offset = offset.wrapping_add(size_of::<$integer>());
        };
    }
    for_each_part!(size, offset, read_part);
    Ok(())
}

/// Writes a value of at most [`IN_LINE_MAX`] bytes, in ascending order.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes. `src` is valid for reads of `size` initialised bytes.
#[inline(always)]
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn write_in_line(dst: *mut u8, src: *const u8, size: usize) -> Result<(), FaultAddress> {
    let mut offset = 0usize;
    macro_rules! write_part {
        (u128) => {
            // SAFETY: the 16 bytes of this part are within the host operand: `for_each_part` keeps
            // the offset plus the size of the part at or below `size`.
            let part = unsafe { read_as_words(src.wrapping_add(offset)) };
            write_part!(part: u128);
        };
        ($integer:ident) => {
            let from = src.wrapping_add(offset).cast::<$integer>();
            // SAFETY: the bytes of this part are within the host operand: `for_each_part` keeps
            // the offset plus the size of the part at or below `size`.
            let part = unsafe { from.read_unaligned() };
            write_part!(part: $integer);
        };
        ($part:ident: $integer:ident) => {
            // SAFETY: the bytes of this part are within the guest operand: `for_each_part` keeps
            // the offset plus the size of the part at or below `size`.
            unsafe { <$integer as Register>::store(dst.wrapping_add(offset), $part) }?;
            offset = offset.wrapping_add(size_of::<$integer>());
        };
    }
    for_each_part!(size, offset, write_part);
    Ok(())
}

/// Reads 16 bytes of a host operand, as two words.
///
/// Store forwarding works only if a load reads bytes of one earlier store. A value that is written
/// was often stored word by word before, and the compiler keeps such words in registers.
///
/// # Safety
///
/// `src` is valid for reads of 16 initialised bytes.
#[inline(always)]
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn read_as_words(src: *const u8) -> u128 {
    let words = src.cast::<u64>();
    // SAFETY: these are the first 8 of the 16 bytes of this function's contract.
    let first = unsafe { words.read_unaligned() };
    // SAFETY: these are the last 8 of the 16 bytes of this function's contract.
    let second = unsafe { words.wrapping_add(1).read_unaligned() };
    // SAFETY: both types have 16 bytes, and each bit pattern is a `u128`.
    unsafe { transmute::<[u64; 2], u128>([first, second]) }
}
