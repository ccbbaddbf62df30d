//! Plain values, and [`Bytes`]: reading and writing them at an address.

use core::mem::{align_of, size_of, MaybeUninit};
use core::slice;
use core::sync::atomic::Ordering;
use std::io::{Read, Write};

use crate::atomic_integer::AtomicInteger;
use crate::io::{ReadVolatile, WriteVolatile};
use crate::volatile_memory::VolatileSlice;

/// A plain value: any bytes of its size are a value of it, and all its bytes are initialised.
///
/// Such values are copied between host and guest byte by byte. Integers, arrays of such values and the types of
/// [`endian`](crate::endian) are; a `repr(C)` struct of such fields can be.
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
/// // SAFETY: `repr(C)`, 8 + 4 + 2 + 2 bytes at an alignment of 8: no padding; every field takes any bytes.
/// unsafe impl ByteValued for Descriptor {}
///
/// let descriptor = Descriptor { len: 512.into(), ..Default::default() };
/// assert_eq!(descriptor.as_slice()[8..12], [0, 2, 0, 0]);
/// ```
///
/// # Safety
///
/// Every bit pattern of the type's size must be a valid value of it, and it must have no padding, no pointers, references or
/// interior mutability: a guest chooses the bytes, and other code reads them all. A type with padding is caught by no
/// compiler; lay structures out by hand.
pub unsafe trait ByteValued: Copy + Send + Sync {
    /// Reinterprets `data` as a value, without copying.
    ///
    /// `None` if the length is not the size of `Self`, or the bytes do not lie at its alignment; and for a type without a size.
    fn from_slice(data: &[u8]) -> Option<&Self> {
        let ptr = data.as_ptr().cast::<Self>();
        if data.is_empty() || data.len() != size_of::<Self>() || !ptr.is_aligned() {
            return None;
        }
        // SAFETY: 1. `data` is `size_of::<Self>()` initialised bytes, aligned for `Self` (both just checked), and host memory that
        // `data` borrows for as long as the result lives. 2. Any bytes are a value of `Self` (the trait's contract).
        Some(unsafe { &*ptr })
    }

    /// Reinterprets `data` as a value that can be changed in place, without copying.
    ///
    /// `None` if the length is not the size of `Self`, or the bytes do not lie at its alignment; and for a type without a size.
    fn from_mut_slice(data: &mut [u8]) -> Option<&mut Self> {
        let ptr = data.as_mut_ptr().cast::<Self>();
        if data.is_empty() || data.len() != size_of::<Self>() || !ptr.is_aligned() {
            return None;
        }
        // SAFETY: 1. As in `from_slice`, and `data` borrows the bytes exclusively. 2. All bytes of a `Self` are initialised
        // (the trait's contract), so whatever is stored through the result leaves valid `u8`s behind.
        Some(unsafe { &mut *ptr })
    }

    /// Returns the bytes of the value.
    #[expect(
        clippy::disallowed_methods,
        reason = "the bytes of a host value, not of a guest"
    )]
    fn as_slice(&self) -> &[u8] {
        let ptr = core::ptr::from_ref(self).cast::<u8>();
        // SAFETY: `self` is `size_of::<Self>()` bytes, all initialised (the trait's contract), not changing while borrowed (no interior
        // mutability, same contract), and no value is larger than `isize::MAX`.
        unsafe { slice::from_raw_parts(ptr, size_of::<Self>()) } // not guest memory
    }

    /// Returns the bytes of the value, to be changed in place.
    #[expect(
        clippy::disallowed_methods,
        reason = "the bytes of a host value, not of a guest"
    )]
    fn as_mut_slice(&mut self) -> &mut [u8] {
        let ptr = core::ptr::from_mut(self).cast::<u8>();
        // SAFETY: as in `as_slice`; `self` is borrowed exclusively, and any bytes stored are a value of `Self`.
        unsafe { slice::from_raw_parts_mut(ptr, size_of::<Self>()) } // not guest memory
    }

    /// Returns the bytes of the value as a [`VolatileSlice`], for what takes one.
    fn as_bytes(&mut self) -> VolatileSlice<'_> {
        VolatileSlice::from(self.as_mut_slice())
    }

    /// Returns the value whose bytes are all 0.
    fn zeroed() -> Self {
        // SAFETY: all zeroes is a bit pattern, and every bit pattern is a value (the trait's contract).
        unsafe { MaybeUninit::<Self>::zeroed().assume_init() }
    }

    /// Writes the bytes of the value to `dst`.
    ///
    /// # Errors
    ///
    /// What `dst` answers; part of the value may have been written.
    fn write_all_to<W: Write>(&self, mut dst: W) -> std::io::Result<()> {
        dst.write_all(self.as_slice())
    }

    /// Reads a value from `src`.
    ///
    /// # Errors
    ///
    /// What `src` answers; `UnexpectedEof` if it ends first.
    fn read_exact_from<R: Read>(mut src: R) -> std::io::Result<Self> {
        let mut value = Self::zeroed();
        src.read_exact(value.as_mut_slice())?;
        Ok(value)
    }
}

