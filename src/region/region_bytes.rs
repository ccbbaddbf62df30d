//! [`Bytes`] by address in a region, for regions of ordinary memory.

use core::sync::atomic::Ordering;

use super::{GuestMemoryRegion, GuestMemoryRegionBytes};
use crate::bitmap::BS;
use crate::bytes::{AtomicAccess, ByteValued, Bytes};
use crate::guest_memory::{Error, MemoryRegionAddress, Permissions, Result};
use crate::io::{ReadVolatile, WriteVolatile};
use crate::volatile_memory::VolatileSlice;

/// The whole region, if it permits the access.
#[inline]
fn whole<R: GuestMemoryRegion>(region: &R, access: Permissions) -> Result<VolatileSlice<'_, BS<'_, R::B>>> {
    if !region.allowed_access().allow(access) {
        return Err(Error::HostAddressNotAvailable);
    }
    region.as_volatile_slice()
}

/// A region address as an index. One that is no index is past every slice.
#[inline]
fn index(addr: MemoryRegionAddress) -> Result<usize> {
    usize::try_from(addr.0).map_err(|_| Error::InvalidBackendAddress)
}

/// Addresses count from the start of the region. Writes are marked in the region's bitmap.
///
/// An access that begins outside the region, or that the region does not permit, is an error; one that runs over its end moves what
/// lies inside.
impl<R: GuestMemoryRegionBytes> Bytes<MemoryRegionAddress> for R {
    type E = Error;

    #[inline]
    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(whole(self, Permissions::Write)?.write(buf, index(addr)?)?)
    }

    #[inline]
    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(whole(self, Permissions::Read)?.read(buf, index(addr)?)?)
    }

    #[inline]
    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(whole(self, Permissions::Write)?.write_slice(buf, index(addr)?)?)
    }

    #[inline]
    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(whole(self, Permissions::Read)?.read_slice(buf, index(addr)?)?)
    }

    #[inline]
    fn write_obj<T: ByteValued>(&self, val: T, addr: MemoryRegionAddress) -> Result<()> {
        Ok(whole(self, Permissions::Write)?.write_obj(val, index(addr)?)?)
    }

    #[inline]
    fn read_obj<T: ByteValued>(&self, addr: MemoryRegionAddress) -> Result<T> {
        Ok(whole(self, Permissions::Read)?.read_obj(index(addr)?)?)
    }

    fn read_volatile_from<F>(&self, addr: MemoryRegionAddress, src: &mut F, count: usize) -> Result<usize>
    where
        F: ReadVolatile,
    {
        Ok(whole(self, Permissions::Write)?.read_volatile_from(index(addr)?, src, count)?)
    }

    fn read_exact_volatile_from<F>(&self, addr: MemoryRegionAddress, src: &mut F, count: usize) -> Result<()>
    where
        F: ReadVolatile,
    {
        Ok(whole(self, Permissions::Write)?.read_exact_volatile_from(index(addr)?, src, count)?)
    }

    fn write_volatile_to<F>(&self, addr: MemoryRegionAddress, dst: &mut F, count: usize) -> Result<usize>
    where
        F: WriteVolatile,
    {
        Ok(whole(self, Permissions::Read)?.write_volatile_to(index(addr)?, dst, count)?)
    }

    fn write_all_volatile_to<F>(&self, addr: MemoryRegionAddress, dst: &mut F, count: usize) -> Result<()>
    where
        F: WriteVolatile,
    {
        Ok(whole(self, Permissions::Read)?.write_all_volatile_to(index(addr)?, dst, count)?)
    }

    #[inline]
    fn store<T: AtomicAccess>(&self, val: T, addr: MemoryRegionAddress, order: Ordering) -> Result<()> {
        Ok(whole(self, Permissions::Write)?.store(val, index(addr)?, order)?)
    }

    #[inline]
    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(whole(self, Permissions::Read)?.load(index(addr)?, order)?)
    }
}
