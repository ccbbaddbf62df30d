//! [`Bytes`] by offset in a region, for every [`GuestMemoryRegionBytes`].

use core::sync::atomic::Ordering;

use super::{GuestMemoryRegion, GuestMemoryRegionBytes};
use crate::bitmap::BS;
use crate::bytes::Bytes;
use crate::convert::to_usize;
use crate::guest_memory::{Error, MemoryRegionAddress, Permissions, Result};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::value::{AtomicAccess, ByteValued};
use crate::volatile_memory::VolatileSlice;

/// Returns a slice for an access to the `count` bytes at `addr`, and the offset of `addr` in it.
///
/// Usually that is the whole region, whose slice a mapping has ready.
///
/// # Errors
///
/// - [`Error::HostAddressNotAvailable`] if the region does not permit `access` to its bytes, is not
///   mapped in this process, or the first byte is not accessible.
/// - [`Error::InvalidBackendAddress`] if `addr` is not in the region.
#[inline]
fn slice_for<R: GuestMemoryRegion>(
    region: &R,
    addr: MemoryRegionAddress,
    count: usize,
    access: Permissions,
) -> Result<(VolatileSlice<'_, BS<'_, R::B>>, usize)> {
    if !region.allowed_access().allow(access) && count != 0 {
        return Err(Error::HostAddressNotAvailable);
    }
    match region.as_volatile_slice() {
        Ok(whole) => Ok((whole, to_usize(addr.0))),
        Err(error) => slice_of_part(region, addr, count, error),
    }
}

/// Slow path of [`slice_for`], for a region of which a part is not accessible.
///
/// `error` is the error of `as_volatile_slice`.
#[cold]
#[inline(never)]
fn slice_of_part<R: GuestMemoryRegion>(
    region: &R,
    addr: MemoryRegionAddress,
    count: usize,
    error: Error,
) -> Result<(VolatileSlice<'_, BS<'_, R::B>>, usize)> {
    let rest = region.len().checked_sub(addr.0);
    let wanted = rest.map(|rest| to_usize(rest).min(count));
    let part = wanted.and_then(|wanted| Some(region.reachable_slice(addr, wanted)?.first(wanted)));
    if let Some(part) = part {
        return match wanted {
            Some(1..) if part.is_empty() => Err(Error::HostAddressNotAvailable),
            _ => Ok((part, 0)),
        };
    }
    if region.is_fully_reachable() {
        return Err(error);
    }
    let wanted = wanted.ok_or(Error::InvalidBackendAddress)?;
    match region.reachable_bytes(addr, wanted) {
        0 if wanted != 0 => Err(Error::HostAddressNotAvailable),
        reachable => Ok((region.get_slice(addr, reachable.min(wanted))?, 0)),
    }
}

/// Accesses by offset in the region. Writes are marked in the region's dirty bitmap.
///
/// An access that starts outside the region, or that the region does not permit, is an error. An
/// access that passes the end of the region moves the bytes inside. An access with an empty buffer
/// needs no permission, and may start anywhere.
impl<R: GuestMemoryRegionBytes> Bytes<MemoryRegionAddress> for R {
    type E = Error;

    #[inline]
    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        let (slice, at) = slice_for(self, addr, buf.len(), Permissions::Write)?;
        Ok(slice.write(buf, at)?)
    }

    #[inline]
    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        let (slice, at) = slice_for(self, addr, buf.len(), Permissions::Read)?;
        Ok(slice.read(buf, at)?)
    }

    #[inline]
    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        let (slice, at) = slice_for(self, addr, buf.len(), Permissions::Write)?;
        Ok(slice.write_slice(buf, at)?)
    }

    #[inline]
    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        let (slice, at) = slice_for(self, addr, buf.len(), Permissions::Read)?;
        Ok(slice.read_slice(buf, at)?)
    }

    #[inline]
    fn write_obj<T: ByteValued>(&self, val: T, addr: MemoryRegionAddress) -> Result<()> {
        let (slice, at) = slice_for(self, addr, size_of::<T>(), Permissions::Write)?;
        Ok(slice.write_obj(val, at)?)
    }

    #[inline]
    fn read_obj<T: ByteValued>(&self, addr: MemoryRegionAddress) -> Result<T> {
        let (slice, at) = slice_for(self, addr, size_of::<T>(), Permissions::Read)?;
        Ok(slice.read_obj(at)?)
    }

    fn read_volatile_from<F>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize>
    where
        F: ReadVolatile,
    {
        let (slice, at) = slice_for(self, addr, count, Permissions::Write)?;
        Ok(slice.read_volatile_from(at, src, count)?)
    }

    fn read_exact_volatile_from<F>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()>
    where
        F: ReadVolatile,
    {
        let (slice, at) = slice_for(self, addr, count, Permissions::Write)?;
        Ok(slice.read_exact_volatile_from(at, src, count)?)
    }

    fn write_volatile_to<F>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize>
    where
        F: WriteVolatile,
    {
        let (slice, at) = slice_for(self, addr, count, Permissions::Read)?;
        Ok(slice.write_volatile_to(at, dst, count)?)
    }

    fn write_all_volatile_to<F>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<()>
    where
        F: WriteVolatile,
    {
        let (slice, at) = slice_for(self, addr, count, Permissions::Read)?;
        Ok(slice.write_all_volatile_to(at, dst, count)?)
    }

    #[inline]
    fn store<T: AtomicAccess>(
        &self,
        val: T,
        addr: MemoryRegionAddress,
        order: Ordering,
    ) -> Result<()> {
        let (slice, at) = slice_for(self, addr, size_of::<T>(), Permissions::Write)?;
        Ok(slice.store(val, at, order)?)
    }

    #[inline]
    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, order: Ordering) -> Result<T> {
        let (slice, at) = slice_for(self, addr, size_of::<T>(), Permissions::Read)?;
        Ok(slice.load(at, order)?)
    }
}
