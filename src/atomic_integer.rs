//! The integers that [`Bytes::load`](crate::Bytes::load) and [`Bytes::store`](crate::Bytes::store) move in one piece.

use core::sync::atomic::Ordering;

/// An atomic integer of the standard library.
///
/// # Safety
///
/// The type must consist of atomic integers of [`core::sync::atomic`] and of nothing else (`AtomicBool` and `AtomicPtr`
/// excepted: not every bit pattern is a value of theirs), without padding. Guest bytes of any value are taken for it.
pub unsafe trait AtomicInteger: Sync + Send {
    /// The plain integer that the atomic one holds.
    type V;

    /// Makes an atomic integer of a plain one.
    fn new(v: Self::V) -> Self;

    /// Reads the value.
    ///
    /// # Panics
    ///
    /// If `order` is `Release` or `AcqRel`, as the standard library's atomics do.
    fn load(&self, order: Ordering) -> Self::V;

    /// Writes the value.
    ///
    /// # Panics
    ///
    /// If `order` is `Acquire` or `AcqRel`, as the standard library's atomics do.
    fn store(&self, val: Self::V, order: Ordering);
}

macro_rules! impl_atomic_integer {
    ($($atomic:ident: $plain:ty, $width:literal;)*) => {
        $(
            // SAFETY: the type is itself an atomic integer of `core::sync::atomic`.
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
    fn every_width_holds_its_extremes() {
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
