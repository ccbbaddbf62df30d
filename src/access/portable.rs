//! Guest accesses without assembly, by relaxed atomics: for other targets, for Miri and for ThreadSanitizer.
//!
//! What it leaves open: the standard library forbids atomics of different sizes on the same bytes at the same time ("core::sync::atomic", section
//! "Memory model for atomic accesses"), and a guest may well have one thread of the host read a `u32` where another writes
//! a `u8`. Between accesses of one size it is sound; between sizes it is as good as what the processor does, which on every
//! processor that Rust supports is what `access/mod.rs` promises.

use core::sync::atomic::{fence, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

use super::Fetch;

macro_rules! single_accesses {
    ($($load:ident, $store:ident, $integer:ty, $atomic:ty;)*) => {
        $(
            /// Reads an integer; in one piece if it is aligned.
            ///
            /// # Safety
            ///
            /// `src` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $load(src: *const u8) -> Result<$integer, FaultAddress> {
                let aligned = src.cast::<$atomic>();
                if aligned.is_aligned() {
                    // SAFETY: aligned (just checked), mapped, and covered by no reference but atomics while this one lives (the caller's contract).
                    let atomic = unsafe { &*aligned };
                    return Ok(atomic.load(Ordering::Relaxed));
                }
                let mut bytes = [0u8; size_of::<$integer>()];
                // SAFETY: the caller's contract; the destination is a local variable of that size.
                unsafe { copy_from_guest(bytes.as_mut_ptr(), src, bytes.len()) }?;
                Ok(<$integer>::from_ne_bytes(bytes))
            }

            /// Writes an integer; in one piece if it is aligned.
            ///
            /// # Safety
            ///
            /// `dst` is a guest operand of the integer's size.
            #[inline(always)]
            pub(super) unsafe fn $store(dst: *mut u8, value: $integer) -> Result<(), FaultAddress> {
                let aligned = dst.cast::<$atomic>();
                if aligned.is_aligned() {
                    // SAFETY: aligned (just checked), mapped, and covered by no reference but atomics while this one lives (the caller's contract).
                    let atomic = unsafe { &*aligned };
                    atomic.store(value, Ordering::Relaxed);
                    return Ok(());
                }
                let bytes = value.to_ne_bytes();
                // SAFETY: the caller's contract; the source is a local variable of that size.
                unsafe { copy_to_guest(dst, bytes.as_ptr(), bytes.len()) }
            }
        )*
    };
}

/// A fault's address: none is ever found, since no fault is recovered from here.
pub(super) type FaultAddress = core::num::NonZeroUsize;

/// Reads a byte.
///
/// # Safety
///
/// `src` is a guest operand of 1 byte.
#[inline(always)]
pub(super) unsafe fn load_u8(src: *const u8) -> Result<u8, FaultAddress> {
    // SAFETY: mapped, and covered by no reference but atomics while this one lives (the caller's contract).
    let atomic = unsafe { &*src.cast::<AtomicU8>() };
    Ok(atomic.load(Ordering::Relaxed))
}

/// Writes a byte.
///
/// # Safety
///
/// `dst` is a guest operand of 1 byte.
#[inline(always)]
pub(super) unsafe fn store_u8(dst: *mut u8, value: u8) -> Result<(), FaultAddress> {
    // SAFETY: mapped, and covered by no reference but atomics while this one lives (the caller's contract).
    let atomic = unsafe { &*dst.cast::<AtomicU8>() };
    atomic.store(value, Ordering::Relaxed);
    Ok(())
}

single_accesses! {
    load_u16, store_u16, u16, AtomicU16;
    load_u32, store_u32, u32, AtomicU32;
    load_u64, store_u64, u64, AtomicU64;
}

