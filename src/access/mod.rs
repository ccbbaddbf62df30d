//! The only code that reads or writes guest bytes.
//!
//! # What makes guest memory different
//!
//! Other writers are at work on it all the time: the guest's CPUs, which the compiler cannot see; devices of other processes;
//! other threads of this one, through this crate. Rust has no plain access for that: two accesses of which one writes race,
//! and a race is undefined behaviour; the standard library's atomics may not be of different sizes on the same bytes.
//!
//! # The model
//!
//! Guest bytes are therefore moved by assembly (`x86_64.rs`, `aarch64.rs`), at every size. To the language, each block of assembly stands for
//! relaxed atomic accesses of single bytes, which may overlap others as they like, and the rest of what is promised here
//! is a property of the instructions chosen:
//!
//! 1. A naturally aligned access of 1, 2, 4 or 8 bytes is one instruction, and never torn: [`read_value`], [`write_value`], and
//!    every copy of exactly that size and alignment.
//! 2. [`copy_elements_from_guest`] and [`copy_elements_to_guest`] move each naturally aligned element of 2, 4 or 8 bytes in one
//!    piece, in ascending order; except that within an aligned 32 bytes, which may be moved together, there is none. Single bytes are a bulk copy.
//! 3. [`load_ordered`], [`store_ordered`], [`fetch`] and [`compare_exchange`] add the ordering asked for. The others have none among themselves, except
//!    that the compiler moves no block of assembly across another.
//! 4. A bulk copy may move its bytes in any order and more than once. All of them have been moved when it returns, before
//!    any later store of this thread.
//!
//! `portable.rs` stands in on targets without assembly of their own, and where no assembly can run (Miri, ThreadSanitizer, with
//! `--cfg vm_memory_portable`). It keeps 1 to 4 on the processor, and says what it leaves open in the language.
//!
//! # What the callers keep
//!
//! Every function's contract is the same. For the guest operand: the bytes lie in memory that is mapped for the access at
//! least as long as the call lasts, and no reference of Rust's (`&T`, `&mut T`, a slice) covers any of them. For the host operand: as
//! for a plain copy. Nothing is assumed about the *values* of guest bytes. The functions mark nothing dirty and check no
//! bounds: whoever calls does, before and after.
//!
//! # Faults
//!
//! A page can go away under a mapping (a file truncated, a page poisoned). Where [`fault`] is installed, an access that meets such a page ends
//! with a [`Fault`]; otherwise it kills the process, as it does for a plain copy. A kernel answers with the address that faulted and nothing
//! else. What was done until then is found out by doing it again ([`recover`]): the bytes below that address are moved once more, and if
//! that meets another fault, those below that one. So the count is exact, and no kernel keeps one.

use core::mem::{size_of, transmute_copy, MaybeUninit};
use core::sync::atomic::Ordering;

use fault::Direction;
use kernel::FaultAddress;

use crate::atomic_integer::AtomicInteger;
use crate::bytes::{is_register_sized, AtomicAccess, ByteValued};

// Assembly is for ELF: on other formats (Mach-O, COFF) it would have no table of faults, and nobody has run it there.
#[cfg_attr(
    all(
        target_arch = "x86_64",
        target_pointer_width = "64",
        all(unix, not(target_vendor = "apple"), not(miri), not(vm_memory_portable))
    ),
    path = "x86_64.rs"
)]
#[cfg_attr(
    all(
        target_arch = "aarch64",
        target_pointer_width = "64",
        target_endian = "little",
        all(unix, not(target_vendor = "apple"), not(miri), not(vm_memory_portable))
    ),
    path = "aarch64.rs"
)]
#[cfg_attr(
    not(all(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_pointer_width = "64",
        target_endian = "little",
        all(unix, not(target_vendor = "apple"), not(miri), not(vm_memory_portable))
    )),
    path = "portable.rs"
)]
mod kernel;

/// The portable kernels, built for their tests beside the ones in use.
#[cfg(all(test, not(miri), not(vm_memory_portable)))]
mod portable;

pub mod fault;
mod within;

pub(crate) use within::copy_within_guest;

#[cfg(test)]
mod tests;

