//! The state of a mapping on Windows.

use std::fs::File;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::Permissions;

use super::HostMapping;
use crate::region::{BackingKind, Sharing};

/// A region's backing with its file open and checked.
#[derive(Clone, Debug)]
pub(crate) struct OpenedBacking {
    pub(crate) kind: BackingKind,
    /// The file, and the offset in bytes at which the region begins in it.
    pub(crate) file: Option<(Arc<File>, u64)>,
    pub(crate) sharing: Sharing,
    /// The identity of a file, if equal offsets in it are equal bytes.
    pub(crate) identity: Option<FileIdentity>,
    /// The size of its pages in bytes.
    pub(crate) page_size: u64,
}

/// The serial number of a file's volume, and its number there.
pub(crate) type FileIdentity = (u32, u64);

impl OpenedBacking {
    /// Returns whether writes are visible in other mappings of the file.
    pub(crate) fn is_shared(&self) -> bool {
        self.file.is_some() && self.sharing == Sharing::Shared
    }
}

/// The state of a mapping's pages. The system has all of it.
#[derive(Debug)]
pub(crate) struct PageState;

impl HostMapping {
    /// States the permissions of the mapping to vm-memory.
    pub(super) fn describe_to<B: Bitmap>(
        &self,
        builder: MmapRegionBuilder<B>,
    ) -> MmapRegionBuilder<B> {
        builder.with_permissions(if self.options.read_only {
            Permissions::Read
        } else {
            Permissions::ReadWrite
        })
    }
}
