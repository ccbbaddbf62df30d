//! [`Place`]: where the bytes of a slice are.

use core::fmt::{self, Debug};
use core::marker::PhantomData;

/// The last parameter of the `with_bitmap` functions: the memory that is mapped for each access.
#[cfg(not(feature = "xen"))]
pub(super) type OnDemand = PhantomData<()>;
/// The last parameter of the `with_bitmap` functions: the memory that is mapped for each access.
#[cfg(feature = "xen")]
pub(super) type OnDemand = crate::xen::MmapXen;

/// The place of the first byte of a slice, a value or an array.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Place<'a> {
    addr: *mut u8,
    phantom: PhantomData<&'a u8>,
}

impl<'a> Place<'a> {
    #[inline(always)]
    pub(super) fn new(addr: *mut u8, _on_demand: Option<&'a OnDemand>) -> Self {
        Self {
            addr,
            phantom: PhantomData,
        }
    }

    /// Returns the host address.
    #[inline(always)]
    pub(super) fn as_ptr(self) -> *mut u8 {
        self.addr
    }

    /// Returns the place `offset` bytes further on.
    #[inline(always)]
    pub(super) fn wrapping_add(self, offset: usize) -> Self {
        Self {
            addr: self.addr.wrapping_add(offset),
            ..self
        }
    }
}

impl Debug for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Debug::fmt(&self.addr, f)
    }
}
