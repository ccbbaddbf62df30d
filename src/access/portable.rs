//! Access routines that use relaxed atomics instead of assembly: for other targets, Miri and
//! ThreadSanitizer.
//!
//! The language does not define one case. The standard library forbids concurrent atomic accesses
//! of different sizes to the same bytes ("core::sync::atomic", "Memory model for atomic accesses").
//! One host thread may read a `u32` of guest memory while another writes a `u8` of it. Accesses of
//! one size are sound. For mixed sizes, the compiled code determines the result: one instruction
//! for each load or store. With them, each processor that Rust supports keeps guarantees 1 to 4 of
//! [`access`](super). The order in which other processors see a bulk copy is that of the processor.
//!
//! These routines do not recover from faults.

use core::mem::size_of;
use core::sync::atomic::{fence, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

use super::routine_set::{FaultAddress, Fetch, GuestSide, Register, RoutineSet, Word};

/// The portable routines.
pub(crate) struct Routines;

/// Implements [`Register`] and [`Word`] for an integer, by the atomic of its size.
macro_rules! impl_word {
    ($integer:ty, $atomic:ty) => {
        impl Register<Routines> for $integer {
            #[inline(always)]
            unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
                let aligned = src.cast::<$atomic>();
                if aligned.is_aligned() {
                    // SAFETY: `src` is aligned (just checked) and a guest operand (contract of
                    // `load`): mapped, and covered by no reference except to atomics.
                    let atomic = unsafe { &*aligned };
                    return Ok(atomic.load(Ordering::Relaxed));
                }
                let mut bytes = [0u8; size_of::<$integer>()];
                // SAFETY: `src` is a guest operand of this size (contract of `load`). `bytes` is a
                // local variable of the same size, so the two do not overlap.
                unsafe { copy_from_guest(bytes.as_mut_ptr(), src, bytes.len()) }?;
                Ok(<$integer>::from_ne_bytes(bytes))
            }

            #[inline(always)]
            unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress> {
                let aligned = dst.cast::<$atomic>();
                if aligned.is_aligned() {
                    // SAFETY: `dst` is aligned (just checked) and a guest operand (contract of
                    // `store`): mapped, and covered by no reference except to atomics.
                    let atomic = unsafe { &*aligned };
                    atomic.store(value, Ordering::Relaxed);
                    return Ok(());
                }
                let bytes = value.to_ne_bytes();
                // SAFETY: `dst` is a guest operand of this size (contract of `store`). `bytes` is a
                // local variable of the same size, so the two do not overlap.
                unsafe { copy_to_guest(dst, bytes.as_ptr(), bytes.len()) }
            }
        }

        impl Word<Routines> for $integer {
            #[inline(always)]
            unsafe fn load_ordered(src: *const u8, order: Ordering) -> Result<Self, FaultAddress> {
                if order == Ordering::SeqCst {
                    // Fences around a relaxed load make it sequentially consistent.
                    fence(Ordering::SeqCst);
                }
                // SAFETY: `src` is a guest operand of this integer (contract of `load_ordered`).
                let value = unsafe { <Self as Register<Routines>>::load(src) }?;
                if order != Ordering::Relaxed {
                    fence(Ordering::Acquire);
                }
                Ok(value)
            }

            #[inline(always)]
            unsafe fn store_ordered(
                dst: *mut u8,
                value: Self,
                order: Ordering,
            ) -> Result<(), FaultAddress> {
                if order != Ordering::Relaxed {
                    fence(Ordering::Release);
                }
                // SAFETY: `dst` is a guest operand of this integer (contract of `store_ordered`).
                unsafe { <Self as Register<Routines>>::store(dst, value) }?;
                if order == Ordering::SeqCst {
                    fence(Ordering::SeqCst);
                }
                Ok(())
            }

            #[inline]
            unsafe fn fetch(
                dst: *mut u8,
                change: Fetch,
                operand: Self,
                order: Ordering,
            ) -> Result<Self, FaultAddress> {
                // SAFETY: `dst` is an aligned guest operand (contract of `fetch`): mapped, and
                // covered by no reference except to atomics.
                let atomic = unsafe { &*dst.cast::<$atomic>() };
                Ok(match change {
                    Fetch::Swap => atomic.swap(operand, order),
                    Fetch::Add => atomic.fetch_add(operand, order),
                    Fetch::And => atomic.fetch_and(operand, order),
                    Fetch::Or => atomic.fetch_or(operand, order),
                })
            }

            #[inline]
            unsafe fn compare_exchange(
                dst: *mut u8,
                current: Self,
                new: Self,
                success: Ordering,
                failure: Ordering,
            ) -> Result<Self, FaultAddress> {
                // SAFETY: `dst` is an aligned guest operand (contract of `compare_exchange`):
                // mapped, and covered by no reference except to atomics.
                let atomic = unsafe { &*dst.cast::<$atomic>() };
                let (Ok(previous) | Err(previous)) =
                    atomic.compare_exchange(current, new, success, failure);
                Ok(previous)
            }
        }
    };
}

