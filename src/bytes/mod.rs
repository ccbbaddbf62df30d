//! [`Bytes`]: reads and writes at an address.
//!
//! [`Bytes`] is the interface that devices and loaders use most. It reads and writes plain values,
//! byte slices, streams and atomics. Guest memory, its regions and volatile slices implement it.
//!
//! ```text
//!                     exact                          partial
//!   value             read_obj, write_obj
//!   byte slice        read_slice, write_slice        read, write
//!   stream            read_exact_volatile_from,      read_volatile_from,
//!                     write_all_volatile_to          write_volatile_to
//!   atomic            load, store
//! ```
//!
//! # Examples
//!
//! ```
//! use vm_memory::{Bytes, VolatileSlice};
//!
//! let mut buf = [0u8; 8];
//! let memory = VolatileSlice::from(buf.as_mut_slice());
//! memory.write_obj(0x1234_5678u32.to_le(), 2)?;
//! assert_eq!(memory.read_obj::<u8>(5)?, 0x12);
//! # Ok::<(), vm_memory::VolatileMemoryError>(())
//! ```

use core::sync::atomic::Ordering;

use crate::io::{ReadVolatile, WriteVolatile};
#[cfg(feature = "zerocopy")]
pub use crate::value::Zerocopy;
#[doc(hidden)]
pub use crate::value::{assert_no_padding, plain_size_of};
pub use crate::value::{AtomicAccess, ByteValued};

/// A container of bytes that can be read and written at addresses of type `A`.
///
/// | container | address |
/// |---|---|
/// | [`GuestMemory`](crate::GuestMemory) | [`GuestAddress`](crate::GuestAddress): a guest physical address, or an IOVA behind an IOMMU |
/// | [`GuestMemoryRegion`](crate::GuestMemoryRegion) | [`MemoryRegionAddress`](crate::MemoryRegionAddress): an offset in the region |
/// | [`VolatileSlice`](crate::VolatileSlice) | `usize`: an offset in the slice |
///
/// `read` moves bytes out of the container, `write` into it. The stream methods are named from the
/// side of the stream: `read_volatile_from` reads from a stream *into* the container.
///
/// An access moves the bytes that are in the container. The partial methods return their number.
/// The exact methods return an error unless all bytes were moved. `PartialBuffer` contains the
/// number of bytes moved. Other errors do not, and some bytes may have been moved:
///
/// - A [fault](crate::fault) is an `IOError` with `EFAULT`. If a page of a Xen guest cannot be
///   mapped, the error is that of the mapping.
/// - A region or a slice returns the error of the stream. That is `UnexpectedEof` if a source
///   ended, and `WriteZero` if a sink accepts no more bytes.
///
/// A [`GuestMemory`](crate::GuestMemory) returns `PartialBuffer` for a stream that ended or failed
/// after some bytes. It calls [`read_volatile`](ReadVolatile::read_volatile) and
/// [`write_volatile`](WriteVolatile::write_volatile) of a stream, never its exact methods, whose
/// errors have no number. A region or a slice calls the exact methods of the stream.
///
/// Guest bytes may change during an access. The [memory model](crate#memory-model) lists the
/// accesses that are never torn.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)])?;
/// memory.write_obj(0x1234_5678u32.to_le(), GuestAddress(0x1ffc))?;
/// assert_eq!(memory.read_obj::<u16>(GuestAddress(0x1ffe))?, 0x1234u16.to_le());
///
/// // Only two of the four bytes are in the region.
/// let mut buf = [0; 4];
/// assert_eq!(memory.read(&mut buf, GuestAddress(0x1ffe))?, 2);
/// assert!(memory.read_slice(&mut buf, GuestAddress(0x1ffe)).is_err());
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Load a kernel image from a file, without a buffer in between:
///
/// ```
/// # #[cfg(feature = "backend-mmap")] {
/// use std::io::Cursor;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
/// let mut image = Cursor::new(b"MZ, and the rest of a kernel");
/// memory.read_exact_volatile_from(GuestAddress(0x8_0000), &mut image, 28)?;
/// assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x8_0000))?, *b"MZ");
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "DMA")]
#[doc(alias = "memcpy")]
#[doc(alias = "copy_from_guest")]
#[doc(alias = "copy_to_guest")]
pub trait Bytes<A> {
    /// The error of an access.
    type E;

    /// Writes bytes of `buf` at `addr` until the container ends. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if `buf` is not empty and the first byte cannot be written.
    fn write(&self, buf: &[u8], addr: A) -> Result<usize, Self::E>;

