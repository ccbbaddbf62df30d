//! Atomic accesses to values of [`AtomicAccess`] types.
//!
//! [`access`] moves words of 1, 2, 4 or 8 bytes. A value is converted to the word of its size
//! through its own atomic integer, and back. The conversion relies only on the contract of
//! [`AtomicInteger`], and compiles to nothing.

use core::mem::{size_of, transmute_copy};
use core::sync::atomic::Ordering;

use crate::access::{self, Fault, Fetch, Word};
use crate::atomic_integer::AtomicInteger;
use crate::value::{is_register_sized, AtomicAccess};

/// Evaluates `$access` with `$word` as the unsigned integer that has the size of `$value::A`.
macro_rules! with_word_of {
    ($value:ident, $word:ident => $access:expr) => {
        match size_of::<$value::A>() {
            1 => {
                type $word = u8;
                $access
            }
            2 => {
                type $word = u16;
                $access
            }
            4 => {
                type $word = u32;
                $access
            }
            _ => {
                type $word = u64;
                $access
            }
        }
    };
}

/// Converts a value to the word that has the bytes of its atomic integer.
#[inline(always)]
fn to_word<T: AtomicAccess, W: Word>(value: T) -> W {
    assert!(size_of::<T::A>() == size_of::<W>());
    let atomic = T::A::new(value.into());
    // SAFETY: the sizes are the same (just checked). All bytes of an atomic integer are initialised
    // (contract of `AtomicInteger`), and any bytes are a `W` (contract of `Plain`).
    unsafe { transmute_copy::<T::A, W>(&atomic) }
}

/// Converts a word to the atomic integer that has its bytes: the inverse of [`to_word`].
///
/// [`value_of`] completes the conversion. This part runs no code of another crate.
#[inline(always)]
fn from_word<T: AtomicAccess, W: Word>(word: W) -> T::A {
    assert!(size_of::<T::A>() == size_of::<W>());
    // SAFETY: the sizes are the same (just checked), and any bytes are an atomic integer (contract
    // of `AtomicInteger`).
    unsafe { transmute_copy::<W, T::A>(&word) }
}

/// Returns the value of an atomic integer. The type of another crate may panic.
#[inline(always)]
pub(super) fn value_of<T: AtomicAccess>(atomic: T::A) -> T {
    atomic.load(Ordering::Relaxed).into()
}

/// Reads a value atomically, with the ordering `order`.
///
/// # Panics
///
/// Panics if `order` is `Release` or `AcqRel`.
///
/// # Safety
///
/// `src` is a guest operand (see [`access`]) of `size_of::<T::A>()` bytes, aligned for `T::A`. If
/// `T` is not [register sized](is_register_sized), it is not null.
#[inline(always)]
pub(super) unsafe fn load<T: AtomicAccess>(src: *const u8, order: Ordering) -> Result<T, Fault> {
    assert!(
        matches!(
            order,
            Ordering::Relaxed | Ordering::Acquire | Ordering::SeqCst
        ),
        "a load cannot have the ordering {order:?}"
    );
    if !is_register_sized::<T>() {
        // SAFETY: `src` is mapped, aligned for `T::A`, not null, and covered by no reference except
        // to atomics (this function's contract). Any bytes are a `T::A` (contract of
        // `AtomicInteger`).
        let atomic = unsafe { &*src.cast::<T::A>() };
        return Ok(atomic.load(order).into());
    }
    with_word_of!(T, W => {
        // SAFETY: `src` is a guest operand of the size of `T::A` (this function's contract), which
        // is that of `W`. It is aligned to that size, as `T` is register sized.
        let word = unsafe { access::load_ordered::<W>(src, order) }?;
        Ok(value_of(from_word::<T, W>(word)))
    })
}

/// Writes a value atomically, with the ordering `order`.
///
/// # Panics
///
/// Panics if `order` is `Acquire` or `AcqRel`.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`]) of `size_of::<T::A>()` bytes, aligned for `T::A`. If
/// `T` is not [register sized](is_register_sized), it is not null.
#[inline(always)]
pub(super) unsafe fn store<T: AtomicAccess>(
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
        // SAFETY: `dst` is mapped, aligned for `T::A`, not null, and covered by no reference except
        // to atomics (this function's contract). Any bytes are a `T::A` (contract of
        // `AtomicInteger`).
        let atomic = unsafe { &*dst.cast::<T::A>() };
        atomic.store(value.into(), order);
        return Ok(());
    }
    with_word_of!(T, W => {
        // SAFETY: `dst` is a guest operand of the size of `T::A` (this function's contract), which
        // is that of `W`. It is aligned to that size, as `T` is register sized.
        unsafe { access::store_ordered::<W>(dst, to_word(value), order) }
    })
}

