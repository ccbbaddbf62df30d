//! The types of this module without the feature `xen`: they have no values.
//!
//! An `Option` of one of them takes no space, and the compiler removes each branch on it. So the
//! code that uses them needs no `cfg`.

use core::convert::Infallible;
use core::marker::PhantomData;
use std::io;

use crate::access::fault::Direction;

/// The size of a page of Xen in bytes.
pub(crate) const PAGE_SIZE: usize = 4096;

/// The maximum number of pages that a transfer maps at once.
pub(crate) const TRANSFER_PAGES: usize = 256;

/// The type of the last parameter of the `with_bitmap` functions, as in 0.18.0.
pub(crate) type MmapInfo = PhantomData<()>;

/// Memory that is mapped for each access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OnDemand<'a>(Infallible, PhantomData<&'a ()>);

const _: () = assert!(size_of::<Option<OnDemand<'_>>>() == 0);

/// Returns the memory that was passed to a `with_bitmap` function.
#[inline(always)]
pub(crate) fn memory_of(_: Option<&MmapInfo>) -> Option<OnDemand<'_>> {
    None
}

/// Returns the memory as a parameter of a `with_bitmap` function.
#[inline(always)]
pub(crate) fn info_of(_: Option<OnDemand<'_>>) -> Option<&MmapInfo> {
    None
}

impl OnDemand<'_> {
    pub(crate) fn map(&self, _: usize, _: usize, _: Direction) -> io::Result<MappedGrants> {
        match self.0 {}
    }

    pub(crate) fn map_first(
        &self,
        _: usize,
        _: usize,
        _: usize,
        _: Direction,
    ) -> io::Result<(MappedGrants, Option<io::Error>)> {
        match self.0 {}
    }

    pub(crate) fn inaccessible(&self, _: usize, _: io::Error) -> Inaccessible {
        match self.0 {}
    }

    pub(crate) fn is_same(&self, _: OnDemand<'_>) -> bool {
        match self.0 {}
    }

    pub(crate) fn copies(&self, _: usize, _: usize) -> bool {
        match self.0 {}
    }

    pub(crate) fn copy_to(&self, _: usize, _: &mut [u8]) -> Result<(), CopyError> {
        match self.0 {}
    }

    pub(crate) fn copy_from(&self, _: usize, _: &[u8]) -> Result<(), CopyError> {
        match self.0 {}
    }
}

/// A copy that failed.
#[derive(Debug)]
pub(crate) struct CopyError {
    pub(crate) completed: usize,
    pub(crate) error: io::Error,
}

/// A part of the memory that is mapped until this value is dropped.
#[derive(Debug)]
pub(crate) struct MappedGrants(Infallible);

impl MappedGrants {
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self.0 {}
    }

    pub(crate) fn size(&self) -> usize {
        match self.0 {}
    }
}

/// Grants that stay mapped until the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct SharedGrants(Infallible);

impl From<MappedGrants> for SharedGrants {
    fn from(grants: MappedGrants) -> Self {
        match grants.0 {}
    }
}

/// Addresses that are not accessible.
#[derive(Debug)]
pub(crate) struct Inaccessible(Infallible);

impl Inaccessible {
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self.0 {}
    }

    pub(crate) fn error(&self) -> &io::Error {
        match self.0 {}
    }
}

/// The memory of a region of a Xen guest.
#[cfg(all(feature = "backend-mmap", unix))]
#[derive(Debug)]
pub(crate) struct XenMemory(Infallible);

#[cfg(all(feature = "backend-mmap", unix))]
impl XenMemory {
    pub(crate) fn on_demand(&self) -> Option<OnDemand<'_>> {
        match self.0 {}
    }

    pub(crate) fn unmap(&mut self) -> io::Result<()> {
        match self.0 {}
    }
}

/// Returns the error of an operation that memory mapped for each access does not support.
#[cold]
pub(crate) fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}
