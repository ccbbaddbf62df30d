//! Accesses to a [`Window`] by offset.
//!
//! ```text
//!   an access of `count` bytes at `offset`
//!        │
//!        ▼
//!   readable, writable   fast path, inlined: the first slice of the window, if it permits the
//!        │               access. One comparison, one access routine, one mark.
//!        │ past its end
//!        ▼
//!   ByAddress            slow path: a memory that has only the addresses of the window
//! ```

use core::mem::{size_of, MaybeUninit};
use core::sync::atomic::Ordering;

use super::Window;
use crate::bitmap::{Bitmap as _, BS};
use crate::bytes::Bytes;
use crate::convert::{to_u64, to_usize};
use crate::guest_memory::bytes::located;
use crate::guest_memory::{
    not_created_for, Error, GuestAddress, GuestMemory, GuestMemorySliceIterator, Permissions,
    Result,
};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::value::{is_register_sized, AtomicAccess, ByteValued};
use crate::volatile_memory::{self, VolatileSlice};

impl<M: GuestMemory + ?Sized> Window<'_, M> {
    /// Returns the guest address at `offset`, which may be past the end of the window.
    ///
    /// It wraps around at 2^64. [`ByAddress`] subtracts the address of the window again, and
    /// compares the offset with the length.
    #[inline(always)]
    fn at(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.addr.0.wrapping_add(to_u64(offset)))
    }

    /// Marks `count` bytes that were written through `writable`.
    #[inline(always)]
    fn mark_written(&self, offset: usize, count: usize) {
        if let Some(first) = &self.first {
            first.slice().bitmap().mark_dirty(offset, count);
        }
    }

    /// Converts the error of an access to `count` bytes of the first slice, which it contains.
    #[cold]
    #[inline(never)]
    fn failed(&self, error: volatile_memory::Error, offset: usize, count: usize) -> Error {
        match self
            .first
            .as_ref()
            .map(|first| first.slice().subslice(offset, count))
        {
            Some(Ok(part)) => located(error, self.at(offset), part.as_mut_ptr(), count),
            _ => error.into(),
        }
    }

    // The slow paths are functions of their own: inlined, they would make each access large.

    #[cold]
    #[inline(never)]
    fn write_scattered(&self, buf: &[u8], offset: usize) -> Result<()> {
        ByAddress(self).write_slice(buf, self.at(offset))
    }

    #[cold]
    #[inline(never)]
    fn read_scattered(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        ByAddress(self).read_slice(buf, self.at(offset))
    }

    #[cold]
    #[inline(never)]
    fn store_elsewhere<T: AtomicAccess>(
        &self,
        error: volatile_memory::Error,
        val: T,
        offset: usize,
        order: Ordering,
    ) -> Result<()> {
        match error {
            volatile_memory::Error::IOError(_) => Err(self.failed(error, offset, size_of::<T>())),
            _ => ByAddress(self).store(val, self.at(offset), order),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_elsewhere<T: AtomicAccess>(
        &self,
        error: volatile_memory::Error,
        offset: usize,
        order: Ordering,
    ) -> Result<T> {
        match error {
            volatile_memory::Error::IOError(_) => Err(self.failed(error, offset, size_of::<T>())),
            _ => ByAddress(self).load(self.at(offset), order),
        }
    }
}

/// Accesses by offset in the window.
///
/// An access that starts past the end returns [`Error::InvalidBackendAddress`]. One that passes the
/// end moves the bytes before it; see [`Bytes`] for how each method reports that. An access that
/// the window was not created for returns [`Error::IOError`] of the kind `PermissionDenied`. An
/// access with an empty buffer needs no permission, and may start anywhere.
impl<M: GuestMemory + ?Sized> Bytes<usize> for Window<'_, M> {
    type E = Error;

    #[inline(always)]
    fn write(&self, buf: &[u8], offset: usize) -> Result<usize> {
        ByAddress(self).write(buf, self.at(offset))
    }

    #[inline(always)]
    fn read(&self, buf: &mut [u8], offset: usize) -> Result<usize> {
        ByAddress(self).read(buf, self.at(offset))
    }

    #[inline(always)]
    fn write_slice(&self, buf: &[u8], offset: usize) -> Result<()> {
        if !self.writable.holds(offset, buf.len()) {
            return self.write_scattered(buf, offset);
        }
        let written = self.writable.write_slice(buf, offset);
        // Even after a fault: the bytes before it have been written.
        self.mark_written(offset, buf.len());
        written.map_err(|error| self.failed(error, offset, buf.len()))
    }

    #[inline(always)]
    fn read_slice(&self, buf: &mut [u8], offset: usize) -> Result<()> {
        if !self.readable.holds(offset, buf.len()) {
            return self.read_scattered(buf, offset);
        }
        let read = self.readable.read_slice(buf, offset);
        read.map_err(|error| self.failed(error, offset, buf.len()))
    }

    #[inline(always)]
    fn write_obj<T: ByteValued>(&self, val: T, offset: usize) -> Result<()> {
        if !self.writable.holds(offset, size_of::<T>()) {
            return self.write_scattered(val.as_slice(), offset);
        }
        let written = self.writable.write_obj(val, offset);
        // Even after a fault: a value larger than a register may have been written in part.
        self.mark_written(offset, size_of::<T>());
        written.map_err(|error| self.failed(error, offset, size_of::<T>()))
    }

    #[inline(always)]
    fn read_obj<T: ByteValued>(&self, offset: usize) -> Result<T> {
        if !self.readable.holds(offset, size_of::<T>()) {
            let mut value = T::zeroed();
            return self
                .read_scattered(value.as_mut_slice(), offset)
                .map(|()| value);
        }
        let mut value = MaybeUninit::uninit();
        match self.readable.read_obj_into(&mut value, offset) {
            Ok(value) => Ok(*value),
            Err(error) => Err(self.failed(error, offset, size_of::<T>())),
        }
    }

    fn read_volatile_from<F>(&self, offset: usize, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        ByAddress(self).read_volatile_from(self.at(offset), src, count)
    }

    fn read_exact_volatile_from<F>(&self, offset: usize, src: &mut F, count: usize) -> Result<()>
    where
        F: ReadVolatile,
    {
        ByAddress(self).read_exact_volatile_from(self.at(offset), src, count)
    }

    fn write_volatile_to<F>(&self, offset: usize, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        ByAddress(self).write_volatile_to(self.at(offset), dst, count)
    }

    fn write_all_volatile_to<F>(&self, offset: usize, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        ByAddress(self).write_all_volatile_to(self.at(offset), dst, count)
    }

    #[inline(always)]
    fn store<T: AtomicAccess>(&self, val: T, offset: usize, order: Ordering) -> Result<()> {
        if !is_register_sized::<T>() {
            // Such a store is code of another crate, which may panic after it has written. The
            // tracked slice marks even then.
            return ByAddress(self).store(val, self.at(offset), order);
        }
        match self.writable.store(val, offset, order) {
            Ok(()) => {
                self.mark_written(offset, size_of::<T>());
                Ok(())
            }
            Err(error) => self.store_elsewhere(error, val, offset, order),
        }
    }

    #[inline(always)]
    fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        match self.readable.load(offset, order) {
            Ok(value) => Ok(value),
            Err(error) => self.load_elsewhere(error, offset, order),
        }
    }
}

