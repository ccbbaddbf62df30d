//! [`MmapRegion`]: a mapping of this process, with its dirty bitmap.

use std::any::Any;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::mapping::Mapping;
use super::owner::Owner;
use super::{HostRange, MmapRegionBuilder, Result};
use crate::bitmap::{Bitmap, NewBitmap, BS};
use crate::guest_memory::FileOffset;
use crate::mmap::{BlockStates, PluggedBlocks};
use crate::volatile_memory::{self, VolatileMemory, VolatileSlice};

/// A mapping of this process, with a bitmap of the pages that were written.
///
/// It has no guest address; [`GuestRegionMmap`](crate::GuestRegionMmap) adds one. Use
/// [`MmapRegionBuilder`] for other protections, existing mappings and plugged blocks.
///
/// Dropping a region unmaps it. A region of an existing mapping ([`build_raw`](Self::build_raw))
/// drops its [owner](MmapRegionBuilder::with_owner) instead, if it has one.
///
/// # Examples
///
/// ```
/// use vm_memory::{Bytes, MmapRegion, VolatileMemory};
///
/// let region: MmapRegion = MmapRegion::new(0x1000)?;
/// region.as_volatile_slice().write_slice(b"boot", 0x10)?;
/// region.unmap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmap")]
#[derive(Debug)]
pub struct MmapRegion<B = ()> {
    pub(super) mapping: Mapping,
    pub(super) bitmap: B,
    pub(super) file_offset: Option<FileOffset>,
    pub(super) prot: i32,
    pub(super) flags: i32,
    pub(super) hugetlbfs: Option<bool>,
    /// The blocks that are accessible. `None` if the whole mapping is.
    pub(super) blocks: Option<Arc<PluggedBlocks>>,
    pub(super) owner: Option<Owner>,
    #[cfg(feature = "xen")]
    pub(super) xen: super::from_range::XenKind,
}

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

impl<B> MmapRegion<B> {
    /// Unmaps the region, and returns the error that dropping it would ignore.
    ///
    /// # Errors
    ///
    /// Returns the error of munmap(2). The addresses then stay mapped until the process ends, and
    /// private pages are freed. It is `ENOMEM` at `vm.max_map_count` (proc_sys_vm(5)), if the
    /// kernel has merged the mapping with its neighbours. Dropping the region also frees the pages.
    /// For granted memory of a Xen guest, it may also be the error of `GNTDEV_UNMAP_GRANT_REF`.
    #[doc(alias = "munmap")]
    pub fn unmap(mut self) -> io::Result<()> {
        self.mapping.unmap()
    }

    /// Returns the host addresses of the mapping.
    pub(in crate::mmap) fn host_range(&self) -> HostRange {
        self.mapping.host()
    }
}

impl<B: Bitmap> MmapRegion<B> {
    /// Returns the host address of the first byte.
    ///
    /// With the feature `xen`, it is null for memory that is mapped for each access.
    ///
    /// Accesses through the pointer are not checked, not marked dirty and not protected from
    /// faults.
    pub fn as_ptr(&self) -> *mut u8 {
        self.host_range().addr()
    }