/// An access that met a page which is not there.
///
/// What there is to know about it, [`fault::last`] tells the thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    completed: usize,
}

impl Fault {
    /// How many bytes had been moved, from the first on.
    pub(crate) fn completed(self) -> usize {
        self.completed
    }
}

/// Notes a fault at `address`, in the operand at `guest`, after that many bytes.
#[cold]
fn met(address: FaultAddress, guest: *const u8, direction: Direction, completed: usize) -> Fault {
    // A memory error may be reported with the start of its page.
    fault::note(address.get().max(guest.addr()), direction, completed);
    Fault { completed }
}

/// Finds out how many bytes a copy had moved when it faulted, by copying those once more.
///
/// `operand_of` tells which guest operand an address lies in, of `len` bytes. `copy` copies the first bytes of the same operands. Each round
/// is shorter than the one before; since `copy` moves the lowest first, there are two or three, unless more pages go away meanwhile.
#[cold]
fn recover(
    address: FaultAddress,
    len: usize,
    operand_of: impl Fn(FaultAddress) -> (*const u8, Direction),
    mut copy: impl FnMut(usize) -> Result<(), FaultAddress>,
) -> Fault {
    let mut address = address;
    let mut completed = len;
    loop {
        let (guest, direction) = operand_of(address);
        let below = address.get().saturating_sub(guest.addr());
        completed = below.min(completed.saturating_sub(1));
        match copy(completed) {
            Ok(()) => return met(address, guest, direction, completed),
            Err(lower) => address = lower,
        }
    }
}

/// Whether two ranges of the same length have a byte in common.
#[inline(always)]
fn overlap(one: *const u8, other: *const u8, len: usize) -> bool {
    let distance = one.addr().wrapping_sub(other.addr());
    distance < len || distance.wrapping_neg() < len
}

/// Reads a value from guest memory; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
///
/// The value is written where the caller wants it: handed on by value through the layers above, a large one would be copied from each into the next.
///
/// # Safety
///
/// `src` is a guest operand (see the module) of `size_of::<T>()` bytes.
#[inline(always)]
pub(crate) unsafe fn read_value<T: ByteValued>(
    value: &mut MaybeUninit<T>,
    src: *const u8,
) -> Result<&mut T, Fault> {
    let size = size_of::<T>();
    let dst = value.as_mut_ptr().cast();
    if size > IN_LINE_MAX {
        // SAFETY: the caller's contract; the destination is the caller's own `size` bytes.
        unsafe { copy_from_guest(dst, src, size) }?;
    // SAFETY: as above, and no more than `IN_LINE_MAX`.
    } else if let Err(address) = unsafe { read_in_line(dst, src, size) } {
        // SAFETY: the caller's contract.
        return Err(unsafe { recover_value_from_guest::<T>(address, src) });
    }
    // SAFETY: all `size` bytes have been written, and any bytes are a `T`.
    Ok(unsafe { value.assume_init_mut() })
}

/// [`recover`] for a value that was read in line. It is read again to another place: the caller's never leaves registers where nobody points at it.
///
/// # Safety
///
/// As [`read_value`].
#[cold]
#[inline(never)]
unsafe fn recover_value_from_guest<T: ByteValued>(address: FaultAddress, src: *const u8) -> Fault {
    let mut scratch = MaybeUninit::<T>::uninit();
    // SAFETY: the caller's contract; the destination is a local variable of that size.
    unsafe { recover_from_guest(address, scratch.as_mut_ptr().cast(), src, size_of::<T>()) }
}

/// Writes a value to guest memory; in one piece if it is a naturally aligned one of 1, 2, 4 or 8 bytes.
///
/// # Safety
///
/// `dst` is a guest operand (see the module) of `size_of::<T>()` bytes.
#[inline(always)]
pub(crate) unsafe fn write_value<T: ByteValued>(dst: *mut u8, value: &T) -> Result<(), Fault> {
    let size = size_of::<T>();
    let src = core::ptr::from_ref(value).cast();
    if size > IN_LINE_MAX {
        // SAFETY: the caller's contract; the source is `size` bytes, which are initialised, as all bytes of a `T`.
        return unsafe { copy_to_guest(dst, src, size) };
    }
    // SAFETY: as above, and no more than `IN_LINE_MAX`.
    match unsafe { write_in_line(dst, src, size) } {
        Ok(()) => Ok(()),
        // SAFETY: the caller's contract.
        Err(address) => Err(unsafe { recover_value_to_guest(address, dst, *value) }),
    }
}