macro_rules! byte_valued_integers {
    ($($integer:ty),*) => {
        $(
            // SAFETY: a plain integer: no padding, and every bit pattern is a value.
            unsafe impl ByteValued for $integer {}
        )*
    };
}
byte_valued_integers!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize);

// SAFETY: an array is its elements one after the other, without padding between or behind them (Rust reference, "Array layout"), so
// every property that the contract asks for carries over from the element.
unsafe impl<T: ByteValued, const N: usize> ByteValued for [T; N] {}

/// A plain value that can be read and written in one piece, through the atomic integer `A`.
///
/// The integers that have an atomic counterpart implement it.
pub trait AtomicAccess:
    ByteValued
    // The value and the integer in the atomic convert into each other.
    + From<<<Self as AtomicAccess>::A as AtomicInteger>::V>
    + Into<<<Self as AtomicAccess>::A as AtomicInteger>::V>
{
    /// The atomic integer of the value's size.
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

/// Whether `T` and its atomic counterpart agree in size and alignment: then they move as one register.
pub(crate) const fn is_register_sized<T: AtomicAccess>() -> bool {
    matches!(size_of::<T::A>(), 1 | 2 | 4 | 8)
        && size_of::<T::A>() == size_of::<T>()
        && align_of::<T::A>() == size_of::<T::A>()
}

/// A range of bytes with addresses of type `A`.
///
/// Implemented by everything that holds guest bytes, each with its own kind of address:
///
/// | type | address |
/// |---|---|
/// | [`GuestMemory`](crate::GuestMemory), a whole memory | [`GuestAddress`](crate::GuestAddress) (an IOVA behind an IOMMU) |
/// | [`GuestMemoryRegion`](crate::GuestMemoryRegion) of ordinary RAM | [`MemoryRegionAddress`](crate::MemoryRegionAddress), from the region's start |
/// | [`VolatileSlice`] | `usize`, from the slice's start |
///
/// `read` is out of the container, `write` into it; so are the streams named: `read_volatile_from` reads from a stream *into* the
/// container, and `write_volatile_to` writes from the container into a stream.
///
/// An access moves as much as lies in the container. The plain forms report how many bytes that was; the forms named `exact`,
/// `all`, `slice` and `obj` fail if it was not everything, and tell how much was done.
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)])?;
/// memory.write_obj(0x1234_5678u32, GuestAddress(0x1ffc))?;
/// assert_eq!(memory.read_obj::<u16>(GuestAddress(0x1ffe))?, 0x1234);
///
/// // Two of four bytes lie in the region.
/// let mut buf = [0; 4];
/// assert_eq!(memory.read(&mut buf, GuestAddress(0x1ffe))?, 2);
/// assert!(memory.read_slice(&mut buf, GuestAddress(0x1ffe)).is_err());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Bytes<A> {
    /// What goes wrong.
    type E;

    /// Writes as many bytes of `buf` at `addr` as fit, and returns how many.
    ///
    /// # Errors
    ///
    /// If `buf` is not empty and not one byte can be written at `addr`.
    fn write(&self, buf: &[u8], addr: A) -> Result<usize, Self::E>;

    /// Reads as many bytes from `addr` into `buf` as there are, and returns how many.
    ///
    /// # Errors
    ///
    /// If `buf` is not empty and not one byte can be read at `addr`.
    fn read(&self, buf: &mut [u8], addr: A) -> Result<usize, Self::E>;

    /// Writes all of `buf` at `addr`.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and if not all of it fits; what fits has been written then.
    fn write_slice(&self, buf: &[u8], addr: A) -> Result<(), Self::E>;

    /// Fills `buf` with the bytes at `addr`.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read), and if there are fewer; those have been read then.
    fn read_slice(&self, buf: &mut [u8], addr: A) -> Result<(), Self::E>;

    /// Writes a value at `addr`.
    ///
    /// A naturally aligned value of 1, 2, 4 or 8 bytes is written in one piece, without any ordering
    /// (see [`store`](Self::store) for that).
    ///
    /// # Errors
    ///
    /// As [`write_slice`](Self::write_slice).
    fn write_obj<T: ByteValued>(&self, val: T, addr: A) -> Result<(), Self::E> {
        self.write_slice(val.as_slice(), addr)
    }

    /// Reads a value from `addr`.
    ///
    /// A naturally aligned value of 1, 2, 4 or 8 bytes is read in one piece, without any ordering
    /// (see [`load`](Self::load) for that).
    ///
    /// # Errors
    ///
    /// As [`read_slice`](Self::read_slice).
    fn read_obj<T: ByteValued>(&self, addr: A) -> Result<T, Self::E> {
        let mut value = T::zeroed();
        self.read_slice(value.as_mut_slice(), addr).map(|()| value)
    }

    /// Reads up to `count` bytes from `src` into the container at `addr`, and returns how many.
    ///
    /// Stops at the first read that delivers less than it was asked for, so the bytes lie without a gap from `addr` on.
    /// A read that is interrupted (`EINTR`) is tried again.
    ///
    /// # Errors
    ///
    /// If `addr` is not in the container, or the first read fails. After bytes have been moved, their count is returned
    /// first; the next call meets the error.
    fn read_volatile_from<F>(&self, addr: A, src: &mut F, count: usize) -> Result<usize, Self::E>
    where
        F: ReadVolatile;

    /// Reads exactly `count` bytes from `src` into the container at `addr`.
    ///
    /// # Errors
    ///
    /// If the container ends, the source ends or a read fails before that.
    fn read_exact_volatile_from<F>(
        &self,
        addr: A,
        src: &mut F,
        count: usize,
    ) -> Result<(), Self::E>
    where
        F: ReadVolatile;

    /// Writes up to `count` bytes from the container at `addr` into `dst`, and returns how many.
    ///
    /// A region or a slice is written with one call of `dst`, which may take less. A whole memory goes on after a short write, until `dst` takes
    /// nothing. A write that is interrupted (`EINTR`) is tried again.
    ///
    /// # Errors
    ///
    /// If `addr` is not in the container, or the first write fails. After bytes have been moved, their count is returned
    /// first; the next call meets the error.
    fn write_volatile_to<F>(&self, addr: A, dst: &mut F, count: usize) -> Result<usize, Self::E>
    where
        F: WriteVolatile;

    /// Writes exactly `count` bytes from the container at `addr` into `dst`.
    ///
    /// # Errors
    ///
    /// If the container ends, `dst` takes no more or a write fails before that.
    fn write_all_volatile_to<F>(&self, addr: A, dst: &mut F, count: usize) -> Result<(), Self::E>
    where
        F: WriteVolatile;

    /// Writes `val` at `addr` in one piece, with the ordering `order`.
    ///
    /// # Errors
    ///
    /// If the value does not lie in the container in one piece, or `addr` is not aligned for it.
    ///
    /// # Panics
    ///
    /// If `order` is `Acquire` or `AcqRel`, which a store cannot have.
    fn store<T: AtomicAccess>(&self, val: T, addr: A, order: Ordering) -> Result<(), Self::E>;

    /// Reads a value at `addr` in one piece, with the ordering `order`.
    ///
    /// # Errors
    ///
    /// If the value does not lie in the container in one piece, or `addr` is not aligned for it.
    ///
    /// # Panics
    ///
    /// If `order` is `Release` or `AcqRel`, which a load cannot have.
    fn load<T: AtomicAccess>(&self, addr: A, order: Ordering) -> Result<T, Self::E>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_slice_wants_size_and_alignment() {
        let mut storage = [0u64; 2];
        let bytes = storage.as_mut_slice();
        let bytes = bytes.first_mut().unwrap().as_mut_slice();
        bytes.copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(u64::from_slice(bytes).map(|v| v.to_le()), Some(1));
        assert!(u32::from_slice(bytes).is_none());
        assert!(u16::from_slice(&bytes[1..3]).is_none());
        *u32::from_mut_slice(&mut bytes[4..]).unwrap() = 2u32.to_le();
        assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0]);
        assert!(u32::from_mut_slice(&mut bytes[3..7]).is_none());
        assert!(<[u8; 0]>::from_slice(&[]).is_none());
    }

    #[test]
    fn values_go_through_streams() {
        let mut stream = Vec::new();
        0x0102_0304u32.write_all_to(&mut stream).unwrap();
        assert_eq!(
            u32::read_exact_from(stream.as_slice()).unwrap(),
            0x0102_0304
        );
        let short = u64::read_exact_from(stream.as_slice()).unwrap_err();
        assert_eq!(short.kind(), std::io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn as_bytes_reaches_the_value() {
        let mut value = 0u32;
        value.as_bytes().write_slice(&[1, 2, 3, 4], 0).unwrap();
        assert_eq!(value, u32::from_ne_bytes([1, 2, 3, 4]));
    }

    /// `Bytes` on a type that implements only what it must: the provided methods do the rest.
    #[test]
    fn provided_methods_work_on_a_minimal_container() {
        struct Minimal(std::cell::RefCell<Vec<u8>>);
        impl Bytes<u8> for Minimal {
            type E = &'static str;
            fn write(&self, buf: &[u8], addr: u8) -> Result<usize, Self::E> {
                self.write_slice(buf, addr).map(|()| buf.len())
            }
            fn read(&self, buf: &mut [u8], addr: u8) -> Result<usize, Self::E> {
                self.read_slice(buf, addr).map(|()| buf.len())
            }
            fn write_slice(&self, buf: &[u8], addr: u8) -> Result<(), Self::E> {
                let range = usize::from(addr)..usize::from(addr) + buf.len();
                self.0
                    .borrow_mut()
                    .get_mut(range)
                    .ok_or("outside")?
                    .copy_from_slice(buf);
                Ok(())
            }
            fn read_slice(&self, buf: &mut [u8], addr: u8) -> Result<(), Self::E> {
                let range = usize::from(addr)..usize::from(addr) + buf.len();
                buf.copy_from_slice(self.0.borrow().get(range).ok_or("outside")?);
                Ok(())
            }
            fn read_volatile_from<F: ReadVolatile>(
                &self,
                _: u8,
                _: &mut F,
                _: usize,
            ) -> Result<usize, Self::E> {
                Err("not a stream")
            }
            fn read_exact_volatile_from<F: ReadVolatile>(
                &self,
                _: u8,
                _: &mut F,
                _: usize,
            ) -> Result<(), Self::E> {
                Err("not a stream")
            }
            fn write_volatile_to<F: WriteVolatile>(
                &self,
                _: u8,
                _: &mut F,
                _: usize,
            ) -> Result<usize, Self::E> {
                Err("not a stream")
            }
            fn write_all_volatile_to<F: WriteVolatile>(
                &self,
                _: u8,
                _: &mut F,
                _: usize,
            ) -> Result<(), Self::E> {
                Err("not a stream")
            }
            fn store<T: AtomicAccess>(&self, _: T, _: u8, _: Ordering) -> Result<(), Self::E> {
                Err("not atomic")
            }
            fn load<T: AtomicAccess>(&self, _: u8, _: Ordering) -> Result<T, Self::E> {
                Err("not atomic")
            }
        }
        let container = Minimal(vec![0; 8].into());
        container.write_obj(0xaabbu16, 6).unwrap();
        assert_eq!(container.read_obj::<u16>(6), Ok(0xaabb));
        assert_eq!(container.read_obj::<u16>(7), Err("outside"));
        assert_eq!(container.write_obj(1u64, 1), Err("outside"));
    }
}
