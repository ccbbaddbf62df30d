//! [`MmapRegionError`].

use std::io;

/// The reason why a mapping could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MmapRegionError {
    /// The sum of offset and length exceeds the largest file offset.
    #[error(
        "cannot map file: offset plus length exceeds the largest file offset; map fewer bytes"
    )]
    InvalidOffsetLength,
    /// The pointer to an existing mapping is not aligned to a page.
    #[error(
        "cannot use the existing mapping: its pointer is not aligned to a page; \
        pass the start of a page"
    )]
    InvalidPointer,
    /// The flags contain `MAP_FIXED`, which would replace existing mappings.
    #[error("cannot map with MAP_FIXED: it would replace existing mappings; leave the flag out")]
    MapFixed,
    /// Two mappings share bytes of a file.
    #[error("the mappings overlap in their file")]
    MappingOverlap,
    /// The file, a regular one, ends before the last page of the mapping.
    #[error("cannot map file: it ends before the region does; extend the file or map fewer bytes")]
    MappingPastEof,
    /// A system call failed.
    #[error("cannot map memory: {0}")]
    Mmap(io::Error),
}