/// [`recover`] for a value that was written in line; see [`recover_value_from_guest`].
///
/// # Safety
///
/// As [`write_value`].
#[cold]
#[inline(never)]
unsafe fn recover_value_to_guest<T: ByteValued>(
    address: FaultAddress,
    dst: *mut u8,
    value: T,
) -> Fault {
    // SAFETY: the caller's contract; the source is a local variable of that size.
    unsafe {
        recover_to_guest(
            address,
            dst,
            core::ptr::from_ref(&value).cast(),
            size_of::<T>(),
        )
    }
}

/// Values of up to so many bytes are moved in line: a descriptor of a virtqueue, a request's header. (bench, "read_obj.s16" and "read_obj.s64".)
const IN_LINE_MAX: usize = 64;

/// Reads a value of at most [`IN_LINE_MAX`] bytes, the lowest first: 16 at a time, then what is left in one piece of each smaller power of two. None
/// overlaps another: the value is next read in larger pieces, which the processor can put together from one store each and not from two.
///
/// # Safety
///
/// As [`copy_from_guest`].
#[inline(always)]
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn read_in_line(dst: *mut u8, src: *const u8, size: usize) -> Result<(), FaultAddress> {
    let mut at = 0usize;
    macro_rules! piece {
        ($len:literal, $load:ident, $integer:ty) => {
            // SAFETY: the caller's contract for `len` bytes, which end with the operand or before.
            let piece = unsafe { kernel::$load(src.wrapping_add(at)) }?;
            // SAFETY: as many bytes of the host's, by the same.
            unsafe {
                dst.wrapping_add(at)
                    .cast::<$integer>()
                    .write_unaligned(piece)
            };
            at = at.wrapping_add($len);
        };
    }
    while size.wrapping_sub(at) >= 16 {
        piece!(16, load_u128, u128);
    }
    if size & 8 != 0 {
        piece!(8, load_u64, u64);
    }
    if size & 4 != 0 {
        piece!(4, load_u32, u32);
    }
    if size & 2 != 0 {
        piece!(2, load_u16, u16);
    }
    if size & 1 != 0 {
        piece!(1, load_u8, u8);
    }
    debug_assert!(at == size);
    Ok(())
}

/// Writes a value of at most [`IN_LINE_MAX`] bytes as [`read_in_line`] reads one.
///
/// # Safety
///
/// As [`copy_to_guest`].
#[inline(always)]
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn write_in_line(dst: *mut u8, src: *const u8, size: usize) -> Result<(), FaultAddress> {
    let mut at = 0usize;
    macro_rules! piece {
        ($len:literal, $store:ident, $integer:ty) => {
            // SAFETY: the caller's contract for `len` bytes of the host's, which end with the operand or before.
            let piece = unsafe { src.wrapping_add(at).cast::<$integer>().read_unaligned() };
            // SAFETY: as many bytes of the guest's, by the same.
            unsafe { kernel::$store(dst.wrapping_add(at), piece) }?;
            at = at.wrapping_add($len);
        };
    }
    while size.wrapping_sub(at) >= 16 {
        piece!(16, store_u128, u128);
    }
    if size & 8 != 0 {
        piece!(8, store_u64, u64);
    }
    if size & 4 != 0 {
        piece!(4, store_u32, u32);
    }
    if size & 2 != 0 {
        piece!(2, store_u16, u16);
    }
    if size & 1 != 0 {
        piece!(1, store_u8, u8);
    }
    debug_assert!(at == size);
    Ok(())
}

