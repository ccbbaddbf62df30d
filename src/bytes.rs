//! Plain values, and [`Bytes`]: reading and writing them at an address.

use core::sync::atomic::Ordering;

use crate::io::{ReadVolatile, WriteVolatile};
pub use crate::value::{AtomicAccess, ByteValued};

/// A range of bytes with addresses of type `A`.
///
/// Implemented by everything that holds guest bytes, each with its own kind of address:
///
/// | type | address |
/// |---|---|
/// | [`GuestMemory`](crate::GuestMemory), a whole memory | [`GuestAddress`](crate::GuestAddress) (an IOVA behind an IOMMU) |
/// | [`GuestMemoryRegion`](crate::GuestMemoryRegion) of ordinary RAM | [`MemoryRegionAddress`](crate::MemoryRegionAddress), from the region's start |
/// | [`VolatileSlice`](crate::VolatileSlice) | `usize`, from the slice's start |
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