impl_word!(u8, AtomicU8);
impl_word!(u16, AtomicU16);
impl_word!(u32, AtomicU32);
impl_word!(u64, AtomicU64);

impl Register<Routines> for u128 {
    #[inline]
    unsafe fn load(src: *const u8) -> Result<Self, FaultAddress> {
        let mut bytes = [0u8; 16];
        // SAFETY: `src` is a guest operand of 16 bytes (contract of `load`). `bytes` is a local
        // variable of that size, so the two do not overlap.
        unsafe { copy_from_guest(bytes.as_mut_ptr(), src, bytes.len()) }?;
        Ok(u128::from_ne_bytes(bytes))
    }

    #[inline]
    unsafe fn store(dst: *mut u8, value: Self) -> Result<(), FaultAddress> {
        let bytes = value.to_ne_bytes();
        // SAFETY: `dst` is a guest operand of 16 bytes (contract of `store`). `bytes` is a local
        // variable of that size, so the two do not overlap.
        unsafe { copy_to_guest(dst, bytes.as_ptr(), bytes.len()) }
    }
}

// SAFETY: each routine accesses each byte of its operands once, and no others. Each returns `Ok`
// only after the last byte of the destination is written.
unsafe impl RoutineSet for Routines {
    #[inline]
    unsafe fn copy(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        match side {
            // SAFETY: `src` is a guest operand and `dst` host memory, both of `len` bytes, and they
            // do not overlap (contract of `copy`).
            GuestSide::Source => unsafe { copy_from_guest(dst, src, len) },
            // SAFETY: `dst` is a guest operand and `src` host memory, both of `len` bytes, and they
            // do not overlap (contract of `copy`).
            GuestSide::Destination => unsafe { copy_to_guest(dst, src, len) },
            // SAFETY: both are guest operands of `len` bytes (contract of `copy`).
            GuestSide::Both => unsafe { Self::copy_overlapping(dst, src, len) },
        }
    }

    unsafe fn copy_ascending(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        // `copy` is ascending.
        // SAFETY: both are operands of `len` bytes, which do not overlap, and `side` says which are
        // guest operands (contract of `copy_ascending`).
        unsafe { Self::copy(side, dst, src, len) }
    }

    unsafe fn copy_overlapping(
        dst: *mut u8,
        src: *const u8,
        len: usize,
    ) -> Result<(), FaultAddress> {
        if matches!(len, 2 | 4 | 8) {
            let mut bytes = [0u8; 8];
            // SAFETY: `src` is a guest operand of `len` bytes (contract of `copy_overlapping`).
            // `bytes` is a local variable, at least as long, so the two do not overlap.
            unsafe { copy_from_guest(bytes.as_mut_ptr(), src, len) }?;
            // SAFETY: `dst` is a guest operand of `len` bytes (contract of `copy_overlapping`).
            // `bytes` is a local variable, at least as long, so the two do not overlap.
            return unsafe { copy_to_guest(dst, bytes.as_ptr(), len) };
        }
        // If the destination begins within the source, copy the last byte first: each byte is then
        // read before it is overwritten.
        let descending = dst.addr().wrapping_sub(src.addr()) < len;
        for step in 0..len {
            let index = if descending {
                len.wrapping_sub(step).wrapping_sub(1)
            } else {
                step
            };
            // SAFETY: `index` is below `len`, so this is a byte of `src`, a guest operand of `len`
            // bytes (contract of `copy_overlapping`).
            let value = unsafe { <u8 as Register<Self>>::load(src.wrapping_add(index)) }?;
            // SAFETY: `index` is below `len`, so this is a byte of `dst`, a guest operand of `len`
            // bytes (contract of `copy_overlapping`).
            unsafe { <u8 as Register<Self>>::store(dst.wrapping_add(index), value) }?;
        }
        Ok(())
    }