/// Reads an integer from guest memory in one piece, with an ordering.
///
/// # Panics
///
/// If `order` is `Release` or `AcqRel`.
///
/// # Safety
///
/// `src` is a guest operand (see the module) of `size_of::<T::A>()` bytes, aligned for `T::A`.
#[inline(always)]
pub(crate) unsafe fn load_ordered<T: AtomicAccess>(
    src: *const u8,
    order: Ordering,
) -> Result<T, Fault> {
    assert!(
        matches!(
            order,
            Ordering::Relaxed | Ordering::Acquire | Ordering::SeqCst
        ),
        "a load cannot have the ordering {order:?}"
    );
    if !is_register_sized::<T>() {
        // SAFETY: the caller's contract: mapped, aligned bytes for a `T::A`, which accepts any bytes (the contract of `AtomicInteger`) and is
        // accessed through atomics only while the reference lives.
        let atomic = unsafe { &*src.cast::<T::A>() };
        return Ok(atomic.load(order).into());
    }
    // SAFETY: the caller's contract for as many bytes as `T::A` has, which is 1, 2, 4 or 8 here; aligned for it, which is the same
    // number here.
    let bits = unsafe { kernel::load_ordered(src, size_of::<T::A>(), order) }
        .map_err(|at| met(at, src, Direction::Read, 0))?;
    Ok(from_bits::<T>(bits))
}

/// Writes an integer to guest memory in one piece, with an ordering.
///
/// # Panics
///
/// If `order` is `Acquire` or `AcqRel`.
///
/// # Safety
///
/// `dst` is a guest operand (see the module) of `size_of::<T::A>()` bytes, aligned for `T::A`.
#[inline(always)]
pub(crate) unsafe fn store_ordered<T: AtomicAccess>(
    dst: *mut u8,
    value: T,
    order: Ordering,
) -> Result<(), Fault> {
    assert!(
        matches!(
            order,
            Ordering::Relaxed | Ordering::Release | Ordering::SeqCst
        ),
        "a store cannot have the ordering {order:?}"
    );
    if !is_register_sized::<T>() {
        // SAFETY: as in `load_ordered`.
        let atomic = unsafe { &*dst.cast::<T::A>() };
        atomic.store(value.into(), order);
        return Ok(());
    }
    // SAFETY: the caller's contract for as many bytes as `T::A` has; aligned for it, which is the same number here.
    unsafe { kernel::store_ordered(dst, to_bits(value), size_of::<T::A>(), order) }
        .map_err(|at| met(at, dst, Direction::Write, 0))
}

/// What a read-modify-write makes of what is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fetch {
    /// The operand.
    Swap,
    /// The sum, which wraps.
    Add,
    /// The bits that both have.
    And,
    /// The bits that either has.
    Or,
}

/// Changes an integer in guest memory in one piece, with an ordering, and returns what was there.
///
/// # Safety
///
/// `dst` is a guest operand (see the module) of `size_of::<T::A>()` bytes, aligned for `T::A`, which is [register sized](is_register_sized).
#[inline(always)]
pub(crate) unsafe fn fetch<T: AtomicAccess>(
    dst: *mut u8,
    change: Fetch,
    operand: T,
    order: Ordering,
) -> Result<T, Fault> {
    // SAFETY: the caller's contract for as many bytes as `T::A` has, which is 1, 2, 4 or 8.
    unsafe { kernel::fetch(dst, change, to_bits(operand), size_of::<T::A>(), order) }
        .map(from_bits::<T>)
        .map_err(|at| met(at, dst, Direction::Write, 0))
}

/// Writes an integer to guest memory in one piece if another is there, with an ordering for either case, and returns what was there: `Ok` if it was
/// the one asked for.
///
/// # Panics
///
/// If `failure` is `Release` or `AcqRel`.
///
/// # Safety
///
/// As [`fetch`].
#[inline(always)]
pub(crate) unsafe fn compare_exchange<T: AtomicAccess>(
    dst: *mut u8,
    current: T,
    new: T,
    success: Ordering,
    failure: Ordering,
) -> Result<core::result::Result<T, T>, Fault> {
    assert!(
        matches!(
            failure,
            Ordering::Relaxed | Ordering::Acquire | Ordering::SeqCst
        ),
        "a failed exchange cannot have the ordering {failure:?}"
    );
    let current = to_bits(current);
    // SAFETY: the caller's contract for as many bytes as `T::A` has, which is 1, 2, 4 or 8.
    let previous = unsafe {
        kernel::compare_exchange(
            dst,
            current,
            to_bits(new),
            size_of::<T::A>(),
            success,
            failure,
        )
    }
    .map_err(|at| met(at, dst, Direction::Write, 0))?;
    let value = from_bits::<T>(previous);
    Ok(if previous == current {
        Ok(value)
    } else {
        Err(value)
    })
}

