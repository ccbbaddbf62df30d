//! Memory of Xen guests: foreign and grant mappings.
//!
//! ```text
//!   guest address    1 << 63 | reference << 12 | offset in the page        FOREIGN: frame << 12
//!        │                                                                       │
//!        ▼                                                                       ▼
//!   References ──► GrantMapping        MmapXen: a GrantMapping per access  ForeignMapping
//!        │              │                      │
//!        ▼              ▼                      ▼
//!   devices             the requests of gntdev and privcmd, the only calls of ioctl(2)
//! ```
//!
//! `crate::mmap` creates regions of these mappings, and `crate::volatile_memory` accesses them.
//! Without the feature `xen`, `absent.rs` is this module. It declares the types that they use,
//! without values.
//!
//! Invariants:
//!
//! - Xen counts pages of 4 KiB, whatever the page size of the host.
//! - A value that owns an entry of gntdev or a VMA releases it on drop. So a mapping that fails
//!   releases everything that was mapped before.
//! - Nothing stays mapped after the access, the guard or the region that needed it. While a page is
//!   mapped, the guest cannot end its grant, and its driver cannot reuse the page.

mod area;
mod copy;
mod devices;
mod foreign;
mod grant;
mod inaccessible;
mod memory;
mod on_demand;
mod references;

pub(crate) use foreign::ForeignMapping;
pub(crate) use grant::GrantMapping;
pub(crate) use inaccessible::Inaccessible;
pub(crate) use memory::XenMemory;
pub(crate) use on_demand::{MappedGrants, MmapXen, SharedGrants, TRANSFER_PAGES};
pub(crate) use references::References;

use std::io;

/// The type of the last parameter of the `with_bitmap` functions.
pub(crate) type MmapInfo = MmapXen;

/// Memory that is mapped for each access.
pub(crate) type OnDemand<'a> = &'a MmapXen;

/// Returns the memory that was passed to a `with_bitmap` function.
#[inline(always)]
pub(crate) fn memory_of(info: Option<&MmapInfo>) -> Option<OnDemand<'_>> {
    info
}

/// Returns the memory as a parameter of a `with_bitmap` function.
#[inline(always)]
pub(crate) fn info_of(memory: Option<OnDemand<'_>>) -> Option<&MmapInfo> {
    memory
}

/// The size of a page of Xen in bytes.
pub(crate) const PAGE_SIZE: usize = 4096;

/// The base-2 logarithm of [`PAGE_SIZE`].
const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// The maximum number of pages of one request to gntdev, which Linux limits.
pub(crate) const REQUEST_PAGES: usize = 65536;

/// Returns the error of an argument that no request accepts.
#[cold]
pub(crate) fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// Returns the error of an operation that memory mapped for each access does not support.
#[cold]
pub(crate) fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

/// Returns the error of an allocation that failed.
#[cold]
fn out_of_memory() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}

/// Returns the domain number that a range states.
///
/// # Errors
///
/// Returns `EINVAL` if it has more than 16 bits. The kernel would truncate it, and map the memory
/// of another domain.
pub(crate) fn domain(number: u32) -> io::Result<u16> {
    u16::try_from(number).map_err(|_| invalid())
}