/// Applies `change` atomically, and returns the previous value, for [`value_of`].
///
/// The caller marks the write before it converts the value.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`]) of `size_of::<T::A>()` bytes, aligned for `T::A`. `T`
/// is [register sized](is_register_sized).
#[inline(always)]
pub(super) unsafe fn fetch<T: AtomicAccess>(
    dst: *mut u8,
    change: Fetch,
    operand: T,
    order: Ordering,
) -> Result<T::A, Fault> {
    with_word_of!(T, W => {
        // SAFETY: `dst` is a guest operand of the size of `T::A`, which is that of `W`. It is
        // aligned to that size, as `T` is register sized (this function's contract).
        let word = unsafe { access::fetch::<W>(dst, change, to_word(operand), order) }?;
        Ok(from_word::<T, W>(word))
    })
}

/// Writes `new` atomically if the value is `current`.
///
/// Returns the previous value, for [`value_of`]: in `Ok` if it was `current`, in `Err` otherwise.
/// The caller marks the write before it converts the value.
///
/// # Panics
///
/// Panics if `failure` is `Release` or `AcqRel`.
///
/// # Safety
///
/// `dst` is a guest operand (see [`access`]) of `size_of::<T::A>()` bytes, aligned for `T::A`. `T`
/// is [register sized](is_register_sized).
#[inline(always)]
pub(super) unsafe fn compare_exchange<T: AtomicAccess>(
    dst: *mut u8,
    current: T,
    new: T,
    success: Ordering,
    failure: Ordering,
) -> Result<Result<T::A, T::A>, Fault> {
    assert!(
        matches!(
            failure,
            Ordering::Relaxed | Ordering::Acquire | Ordering::SeqCst
        ),
        "a failed exchange cannot have the ordering {failure:?}"
    );
    with_word_of!(T, W => {
        let (current, new) = (to_word(current), to_word(new));
        // SAFETY: `dst` is a guest operand of the size of `T::A`, which is that of `W`. It is
        // aligned to that size, as `T` is register sized (this function's contract).
        let result = unsafe { access::compare_exchange::<W>(dst, current, new, success, failure) }?;
        Ok(result.map(from_word::<T, W>).map_err(from_word::<T, W>))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::ByteValued;

    #[test]
    #[should_panic(expected = "a load cannot have the ordering Release")]
    fn load_with_release_panics() {
        let value = 0u32;
        // SAFETY: `value` is a local variable, aligned for its type. The call panics before it
        // reads.
        let _ = unsafe { load::<u32>(core::ptr::from_ref(&value).cast(), Ordering::Release) };
    }

    #[test]
    #[should_panic(expected = "a store cannot have the ordering Acquire")]
    fn store_with_acquire_panics() {
        let mut value = 0u32;
        // SAFETY: `value` is a local variable, aligned for its type. The call panics before it
        // writes.
        let _ = unsafe {
            store(
                core::ptr::from_mut(&mut value).cast(),
                1u32,
                Ordering::Acquire,
            )
        };
    }

    #[test]
    fn load_and_store_of_large_atomic_use_its_own_methods() {
        use core::sync::atomic::AtomicU32;

        #[derive(Clone, Copy, Debug, PartialEq)]
        #[repr(C)]
        struct Triple(u32, u32, u32);
        // SAFETY: three integers of four bytes, without padding.
        unsafe impl ByteValued for Triple {}
        #[repr(C)]
        struct AtomicTriple(AtomicU32, AtomicU32, AtomicU32);
        // SAFETY: consists of atomic integers only.
        unsafe impl AtomicInteger for AtomicTriple {
            type V = Triple;
            fn new(v: Triple) -> Self {
                Self(v.0.into(), v.1.into(), v.2.into())
            }
            fn load(&self, order: Ordering) -> Triple {
                Triple(self.0.load(order), self.1.load(order), self.2.load(order))
            }
            fn store(&self, v: Triple, order: Ordering) {
                self.0.store(v.0, order);
                self.1.store(v.1, order);
                self.2.store(v.2, order);
            }
        }
        impl AtomicAccess for Triple {
            type A = AtomicTriple;
        }
        let mut memory = [0u32; 3];
        let ptr = memory.as_mut_ptr().cast::<u8>();
        // SAFETY: 12 bytes, aligned to 4, that only these calls access.
        unsafe {
            store(ptr, Triple(1, 2, 3), Ordering::SeqCst).unwrap();
            assert_eq!(
                load::<Triple>(ptr, Ordering::Acquire).unwrap(),
                Triple(1, 2, 3)
            );
        }
    }
}