/// An integer as the kernels take it: the bytes of its atomic counterpart, extended with zeroes. The value goes through an atomic integer of this
/// function's own: that leans on nothing but the contract of `AtomicInteger`, and disappears in compilation.
#[inline(always)]
fn to_bits<T: AtomicAccess>(value: T) -> u64 {
    let atomic = T::A::new(value.into());
    match size_of::<T::A>() {
        // SAFETY: `T::A` is 1 byte, and all bytes of an atomic integer are initialised.
        1 => u64::from(unsafe { transmute_copy::<T::A, u8>(&atomic) }),
        // SAFETY: as above, for two bytes.
        2 => u64::from(unsafe { transmute_copy::<T::A, u16>(&atomic) }),
        // SAFETY: as above, for four bytes.
        4 => u64::from(unsafe { transmute_copy::<T::A, u32>(&atomic) }),
        // SAFETY: as above, for eight bytes.
        8 => unsafe { transmute_copy::<T::A, u64>(&atomic) },
        // Not asked for: callers look at `is_register_sized`.
        _ => 0,
    }
}

/// The way of [`to_bits`] backwards.
#[inline(always)]
fn from_bits<T: AtomicAccess>(bits: u64) -> T {
    if size_of::<T::A>() > size_of::<u64>() {
        // Not asked for: callers look at `is_register_sized`.
        return T::zeroed();
    }
    // SAFETY: `T::A` is no larger than 8 bytes (just checked) and takes any bytes (the contract of `AtomicInteger`). (`bits` holds the value in its
    // low bytes, which come first in memory on a little-endian machine; `from_low_bytes` moves them there on a big-endian one.)
    let atomic: T::A = unsafe { transmute_copy(&from_low_bytes(bits, size_of::<T::A>())) };
    atomic.load(Ordering::Relaxed).into()
}

/// Moves the `size` low bytes of a number to where its memory begins.
#[inline(always)]
fn from_low_bytes(bits: u64, size: usize) -> u64 {
    if cfg!(target_endian = "big") {
        let unused_bits = 8usize.saturating_sub(size).saturating_mul(8);
        u32::try_from(unused_bits)
            .ok()
            .and_then(|n| bits.checked_shl(n))
            .unwrap_or(0)
    } else {
        bits
    }
}

