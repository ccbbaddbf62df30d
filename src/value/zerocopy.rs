//! [`Zerocopy`]: plain values that the crate `zerocopy` has proved.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::ByteValued;

/// A value that `zerocopy` has proved to be plain, as a [`ByteValued`].
///
/// The derive macros of `zerocopy` prove the contract of [`ByteValued`] for more types than
/// `#[derive(ByteValued)]` does, such as generic structs.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Zerocopy};
/// use zerocopy::little_endian::{U32, U64};
/// use zerocopy::{FromBytes, Immutable, IntoBytes};
///
/// #[repr(C)]
/// #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
/// struct Header {
///     kind: U32,
///     reserved: U32,
///     sector: U64,
/// }
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])?;
/// memory.write_slice(&[1; 16], GuestAddress(0x100))?;
/// let Zerocopy(header) = memory.read_obj::<Zerocopy<Header>>(GuestAddress(0x100))?;
/// assert_eq!(header.kind.get(), 0x0101_0101);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Zerocopy<T>(pub T);

// SAFETY: `Zerocopy<T>` has the layout of `T` (`repr(transparent)`). 1. `FromBytes`: every bit
// pattern is valid, so `T` contains no references. `FromBytes` is not implemented for pointers.
// 2. `IntoBytes`: there is no padding. 3. `Immutable`: there is no interior mutability.
unsafe impl<T> ByteValued for Zerocopy<T> where
    T: FromBytes + IntoBytes + Immutable + Copy + Send + Sync
{
}