    /// Reads bytes at `addr` into `buf` until the container ends. Returns the number of bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if `buf` is not empty and the first byte cannot be read.
    fn read(&self, buf: &mut [u8], addr: A) -> Result<usize, Self::E>;

    /// Writes all of `buf` at `addr`.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte cannot be written. The bytes before it have been written.
    fn write_slice(&self, buf: &[u8], addr: A) -> Result<(), Self::E>;

    /// Fills `buf` with the bytes at `addr`.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte cannot be read. The bytes before it have been read.
    fn read_slice(&self, buf: &mut [u8], addr: A) -> Result<(), Self::E>;

    /// Writes a value at `addr`.
    ///
    /// A naturally aligned value of 1, 2, 4 or 8 bytes is written by one relaxed store. Use
    /// [`store`](Self::store) for a stronger ordering.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte of the value cannot be written. The bytes before it may have been
    /// written.
    fn write_obj<T: ByteValued>(&self, val: T, addr: A) -> Result<(), Self::E> {
        self.write_slice(val.as_slice(), addr)
    }

    /// Reads a value at `addr`.
    ///
    /// A naturally aligned value of 1, 2, 4 or 8 bytes is read by one relaxed load. Use
    /// [`load`](Self::load) for a stronger ordering.
    ///
    /// # Errors
    ///
    /// Returns an error if a byte of the value cannot be read.
    fn read_obj<T: ByteValued>(&self, addr: A) -> Result<T, Self::E> {
        let mut value = T::zeroed();
        self.read_slice(value.as_mut_slice(), addr).map(|()| value)
    }

    /// Reads up to `count` bytes from `src` into the container at `addr`. Returns their number.
    ///
    /// Stops after the first read that returns fewer bytes than requested. Repeats reads that are
    /// interrupted (`EINTR`). If `src` claims more bytes than it was given room for, the result is
    /// that room.
    ///
    /// # Errors
    ///
    /// Returns an error if `addr` is outside the container, or if the first read fails. If bytes
    /// were moved before a failure, returns their number instead.
    fn read_volatile_from<F>(&self, addr: A, src: &mut F, count: usize) -> Result<usize, Self::E>
    where
        F: ReadVolatile;

    /// Reads exactly `count` bytes from `src` into the container at `addr`.
    ///
    /// # Errors
    ///
    /// Returns an error if the container or the source ends, or a read fails, before all bytes are
    /// moved. The bytes before that may have been moved.
    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: A,
        src: &mut F,
        count: usize,
    ) -> Result<(), Self::E>;

    /// Writes up to `count` bytes of the container at `addr` to `dst`. Returns their number.
    ///
    /// A region or a slice calls `dst` once, and `dst` may accept fewer bytes. A
    /// [`GuestMemory`](crate::GuestMemory) repeats short writes. All repeat writes that are
    /// interrupted (`EINTR`). If `dst` claims more bytes than it was given, the result is their
    /// number.
    ///
    /// # Errors
    ///
    /// Returns an error if `addr` is outside the container, or if the first write fails. If bytes
    /// were moved before a failure, returns their number instead.
    fn write_volatile_to<F>(&self, addr: A, dst: &mut F, count: usize) -> Result<usize, Self::E>
    where
        F: WriteVolatile;

    /// Writes exactly `count` bytes of the container at `addr` to `dst`.
    ///
    /// # Errors
    ///
    /// Returns an error if the container ends, `dst` accepts no more bytes, or a write fails,
    /// before all bytes are moved. The bytes before that may have been moved.
    fn write_all_volatile_to<F>(&self, addr: A, dst: &mut F, count: usize) -> Result<(), Self::E>
    where
        F: WriteVolatile;

    /// Writes `val` at `addr` atomically, with the ordering `order`.
    ///
    /// # Errors
    ///
    /// Returns an error if the value is not contiguous in the container, `addr` is not naturally
    /// aligned, or [`T::A`](AtomicAccess::A) has another size than `T`.
    ///
    /// # Panics
    ///
    /// Panics if `order` is `Acquire` or `AcqRel`.
    fn store<T: AtomicAccess>(&self, val: T, addr: A, order: Ordering) -> Result<(), Self::E>;

    /// Reads a value at `addr` atomically, with the ordering `order`.
    ///
    /// # Errors
    ///
    /// Returns an error if the value is not contiguous in the container, `addr` is not naturally
    /// aligned, or [`T::A`](AtomicAccess::A) has another size than `T`.
    ///
    /// # Panics
    ///
    /// Panics if `order` is `Release` or `AcqRel`.
    fn load<T: AtomicAccess>(&self, addr: A, order: Ordering) -> Result<T, Self::E>;
}

#[cfg(test)]
mod tests;