/// Copies bytes from guest memory to memory of the host.
///
/// # Safety
///
/// `src` is a guest operand (see the module) of `len` bytes. `dst` is valid for writes of `len` bytes, which do not overlap those
/// of `src`.
#[inline]
pub(crate) unsafe fn copy_from_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), Fault> {
    // SAFETY: the caller's contract covers both operands.
    match unsafe { kernel::copy_from_guest(dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: the caller's contract.
        Err(address) => Err(unsafe { recover_from_guest(address, dst, src, len) }),
    }
}

/// [`recover`] for a copy from guest memory.
///
/// # Safety
///
/// As [`copy_from_guest`].
#[cold]
unsafe fn recover_from_guest(
    address: FaultAddress,
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Fault {
    // SAFETY: the caller's contract, for a first part of the operands.
    let again = |len| unsafe { kernel::copy_from_guest_ascending(dst, src, len) };
    recover(address, len, |_| (src, Direction::Read), again)
}

/// Copies bytes from memory of the host to guest memory.
///
/// # Safety
///
/// `dst` is a guest operand (see the module) of `len` bytes. `src` is valid for reads of `len` initialised bytes, which do not
/// overlap those of `dst`.
#[inline]
pub(crate) unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's contract covers both operands.
    match unsafe { kernel::copy_to_guest(dst, src, len) } {
        Ok(()) => Ok(()),
        // SAFETY: the caller's contract.
        Err(address) => Err(unsafe { recover_to_guest(address, dst, src, len) }),
    }
}

/// [`recover`] for a copy to guest memory.
///
/// # Safety
///
/// As [`copy_to_guest`].
#[cold]
unsafe fn recover_to_guest(
    address: FaultAddress,
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Fault {
    // SAFETY: the caller's contract, for a first part of the operands.
    let again = |len| unsafe { kernel::copy_to_guest_ascending(dst, src, len) };
    recover(address, len, |_| (dst, Direction::Write), again)
}

/// Writes one byte to all of a range of guest memory.
///
/// # Safety
///
/// `dst` is a guest operand (see the module) of `len` bytes.
#[inline]
pub(crate) unsafe fn fill_guest(dst: *mut u8, value: u8, len: usize) -> Result<(), Fault> {
    // SAFETY: the caller's contract.
    let answer = unsafe { kernel::fill_guest(dst, value, len) };
    // SAFETY: as above, for a first part of it.
    let again = |len| unsafe { kernel::fill_guest_ascending(dst, value, len) };
    answer.map_err(|at| recover(at, len, |_| (dst, Direction::Write), again))
}

/// Copies `count` elements of type `T` from guest memory to memory of the host; naturally aligned elements of 1, 2, 4 or 8 bytes each
/// in one piece, in ascending order.
///
/// # Safety
///
/// As [`copy_from_guest`], for `count * size_of::<T>()` bytes, a number that must not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_from_guest<T: ByteValued>(
    dst: *mut T,
    src: *const u8,
    count: usize,
) -> Result<(), Fault> {
    let size = size_of::<T>();
    if moves_whole::<T>(src) {
        // SAFETY: the caller's contract for `count` elements of `size` bytes; `size` is 2, 4 or 8, and `src` a multiple of it.
        let copy =
            |count| unsafe { kernel::copy_elements_from_guest(dst.cast(), src, count, size) };
        let whole = |bytes: usize| bytes.checked_div(size).unwrap_or(0);
        return copy(count).map_err(|at| {
            recover(
                at,
                count.wrapping_mul(size),
                |_| (src, Direction::Read),
                |bytes| copy(whole(bytes)),
            )
        });
    }
    // SAFETY: the caller's contract; the product does not overflow, by the same.
    unsafe { copy_from_guest(dst.cast(), src, count.wrapping_mul(size)) }
}

/// Copies `count` elements of type `T` from memory of the host to guest memory; naturally aligned elements of 1, 2, 4 or 8 bytes each
/// in one piece, in ascending order.
///
/// # Safety
///
/// As [`copy_to_guest`], for `count * size_of::<T>()` bytes, a number that must not overflow.
#[inline]
pub(crate) unsafe fn copy_elements_to_guest<T: ByteValued>(
    dst: *mut u8,
    src: *const T,
    count: usize,
) -> Result<(), Fault> {
    let size = size_of::<T>();
    if moves_whole::<T>(dst) {
        // SAFETY: the caller's contract for `count` elements of `size` bytes; `size` is 2, 4 or 8, and `dst` a multiple of it.
        let copy = |count| unsafe { kernel::copy_elements_to_guest(dst, src.cast(), count, size) };
        let whole = |bytes: usize| bytes.checked_div(size).unwrap_or(0);
        return copy(count).map_err(|at| {
            recover(
                at,
                count.wrapping_mul(size),
                |_| (dst, Direction::Write),
                |bytes| copy(whole(bytes)),
            )
        });
    }
    // SAFETY: the caller's contract; the product does not overflow, by the same.
    unsafe { copy_to_guest(dst, src.cast(), count.wrapping_mul(size)) }
}

/// Whether elements of type `T` at `guest` are ones that must stay whole. (Single bytes cannot be torn.)
#[inline(always)]
fn moves_whole<T>(guest: *const u8) -> bool {
    match size_of::<T>() {
        2 => guest.cast::<u16>().is_aligned(),
        4 => guest.cast::<u32>().is_aligned(),
        8 => guest.addr().is_multiple_of(8),
        _ => false,
    }
}