/// Reads 16 bytes.
///
/// # Safety
///
/// `src` is a guest operand of 16 bytes.
#[inline]
pub(super) unsafe fn load_u128(src: *const u8) -> Result<u128, FaultAddress> {
    let mut bytes = [0u8; 16];
    // SAFETY: the caller's contract; the destination is a local variable of that size.
    unsafe { copy_from_guest(bytes.as_mut_ptr(), src, bytes.len()) }?;
    Ok(u128::from_ne_bytes(bytes))
}

/// Writes 16 bytes.
///
/// # Safety
///
/// `dst` is a guest operand of 16 bytes.
#[inline]
pub(super) unsafe fn store_u128(dst: *mut u8, value: u128) -> Result<(), FaultAddress> {
    let bytes = value.to_ne_bytes();
    // SAFETY: the caller's contract; the source is a local variable of that size.
    unsafe { copy_to_guest(dst, bytes.as_ptr(), bytes.len()) }
}

/// Reads `size` bytes (1, 2, 4 or 8) in one piece, and extends them with zeroes.
///
/// # Safety
///
/// `src` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
pub(super) unsafe fn load_ordered(
    src: *const u8,
    size: usize,
    order: Ordering,
) -> Result<u64, FaultAddress> {
    if order == Ordering::SeqCst {
        // A sequentially consistent load, by fences around a relaxed one.
        fence(Ordering::SeqCst);
    }
    let bits = match size {
        // SAFETY: the caller's contract, for each width.
        1 => u64::from(unsafe { load_u8(src) }?),
        // SAFETY: as above.
        2 => u64::from(unsafe { load_u16(src) }?),
        // SAFETY: as above.
        4 => u64::from(unsafe { load_u32(src) }?),
        // SAFETY: as above.
        _ => unsafe { load_u64(src) }?,
    };
    if order != Ordering::Relaxed {
        fence(Ordering::Acquire);
    }
    Ok(bits)
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `bits` in one piece.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline(always)]
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the low bytes are what is wanted"
)]
pub(super) unsafe fn store_ordered(
    dst: *mut u8,
    bits: u64,
    size: usize,
    order: Ordering,
) -> Result<(), FaultAddress> {
    if order != Ordering::Relaxed {
        fence(Ordering::Release);
    }
    match size {
        // SAFETY: the caller's contract, for each width.
        1 => unsafe { store_u8(dst, bits as u8) }?,
        // SAFETY: as above.
        2 => unsafe { store_u16(dst, bits as u16) }?,
        // SAFETY: as above.
        4 => unsafe { store_u32(dst, bits as u32) }?,
        // SAFETY: as above.
        _ => unsafe { store_u64(dst, bits) }?,
    }
    if order == Ordering::SeqCst {
        fence(Ordering::SeqCst);
    }
    Ok(())
}

/// Changes `size` bytes (1, 2, 4 or 8) in one piece, and returns what was there, extended with zeroes.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline]
pub(super) unsafe fn fetch(
    dst: *mut u8,
    change: Fetch,
    operand: u64,
    size: usize,
    order: Ordering,
) -> Result<u64, FaultAddress> {
    // SAFETY: the caller's contract.
    let mut seen = unsafe { load_ordered(dst, size, Ordering::Relaxed) }?;
    loop {
        // Bits above the size are of no interest.
        let wanted = match change {
            Fetch::Swap => operand,
            Fetch::Add => seen.wrapping_add(operand),
            Fetch::And => seen & operand,
            Fetch::Or => seen | operand,
        };
        // SAFETY: the caller's contract.
        match unsafe { compare_exchange(dst, seen, wanted, size, order, Ordering::Relaxed) }? {
            previous if previous == seen => return Ok(seen),
            previous => seen = previous,
        }
    }
}

