//! The constructors of [`MmapRegion`].

use std::io;

use crate::bitmap::NewBitmap;
use crate::guest_memory::FileOffset;
use crate::mmap::{MmapRegion, MmapRegionBuilder};

impl<B: NewBitmap> MmapRegion<B> {
    /// Allocates `size` bytes of zeroes, private to this process.
    ///
    /// The memory is committed. The system counts all of it against its commit limit at once, and
    /// populates a page when it is used. `DiscardVirtualMemory` can discard pages of it.
    ///
    /// # Errors
    ///
    /// - `raw_os_error` is 22 (`EINVAL` of C, as in 0.18.0) for a size of 0, or one that exceeds
    ///   the addresses of a process.
    /// - Otherwise it is the error of `VirtualAlloc`, such as `ERROR_COMMITMENT_LIMIT`.
    ///
    /// Without enough memory for the bitmap, the error is of the kind `OutOfMemory`.
    pub fn new(size: usize) -> io::Result<Self> {
        MmapRegionBuilder::<()>::new(size).build_with(|()| B::try_with_len(size))
    }

    /// Maps `size` bytes of a file, shared with all other mappings of it.
    ///
    /// The offset is a multiple of the page size. The file is not extended. It must be open for
    /// reading and writing; see [`MmapRegionBuilder::with_permissions`] for one that is not.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{FileOffset, MmapRegion};
    ///
    /// let file = tempfile::tempfile()?;
    /// file.set_len(0x4000)?;
    ///
    /// let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0x1000), 0x3000)?;
    /// assert_eq!(region.file_offset().map(|offset| offset.start()), Some(0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - The kind is `InvalidInput` if the file ends before the last page of the mapping, or if
    ///   offset and size exceed the largest file offset.
    /// - `raw_os_error` is 22 (`EINVAL` of C) for a size of 0, or one that exceeds the addresses of
    ///   a process. It is 9 (`EBADF` of C) for a handle that is not valid. Both are as in 0.18.0.
    /// - It is `ERROR_MAPPED_ALIGNMENT` for an offset inside a page, and `ERROR_ACCESS_DENIED` for
    ///   a file that is not open for reading and writing.
    /// - Otherwise it is the error of `CreateFileMappingW` or `MapViewOfFile`.
    ///
    /// Without enough memory for the bitmap, the error is of the kind `OutOfMemory`.
    pub fn from_file(file_offset: FileOffset, size: usize) -> io::Result<Self> {
        MmapRegionBuilder::<()>::new(size)
            .with_file_offset(file_offset)
            .build_with(|()| B::try_with_len(size))
    }
}
