//! [`Options`]: the accesses that a mapping permits.

use std::io;

use super::mapping::Mapping;
use crate::guest_memory::{FileOffset, Permissions};

/// The options of a mapping, which a builder sets.
#[derive(Debug)]
pub(in crate::mmap) struct Options {
    permissions: Permissions,
}

/// The properties that only regions of this system have. There are none.
#[derive(Debug)]
pub(in crate::mmap) struct Attributes;

impl Default for Options {
    fn default() -> Self {
        Self {
            permissions: Permissions::ReadWrite,
        }
    }
}

impl Options {
    pub(in crate::mmap) fn set_permissions(&mut self, permissions: Permissions) {
        // Windows has no protection that permits writes only.
        self.permissions = match permissions {
            Permissions::Write => Permissions::ReadWrite,
            others => others,
        };
    }

    /// Maps `size` bytes, or uses the mapping at `raw_ptr`.
    pub(in crate::mmap) fn map(
        self,
        size: usize,
        raw_ptr: Option<*mut u8>,
        file_offset: Option<&FileOffset>,
    ) -> io::Result<(Mapping, Attributes)> {
        let permissions = self.permissions;
        let mapping = match (raw_ptr, file_offset) {
            (Some(addr), _) => Mapping::borrowed(addr, size, permissions)?,
            (None, Some(file_offset)) => Mapping::of_file(file_offset, size, permissions)?,
            (None, None) => Mapping::private(size, permissions)?,
        };
        Ok((mapping, Attributes))
    }
}