/// Writes the low `size` bytes (1, 2, 4 or 8) of `new` in one piece if those of `current` are there, and returns what was there, extended with
/// zeroes.
///
/// # Safety
///
/// `dst` is a guest operand of `size` bytes, aligned to it.
#[inline]
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the low bytes are what is wanted"
)]
pub(super) unsafe fn compare_exchange(
    dst: *mut u8,
    current: u64,
    new: u64,
    size: usize,
    success: Ordering,
    failure: Ordering,
) -> Result<u64, FaultAddress> {
    let either = match size {
        1 => {
            // SAFETY: mapped, and covered by no reference but atomics while this one lives (the caller's contract).
            let atomic = unsafe { &*dst.cast::<AtomicU8>() };
            let answer = atomic.compare_exchange(current as u8, new as u8, success, failure);
            answer.map(u64::from).map_err(u64::from)
        }
        2 => {
            // SAFETY: as above, and aligned by the same contract.
            let atomic = unsafe { &*dst.cast::<AtomicU16>() };
            let answer = atomic.compare_exchange(current as u16, new as u16, success, failure);
            answer.map(u64::from).map_err(u64::from)
        }
        4 => {
            // SAFETY: as above.
            let atomic = unsafe { &*dst.cast::<AtomicU32>() };
            let answer = atomic.compare_exchange(current as u32, new as u32, success, failure);
            answer.map(u64::from).map_err(u64::from)
        }
        _ => {
            // SAFETY: as above.
            let atomic = unsafe { &*dst.cast::<AtomicU64>() };
            atomic.compare_exchange(current, new, success, failure)
        }
    };
    Ok(match either {
        Ok(previous) | Err(previous) => previous,
    })
}

/// Writes `len` times the byte `value`.
///
/// # Safety
///
/// `dst` is a guest operand of `len` bytes.
pub(super) unsafe fn fill_guest(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
    for index in 0..len {
        // SAFETY: one byte of the operand: `index` is below `len`.
        unsafe { store_u8(dst.wrapping_add(index), value) }?;
    }
    Ok(())
}

/// Copies `len` bytes, in one piece if they are 2, 4 or 8 at an address aligned to that.
///
/// # Safety
///
/// As [`super::copy_from_guest`].
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
pub(super) unsafe fn copy_from_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    match len {
        2 if src.cast::<u16>().is_aligned() => {
            // SAFETY: the caller's contract, for two bytes.
            let value = unsafe { load_u16(src) }?;
            // SAFETY: two bytes of the host's, by the same.
            unsafe { dst.cast::<u16>().write_unaligned(value) };
        }
        4 if src.cast::<u32>().is_aligned() => {
            // SAFETY: the caller's contract, for four bytes.
            let value = unsafe { load_u32(src) }?;
            // SAFETY: four bytes of the host's, by the same.
            unsafe { dst.cast::<u32>().write_unaligned(value) };
        }
        8 if src.cast::<AtomicU64>().is_aligned() => {
            // SAFETY: the caller's contract, for eight bytes.
            let value = unsafe { load_u64(src) }?;
            // SAFETY: eight bytes of the host's, by the same.
            unsafe { dst.cast::<u64>().write_unaligned(value) };
        }
        _ => {
            for index in 0..len {
                let (src, dst) = (src.wrapping_add(index), dst.wrapping_add(index));
                // SAFETY: one byte of the guest operand: `index` is below `len`.
                let value = unsafe { load_u8(src) }?;
                // SAFETY: one byte of the host operand: `index` is below `len`.
                unsafe { dst.write(value) };
            }
        }
    }
    Ok(())
}

