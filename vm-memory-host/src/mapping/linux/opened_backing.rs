//! [`OpenedBacking`]: a region's backing with its file open.

use std::fs::File;
use std::sync::Arc;

use crate::region::{BackingKind, Sharing};

/// A region's backing with its file open and checked.
#[derive(Clone, Debug)]
pub(crate) struct OpenedBacking {
    pub(crate) kind: BackingKind,
    /// The file, and the offset in bytes at which the region begins in it.
    pub(crate) file: Option<(Arc<File>, u64)>,
    pub(crate) sharing: Sharing,
    /// The identity of a file that the caller passed, if equal offsets in it are equal bytes.
    pub(crate) identity: Option<FileIdentity>,
    /// The size of its pages in bytes.
    pub(crate) page_size: u64,
    /// Whether the file is on a mounted tmpfs, which has its own size limit and settings.
    pub(crate) own_tmpfs: bool,
    /// The number of bytes for which the file of this backing has pages or disk blocks.
    pub(crate) present: u64,
    /// Whether file space is allocated for all of the region, or for all its plugged blocks.
    pub(crate) allocated: bool,
}

impl OpenedBacking {
    /// Returns whether writes are visible in other mappings of the file.
    pub(crate) fn is_shared(&self) -> bool {
        self.file.is_some() && self.sharing == Sharing::Shared
    }

    /// Returns the minimum number of bytes that must be allocated for `size` bytes of the file.
    ///
    /// Pages of the file that are outside of the region count as if they were inside. For several
    /// regions of one file, pass the sum of their sizes: the pages count once.
    pub(crate) fn missing(&self, size: u64) -> u64 {
        if self.uses_pages_of_file() {
            size.saturating_sub(self.present)
        } else {
            size
        }
    }

    /// Returns whether the region uses the pages that the file already has.
    ///
    /// A private mapping uses those of a memfd until it is written to. Huge pages are reserved for
    /// all its copies.
    pub(crate) fn uses_pages_of_file(&self) -> bool {
        match self.kind {
            BackingKind::Memfd => true,
            BackingKind::Hugetlb => self.is_shared(),
            BackingKind::Anonymous | BackingKind::File => false,
        }
    }
}

/// The device and inode of a file, or the number of a device node and no inode.
pub(crate) type FileIdentity = (u64, Option<u64>);