/// A window as a [`GuestMemory`], whose only addresses are those of the window.
///
/// So accesses by offset share the implementation of accesses by guest address.
struct ByAddress<'w, 'm, M: GuestMemory + ?Sized>(&'w Window<'m, M>);

impl<'m, M: GuestMemory + ?Sized> GuestMemory for ByAddress<'_, 'm, M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = BS<'m, M::Bitmap>;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let len = self.0.first.as_ref().map_or(0, |_| self.0.len);
        let end = self.offset(addr).checked_add(count);
        count == 0 || (self.permits(access) && end.is_some_and(|end| end <= len))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.permits(access) {
            return Err(not_created_for("window", self.0.access, access));
        }
        Ok(Slices {
            window: self.0,
            offset: self.offset(addr),
            remaining: count,
        })
    }

    #[inline(always)]
    fn contiguous_slice(
        &self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'_, BS<'_, Self::Bitmap>>> {
        if !self.permits(access) {
            return None;
        }
        self.0
            .first
            .as_ref()?
            .slice()
            .subslice(self.offset(addr), count)
            .ok()
    }
}

impl<'m, M: GuestMemory + ?Sized> ByAddress<'_, 'm, M> {
    #[inline(always)]
    fn permits(&self, access: Permissions) -> bool {
        self.0.access.allow(access)
    }

    /// Returns the offset of `addr` in the window, which may be past its end.
    #[inline(always)]
    fn offset(&self, addr: GuestAddress) -> usize {
        to_usize(addr.0.wrapping_sub(self.0.addr.0))
    }
}

/// The slices of a part of a window. Past the end of the window, it returns an error.
struct Slices<'a, 'm, M: GuestMemory + ?Sized> {
    window: &'a Window<'m, M>,
    offset: usize,
    remaining: usize,
}

impl<'a, 'm, M: GuestMemory + ?Sized> Iterator for Slices<'a, 'm, M> {
    type Item = Result<VolatileSlice<'a, BS<'m, M::Bitmap>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.remaining == 0 {
            return None;
        }
        let Some(slice) = self.window.slice_from(self.offset) else {
            self.remaining = 0;
            return Some(Err(Error::InvalidBackendAddress));
        };
        let slice = slice.first(self.remaining);
        // Neither wraps: the slice is at most the rest of the range, and ends in the window.
        self.remaining = self.remaining.wrapping_sub(slice.len());
        self.offset = self.offset.wrapping_add(slice.len());
        Some(Ok(slice))
    }
}

impl<M: GuestMemory + ?Sized> core::iter::FusedIterator for Slices<'_, '_, M> {}
impl<'a, 'm, M: GuestMemory + ?Sized> GuestMemorySliceIterator<'a, BS<'m, M::Bitmap>>
    for Slices<'a, 'm, M>
{
}
