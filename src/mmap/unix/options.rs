//! [`Options`]: the protection, the flags and the kind of pages of a mapping by `mmap(2)`.

use super::mapping::Mapping;
use super::Result;
use crate::bitmap::Bitmap;
use crate::guest_memory::{FileOffset, Permissions};
use crate::mmap::MmapRegionBuilder;

/// The options of a builder. `None` stands for the default.
#[derive(Debug, Default)]
pub(in crate::mmap) struct Options {
    prot: Option<i32>,
    flags: Option<i32>,
    hugetlbfs: Option<bool>,
}

/// The properties of a region that only mappings by `mmap(2)` have.
#[derive(Debug)]
pub(in crate::mmap) struct Attributes {
    pub(super) prot: i32,
    pub(super) flags: i32,
    pub(super) hugetlbfs: Option<bool>,
    #[cfg(feature = "xen")]
    pub(super) xen: super::from_range::XenKind,
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl Options {
    pub(in crate::mmap) fn set_permissions(&mut self, permissions: Permissions) {
        self.prot = Some(match permissions {
            Permissions::No => libc::PROT_NONE,
            Permissions::Read => libc::PROT_READ,
            Permissions::Write | Permissions::ReadWrite => READ_WRITE,
        });
    }

    /// Maps `size` bytes, or uses the mapping at `raw_ptr`.
    pub(in crate::mmap) fn map(
        self,
        size: usize,
        raw_ptr: Option<*mut u8>,
        file_offset: Option<&FileOffset>,
    ) -> Result<(Mapping, Attributes)> {
        let (default_prot, default_flags) = match (raw_ptr, file_offset) {
            // Nothing is known about an existing mapping, with a file or without one.
            (Some(_), _) => (libc::PROT_NONE, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE),
            (None, Some(_)) => (READ_WRITE, libc::MAP_NORESERVE | libc::MAP_SHARED),
            (None, None) => (READ_WRITE, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE),
        };
        let prot = self.prot.unwrap_or(default_prot);
        let flags = self.flags.unwrap_or(default_flags);
        let mapping = match raw_ptr {
            Some(addr) => Mapping::borrowed(addr, size, prot)?,
            None => Mapping::new(size, prot, flags, file_offset)?,
        };
        let attributes = Attributes {
            prot,
            flags,
            hugetlbfs: self.hugetlbfs,
            #[cfg(feature = "xen")]
            xen: Default::default(),
        };
        Ok((mapping, attributes))
    }
}

impl<B: Bitmap> MmapRegionBuilder<B> {
    /// Sets the protection: a combination of `PROT_READ`, `PROT_WRITE` and the other `PROT_` flags.
    ///
    /// The region enforces it: a later `mprotect(2)` does not permit more accesses.
    pub fn with_mmap_prot(mut self, prot: i32) -> Self {
        self.options.prot = Some(prot);
        self
    }

    /// Sets the flags: a combination of `MAP_SHARED`, `MAP_PRIVATE` and the other `MAP_` flags.
    pub fn with_mmap_flags(mut self, flags: i32) -> Self {
        self.options.flags = Some(flags);
        self
    }

    /// Records whether the memory consists of huge pages of hugetlbfs.
    ///
    /// Only [`is_hugetlbfs`](crate::MmapRegion::is_hugetlbfs) uses this.
    pub fn with_hugetlbfs(mut self, hugetlbfs: bool) -> Self {
        self.options.hugetlbfs = Some(hugetlbfs);
        self
    }
}
