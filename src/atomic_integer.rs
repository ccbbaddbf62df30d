//! [`AtomicInteger`]: the integers of [`Bytes::load`](crate::Bytes::load) and
//! [`Bytes::store`](crate::Bytes::store).

use core::sync::atomic::Ordering;

/// An atomic integer of [`core::sync::atomic`].
///
/// [`VolatileMemory::get_atomic_ref`](crate::VolatileMemory::get_atomic_ref) returns references to
/// such integers in volatile memory.
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicU16, Ordering};
/// use vm_memory::{VolatileMemory, VolatileSlice};
///
/// # let mut storage = [0u64; 2];
/// # // SAFETY: `storage` is aligned, outlives the slice, and is accessed only through it.
/// # let slice = unsafe { VolatileSlice::new(storage.as_mut_ptr().cast(), 16) };
/// slice.get_atomic_ref::<AtomicU16>(2)?.store(7, Ordering::Release);
/// assert_eq!(slice.get_ref::<u16>(2)?.load(), 7);
/// # Ok::<(), vm_memory::VolatileMemoryError>(())
/// ```
///
/// # Safety
///
/// Guest bytes of any value are used as a value of the type. It must consist only of the atomic
/// integers of `core::sync::atomic`, without padding. `AtomicBool` and `AtomicPtr` do not qualify,
/// because some bit patterns are invalid for them.
pub unsafe trait AtomicInteger: Sync + Send {
    /// The integer that the atomic holds.
    type V;

    /// Creates an atomic that holds `v`.
    fn new(v: Self::V) -> Self;

    /// Reads the value.
    ///
    /// # Panics
    ///
    /// Panics if `order` is `Release` or `AcqRel`.
    fn load(&self, order: Ordering) -> Self::V;

    /// Writes the value.
    ///
    /// # Panics
    ///
    /// Panics if `order` is `Acquire` or `AcqRel`.
    fn store(&self, val: Self::V, order: Ordering);
}

macro_rules! impl_atomic_integer {
    ($($atomic:ident: $plain:ty, $width:literal;)*) => {
        $(
            // SAFETY: the type is an atomic integer of `core::sync::atomic`.
            #[cfg(target_has_atomic = $width)]
            unsafe impl AtomicInteger for core::sync::atomic::$atomic {
                type V = $plain;

                #[inline]
                fn new(v: $plain) -> Self {
                    Self::new(v)
                }

                #[inline]
                fn load(&self, order: Ordering) -> $plain {
                    self.load(order)
                }

                #[inline]
                fn store(&self, val: $plain, order: Ordering) {
                    self.store(val, order)
                }
            }
        )*
    };
}

impl_atomic_integer! {
    AtomicI8: i8, "8";
    AtomicI16: i16, "16";
    AtomicI32: i32, "32";
    AtomicI64: i64, "64";
    AtomicIsize: isize, "ptr";
    AtomicU8: u8, "8";
    AtomicU16: u16, "16";
    AtomicU32: u32, "32";
    AtomicU64: u64, "64";
    AtomicUsize: usize, "ptr";
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Debug;

    fn check<A: AtomicInteger>(first: A::V, second: A::V)
    where
        A::V: Copy + PartialEq + Debug,
    {
        let atomic = A::new(first);
        assert_eq!(atomic.load(Ordering::Relaxed), first);
        atomic.store(second, Ordering::Release);
        assert_eq!(atomic.load(Ordering::Acquire), second);
    }

    #[test]
    fn load_after_store_returns_extremes_of_every_width() {
        use core::sync::atomic::*;
        check::<AtomicU8>(0, u8::MAX);
        check::<AtomicU16>(0, u16::MAX);
        check::<AtomicU32>(0, u32::MAX);
        check::<AtomicU64>(0, u64::MAX);
        check::<AtomicUsize>(0, usize::MAX);
        check::<AtomicI8>(i8::MIN, i8::MAX);
        check::<AtomicI16>(i16::MIN, i16::MAX);
        check::<AtomicI32>(i32::MIN, i32::MAX);
        check::<AtomicI64>(i64::MIN, i64::MAX);
        check::<AtomicIsize>(isize::MIN, isize::MAX);
    }
}
