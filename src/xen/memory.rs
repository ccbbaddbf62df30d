//! [`XenMemory`]: the memory of a region of a Xen guest.

use std::io;
use std::ptr::null_mut;

use super::{ForeignMapping, GrantMapping, MmapXen, OnDemand};

/// The memory of a region of a Xen guest.
#[derive(Debug)]
pub(crate) enum XenMemory {
    /// Frames of another domain.
    Foreign(ForeignMapping),
    /// Pages that another domain granted.
    Granted(GrantMapping),
    /// The same, mapped for each access.
    OnDemand(MmapXen),
}

impl XenMemory {
    /// Returns the address of the first byte, or null if the memory is mapped for each access.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self {
            XenMemory::Foreign(mapping) => mapping.as_ptr(),
            XenMemory::Granted(mapping) => mapping.as_ptr(),
            XenMemory::OnDemand(_) => null_mut(),
        }
    }

    /// Returns the memory, if it is mapped for each access.
    pub(crate) fn on_demand(&self) -> Option<OnDemand<'_>> {
        match self {
            XenMemory::OnDemand(memory) => Some(memory),
            _ => None,
        }
    }

    /// Unmaps the memory.
    pub(crate) fn unmap(&mut self) -> io::Result<()> {
        match self {
            XenMemory::Foreign(mapping) => mapping.unmap(),
            XenMemory::Granted(mapping) => mapping.unmap(),
            XenMemory::OnDemand(_) => Ok(()),
        }
    }
}