    unsafe fn fill(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
        for index in 0..len {
            // SAFETY: `index` is below `len`, so this is a byte of `dst`, a guest operand of `len`
            // bytes (contract of `fill`).
            unsafe { <u8 as Register<Self>>::store(dst.wrapping_add(index), value) }?;
        }
        Ok(())
    }

    unsafe fn fill_ascending(dst: *mut u8, value: u8, len: usize) -> Result<(), FaultAddress> {
        // SAFETY: `dst` is a guest operand of `len` bytes (contract of `fill_ascending`).
        unsafe { Self::fill(dst, value, len) }
    }

    unsafe fn copy_elements(
        side: GuestSide,
        dst: *mut u8,
        src: *const u8,
        count: usize,
        size: usize,
    ) -> Result<(), FaultAddress> {
        for index in 0..count {
            let offset = index.wrapping_mul(size);
            let (src, dst) = (src.wrapping_add(offset), dst.wrapping_add(offset));
            // SAFETY: `index` is below `count`, so these are `size` bytes of the operands, which do
            // not overlap; `side` names the guest operand (contract of `copy_elements`).
            unsafe { Self::copy(side, dst, src, size) }?;
        }
        Ok(())
    }
}

/// Copies `len` bytes from guest memory to host memory, in ascending order.
///
/// 2, 4 or 8 naturally aligned bytes are not torn.
///
/// # Safety
///
/// `src` is a guest operand of `len` bytes. `dst` is valid for writes of `len` bytes. The two do
/// not overlap.
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn copy_from_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), FaultAddress> {
    macro_rules! copy_word {
        ($integer:ty) => {{
            // SAFETY: `src` is a guest operand of this size (contract of `copy_from_guest`).
            let value = unsafe { <$integer as Register<Routines>>::load(src) }?;
            // SAFETY: `dst` is valid for writes of this size (contract of `copy_from_guest`).
            unsafe { dst.cast::<$integer>().write_unaligned(value) };
        }};
    }
    match len {
        2 if src.cast::<AtomicU16>().is_aligned() => copy_word!(u16),
        4 if src.cast::<AtomicU32>().is_aligned() => copy_word!(u32),
        8 if src.cast::<AtomicU64>().is_aligned() => copy_word!(u64),
        _ => {
            for index in 0..len {
                // SAFETY: `index` is below `len`, so this is a byte of `src`, a guest operand of
                // `len` bytes (contract of `copy_from_guest`).
                let value = unsafe { <u8 as Register<Routines>>::load(src.wrapping_add(index)) }?;
                // SAFETY: `index` is below `len`, so this is a byte of `dst`, which is valid for
                // writes of `len` bytes (contract of `copy_from_guest`).
                unsafe { dst.wrapping_add(index).write(value) };
            }
        }
    }
    Ok(())
}

/// Copies `len` bytes from host memory to guest memory, in ascending order.
///
/// 2, 4 or 8 naturally aligned bytes are not torn.
///
/// # Safety
///
/// `dst` is a guest operand of `len` bytes. `src` is valid for reads of `len` initialised bytes.
/// The two do not overlap.
#[expect(
    clippy::disallowed_methods,
    reason = "the host operand is plain memory"
)]
unsafe fn copy_to_guest(dst: *mut u8, src: *const u8, len: usize) -> Result<(), FaultAddress> {
    macro_rules! copy_word {
        ($integer:ty) => {{
            // SAFETY: `src` is valid for reads of this size (contract of `copy_to_guest`).
            let value = unsafe { src.cast::<$integer>().read_unaligned() };
            // SAFETY: `dst` is a guest operand of this size (contract of `copy_to_guest`).
            unsafe { <$integer as Register<Routines>>::store(dst, value) }?;
        }};
    }
    match len {
        2 if dst.cast::<AtomicU16>().is_aligned() => copy_word!(u16),
        4 if dst.cast::<AtomicU32>().is_aligned() => copy_word!(u32),
        8 if dst.cast::<AtomicU64>().is_aligned() => copy_word!(u64),
        _ => {
            for index in 0..len {
                // SAFETY: `index` is below `len`, so this is a byte of `src`, which is valid for
                // reads of `len` initialised bytes (contract of `copy_to_guest`).
                let value = unsafe { src.wrapping_add(index).read() };
                // SAFETY: `index` is below `len`, so this is a byte of `dst`, a guest operand of
                // `len` bytes (contract of `copy_to_guest`).
                unsafe { <u8 as Register<Routines>>::store(dst.wrapping_add(index), value) }?;
            }
        }
    }
    Ok(())
}
