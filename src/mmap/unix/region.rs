//! The parts of [`MmapRegion`] that need protections and flags of `mmap(2)`.

use std::os::fd::AsRawFd;

use super::Result;
use crate::bitmap::{Bitmap, NewBitmap};
use crate::convert::to_u64;
use crate::guest_memory::FileOffset;
use crate::mmap::{MmapRegion, MmapRegionBuilder};

impl<B: NewBitmap> MmapRegion<B> {
    /// Maps `size` bytes of zeroes, private to this process.
    ///
    /// # Errors
    ///
    /// Returns [`MmapRegionError::Mmap`](super::MmapRegionError::Mmap) with the error of mmap(2):
    ///
    /// - `EINVAL` for a size of 0,
    /// - `ENOMEM` if there is no free range of addresses or too little memory.
    ///
    /// Without enough memory for the bitmap, the error is of the kind `OutOfMemory`.
    pub fn new(size: usize) -> Result<Self> {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE;
        Self::build(None, size, libc::PROT_READ | libc::PROT_WRITE, flags)
    }

    /// Maps `size` bytes of a file, shared with all other mappings of it.
    ///
    /// The length of a [block device](crate::mmap#devices-that-are-too-short) is not checked.
    ///
    /// # Examples
    ///
    /// ```
    /// use vm_memory::{FileOffset, MmapRegion};
    ///
    /// let path = std::env::temp_dir().join(format!("vm-memory-{}", std::process::id()));
    /// let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    /// std::fs::remove_file(path)?;
    /// file.set_len(0x4000)?;
    ///
    /// let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0x1000), 0x3000)?;
    /// assert_eq!(region.file_offset().map(|offset| offset.start()), Some(0x1000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// - [`MappingPastEof`](super::MmapRegionError::MappingPastEof) if a regular file ends before
    ///   the last page of the mapping;
    /// - [`InvalidOffsetLength`](super::MmapRegionError::InvalidOffsetLength) if offset and size
    ///   exceed the largest file offset;
    /// - [`Mmap`](super::MmapRegionError::Mmap) with the error of mmap(2) or fstat(2). It is
    ///   `EINVAL` for a size of 0 or an offset inside a page. It is `EACCES` for a file that is not
    ///   open for reading and writing.
    pub fn from_file(file_offset: FileOffset, size: usize) -> Result<Self> {
        let flags = libc::MAP_NORESERVE | libc::MAP_SHARED;
        Self::build(
            Some(file_offset),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        )
    }

    /// Maps `size` bytes with the given protection and flags of `mmap(2)`.
    ///
    /// It maps a file if `file_offset` is `Some`, unless the flags contain `MAP_ANONYMOUS`. The
    /// length of a [block device](crate::mmap#devices-that-are-too-short) is not checked.
    ///
    /// # Errors
    ///
    /// - [`MapFixed`](super::MmapRegionError::MapFixed) if the flags contain `MAP_FIXED`;
    /// - [`MappingPastEof`](super::MmapRegionError::MappingPastEof) if a regular file ends before
    ///   the last page of the mapping;
    /// - [`InvalidOffsetLength`](super::MmapRegionError::InvalidOffsetLength) if offset and size
    ///   exceed the largest file offset;
    /// - [`Mmap`](super::MmapRegionError::Mmap) with the error of mmap(2) or fstat(2), or
    ///   `OutOfMemory` if there is not enough memory for the bitmap.
    pub fn build(
        file_offset: Option<FileOffset>,
        size: usize,
        prot: i32,
        flags: i32,
    ) -> Result<Self> {
        let mut builder = MmapRegionBuilder::<()>::new(size)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags);
        if let Some(file_offset) = file_offset {
            builder = builder.with_file_offset(file_offset);
        }
        builder.build_with(|()| B::try_with_len(size))
    }

    /// Creates a region of an existing mapping, which stays mapped when the region is dropped.
    ///
    /// The region refuses accesses that `prot` does not permit. If `prot` has neither `PROT_READ`
    /// nor `PROT_WRITE`, the protection is not stated, and the region refuses none. No check uses
    /// `flags`.
    ///
    /// # Errors
    ///
    /// - `MmapRegionError::InvalidPointer` if `addr` is not aligned to a page; with the feature
    ///   `xen`, [`MmapRegionError::Mmap`](super::MmapRegionError::Mmap) with `EINVAL`;
    /// - [`MmapRegionError::Mmap`](super::MmapRegionError::Mmap) with `OutOfMemory` if there is not
    ///   enough memory for the bitmap.
    ///
    /// # Safety
    ///
    /// 1. `addr` must point to a mapping of at least `size` bytes, made with `prot` if that states
    ///    the protection.
    /// 2. The mapping must stay in place until the region and all slices of it are dropped.
    /// 3. While the region or a slice of it exists, no Rust reference may refer to any byte of the
    ///    mapping.
    pub unsafe fn build_raw(addr: *mut u8, size: usize, prot: i32, flags: i32) -> Result<Self> {
        let builder = MmapRegionBuilder::<()>::new(size)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags);
        // SAFETY: clauses 1 to 3 of this function's contract are those of `with_raw_mmap_pointer`:
        // size, place and references of the same mapping.
        let builder = unsafe { builder.with_raw_mmap_pointer(addr) };
        builder.build_with(|()| B::try_with_len(size))
    }
}

impl<B: Bitmap> MmapRegion<B> {
    /// Returns the protection that the mapping was created with.
    ///
    /// Returns 0 for an existing mapping whose protection was not stated.
    pub fn prot(&self) -> i32 {
        self.attributes.prot
    }

    /// Returns the flags that the mapping was created with.
    pub fn flags(&self) -> i32 {
        self.attributes.flags
    }

    /// Returns whether dropping the region unmaps the memory, if it is mapped.
    pub fn owned(&self) -> bool {
        self.mapping.is_owned()
    }

    /// Returns whether this region and `other` were built with the same bytes of one file.
    ///
    /// The flags are not compared: with `MAP_ANONYMOUS` or `MAP_PRIVATE`, the regions have separate
    /// bytes. Files are compared by descriptor number: two descriptors of one file count as two
    /// files.
    pub fn fds_overlap<T: Bitmap>(&self, other: &MmapRegion<T>) -> bool {
        let (Some(mine), Some(others)) = (self.file_offset(), other.file_offset()) else {
            return false;
        };
        let end = |file_offset: &FileOffset, size: usize| {
            file_offset.start().saturating_add(to_u64(size))
        };
        mine.file().as_raw_fd() == others.file().as_raw_fd()
            && mine.start() < end(others, other.size())
            && others.start() < end(mine, self.size())
    }

    /// Records whether the memory consists of huge pages of hugetlbfs.
    pub fn set_hugetlbfs(&mut self, hugetlbfs: bool) {
        self.attributes.hugetlbfs = Some(hugetlbfs);
    }

    /// Returns whether the memory consists of huge pages of hugetlbfs, or `None` if unknown.
    pub fn is_hugetlbfs(&self) -> Option<bool> {
        self.attributes.hugetlbfs
    }
}
