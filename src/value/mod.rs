//! Plain values: types that can be copied to and from guest memory byte by byte.

#[cfg(test)]
mod tests;
#[cfg(feature = "zerocopy")]
mod zerocopy;

use core::mem::{align_of, size_of, MaybeUninit};
use core::slice;
use std::io::{Read, Write};

use crate::access::Plain;
use crate::atomic_integer::AtomicInteger;
use crate::volatile_memory::VolatileSlice;

#[cfg(feature = "zerocopy")]
pub use self::zerocopy::Zerocopy;

/// A plain value: every bit pattern of its size is valid, and it has no padding.
///
/// Plain values can be copied to and from guest memory byte by byte. Integers, arrays of plain
/// values and the types of [`endian`](crate::endian) implement this trait. Implement it for a
/// `#[repr(C)]` struct to access a descriptor, a header or a register block as one value.
///
/// # Examples
///
/// ```
/// use vm_memory::{ByteValued, Le16, Le32, Le64};
///
/// /// A descriptor of a split virtqueue (virtio 1.2, section 2.7.5).
/// #[repr(C)]
/// #[derive(Clone, Copy, Default)]
/// struct Descriptor {
///     addr: Le64,
///     len: Le32,
///     flags: Le16,
///     next: Le16,
/// }
/// // SAFETY: the fields are plain values. `repr(C)` places them at offsets 0, 8, 12 and 14 of
/// // 16 bytes, so there is no padding.
/// unsafe impl ByteValued for Descriptor {}
///
/// let descriptor = Descriptor { len: 512.into(), ..Default::default() };
/// assert_eq!(descriptor.as_slice()[8..12], [0, 2, 0, 0]);
/// ```
///
/// # Safety
///
/// A guest chooses the bytes of a value, and other code reads all of them. The type must have:
///
/// - no invalid bit pattern (so no `bool`, `char`, enum or reference),
/// - no padding,
/// - no pointers, references or interior mutability.
///
/// For an `unsafe impl`, the compiler checks none of this. With the feature `derive`,
/// `#[derive(ByteValued)]` implements the trait if it can prove all of it. With the feature
/// `zerocopy`, `Zerocopy` makes plain values of types that the crate `zerocopy` has proved.
#[doc(alias = "Pod")]
#[doc(alias = "FromBytes")]
pub unsafe trait ByteValued: Copy + Send + Sync {
    /// Reinterprets `data` as a reference to a value, without copying.
    ///
    /// Returns `None` if `data` is not exactly `size_of::<Self>()` bytes, is not aligned for
    /// `Self`, or is empty.
    fn from_slice(data: &[u8]) -> Option<&Self> {
        let ptr = data.as_ptr().cast::<Self>();
        if data.is_empty() || data.len() != size_of::<Self>() || !ptr.is_aligned() {
            return None;
        }
        // SAFETY: 1. `ptr` points to `size_of::<Self>()` initialised bytes, aligned for `Self`:
        // both were checked above. 2. `data` borrows them for the lifetime of the result. 3. They
        // are a value of `Self`: the trait's contract excludes invalid bit patterns.
        Some(unsafe { &*ptr })
    }

    /// Reinterprets `data` as a mutable reference to a value, without copying.
    ///
    /// Returns `None` if `data` is not exactly `size_of::<Self>()` bytes, is not aligned for
    /// `Self`, or is empty.
    fn from_mut_slice(data: &mut [u8]) -> Option<&mut Self> {
        let ptr = data.as_mut_ptr().cast::<Self>();
        if data.is_empty() || data.len() != size_of::<Self>() || !ptr.is_aligned() {
            return None;
        }
        // SAFETY: 1. `ptr` points to `size_of::<Self>()` initialised bytes, aligned for `Self`:
        // both were checked above. 2. `data` borrows them exclusively for the lifetime of the
        // result. 3. They are a value of `Self`: the trait's contract excludes invalid bit
        // patterns. 4. A value stored through the result leaves all bytes initialised: the
        // contract excludes padding.
        Some(unsafe { &mut *ptr })
    }

