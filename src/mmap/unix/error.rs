//! [`MmapRegionError`]: the reason why a mapping could not be created.

use std::io;

/// The reason why a mapping could not be created.
#[derive(Debug, thiserror::Error)]
pub enum MmapRegionError {
    /// The sum of offset and length exceeds the largest file offset.
    #[error(
        "cannot map file: offset plus length exceeds the largest file offset; map fewer bytes"
    )]
    InvalidOffsetLength,
    /// The pointer to an existing mapping is not aligned to a page.
    ///
    /// With the feature `xen`, that is [`Mmap`](Self::Mmap) with `EINVAL`.
    #[cfg(not(feature = "xen"))]
    #[error(
        "cannot use the existing mapping: its pointer is not aligned to a page; \
        pass the start of a page"
    )]
    InvalidPointer,
    /// The flags contain `MAP_FIXED`, which would replace existing mappings.
    #[error("cannot map with MAP_FIXED: it would replace existing mappings; leave the flag out")]
    MapFixed,
    /// Two mappings share bytes of a file.
    #[cfg(not(feature = "xen"))]
    #[error("mappings overlap in their file; give each its own part of the file")]
    MappingOverlap,
    /// The file, a regular one, ends before the last page of the mapping.
    #[error("cannot map file: file ends before the region; extend the file or map fewer bytes")]
    MappingPastEof,
    /// A system call failed, or the bitmap does not track the whole region.
    #[error("cannot map memory: {0}")]
    Mmap(#[source] io::Error),
    /// A foreign or grant mapping has no file; it needs the file of the Xen device.
    #[cfg(feature = "xen")]
    #[error("cannot map memory of a Xen guest: there is no file; pass privcmd or gntdev")]
    InvalidFileOffset,
    /// The memory is mapped in advance. This crate never returns it.
    #[cfg(feature = "xen")]
    #[error("the memory is mapped in advance")]
    MappedInAdvance,
    /// The [flags](crate::MmapXenFlags) have unknown bits, or are not a valid combination.
    #[cfg(feature = "xen")]
    #[error(
        "cannot map memory of a Xen guest: flags {0:#x} are invalid; use UNIX, FOREIGN, GRANT or \
        GRANT | NO_ADVANCE_MAP"
    )]
    MmapFlags(u32),
    /// An array of grant references could not be created. This crate never returns it.
    #[cfg(feature = "xen")]
    #[error("cannot make an array of grant references: {0}")]
    Fam(#[source] vmm_sys_util::fam::Error),
    /// An unexpected error. This crate never returns it.
    #[cfg(feature = "xen")]
    #[error("unexpected error")]
    UnexpectedError,
}

impl MmapRegionError {
    /// Creates the error of an existing mapping that does not start at a page boundary.
    pub(super) fn invalid_pointer() -> Self {
        #[cfg(not(feature = "xen"))]
        return MmapRegionError::InvalidPointer;
        #[cfg(feature = "xen")]
        MmapRegionError::Mmap(io::Error::from_raw_os_error(libc::EINVAL))
    }
}