    /// Returns the size in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.host_range().size()
    }

    /// Returns the file and the offset in it that the region was built with, if there is one.
    ///
    /// The file has the bytes of the region only if the [flags](Self::flags) contain `MAP_SHARED`
    /// and not `MAP_ANONYMOUS`. With `MAP_PRIVATE`, writes to the region do not reach the file.
    /// With `MAP_ANONYMOUS`, the region never had bytes of the file. Check the flags before you
    /// pass the file to another process as this memory. For an existing mapping, the file and the
    /// flags are those that the caller stated.
    pub fn file_offset(&self) -> Option<&FileOffset> {
        self.file_offset.as_ref()
    }

    /// Returns the protection that the mapping was created with.
    ///
    /// Returns 0 for an existing mapping whose protection was not stated.
    pub fn prot(&self) -> i32 {
        self.prot
    }

    /// Returns the flags that the mapping was created with.
    pub fn flags(&self) -> i32 {
        self.flags
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
            file_offset
                .start()
                .saturating_add(u64::try_from(size).unwrap_or(u64::MAX))
        };
        mine.file().as_raw_fd() == others.file().as_raw_fd()
            && mine.start() < end(others, other.size())
            && others.start() < end(mine, self.size())
    }

    /// Records whether the memory consists of huge pages of hugetlbfs.
    pub fn set_hugetlbfs(&mut self, hugetlbfs: bool) {
        self.hugetlbfs = Some(hugetlbfs);
    }

    /// Returns whether the memory consists of huge pages of hugetlbfs, or `None` if unknown.
    pub fn is_hugetlbfs(&self) -> Option<bool> {
        self.hugetlbfs
    }

    /// Returns the owner of the mapping ([`MmapRegionBuilder::with_owner`]), if it is a `T`.
    pub fn owner<T: Any>(&self) -> Option<&T> {
        self.owner.as_ref()?.get()
    }

    /// Returns the states of the region's blocks, or `None` if it has no blocks.
    ///
    /// They decide which bytes are accessible.
    pub fn plugged_blocks(&self) -> Option<&BlockStates> {
        self.blocks.as_deref().map(|blocks| &**blocks)
    }

    /// Returns whether all bytes are in plugged blocks, or the region has no blocks.
    ///
    /// The cost does not depend on the number of blocks.
    pub(in crate::mmap) fn is_fully_plugged(&self) -> bool {
        let blocks = self.blocks.as_ref();
        blocks.is_none_or(|blocks| blocks.is_whole() && blocks.size() >= self.size())
    }

    /// Returns whether the memory is mapped in advance, rather than for each access.
    pub(in crate::mmap) fn has_host_address(&self) -> bool {
        self.mapping.on_demand().is_none()
    }

    /// Returns the `count` bytes at `offset`, if they are all in plugged blocks, or mapped for each
    /// access.
    ///
    /// This is the slow path, after [`HostRange::slice`] has returned `None`.
    #[cold]
    #[inline(never)]
    pub(in crate::mmap) fn plugged_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        #[cfg(feature = "xen")]
        if let Some(memory) = self.mapping.on_demand() {
            return self.on_demand_slice(memory, offset, count);
        }
        let blocks = self.blocks.as_ref()?;
        // Each access by offset asks for the whole region, so this case must not search the blocks.
        let is_plugged = if (offset, count) == (0, self.size()) {
            self.is_fully_plugged()
        } else {
            blocks.is_plugged(offset, count)
        };
        if !is_plugged {
            return None;
        }
        let host = self.host_range().opened();
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        unsafe { host.slice(offset, count, || self.bitmap.slice_at(offset)) }
    }

    /// Returns the bytes at `offset`, up to `count`, that are in plugged blocks.
    ///
    /// It loads each state once. So a block that another thread plugs or unplugs is either included
    /// or not, and the bytes before it are included. Returns `None` if the region has no blocks, or
    /// if `offset` is past its end.
    pub(in crate::mmap) fn plugged_part(
        &self,
        offset: usize,
        count: usize,
    ) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let blocks = self.blocks.as_ref()?;
        let count = count.min(self.size().checked_sub(offset)?);
        let plugged = blocks.plugged_from(offset, count);
        let host = self.host_range().opened();
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        unsafe { host.slice(offset, plugged, || self.bitmap.slice_at(offset)) }
    }

    /// Returns the bitmap of the pages that were written.
    #[inline]
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }
}

impl<B: Bitmap> VolatileMemory for MmapRegion<B> {
    type B = B;

    #[inline]
    fn len(&self) -> usize {
        self.host_range().size()
    }

    #[inline]
    fn get_slice(
        &self,
        offset: usize,
        count: usize,
    ) -> volatile_memory::Result<VolatileSlice<'_, BS<'_, B>>> {
        let bitmap = || self.bitmap.slice_at(offset);
        // SAFETY: the mapping stays in place while `self` is borrowed. Either it belongs to
        // `self.mapping`, which unmaps it on drop, or clause 2 of `build_raw` or
        // `with_raw_mmap_pointer` demands it.
        let slice = unsafe { self.host_range().slice(offset, count, bitmap) };
        match slice.or_else(|| self.plugged_slice(offset, count)) {
            Some(slice) => Ok(slice),
            // The range overflows, ends past the mapping, or is not plugged.
            None => {
                let addr = self.compute_end_offset(offset, count)?;
                Err(volatile_memory::Error::OutOfBounds { addr })
            }
        }
    }

    /// Returns all bytes of the region, or no bytes if any block of it is not plugged.
    ///
    /// The guest decides which blocks are plugged, so this must not panic.
    fn as_volatile_slice(&self) -> VolatileSlice<'_, BS<'_, B>> {
        match self.get_slice(0, self.len()) {
            Ok(slice) => slice,
            Err(_) => {
                let bitmap = self.bitmap.slice_at(0);
                // SAFETY: the slice has 0 bytes, so no byte needs to be mapped or free of
                // references.
                unsafe { VolatileSlice::with_bitmap(self.as_ptr(), 0, bitmap, None) }
            }
        }
    }
}