    /// Returns the bytes of the value.
    #[expect(
        clippy::disallowed_methods,
        reason = "the bytes belong to a host value, not to guest memory"
    )]
    fn as_slice(&self) -> &[u8] {
        let ptr = core::ptr::from_ref(self).cast::<u8>();
        // SAFETY: 1. `self` is `size_of::<Self>()` bytes, at most `isize::MAX`. 2. All of them are
        // initialised: the trait's contract excludes padding. 3. They do not change while `self`
        // is borrowed: the contract excludes interior mutability.
        unsafe { slice::from_raw_parts(ptr, size_of::<Self>()) }
    }

    /// Returns the bytes of the value as a mutable slice.
    ///
    /// An array has a method `as_mut_slice` of its own, which returns its elements. For its bytes,
    /// write `ByteValued::as_mut_slice(&mut array)`.
    #[expect(
        clippy::disallowed_methods,
        reason = "the bytes belong to a host value, not to guest memory"
    )]
    fn as_mut_slice(&mut self) -> &mut [u8] {
        let ptr = core::ptr::from_mut(self).cast::<u8>();
        // SAFETY: 1. `self` is `size_of::<Self>()` bytes, at most `isize::MAX`, borrowed
        // exclusively. 2. All of them are initialised: the trait's contract excludes padding.
        // 3. Bytes stored through the result leave a value of `Self`: the contract excludes
        // invalid bit patterns.
        unsafe { slice::from_raw_parts_mut(ptr, size_of::<Self>()) }
    }

    /// Returns the bytes of the value as a [`VolatileSlice`].
    fn as_bytes(&mut self) -> VolatileSlice<'_> {
        VolatileSlice::from(self.as_mut_slice())
    }

    /// Returns the value whose bytes are all zero.
    fn zeroed() -> Self {
        // SAFETY: zeroes are a value of `Self`: the trait's contract excludes invalid bit patterns.
        unsafe { MaybeUninit::<Self>::zeroed().assume_init() }
    }

    /// Writes the bytes of the value to `dst`.
    ///
    /// # Errors
    ///
    /// Returns the error of `dst`. A part of the value may have been written.
    fn write_all_to<W: Write>(&self, mut dst: W) -> std::io::Result<()> {
        dst.write_all(self.as_slice())
    }

    /// Reads a value from `src`.
    ///
    /// # Errors
    ///
    /// Returns the error of `src`, or `ErrorKind::UnexpectedEof` if `src` ends before the value is
    /// complete.
    fn read_exact_from<R: Read>(mut src: R) -> std::io::Result<Self> {
        let mut value = Self::zeroed();
        src.read_exact(value.as_mut_slice())?;
        Ok(value)
    }
}

/// Returns the size of a plain value. For the code of `#[derive(ByteValued)]`.
#[doc(hidden)]
pub const fn plain_size_of<T: ByteValued>() -> usize {
    size_of::<T>()
}

/// Does not compile if a struct is larger than its fields. For the code of `#[derive(ByteValued)]`.
///
/// # Panics
///
/// Panics if the size of `T` is not the sum of the sizes.
#[doc(hidden)]
pub const fn assert_no_padding<T>(mut sizes: &[usize]) {
    let mut rest = size_of::<T>();
    while let [size, others @ ..] = sizes {
        assert!(*size <= rest, "the fields are larger than the struct");
        (rest, sizes) = (rest.saturating_sub(*size), others);
    }
    assert!(rest == 0, "the struct has padding");
}

macro_rules! byte_valued_integers {
    ($($integer:ty),*) => {
        $(
            // SAFETY: A primitive integer has no padding, and every bit pattern is valid.
            unsafe impl ByteValued for $integer {}
        )*
    };
}
byte_valued_integers!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize);

// SAFETY: an array has no padding between or after its elements (Rust reference, "Array layout").
// So each clause of the contract carries over from the element type.
unsafe impl<T: ByteValued, const N: usize> ByteValued for [T; N] {}

// SAFETY: the contract of `ByteValued` contains that of `Plain`: no padding, and every bit pattern
// is a valid value.
unsafe impl<T: ByteValued> Plain for T {}

/// A plain value that can be loaded and stored atomically, through the atomic integer `A`.
///
/// Implemented by the integers of 8 to 64 bits for which the target has atomics.
pub trait AtomicAccess:
    ByteValued
    // The value converts to and from the plain integer of its atomic counterpart.
    + From<<<Self as AtomicAccess>::A as AtomicInteger>::V>
    + Into<<<Self as AtomicAccess>::A as AtomicInteger>::V>
{
    /// The atomic integer of the same size. With another size, each access returns
    /// [`TooBig`](crate::VolatileMemoryError::TooBig).
    type A: AtomicInteger;
}

macro_rules! impl_atomic_access {
    ($($plain:ty: $atomic:ident, $width:literal;)*) => {
        $(
            #[cfg(target_has_atomic = $width)]
            impl AtomicAccess for $plain {
                type A = core::sync::atomic::$atomic;
            }
        )*
    };
}

impl_atomic_access! {
    i8: AtomicI8, "8";
    i16: AtomicI16, "16";
    i32: AtomicI32, "32";
    i64: AtomicI64, "64";
    isize: AtomicIsize, "ptr";
    u8: AtomicU8, "8";
    u16: AtomicU16, "16";
    u32: AtomicU32, "32";
    u64: AtomicU64, "64";
    usize: AtomicUsize, "ptr";
}

/// Returns whether one register can hold a `T`, and `T` has the size of its atomic counterpart.
pub(crate) const fn is_register_sized<T: AtomicAccess>() -> bool {
    matches!(size_of::<T::A>(), 1 | 2 | 4 | 8)
        && size_of::<T::A>() == size_of::<T>()
        && align_of::<T::A>() == size_of::<T::A>()
}