/// Copies `len` bytes, in one piece if they are 2, 4 or 8 at an address aligned to that.
///
/// # Safety
///
/// As [`super::copy_to_guest`].
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
pub(super) unsafe fn copy_to_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    match len {
        2 if dst.cast::<u16>().is_aligned() => {
            // SAFETY: two bytes of the host's, by the caller's contract.
            let value = unsafe { src.cast::<u16>().read_unaligned() };
            // SAFETY: two bytes of the guest's, by the same.
            unsafe { store_u16(dst, value) }?;
        }
        4 if dst.cast::<u32>().is_aligned() => {
            // SAFETY: four bytes of the host's, by the caller's contract.
            let value = unsafe { src.cast::<u32>().read_unaligned() };
            // SAFETY: four bytes of the guest's, by the same.
            unsafe { store_u32(dst, value) }?;
        }
        8 if dst.cast::<AtomicU64>().is_aligned() => {
            // SAFETY: eight bytes of the host's, by the caller's contract.
            let value = unsafe { src.cast::<u64>().read_unaligned() };
            // SAFETY: eight bytes of the guest's, by the same.
            unsafe { store_u64(dst, value) }?;
        }
        _ => {
            for index in 0..len {
                let (src, dst) = (src.wrapping_add(index), dst.wrapping_add(index));
                // SAFETY: one byte of the host operand: `index` is below `len`.
                let value = unsafe { src.read() };
                // SAFETY: one byte of the guest operand: `index` is below `len`.
                unsafe { store_u8(dst, value) }?;
            }
        }
    }
    Ok(())
}

/// All copies begin with the lowest byte here (and no fault is recovered from).
pub(super) use self::{
    copy_from_guest as copy_from_guest_ascending, copy_to_guest as copy_to_guest_ascending,
    copy_within_guest as copy_within_guest_ascending, fill_guest as fill_guest_ascending,
};

/// Copies `len` bytes between ranges that may overlap, in one piece if they are 2, 4 or 8 and both ends are aligned to that.
///
/// # Safety
///
/// As [`super::copy_within_guest`].
pub(super) unsafe fn copy_within_guest(
    dst: *mut u8,
    src: *const u8,
    len: usize,
) -> Result<(), FaultAddress> {
    if matches!(len, 2 | 4 | 8) {
        let mut bytes = [0u8; 8];
        // SAFETY: the caller's contract for the source; `bytes` is at least as long.
        unsafe { copy_from_guest(bytes.as_mut_ptr(), src, len) }?;
        // SAFETY: the caller's contract for the destination; `bytes` is at least as long.
        return unsafe { copy_to_guest(dst, bytes.as_ptr(), len) };
    }
    // If the destination begins in the source, the highest bytes go first: each is read before it is overwritten.
    let descending = dst.addr().wrapping_sub(src.addr()) < len;
    for step in 0..len {
        let index = if descending {
            len.wrapping_sub(step).wrapping_sub(1)
        } else {
            step
        };
        let (src, dst) = (src.wrapping_add(index), dst.wrapping_add(index));
        // SAFETY: one byte of the source operand: `index` is below `len`.
        let value = unsafe { load_u8(src) }?;
        // SAFETY: one byte of the destination operand: `index` is below `len`.
        unsafe { store_u8(dst, value) }?;
    }
    Ok(())
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) one by one, ascending.
///
/// # Safety
///
/// As [`super::copy_from_guest`] for `count * size` bytes; `src` is a multiple of `size`.
pub(super) unsafe fn copy_elements_from_guest(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), FaultAddress> {
    for index in 0..count {
        let offset = index.wrapping_mul(size);
        let (src, dst) = (src.wrapping_add(offset), dst.wrapping_add(offset));
        // SAFETY: `size` bytes of both operands: `index` is below `count`.
        unsafe { copy_from_guest(dst, src, size) }?;
    }
    Ok(())
}

/// Copies `count` elements of `size` bytes (2, 4 or 8) one by one, ascending.
///
/// # Safety
///
/// As [`super::copy_to_guest`] for `count * size` bytes; `dst` is a multiple of `size`.
pub(super) unsafe fn copy_elements_to_guest(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    size: usize,
) -> Result<(), FaultAddress> {
    for index in 0..count {
        let offset = index.wrapping_mul(size);
        let (src, dst) = (src.wrapping_add(offset), dst.wrapping_add(offset));
        // SAFETY: `size` bytes of both operands: `index` is below `count`.
        unsafe { copy_to_guest(dst, src, size) }?;
    }
    Ok(())
}
